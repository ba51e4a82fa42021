package blobdir

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"sort"
	"strings"
	"time"
)

// A Tx is a transaction. It is for one goroutine, and good only inside the
// function that View or Update called.
type Tx struct {
	d    *Dir
	st   *state
	prof *profile
	dir  tree
	done bool

	intact map[int64]bool // offsets of live extents that were verified

	// Of an update only:
	wprof    profile
	gen      int64
	oldest   int64 // oldest generation that is still read
	now      time.Time
	space    *space
	overlay  map[string]*blob // by directory key; what this transaction read or changed
	blobs    int64
	keySlots []byte // new key slots
	maxSize  *int64
	out      output
	started  bool
	pending  int  // bytes of chunks not yet sealed
	again    bool // make a generation though nothing changes
	failed   error
}

// load and release make a Tx the pager of its trees.
func (tx *Tx) load(k *treeKind, ref reference, level int) (*node, error) {
	if err := tx.visible(ref.gen); err != nil {
		return nil, err
	}
	return tx.d.load(k, ref, level, tx.prof)
}

func (tx *Tx) release(off, length int64) { tx.space.release(off, length) }

// visible makes what this transaction queued readable.
func (tx *Tx) visible(gen int64) error {
	if tx.space == nil || gen != tx.gen {
		return nil
	}
	return tx.flush()
}

func (tx *Tx) usable(write bool) error {
	switch {
	case tx.done:
		return fmt.Errorf("%w: the transaction is over", ErrClosed)
	case write && tx.space == nil:
		return ErrReadOnly
	}
	return tx.failed
}

// Generation returns the generation that the transaction reads.
func (tx *Tx) Generation() int64 { return tx.st.root.gen }

// Epoch tells how often this handle has read the store anew, because the image
// was changed underneath or Reload was called. What was read in one epoch may
// never have been in another, whatever the generation.
func (tx *Tx) Epoch() int64 { return tx.st.epoch }

// blob finds a blob by name. It returns nil if there is none.
func (tx *Tx) blob(name string) (*blob, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	if tx.prof.sealNames && tx.prof.keys == nil {
		return nil, ErrKey
	}
	key := tx.prof.keyOf(name)
	if b, ok := tx.overlay[string(key)]; ok {
		return b, nil
	}
	item, off, err := tx.dir.get(key)
	if item == nil || err != nil {
		return nil, err
	}
	return tx.parse(item, off)
}

func (tx *Tx) parse(item []byte, off int64) (*blob, error) {
	e, err := parseEntry(item, off, tx.prof)
	if err != nil {
		return nil, err
	}
	b := &blob{tx: tx, entry: *e}
	if e.chunkMap != nil {
		b.tree = &tree{kind: chunkTree, pg: tx, root: kid{ref: *e.chunkMap}}
	}
	return b, nil
}

// Stat returns a blob's entry.
func (tx *Tx) Stat(name string) (Entry, error) {
	b, err := tx.existing(name, false)
	if err != nil {
		return Entry{}, err
	}
	return b.Entry, nil
}

func (tx *Tx) existing(name string, write bool) (*blob, error) {
	if err := tx.usable(write); err != nil {
		return nil, err
	}
	b, err := tx.blob(name)
	if err == nil && b == nil {
		err = fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	return b, err
}

// List yields the blobs whose names begin with prefix, in order of their
// names. In a keyless store with sealed names the names are empty, and the
// order is that of the directory.
func (tx *Tx) List(prefix string) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		if err := tx.usable(false); err != nil {
			yield(Entry{}, err)
			return
		}
		if tx.prof.sealNames || len(tx.overlay) > 0 {
			tx.listSorted(prefix, yield)
			return
		}
		err := tx.dir.ascend([]byte(prefix), func(key, item []byte) (bool, error) {
			if !strings.HasPrefix(string(key), prefix) {
				return false, nil
			}
			b, err := tx.parse(item, -1)
			if err != nil {
				return false, err
			}
			return yield(b.Entry, nil), nil
		})
		if err != nil {
			yield(Entry{}, err)
		}
	}
}

// listSorted gathers first: hidden names have no order in the directory, and
// what the transaction changed isn't there yet.
func (tx *Tx) listSorted(prefix string, yield func(Entry, error) bool) {
	var all []Entry
	err := tx.dir.ascend(nil, func(key, item []byte) (bool, error) {
		if _, ok := tx.overlay[string(key)]; ok {
			return true, nil
		}
		b, err := tx.parse(item, -1)
		if err == nil && strings.HasPrefix(b.Name, prefix) {
			all = append(all, b.Entry)
		}
		return true, err
	})
	if err != nil {
		yield(Entry{}, err)
		return
	}
	for _, b := range tx.overlay {
		if b != nil && strings.HasPrefix(b.Name, prefix) {
			all = append(all, b.Entry)
		}
	}
	sort.SliceStable(all, func(i, j int) bool { return all[i].Name < all[j].Name })
	for _, e := range all {
		if !yield(e, nil) {
			return
		}
	}
}

// Create makes an empty blob. meta may be nil.
func (tx *Tx) Create(name string, meta *Meta) error {
	if err := tx.usable(true); err != nil {
		return err
	}
	if b, err := tx.blob(name); err != nil {
		return err
	} else if b != nil {
		return fmt.Errorf("blob %q %w", name, ErrExist)
	}
	m, err := cleanMeta(meta)
	if err != nil {
		return err
	}
	if m.ChunkSize == 0 {
		m.ChunkSize = chunkSizeFor(0)
	}
	b := &blob{tx: tx, dirty: true}
	b.Entry = Entry{Name: name, Created: tx.now, Modified: tx.now, Generation: tx.gen, Meta: m}
	if err := tx.d.random(b.ID[:]); err != nil {
		return err
	}
	tx.overlay[string(tx.prof.keyOf(name))] = b
	tx.blobs++
	return nil
}

func cleanMeta(meta *Meta) (Meta, error) {
	var m Meta
	if meta != nil {
		m = *meta
	}
	return m, checkMeta(&m)
}

// chunkSizeFor chooses for a blob whose size is known. Small chunks make
// small changes cheap, large ones make large blobs' maps small.
func chunkSizeFor(size int64) int {
	switch {
	case size <= 4<<20:
		return 8 << 10
	case size <= 256<<20:
		return 64 << 10
	}
	return maxChunkSize
}

// Put makes a blob with this content, or replaces the content of the one
// there is. Bytes that are stored already are not written again: if nothing
// differs, nothing is. meta may be nil; a nil meta keeps an existing blob's.
func (tx *Tx) Put(name string, data []byte, meta *Meta) error {
	if err := tx.usable(true); err != nil {
		return err
	}
	if int64(len(data)) > maxBlobSize {
		return fmt.Errorf("%w: %d bytes: %d are the most", ErrInvalid, len(data), int64(maxBlobSize))
	}
	b, err := tx.blob(name)
	if err != nil {
		return err
	}
	if b == nil {
		m, err := cleanMeta(meta)
		if err != nil {
			return err
		}
		if m.ChunkSize == 0 {
			m.ChunkSize = chunkSizeFor(int64(len(data)))
		}
		if err := tx.Create(name, &m); err != nil {
			return err
		}
		b, _ = tx.blob(name)
	} else if meta != nil {
		if err := tx.SetMeta(name, meta); err != nil {
			return err
		}
		b, _ = tx.blob(name)
	}
	tx.hold(b)
	return tx.keep(b.replace(data))
}

// hold keeps a blob of this transaction, so that all of it sees one state.
func (tx *Tx) hold(b *blob) { tx.overlay[string(tx.prof.keyOf(b.Name))] = b }

// keep remembers an error after which the transaction can't commit.
func (tx *Tx) keep(err error) error {
	if err != nil && tx.failed == nil && !errors.Is(err, ErrInvalid) && !errors.Is(err, ErrAttached) {
		tx.failed = err
	}
	return err
}

// SetMeta replaces type, writer and attributes. The chunk size stays, unless
// meta has another, which rewrites the content.
func (tx *Tx) SetMeta(name string, meta *Meta) error {
	b, err := tx.existing(name, true)
	if err != nil {
		return err
	}
	m, err := cleanMeta(meta)
	if err != nil {
		return err
	}
	if m.ChunkSize == 0 {
		m.ChunkSize = b.ChunkSize
	}
	if m.Type == b.Type && m.Writer == b.Writer && m.ChunkSize == b.ChunkSize && slices.Equal(m.Attributes, b.Attributes) {
		return nil
	}
	tx.hold(b)
	return tx.keep(b.setMeta(m))
}

// Delete removes a blob. A live extent that is attached stays, and the error
// is ErrAttached: an emulator would go on writing to its blocks.
func (tx *Tx) Delete(name string) error {
	b, err := tx.existing(name, true)
	if err != nil {
		return err
	}
	if err := b.detached(); err != nil {
		return err
	}
	if b.live != nil {
		tx.release(b.live.off, b.live.blocks())
	} else if err := tx.keep(b.truncate(0)); err != nil {
		return err
	}
	tx.overlay[string(tx.prof.keyOf(name))] = nil
	tx.blobs--
	return nil
}

// Rename gives a blob another name, which must be free. Its content stays
// where and as it is.
func (tx *Tx) Rename(old, name string) error {
	b, err := tx.existing(old, true)
	if err != nil {
		return err
	}
	if other, err := tx.blob(name); err != nil {
		return err
	} else if other != nil {
		return fmt.Errorf("blob %q %w", name, ErrExist)
	}
	tx.overlay[string(tx.prof.keyOf(old))] = nil
	b.Name = name
	b.touch()
	tx.hold(b)
	return nil
}

// ReadAt reads a blob's content as io.ReaderAt does.
func (tx *Tx) ReadAt(name string, p []byte, off int64) (int, error) {
	b, err := tx.existing(name, false)
	if err != nil {
		return 0, err
	}
	return b.readAt(p, off)
}

// Get returns a blob's whole content. limit bounds its size; 0 is 256 MiB.
func (tx *Tx) Get(name string, limit int64) ([]byte, error) {
	b, err := tx.existing(name, false)
	if err != nil {
		return nil, err
	}
	if limit == 0 {
		limit = 256 << 20
	}
	if b.Size > limit {
		return nil, fmt.Errorf("%w: blob %q has %d bytes, more than the %d asked for at most", ErrInvalid, name, b.Size, limit)
	}
	p := make([]byte, b.Size)
	if len(p) == 0 {
		return p, nil
	}
	if _, err := b.readAt(p, 0); err != nil {
		return nil, err
	}
	return p, nil
}

// WriteAt writes into a blob and extends it as needed. What lies between its
// old end and off reads as zeros.
func (tx *Tx) WriteAt(name string, p []byte, off int64) (int, error) {
	b, err := tx.existing(name, true)
	if err != nil {
		return 0, err
	}
	if err := b.detached(); err != nil {
		return 0, err
	}
	if off < 0 || off > maxBlobSize-int64(len(p)) {
		return 0, fmt.Errorf("%w: blob %q: bytes %d to %d: a blob has %d at most", ErrInvalid, name, off, off+int64(len(p)), int64(maxBlobSize))
	}
	tx.hold(b)
	if err := tx.keep(b.writeAt(p, off)); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Truncate changes a blob's size. New bytes read as zeros.
func (tx *Tx) Truncate(name string, size int64) error {
	b, err := tx.existing(name, true)
	if err != nil {
		return err
	}
	if err := b.detached(); err != nil {
		return err
	}
	if size < 0 || size > maxBlobSize {
		return fmt.Errorf("%w: blob %q: size %d: 0 to %d", ErrInvalid, name, size, int64(maxBlobSize))
	}
	if size == b.Size {
		return nil
	}
	tx.hold(b)
	return tx.keep(b.truncate(size))
}

// fold brings what was done to blobs into the directory, in order of their
// keys, and tells whether anything changed.
func (tx *Tx) fold() (changed bool, err error) {
	changed = tx.keySlots != nil || tx.maxSize != nil || tx.again
	for _, key := range slices.Sorted(func(yield func(string) bool) {
		for k := range tx.overlay {
			if !yield(k) {
				return
			}
		}
	}) {
		b := tx.overlay[key]
		if b == nil {
			was, err := tx.dir.del([]byte(key))
			if err != nil {
				return false, err
			}
			changed = changed || was
			continue
		}
		if err := b.flush(); err != nil {
			return false, err
		}
		if b.fresh {
			if err := b.sumLive(); err != nil {
				return false, err
			}
		}
		if !b.dirty {
			continue
		}
		changed = true
		if err := b.store([]byte(key)); err != nil {
			return false, err
		}
	}
	return changed, nil
}
