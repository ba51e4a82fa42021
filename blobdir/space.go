package blobdir

import (
	"cmp"
	"errors"
	"math"
	"slices"

	"nvstore.dev/image"
)

// growStep is how much an image grows at once, at the least.
const growStep = 1 << 20

// space is a transaction's view of what is free. It is thrown away when the
// transaction fails, and becomes the store's when it commits.
type space struct {
	tx    *Tx
	node  freeNode
	tree  *tree
	freed []freeExtent // by this transaction; they join the node at its end
	next  int64        // where the last allocation ended: the next likes to follow
	avoid bool         // nothing is left in the tree worth looking for
}

// usable is the quarantine: what generation freed gave up may be used again
// once two further generations are durable, so that the fallback root stays
// whole, and no reader of an older generation is left.
func (s *space) usable(freed int64) bool {
	return freed < s.tx.st.root.parentGen && freed <= s.tx.oldest || freed == 0
}

// alloc finds n bytes (whole blocks) that follow each other. slack is how
// much the transaction will still want behind them.
func (s *space) alloc(n, slack int64) (int64, error) {
	if off, ok := s.follow(n); ok {
		return off, nil
	}
	for {
		for _, want := range []int64{n + slack, n} {
			if off, ok := s.takeFrom(n, want); ok {
				return off, nil
			}
		}
		if more, err := s.refill(n, 4); err != nil {
			return 0, err
		} else if more {
			continue
		}
		off, err := s.extend(n)
		if err == nil {
			return off, nil
		}
		more, rerr := s.refill(n, math.MaxInt)
		if rerr == nil && !more {
			more, rerr = s.gather(n)
		}
		if rerr != nil {
			return 0, rerr
		}
		if !more {
			return 0, err
		}
	}
}

// gather looks for n bytes in neighbours of which some are in the node and
// some in the tree, and brings those into the node.
func (s *space) gather(n int64) (bool, error) {
	if s.tree.empty() {
		return false, nil
	}
	var shelved []freeExtent
	err := s.tree.ascend(intKey(0), func(_, item []byte) (bool, error) {
		e, err := parseFreeItem(item)
		if err == nil && s.usable(e.freed) {
			shelved = append(shelved, e)
		}
		return true, err
	})
	if err != nil {
		return false, err
	}
	all := slices.Clone(shelved)
	for _, e := range s.node.extents {
		if s.usable(e.freed) {
			all = append(all, e)
		}
	}
	slices.SortFunc(all, func(a, b freeExtent) int { return cmp.Compare(a.off, b.off) })
	for first := 0; first < len(all); {
		end := first + 1
		for end < len(all) && all[end].off == all[end-1].end() {
			end++
		}
		if all[end-1].end()-all[first].off >= n {
			return true, s.unshelve(shelved, all[first].off, all[end-1].end())
		}
		first = end
	}
	return false, nil
}

// unshelve brings those of the tree's extents that lie in [off, end) into the
// node, and joins them with what is there.
func (s *space) unshelve(shelved []freeExtent, off, end int64) error {
	for _, e := range shelved {
		if e.off < off || e.end() > end {
			continue
		}
		if _, err := s.tree.del(intKey(e.off)); err != nil {
			return err
		}
		s.node.insert(e)
	}
	s.join()
	return nil
}

// follow takes the n bytes behind the last allocation, if they are free, so
// that a commit becomes one write.
func (s *space) follow(n int64) (int64, bool) {
	for i := range s.node.extents {
		if e := &s.node.extents[i]; e.off == s.next && e.length >= n && s.usable(e.freed) {
			return s.cut(i, n), true
		}
	}
	return 0, false
}

func (s *space) takeFrom(n, want int64) (int64, bool) {
	for i := range s.node.extents {
		if e := &s.node.extents[i]; e.length >= want && s.usable(e.freed) {
			return s.cut(i, n), true
		}
	}
	return 0, false
}

// cut takes n bytes off the front of extent i.
func (s *space) cut(i int, n int64) int64 {
	e := &s.node.extents[i]
	off := e.off
	e.off, e.length = e.off+n, e.length-n
	if e.length == 0 {
		s.node.extents = append(s.node.extents[:i], s.node.extents[i+1:]...)
	}
	s.next = off + n
	return off
}

// extend takes n bytes behind everything in use, growing the image if need
// be.
func (s *space) extend(n int64) (int64, error) {
	off := s.node.end
	if reserved(off, n) {
		off = firstEnd
	}
	if err := s.grow(off + n); err != nil {
		return 0, err
	}
	s.node.end, s.next = off+n, off+n
	return off, nil
}

// grow makes the image at least size bytes long.
func (s *space) grow(size int64) error {
	d := s.tx.d
	have := d.dev.Size() &^ (BlockSize - 1)
	if size <= have {
		return nil
	}
	short := &SpaceError{Missing: size - have, Size: d.dev.Size()}
	limit := s.tx.st.root.maxSize
	if limit > 0 && size > limit || d.opts.NoGrow {
		return short
	}
	r, ok := image.As[image.Resizer](d.dev)
	if !ok {
		return short
	}
	if err := s.tx.start(); err != nil {
		return err
	}
	to := roundUp(size + max(growStep, size/8))
	if limit > 0 {
		to = min(to, limit&^(BlockSize-1))
	}
	err := r.Resize(to)
	if err != nil && to > size && (errors.Is(err, image.ErrNoSpace) || errors.Is(err, image.ErrOutOfRange)) {
		err = r.Resize(size)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, image.ErrUnsupported), errors.Is(err, image.ErrNoSpace), errors.Is(err, image.ErrOutOfRange):
		short.Cause = err
		return short
	}
	return d.poison(err)
}

// release gives an extent up. Its bytes stay as they are until the
// quarantine is over.
func (s *space) release(off, length int64) {
	s.freed = append(s.freed, freeExtent{off: off, length: length, freed: s.tx.gen})
}

// absorb brings what was released into the free node.
func (s *space) absorb() {
	if len(s.freed) > 0 {
		s.node.merge(s.freed)
		s.freed = s.freed[:0]
	}
}

// join unites neighbours that may both be used, whatever their age.
func (s *space) join() {
	out := s.node.extents[:0]
	for _, e := range s.node.extents {
		if k := len(out) - 1; k >= 0 && out[k].end() == e.off && s.usable(out[k].freed) && s.usable(e.freed) &&
			out[k].length+e.length <= maxFreeExtent {
			out[k].length += e.length
			out[k].freed = max(out[k].freed, e.freed)
			continue
		}
		out = append(out, e)
	}
	s.node.extents = out
}

// The free node is one block. Past high water, extents go to the tree until
// it is at low water: in between lies room for many commits, most of which
// then write no node of the tree.
const (
	freeHighWater = 3000 // bytes of the free node's DER
	freeFull      = 3700 // leaves room for the tree's reference and a few extents
	freeLowWater  = 1500
	refillCount   = 32 // extents that come back at once
)

// spill moves extents to the tree until the free node's DER has no more than
// limit bytes, those that lie closest together first: they share its leaves.
func (s *space) spill(limit int) error {
	s.absorb()
	size := len(s.node.encode(nil))
	if size <= limit {
		return nil
	}
	s.avoid = false
	if len(s.node.extents) > 8*refillCount {
		return s.spillMost()
	}
	for size > freeLowWater && len(s.node.extents) > 0 {
		run := min(refillCount, len(s.node.extents))
		at, best := 0, int64(math.MaxInt64)
		for i := 0; i+run <= len(s.node.extents); i++ {
			if span := s.node.extents[i+run-1].end() - s.node.extents[i].off; span < best {
				at, best = i, span
			}
		}
		moved := slices.Clone(s.node.extents[at : at+run])
		s.node.extents = slices.Delete(s.node.extents, at, at+run)
		for _, e := range moved {
			size -= len(e.append(nil))
			if err := s.shelve(e); err != nil {
				return err
			}
		}
	}
	return nil
}

// spillMost is spill after a large deletion: only the longest extents that
// can be used stay.
func (s *space) spillMost() error {
	usable := slices.DeleteFunc(slices.Clone(s.node.extents), func(e freeExtent) bool { return !s.usable(e.freed) })
	if len(usable) > refillCount {
		usable = largest(usable, refillCount)
	}
	stay := make(map[int64]bool)
	for _, e := range usable {
		stay[e.off] = true
	}
	kept := make([]freeExtent, 0, len(stay))
	for _, e := range s.node.extents {
		if stay[e.off] {
			kept = append(kept, e)
		} else if err := s.shelve(e); err != nil {
			return err
		}
	}
	s.node.extents = kept
	return nil
}

// shelve puts an extent into the tree, joined with its neighbours there. The
// whole is as young as its youngest part.
func (s *space) shelve(e freeExtent) error {
	item, _, err := s.tree.get(intKey(e.end()))
	if err != nil {
		return err
	}
	if item != nil {
		next, err := parseFreeItem(item)
		if err != nil {
			return err
		}
		if e.length+next.length <= maxFreeExtent {
			if _, err := s.tree.del(intKey(next.off)); err != nil {
				return err
			}
			e.length, e.freed = e.length+next.length, max(e.freed, next.freed)
		}
	}
	if item, err = s.tree.before(intKey(e.off)); err != nil {
		return err
	}
	if item != nil {
		prev, err := parseFreeItem(item)
		if err != nil {
			return err
		}
		if prev.end() == e.off && prev.length+e.length <= maxFreeExtent {
			e = freeExtent{off: prev.off, length: prev.length + e.length, freed: max(prev.freed, e.freed)}
		}
	}
	return s.tree.put(intKey(e.off), e.append(nil))
}

func parseFreeItem(item []byte) (freeExtent, error) {
	d := newDecoder(item, -1, "free tree")
	in := d.all0()
	e := d.freeExtent(&in, maxGeneration)
	return e, d.err
}

// refill brings usable extents back from the tree, looking at no more than
// leaves of it, and tells whether one of them has n bytes.
func (s *space) refill(n int64, leaves int) (bool, error) {
	if s.tree.empty() || s.avoid && leaves < math.MaxInt {
		return false, nil
	}
	var found []freeExtent
	enough := false
	seen := 0
	err := s.tree.ascend(intKey(0), func(_, item []byte) (bool, error) {
		seen++
		e, err := parseFreeItem(item)
		if err != nil {
			return false, err
		}
		if e.end() > s.node.end {
			return false, corrupt(-1, "R51", "free tree", "extent", e.off, "before the end of the used area")
		}
		if s.usable(e.freed) {
			found = append(found, e)
			enough = enough || e.length >= n
		}
		return !(enough && len(found) >= refillCount) && seen < leaves*200, nil
	})
	if err != nil || !enough {
		s.avoid = true
		return false, err
	}
	if len(found) > refillCount {
		found = largest(found, refillCount)
	}
	for _, e := range found {
		if _, err := s.tree.del(intKey(e.off)); err != nil {
			return false, err
		}
		s.node.insert(e)
	}
	return true, nil
}
