package qcow2

import (
	"bytes"
	"encoding/binary"
)

// entries repairs, in place, what is wrong with single entries of tables and in
// the header, and has only one meaning.
func (r *repairer) entries(c *checker) error {
	im := r.im
	r.header()
	if _, ok := findExtension(im.hdr.exts, extBitmaps); c.badBitmaps || !ok && im.hdr.autoclear&autoclearBitmaps != 0 {
		im.dropExtension(extBitmaps)
		im.hdr.autoclear &^= autoclearBitmaps
	}
	for _, t := range c.l1s {
		if err := c.editL1(t, im.fixL1, im.fixL2); err != nil {
			return err
		}
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	if im.hdr.moved || len(im.hdr.defects) > 0 {
		im.hdr.defects = nil
		return im.writeHeader()
	}
	return nil
}

// header makes size and header_length what QEMU takes them for.
func (r *repairer) header() {
	h := r.im.hdr
	h.size &^= sector - 1
	if n := -h.headerLen & 7; n != 0 && h.version >= 3 {
		h.headerLen, h.tail = h.headerLen+n, append(h.tail, make([]byte, n)...)
		h.moved = true
	}
}

func (im *Image) dropExtension(typ uint32) {
	var kept []Extension
	for _, x := range im.hdr.exts {
		if x.Type == typ {
			im.hdr.moved = true
			continue
		}
		kept = append(kept, x)
	}
	im.hdr.exts = kept
}

// fixL1 returns what e must be.
func (im *Image) fixL1(e uint64) (uint64, error) {
	if _, bad := im.geo.decodeL1(e); bad == nil || bad.fatal {
		return e, nil
	}
	if e &^= l1Reserved; e&entryOffset == 0 {
		return 0, nil
	}
	return e, nil
}

// fixL2 returns what an L2 entry must be.
func (im *Image) fixL2(v l2Entry) (l2Entry, error) {
	g := &im.geo
	e, bad := g.decode(v)
	switch {
	case bad == nil:
	case !bad.fatal && e.kind == compressed:
		return l2Entry{word: v.word &^ flagCopied}, nil
	case !bad.fatal:
		e.copied = e.copied && e.placed
		return g.encode(e), nil
	case v.word&flagCompressed == 0 && v.word&flagZero != 0 && g.version >= 3 && !g.extended():
		return l2Entry{word: flagZero}, nil // it reads as zeros, wherever its cluster is
	}
	return v, nil
}

// setCopied clears the copied flags that refcounts contradict, or sets those
// that are missing.
func (c *checker) setCopied(set bool) error {
	fix := func(e, rc uint64) uint64 {
		switch {
		case set && rc == 1:
			return e | flagCopied
		case !set && rc != 1:
			return e &^ flagCopied
		}
		return e
	}
	l1 := func(e uint64) (uint64, error) {
		off, bad := c.geo.decodeL1(e)
		if off == 0 || bad != nil {
			return e, nil
		}
		rc, err := c.refcount(off >> c.geo.bits)
		return fix(e, rc), err
	}
	l2 := func(v l2Entry) (l2Entry, error) {
		e, bad := c.geo.decode(v)
		if bad != nil || e.kind == compressed || !e.placed {
			return v, nil
		}
		rc, err := c.dataCount(e.host)
		v.word = fix(v.word, rc)
		return v, err
	}
	if err := c.editL1(c.l1s[0], l1, l2); err != nil {
		return err
	}
	return c.syncFile()
}

// editL1 changes the entries of an L1 table and of its L2 tables in place,
// except for tables that lie where something else does. It writes sectors that
// change; in each, every entry is old or new.
func (c *checker) editL1(t l1Table, l1 func(uint64) (uint64, error), l2 func(l2Entry) (l2Entry, error)) error {
	if c.editable(t.off, t.n*8) {
		if err := c.editTable(t.off, t.n*8, func(b []byte) error { return editWords(b, l1) }); err != nil {
			return err
		}
		if t.active {
			var err error
			if c.l1, err = c.readEntries(t.off, t.n); err != nil {
				return err
			}
		}
	}
	return c.eachL1(t, func(_, e uint64) error {
		off, ok := c.tableOK(e)
		if !ok || !c.editable(off, c.geo.cs) {
			return nil
		}
		c.l2c.drop(off)
		return c.editTable(off, c.geo.cs, func(b []byte) error { return c.geo.editEntries(b, l2) })
	})
}

// editable tells whether a table has its clusters for itself.
func (c *checker) editable(off, n uint64) bool {
	for i := range c.geo.clusters(n) {
		if _, ok := c.overlaps[off>>c.geo.bits+i]; ok {
			return false
		}
	}
	return off != 0 && len(c.overlaps) < maxFreed
}

func editWords(b []byte, fix func(uint64) (uint64, error)) error {
	for ; len(b) >= 8; b = b[8:] {
		v := binary.BigEndian.Uint64(b)
		if v == 0 {
			continue
		}
		w, err := fix(v)
		if err != nil {
			return err
		}
		binary.BigEndian.PutUint64(b, w)
	}
	return nil
}

func (g *geometry) editEntries(b []byte, fix func(l2Entry) (l2Entry, error)) error {
	for i := range uint64(len(b)) / g.entrySize() {
		v := g.get(b, i)
		if v == (l2Entry{}) {
			continue
		}
		w, err := fix(v)
		if err != nil {
			return err
		}
		g.put(b, i, w)
	}
	return nil
}

func (c *checker) editTable(off, n uint64, edit func(b []byte) error) error {
	b, old := make([]byte, min(n, 64<<10)), make([]byte, 64<<10)
	for ; n > 0; off, n = off+uint64(len(b)), n-uint64(len(b)) {
		b = b[:min(n, uint64(len(b)))]
		if err := readFile(c.file, b, off); err != nil {
			return err
		}
		copy(old, b)
		if err := edit(b); err != nil {
			return err
		}
		if err := c.writeChanged(old[:len(b)], b, off); err != nil {
			return err
		}
	}
	return c.ctx.Err()
}

// writeChanged writes the sectors of b that differ from old.
func (c *checker) writeChanged(old, b []byte, off uint64) error {
	for i := 0; i < len(b); i += sector {
		end := min(i+sector, len(b))
		if bytes.Equal(old[i:end], b[i:end]) {
			continue
		}
		if err := c.writeFile(b[i:end], off+uint64(i)); err != nil {
			return err
		}
	}
	return nil
}
