package pebbledev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"

	"nvstore.dev/image"
)

const (
	markerName = "NVSTORE"
	markerText = "nvstore pebble folder, version 1\n"
)

// Options for OpenFolder. The zero value, like nil, opens an existing folder
// for reading and writing.
type Options struct {
	// Create makes the folder if it is missing or empty.
	Create bool
	// ReadOnly changes nothing in the folder except the lock file.
	ReadOnly bool
	// FS is the file system to use; nil means the operating system's. A
	// test gives one that crashes or fails. Folders on a given FS aren't
	// shared between two OpenFolder calls.
	FS vfs.FS
}

// A Folder is a Pebble folder with the devices of any number of machines. It
// is safe for concurrent use.
type Folder struct {
	h      *home
	mu     sync.Mutex
	closed bool
}

// A home is the open database behind all Folders and Devices of one path in
// this process.
type home struct {
	dir      string
	key      string // in homes.m; empty if not shared
	readOnly bool
	fs       *failStop
	lock     *pebble.Lock
	db       *pebble.DB

	mu    sync.Mutex
	refs  int           // Folders and Devices
	inUse map[UUID]bool // open, or being created or deleted
}

// homes finds the home that this process has open already: Pebble's lock
// excludes a second one, but two machines of one folder may be opened by two
// callers that know nothing of each other.
var homes = struct {
	sync.Mutex
	m map[string]*home
}{m: make(map[string]*home)}

// OpenFolder opens the folder dir. Within one process any number of Folders of
// one path may be open, all for writing or all for reading; another process
// that holds it makes OpenFolder fail with image.ErrLocked. A missing folder is
// fs.ErrNotExist, one that isn't ours image.ErrFormat.
func OpenFolder(dir string, opt *Options) (*Folder, error) {
	var o Options
	if opt != nil {
		o = *opt
	}
	if o.ReadOnly && o.Create {
		return nil, &fs.PathError{Op: "create", Path: dir, Err: image.ErrReadOnly}
	}
	homes.Lock()
	defer homes.Unlock()
	key := ""
	if o.FS == nil {
		o.FS = vfs.Default
		key = realPath(dir)
		if h := homes.m[key]; h != nil {
			if h.readOnly != o.ReadOnly {
				return nil, fmt.Errorf("%s: %w", dir, image.ErrLocked)
			}
			return h.newFolder(), nil
		}
	}
	h, err := openHome(dir, &o)
	if err != nil {
		return nil, err
	}
	if key != "" {
		h.key = realPath(dir) // again, since it may be new
		homes.m[h.key] = h
	}
	return h.newFolder(), nil
}

func realPath(dir string) string {
	if p, err := filepath.Abs(dir); err == nil {
		dir = p
	}
	if p, err := filepath.EvalSymlinks(dir); err == nil {
		dir = p
	}
	return dir
}

func (h *home) newFolder() *Folder {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refs++
	return &Folder{h: h}
}

// openHome takes the lock, checks the marker and opens the database.
func openHome(dir string, o *Options) (_ *home, err error) {
	h := &home{dir: dir, readOnly: o.ReadOnly, fs: newFailStop(o.FS), inUse: make(map[UUID]bool)}
	marked, err := checkMarker(o.FS, dir, o.Create)
	if err != nil {
		return nil, err
	}
	if !marked {
		if err := o.FS.MkdirAll(dir, 0o700); err != nil {
			return nil, mapError(dir, err)
		}
	}
	if h.lock, err = pebble.LockDirectory(dir, o.FS); err != nil {
		return nil, lockError(dir, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, h.lock.Close())
		}
	}()
	if !marked {
		if err := writeMarker(o.FS, dir); err != nil {
			return nil, mapError(dir, err)
		}
	}
	err = h.openDB(o)
	return h, err
}

// openDB opens Pebble, and believes it only if the file system didn't freeze.
func (h *home) openDB(o *Options) error {
	err := guard(func() (err error) {
		h.db, err = pebble.Open(h.dir, h.pebbleOptions(o))
		return err
	})
	if cause := h.fs.failure(); cause != nil {
		if err == nil {
			h.closeDB()
		}
		return mapError(h.dir, cause)
	}
	if err != nil {
		return mapError(h.dir, err)
	}
	return nil
}

// pebbleOptions keeps Pebble small and silent: at most two memtables of 2 MiB
// and a cache of 2 MiB.
func (h *home) pebbleOptions(o *Options) *pebble.Options {
	po := &pebble.Options{
		FS:                          h.fs,
		Lock:                        h.lock,
		ReadOnly:                    o.ReadOnly,
		FormatMajorVersion:          pebble.FormatWALSyncChunks,
		CacheSize:                   2 << 20,
		MemTableSize:                2 << 20,
		MemTableStopWritesThreshold: 2,
		MaxOpenFiles:                64,
		DisableTableStats:           true,
		CompactionConcurrencyRange:  func() (lower, upper int) { return 1, 1 },
		Logger:                      silent{h.fs},
		EventListener: &pebble.EventListener{
			// The default ends the process; a reader gets the error anyway.
			DataCorruption: func(pebble.DataCorruptionInfo) {},
			// Pebble retries at once and for ever.
			BackgroundError: func(error) { time.Sleep(20 * time.Millisecond) },
		},
	}
	// Sealed content doesn't shrink.
	po.ApplyCompressionSettings(func() pebble.DBCompressionSettings { return pebble.DBCompressionNone })
	return po
}

// silent is Pebble's logger. Fatalf must not end the process.
type silent struct{ fs *failStop }

func (silent) Infof(string, ...any)  {}
func (silent) Errorf(string, ...any) {}
func (s silent) Fatalf(format string, args ...any) {
	s.fs.freeze(fmt.Errorf(format, args...))
}

// checkMarker reports whether dir is marked as ours. Without the marker only
// an empty or missing folder is good, and only if create is set.
func checkMarker(fsys vfs.FS, dir string, create bool) (bool, error) {
	path := fsys.PathJoin(dir, markerName)
	f, err := fsys.Open(path)
	switch {
	case err == nil:
		defer f.Close()
		got, err := io.ReadAll(io.LimitReader(f, 2*int64(len(markerText))))
		if err != nil {
			return false, mapError(path, err)
		}
		if string(got) == markerText {
			return true, nil
		}
		return false, &image.FormatError{Path: path, Off: 0, Struct: "pebble folder marker",
			Got: string(got), Want: markerText, Kind: image.ErrFormat}
	case !errors.Is(err, fs.ErrNotExist):
		return false, mapError(path, err)
	}
	names, err := fsys.List(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if !create {
			return false, &fs.PathError{Op: "open", Path: dir, Err: fs.ErrNotExist}
		}
	case err != nil:
		return false, mapError(dir, err)
	case !create || !onlyOurs(names):
		return false, &image.FormatError{Path: dir, Off: -1, Struct: "pebble folder",
			Want: "a file " + markerName, Kind: image.ErrFormat}
	}
	return false, nil
}

// onlyOurs tells whether names are at most what a creation that was cut short
// leaves behind.
func onlyOurs(names []string) bool {
	for _, n := range names {
		if n != "LOCK" && n != markerName+".new" {
			return false
		}
	}
	return true
}

// writeMarker makes the marker durable before Pebble writes anything, so that
// a folder with a database in it always has one.
func writeMarker(fsys vfs.FS, dir string) error {
	tmp := fsys.PathJoin(dir, markerName+".new")
	f, err := fsys.Create(tmp, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = f.Write([]byte(markerText))
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := fsys.Rename(tmp, fsys.PathJoin(dir, markerName)); err != nil {
		return err
	}
	for _, d := range []string{dir, fsys.PathDir(dir)} {
		if err := syncDir(fsys, d); err != nil {
			return err
		}
	}
	return nil
}

func syncDir(fsys vfs.FS, dir string) error {
	d, err := fsys.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Machines lists the machines in the folder, in the order of their UUIDs.
func (f *Folder) Machines() ([]UUID, error) {
	if err := f.check(false); err != nil {
		return nil, err
	}
	var list []UUID
	err := f.h.iterate([]byte("m/"), []byte("m0"), func(it *pebble.Iterator) error {
		for ok := it.First(); ok; {
			id, ok2 := machineOf(it.Key())
			if !ok2 {
				return f.h.corruptKey(it.Key())
			}
			// Any key of a machine makes it one; a missing size is for
			// Open to report.
			list = append(list, id)
			ok = it.SeekGE(machineEnd(id))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// Create makes a device of size bytes for a machine that has none, all zeros,
// durable on return, and opens it. It fails with image.ErrExist if there is one.
func (f *Folder) Create(machine UUID, size int64) (*Device, error) {
	if err := f.check(true); err != nil {
		return nil, err
	}
	if size < 0 || size > MaxSize {
		return nil, image.ErrOutOfRange
	}
	return f.claim(machine, func() (int64, error) {
		switch _, err := f.h.size(machine); {
		case err == nil:
			return 0, fmt.Errorf("machine %s: %w", machine, image.ErrExist)
		case !errors.Is(err, image.ErrNotFound):
			return 0, err
		}
		b := f.h.db.NewBatch()
		defer b.Close()
		// Errors of a batch in memory can't happen, and Apply would
		// repeat them.
		_ = b.Set(sizeKey(machine), binary.BigEndian.AppendUint64(nil, uint64(size)), nil)
		return size, f.h.apply(b, pebble.Sync)
	})
}

// Open opens the device of a machine. It fails with image.ErrNotFound if there
// is none, and with image.ErrLocked if it is open already.
func (f *Folder) Open(machine UUID) (*Device, error) {
	if err := f.check(false); err != nil {
		return nil, err
	}
	return f.claim(machine, func() (int64, error) { return f.h.size(machine) })
}

// Delete removes the device of a machine with all its content, durably.
func (f *Folder) Delete(machine UUID) error {
	if err := f.check(true); err != nil {
		return err
	}
	d, err := f.claim(machine, func() (int64, error) {
		// A damaged size is no reason to keep it.
		size, err := f.h.size(machine)
		if errors.Is(err, image.ErrCorrupt) {
			err = nil
		}
		return size, err
	})
	if err != nil {
		return err
	}
	b := f.h.db.NewBatch()
	defer b.Close()
	_ = b.DeleteRange(machineStart(machine), machineEnd(machine), nil)
	return errors.Join(f.h.apply(b, pebble.Sync), d.Close())
}

// Close gives the folder up. Its devices stay open, and the last of them to be
// closed closes the database.
func (f *Folder) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return image.ErrClosed
	}
	f.closed = true
	return f.h.release()
}

// check refuses a closed or failed folder, and a change to one that is open
// for reading.
func (f *Folder) check(change bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return image.ErrClosed
	}
	if change && f.h.readOnly {
		return image.ErrReadOnly
	}
	return f.h.poisoned()
}

// claim opens the device of a machine with the size that load returns, while
// no other Device of this machine exists.
func (f *Folder) claim(machine UUID, load func() (int64, error)) (*Device, error) {
	h := f.h
	h.mu.Lock()
	if h.inUse[machine] {
		h.mu.Unlock()
		return nil, fmt.Errorf("machine %s: %w", machine, image.ErrLocked)
	}
	h.inUse[machine] = true
	h.refs++
	h.mu.Unlock()
	size, err := load()
	if err != nil {
		h.unclaim(machine)
		return nil, errors.Join(err, h.release())
	}
	return newDevice(h, machine, size), nil
}

func (h *home) unclaim(machine UUID) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.inUse, machine)
}

// release drops one reference, and closes the database with the last.
func (h *home) release() error {
	homes.Lock()
	defer homes.Unlock()
	h.mu.Lock()
	h.refs--
	last := h.refs == 0
	h.mu.Unlock()
	if !last {
		return nil
	}
	if h.key != "" {
		delete(homes.m, h.key)
	}
	return errors.Join(h.closeDB(), h.lock.Close())
}

// closeDB doesn't report what Pebble says of a frozen folder: the failure was
// reported, and reference counts that it then finds wrong mean nothing.
func (h *home) closeDB() error {
	frozen := h.fs.failure() != nil
	err := guard(h.db.Close)
	if frozen {
		return nil
	}
	if cause := h.fs.failure(); cause != nil {
		err = cause
	}
	return mapError(h.dir, err)
}

// apply commits a batch.
func (h *home) apply(b *pebble.Batch, opt *pebble.WriteOptions) error {
	if err := h.poisoned(); err != nil {
		return err
	}
	err := guard(func() error { return h.db.Apply(b, opt) })
	if err != nil {
		h.fs.freeze(err)
	}
	if cause := h.fs.failure(); cause != nil {
		return mapError(h.dir, cause)
	}
	return nil
}

func (h *home) poisoned() error {
	if cause := h.fs.failure(); cause != nil {
		return fmt.Errorf("%w: %w", image.ErrPoisoned, mapError(h.dir, cause))
	}
	return nil
}

// guard turns a panic of Pebble, which it has for broken files too, into an
// error.
func guard(op func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("pebble panicked: %v: %w", r, image.ErrCorrupt)
		}
	}()
	return op()
}

// lockError tells a lock file that can't be made, a PathError, from a lock
// that is held, which is a bare errno or Pebble's own text.
func lockError(dir string, err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		return mapError(dir, err)
	}
	return fmt.Errorf("%s: %w: %v", dir, image.ErrLocked, err)
}

// mapError gives Pebble's errors the kinds of package image.
func mapError(path string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%s: %w: %w", path, image.ErrNoSpace, err)
	case errors.Is(err, image.ErrCorrupt):
		return err
	case errors.Is(err, pebble.ErrCorruption):
		return &image.FormatError{Path: path, Off: -1, Struct: "pebble folder",
			Got: err.Error(), Want: "files that Pebble can read", Kind: image.ErrCorrupt}
	}
	return fmt.Errorf("%s: %w", path, err)
}
