package raw

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"nvstore.dev/image"
)

// Options may be nil, which is the zero value: read-write, locked, new files
// only, for their owner only.
type Options struct {
	// ReadOnly opens for reading. Others may read too, none may write.
	// Create refuses it with image.ErrReadOnly.
	ReadOnly bool

	// NoLock takes no lock and heeds none, as qemu-img's -U. What is read
	// may change meanwhile; writing so is for media that nobody else can
	// reach.
	NoLock bool

	// Overwrite lets Create replace the content of a regular file that
	// exists, and that nobody has open.
	Overwrite bool

	// Mode is a new file's permissions before the umask; 0 means 0600.
	Mode fs.FileMode
}

// Device is an open raw image. It implements image.Device, Resizer (not on a
// block device), Discarder, ZeroWriter, Allocator, CacheDropper and
// BlockStatuser.
type Device struct {
	path     string
	readOnly bool
	block    bool  // a block device
	unit     int64 // what the file system allocates at once, bytes

	mu      sync.RWMutex // held for writing by Resize and Close
	f       file
	closed  bool
	size    atomic.Int64
	resized atomic.Bool // since the last Sync
	failed  atomic.Pointer[error]
}

// file is the part of the operating system that tests replace.
type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Truncate(size int64) error
	Sync() error     // with all metadata
	DataSync() error // with what is needed to read the data
	Punch(off, n int64) error
	Zero(off, n int64) error
	Allocate(off, n int64) error
	SeekData(off int64) (int64, error) // syscall.ENXIO if there is none
	SeekHole(off int64) (int64, error)
	DropCache() error
	CopyRange(off int64, src *os.File, from, n int64) error
	Lock(readOnly bool) error
	Unlock() error
}

// Open opens an existing image. It fails with image.ErrLocked if another
// process or another Device has it open in a conflicting way, and with
// image.ErrUnsupported for what is neither a regular file nor a block device.
func Open(path string, o *Options) (*Device, error) {
	if o == nil {
		o = &Options{}
	}
	// Opening some character devices has effects (a watchdog starts), and
	// opening a FIFO waits: look first, and don't trust that look.
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if err := checkType(path, info); err != nil {
		return nil, err
	}
	flags := os.O_RDWR
	if o.ReadOnly {
		flags = os.O_RDONLY
	}
	f, err := os.OpenFile(path, flags|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	d, err := attach(f, path, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	return d, nil
}

// Create makes a new image of size zero bytes, without allocating them, and
// returns it open for writing. The file and its name in the directory are
// durable. It fails with fs.ErrExist if the path exists, unless o.Overwrite.
func Create(path string, size int64, o *Options) (*Device, error) {
	if o == nil {
		o = &Options{}
	}
	if size < 0 {
		return nil, fmt.Errorf("create %s of %d bytes: %w", path, size, image.ErrOutOfRange)
	}
	mode := o.Mode
	if mode == 0 {
		mode = 0o600
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, mode)
	if err == nil {
		d, err := create(f, path, size, o)
		if err != nil {
			// Ours alone, and of no use.
			os.Remove(path)
			return nil, err
		}
		return d, nil
	}
	if !o.Overwrite || !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	d, err := Open(path, o)
	if err != nil {
		return nil, err
	}
	if err := d.empty(size); err != nil {
		d.Close()
		return nil, fmt.Errorf("overwrite %s: %w", path, err)
	}
	return d, nil
}

func create(f *os.File, path string, size int64, o *Options) (*Device, error) {
	d, err := attach(f, path, o)
	if err != nil {
		f.Close()
		return nil, err
	}
	if err := d.empty(size); err != nil {
		d.Close()
		return nil, err
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// empty makes the content size zero bytes.
func (d *Device) empty(size int64) error {
	if err := d.Resize(0); err != nil {
		return err
	}
	if err := d.Resize(size); err != nil {
		return err
	}
	d.resized.Store(true)
	return d.Sync()
}

func checkType(path string, info fs.FileInfo) error {
	m := info.Mode()
	if m.IsRegular() || m&fs.ModeDevice != 0 && m&fs.ModeCharDevice == 0 {
		return nil
	}
	return &image.FormatError{
		Path: path, Off: -1, Struct: "raw image", Field: "file type",
		Got: m.String(), Want: "a regular file or a block device", Kind: image.ErrUnsupported,
	}
}

// attach takes over f, but leaves closing it after an error to the caller.
func attach(f *os.File, path string, o *Options) (*Device, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if err := checkType(path, info); err != nil {
		return nil, err
	}
	d := &Device{path: path, readOnly: o.ReadOnly, f: osFile{f}, unit: blockSize(info)}
	d.block = !info.Mode().IsRegular()
	if !o.NoLock {
		if err := d.f.Lock(o.ReadOnly); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	// The size of a block device shows by seeking only. Read it under the
	// lock: a writer may just have gone.
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, err
	}
	d.size.Store(size)
	return d, nil
}

// Path returns the path that the image was opened by.
func (d *Device) Path() string { return d.path }

// Size returns the length in bytes, as of Open or the last Resize.
func (d *Device) Size() int64 { return d.size.Load() }

// Close releases the locks and the file. It waits for calls in flight.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return image.ErrClosed
	}
	d.closed = true
	// Explicitly: a child being forked right now still has a copy of the
	// descriptor, and with it of the locks.
	err := d.f.Unlock()
	return errors.Join(err, d.f.Close())
}

// syncDir makes new names in a directory durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = f.Sync()
	f.Close()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSUP) {
		return nil // no such thing on this file system
	}
	return err
}
