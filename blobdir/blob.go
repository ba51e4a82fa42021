package blobdir

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"slices"

	"golang.org/x/crypto/cryptobyte"

	"nvstore.dev/crypto/seal"
)

// maxPending is how many bytes of changed chunks a transaction keeps before
// it writes them out.
const maxPending = 8 << 20

// A blob is an entry in a transaction, with its changed chunks.
type blob struct {
	tx *Tx
	entry
	tree    *tree            // chunk map, if the chunks aren't in the entry
	pending map[int64][]byte // changed chunks, in clear
	dirty   bool
	fresh   bool // the live extent was written by this transaction
}

// touch marks the entry as changed by this transaction.
func (b *blob) touch() {
	b.dirty = true
	b.Generation, b.Modified = b.tx.gen, b.tx.now
}

// chunk returns the reference of a chunk, or nil for a hole.
func (b *blob) chunk(index int64) (*chunkRef, error) {
	if b.tree == nil {
		i, ok := slices.BinarySearchFunc(b.chunks, index, chunkRef.compare)
		if !ok {
			return nil, nil
		}
		return &b.chunks[i], nil
	}
	item, off, err := b.tree.get(intKey(index))
	if item == nil || err != nil {
		return nil, err
	}
	return b.parseChunk(item, off)
}

func (c chunkRef) compare(index int64) int { return cmp.Compare(c.index, index) }

func (b *blob) parseChunk(item []byte, off int64) (*chunkRef, error) {
	d := newDecoder(item, off, "chunk map")
	s := cryptobyte.String(d.whole)
	c := d.chunkRef(&s, b.Generation, b.tx.prof.sealed)
	if d.err == nil && !c.fits(&b.Entry, -1) {
		d.fail(s, "R44", "chunk.index", c.index, "a chunk inside the blob")
	}
	if d.err != nil {
		return nil, d.err
	}
	return &c, nil
}

// setChunk replaces or, with nil, removes a chunk's reference.
func (b *blob) setChunk(index int64, c *chunkRef) error {
	old, err := b.chunk(index)
	if err != nil {
		return err
	}
	if old != nil {
		b.tx.release(old.off, old.blocks())
	}
	if b.tree != nil {
		if c != nil {
			return b.tree.put(intKey(index), c.append(nil))
		}
		_, err := b.tree.del(intKey(index))
		return err
	}
	i, found := slices.BinarySearchFunc(b.chunks, index, chunkRef.compare)
	b.chunks = slices.Clone(b.chunks)
	switch {
	case found && c == nil:
		b.chunks = slices.Delete(b.chunks, i, i+1)
	case found:
		b.chunks[i] = *c
	case c != nil:
		b.chunks = slices.Insert(b.chunks, i, *c)
	}
	if len(b.chunks) <= maxInline {
		return nil
	}
	b.tree = &tree{kind: chunkTree, pg: b.tx}
	for _, c := range b.chunks {
		if err := b.tree.put(intKey(c.index), c.append(nil)); err != nil {
			return err
		}
	}
	b.chunks = nil
	return nil
}

// readChunk returns a chunk's content, in clear. It is shorter than the chunk
// where zeros follow, and empty for a hole.
func (b *blob) readChunk(index int64) ([]byte, error) {
	if p, ok := b.pending[index]; ok {
		return p, nil
	}
	c, err := b.chunk(index)
	if c == nil || err != nil {
		return nil, err
	}
	return b.openChunk(c)
}

func (b *blob) openChunk(c *chunkRef) ([]byte, error) {
	if err := b.tx.visible(c.gen); err != nil {
		return nil, err
	}
	p, err := b.tx.d.readExtent(c.reference, "chunk")
	if e := (*Error)(nil); errors.As(err, &e) {
		e.Blob, e.Field = b.Name, fmt.Sprintf("%d.%s", c.index, e.Field)
	}
	if err != nil || !b.tx.prof.sealed {
		return p, err
	}
	k := b.tx.prof.keys
	if k == nil {
		return nil, ErrKey
	}
	clear, err := k.chunk.Open(p[:0], p, &c.box.Box, chunkContext(k.store, b.ID, b.Type, c.gen, c.index, c.length))
	if errors.Is(err, seal.ErrAuth) {
		return nil, &Error{Off: c.off, Struct: "chunk", Field: fmt.Sprint(c.index), Blob: b.Name,
			Want: "content sealed for this place with this store's key", Rule: "R25", Kind: ErrTampered}
	}
	return clear, err
}

func (b *blob) readAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("%w: offset %d", ErrInvalid, off)
	}
	if b.live != nil {
		return b.readLive(p, off)
	}
	size := int64(b.ChunkSize)
	n := 0
	for n < len(p) && off < b.Size {
		index, at := off/size, off%size
		want := int(min(size-at, b.Size-off, int64(len(p)-n)))
		chunk, err := b.readChunk(index)
		if err != nil {
			return n, err
		}
		got := 0
		if at < int64(len(chunk)) {
			got = copy(p[n:n+want], chunk[at:])
		}
		clear(p[n+got : n+want])
		n += want
		off += int64(want)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (b *blob) writeAt(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if b.live != nil {
		return b.writeLive(p, off)
	}
	if end := off + int64(len(p)); end > b.Size {
		b.Size = end
		b.touch()
	}
	size := int64(b.ChunkSize)
	for len(p) > 0 {
		index, at := off/size, off%size
		n := min(len(p), int(size-at))
		chunk, err := b.readChunk(index)
		if err != nil {
			return err
		}
		fresh := make([]byte, max(len(chunk), int(at)+n))
		copy(fresh, chunk)
		copy(fresh[at:], p[:n])
		if err := b.keep(index, fresh); err != nil {
			return err
		}
		p = p[n:]
		off += int64(n)
	}
	return nil
}

// keep holds a changed chunk until the commit, so that many writes to it
// become one.
func (b *blob) keep(index int64, p []byte) error {
	if b.pending == nil {
		b.pending = make(map[int64][]byte)
	}
	b.tx.pending += len(p) - len(b.pending[index])
	b.pending[index] = p
	if b.tx.pending <= maxPending {
		return nil
	}
	for _, other := range b.tx.overlay {
		if other != nil {
			if err := other.flush(); err != nil {
				return err
			}
		}
	}
	return b.flush()
}

// flush seals and queues the changed chunks.
func (b *blob) flush() error {
	if len(b.pending) == 0 {
		return nil
	}
	order := make([]int64, 0, len(b.pending))
	left := int64(0)
	for i, p := range b.pending {
		order = append(order, i)
		left += roundUp(int64(len(p)))
	}
	slices.Sort(order)
	for _, i := range order {
		p := b.pending[i]
		left -= roundUp(int64(len(p)))
		if err := b.storeChunk(i, p, left); err != nil {
			return err
		}
		b.tx.pending -= len(p)
		delete(b.pending, i)
	}
	return nil
}

// storeChunk queues a chunk unless the same bytes are stored already. more is
// how many bytes follow.
func (b *blob) storeChunk(index int64, p []byte, more int64) error {
	old, err := b.chunk(index)
	if err != nil {
		return err
	}
	if len(p) == 0 {
		if old == nil {
			return nil
		}
		b.touch()
		return b.setChunk(index, nil)
	}
	if old != nil && old.length == int64(len(p)) {
		if same, err := b.sameChunk(old, p); same || err != nil {
			return err
		}
	}
	return b.writeChunk(index, p, more)
}

// writeChunk queues a chunk.
func (b *blob) writeChunk(index int64, p []byte, more int64) error {
	b.touch()
	tx := b.tx
	off, err := tx.space.alloc(roundUp(int64(len(p))), more+4*BlockSize)
	if err != nil {
		return err
	}
	c := &chunkRef{index: index, reference: reference{off: off, length: int64(len(p)), gen: tx.gen}}
	k := tx.prof.keys
	extra := 0
	if k != nil {
		extra = seal.TagSize
	}
	room, err := tx.room(off, len(p), extra)
	if err != nil {
		return err
	}
	copy(room, p)
	if k != nil {
		box, err := k.chunk.SealInPlace(room, chunkContext(k.store, b.ID, b.Type, c.gen, index, c.length))
		if err != nil {
			return err
		}
		clear(room[len(p):]) // the tag is in the box; zeros follow the chunk
		c.box = &sealBox{box}
		tx.d.remember(c, p)
	}
	c.crc = checksum(room[:len(p)])
	return b.setChunk(index, c)
}

// A fingerprint of a sealed chunk's content lets a Put of other bytes be told
// from one of the same without reading: other fingerprints are other bytes.
// It lives in memory only.
type fingerprint struct {
	gen int64
	sum uint64
}

var printSeed = maphash.MakeSeed()

const maxPrints = 4096

func (d *Dir) remember(c *chunkRef, p []byte) {
	if d.prints == nil || len(d.prints) >= maxPrints {
		d.prints = make(map[int64]fingerprint)
	}
	d.prints[c.off] = fingerprint{c.gen, maphash.Bytes(printSeed, p)}
}

func (d *Dir) differs(c *chunkRef, p []byte) bool {
	f, ok := d.prints[c.off]
	return ok && f.gen == c.gen && f.sum != maphash.Bytes(printSeed, p)
}

// sameChunk tells whether a stored chunk has this content. In a plain store
// the checksum, which was computed over the same bytes, says no for nothing.
// A chunk that can't be read is not the same: writing it anew heals it.
func (b *blob) sameChunk(old *chunkRef, p []byte) (bool, error) {
	if b.tx.prof.sealed && b.tx.d.differs(old, p) || !b.tx.prof.sealed && old.crc != checksum(p) {
		return false, nil
	}
	stored, err := b.openChunk(old)
	if damaged(err) || errors.Is(err, ErrTampered) {
		return false, nil
	}
	return err == nil && bytes.Equal(stored, p), err
}

// replace makes data the whole content.
func (b *blob) replace(data []byte) error {
	if b.live != nil {
		return b.replaceLive(data)
	}
	if int64(len(data)) < b.Size {
		if err := b.truncate(int64(len(data))); err != nil {
			return err
		}
	}
	if int64(len(data)) > b.Size {
		b.Size = int64(len(data))
		b.touch()
	}
	b.tx.pending -= b.forget()
	for index := int64(0); len(data) > 0; index++ {
		n := min(len(data), b.ChunkSize)
		rest := int64(len(data) - n)
		if err := b.storeChunk(index, data[:n], rest); err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}

// forget drops changed chunks that were not written, and returns their size.
func (b *blob) forget() int {
	n := 0
	for _, p := range b.pending {
		n += len(p)
	}
	b.pending = nil
	return n
}

// truncate cuts or extends. Only the chunk that the new end falls in is
// rewritten.
func (b *blob) truncate(size int64) error {
	if size == b.Size {
		return nil
	}
	if b.live != nil {
		return b.truncateLive(size)
	}
	cs := int64(b.ChunkSize)
	if size < b.Size {
		last := size / cs
		var edge []byte
		if size%cs > 0 {
			chunk, err := b.readChunk(last)
			if err != nil {
				return err
			}
			edge = bytes.Clone(chunk[:min(int64(len(chunk)), size%cs)])
		}
		if err := b.dropFrom(last); err != nil {
			return err
		}
		b.Size = size
		b.touch()
		if len(edge) > 0 {
			return b.keep(last, edge)
		}
		return nil
	}
	b.Size = size
	b.touch()
	return nil
}

// dropFrom gives up all chunks from index on.
func (b *blob) dropFrom(index int64) error {
	for i, p := range b.pending {
		if i >= index {
			b.tx.pending -= len(p)
			delete(b.pending, i)
		}
	}
	var gone []int64
	if b.tree == nil {
		for _, c := range b.chunks {
			if c.index >= index {
				gone = append(gone, c.index)
			}
		}
	} else {
		err := b.tree.ascend(intKey(index), func(key, _ []byte) (bool, error) {
			gone = append(gone, keyInt(key))
			return true, nil
		})
		if err != nil {
			return err
		}
	}
	for _, i := range gone {
		if err := b.setChunk(i, nil); err != nil {
			return err
		}
	}
	return b.inline()
}

// inline brings the last few chunks of a map back into the entry.
func (b *blob) inline() error {
	if b.tree == nil {
		return nil
	}
	var few []chunkRef
	err := b.tree.ascend(intKey(0), func(_, item []byte) (bool, error) {
		c, err := b.parseChunk(item, -1)
		if err == nil {
			few = append(few, *c)
		}
		return err == nil && len(few) <= maxInline, err
	})
	if err != nil || len(few) > maxInline {
		return err
	}
	for _, c := range few {
		if _, err := b.tree.del(intKey(c.index)); err != nil {
			return err
		}
	}
	b.tree, b.chunkMap, b.chunks = nil, nil, few
	return nil
}

// maxRestored bounds what setMeta keeps in memory.
const maxRestored = 256 << 20

// setMeta changes what is said of the content. The type is bound into sealed
// chunks, and the chunk size decides where they begin, so a change of either
// stores the content anew.
func (b *blob) setMeta(m Meta) error {
	again := b.live == nil && b.Size > 0 && (m.ChunkSize != b.ChunkSize || m.Type != b.Type && b.tx.prof.sealed)
	if !again {
		b.Meta = m
		b.touch()
		return nil
	}
	if b.Size > maxRestored {
		return fmt.Errorf("%w: blob %q: the type or chunk size of so large a blob can't be changed", ErrInvalid, b.Name)
	}
	content := make([]byte, b.Size)
	if _, err := b.readAt(content, 0); err != nil {
		return err
	}
	if err := b.truncate(0); err != nil {
		return err
	}
	b.Meta = m
	return b.replace(content)
}

// store writes the chunk map and puts the entry into the directory.
func (b *blob) store(key []byte) error {
	tx := b.tx
	b.chunkMap = nil
	if b.tree != nil {
		ref, err := tx.writeTree(b.tree)
		if err != nil {
			return err
		}
		b.chunkMap = &ref
	}
	if err := b.seal(tx.prof); err != nil {
		return err
	}
	der := b.append(nil, tx.prof)
	if len(der) > maxItem {
		return fmt.Errorf("%w: blob %q: its directory entry has %d bytes, and %d are the most", ErrInvalid, b.Name, len(der), maxItem)
	}
	return tx.dir.put(key, der)
}
