package pebbledev

import (
	"errors"
	"io/fs"
	"os"
	"sync"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// A failStop is a file system that freezes at the first failed change. Pebble
// panics or exits when its log or its manifest can't be written (db.go
// commitWrite and applyInternal, version_set.go), and retries a failed flush
// for ever; a library can have neither. So a failed change is recorded and
// reported to Pebble as done, and every later change is dropped: the medium
// stays as after a power cut at that instant, which is a state that Pebble
// recovers from. Whoever uses it must look at failure() after every call
// before believing the result.
type failStop struct {
	vfs.FS
	mu      sync.Mutex
	cause   error
	overlay *vfs.MemFS // what Pebble creates after the freeze
}

func newFailStop(inner vfs.FS) *failStop { return &failStop{FS: inner} }

// failure returns the error that froze the file system, or nil.
func (f *failStop) failure() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cause
}

// freeze records the first cause; later ones are its consequences.
func (f *failStop) freeze(cause error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.cause == nil {
		f.cause = cause
		f.overlay = vfs.NewMem()
	}
}

// change runs a change unless frozen, and freezes if it fails.
func (f *failStop) change(op func() error) {
	if f.failure() != nil {
		return
	}
	if err := op(); err != nil {
		f.freeze(err)
	}
}

var errFrozen = errors.New("pebbledev: folder is frozen")

// open opens a file for writing: the real one, or one in memory after the
// freeze. A compaction is refused then, since its output has no bound.
func (f *failStop) open(name string, cat vfs.DiskWriteCategory, real func() (vfs.File, error)) (vfs.File, error) {
	var file vfs.File
	f.change(func() (err error) {
		file, err = real()
		return err
	})
	if file != nil {
		return &failStopFile{File: file, fs: f}, nil
	}
	if cat == "pebble-compaction" {
		return nil, errFrozen
	}
	if err := f.overlay.MkdirAll(f.PathDir(name), 0o700); err != nil {
		return nil, err
	}
	return f.overlay.Create(name, cat)
}

func (f *failStop) Create(name string, cat vfs.DiskWriteCategory) (vfs.File, error) {
	return f.open(name, cat, func() (vfs.File, error) { return f.FS.Create(name, cat) })
}

func (f *failStop) OpenReadWrite(name string, cat vfs.DiskWriteCategory, opts ...vfs.OpenOption) (vfs.File, error) {
	return f.open(name, cat, func() (vfs.File, error) { return f.FS.OpenReadWrite(name, cat, opts...) })
}

func (f *failStop) ReuseForWrite(oldname, newname string, cat vfs.DiskWriteCategory) (vfs.File, error) {
	return f.open(newname, cat, func() (vfs.File, error) { return f.FS.ReuseForWrite(oldname, newname, cat) })
}

func (f *failStop) Open(name string, opts ...vfs.OpenOption) (vfs.File, error) {
	if f.failure() != nil {
		if file, err := f.overlay.Open(name, opts...); err == nil {
			return file, nil
		}
	}
	return f.FS.Open(name, opts...)
}

func (f *failStop) OpenDir(name string) (vfs.File, error) {
	d, err := f.FS.OpenDir(name)
	if err != nil {
		return nil, err
	}
	return &failStopFile{File: d, fs: f}, nil
}

func (f *failStop) Rename(oldname, newname string) error {
	f.change(func() error { return f.FS.Rename(oldname, newname) })
	return nil
}

func (f *failStop) Link(oldname, newname string) error {
	f.change(func() error { return f.FS.Link(oldname, newname) })
	return nil
}

func (f *failStop) MkdirAll(dir string, perm os.FileMode) error {
	f.change(func() error { return f.FS.MkdirAll(dir, perm) })
	return nil
}

// Remove doesn't freeze when it fails: what stays behind harms nothing.
func (f *failStop) Remove(name string) error {
	if f.failure() != nil {
		return nil
	}
	return f.FS.Remove(name)
}

func (f *failStop) RemoveAll(name string) error {
	if f.failure() != nil {
		return nil
	}
	return f.FS.RemoveAll(name)
}

func (f *failStop) Unwrap() vfs.FS { return f.FS }

// A failStopFile drops its changes once the file system is frozen.
type failStopFile struct {
	vfs.File
	fs *failStop
}

func (f *failStopFile) Write(p []byte) (int, error) {
	f.fs.change(func() error {
		_, err := f.File.Write(p)
		return err
	})
	return len(p), nil
}

func (f *failStopFile) WriteAt(p []byte, off int64) (int, error) {
	f.fs.change(func() error {
		_, err := f.File.WriteAt(p, off)
		return err
	})
	return len(p), nil
}

func (f *failStopFile) Sync() error {
	f.fs.change(f.File.Sync)
	return nil
}

func (f *failStopFile) SyncData() error {
	f.fs.change(f.File.SyncData)
	return nil
}

func (f *failStopFile) SyncTo(length int64) (full bool, err error) {
	f.fs.change(func() (err error) {
		full, err = f.File.SyncTo(length)
		return err
	})
	return full, nil
}

// Preallocate is a hint: file systems without it say so by an error.
func (f *failStopFile) Preallocate(off, length int64) error {
	if f.fs.failure() != nil {
		return nil
	}
	return f.File.Preallocate(off, length)
}

func (f *failStopFile) Close() error {
	if err := f.File.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
		f.fs.freeze(err)
	}
	return nil
}
