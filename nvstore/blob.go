package nvstore

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync"

	"nvstore.dev/blobdir"
)

const (
	pageSize = 4096
	maxPages = 1024 // a Blob that has this many changed pages commits by itself
)

// A Blob is one blob as a device sees its memory: bytes at offsets, and Sync.
// Writes are kept in memory until Sync commits them, all at once; after a
// crash the blob is as it was at some Sync, or in between if more than 4 MiB
// were written without one. A Blob may be used by many goroutines. While it is
// open, only it should change its blob.
//
// Where the store was reverted underneath, as by loading a snapshot, writes
// that were not synced are dropped: they belong to a state that was given up.
// The next call says so with ErrReverted, once. A Blob without such writes
// follows the store silently.
type Blob struct {
	s    *Store
	name string

	mu     sync.RWMutex     // held for reading by reads that find all as it was
	pages  map[int64][]byte // changed pages
	size   int64
	resize bool  // size differs from what is stored
	shrunk int64 // bytes of what is stored that were never cut off
	closed bool
	epoch  int64 // of the store, when size and pages were read; -1 if there is nothing
}

// errStale: the blob isn't what pages and size are about.
var errStale = errors.New("blob is of another state")

// Blob opens a blob for a device. With a meta the blob is made if it isn't
// there; without one that is ErrNotFound.
func (s *Store) Blob(name string, meta *Meta) (*Blob, error) {
	b := &Blob{s: s, name: name}
	err := b.refresh()
	if errors.Is(err, ErrNotFound) && meta != nil {
		err = s.Update(func(tx *Tx) error {
			// Another one may have been faster.
			if _, err := tx.Stat(name); !errors.Is(err, ErrNotFound) {
				return err
			}
			return tx.Create(name, meta)
		})
		if err == nil {
			err = b.refresh()
		}
	}
	if err != nil {
		return nil, err
	}
	return b, nil
}

// refresh forgets what was not synced, and reads what there is.
func (b *Blob) refresh() error {
	b.reset(0)
	b.epoch = -1
	return b.s.View(func(tx *Tx) error {
		e, err := tx.Stat(b.name)
		if err != nil {
			return err
		}
		if e.Attached {
			return fmt.Errorf("blob %q %w", b.name, ErrAttached)
		}
		b.reset(e.Size)
		b.epoch = tx.Epoch()
		return nil
	})
}

func (b *Blob) reset(size int64) {
	b.pages = make(map[int64][]byte)
	b.size, b.shrunk, b.resize = size, size, false
}

// current returns errStale if the store was reverted since size and pages were
// read.
func (b *Blob) current(tx *Tx) error {
	if b.epoch != tx.Epoch() {
		return errStale
	}
	return nil
}

// maxFollow bounds how many reverts in a row one call follows.
const maxFollow = 8

// do runs op under the lock.
func (b *Blob) do(off int64, op func() error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return ErrClosed
	}
	if off < 0 {
		return fmt.Errorf("%w: blob %q: negative offset or size %d", ErrInvalid, b.name, off)
	}
	return b.follow(op)
}

// follow runs op. If the store was reverted, it runs op again on the new state,
// unless writes were lost.
func (b *Blob) follow(op func() error) (err error) {
	for range maxFollow {
		if err = b.s.View(b.current); err == nil {
			err = op()
		}
		if err != errStale && !errors.Is(err, ErrReverted) {
			return err
		}
		lost := b.dirty()
		switch err = b.refresh(); {
		case lost && (err == nil || errors.Is(err, ErrNotFound) || errors.Is(err, ErrAttached)):
			return fmt.Errorf("%w: what was written to blob %q since its last Sync is gone", ErrReverted, b.name)
		case err != nil && !errors.Is(err, ErrReverted):
			return err
		}
	}
	if err == nil {
		err = fmt.Errorf("%w again and again: blob %q", ErrReverted, b.name)
	}
	return err
}

// Name returns the blob's name.
func (b *Blob) Name() string { return b.name }

// Size returns the length in bytes, with changes that were not synced.
func (b *Blob) Size() int64 {
	b.mu.RLock()
	defer b.mu.RUnlock()
	return b.size
}

// ReadAt reads as io.ReaderAt does, and sees what was written before.
func (b *Blob) ReadAt(p []byte, off int64) (n int, err error) {
	op := func() error {
		n = int(min(int64(len(p)), max(b.size-off, 0)))
		if err := b.read(p[:n], off); err != nil {
			return err
		}
		if n < len(p) {
			return io.EOF
		}
		return nil
	}
	b.mu.RLock()
	if !b.closed && off >= 0 {
		if err = b.s.View(b.current); err == nil {
			err = op()
		}
	} else {
		err = errStale
	}
	b.mu.RUnlock()
	if err == errStale || errors.Is(err, ErrReverted) {
		err = b.do(off, op) // which may change what the blob knows
	}
	if err != nil && err != io.EOF {
		n = 0
	}
	return n, err
}

// read fills p from changed pages and, for the rest, from the store. Bytes
// that were cut off and came back by growing are zeros.
func (b *Blob) read(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	stored := int(min(max(b.shrunk-off, 0), int64(len(p))))
	if stored > 0 {
		err := b.s.View(func(tx *Tx) error {
			if err := b.current(tx); err != nil {
				return err
			}
			_, err := tx.ReadAt(b.name, p[:stored], off)
			if err == io.EOF {
				return errStale // somebody else cut it
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	clear(p[stored:])
	for i := off / pageSize; i*pageSize < off+int64(len(p)); i++ {
		if page, ok := b.pages[i]; ok {
			from := max(i*pageSize, off)
			copy(p[from-off:], page[from-i*pageSize:])
		}
	}
	return nil
}

// WriteAt writes, and extends the blob where it reaches past its end. Nothing
// is durable before Sync.
func (b *Blob) WriteAt(p []byte, off int64) (done int, err error) {
	if off > blobdir.MaxBlobSize-int64(len(p)) {
		return 0, b.tooLong()
	}
	err = b.do(off, func() error {
		for done < len(p) {
			n, err := b.writePage(p[done:], off+int64(done))
			if err != nil {
				return err
			}
			done += n
		}
		return nil
	})
	if errors.Is(err, ErrReverted) {
		done = 0 // what was written is gone too
	}
	return done, err
}

// writePage writes what of p falls into the page at off.
func (b *Blob) writePage(p []byte, off int64) (int, error) {
	if len(b.pages) >= maxPages {
		if err := b.sync(); err != nil {
			return 0, err
		}
	}
	i := off / pageSize
	n := min(len(p), int((i+1)*pageSize-off))
	page, ok := b.pages[i]
	if !ok {
		page = make([]byte, pageSize)
		if n < pageSize {
			have := min(pageSize, max(b.size-i*pageSize, 0))
			if err := b.read(page[:have], i*pageSize); err != nil {
				return 0, err
			}
		}
		b.pages[i] = page
	}
	copy(page[off-i*pageSize:], p[:n])
	if end := off + int64(n); end > b.size {
		b.size, b.resize = end, true
	}
	return n, nil
}

func (b *Blob) tooLong() error {
	return fmt.Errorf("%w: blob %q: a blob has %d bytes at most", ErrInvalid, b.name, int64(blobdir.MaxBlobSize))
}

// Truncate changes the size. New bytes read as zeros.
func (b *Blob) Truncate(size int64) error {
	if size > blobdir.MaxBlobSize {
		return b.tooLong()
	}
	return b.do(size, func() error {
		if size == b.size {
			return nil
		}
		for i, page := range b.pages {
			switch keep := size - i*pageSize; {
			case keep <= 0:
				delete(b.pages, i)
			case keep < pageSize:
				clear(page[keep:])
			}
		}
		b.size, b.resize = size, true
		b.shrunk = min(b.shrunk, size)
		return nil
	})
}

// Sync commits what was written. When it returns nil, that is durable. Blobs of
// one store that are synced at the same time share a commit.
func (b *Blob) Sync() error { return b.s.group.sync(b) }

func (b *Blob) sync() error {
	if !b.dirty() {
		return nil
	}
	err := b.s.Update(b.apply)
	if err == nil {
		b.reset(b.size)
	}
	return err
}

func (b *Blob) dirty() bool { return len(b.pages) > 0 || b.resize }

// apply puts what was written into a transaction.
func (b *Blob) apply(tx *Tx) error {
	if err := b.current(tx); err != nil {
		return err
	}
	e, err := tx.Stat(b.name)
	if err != nil {
		return err
	}
	if b.shrunk < e.Size {
		if err := b.cut(tx, e.Live); err != nil {
			return err
		}
	}
	if err := tx.Truncate(b.name, b.size); err != nil {
		return err
	}
	for _, i := range slices.Sorted(maps.Keys(b.pages)) {
		page := b.pages[i]
		n := min(pageSize, b.size-i*pageSize)
		if _, err := tx.WriteAt(b.name, page[:n], i*pageSize); err != nil {
			return err
		}
	}
	return nil
}

// cut drops what was cut off, which reads as zeros if the blob grew again. A
// live extent has no less than a byte.
func (b *Blob) cut(tx *Tx, live bool) error {
	if !live || b.shrunk > 0 {
		return tx.Truncate(b.name, b.shrunk)
	}
	if err := tx.Truncate(b.name, 1); err != nil {
		return err
	}
	_, err := tx.WriteAt(b.name, []byte{0}, 0)
	return err
}

// Close syncs and lets go of the blob. The store stays open.
func (b *Blob) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return ErrClosed
	}
	err := b.follow(b.sync)
	b.closed = true
	return err
}
