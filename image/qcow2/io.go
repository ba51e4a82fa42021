package qcow2

import (
	"errors"
	"io"

	"nvstore.dev/image"
)

// A mapping says where a run of guest bytes is.
type mapping struct {
	entry
	n uint64 // bytes of the run
}

// l2For returns the L2 table that maps off for reading, or nil if there is
// none.
func (im *Image) l2For(off int64) (*table, error) {
	i, _, _ := im.geo.split(off)
	if i >= uint64(len(im.l1)) {
		return nil, im.badEntry("L1 table", im.hdr.l1Off+i*8, nil, "an entry for each byte of the disk")
	}
	t, bad := im.geo.decodeL1(im.l1[i])
	switch {
	case bad != nil && bad.fatal:
		return nil, im.badEntry("L1 table", im.hdr.l1Off+i*8, im.l1[i], bad.want)
	case t == 0:
		return nil, nil
	case t >= im.fileEnd():
		return nil, im.badEntry("L1 table", im.hdr.l1Off+i*8, im.l1[i], "a table inside the file")
	}
	return im.l2c.get(t, im.loadTable)
}

// fileEnd is where the last cluster of the file ends, which may be incomplete.
func (im *Image) fileEnd() uint64 {
	return im.geo.clusters(uint64(im.file.Size())) << im.geo.bits
}

// inFile refuses a run of data that lies behind the end of the file: the file
// was cut.
func (im *Image) inFile(off, n uint64) error {
	if end := im.fileEnd(); off >= end || n > end-off {
		return fieldError{im.path, "qcow2 cluster"}.at(int64(off), "", nil, "a cluster inside the file", image.ErrCorrupt)
	}
	return nil
}

func (im *Image) badEntry(name string, at uint64, got any, want string) error {
	return fieldError{im.path, "qcow2 " + name}.at(int64(at), "", got, want, image.ErrCorrupt)
}

// entryAt decodes entry i of t. For writing it must have no defect at all.
func (im *Image) entryAt(t *table, i uint64, write bool) (entry, error) {
	v := getEntry(t.buf, i)
	e, bad := im.geo.decode(v)
	if bad != nil && (write || bad.fatal) {
		return entry{}, im.badEntry("L2 table", t.off+i*8, v, bad.want)
	}
	return e, nil
}

// mapRun returns the mapping of the longest uniform run from off, at most n
// bytes and within one L2 table. For a normal mapping, host is that of off.
// For writing, entries must have no defects.
func (im *Image) mapRun(off int64, n uint64, write bool) (mapping, error) {
	g := &im.geo
	_, i, in := g.split(off)
	t, err := im.l2For(off)
	if err != nil {
		return mapping{}, err
	}
	if t == nil {
		return mapping{n: min(n, (1<<g.l2Bits-i)<<g.bits-in)}, nil
	}
	e, err := im.entryAt(t, i, write)
	if err != nil {
		return mapping{}, err
	}
	m := mapping{entry: e, n: g.cs - in}
	for i++; m.n < n && i < 1<<g.l2Bits && e.kind != compressed; i++ {
		next, err := im.entryAt(t, i, write)
		if err != nil || next.kind != e.kind || next.copied != e.copied {
			break // an error is reported when it is reached
		}
		if e.kind >= zeroAlloc && next.host != e.host+m.n+in {
			break
		}
		m.n += g.cs
	}
	m.n = min(m.n, n)
	if e.kind == normal || e.kind == zeroAlloc {
		m.host += in
	}
	return m, nil
}

// ReadAt reads as image.Device says. What an entry that the specification
// doesn't allow refers to isn't read: that is an image.ErrCorrupt.
func (im *Image) ReadAt(p []byte, off int64) (int, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
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
		m, err := im.mapRun(at, uint64(len(p)-done), false)
		if err != nil {
			return done, err
		}
		b := p[done:][:m.n]
		switch m.kind {
		case normal:
			if err = im.inFile(m.host, m.n); err == nil {
				err = readFile(im.file, b, m.host)
			}
		case compressed:
			_, _, in := im.geo.split(at)
			err = im.unpacked.read(im, m.entry, b, in)
		default:
			clear(b)
		}
		if err != nil {
			return done, err
		}
		done += len(b)
	}
	return done, nil
}

// WriteAt writes as image.Device says. Writing where clusters are allocated
// and not shared changes no metadata. Space that is missing is an
// image.ErrNoSpace; the image stays usable then. A cluster that refcounts or
// tables contradict is an image.ErrCorrupt, and isn't written to.
func (im *Image) WriteAt(p []byte, off int64) (int, error) {
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
	return image.CheckRange(off, n, im.Size())
}

// overwrite writes in place up to the first cluster that needs metadata.
func (im *Image) overwrite(p []byte, off int64) (int, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.writeRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	done := 0
	for done < len(p) {
		at := off + int64(done)
		if i, _, _ := im.geo.split(at); i >= uint64(len(im.l1)) || im.l1[i]&flagCopied == 0 {
			break
		}
		m, err := im.mapRun(at, uint64(len(p)-done), true)
		if err != nil {
			return done, err
		}
		if m.kind != normal || !m.copied {
			break
		}
		if err := im.ownData(m.host, m.n); err != nil {
			return done, err
		}
		if m.n = min(m.n, max(uint64(im.file.Size()), m.host)-m.host); m.n == 0 {
			break // the last cluster is incomplete
		}
		n, err := im.file.WriteAt(p[done:][:m.n], int64(m.host))
		if done += n; err != nil {
			return done, im.poison(err)
		}
	}
	return done, nil
}

// ownData refuses to write data to [off, off+n) unless its clusters have a
// refcount of one and hold no metadata.
func (im *Image) ownData(off, n uint64) error {
	if err := im.guard(off, n, metaNone); err != nil {
		return err
	}
	if err := im.inFile(off, n); err != nil {
		return err
	}
	for c := off >> im.geo.bits; c <= (off+n-1)>>im.geo.bits; c++ {
		v, err := im.refcount(c)
		if err != nil {
			return err
		}
		if v != 1 {
			return im.badRefcount(c, "a refcount of 1, as the copied flag says")
		}
	}
	return nil
}

// batchBytes bounds what one turn of allocWrite does under the lock.
const batchBytes = 4 << 20

// allocWrite writes the clusters at the start of p that need metadata. It may
// write none, if the first can be written in place now.
func (im *Image) allocWrite(p []byte, off int64) (int, error) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.writeRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	if len(im.frees) >= maxFrees {
		if err := im.flush(); err != nil {
			return 0, err
		}
	}
	t, err := im.l2ForWrite(off)
	if err != nil {
		return 0, err
	}
	_, i, in := im.geo.split(off)
	w := batch{im: im, p: p}
	done := uint64(0)
	for ; done < uint64(len(p)) && i < 1<<im.geo.l2Bits && (done == 0 || done < batchBytes); i++ {
		n := min(uint64(len(p))-done, im.geo.cs-in)
		var more bool
		if more, err = w.cluster(t, i, in, done, n); !more {
			break
		}
		done += n
		in = 0
	}
	if werr := w.write(); werr != nil {
		return 0, werr
	}
	if ferr := w.commit(t); ferr != nil {
		return int(done), ferr
	}
	return int(done), err
}

// A batch is the part of a write that allocates: data goes to the file first,
// and L2 entries change only when it is there.
type batch struct {
	im       *Image
	p        []byte
	host     uint64 // where p[from:to] goes
	from, to uint64
	changes  []change
}

type change struct {
	i   uint64 // in the L2 table
	v   uint64 // new entry
	old entry

	settled bool // the entry may be durable before data and refcounts
}

// cluster plans p[done:done+n] for offset in of entry i. It says false where
// nothing is to be done, or on error.
func (w *batch) cluster(t *table, i, in, done, n uint64) (bool, error) {
	im := w.im
	e, err := im.entryAt(t, i, true)
	if err != nil {
		return false, err
	}
	host, zeroed, settled := e.host, false, false
	switch {
	case e.kind == normal && e.copied:
		// In place, once the file is long enough.
		if err := im.ownData(host, im.geo.cs); err != nil {
			return false, err
		}
		return false, im.growFile(host + im.geo.cs)
	case e.kind == zeroAlloc && e.copied:
		if err = im.ownData(host, im.geo.cs); err == nil {
			err = im.growFile(host + im.geo.cs)
		}
	default:
		first, k := e.clusters(&im.geo)
		for c := first; c < first+k && err == nil; c++ {
			err = im.inUse(c)
		}
		if err == nil {
			host, zeroed, settled, err = im.takeData()
		}
	}
	if err != nil {
		return false, err
	}
	err = w.fill(e, host, 0, in, zeroed)
	if err == nil {
		err = w.fill(e, host, in+n, im.geo.cs, zeroed)
	}
	if err != nil {
		if host != e.host && im.fail.Load() == nil {
			// What it was to be filled from can't be read.
			err = errors.Join(err, im.setRefcount(host>>im.geo.bits, 0))
		}
		return false, err
	}
	w.changes = append(w.changes, change{i, host | flagCopied, e, settled && e.kind <= zeroPlain})
	return true, w.data(host+in, done, n)
}

// inUse refuses a refcount of 0.
func (im *Image) inUse(c uint64) error {
	v, err := im.refcount(c)
	if err == nil && v == 0 {
		err = im.badRefcount(c, "a refcount above 0, as the cluster is in use")
	}
	return err
}

// zeros is what free space is filled with, a piece at a time.
var zeros [64 << 10]byte

// fill copies bytes [lo, hi) of the cluster that e describes to the cluster
// at host.
func (w *batch) fill(e entry, host, lo, hi uint64, zeroed bool) error {
	im := w.im
	if e.kind != normal && e.kind != compressed {
		if zeroed || lo == hi {
			return nil
		}
		return im.fillZeros(host+lo, hi-lo)
	}
	b := make([]byte, min(hi-lo, uint64(len(zeros))))
	for ; lo < hi; lo += uint64(len(b)) {
		b = b[:min(uint64(len(b)), hi-lo)]
		var err error
		if e.kind == compressed {
			err = im.unpacked.read(im, e, b, lo)
		} else if err = im.inFile(e.host, im.geo.cs); err == nil {
			err = readFile(im.file, b, e.host+lo)
		}
		if err != nil {
			return err
		}
		if err := im.writeFile(b, host+lo); err != nil {
			return err
		}
	}
	return nil
}

// fillZeros makes a part of a new cluster zeros.
func (im *Image) fillZeros(off, n uint64) error {
	if n > uint64(len(zeros)) {
		if done, err := im.zeroFile(off, n); done || err != nil {
			return err
		}
	}
	for n > 0 {
		k := min(n, uint64(len(zeros)))
		if err := im.writeFile(zeros[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// zeroFile lets the file write zeros, if it can.
func (im *Image) zeroFile(off, n uint64) (bool, error) {
	z, ok := image.As[image.ZeroWriter](im.file)
	if !ok {
		return false, nil
	}
	if err := im.growFile(off + n); err != nil {
		return false, err
	}
	switch err := z.WriteZeroes(int64(off), int64(n)); {
	case err == nil:
		return true, nil
	case errors.Is(err, image.ErrUnsupported):
		return false, nil
	default:
		return false, im.poison(err)
	}
}

// data queues p[from:from+n] for host, joining it to what is queued.
func (w *batch) data(host, from, n uint64) error {
	if w.from < w.to && w.host+w.to-w.from == host && w.to == from {
		w.to += n
		return nil
	}
	err := w.write()
	w.host, w.from, w.to = host, from, from+n
	return err
}

func (w *batch) write() error {
	b := w.p[w.from:w.to]
	if len(b) == 0 {
		return nil
	}
	w.from = w.to
	if err := w.im.guard(w.host, uint64(len(b)), metaNone); err != nil {
		return w.im.poison(err)
	}
	return w.im.writeFile(b, w.host)
}

// commit enters the new mappings and drops the old ones.
func (w *batch) commit(t *table) error {
	for _, c := range w.changes {
		w.im.ordered = w.im.ordered || !c.settled
		w.im.setL2(t, c.i, c.v)
		if c.old.kind == zeroAlloc && c.old.copied {
			continue
		}
		if first, n := c.old.clusters(&w.im.geo); n > 0 {
			if err := w.im.free(first, n, false); err != nil {
				return err
			}
		}
	}
	return nil
}

func (im *Image) setL2(t *table, i, v uint64) {
	putEntry(t.buf, i, v)
	im.l2c.touch(t, int(i*8), int(i*8+8))
}

// l2ForWrite returns the L2 table for off, alone in using it: it is made if
// there is none, and copied if it is shared.
func (im *Image) l2ForWrite(off int64) (*table, error) {
	i, _, _ := im.geo.split(off)
	if i >= uint64(len(im.l1)) {
		return nil, im.badEntry("L1 table", im.hdr.l1Off+i*8, nil, "an entry for each byte of the disk")
	}
	if err := im.makeRoom(im.l2c); err != nil {
		return nil, err
	}
	v := im.l1[i]
	old, bad := im.geo.decodeL1(v)
	if bad != nil {
		return nil, im.badEntry("L1 table", im.hdr.l1Off+i*8, v, bad.want)
	}
	if old == 0 {
		return im.newL2(i, nil)
	}
	t, err := im.l2c.get(old, im.loadTable)
	if err != nil || t.owned {
		return t, err
	}
	rc, err := im.refcount(old >> im.geo.bits)
	switch {
	case err != nil:
		return nil, err
	case rc == 0, v&flagCopied != 0 && rc != 1:
		return nil, im.badRefcount(old>>im.geo.bits, "the refcount that the L1 entry's copied flag implies")
	case v&flagCopied != 0:
		t.owned = true
		return t, nil
	}
	if err := im.makeRoom(im.l2c); err != nil {
		return nil, err
	}
	return im.newL2(i, t)
}

// newL2 gives L1 entry i an L2 table of its own, a copy of from if there is
// one. There is room for it in the cache.
func (im *Image) newL2(i uint64, from *table) (*table, error) {
	off, zeroed, err := im.take(1, metaL2)
	if err != nil {
		return nil, err
	}
	t := &table{off: off, buf: make([]byte, im.geo.cs), fresh: true, owned: true}
	im.l2c.put(t)
	if from != nil {
		copy(t.buf, from.buf)
	}
	if from != nil || !zeroed {
		im.l2c.touch(t, 0, len(t.buf))
	}
	im.touchL1(i, off|flagCopied)
	im.ordered = true
	if from != nil {
		err = im.free(from.off>>im.geo.bits, 1, false)
	}
	return t, err
}
