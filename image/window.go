package image

import (
	"fmt"
	"io"
)

// Window returns the bytes [off, off+size) of d as a Device of its own. Any
// offset and size will do, though a window that isn't aligned to what the
// medium writes at once (512 bytes, 4096, a cluster) shares its first and last
// such unit with its neighbours: a torn write of theirs may damage it.
//
// The window has a fixed size: Resize returns ErrUnsupported. It passes
// Discard, WriteZeroes, DropCache, BlockStatus and a Batcher's methods on, with
// offsets moved, whatever d wraps; if nothing there offers them, Discard does
// nothing, WriteZeroes writes zeros, DropCache returns ErrUnsupported,
// BlockStatus takes everything for data, and a batch's requests are carried out
// one after the other. Other capabilities of d concern more than the window, and
// aren't offered.
//
// Sync and DropCache concern all of d. Close closes d.
func Window(d Device, off, size int64) (Device, error) {
	if err := CheckRange(off, size, d.Size()); err != nil {
		return nil, fmt.Errorf("window of %d bytes at %d in %d: %w", size, off, d.Size(), err)
	}
	return &window{d, off, size}, nil
}

type window struct {
	d         Device
	off, size int64
}

func (w *window) Size() int64 { return w.size }

func (w *window) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, ErrOutOfRange
	}
	n := max(0, min(int64(len(p)), w.size-off))
	if n > 0 || len(p) == 0 {
		// Not past the size: d's own EOF would be another.
		m, err := w.d.ReadAt(p[:n], w.off+min(off, w.size))
		if int64(m) < n {
			if err == nil || err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return m, err
		}
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return len(p), nil
}

// moved returns a batch with d's offsets, if all of it lies inside.
func (w *window) moved(batch []Request) ([]Request, bool) {
	moved := make([]Request, len(batch))
	for i, r := range batch {
		if CheckRange(r.Off, int64(len(r.P)), w.size) != nil {
			return nil, false
		}
		moved[i] = Request{P: r.P, Off: w.off + r.Off}
	}
	return moved, true
}

func (w *window) ReadBatch(reads []Request) error {
	moved, ok := w.moved(reads)
	if !ok {
		return oneByOne{w}.ReadBatch(reads)
	}
	err := BatcherOf(w.d).ReadBatch(moved)
	for i := range reads {
		reads[i].Err = moved[i].Err
	}
	return err
}

func (w *window) WriteBatch(writes []Request) error {
	moved, ok := w.moved(writes)
	if !ok {
		return oneByOne{w}.WriteBatch(writes)
	}
	return BatcherOf(w.d).WriteBatch(moved)
}

func (w *window) SyncBatch(reads []Request) error {
	moved, ok := w.moved(reads)
	if !ok {
		return oneByOne{w}.SyncBatch(reads)
	}
	err := BatcherOf(w.d).SyncBatch(moved)
	for i := range reads {
		reads[i].Err = moved[i].Err
	}
	return err
}

func (w *window) WriteAt(p []byte, off int64) (int, error) {
	if err := CheckRange(off, int64(len(p)), w.size); err != nil {
		return 0, err
	}
	return w.d.WriteAt(p, w.off+off)
}

func (w *window) Sync() error  { return w.d.Sync() }
func (w *window) Close() error { return w.d.Close() }

func (w *window) Resize(int64) error {
	return fmt.Errorf("resize of a window: %w", ErrUnsupported)
}

func (w *window) Discard(off, n int64) error {
	if err := CheckRange(off, n, w.size); err != nil {
		return err
	}
	if c, ok := As[Discarder](w.d); ok {
		return c.Discard(w.off+off, n)
	}
	return nil
}

func (w *window) WriteZeroes(off, n int64) error {
	if err := CheckRange(off, n, w.size); err != nil {
		return err
	}
	if c, ok := As[ZeroWriter](w.d); ok {
		return c.WriteZeroes(w.off+off, n)
	}
	zeros := make([]byte, min(n, 64<<10))
	for n > 0 {
		k := min(n, int64(len(zeros)))
		if _, err := w.d.WriteAt(zeros[:k], w.off+off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

func (w *window) DropCache() error {
	if c, ok := As[CacheDropper](w.d); ok {
		return c.DropCache()
	}
	return ErrUnsupported
}

func (w *window) BlockStatus(off, n int64) (Extent, error) {
	if n == 0 {
		return Extent{}, ErrOutOfRange
	}
	if err := CheckRange(off, n, w.size); err != nil {
		return Extent{}, err
	}
	c, ok := As[BlockStatuser](w.d)
	if !ok {
		return Extent{Start: off, Length: n, Allocated: true, Offset: -1}, nil
	}
	e, err := c.BlockStatus(w.off+off, n)
	if err != nil {
		return Extent{}, err
	}
	e.Start -= w.off
	return e, nil
}
