package qcow2

import (
	"fmt"

	"nvstore.dev/image"
)

// Discard gives whole clusters in the range back, which then read as zeros,
// and leaves the rest of the range alone. The file is told of clusters that
// nothing uses any more, once the next Sync has made that durable. In a version
// 2 image with a backing file nothing says that a cluster is zeros, so that is
// an image.ErrUnsupported there.
func (im *Image) Discard(off, n int64) error {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.writeRange(off, n); err != nil || n == 0 {
		return err
	}
	if im.geo.version < 3 && im.below() {
		return fmt.Errorf("qcow2: discard in a version 2 image with a backing file: %w", image.ErrUnsupported)
	}
	cs, end := int64(im.geo.cs), off+n
	off = (off + cs - 1) &^ (cs - 1)
	if end < im.Size() {
		end &^= cs - 1
	}
	if off >= end {
		return nil
	}
	if im.hdr.rawData() {
		if err := im.zeroRaw(off, end); err != nil {
			return err
		}
	}
	return im.unmapSteps(off, end, true)
}

// WriteZeroes makes the range read as zeros. In version 3, clusters that
// aren't shared keep their place in the file, for what is written there next.
func (im *Image) WriteZeroes(off, n int64) error {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.writeRange(off, n); err != nil || n == 0 {
		return err
	}
	end := off + n
	unit := int64(1) << im.geo.subBits
	first, last := (off+unit-1)&^(unit-1), end&^(unit-1)
	if end == im.Size() {
		last = end
	}
	if first >= last || im.geo.version < 3 && im.below() {
		return im.writeZeros(off, end)
	}
	if err := im.writeZeros(off, first); err != nil {
		return err
	}
	if im.hdr.rawData() {
		// It comes first: the flag may be durable at any time.
		if err := im.zeroRaw(first, last); err != nil {
			return err
		}
	}
	if err := im.unmapSteps(first, last, false); err != nil {
		return err
	}
	return im.writeZeros(last, end)
}

// zeroRaw zeroes a part of a raw data file.
func (im *Image) zeroRaw(off, end int64) error {
	if end = min(end, im.data.Size()); off >= end {
		return nil
	}
	return im.zeroData(uint64(off), uint64(end-off))
}

// writeZeros writes zeros where something else is.
func (im *Image) writeZeros(off, end int64) error {
	for off < end {
		m, pin, err := im.mapPinned(off, uint64(min(end-off, int64(len(zeros)))))
		if err != nil {
			return err
		}
		im.pins.leave(pin)
		zero := m.kind == zeroPlain || m.kind == zeroAlloc || m.kind == unallocated && im.zeroBelow(uint64(off), m.n)
		if !zero {
			if _, err := im.write(zeros[:m.n], off); err != nil {
				return err
			}
		}
		off += int64(m.n)
	}
	return nil
}

// unmapSteps takes the lock once for each L2 table, so that others get a turn.
func (im *Image) unmapSteps(off, end int64, discard bool) error {
	for off < end {
		if err := im.relieve(); err != nil {
			return err
		}
		next, rest, err := im.unmapStep(off, end, discard)
		for _, r := range rest {
			if err == nil {
				err = im.writeZeros(r[0], r[1])
			}
		}
		if err != nil {
			return err
		}
		off = next
	}
	return nil
}

func (im *Image) unmapStep(off, end int64, discard bool) (next int64, rest [][2]int64, err error) {
	im.lockTables()
	defer im.unlockTables()
	if im.fail.Load() != nil {
		return 0, nil, im.usable(true)
	}
	// Many tables that don't exist cost one turn.
	for turns := 0; off < end && turns < 1024; turns++ {
		next := im.l2End(off, end)
		if !im.untouched(off) {
			im.await(uint64(off)>>im.geo.bits, uint64(next-1)>>im.geo.bits)
			rest, err := im.unmapTable(off, next, discard)
			return next, rest, err
		}
		off = next
	}
	return off, nil, nil
}

// untouched tells that nothing is mapped by the L2 table of off, so that there
// is nothing to do to make it zeros.
func (im *Image) untouched(off int64) bool {
	i, _, _ := im.geo.split(off)
	return im.l1[i] == 0 && (!im.below() || im.backing != nil && off >= im.backing.Size())
}

// l2End returns where the L2 table of off ends, or end.
func (im *Image) l2End(off, end int64) int64 {
	shift := im.geo.bits + im.geo.l2Bits
	next := (uint64(off)>>shift + 1) << shift
	return int64(min(next, uint64(end)))
}

// unmap makes the clusters from off, a cluster's start, up to end read as
// zeros, the last one even if end is inside of it.
func (im *Image) unmap(off, end int64, discard bool) error {
	for off < end {
		next := im.l2End(off, end)
		if !im.untouched(off) {
			if _, err := im.unmapTable(off, next, discard); err != nil {
				return err
			}
		}
		off = next
	}
	return nil
}

// unmapTable makes subclusters from off, up to the one that end is in, read as
// zeros. It returns those for which zeros must be written.
func (im *Image) unmapTable(off, end int64, discard bool) (rest [][2]int64, err error) {
	g := &im.geo
	_, i, in := g.split(off)
	guest := uint64(off) - in
	t, err := im.l2For(off)
	if err != nil {
		return nil, err
	}
	owned := false
	for ; guest < uint64(end); i, guest, in = i+1, guest+g.cs, 0 {
		var e entry
		if t != nil {
			if e, err = im.entryAt(t, i, guest, true); err != nil {
				return nil, err
			}
		}
		mask := g.subMask(in, min(uint64(end)-guest, g.cs))
		next, ok := im.zeroEntry(e, mask, discard)
		if !ok {
			rest = append(rest, [2]int64{int64(guest + in), int64(min(uint64(end), guest+g.cs))})
			continue
		}
		if g.encode(next) == g.encode(e) {
			continue
		}
		if !owned {
			if t, err = im.l2ForWrite(off); err != nil {
				return nil, err
			}
			owned = true
		}
		if next.kind == compressed || next.placed {
			im.setL2(t, i, next)
			continue
		}
		if err := im.freeData(e, guest, true); err != nil {
			return nil, err
		}
		im.setL2(t, i, next)
	}
	return rest, nil
}

// freeData drops the reference to what e refers to.
func (im *Image) freeData(e entry, guest uint64, discard bool) error {
	if im.geo.external {
		if e.placed && discard {
			c := guest >> im.geo.bits
			if k := len(im.frees); k > 0 && im.frees[k-1].data && im.frees[k-1].first+im.frees[k-1].n == c {
				im.frees[k-1].n++
			} else {
				im.frees = append(im.frees, freeRun{span{c, 1}, true, true})
			}
		}
		return nil
	}
	if c, k := e.clusters(&im.geo); k > 0 {
		if err := im.guard(c<<im.geo.bits, k<<im.geo.bits, metaNone); err != nil {
			return err
		}
		return im.free(c, k, discard)
	}
	return nil
}

// zeroEntry returns e with the subclusters of mask reading as zeros, without a
// place if it needs none any more. It says false where no entry says that.
func (im *Image) zeroEntry(e entry, mask uint32, discard bool) (entry, bool) {
	g := &im.geo
	whole := mask == g.all
	switch {
	case g.version < 3 || discard && !im.below():
		return entry{}, true // whole clusters only
	case discard, whole && e.kind == compressed:
		return entry{kind: zeroPlain, zero: g.all}, true
	case e.kind == compressed:
		return e, false
	}
	set := mask
	if !im.below() {
		set &= e.alloc // what isn't stored reads as zeros
	}
	if set == 0 {
		return e, true
	}
	if e.placed && !e.copied && whole && e.alloc != 0 {
		return entry{kind: zeroPlain, zero: g.all}, true // shared
	}
	e.zero |= set
	e.alloc &^= set
	e.kind = e.summary(g)
	return e, true
}

// BlockStatus tells how bytes from off are stored. Clusters that a discard
// left behind aren't allocated; those that were zeroed are. What isn't
// allocated here is described as the backing file describes it, one deeper.
// Encrypted bytes are nowhere in the file as they read.
func (im *Image) BlockStatus(off, n int64) (image.Extent, error) {
	im.reads.RLock()
	defer im.reads.RUnlock()
	if err := im.usable(false); err != nil {
		return image.Extent{}, err
	}
	if err := image.CheckRange(off, n, im.Size()); err != nil || n == 0 {
		return image.Extent{}, image.ErrOutOfRange
	}
	return im.status(off, n)
}

// status is BlockStatus, whatever the size of the disk.
func (im *Image) status(off, n int64) (image.Extent, error) {
	m, err := im.mapStatus(off, uint64(n))
	if err != nil {
		return image.Extent{}, err
	}
	// Runs go on across L2 tables and copied flags.
	for m.n < uint64(n) && m.kind != compressed {
		next, err := im.mapStatus(off+int64(m.n), uint64(n)-m.n)
		if err != nil || next.kind != m.kind || m.kind >= zeroAlloc && next.host != m.host+m.n {
			break
		}
		m.n += next.n
	}
	if m.kind == unallocated {
		return im.statusBelow(off, int64(m.n))
	}
	x := image.Extent{Start: off, Length: int64(m.n), Allocated: true,
		Zero: m.kind < normal, Compressed: m.kind == compressed, Offset: -1}
	if im.cipher == nil && (m.kind == normal || m.kind == zeroAlloc) {
		x.Offset = int64(m.host)
	}
	return x, nil
}

func (im *Image) mapStatus(off int64, n uint64) (mapping, error) {
	m, pin, err := im.mapPinned(off, n)
	if err == nil {
		im.pins.leave(pin)
	}
	return m, err
}
