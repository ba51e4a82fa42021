package bench

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/nvstore"
)

func openTables(t *testing.T) {
	for _, blobs := range scale([]int{10, 4000, 10_000, 100_000}, []int{10, 200}) {
		dir := directory(t)
		list := []subject{plainRead(), coldRead(), bboltOpening(blobs), sqliteOpening(blobs)}
		for _, home := range []string{onRaw, onQCOW2} {
			k := kind{home, true}
			for _, state := range []string{"clean", "crashed"} {
				path := filepath.Join(dir, home+"-"+state)
				require.NoError(t, k.build(path, blobs, state == "crashed"))
				if state == "clean" {
					list = append(list, k.opening(path, "read-only", true), k.opening(path, "after a close", false))
				} else {
					list = append(list, k.opening(path, "after a crash", false))
				}
			}
		}
		rows := measure(t, dir, list, scale(200, 10))
		tb := timeTable(fmt.Sprintf("Opening a store of %d blobs, and finding one", blobs), rows)
		if blobs > 10 {
			show(tb)
			continue
		}
		goal := &table{title: "Goal (1 and below is met)", columns: []string{"goal", "has µs", "may µs", "ratio"}}
		for _, r := range rows[len(rows)-6:] {
			const may = 2 * time.Millisecond
			goal.add(r.name+" in 2 ms", whole(r.median()), whole(may), ratio(r.median(), may))
		}
		show(tb, goal)
	}
}

// build makes a store of a number of blobs.
func (k kind) build(path string, blobs int, crash bool) error {
	s, err := nvstore.Create(path, k.options())
	if err != nil {
		return err
	}
	err = fill(s, blobs)
	if err == nil {
		err = churn(s, rand.New(rand.NewPCG(4, 4)), blobs, 50)
	}
	if err = errors.Join(err, s.Close()); err != nil || !crash {
		return err
	}
	s, dev, err := k.openStore(path, false)
	if err != nil {
		return err
	}
	return errors.Join(s.Put(blobName(0), make([]byte, 6<<10), nil), abandon(dev))
}

// openStore is nvstore.Open, in two steps.
func (k kind) openStore(location string, readOnly bool) (*nvstore.Store, image.Device, error) {
	dev, err := chain.Open(location, &chain.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, nil, err
	}
	s, err := nvstore.OpenDevice(dev, &nvstore.Options{Key: k.key(), ReadOnly: readOnly, Idle: -1})
	if err != nil {
		return nil, nil, errors.Join(err, dev.Close())
	}
	return s, dev, nil
}

// An openRunner opens something that is there already.
type openRunner struct {
	open  func() (close func() error, err error)
	timer any // perhaps a server
	end   func() error
}

func (o *openRunner) run(int) (s sample, err error) {
	var done func() error
	if s, err = timed(o.timer, func() (err error) {
		done, err = o.open()
		return err
	}); err != nil {
		return s, err
	}
	return s, done()
}

func (o *openRunner) close() error {
	if o.end == nil {
		return nil
	}
	return o.end()
}

// opening abandons what it opened, so that each opening finds the same file.
func (k kind) opening(path, how string, readOnly bool) subject {
	return subject{k.String() + ", " + how, func(string) (runner, error) {
		return &openRunner{open: func() (func() error, error) {
			s, dev, err := k.openStore(path, readOnly)
			if err != nil {
				return nil, err
			}
			_, err = s.Stat(blobName(3))
			return func() error { return abandon(dev) }, err
		}}, nil
	}}
}

// plainRead opens a file and reads a block.
func plainRead() subject {
	return subject{"open+pread of 4 KiB", func(dir string) (runner, error) {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
			return nil, err
		}
		p := make([]byte, 4096)
		return &openRunner{open: func() (func() error, error) {
			f, err := os.Open(path)
			if err != nil {
				return nil, err
			}
			_, err = f.ReadAt(p, 0)
			return f.Close, err
		}}, nil
	}}
}

// coldRead is the least that a writer can do after a crash: what it reads must
// come from the medium.
func coldRead() subject {
	return subject{"open+fdatasync+fadvise+pread of 4 KiB", func(dir string) (runner, error) {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			return nil, err
		}
		p := make([]byte, 4096)
		return &openRunner{open: func() (func() error, error) {
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				return nil, err
			}
			if err := unix.Fdatasync(int(f.Fd())); err != nil {
				return nil, err
			}
			if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
				return nil, err
			}
			_, err = f.ReadAt(p, 512<<10)
			return f.Close, err
		}}, nil
	}}
}

func bboltOpening(blobs int) subject {
	return subject{"bbolt", func(dir string) (runner, error) {
		st, err := openBbolt(dir, nil)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(st.(bboltStore).fill(blobs), st.close()); err != nil {
			return nil, err
		}
		return &openRunner{open: func() (func() error, error) {
			db, err := bbolt.Open(filepath.Join(dir, "db"), 0o600, nil)
			if err != nil {
				return nil, err
			}
			return db.Close, db.View(func(tx *bbolt.Tx) error {
				if tx.Bucket(bucket).Get([]byte(blobName(3))) == nil {
					return errors.New("bbolt: no such key")
				}
				return nil
			})
		}}, nil
	}}
}

// sqliteOpening attaches, so that no process has to start.
func sqliteOpening(blobs int) subject {
	return subject{"sqlite3 ATTACH", func(dir string) (runner, error) {
		db := filepath.Join(dir, "filled")
		w := &workload{}
		filled, err := startSQLite(db, w)
		if err != nil {
			return nil, err
		}
		if err := errors.Join(filled.fill(blobs), filled.close()); err != nil {
			return nil, err
		}
		s, err := startSQLite(filepath.Join(dir, "main"), w)
		if err != nil {
			return nil, err
		}
		attach := fmt.Sprintf("ATTACH '%s' AS a; SELECT 1 FROM a.blobs WHERE key = '%s';", db, blobName(3))
		return &openRunner{timer: s, end: s.close, open: func() (func() error, error) {
			return func() error { return s.run("DETACH a;") }, s.run(attach)
		}}, nil
	}}
}
