package qcow2

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// A rebuild makes a whole new refcount structure: a table and all its blocks,
// in clusters that nothing refers to, at the end of the file if it can grow. The
// old one stays as it is until the header is switched, so a crash leaves one of
// the two.
type rebuild struct {
	*checker
	geo    geometry // with the new width
	target func(old, refs uint64) uint64

	own    []span   // clusters of the new structure
	blocks []uint64 // where the refcount blocks go, in order
	tables uint64   // clusters of the refcount table
	off    uint64   // of the refcount table
	snaps  uint64   // of the snapshot table, if it is rewritten
}

// newRebuild plans the structure. Counts become what target says of the old
// ones and the references, in a width of 1<<order bits.
func (c *checker) newRebuild(order uint32, snapshots bool, target func(old, refs uint64) uint64) (*rebuild, error) {
	h := *c.hdr
	h.refOrder = order
	r := &rebuild{checker: c, geo: newGeometry(&h), target: target}
	n := uint64(0)
	if snapshots {
		n = c.geo.clusters(snapTableSize(c.snaps))
	}
	if err := r.place(n, false); err == nil || !errors.Is(err, image.ErrNoSpace) {
		return r, err
	}
	// Where the file can't grow, free clusters do, unless something that
	// refers to them can't be read.
	if c.res.Errors > c.copied+c.counts {
		return nil, fmt.Errorf("qcow2: a file that can't grow, and is damaged: %w", image.ErrNoSpace)
	}
	return r, r.place(n, true)
}

// place finds clusters for n of snapshots, the table and the blocks.
func (r *rebuild) place(n uint64, reuse bool) error {
	g := &r.geo
	size := r.checker.inUse
	if !reuse {
		size++ // a compressed cluster may reach there
	}
	total, blocks := size, uint64(0)
	for {
		if !reuse {
			total = size + n + r.tables + blocks
		}
		b := (total + 1<<g.rbBits - 1) >> g.rbBits
		t := g.clusters(b * 8)
		if b == blocks && t == r.tables {
			break
		}
		blocks, r.tables = b, t
	}
	if r.tables<<g.bits > maxReftableBytes {
		return fmt.Errorf("qcow2: a refcount table of %d bytes: %w", r.tables<<g.bits, image.ErrNoSpace)
	}
	free := []span{{size, n + r.tables + blocks}}
	if reuse {
		free = r.checker.free
	}
	r.own, r.blocks = nil, make([]uint64, 0, blocks)
	if !reuse {
		if err := r.growExactly((total) << g.bits); err != nil {
			return err
		}
	}
	return r.takeFrom(free, n, blocks)
}

// takeFrom takes two runs and single clusters from what is free.
func (r *rebuild) takeFrom(free []span, n, blocks uint64) error {
	take := func(k uint64) (uint64, error) {
		for i := range free {
			if s := &free[i]; s.n >= k {
				first := s.first
				s.first, s.n = s.first+k, s.n-k
				return first << r.geo.bits, nil
			}
		}
		return 0, fmt.Errorf("qcow2: %d free clusters in a row, for refcounts: %w", k, image.ErrNoSpace)
	}
	var err error
	if n > 0 {
		if r.snaps, err = take(n); err != nil {
			return err
		}
	}
	if r.off, err = take(r.tables); err != nil {
		return err
	}
	r.own = append(r.own, span{r.off >> r.geo.bits, r.tables})
	for range blocks {
		b, err := take(1)
		if err != nil {
			return err
		}
		r.blocks = append(r.blocks, b)
		if k := len(r.own) - 1; r.own[k].first+r.own[k].n == b>>r.geo.bits {
			r.own[k].n++
		} else {
			r.own = append(r.own, span{b >> r.geo.bits, 1})
		}
	}
	return nil
}

// growExactly makes the file reach end.
func (im *Image) growExactly(end uint64) error {
	if end <= uint64(im.file.Size()) {
		return nil
	}
	d, ok := image.As[image.Resizer](im.file)
	if !ok {
		return fmt.Errorf("qcow2: the file can't grow: %w", image.ErrNoSpace)
	}
	err := d.Resize(int64(end))
	if err == nil && uint64(im.file.Size()) < end || errors.Is(err, image.ErrUnsupported) {
		err = fmt.Errorf("qcow2: the file can't grow: %w", image.ErrNoSpace)
	}
	return err
}

// write counts again and writes blocks and table. Nothing refers to them yet.
func (r *rebuild) write() error {
	c, per := r.checker, uint64(1)<<r.geo.rbBits
	c.build = r
	defer func() { c.build = nil }()
	c.end = max(c.end, uint64(len(r.blocks))*per)
	window := max(uint64(c.o.Memory)/4/per, 1) * per
	if err := c.eachWindow(window, r.writeBlocks); err != nil {
		return err
	}
	if err := r.writeFile(encodeEntries(r.blocks), r.off); err != nil {
		return err
	}
	return r.syncFile()
}

// writeBlocks writes the refcounts of the window.
func (r *rebuild) writeBlocks() error {
	c, mask := r.checker, uint64(1)<<r.geo.rbBits-1
	b := make([]byte, r.geo.cs)
	for cl := c.lo; cl < c.hi; cl++ {
		v, err := r.count(cl)
		if err != nil {
			return err
		}
		putRefcount(b, r.geo.refOrder, cl&mask, v)
		if cl&mask != mask && cl+1 != c.hi {
			continue
		}
		if bi := cl >> r.geo.rbBits; bi < uint64(len(r.blocks)) {
			if err := r.writeFile(b, r.blocks[bi]); err != nil {
				return err
			}
		}
		clear(b)
		if err := c.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// count is the new refcount of cluster cl.
func (r *rebuild) count(cl uint64) (uint64, error) {
	refs := uint64(r.refs[cl-r.lo] & refMax)
	old, err := r.oldCount(cl)
	if err != nil {
		return 0, err
	}
	for _, s := range r.own {
		if cl >= s.first && cl-s.first < s.n {
			old = refs // what was there counts no more
		}
	}
	v := r.target(old, refs)
	if v > r.geo.maxRefcount() {
		return 0, fmt.Errorf("qcow2: cluster %#x is shared %d times, too often for refcounts of %d bits: %w",
			cl<<r.geo.bits, v, 1<<r.geo.refOrder, image.ErrUnsupported)
	}
	return v, nil
}

// oldCount is the refcount that the old structure has, which is gone itself.
func (r *rebuild) oldCount(cl uint64) (uint64, error) {
	c := r.checker
	bi := cl >> c.geo.rbBits
	if bi >= uint64(len(c.reftable)) || !c.blockOK(c.reftable[bi]) {
		return 0, nil
	}
	return c.refcount(cl)
}

// commit switches to the new structure, and to whatever else im.hdr says.
func (r *rebuild) commit() error {
	im, h := r.Image, r.hdr
	h.reftableOff, h.reftableClusters, h.refOrder = r.off, uint32(r.tables), r.geo.refOrder
	if err := im.writeHeader(); err != nil {
		return err
	}
	return im.loadRefcounts()
}

// loadRefcounts reads the refcount table that the header names.
func (im *Image) loadRefcounts() (err error) {
	h := im.hdr
	im.geo = newGeometry(h)
	im.rbc.reset()
	n := uint64(h.reftableClusters) << h.clusterBits / 8
	im.reftable, err = im.readEntries(h.reftableOff, n)
	im.full = make([]bool, n)
	im.alloc.hint = 0
	return err
}
