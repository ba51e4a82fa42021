package blobdir

import (
	"cmp"
	"fmt"
	"slices"
	"sort"

	"nvstore.dev/image"
)

// maxPlaces bounds the extents that MakeRoom keeps in memory.
const maxPlaces = 1 << 20

// MakeRoom moves what lies in the way, so that n bytes that follow each other
// can be had, as a live extent needs them in an image that can't grow. It takes
// up to three commits, each of which leaves all blobs as they are, and writes
// as little as it can. If there is room already, it does nothing. The error is
// ErrNoSpace if what is free isn't enough, or if attached live extents, which
// don't move, are in the way everywhere.
func (d *Dir) MakeRoom(n int64) error {
	if n < 1 || n > maxBlobSize {
		return fmt.Errorf("%w: room for %d bytes: 1 to %d", ErrInvalid, n, int64(maxBlobSize))
	}
	defer d.enter()()
	moved := false
	err := d.update(func(tx *Tx) error {
		full := tx.roomFor(roundUp(n))
		if full == nil {
			return nil
		}
		moved = true
		return tx.clear(roundUp(n), full)
	})
	// What was moved away is under quarantine for two generations.
	for i := 0; i < 2 && err == nil && moved; i++ {
		err = d.update(func(tx *Tx) error { tx.again = true; return nil })
	}
	return err
}

// roomFor returns why there are no n bytes in one piece, or nil.
func (tx *Tx) roomFor(n int64) error {
	_, err := tx.space.alloc(n, 0)
	return err
}

// A place is an extent in use; a fixed one can't be moved.
type place struct {
	off, length int64
	fixed       bool
}

func (p place) end() int64 { return p.off + p.length }

// A span is a run of blocks that is to be emptied.
type span struct{ lo, hi int64 }

func (s span) hits(off, length int64) bool { return off < s.hi && s.lo < off+length }

// places lists the extents in use, in order.
func (tx *Tx) places() ([]place, error) {
	var all []place
	for _, off := range []int64{headerOffset, rootSlot0, rootSlot1, settledOffset} {
		all = append(all, place{off, BlockSize, true})
	}
	w := &walker{d: tx.d, prof: &tx.st.prof, attached: make(map[int64]string), visit: func(r region) error {
		if r.Kind == RegionFree {
			return nil
		}
		if len(all) == maxPlaces {
			return fmt.Errorf("%w: making room among more than %d extents", ErrUnsupported, maxPlaces)
		}
		all = append(all, place{off: r.Offset, length: roundUp(r.Length)})
		return nil
	}}
	if err := w.root(tx.st.root); err != nil {
		return nil, err
	}
	for i := range all {
		if _, ok := w.attached[all[i].off]; ok {
			all[i].fixed = true
		}
	}
	slices.SortFunc(all, func(a, b place) int { return cmp.Compare(a.off, b.off) })
	return all, nil
}

// cheapest chooses the n bytes of which the least has to be moved: they begin
// where something ends, or end where something begins.
func cheapest(all []place, n, limit int64) (best span, ok bool) {
	bytes, fixed := make([]int64, len(all)+1), make([]int, len(all)+1)
	for i, p := range all {
		bytes[i+1], fixed[i+1] = bytes[i]+p.length, fixed[i]
		if p.fixed {
			fixed[i+1]++
		}
	}
	least := int64(-1)
	try := func(lo int64) {
		s := span{lo, lo + n}
		if lo < 0 || s.hi > limit {
			return
		}
		from := sort.Search(len(all), func(i int) bool { return all[i].end() > s.lo })
		to := sort.Search(len(all), func(i int) bool { return all[i].off >= s.hi })
		if from < to && fixed[to] > fixed[from] {
			return
		}
		if cost := bytes[max(from, to)] - bytes[from]; least < 0 || cost < least {
			best, least, ok = s, cost, true
		}
	}
	for _, p := range all {
		try(p.end())
		try(p.off - n)
	}
	return best, ok
}

// clear empties n bytes in one piece; full is what to say if that can't be.
func (tx *Tx) clear(n int64, full error) error {
	all, err := tx.places()
	if err != nil {
		return err
	}
	limit := tx.d.dev.Size() &^ (BlockSize - 1)
	if _, ok := image.As[image.Resizer](tx.d.dev); ok && !tx.d.opts.NoGrow {
		limit = max(limit, tx.st.root.maxSize&^(BlockSize-1))
	}
	s, ok := cheapest(all, n, limit)
	if !ok {
		return full
	}
	if err := tx.space.setAside(s); err != nil {
		return err
	}
	if err := tx.moveBlobs(s); err != nil {
		return err
	}
	hit := func(r reference) bool { return s.hits(r.off, r.blocks()) }
	for _, t := range []*tree{&tx.dir, tx.space.tree} {
		if !t.empty() {
			if err := t.evict(&t.root, -1, hit); err != nil {
				return err
			}
		}
	}
	if r := tx.st.root.keySlots; r != nil && hit(*r) {
		if tx.keySlots, err = tx.d.readNode(*r, "key slots", tx.prof); err != nil {
			return err
		}
	}
	tx.again = true
	return nil
}

// setAside puts what is free in the span under quarantine, as if this
// generation gave it up with what is moved away, so that nothing is put there.
func (s *space) setAside(w span) error {
	var shelved []freeExtent
	if !s.tree.empty() {
		err := s.tree.ascend(intKey(0), func(_, item []byte) (bool, error) {
			e, err := parseFreeItem(item)
			if err == nil && w.hits(e.off, e.length) {
				shelved = append(shelved, e)
			}
			return true, err
		})
		if err != nil {
			return err
		}
	}
	for _, e := range shelved {
		if _, err := s.tree.del(intKey(e.off)); err != nil {
			return err
		}
	}
	var out []freeExtent
	for _, e := range append(s.node.extents, shelved...) {
		if !w.hits(e.off, e.length) {
			out = append(out, e)
			continue
		}
		if e.off < w.lo {
			out = append(out, freeExtent{e.off, w.lo - e.off, e.freed})
		}
		lo, hi := max(e.off, w.lo), min(e.end(), w.hi)
		out = append(out, freeExtent{lo, hi - lo, s.tx.gen})
		if e.end() > w.hi {
			out = append(out, freeExtent{w.hi, e.end() - w.hi, e.freed})
		}
	}
	if end := s.node.end; w.hi > end {
		if err := s.grow(w.hi); err != nil {
			return err
		}
		if w.lo > end {
			out = append(out, freeExtent{end, w.lo - end, 0})
		}
		lo := max(end, w.lo)
		out = append(out, freeExtent{lo, w.hi - lo, s.tx.gen})
		s.node.end = w.hi
	}
	s.node.extents = nil
	s.node.merge(out)
	return nil
}

// moveBlobs stores elsewhere what of the blobs lies in the span.
func (tx *Tx) moveBlobs(s span) error {
	var hit []*blob
	err := tx.dir.ascend(nil, func(_, item []byte) (bool, error) {
		b, err := tx.parse(item, -1)
		if err != nil {
			return false, err
		}
		in, err := b.liesIn(s)
		if in {
			hit = append(hit, b)
		}
		return err == nil, err
	})
	for _, b := range hit {
		if err == nil {
			tx.hold(b)
			err = b.moveFrom(s)
		}
	}
	return err
}

// liesIn tells whether any of the blob's extents is in the span.
func (b *blob) liesIn(s span) (bool, error) {
	if b.live != nil {
		return s.hits(b.live.off, b.live.blocks()), nil
	}
	chunks, err := b.chunksIn(s)
	if len(chunks) > 0 || err != nil || b.tree == nil {
		return len(chunks) > 0, err
	}
	return b.tree.hits(&b.tree.root, -1, func(r reference) bool { return s.hits(r.off, r.blocks()) })
}

func (b *blob) chunksIn(s span) (in []chunkRef, err error) {
	if b.tree == nil {
		for _, c := range b.chunks {
			if s.hits(c.off, c.blocks()) {
				in = append(in, c)
			}
		}
		return in, nil
	}
	err = b.tree.ascend(intKey(0), func(_, item []byte) (bool, error) {
		c, err := b.parseChunk(item, -1)
		if err == nil && s.hits(c.off, c.blocks()) {
			in = append(in, *c)
		}
		return err == nil, err
	})
	return in, err
}

// moveFrom stores elsewhere what lies in the span. The blob stays as it is.
func (b *blob) moveFrom(s span) error {
	modified := b.Modified
	if b.live != nil {
		if err := b.verifyLive(); err != nil {
			return err
		}
		if err := b.moveLive(b.Size, b.Size); err != nil {
			return err
		}
		b.Modified = modified
		return nil
	}
	chunks, err := b.chunksIn(s)
	if err != nil {
		return err
	}
	for i := range chunks {
		p, err := b.openChunk(&chunks[i])
		if err != nil {
			return err
		}
		if err := b.writeChunk(chunks[i].index, p, 0); err != nil {
			return err
		}
	}
	if b.tree != nil {
		if err := b.tree.evict(&b.tree.root, -1, func(r reference) bool { return s.hits(r.off, r.blocks()) }); err != nil {
			return err
		}
	}
	b.touch()
	b.Modified = modified
	return nil
}

// hits tells whether a node at c or below is one of those that hit tells.
func (t *tree) hits(c *kid, level int, hit func(reference) bool) (bool, error) {
	if c.dirty == nil && hit(c.ref) {
		return true, nil
	}
	if level == 0 {
		return false, nil
	}
	n, err := t.node(c, level)
	if err != nil {
		return false, err
	}
	for i := range n.kids {
		if yes, err := t.hits(&n.kids[i], n.level-1, hit); yes || err != nil {
			return yes, err
		}
	}
	return false, nil
}

// evict has those nodes written elsewhere by the commit, with all above them.
func (t *tree) evict(c *kid, level int, hit func(reference) bool) error {
	yes, err := t.hits(c, level, hit)
	if !yes || err != nil {
		return err
	}
	n, err := t.node(c, level)
	if err != nil {
		return err
	}
	if n, err = t.edit(c, n); err != nil {
		return err
	}
	for i := range n.kids {
		if err := t.evict(&n.kids[i], n.level-1, hit); err != nil {
			return err
		}
	}
	return nil
}
