package raw

import (
	"errors"
	"fmt"
	"io"
	"syscall"

	"nvstore.dev/image"
)

// ReadAt reads at off. It works on after a failed write or Sync, and then may
// show what never reached the medium; see DropCache.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return 0, image.ErrClosed
	}
	if off < 0 {
		return 0, image.ErrOutOfRange
	}
	want := int(max(0, min(int64(len(p)), d.Size()-off)))
	n := 0
	if want > 0 {
		var err error
		n, err = d.f.ReadAt(p[:want], off)
		if n < want {
			if err == nil || err == io.EOF {
				// Somebody who didn't ask for the lock cut it.
				err = fmt.Errorf("%s: file ends before byte %d: %w", d.path, off+int64(want), io.ErrUnexpectedEOF)
			}
			return n, err
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes at off, inside Size. If the medium fails, the number is how
// many bytes were given to it before.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	n := 0
	err := d.change(off, int64(len(p)), func() (err error) {
		if len(p) > 0 {
			n, err = d.f.WriteAt(p, off)
		}
		return err
	})
	return n, err
}

// change runs do, whose failure poisons the Device.
func (d *Device) change(off, n int64, do func() error) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.writable(); err != nil {
		return err
	}
	if err := image.CheckRange(off, n, d.Size()); err != nil {
		return err
	}
	return d.poison(do())
}

// writable needs mu.
func (d *Device) writable() error {
	if d.closed {
		return image.ErrClosed
	}
	if d.readOnly {
		return image.ErrReadOnly
	}
	if err := d.failed.Load(); err != nil {
		return fmt.Errorf("%w: %w", image.ErrPoisoned, *err)
	}
	return nil
}

// poison keeps the first failure, for writable.
func (d *Device) poison(err error) error {
	if err == nil {
		return nil
	}
	err = withKind(err)
	d.failed.CompareAndSwap(nil, &err)
	return err
}

// withKind adds image.ErrNoSpace where that is what the system means.
func withKind(err error) error {
	for _, e := range []error{syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG} {
		if errors.Is(err, e) {
			return fmt.Errorf("%w: %w", image.ErrNoSpace, err)
		}
	}
	return err
}

// Sync makes all completed writes durable: data, size and allocation. On a
// Device opened for reading it does nothing.
func (d *Device) Sync() error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.readOnly && !d.closed {
		return nil
	}
	if err := d.writable(); err != nil {
		return err
	}
	// Taken before, so that a Resize meanwhile isn't forgotten.
	if d.resized.Swap(false) {
		return d.poison(d.f.Sync())
	}
	return d.poison(d.f.DataSync())
}

// Resize cuts the file or makes it longer; the new bytes are a hole. A failure
// leaves the size as it was and doesn't poison the Device.
func (d *Device) Resize(size int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.writable(); err != nil {
		return err
	}
	switch {
	case size < 0:
		return image.ErrOutOfRange
	case size == d.Size():
		return nil
	case d.block:
		return fmt.Errorf("%s: resize of a block device: %w", d.path, image.ErrUnsupported)
	}
	if err := d.f.Truncate(size); err != nil {
		return withKind(err)
	}
	d.resized.Store(true)
	d.size.Store(size)
	return nil
}

// Discard gives the whole file system blocks in the range back. Where the file
// system or the device can't, it does nothing.
func (d *Device) Discard(off, n int64) error {
	return d.change(off, n, func() error {
		lo, hi := d.aligned(off, n)
		if lo >= hi {
			return nil
		}
		if err := d.f.Punch(lo, hi-lo); err != nil && !unsupported(err) {
			return err
		}
		return nil
	})
}

// aligned returns the whole blocks in a range. The last block of the file
// counts as whole if the range has all of it that is in the file, and then hi
// is its end: a file system drops it only if asked for all of it.
func (d *Device) aligned(off, n int64) (lo, hi int64) {
	lo = (off + d.unit - 1) / d.unit * d.unit
	hi = (off + n) / d.unit * d.unit
	if off+n == d.Size() && !d.block {
		hi = (off + n + d.unit - 1) / d.unit * d.unit
	}
	return lo, hi
}

// WriteZeroes makes the range a hole where the file system can, and writes
// zeros otherwise.
func (d *Device) WriteZeroes(off, n int64) error {
	return d.change(off, n, func() error {
		lo, hi := off, off+n
		if d.block { // takes whole blocks only
			lo, hi = d.aligned(off, n)
		} else if hi == d.Size() {
			_, hi = d.aligned(off, n)
		}
		if lo >= hi {
			return d.writeZeros(off, n)
		}
		err := d.f.Punch(lo, hi-lo)
		if unsupported(err) {
			err = d.f.Zero(lo, hi-lo)
		}
		if unsupported(err) {
			return d.writeZeros(off, n)
		}
		if err != nil {
			return err
		}
		if err := d.writeZeros(off, lo-off); err != nil {
			return err
		}
		return d.writeZeros(hi, off+n-hi)
	})
}

// Allocate has the file system allocate blocks for the range. Where space is
// missing, that is an image.ErrNoSpace, and the device goes on working.
func (d *Device) Allocate(off, n int64) error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.writable(); err != nil {
		return err
	}
	if err := image.CheckRange(off, n, d.Size()); err != nil || n == 0 {
		return err
	}
	err := d.f.Allocate(off, n)
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %w", image.ErrNoSpace, err)
	case unsupported(err):
		return fmt.Errorf("%w: %w", image.ErrUnsupported, err)
	}
	return err
}

// CopyRange copies n bytes at from of src, which must be another Device of this
// package, to off, without their passing through this process. Where the system
// can't, that is an image.ErrUnsupported, and some of them may have been copied.
func (d *Device) CopyRange(off int64, src image.Device, from, n int64) error {
	s, ok := src.(*Device)
	if !ok || s == d {
		return fmt.Errorf("%s: copying from another kind of device: %w", d.path, image.ErrUnsupported)
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return image.ErrClosed
	}
	if err := image.CheckRange(from, n, s.Size()); err != nil {
		return err
	}
	in, ok := s.f.(osFile)
	if !ok {
		return fmt.Errorf("%s: %w", s.path, image.ErrUnsupported)
	}
	var refused error
	err := d.change(off, n, func() error {
		err := d.f.CopyRange(off, in.File, from, n)
		switch {
		case err != nil && (unsupported(err) || errors.Is(err, syscall.EXDEV)):
			refused = fmt.Errorf("%w: %w", image.ErrUnsupported, err)
			return nil
		case errors.Is(err, io.ErrUnexpectedEOF):
			refused = fmt.Errorf("%s: file ends before byte %d: %w", s.path, from+n, err)
			return nil
		}
		return err
	})
	return errors.Join(err, refused)
}

var zeros [64 << 10]byte

func (d *Device) writeZeros(off, n int64) error {
	for n > 0 {
		k := min(n, int64(len(zeros)))
		if _, err := d.f.WriteAt(zeros[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// unsupported tells whether fallocate or lseek can't do what was asked here.
// EINVAL is what block devices and some file systems say.
func unsupported(err error) bool {
	for _, e := range []error{
		syscall.EOPNOTSUPP, syscall.ENOSYS, syscall.EINVAL, syscall.ENODEV, syscall.ENOTTY,
	} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// DropCache drops what is clean from the page cache, so that reads come from
// the medium. It neither waits for dirty pages nor retries what failed, and
// works on a Device that failed. Pages that another process has mapped stay.
func (d *Device) DropCache() error {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return image.ErrClosed
	}
	return d.f.DropCache()
}

// BlockStatus tells data from holes. A file system that doesn't keep track
// calls everything data.
func (d *Device) BlockStatus(off, n int64) (image.Extent, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.closed {
		return image.Extent{}, image.ErrClosed
	}
	if n == 0 {
		return image.Extent{}, image.ErrOutOfRange
	}
	if err := image.CheckRange(off, n, d.Size()); err != nil {
		return image.Extent{}, err
	}
	data := image.Extent{Start: off, Length: n, Allocated: true, Offset: off}
	from, err := d.f.SeekData(off)
	switch {
	case errors.Is(err, syscall.ENXIO):
		return image.Extent{Start: off, Length: n, Zero: true, Offset: -1}, nil
	case unsupported(err):
		return data, nil
	case err != nil:
		return image.Extent{}, err
	case from > off:
		return image.Extent{Start: off, Length: min(n, from-off), Zero: true, Offset: -1}, nil
	}
	to, err := d.f.SeekHole(off)
	switch {
	case errors.Is(err, syscall.ENXIO) || unsupported(err):
		return data, nil // cut or changed in between
	case err != nil:
		return image.Extent{}, err
	}
	if to > off {
		data.Length = min(n, to-off)
	}
	return data, nil
}
