package qcow2

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// An allocator knows where free clusters may be. What is free, the refcounts
// say.
type allocator struct {
	hint     uint64 // all clusters below are in use
	virgin   uint64 // clusters from here on were never written: zeros
	reserved []span // found free, and not yet in the refcounts
	grew     bool   // the file was made longer
}

type span struct{ first, n uint64 }

func (a *allocator) freed(c uint64) { a.hint = min(a.hint, c) }

func (a *allocator) isReserved(c uint64) bool {
	for _, s := range a.reserved {
		if c >= s.first && c-s.first < s.n {
			return true
		}
	}
	return false
}

// reserve keeps findFree off clusters until the function it returns is called.
func (im *Image) reserve(first, n uint64) (release func()) {
	a := &im.alloc
	a.reserved = append(a.reserved, span{first, n})
	return func() { a.reserved = a.reserved[:len(a.reserved)-1] }
}

// take allocates as takeFree does. Spare clusters aren't kept when it comes to
// that.
func (im *Image) take(n uint64, k metaKind) (off uint64, zeroed bool, err error) {
	off, zeroed, err = im.takeFree(n, k)
	if im.spare != (spare{}) && errors.Is(err, image.ErrNoSpace) && im.fail.Load() == nil {
		if err := im.releaseSpare(); err != nil {
			return 0, false, err
		}
		return im.takeFree(n, k)
	}
	return off, zeroed, err
}

// takeFree allocates n contiguous clusters for use k, with a refcount of one in
// memory. zeroed tells that they read as zeros in the file.
func (im *Image) takeFree(n uint64, k metaKind) (off uint64, zeroed bool, err error) {
	first, err := im.findFree(n)
	if err != nil {
		return 0, false, err
	}
	if err := im.growFile((first + n) << im.geo.bits); err != nil {
		im.alloc.freed(first)
		return 0, false, err
	}
	release := im.reserve(first, n)
	for bi := first >> im.geo.rbBits; bi <= (first+n-1)>>im.geo.rbBits; bi++ {
		if err := im.ensureRefblock(bi); err != nil {
			release()
			im.alloc.freed(first)
			return 0, false, err
		}
	}
	for c := first; c < first+n && err == nil; c++ {
		err = im.setRefcount(c, 1)
	}
	release()
	if err != nil {
		return 0, false, err
	}
	zeroed = first >= im.alloc.virgin
	im.alloc.virgin = max(im.alloc.virgin, first+n)
	if k != metaNone {
		for c := first; c < first+n; c++ {
			im.meta.set(c, k)
		}
	}
	return first << im.geo.bits, zeroed, nil
}

// findFree returns the first of n contiguous free clusters.
func (im *Image) findFree(n uint64) (uint64, error) {
	var run uint64
	for c := im.alloc.hint; c < maxHostOffset>>im.geo.bits; {
		bi := c >> im.geo.rbBits
		next := (bi + 1) << im.geo.rbBits
		if bi < uint64(len(im.full)) && im.full[bi] {
			c, run = next, 0
			continue
		}
		if bi >= maxReftableBytes/8 {
			break
		}
		found, err := im.scanBlock(c, next, n, &run)
		if err != nil {
			return 0, err
		}
		if run == n {
			if n == 1 {
				im.alloc.hint = found + 1
			}
			return found, im.checkFree(found, n)
		}
		c = next
	}
	return 0, fmt.Errorf("qcow2: no free clusters below 2^56 and in reach of the refcount table: %w", image.ErrNoSpace)
}

// scanBlock looks at the clusters [c, next) of one refcount block, until run
// free ones in a row are n; then it returns the first of them.
func (im *Image) scanBlock(c, next, n uint64, run *uint64) (uint64, error) {
	bi, mask, order := c>>im.geo.rbBits, uint64(1)<<im.geo.rbBits-1, im.geo.refOrder
	now, err := im.refblock(bi)
	if err != nil {
		return 0, err
	}
	var before *table // as it is durable, while it differs
	if s := im.shadow; s != nil && bi < uint64(len(s.old)) && s.old[bi] != 0 && s.fresh[bi] {
		if before, err = im.rbc.get(s.old[bi], im.loadTable); err != nil {
			return 0, err
		}
	}
	full := c&mask == 0 && im.shadow == nil && now != nil && bi < uint64(len(im.full))
	for ; c < next; c++ {
		switch {
		case now != nil && getRefcount(now.buf, order, c&mask) != 0,
			before != nil && getRefcount(before.buf, order, c&mask) != 0:
			*run = 0
		case im.alloc.isReserved(c):
			*run, full = 0, false
		default:
			full = false
			if *run++; *run == n {
				return c + 1 - n, nil
			}
		}
	}
	if full {
		im.full[bi] = true
	}
	return 0, nil
}

// checkFree refuses clusters that are in use in spite of a refcount of 0.
func (im *Image) checkFree(first, n uint64) error {
	for c := first; c < first+n; c++ {
		if k := im.meta.get(c); k != metaNone {
			return im.badRefcount(c, "a refcount above 0 for "+metaNames[k])
		}
	}
	return nil
}

// growFile makes the file reach end, in steps: a file that grows with each
// write makes each Sync a change of its inode.
func (im *Image) growFile(end uint64) error {
	size := uint64(im.file.Size())
	if end <= size {
		return nil
	}
	r, ok := image.As[image.Resizer](im.file)
	if !ok {
		return fmt.Errorf("qcow2: the file can't grow by %d bytes: %w", end-size, image.ErrNoSpace)
	}
	end = im.geo.clusters(end) << im.geo.bits
	ahead := im.geo.clusters(end+min(max(end/8, 256<<10), 32<<20)) << im.geo.bits
	err := r.Resize(int64(ahead))
	if errors.Is(err, image.ErrNoSpace) {
		err = r.Resize(int64(end))
	}
	if err == nil && uint64(im.file.Size()) < end {
		err = image.ErrNoSpace
	}
	switch {
	case err == nil:
		im.alloc.grew = true
		return nil
	case errors.Is(err, image.ErrNoSpace), errors.Is(err, image.ErrUnsupported):
		return fmt.Errorf("qcow2: the file can't grow by %d bytes: %w (%w)", end-size, image.ErrNoSpace, err)
	}
	return im.poison(err)
}

// trim cuts unused clusters off the end of the file, if it grew. It is only
// good manners, so errors don't matter.
func (im *Image) trim() error {
	r, ok := image.As[image.Resizer](im.file)
	if !im.alloc.grew || !ok {
		return nil
	}
	size := im.geo.clusters(uint64(im.file.Size()))
	end := size
	for end > 1 {
		v, err := im.refcount(end - 1)
		if err != nil {
			return err
		}
		if v != 0 || im.meta.get(end-1) != metaNone {
			break
		}
		end--
	}
	if end < size {
		_ = r.Resize(int64(end << im.geo.bits))
	}
	return nil
}

// A freeRun is clusters that lose one reference each, once what referred to
// them is durably gone.
type freeRun struct {
	span
	discard bool // tell the file
	data    bool // clusters of the data file, which has no refcounts
}

// maxFrees bounds the list of them; past it, metadata is flushed.
const maxFrees = 1 << 16

// free drops one reference to n clusters after the next flush.
func (im *Image) free(first, n uint64, discard bool) error {
	for c := first; c < first+n; c++ {
		v, err := im.refcount(c)
		if err != nil {
			return err
		}
		if v == 0 {
			return im.badRefcount(c, "a refcount above 0, as the cluster is in use")
		}
	}
	if k := len(im.frees); k > 0 {
		if last := &im.frees[k-1]; last.first+last.n == first && last.discard == discard && !last.data {
			last.n += n
			return nil
		}
	}
	im.frees = append(im.frees, freeRun{span{first, n}, discard, false})
	return nil
}

// applyFrees runs when nothing durable refers to the clusters any more. They
// wait until no request is under way that mapped them before.
func (im *Image) applyFrees() error {
	im.leaving = append(im.leaving, im.frees...)
	im.frees = im.frees[:0]
	for {
		if len(im.dying) > 0 {
			if !im.pins.quiet() {
				return nil
			}
			if err := im.drop(im.dying); err != nil {
				return err
			}
			im.dying = im.dying[:0]
		}
		if len(im.leaving) == 0 {
			return nil
		}
		im.dying, im.leaving = im.leaving, im.dying
		im.pins.turn()
	}
}

// drop lowers refcounts.
func (im *Image) drop(list []freeRun) error {
	var gone []span
	for _, f := range list {
		if f.data {
			gone, err := im.unmapped(f.span)
			if err != nil {
				return im.poison(err)
			}
			discardFile(im.data, &im.geo, gone)
			continue
		}
		for c := f.first; c < f.first+f.n; c++ {
			if err := im.addRefcount(c, -1); err != nil {
				// Two entries shared a cluster that was
				// counted once.
				return im.poison(err)
			}
			im.meta.del(c)
			v, err := im.refcount(c)
			if err != nil {
				return im.poison(err)
			}
			if v == 0 && f.discard {
				gone = appendSpan(gone, c)
			}
		}
	}
	discardFile(im.file, &im.geo, gone)
	return nil
}

// unmapped returns those of some clusters of a data file that weren't written
// again since they were discarded. They have the disk's own offsets.
func (im *Image) unmapped(s span) (gone []span, err error) {
	for c := s.first; c < s.first+s.n; c++ {
		guest := c << im.geo.bits
		t, err := im.l2For(int64(guest))
		if err != nil {
			return nil, err
		}
		if t != nil {
			_, i, _ := im.geo.split(int64(guest))
			e, err := im.entryAt(t, i, guest, false)
			if err != nil {
				return nil, err
			}
			if e.placed {
				continue
			}
		}
		if im.claimed(c, c) == nil {
			gone = appendSpan(gone, c)
		}
	}
	return gone, nil
}

func appendSpan(s []span, c uint64) []span {
	if k := len(s); k > 0 && s[k-1].first+s[k-1].n == c {
		s[k-1].n++
		return s
	}
	return append(s, span{c, 1})
}

// discardFile tells the file what it needn't keep. It may refuse.
func discardFile(file image.Device, g *geometry, gone []span) {
	d, ok := image.As[image.Discarder](file)
	if !ok {
		return
	}
	size := uint64(file.Size())
	for _, s := range gone {
		off, end := s.first<<g.bits, (s.first+s.n)<<g.bits
		if end = min(end, size); off < end {
			_ = d.Discard(int64(off), int64(end-off))
		}
	}
}
