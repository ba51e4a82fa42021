package swtpm

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"nvstore.dev/image"
	"nvstore.dev/tpmstate"
)

// HomeOptions say how a home in swtpm's files is opened. Nil is the zero
// value.
type HomeOptions struct {
	Version tpmstate.Version // 0 is TPM20
	Key     *Key             // nil: the state is plain
	Mode    fs.FileMode      // of new files; 0 is 0640, as swtpm's
}

func (o *HomeOptions) fill() HomeOptions {
	var out HomeOptions
	if o != nil {
		out = *o
	}
	if out.Version == 0 {
		out.Version = tpmstate.TPM20
	}
	if out.Mode == 0 {
		out.Mode = 0o640
	}
	return out
}

// Dir is a TPM's state in a folder, as swtpm's "dir://" has it. Unlike swtpm's,
// it is durable when a call returns.
type Dir struct {
	dir  string
	o    HomeOptions
	lock *os.File
}

var _ tpmstate.Home = (*Dir)(nil)

// OpenDir opens a folder, which must exist. It takes the lock that swtpm takes
// (a POSIX lock on ".lock"; ours is an OFD lock, and the two exclude each
// other), and fails with image.ErrLocked if somebody has it.
func OpenDir(dir string, o *HomeOptions) (*Dir, error) {
	f, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", dir, image.ErrLocked), f.Close())
	}
	return &Dir{dir, o.fill(), f}, nil
}

func (d *Dir) path(k tpmstate.Kind) string { return filepath.Join(d.dir, FileName(d.o.Version, k)) }

// Load returns a blob.
func (d *Dir) Load(k tpmstate.Kind) ([]byte, error) {
	p, err := readFile(d.path(k))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w", k, tpmstate.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	state, err := OpenFile(p, d.o.Key)
	return state, inFile(d.path(k), err)
}

// Store replaces a blob.
func (d *Dir) Store(k tpmstate.Kind, state []byte) error {
	if err := tpmstate.CheckSize(k, len(state)); err != nil {
		return err
	}
	p, err := SealFile(state, d.o.Key)
	if err != nil {
		return err
	}
	return replaceFile(d.path(k), p, d.o.Mode)
}

// Delete removes a blob.
func (d *Dir) Delete(k tpmstate.Kind) error {
	if err := os.Remove(d.path(k)); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	return syncDir(d.dir)
}

// Replace stores the blobs one after another: a crash in between leaves some
// old and some new. A store has no such moment.
func (d *Dir) Replace(s tpmstate.State) error {
	for k, blob := range s {
		var err error
		if blob == nil {
			err = d.Delete(tpmstate.Kind(k))
		} else {
			err = d.Store(tpmstate.Kind(k), blob)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Close gives the lock back.
func (d *Dir) Close() error { return d.lock.Close() }

// LinearFile is a TPM's state in one file, as swtpm's "file://" has it. Unlike
// swtpm, it replaces the file as a whole, so that a crash leaves the old or
// the new one. It needs a regular file for that.
type LinearFile struct {
	path string
	o    HomeOptions
	lock *os.File
}

var _ tpmstate.Home = (*LinearFile)(nil)

// OpenLinear opens a linear file, or prepares to make one. A file that is
// there and isn't a whole linear file is refused: swtpm would format it.
func OpenLinear(path string, o *HomeOptions) (*LinearFile, error) {
	l := &LinearFile{path: path, o: o.fill()}
	// The file itself is replaced, so the lock is on its folder's behalf.
	f, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lock); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, image.ErrLocked), f.Close())
	}
	l.lock = f
	if _, err := l.read(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return l, nil
}

func (l *LinearFile) read() (*Linear, error) {
	p, err := readFile(l.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(p) == 0 {
		return &Linear{}, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := ParseLinear(p)
	return f, inFile(l.path, err)
}

// Load returns a blob.
func (l *LinearFile) Load(k tpmstate.Kind) ([]byte, error) {
	f, err := l.read()
	if err != nil {
		return nil, err
	}
	if f.Files[k] == nil {
		return nil, fmt.Errorf("%s: %w", k, tpmstate.ErrNotFound)
	}
	state, err := OpenFile(f.Files[k], l.o.Key)
	return state, inFile(l.path, err)
}

// change rewrites the file.
func (l *LinearFile) change(fn func(*Linear) error) error {
	f, err := l.read()
	if err != nil {
		return err
	}
	if err := fn(f); err != nil {
		return err
	}
	return replaceFile(l.path, f.Encode(), l.o.Mode)
}

// Store replaces a blob.
func (l *LinearFile) Store(k tpmstate.Kind, state []byte) error {
	return l.change(func(f *Linear) error { return l.put(f, k, state) })
}

func (l *LinearFile) put(f *Linear, k tpmstate.Kind, state []byte) (err error) {
	if err := tpmstate.CheckSize(k, len(state)); err != nil {
		return err
	}
	f.Files[k], err = SealFile(state, l.o.Key)
	return err
}

// Delete removes a blob.
func (l *LinearFile) Delete(k tpmstate.Kind) error {
	return l.change(func(f *Linear) error {
		f.Files[k] = nil
		return nil
	})
}

// Replace makes s the whole state, at once.
func (l *LinearFile) Replace(s tpmstate.State) error {
	return l.change(func(f *Linear) error {
		for k, blob := range s {
			f.Files[k] = nil
			if blob == nil {
				continue
			}
			if err := l.put(f, tpmstate.Kind(k), blob); err != nil {
				return err
			}
		}
		return nil
	})
}

// Close gives the lock back.
func (l *LinearFile) Close() error { return l.lock.Close() }

// inFile adds a file's name to an error.
func inFile(path string, err error) error {
	if f := (*image.FormatError)(nil); errors.As(err, &f) && f.Path == "" {
		f.Path = path
		return err
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// readFile reads a file that is no larger than one of swtpm's can be.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil {
		return nil, err
	} else if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s isn't a regular file: %w", path, image.ErrUnsupported)
	}
	p, err := io.ReadAll(io.LimitReader(f, maxLinear+1))
	if err != nil {
		return nil, err
	}
	if len(p) > maxLinear {
		return nil, inFile(path, bad("swtpm state file", 0, "", len(p), "at most 3 MiB"))
	}
	return p, nil
}

// replaceFile writes a file anew, durably: the old content or the new one is
// there whatever happens. What is there already isn't written.
func replaceFile(path string, p []byte, mode fs.FileMode) error {
	if old, err := readFile(path); err == nil && string(old) == string(p) {
		return nil
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".TMP-*")
	if err != nil {
		return err
	}
	_, err = tmp.Write(p)
	if err == nil {
		err = errors.Join(tmp.Chmod(mode), tmp.Sync())
	}
	if err = errors.Join(err, tmp.Close()); err == nil {
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		os.Remove(tmp.Name())
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
