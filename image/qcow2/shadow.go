package qcow2

import (
	"slices"
)

// A shadow is a change of structure under way: every refcount block that
// changes is a copy in free clusters, and so is all other metadata. The header
// sector switches to all of it at once. Until then the durable image isn't
// touched, so a crash leaves either the old state or the new one, and neither
// has leaks.
type shadow struct {
	old   []uint64 // the durable refcount table
	fresh []bool   // refcount blocks that are copies
	freed []span   // clusters to discard, as far as remembered

	// What to go back to.
	hdr  header
	l1   []uint64
	size int64
	snap []*snapshot
	bms  []*bitmap
	rec  bool
	hint uint64
}

// maxFreed bounds the clusters remembered for discarding.
const maxFreed = 1 << 16

// restructure runs change and commits what it did to the header, the L1 table
// and the refcounts. If it fails without writing to the file having failed,
// nothing has changed. No request that reads may be under way, or the tables must
// be locked.
func (im *Image) restructure(change func() error) error {
	if err := im.flushAll(); err != nil {
		return err
	}
	freed, err := im.restructured(change, func(_ bool, install func()) { install() })
	discardFile(im.file, &im.geo, freed)
	return err
}

// restructureAside is restructure for who holds mu for writing and not reads:
// requests that read go on, and see the old state until the new one is durable.
// The disk then changes along with done, if there is one.
func (im *Image) restructureAside(change func() error, done func()) error {
	if err := im.flushAside(); err != nil {
		return err
	}
	freed, err := im.restructured(change, func(committed bool, install func()) {
		im.reads.Lock()
		defer im.reads.Unlock()
		install()
		if committed && done != nil {
			done()
		}
	})
	// Nobody can have written there yet.
	discardFile(im.file, &im.geo, freed)
	return err
}

// restructured returns the clusters to discard. What requests that read can see
// changes in a call of locked, to the new state or back to the old one.
func (im *Image) restructured(change func() error, locked func(committed bool, install func())) ([]span, error) {
	im.shadow = &shadow{
		old: slices.Clone(im.reftable), fresh: make([]bool, len(im.reftable)),
		hdr: *im.hdr, l1: im.l1, size: im.Size(), snap: im.snaps, bms: im.bitmaps, rec: im.recording, hint: im.alloc.hint,
	}
	im.packAt = 0
	err := change()
	if err == nil {
		err = im.switchHeader()
	}
	s := im.shadow
	im.shadow = nil
	if err != nil {
		locked(false, func() { im.abandon(s) })
		if im.fail.Load() == nil {
			if err := im.buildMeta(); err != nil {
				return nil, im.poison(err)
			}
		}
		return nil, err
	}
	// What was free only in the old state, or only in the new one, can be
	// found from here on.
	im.alloc.hint = min(s.hint, im.alloc.hint)
	im.rbc.reset()
	if err := im.buildMeta(); err != nil {
		return nil, im.poison(err)
	}
	locked(true, func() {
		im.show()
		for c, t := range im.l2c.m {
			if im.meta.get(c>>im.geo.bits) != metaL2 {
				im.l2c.drop(t.off)
			} else {
				t.owned = false
			}
		}
	})
	return s.freed, nil
}

// switchHeader writes the refcount table and all that it refers to, and then
// the header.
func (im *Image) switchHeader() error {
	h := im.hdr
	for c := range uint64(h.reftableClusters) {
		if err := im.release(h.reftableOff>>im.geo.bits + c); err != nil {
			return err
		}
	}
	var off, n uint64
	for {
		n = im.geo.clusters(uint64(len(im.reftable)) * 8)
		var err error
		if off, _, err = im.take(n, metaReftable); err != nil {
			return err
		}
		if im.geo.clusters(uint64(len(im.reftable))*8) == n {
			break
		}
		// Counting the table made the table longer.
		for c := off >> im.geo.bits; c < off>>im.geo.bits+n; c++ {
			im.meta.del(c)
			if err := im.setRefcount(c, 0); err != nil {
				return err
			}
		}
	}
	h.reftableOff, h.reftableClusters = off, uint32(n)
	if err := im.writeTables(im.rbc, metaRefblock); err != nil {
		return err
	}
	if err := im.writeFile(encodeEntries(im.reftable), off); err != nil {
		return err
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	return im.writeHeader()
}

// abandon goes back to the durable state, apart from im.meta.
func (im *Image) abandon(s *shadow) {
	*im.hdr = s.hdr
	im.geo = newGeometry(im.hdr)
	im.l1, im.reftable, im.snaps = s.l1, s.old, s.snap
	im.bitmaps, im.recording = s.bms, s.rec
	im.full = make([]bool, len(im.reftable))
	im.size.Store(s.size)
	im.alloc.hint = 0
	im.rbc.reset()
	im.show()
}

// ownRefblock makes refcount block bi a copy.
func (im *Image) ownRefblock(bi uint64) error {
	s := im.shadow
	if bi >= uint64(len(s.fresh)) || s.fresh[bi] || im.reftable[bi] == 0 {
		return nil
	}
	x, err := im.findFree(1)
	if err != nil {
		return err
	}
	defer im.reserve(x, 1)()
	if err := im.ensureRefblock(x >> im.geo.rbBits); err != nil {
		return err
	}
	if s.fresh[bi] {
		return nil // while making a block
	}
	if err := im.growFile((x + 1) << im.geo.bits); err != nil {
		return err
	}
	if err := im.makeRoom(im.rbc); err != nil {
		return err
	}
	from, err := im.refblock(bi)
	if err != nil {
		return err
	}
	old := from.off
	t := &table{off: x << im.geo.bits, buf: slices.Clone(from.buf), fresh: true}
	if err := im.makeRoom(im.rbc); err != nil {
		return err
	}
	im.meta.set(x, metaRefblock)
	im.alloc.virgin = max(im.alloc.virgin, x+1)
	im.rbc.put(t)
	im.rbc.touch(t, 0, len(t.buf))
	im.reftable[bi], s.fresh[bi] = t.off, true
	if err := im.setRefcount(x, 1); err != nil {
		return err
	}
	return im.release(old >> im.geo.bits)
}

// release drops one reference to cluster c in the new state.
func (im *Image) release(c uint64) error {
	if err := im.addRefcount(c, -1); err != nil {
		return err
	}
	if v, err := im.refcount(c); err != nil || v > 0 {
		return err
	}
	s := im.shadow
	if len(s.freed) < maxFreed {
		s.freed = appendSpan(s.freed, c)
	}
	return nil
}

// newTable takes clusters for b and writes it there. Nothing refers to it yet.
func (im *Image) newTable(b []byte, k metaKind) (uint64, error) {
	off, _, err := im.take(im.geo.clusters(uint64(len(b))), k)
	if err != nil {
		return 0, err
	}
	return off, im.writeFile(b, off)
}

// newL1 makes l1 the active L1 table, and leaves the old one to the caller.
func (im *Image) newL1(l1 []uint64) error {
	h := im.hdr
	h.l1Size, h.l1Off = uint32(len(l1)), 0
	im.l1 = l1
	if len(l1) == 0 {
		return nil
	}
	off, err := im.newTable(encodeEntries(l1), metaL1)
	h.l1Off = off
	return err
}

// releaseL1 gives up the clusters of an L1 table, but not what it refers to.
func (im *Image) releaseL1(off, entries uint64) error {
	for c := range im.geo.clusters(entries * 8) {
		if err := im.release(off>>im.geo.bits + c); err != nil {
			return err
		}
	}
	return nil
}
