package qcow2

import (
	"context"
	"fmt"

	"nvstore.dev/image"
)

// A leak is clusters with a refcount above the number of their references.
type leak struct {
	span
	refs uint64
}

// maxLeaks bounds the list of them; what is beyond is for another pass.
const maxLeaks = 1 << 16

func appendLeak(list []leak, l leak) []leak {
	if k := len(list); k > 0 {
		if last := &list[k-1]; last.first+last.n == l.first && last.refs == l.refs {
			last.n += l.n
			return list
		}
	}
	if len(list) >= maxLeaks {
		return list
	}
	return append(list, l)
}

// RepairLeaks gives back what a crash left allocated, and sets the copied
// flags as the refcounts then are. It returns what Check found before. An image
// with any other error is left as it is, and fails with image.ErrCorrupt: see
// Repair. A crash during the repair leaves the image as it was or repaired.
func (im *Image) RepairLeaks(ctx context.Context) (*CheckResult, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.usable(true); err != nil {
		return nil, err
	}
	var found *CheckResult
	left := int64(-1)
	for {
		if err := im.flushAside(); err != nil {
			return nil, err
		}
		c, err := im.runCheck(ctx, nil)
		if err != nil {
			return nil, err
		}
		if found == nil {
			found = c.res
		}
		switch n := c.res.Errors + c.res.Leaks; {
		case c.res.Errors > c.copied, n == left:
			return nil, fmt.Errorf("qcow2: repairing leaks of an image with %d errors: %w", c.res.Errors, image.ErrCorrupt)
		case n == 0:
			return found, nil
		default:
			left = n
		}
		if err := im.restructureAside(func() error { return im.lowerRefcounts(c.leaks) }, nil); err != nil {
			return nil, err
		}
	}
}

func (im *Image) lowerRefcounts(leaks []leak) error {
	for _, l := range leaks {
		for c := l.first; c < l.first+l.n; c++ {
			if err := im.setRefcount(c, l.refs); err != nil {
				return err
			}
			if s := im.shadow; l.refs == 0 && len(s.freed) < maxFreed {
				s.freed = appendSpan(s.freed, c)
			}
		}
	}
	return im.ownTables()
}

// RepairOptions are the options of Repair. Nil means the zero value.
type RepairOptions struct {
	// LeaksOnly lowers refcounts that are too high, and repairs nothing
	// else, as qemu-img check -r leaks. Otherwise everything is repaired
	// that can be without a guess at what the data should be.
	LeaksOnly bool

	// Check are the options of looking for what to repair.
	Check CheckOptions

	// Path is the file's name for error messages. It is never opened.
	Path string
}

// Repair repairs the image in file, which nobody may have open, and returns what
// is still wrong and how much was repaired. Refcounts become the number of
// references: the whole refcount structure is made anew in free clusters. Copied
// flags and reserved bits are put right, snapshots that can't be read are
// dropped, as are those beyond 65536, and bitmaps that can't. A refcount table
// that can't be one is as good as none. When no error is left, the dirty and the
// corrupt bit are cleared. Entries that point nowhere, or to what something else
// uses too, stay: so does the data that somebody may still find.
//
// A crash during the repair leaves the image no worse than before.
func Repair(ctx context.Context, file image.Device, o *RepairOptions) (*CheckResult, error) {
	if o == nil {
		o = &RepairOptions{}
	}
	im := &Image{path: o.Path, file: file, data: file, noData: true, repairing: !o.LeaksOnly}
	if err := im.load(0); err != nil {
		return nil, err
	}
	r := repairer{im: im, ctx: ctx, o: o}
	return r.run()
}

type repairer struct {
	im     *Image
	ctx    context.Context
	o      *RepairOptions
	before *CheckResult
}

func (r *repairer) run() (*CheckResult, error) {
	im := r.im
	c, err := im.runCheck(r.ctx, &r.o.Check)
	if err != nil {
		return nil, err
	}
	before := *c.res
	r.before = &before
	if r.before.Errors > c.marks || r.before.Leaks > 0 || im.snapsChanged {
		if err := r.repair(c); err != nil {
			return nil, err
		}
		if c, err = im.runCheck(r.ctx, &r.o.Check); err != nil {
			return nil, err
		}
		if c.res.Errors > c.marks && !r.o.LeaksOnly {
			// Tables that shared clusters with the old refcounts
			// can be changed now.
			if err := r.again(c); err != nil {
				return nil, err
			}
			if c, err = im.runCheck(r.ctx, &r.o.Check); err != nil {
				return nil, err
			}
		}
	}
	if err := r.clearBits(c); err != nil {
		return nil, err
	}
	return r.result(c.res), nil
}

// repair goes from what can't make anything worse to the switch of refcounts,
// and then to what relies on them.
func (r *repairer) repair(c *checker) error {
	im := r.im
	target := func(_, refs uint64) uint64 { return refs }
	if r.o.LeaksOnly {
		if r.before.Leaks == 0 {
			return nil
		}
		target = func(old, refs uint64) uint64 { return min(old, refs) }
	} else if err := r.entries(c); err != nil {
		return err
	}
	b, err := c.newRebuild(im.hdr.refOrder, im.snapsChanged, target)
	if err != nil {
		return err
	}
	if im.snapsChanged {
		if err := im.writeFile(encodeSnapshots(im.snaps), b.snaps); err != nil {
			return err
		}
		im.hdr.nbSnaps, im.hdr.snapsOff = uint32(len(im.snaps)), b.snaps
		if len(im.snaps) == 0 {
			im.hdr.snapsOff = 0
		}
	}
	if err := b.write(); err != nil {
		return err
	}
	if err := r.clearCopied(c, b); err != nil {
		return err
	}
	if err := b.commit(); err != nil {
		return err
	}
	im.snapsChanged, im.hdr.lost = false, nil
	if r.o.LeaksOnly && r.before.Errors > c.copied {
		return nil
	}
	return c.setCopied(true)
}

func (r *repairer) again(c *checker) error {
	if err := r.entries(c); err != nil {
		return err
	}
	if err := c.setCopied(false); err != nil {
		return err
	}
	return c.setCopied(true)
}

// clearCopied looks at the new refcounts before they are switched to: a copied
// flag that is missing does no harm, with any refcount.
func (r *repairer) clearCopied(c *checker, b *rebuild) error {
	if r.o.LeaksOnly {
		return nil
	}
	old := r.im.reftable
	r.im.reftable = b.blocks
	r.im.rbc.reset()
	err := c.setCopied(false)
	r.im.reftable = old
	return err
}

// clearBits says in the header that all is well, if it is.
func (r *repairer) clearBits(c *checker) error {
	const bits = incompatDirty | incompatCorrupt
	h := r.im.hdr
	if h.incompat&bits == 0 || c.res.Errors > c.marks || r.o.LeaksOnly {
		return nil
	}
	h.incompat &^= bits
	c.res.Errors -= c.marks
	kept := c.res.Findings[:0]
	for _, f := range c.res.Findings {
		if f.Code != "dirty" && f.Code != "corrupt" {
			kept = append(kept, f)
		}
	}
	c.res.Findings = kept
	return r.im.writeHeader()
}

func (r *repairer) result(after *CheckResult) *CheckResult {
	after.ErrorsFixed = max(0, r.before.Errors-after.Errors)
	after.LeaksFixed = max(0, r.before.Leaks-after.Leaks)
	left := make(map[Finding]bool)
	for _, f := range after.Findings {
		left[f] = true
	}
	for _, f := range r.before.Findings {
		if !left[f] {
			after.Fixed = append(after.Fixed, f)
		}
	}
	return after
}

// repairDirty repairs an image whose refcounts weren't written when it was
// closed, as QEMU does when it opens one.
func (im *Image) repairDirty(cacheSize int64) error {
	r, err := Repair(context.Background(), im.file, &RepairOptions{Path: im.path})
	if err != nil {
		return err
	}
	for _, f := range r.Findings {
		if f.Error {
			return fieldError{im.path, "qcow2 image"}.at(f.Where, f.Code, nil,
				"a dirty image that can be repaired: "+f.Message, image.ErrCorrupt)
		}
	}
	return im.load(cacheSize)
}
