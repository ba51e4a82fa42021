package blobdir

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
)

// A Problem is one finding of Check.
type Problem struct {
	Code    string `json:"code"`    // the reject rule of FORMAT.md, or a short word
	Where   string `json:"where"`   // structure, blob and byte offset
	Message string `json:"message"` // one sentence
}

// A Report is what Check found.
type Report struct {
	Errors   []Problem `json:"errors"`   // damage: something can't be read, or contradicts itself
	Leaks    []Problem `json:"leaks"`    // blocks that nothing uses and nothing calls free
	Warnings []Problem `json:"warnings"` // harmless, but worth knowing

	Generation int64 `json:"generation"`
	Blobs      int64 `json:"blobs"`
	Bytes      int64 `json:"bytes_checked"` // read and compared with a checksum
	Keyless    bool  `json:"keyless"`       // authenticity wasn't checked, for want of the key
}

// Clean tells whether there are neither errors nor leaks.
func (r *Report) Clean() bool { return len(r.Errors)+len(r.Leaks) == 0 }

func (r *Report) add(list *[]Problem, code, where, message string) {
	if len(*list) < maxCheckItems {
		*list = append(*list, Problem{code, where, message})
	}
}

func (r *Report) damage(err error, blob string) {
	e := (*Error)(nil)
	if !errors.As(err, &e) {
		r.add(&r.Errors, "io", blob, err.Error())
		return
	}
	where := e.Struct
	if blob != "" {
		where = fmt.Sprintf("blob %q, %s", blob, where)
	}
	if e.Off >= 0 {
		where += fmt.Sprintf(" at byte %#x", e.Off)
	}
	code := e.Rule
	if code == "" {
		code = "damage"
	}
	r.add(&r.Errors, code, where, err.Error())
}

// Check reads everything that the newest generation reaches, compares every
// checksum and, with the key, every MAC and tag, and compares what is free
// with what is in use. It also looks whether the generation before is whole,
// which is what a crash during the next commit falls back to. progress, which
// may be nil, is told how many of the image's bytes in use have been read.
func (d *Dir) Check(ctx context.Context, progress func(done, total int64)) (*Report, error) {
	if err := d.fail(); err != nil {
		return nil, err
	}
	st := d.pin()
	defer d.unpin(st)
	rep := &Report{Generation: st.root.gen, Keyless: st.prof.sealed && st.prof.keys == nil,
		Errors: []Problem{}, Leaks: []Problem{}, Warnings: []Problem{}}
	d.cache.clear()
	c := &checker{d: d, st: st, rep: rep, ctx: ctx, used: newBitmap(), free: newBitmap(), progress: progress, attached: make(map[int64]string)}
	if free, err := d.readFree(st.root, &st.prof); err == nil {
		c.end = free.end
		c.total = free.end
		for _, e := range free.extents {
			c.total -= e.length
		}
	}
	c.fixed()
	if err := c.live(); err != nil {
		return nil, err
	}
	if err := c.fallback(); err != nil {
		return nil, err
	}
	return rep, nil
}

type checker struct {
	d          *Dir
	st         *state
	rep        *Report
	ctx        context.Context
	used, free *bitmap
	end, total int64
	progress   func(done, total int64)
	attached   map[int64]string // offsets and names of attached live extents
}

// fixed checks header, roots and settled record.
func (c *checker) fixed() {
	if uuid, err := parseHeaderAt(c.d.dev); err != nil {
		c.rep.damage(err, "")
	} else if uuid != c.st.root.store {
		c.rep.add(&c.rep.Errors, "R9", "header", "the header has another store's UUID")
	}
	for i, s := range c.st.slots {
		if s.root == nil {
			c.rep.damage(s.err, "")
		} else if i != c.st.root.slot && s.root.gen > c.st.root.gen {
			c.rep.add(&c.rep.Warnings, "torn", fmt.Sprintf("root at byte %#x", rootSlots[i]), "a newer generation was torn by a crash and doesn't count")
		}
	}
	for _, w := range []struct{ code, text string }{{"free-rebuilt", c.st.status.FreeRebuilt}, {"settled-damaged", c.st.status.SettledDamaged}, {"torn", c.st.status.Recovered}} {
		if w.text != "" {
			c.rep.add(&c.rep.Warnings, w.code, "store", w.text)
		}
	}
	for _, r := range fixedRegions(c.st) {
		c.used.set(r.Offset, r.Length)
	}
}

func (c *checker) live() error {
	w := &walker{d: c.d, prof: &c.st.prof, content: true, open: true, used: c.used, seen: make(map[[16]byte]string), attached: c.attached}
	w.fault = func(err error, blob string) error {
		if !damaged(err) && !errors.Is(err, ErrTampered) {
			return err
		}
		c.rep.damage(err, blob)
		return nil
	}
	w.visit = func(r region) error {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		if r.Kind == RegionFree {
			if at := c.free.set(r.Offset, r.Length); at >= 0 {
				c.rep.add(&c.rep.Errors, "R53", fmt.Sprintf("free space at byte %#x", at), "a block is listed as free twice")
			}
			return nil
		}
		c.rep.Bytes += r.Length
		if c.progress != nil {
			c.progress(min(c.rep.Bytes, c.total), c.total)
		}
		return nil
	}
	if err := w.root(c.st.root); err != nil {
		return err
	}
	c.rep.Blobs = w.blobs
	for _, off := range slices.Sorted(maps.Keys(c.attached)) {
		c.rep.add(&c.rep.Warnings, "attached", fmt.Sprintf("blob %q at byte %#x", c.attached[off], off),
			"a live extent is attached: an emulator may write to it, and its content wasn't checked")
	}
	if w.blobs != c.st.root.blobs && len(c.rep.Errors) == 0 {
		c.rep.add(&c.rep.Errors, "R45", "root", fmt.Sprintf("the root counts %d blobs, and the directory has %d", c.st.root.blobs, w.blobs))
	}
	return c.balance()
}

// balance compares used and free with the area in use.
func (c *checker) balance() error {
	clean := len(c.rep.Errors) == 0
	for page, bits := range c.free.pages {
		u := c.used.pages[page]
		for i := range bits {
			if u != nil && u[i]&bits[i] != 0 {
				off := (page<<15 + int64(i)<<6) * BlockSize
				c.rep.add(&c.rep.Errors, "R53", fmt.Sprintf("free space near byte %#x", off), "a block in use is listed as free")
			}
		}
	}
	if !clean { // what hangs below damage would only look like leaks
		return nil
	}
	both := newBitmap()
	for _, m := range []*bitmap{c.used, c.free} {
		for page, bits := range m.pages {
			p := both.pages[page]
			if p == nil {
				p = new([512]uint64)
				both.pages[page] = p
			}
			for i := range bits {
				p[i] |= bits[i]
			}
		}
	}
	return both.gaps(0, c.end, func(off, n int64) error {
		c.rep.add(&c.rep.Leaks, "leak", fmt.Sprintf("byte %#x", off), fmt.Sprintf("%d bytes are neither in use nor free", n))
		return nil
	})
}

// fallback checks that the parent's root is whole.
func (c *checker) fallback() error {
	other := c.st.slots[1-c.st.root.slot].root
	if other == nil || other.gen > c.st.root.gen {
		return nil
	}
	prof := c.st.prof
	prof.gen, prof.sealed, prof.sealNames = other.gen, other.sealed(), other.sealNames
	w := &walker{d: c.d, prof: &prof, content: true, void: c.attached}
	w.visit = func(region) error { return c.ctx.Err() }
	w.fault = func(err error, blob string) error {
		if !damaged(err) && !errors.Is(err, ErrTampered) {
			return err
		}
		if len(c.rep.Errors) == 0 {
			c.rep.add(&c.rep.Warnings, "fallback", fmt.Sprintf("generation %d", other.gen), "the generation before the newest is damaged: "+err.Error())
		}
		return nil
	}
	return w.root(other)
}

// crossCheck compares the free node and its tree with what the directory
// reaches, and returns what is wrong with them.
func (d *Dir) crossCheck(st *state, free *freeNode) (string, error) {
	used, err := d.reach(st)
	if err != nil {
		if damaged(err) || errors.Is(err, ErrTampered) {
			return "", nil // reading the blob reports it; its blocks stay as they are
		}
		return "", err
	}
	why := ""
	w := &walker{d: d, prof: &st.prof, visit: func(r region) error {
		if r.Kind != RegionFreeTree && r.Kind != RegionFree || why != "" {
			return nil
		}
		if at := used.set(r.Offset, r.Length); at >= 0 {
			why = fmt.Sprintf("%s at byte %#x is in use", r.Kind, at)
		}
		return nil
	}}
	err = w.freeSpace(st.root)
	if damaged(err) {
		return err.Error(), nil
	}
	return why, err
}

// reach marks all that the live root reaches, except for the free tree.
func (d *Dir) reach(st *state) (*bitmap, error) {
	used := newBitmap()
	for _, r := range fixedRegions(st) {
		used.set(r.Offset, r.Length)
	}
	free := st.root.free
	used.set(free.off, free.blocks())
	w := &walker{d: d, prof: &st.prof, used: used, visit: func(region) error { return nil }}
	return used, w.inUse(st.root)
}

// rebuildFree makes the free node anew from what is reachable. All of it is
// put under quarantine: which of it the fallback root needs is not known.
func (d *Dir) rebuildFree(st *state) (*freeNode, error) {
	used, err := d.reach(st)
	if err != nil {
		return nil, err
	}
	f := &freeNode{end: firstEnd}
	for page := range used.pages {
		f.end = max(f.end, (page+1)<<15*BlockSize)
	}
	for f.end > firstEnd && !used.has(f.end/BlockSize-1) {
		f.end -= BlockSize
	}
	size := d.dev.Size() &^ (BlockSize - 1)
	f.end = min(max(f.end, firstEnd), max(size, firstEnd))
	err = used.gaps(0, f.end, func(off, n int64) error {
		f.extents = append(f.extents, freeExtent{off: off, length: n, freed: st.root.gen})
		return nil
	})
	return f, err
}
