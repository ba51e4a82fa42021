package bench

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"nvstore.dev/image/pebbledev"
)

// A store is where values can be put.
type store interface {
	// put returns when the value is durable.
	put(key string, value []byte) error
	close() error
}

type opener func(dir string, w *workload) (store, error)

const (
	rootSize  = 512
	rootsSize = 128 << 10 // bytes at the start of the file, for two roots
)

// pwriteStore overwrites a slot of a file that is allocated and written.
type pwriteStore struct {
	f    *os.File
	slot int64
	buf  []byte // what to write instead of a value

	twoPlaces bool
}

func openPwrite(dir string, w *workload) (store, error) { return newPwrite(dir, w.size) }

// pwriteOf writes n bytes, whatever the value: what a disk can do at best for
// one who has to write more than the value. The last of them, as long as a
// root, may go to a place of their own.
func pwriteOf(n int, twoPlaces bool) opener {
	return func(dir string, _ *workload) (store, error) {
		s, err := newPwrite(dir, n)
		if err == nil {
			s.buf = make([]byte, n)
			s.twoPlaces = twoPlaces
		}
		return s, err
	}
}

func newPwrite(dir string, n int) (*pwriteStore, error) {
	f, err := os.Create(filepath.Join(dir, "slots"))
	if err != nil {
		return nil, err
	}
	s := &pwriteStore{f: f, slot: int64(n+4095) &^ 4095}
	_, err = f.Write(make([]byte, rootsSize+s.slot*numKeys))
	return s, errors.Join(err, f.Sync())
}

func (s *pwriteStore) put(key string, value []byte) error {
	i, err := strconv.Atoi(key[len("blob/"):])
	if err != nil {
		return err
	}
	if s.buf != nil {
		copy(s.buf, value)
		value = s.buf
	}
	if s.twoPlaces {
		n := len(value) - rootSize
		if _, err := s.f.WriteAt(value[n:], int64(i)%2*rootsSize/2); err != nil {
			return err
		}
		value = value[:n]
	}
	if _, err := s.f.WriteAt(value, rootsSize+int64(i)*s.slot); err != nil {
		return err
	}
	return unix.Fdatasync(int(s.f.Fd()))
}

func (s *pwriteStore) close() error { return s.f.Close() }

// renameStore is the classical way to replace a file.
type renameStore struct{ dir *os.File }

func openRename(dir string, _ *workload) (store, error) {
	d, err := os.Open(dir)
	return renameStore{d}, err
}

func (s renameStore) put(key string, value []byte) error {
	path := filepath.Join(s.dir.Name(), filepath.Base(key))
	f, err := os.Create(path + ".tmp")
	if err != nil {
		return err
	}
	_, err = f.Write(value)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return err
	}
	return s.dir.Sync()
}

func (s renameStore) close() error { return s.dir.Close() }

type bboltStore struct{ db *bbolt.DB }

var bucket = []byte("blobs")

func openBbolt(dir string, _ *workload) (store, error) {
	db, err := bbolt.Open(filepath.Join(dir, "db"), 0o600, nil)
	if err != nil {
		return nil, err
	}
	return bboltStore{db}, db.Update(func(tx *bbolt.Tx) error {
		_, err := tx.CreateBucketIfNotExists(bucket)
		return err
	})
}

func (s bboltStore) put(key string, value []byte) error {
	return s.db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucket).Put([]byte(key), value)
	})
}

func (s bboltStore) close() error { return s.db.Close() }

// fill makes keys with values of smallSize bytes.
func (s bboltStore) fill(blobs int) error {
	r := rand.NewChaCha8([32]byte{2})
	return s.db.Update(func(tx *bbolt.Tx) error {
		for i := range blobs {
			p := make([]byte, smallSize)
			_, _ = r.Read(p)
			if err := tx.Bucket(bucket).Put([]byte(blobName(i)), p); err != nil {
				return err
			}
		}
		return nil
	})
}

// sqliteStore is one sqlite3 process, fed through a pipe. It reads values from
// files in memory, so that no time goes into writing them as SQL.
type sqliteStore struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	values string           // directory
	files  map[*byte]string // by where a value begins
}

func openSQLite(dir string, w *workload) (store, error) {
	return startSQLite(filepath.Join(dir, "db"), w)
}

func startSQLite(db string, w *workload) (_ *sqliteStore, err error) {
	s := &sqliteStore{cmd: exec.Command("sqlite3", "-batch", "-bail", db), files: map[*byte]string{}}
	if s.values, err = os.MkdirTemp("/dev/shm", "bench"); err != nil {
		return nil, err
	}
	for i, v := range w.values {
		path := filepath.Join(s.values, fmt.Sprint(i))
		if err := os.WriteFile(path, v, 0o600); err != nil {
			return nil, err
		}
		s.files[&v[0]] = path
	}
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.out = bufio.NewReader(out)
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	return s, s.run("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; " +
		"CREATE TABLE blobs(key TEXT PRIMARY KEY, value BLOB);")
}

// run sends statements and waits until they are done.
func (s *sqliteStore) run(sql string) error {
	if _, err := io.WriteString(s.in, sql+" SELECT 'done';\n"); err != nil {
		return err
	}
	for {
		line, err := s.out.ReadString('\n')
		if err != nil {
			return fmt.Errorf("sqlite3: %w", err)
		}
		if line == "done\n" {
			return nil
		}
	}
}

func (s *sqliteStore) put(key string, value []byte) error {
	return s.run(fmt.Sprintf("INSERT INTO blobs VALUES('%s', readfile('%s')) ON CONFLICT DO UPDATE SET value=excluded.value;",
		key, s.files[&value[0]]))
}

// fill makes rows with values of smallSize bytes.
func (s *sqliteStore) fill(blobs int) error {
	return s.run(fmt.Sprintf("WITH RECURSIVE c(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM c WHERE i+1 < %d) "+
		"INSERT INTO blobs SELECT printf('dev/%%06d/eeprom', i), randomblob(%d) FROM c; PRAGMA wal_checkpoint(TRUNCATE);", blobs, smallSize))
}

// cpu reads the nanoseconds that the process ran, from proc_pid_schedstat: one
// thread, and much finer than the clock ticks of proc_pid_stat.
func (s *sqliteStore) cpu() (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/schedstat", s.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(text), " ")
	ns, err := strconv.ParseInt(first, 10, 64)
	return time.Duration(ns), err
}

func (s *sqliteStore) close() error {
	return errors.Join(s.in.Close(), s.cmd.Wait(), os.RemoveAll(s.values))
}

// pebbleStore is what a store in a Pebble folder can do at best: the bytes into
// blocks of a device, and one Sync.
type pebbleStore struct {
	d    *pebbledev.Device
	slot int64
}

func openPebble(dir string, w *workload) (store, error) {
	f, err := pebbledev.OpenFolder(filepath.Join(dir, "home"), &pebbledev.Options{Create: true})
	if err != nil {
		return nil, err
	}
	s := &pebbleStore{slot: int64(w.size+4095) &^ 4095}
	s.d, err = f.Create(pebbledev.UUID{1}, s.slot*numKeys)
	return s, errors.Join(err, f.Close())
}

func (s *pebbleStore) put(key string, value []byte) error {
	i, err := strconv.Atoi(key[len("blob/"):])
	if err != nil {
		return err
	}
	if _, err := s.d.WriteAt(value, int64(i)*s.slot); err != nil {
		return err
	}
	return s.d.Sync()
}

func (s *pebbleStore) close() error { return s.d.Close() }
