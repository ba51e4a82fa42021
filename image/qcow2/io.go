package qcow2

import (
	"io"

	"nvstore.dev/image"
)

// A mapping says where a run of guest bytes is.
type mapping struct {
	kind   entryKind // of subclusters
	copied bool
	host   uint64 // where the first byte is, if normal or zeroAlloc
	from   entry  // if compressed
	n      uint64 // bytes of the run
}

// l2Offset returns where the L2 table is that maps off, or 0 if there is none.
func (im *Image) l2Offset(off int64) (uint64, error) {
	i, _, _ := im.geo.split(off)
	l1, at := im.seen.table, im.seen.off+i*8
	if i >= uint64(len(l1)) {
		return 0, im.badEntry("L1 table", at, nil, "an entry for each byte of the disk")
	}
	t, bad := im.geo.decodeL1(l1[i])
	switch {
	case bad != nil && bad.fatal:
		return 0, im.badEntry("L1 table", at, l1[i], bad.want)
	case t != 0 && t >= im.fileEnd():
		return 0, im.badEntry("L1 table", at, l1[i], "a table inside the file")
	}
	return t, nil
}

// l2For returns the L2 table that maps off for reading, or nil if there is
// none.
func (im *Image) l2For(off int64) (*table, error) {
	t, err := im.l2Offset(off)
	if t == 0 || err != nil {
		return nil, err
	}
	return im.l2c.get(t, im.loadTable)
}

// fileEnd is where the last cluster of the file ends, which may be incomplete.
func (im *Image) fileEnd() uint64 {
	return im.geo.clusters(uint64(im.file.Size())) << im.geo.bits
}

// inFile refuses clusters behind the end of the file: the file was cut.
func (im *Image) inFile(off, n uint64) error {
	if end := im.fileEnd(); off >= end || n > end-off {
		return fieldError{im.path, "qcow2 cluster"}.at(int64(off), "", nil, "a cluster inside the file", image.ErrCorrupt)
	}
	return nil
}

func (im *Image) badEntry(name string, at uint64, got any, want string) error {
	return fieldError{im.path, "qcow2 " + name}.at(int64(at), "", got, want, image.ErrCorrupt)
}

// entryAt decodes entry i of t, which maps the cluster at guest. For writing it
// must have no defect at all.
func (im *Image) entryAt(t *table, i, guest uint64, write bool) (entry, error) {
	v := im.geo.get(t.buf, i)
	e, bad := im.geo.decode(v)
	if im.geo.external && e.placed && e.host != guest {
		bad = &defect{"the disk's own offset, as there is a data file", true}
	}
	if bad != nil && (write || bad.fatal) {
		return entry{}, im.badEntry("L2 table", t.off+i*im.geo.entrySize(), v.word, bad.want)
	}
	return e, nil
}

// mapIn returns the mapping of the longest uniform run from off, at most n bytes
// and within t, the L2 table for off, or nil if there is none. For writing,
// entries must have no defects.
func (im *Image) mapIn(t *table, off int64, n uint64, write bool) (mapping, error) {
	g := &im.geo
	_, i, in := g.split(off)
	if t == nil {
		return mapping{n: min(n, (g.l2Entries()-i)<<g.bits-in)}, nil
	}
	guest := uint64(off) - in
	e, err := im.entryAt(t, i, guest, write)
	if err != nil {
		return mapping{}, err
	}
	if e.kind == compressed {
		return mapping{kind: compressed, from: e, n: min(n, g.cs-in)}, nil
	}
	s := uint32(in >> g.subBits)
	m := mapping{kind: e.sub(s), copied: e.copied, host: e.host + in}
	for base := uint64(0); ; base += g.cs {
		for s < g.subs && e.sub(s) == m.kind {
			s++
		}
		m.n = base + uint64(s)<<g.subBits - in
		if m.n >= n || s < g.subs || i+1 == g.l2Entries() {
			break
		}
		i, s = i+1, 0
		// An error is reported when it is reached.
		guest += g.cs
		next, err := im.entryAt(t, i, guest, write)
		if err != nil || next.kind == compressed || next.sub(0) != m.kind ||
			m.kind == normal && (next.copied != m.copied || next.host != e.host+g.cs) {
			break
		}
		e = next
	}
	m.n = min(m.n, n)
	return m, nil
}

// maxFetches is how often a request reads a table without a lock, before it
// takes one for good, as other requests throw the table out again.
const maxFetches = 3

// mapPinned is mapIn for those who hold no lock. What the mapping refers to
// stays until the pin is let go.
func (im *Image) mapPinned(off int64, n uint64) (m mapping, pin uint32, err error) {
	for tries := 0; ; tries++ {
		im.tab.RLock()
		var t *table
		at, err := im.l2Offset(off)
		if err == nil && at != 0 {
			if t = im.l2c.peek(at); t == nil && tries < maxFetches {
				im.tab.RUnlock()
				if err := im.l2c.fetch(at, &im.tab, im.loadTable); err != nil {
					return mapping{}, 0, err
				}
				continue
			}
			if t == nil {
				t, err = im.l2c.get(at, im.loadTable)
			}
		}
		if err == nil {
			m, err = im.mapIn(t, off, n, false)
		}
		if err == nil {
			pin = im.pins.enter()
		}
		im.tab.RUnlock()
		return m, pin, err
	}
}

// ReadAt reads as image.Device says. What an entry that the specification
// doesn't allow refers to isn't read: that is an image.ErrCorrupt.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	im.reads.RLock()
	defer im.reads.RUnlock()
	if err := im.usable(false); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, image.ErrOutOfRange
	}
	if len(p) == 0 {
		return 0, nil
	}
	want := max(0, min(int64(len(p)), im.Size()-off))
	n, err := im.read(p[:want], off)
	if err == nil && n < len(p) {
		err = io.EOF
	}
	return n, err
}

// read reads mapped bytes, whatever the size of the disk.
func (im *Image) read(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		m, pin, err := im.mapPinned(at, uint64(len(p)-done))
		if err != nil {
			return done, err
		}
		err = im.readMapped(p[done:][:m.n], &m, uint64(at))
		im.pins.leave(pin)
		if err != nil {
			return done, err
		}
		done += int(m.n)
	}
	return done, nil
}

func (im *Image) readMapped(b []byte, m *mapping, guest uint64) error {
	switch m.kind {
	case normal:
		if err := im.inData(m.host, m.n); err != nil {
			return err
		}
		return im.readData(b, m.host, guest)
	case compressed:
		return im.unpacked.read(im, m.from, b, guest&(im.geo.cs-1))
	case unallocated:
		return im.readBelow(b, guest)
	}
	clear(b)
	return nil
}

// WriteAt writes as image.Device says. Writing where clusters are allocated
// and not shared changes no metadata. Space that is missing is an
// image.ErrNoSpace; the image stays usable then. A cluster that refcounts or
// tables contradict is an image.ErrCorrupt, and isn't written to.
func (im *Image) WriteAt(p []byte, off int64) (int, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.writeRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	return im.write(p, off)
}

// write writes mapped bytes, whatever the size of the disk.
func (im *Image) write(p []byte, off int64) (int, error) {
	done := 0
	for {
		n, err := im.overwrite(p[done:], off+int64(done))
		if done += n; err != nil || done == len(p) {
			return done, err
		}
		n, err = im.allocWrite(p[done:], off+int64(done))
		if done += n; err != nil || done == len(p) {
			return done, err
		}
	}
}

// writeRange says whether [off, off+n) may be written.
func (im *Image) writeRange(off, n int64) error {
	if err := im.usable(true); err != nil {
		return err
	}
	if err := image.CheckRange(off, n, im.Size()); err != nil {
		return err
	}
	return im.record(off, n)
}

// overwrite writes in place up to the first cluster that needs metadata.
func (im *Image) overwrite(p []byte, off int64) (int, error) {
	done := 0
	for done < len(p) {
		at := off + int64(done)
		m, pin, err := im.mapOwn(at, uint64(len(p)-done))
		if err != nil || m.n == 0 {
			return done, err
		}
		err = im.patchData(p[done:][:m.n], m.host, uint64(at))
		im.pins.leave(pin)
		if err != nil {
			return done, err
		}
		done += int(m.n)
	}
	return done, nil
}

// mapOwn returns the run from off that may be written in place, pinned, or one
// of no bytes and no pin.
func (im *Image) mapOwn(off int64, n uint64) (m mapping, pin uint32, err error) {
	for tries := 0; ; tries++ {
		im.tab.RLock()
		m, miss, err := im.findOwn(off, n, tries >= maxFetches)
		if miss.c == nil && err == nil && m.n > 0 {
			pin = im.pins.enter()
		}
		im.tab.RUnlock()
		if miss.c == nil || err != nil {
			return m, pin, err
		}
		if err := miss.c.fetch(miss.off, &im.tab, im.loadTable); err != nil {
			return mapping{}, 0, err
		}
	}
}

// A cacheMiss is a table that must be read first.
type cacheMiss struct {
	c   *cache
	off uint64
}

// lookup returns a table, and where force isn't set, only a cached one.
func (im *Image) lookup(c *cache, off uint64, force bool) (*table, cacheMiss, error) {
	if t := c.peek(off); t != nil {
		return t, cacheMiss{}, nil
	}
	if !force {
		return nil, cacheMiss{c, off}, nil
	}
	t, err := c.get(off, im.loadTable)
	return t, cacheMiss{}, err
}

func (im *Image) findOwn(off int64, n uint64, force bool) (mapping, cacheMiss, error) {
	none := mapping{}
	if i, _, _ := im.geo.split(off); i >= uint64(len(im.l1)) || im.l1[i]&flagCopied == 0 {
		return none, cacheMiss{}, nil
	}
	at, err := im.l2Offset(off)
	if err != nil || at == 0 {
		return none, cacheMiss{}, err
	}
	t, miss, err := im.lookup(im.l2c, at, force)
	if t == nil {
		return none, miss, err
	}
	m, err := im.mapIn(t, off, n, true)
	if err != nil || m.kind != normal || !m.copied {
		return none, cacheMiss{}, err
	}
	if miss, err := im.ownData(m.host, m.n, force); err != nil || miss.c != nil {
		return none, miss, err
	}
	// The last cluster may be incomplete.
	if end := uint64(im.data.Size()) &^ (sector - 1); m.host+m.n > end {
		m.n = max(end, m.host) - m.host
	}
	return m, cacheMiss{}, nil
}

// ownData refuses to write data to [host, host+n) unless its clusters have a
// refcount of one and hold no metadata.
func (im *Image) ownData(host, n uint64, force bool) (cacheMiss, error) {
	if im.geo.external {
		return cacheMiss{}, nil
	}
	if err := im.guard(host, n, metaNone); err != nil {
		return cacheMiss{}, err
	}
	if err := im.inFile(host, n); err != nil {
		return cacheMiss{}, err
	}
	g := &im.geo
	for c := host >> g.bits; c <= (host+n-1)>>g.bits; c++ {
		var v uint64
		if bi := c >> g.rbBits; bi < uint64(len(im.reftable)) && im.reftable[bi] != 0 {
			t, miss, err := im.lookup(im.rbc, im.reftable[bi], force)
			if t == nil {
				return miss, err
			}
			v = getRefcount(t.buf, g.refOrder, c&(1<<g.rbBits-1))
		}
		if v != 1 {
			return cacheMiss{}, im.badRefcount(c, "a refcount of 1, as the copied flag says")
		}
	}
	return cacheMiss{}, nil
}
