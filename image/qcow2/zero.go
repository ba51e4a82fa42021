package qcow2

import (
	"nvstore.dev/image"
)

// Discard gives whole clusters in the range back, which then read as zeros,
// and leaves the rest of the range alone. The file is told of clusters that
// nothing uses any more, once the next Sync has made that durable.
func (im *Image) Discard(off, n int64) error {
	end := off + n
	if err := im.discardRange(off, n); err != nil || n == 0 {
		return err
	}
	cs := int64(im.geo.cs)
	off = (off + cs - 1) &^ (cs - 1)
	if end < im.Size() {
		end &^= cs - 1
	}
	return im.unmapSteps(off, end, true)
}

func (im *Image) discardRange(off, n int64) error {
	im.mu.RLock()
	defer im.mu.RUnlock()
	return im.writeRange(off, n)
}

// WriteZeroes makes the range read as zeros. In version 3, clusters that
// aren't shared keep their place in the file, for what is written there next.
func (im *Image) WriteZeroes(off, n int64) error {
	if err := im.discardRange(off, n); err != nil || n == 0 {
		return err
	}
	cs := int64(im.geo.cs)
	end := off + n
	first, last := (off+cs-1)&^(cs-1), end&^(cs-1)
	if end == im.Size() {
		last = end
	}
	if first >= last {
		return im.writeZeros(off, end)
	}
	if err := im.writeZeros(off, first); err != nil {
		return err
	}
	if err := im.unmapSteps(first, last, false); err != nil {
		return err
	}
	return im.writeZeros(last, end)
}

// writeZeros writes zeros to less than a cluster at each of its ends.
func (im *Image) writeZeros(off, end int64) error {
	cs := int64(im.geo.cs)
	for off < end {
		next := min(end, off&^(cs-1)+cs)
		zero, err := im.readsZero(off)
		if err != nil {
			return err
		}
		if !zero {
			if _, err := im.WriteAt(make([]byte, next-off), off); err != nil {
				return err
			}
		}
		off = next
	}
	return nil
}

func (im *Image) readsZero(off int64) (bool, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.usable(true); err != nil {
		return false, err
	}
	m, err := im.mapRun(off, 1, true)
	return m.kind < normal, err
}

// unmapSteps takes the lock once for each L2 table, so that others get a turn.
func (im *Image) unmapSteps(off, end int64, discard bool) error {
	for off < end {
		next, err := im.unmapStep(off, end, discard)
		if err != nil {
			return err
		}
		off = next
	}
	return nil
}

func (im *Image) unmapStep(off, end int64, discard bool) (int64, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.writeRange(off, end-off); err != nil {
		return 0, err
	}
	// Many tables that don't exist cost one turn.
	for turns := 0; off < end && turns < 1024; turns++ {
		next := im.l2End(off, end)
		if i, _, _ := im.geo.split(off); im.l1[i] != 0 {
			return next, im.unmap(off, next, discard)
		}
		off = next
	}
	return off, nil
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
		if i, _, _ := im.geo.split(off); im.l1[i] != 0 {
			if err := im.unmapTable(off, next, discard); err != nil {
				return err
			}
		}
		off = next
	}
	return nil
}

func (im *Image) unmapTable(off, end int64, discard bool) error {
	if len(im.frees) >= maxFrees {
		if err := im.flush(); err != nil {
			return err
		}
	}
	g := &im.geo
	_, first, _ := g.split(off)
	n := g.clusters(uint64(end - off))
	t, err := im.l2For(off)
	if err != nil {
		return err
	}
	writable := false
	for i := first; i < first+n; i++ {
		e, err := im.entryAt(t, i, true)
		if err != nil {
			return err
		}
		v, drop := im.zeroEntry(e, discard)
		if v == getEntry(t.buf, i) {
			continue
		}
		if !writable {
			if t, err = im.l2ForWrite(off); err != nil {
				return err
			}
			writable = true
		}
		if drop {
			c, k := e.clusters(g)
			if err := im.free(c, k, true); err != nil {
				return err
			}
		}
		im.setL2(t, i, v)
	}
	return nil
}

// zeroEntry returns the L2 entry that reads as zeros in the place of e, and
// whether e's clusters are dropped. There is no backing file, so no entry at
// all reads as zeros too.
func (im *Image) zeroEntry(e entry, discard bool) (v uint64, drop bool) {
	switch {
	case e.kind == unallocated:
		return 0, false
	case discard || im.geo.version < 3:
		return 0, e.kind != zeroPlain
	case e.kind == zeroPlain:
		return flagZero, false
	case e.kind != compressed && e.copied:
		return e.host | flagCopied | flagZero, false
	case e.kind == zeroAlloc:
		return e.host | flagZero, false
	}
	return flagZero, true
}

// BlockStatus tells how bytes from off are stored. Clusters that a discard
// left behind aren't allocated; those that were zeroed are.
func (im *Image) BlockStatus(off, n int64) (image.Extent, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.usable(false); err != nil {
		return image.Extent{}, err
	}
	if err := image.CheckRange(off, n, im.Size()); err != nil || n == 0 {
		return image.Extent{}, image.ErrOutOfRange
	}
	m, err := im.mapRun(off, uint64(n), false)
	if err != nil {
		return image.Extent{}, err
	}
	// Runs go on across L2 tables and copied flags.
	for m.n < uint64(n) && m.kind != compressed {
		next, err := im.mapRun(off+int64(m.n), uint64(n)-m.n, false)
		if err != nil || next.kind != m.kind || m.kind == normal && next.host != m.host+m.n {
			break
		}
		m.n += next.n
	}
	x := image.Extent{Start: off, Length: int64(m.n), Allocated: m.kind != unallocated,
		Zero: m.kind < normal, Compressed: m.kind == compressed, Offset: -1}
	if m.kind == normal {
		x.Offset = int64(m.host)
	}
	return x, nil
}
