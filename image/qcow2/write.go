package qcow2

import (
	"errors"
	"sync"
)

// batchBytes bounds what one turn of allocWrite does.
const batchBytes = 4 << 20

// A work is an allocating write under way. It is planned, and the clusters for
// it are taken, with the tables locked; then data goes to the file, without a
// lock; then the L2 entries change, with the tables locked again.
type work struct {
	im    *Image
	p     []byte
	off   int64 // of p
	done  int   // bytes of p that the pieces cover
	parts []part
	claim *busy
	pin   uint32

	// What waits to be written: p[from:to] for host.
	host     uint64
	from, to uint64
}

var works = sync.Pool{New: func() any { return new(work) }}

// free keeps the room for parts.
func (w *work) free() {
	*w = work{parts: w.parts[:0]}
	works.Put(w)
}

// A part is what a write does to one cluster.
type part struct {
	i       uint64 // in the L2 table
	guest   uint64 // of the cluster
	old     entry
	host    uint64 // where the data goes
	lo, hi  uint64 // bytes of the cluster that are written
	from    uint64 // in p
	fresh   bool   // host is a new cluster
	zeroed  bool   // which reads as zeros in the file
	settled bool   // its refcount is durable, and any part of the data may be
}

// allocWrite writes the clusters at the start of p that need metadata. It may
// write none, if the first can be written in place now.
func (im *Image) allocWrite(p []byte, off int64) (int, error) {
	if err := im.relieve(); err != nil {
		return 0, err
	}
	w := works.Get().(*work)
	defer w.free()
	w.im, w.p, w.off = im, p, off
	err := w.plan()
	if w.claim == nil {
		return 0, err
	}
	werr := w.run()
	if ferr := w.finish(werr); ferr != nil {
		return 0, ferr
	}
	return w.done, err
}

// relieve flushes, while nothing is locked, before the tables that can't be
// thrown out fill the cache.
func (im *Image) relieve() error {
	im.change.Lock()
	defer im.change.Unlock()
	if len(im.frees) < maxFrees && len(im.l2c.dirty) <= im.l2c.max*3/4 {
		return nil
	}
	return im.flushShared()
}

// plan decides for each cluster what is to be done, as far as one L2 table and
// batchBytes go. Without a claim, there is nothing to do. With one, an error is
// that of the cluster behind the parts.
func (w *work) plan() error {
	im := w.im
	g := &im.geo
	im.lockTables()
	defer im.unlockTables()
	if cause := im.fail.Load(); cause != nil {
		return im.usable(true)
	}
	_, i, in := g.split(w.off)
	i0, in0 := i, in
	n := min(uint64(len(w.p)), (g.l2Entries()-i)<<g.bits-in, batchBytes)
	first := uint64(w.off) >> g.bits
	last := (uint64(w.off) + n - 1) >> g.bits
	claim := im.claim(first, last)
	w.pin = im.pins.enter()
	t, err := im.l2ForWrite(w.off)
	for err == nil && uint64(w.done) < n && w.done < batchBytes {
		k := min(n-uint64(w.done), g.cs-in)
		pt := part{i: i, guest: uint64(w.off) - in0 + (i-i0)<<g.bits, lo: in, hi: in + k, from: uint64(w.done)}
		var more bool
		if more, err = w.add(t, &pt); !more {
			break
		}
		w.parts = append(w.parts, pt)
		w.done += int(k)
		i, in = i+1, 0
	}
	if len(w.parts) == 0 {
		im.pins.leave(w.pin)
		im.unclaim(claim)
		return err
	}
	w.claim = claim
	return err
}

// add plans one cluster. It says false where nothing is to be done, or on
// error.
func (w *work) add(t *table, pt *part) (bool, error) {
	im := w.im
	g := &im.geo
	e, err := im.entryAt(t, pt.i, pt.guest, true)
	if err != nil {
		return false, err
	}
	pt.old = e
	touched := g.subMask(pt.lo, pt.hi)
	if e.placed && e.copied {
		if _, err := im.ownData(e.host, g.cs, true); err != nil {
			return false, err
		}
		if err := im.growData(min(e.host+g.cs, im.dataLimit(e.host, pt.hi))); err != nil {
			return false, err
		}
		pt.host = e.host
		return touched&^e.alloc != 0, nil
	}
	if g.external {
		pt.host, pt.fresh = pt.guest, true
		return true, im.growData(min(pt.host+g.cs, im.dataLimit(pt.host, pt.hi)))
	}
	first, k := e.clusters(g)
	for c := first; c < first+k; c++ {
		if err := im.inUse(c); err != nil {
			return false, err
		}
		if err := im.guard(c<<g.bits, g.cs, metaNone); err != nil {
			return false, err
		}
	}
	pt.fresh = true
	if pt.host, pt.zeroed, pt.settled, err = im.takeData(); err != nil {
		return false, err
	}
	pt.zeroed = pt.zeroed && im.cipher == nil
	// Whatever a crash leaves of the data, it must be zeros or what was
	// written, and it must have been zeros before.
	pt.settled = pt.settled && pt.zeroed && k == 0 &&
		(touched&^e.zero == 0 || !im.below())
	return true, nil
}

// dataLimit is how far the data of the cluster at host may reach, of which hi
// bytes are used: a data file needn't be longer than the disk.
func (im *Image) dataLimit(host, hi uint64) uint64 {
	if im.geo.external {
		return max(uint64(im.Size()), host+hi)
	}
	return host + im.geo.cs
}

// inUse refuses a refcount of 0.
func (im *Image) inUse(c uint64) error {
	v, err := im.refcount(c)
	if err == nil && v == 0 {
		err = im.badRefcount(c, "a refcount above 0, as the cluster is in use")
	}
	return err
}

// run writes the data.
func (w *work) run() error {
	for k := range w.parts {
		if err := w.writePart(&w.parts[k]); err != nil {
			return err
		}
	}
	return w.flush()
}

// A piece is bytes [lo, hi) of a cluster, with what they are to be.
type piece struct {
	lo, hi uint64
	data   bool // from the request
	patch  bool // data for an encrypted subcluster that is stored already
	zero   bool
}

// pieces returns what must be written to the cluster, in order. What is
// between them isn't read from there, or has its content already.
func (w *work) pieces(pt *part, out []piece) []piece {
	g := &w.im.geo
	ss := uint64(1) << g.subBits
	limit := w.im.dataLimit(pt.host, pt.hi) - pt.host
	for s := uint64(0); s < uint64(g.subs); s++ {
		lo, hi := s*ss, min(s*ss+ss, limit)
		kind := pt.old.sub(uint32(s))
		touched := pt.lo < hi && pt.hi > lo
		need := touched && kind != normal || pt.fresh && (kind == normal || kind == compressed)
		if !touched {
			if need {
				out = w.fillPiece(pt, kind, lo, hi, out)
			}
			continue
		}
		if need && lo < pt.lo {
			out = w.fillPiece(pt, kind, lo, pt.lo, out)
		}
		next := piece{lo: max(lo, pt.lo), hi: min(s*ss+ss, pt.hi), data: true, patch: w.im.cipher != nil && !need}
		if k := len(out); k > 0 && out[k-1].data && out[k-1].hi == next.lo && out[k-1].patch == next.patch {
			out[k-1].hi = next.hi
		} else {
			out = append(out, next)
		}
		if need && pt.hi < hi {
			out = w.fillPiece(pt, kind, pt.hi, hi, out)
		}
	}
	return out
}

// fillPiece adds what isn't from the request.
func (w *work) fillPiece(pt *part, kind entryKind, lo, hi uint64, out []piece) []piece {
	zero := kind == zeroPlain || kind == zeroAlloc || kind == unallocated && w.im.zeroBelow(pt.guest+lo, hi-lo)
	if lo >= hi || zero && pt.zeroed {
		return out
	}
	if k := len(out); k > 0 && !out[k-1].data && out[k-1].zero == zero && out[k-1].hi == lo {
		out[k-1].hi = hi
		return out
	}
	return append(out, piece{lo: lo, hi: hi, zero: zero})
}

// writePart writes one cluster: pieces that touch each other with one write, as
// far as that is sensible.
func (w *work) writePart(pt *part) error {
	var room [4]piece
	list := w.pieces(pt, room[:0])
	if w.im.cipher != nil {
		list = cutZeros(list)
	}
	for len(list) > 0 {
		n := 1
		for n < len(list) && list[n].lo == list[n-1].hi && !list[n-1].alone() && !list[n].alone() {
			n++
		}
		if err := w.writePieces(pt, list[:n]); err != nil {
			return err
		}
		list = list[n:]
	}
	return nil
}

// cutZeros cuts off the parts of sectors that long runs of zeros have at their
// ends: they are encrypted together with the data there.
func cutZeros(list []piece) []piece {
	out := make([]piece, 0, len(list)+4)
	for _, p := range list {
		lo, hi := (p.lo+sector-1)&^(sector-1), p.hi&^(sector-1)
		if !p.alone() || p.patch || lo == p.lo && hi == p.hi {
			out = append(out, p)
			continue
		}
		for _, q := range []piece{{lo: p.lo, hi: lo, zero: true}, {lo: lo, hi: hi, zero: true}, {lo: hi, hi: p.hi, zero: true}} {
			if q.lo < q.hi {
				out = append(out, q)
			}
		}
	}
	return out
}

// alone: the piece isn't copied together with others.
func (p piece) alone() bool { return p.patch || p.zero && p.hi-p.lo > uint64(len(zeros)) }

// writePieces writes a run. An encrypted one is whole sectors, or a patch.
func (w *work) writePieces(pt *part, list []piece) error {
	im := w.im
	lo, hi := list[0].lo, list[len(list)-1].hi
	if p := list[0]; len(list) == 1 && p.data && !p.patch {
		return w.queue(pt.host+lo, pt.from+lo-pt.lo, hi-lo)
	}
	if err := w.flush(); err != nil {
		return err
	}
	if err := im.guardData(pt.host+lo, hi-lo); err != nil {
		return err
	}
	switch {
	case list[0].patch:
		return im.patchData(w.p[pt.from+lo-pt.lo:][:hi-lo], pt.host+lo, pt.guest+lo)
	case len(list) == 1 && list[0].zero:
		return im.zeroData(pt.host+lo, hi-lo)
	}
	buf := make([]byte, hi-lo)
	for _, p := range list {
		dst := buf[p.lo-lo : p.hi-lo]
		if p.data {
			copy(dst, w.p[pt.from+p.lo-pt.lo:])
		} else if err := im.readOld(dst, pt, p.lo); err != nil {
			return err
		}
	}
	return im.writeData(buf, pt.host+lo)
}

// readOld reads what a cluster had before.
func (im *Image) readOld(p []byte, pt *part, lo uint64) error {
	g := &im.geo
	for len(p) > 0 {
		s := lo >> g.subBits
		n := min(uint64(len(p)), (s+1)<<g.subBits-lo)
		m := mapping{kind: pt.old.sub(uint32(s)), host: pt.old.host + lo, from: pt.old, n: n}
		if err := im.readMapped(p[:n], &m, pt.guest+lo); err != nil {
			return err
		}
		p, lo = p[n:], lo+n
	}
	return nil
}

// queue takes p[from:from+n] for host, joining it to what is queued.
func (w *work) queue(host, from, n uint64) error {
	if w.from < w.to && w.host+w.to-w.from == host && w.to == from {
		w.to += n
		return nil
	}
	err := w.flush()
	w.host, w.from, w.to = host, from, from+n
	return err
}

func (w *work) flush() error {
	b := w.p[w.from:w.to]
	if len(b) == 0 {
		return nil
	}
	w.from = w.to
	if err := w.im.guardData(w.host, uint64(len(b))); err != nil {
		return err
	}
	return w.im.writeData(b, w.host)
}

// guardData refuses to write data over metadata. The plan has seen to it that
// nothing gets here, so this is final.
func (im *Image) guardData(off, n uint64) error {
	if im.geo.external {
		return nil
	}
	im.tab.RLock()
	err := im.guard(off, n, metaNone)
	im.tab.RUnlock()
	if err != nil {
		return im.poison(err)
	}
	return nil
}

// finish enters the new mappings and drops the old ones, or, after an error,
// gives back what was taken.
func (w *work) finish(err error) error {
	im := w.im
	im.lockTables()
	defer im.unlockTables()
	defer im.unclaim(w.claim)
	defer im.pins.leave(w.pin)
	var t *table
	if err == nil {
		t, err = im.l2ForWrite(w.off)
	}
	if err != nil {
		if im.fail.Load() == nil {
			err = errors.Join(err, w.giveBack())
		}
		return err
	}
	for k := range w.parts {
		if err := w.enter(t, &w.parts[k]); err != nil {
			return err
		}
	}
	return nil
}

// giveBack frees the new clusters, which nothing refers to.
func (w *work) giveBack() error {
	if w.im.geo.external {
		return nil
	}
	for k := range w.parts {
		if pt := &w.parts[k]; pt.fresh {
			if err := w.im.setRefcount(pt.host>>w.im.geo.bits, 0); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *work) enter(t *table, pt *part) error {
	im := w.im
	g := &im.geo
	touched := g.subMask(pt.lo, pt.hi)
	e := pt.old
	if e.kind == compressed {
		e = entry{alloc: g.all}
	}
	e.kind, e.placed, e.copied, e.host = normal, true, true, pt.host
	e.alloc |= touched
	e.zero &^= touched
	im.ordered = im.ordered || !pt.settled
	im.setL2(t, pt.i, e)
	if !pt.fresh {
		return nil
	}
	return im.freeData(pt.old, pt.guest, false)
}

func (im *Image) setL2(t *table, i uint64, e entry) {
	im.geo.put(t.buf, i, im.geo.encode(e))
	n := im.geo.entrySize()
	im.l2c.touch(t, int(i*n), int(i*n+n))
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
	im.newL2s = append(im.newL2s, t)
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
