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
	maxPages = 2048 // a Blob that has this many changed pages commits by itself
)

// A Blob is one blob as a device sees its memory: bytes at offsets, and Sync.
// Writes are kept in memory until Sync commits them, all at once; after a
// crash the blob is as it was at some Sync, or in between if more than 8 MiB
// were written without one. A Blob may be used by many goroutines.
type Blob struct {
	s    *Store
	name string

	mu     sync.Mutex
	pages  map[int64][]byte // changed pages
	size   int64
	resize bool // size differs from what is stored
	shrunk int64
	closed bool
}

// Blob opens a blob for a device. With a meta the blob is made if it isn't
// there; without one that is ErrNotFound.
func (s *Store) Blob(name string, meta *Meta) (*Blob, error) {
	e, err := s.Stat(name)
	if errors.Is(err, blobdir.ErrNotFound) && meta != nil {
		if err := s.Update(func(tx *Tx) error { return tx.Create(name, meta) }); err != nil {
			return nil, err
		}
		e, err = s.Stat(name)
	}
	if err != nil {
		return nil, err
	}
	b := &Blob{s: s, name: name}
	b.reset(e.Size)
	return b, nil
}

func (b *Blob) reset(size int64) {
	b.pages = make(map[int64][]byte)
	b.size, b.shrunk, b.resize = size, size, false
}

// Name returns the blob's name.
func (b *Blob) Name() string { return b.name }

// Size returns the length in bytes, with changes that were not synced.
func (b *Blob) Size() int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.size
}

// ReadAt reads as io.ReaderAt does, and sees what was written before.
func (b *Blob) ReadAt(p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.usable(off); err != nil {
		return 0, err
	}
	want := int(min(int64(len(p)), max(b.size-off, 0)))
	if err := b.read(p[:want], off); err != nil {
		return 0, err
	}
	if want < len(p) {
		return want, io.EOF
	}
	return want, nil
}

func (b *Blob) usable(off int64) error {
	if b.closed {
		return blobdir.ErrClosed
	}
	if off < 0 {
		return fmt.Errorf("%w: blob %q: offset %d", blobdir.ErrInvalid, b.name, off)
	}
	return nil
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
			_, err := tx.ReadAt(b.name, p[:stored], off)
			if err == io.EOF {
				return fmt.Errorf("%w: blob %q is shorter than it was", blobdir.ErrReverted, b.name)
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
func (b *Blob) WriteAt(p []byte, off int64) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.usable(off); err != nil {
		return 0, err
	}
	if off > blobdir.MaxBlobSize-int64(len(p)) {
		return 0, fmt.Errorf("%w: blob %q: a blob has %d bytes at most", blobdir.ErrInvalid, b.name, int64(blobdir.MaxBlobSize))
	}
	done := 0
	for done < len(p) {
		if len(b.pages) >= maxPages {
			if err := b.sync(); err != nil {
				return done, err
			}
		}
		at := off + int64(done)
		i := at / pageSize
		n := min(len(p)-done, int((i+1)*pageSize-at))
		page, ok := b.pages[i]
		if !ok {
			page = make([]byte, pageSize)
			have := min(pageSize, max(b.size-i*pageSize, 0))
			if err := b.read(page[:have], i*pageSize); err != nil {
				return done, err
			}
			b.pages[i] = page
		}
		copy(page[at-i*pageSize:], p[done:done+n])
		done += n
		if end := at + int64(n); end > b.size {
			b.size, b.resize = end, true
		}
	}
	return done, nil
}

// Truncate changes the size. New bytes read as zeros.
func (b *Blob) Truncate(size int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.usable(size); err != nil {
		return err
	}
	if size > blobdir.MaxBlobSize {
		return fmt.Errorf("%w: blob %q: a blob has %d bytes at most", blobdir.ErrInvalid, b.name, int64(blobdir.MaxBlobSize))
	}
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
}

// Sync commits what was written. When it returns nil, that is durable. After
// ErrReverted the writes are gone: they belonged to a state that was given up.
func (b *Blob) Sync() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.usable(0); err != nil {
		return err
	}
	return b.sync()
}

func (b *Blob) sync() error {
	if len(b.pages) == 0 && !b.resize {
		return nil
	}
	err := b.s.Update(func(tx *Tx) error {
		if e, err := tx.Stat(b.name); err != nil {
			return err
		} else if b.shrunk < e.Size {
			if err := tx.Truncate(b.name, b.shrunk); err != nil {
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
	})
	if err == nil {
		b.reset(b.size)
		return nil
	}
	if errors.Is(err, blobdir.ErrReverted) {
		e, serr := b.s.Stat(b.name)
		if serr != nil {
			e.Size = 0
		}
		b.reset(e.Size)
	}
	return err
}

// Close syncs and lets go of the blob. The store stays open.
func (b *Blob) Close() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return blobdir.ErrClosed
	}
	err := b.sync()
	b.closed = true
	return err
}
