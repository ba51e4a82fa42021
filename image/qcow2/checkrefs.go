package qcow2

import (
	"fmt"
)

// What a cluster is referred to as is in the top bits of its counter.
const (
	refStructure = 1 << 31
	refTable     = 1 << 30
	refData      = 1 << 29
	refKinds     = refStructure | refTable | refData
	refMax       = 1<<29 - 1
)

// sourceWindow is how many clusters' L2 tables are looked for at a time.
const sourceWindow = 1 << 20

// countAll counts references and compares them with refcounts, one window of
// clusters after the other.
func (c *checker) countAll() error {
	return c.eachWindow(max(uint64(c.o.Memory)/4, 1<<10), c.compare)
}

// eachWindow counts references in windows of size clusters, and calls do with
// each. Entries are reported with the first, and not while refcounts are made.
func (c *checker) eachWindow(size uint64, do func() error) error {
	size = min(size, c.end)
	c.refs = make([]uint32, size)
	mult := make([]tableUse, min(sourceWindow, c.end))
	for c.lo = 0; c.lo < c.end; c.lo = c.hi {
		c.hi = min(c.lo+size, c.end)
		c.first = c.lo == 0 && c.build == nil
		clear(c.refs)
		c.countStructures()
		if err := c.countBitmaps(); err != nil {
			return err
		}
		for lo := uint64(0); lo < c.end; lo += uint64(len(mult)) {
			if err := c.countTables(lo, mult); err != nil {
				return err
			}
		}
		if err := do(); err != nil {
			return err
		}
	}
	return nil
}

// ref counts n references to a cluster.
func (c *checker) ref(cluster uint64, kind, n uint32) {
	if cluster < c.lo || cluster >= c.hi {
		return
	}
	r := &c.refs[cluster-c.lo]
	*r = *r&refKinds | kind | min(*r&refMax+min(n, refMax), refMax)
}

func (c *checker) refRange(off, n uint64) {
	first := off >> c.geo.bits
	for i := range c.geo.clusters(n) {
		c.ref(first+i, refStructure, 1)
	}
}

func (c *checker) countStructures() {
	h := c.hdr
	c.ref(0, refStructure, 1)
	c.refRange(h.snapsOff, snapTableSize(c.snaps))
	for _, t := range c.l1s {
		c.refRange(t.off, t.n*8)
	}
	if off, n := h.encryptionHeader(); n > 0 && c.inside(off, n) {
		c.refRange(off, n)
	}
	if c.build != nil {
		for _, s := range c.build.own {
			c.refRange(s.first<<c.geo.bits, s.n<<c.geo.bits)
		}
		return
	}
	c.refRange(h.reftableOff, uint64(h.reftableClusters)<<c.geo.bits)
	for _, e := range c.reftable {
		if c.blockOK(e) {
			c.ref(e>>c.geo.bits, refStructure, 1)
		}
	}
}

// A tableUse says how many L1 entries name an L2 table, and the number of the
// last L1 table that has one, from 1.
type tableUse struct{ n, last uint32 }

// countTables counts the L2 tables in a window of clusters from lo, and what
// they refer to. A table is read once, however many L1 tables share it. Two
// entries of one L1 table may not: a write through one would be seen through the
// other, or not, by what is cached.
func (c *checker) countTables(lo uint64, mult []tableUse) error {
	clear(mult)
	for number, t := range c.l1s {
		err := c.eachL1(t, func(at, e uint64) error {
			off, ok := c.tableOK(e)
			i := off>>c.geo.bits - lo
			if !ok || i >= uint64(len(mult)) {
				return nil
			}
			u := &mult[i]
			if u.last == uint32(number)+1 && c.first {
				c.shared(at, off)
			}
			*u = tableUse{min(u.n+1, refMax), uint32(number) + 1}
			return nil
		})
		if err != nil {
			return err
		}
	}
	for i, u := range mult {
		n := u.n
		if n == 0 {
			continue
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
		cluster := lo + uint64(i)
		c.ref(cluster, refTable, n)
		off := cluster << c.geo.bits
		if err := readFile(c.file, c.table, off); err != nil {
			return err
		}
		for k := range c.geo.l2Entries() {
			if v := c.geo.get(c.table, k); v != (l2Entry{}) {
				c.countEntry(off+k*c.geo.entrySize(), v, n)
			}
		}
	}
	return nil
}

func (c *checker) countEntry(at uint64, v l2Entry, n uint32) {
	e, bad := c.geo.decode(v)
	if bad != nil && c.first {
		c.bad("l2-entry", at, "entry %#x, want %s", v.word, bad.want)
	}
	if bad != nil && bad.fatal {
		return
	}
	first, k := e.clusters(&c.geo)
	limit := c.inUse
	if e.kind == compressed {
		limit++
	}
	if k > 0 && first+k > limit {
		if c.first {
			c.bad("outside", at, "cluster at %#x, past the end of the file", e.host)
		}
		return
	}
	for i := range k {
		c.ref(first+i, refData, n)
	}
	c.packed = c.packed || e.kind == compressed
	if e.kind == compressed && c.o.Data && c.first {
		if err := c.unpacked.read(c.Image, e, nil, 0); err != nil {
			c.bad("compressed", at, "%v", err)
		}
	}
}

// compare reports where refcounts in the window differ from references.
func (c *checker) compare() error {
	g := &c.geo
	var run Finding
	var runLen int64
	flush := func() {
		if runLen > 0 {
			run.Message = fmt.Sprintf(run.Message, runLen)
			c.add(run, runLen)
		}
		runLen = 0
	}
	var block []byte
	for cl := c.lo; cl < c.hi; cl++ {
		i := cl & (1<<g.rbBits - 1)
		if i == 0 || cl == c.lo {
			var err error
			if block, err = c.block(cl >> g.rbBits); err != nil {
				return err
			}
		}
		var rc uint64
		if block != nil {
			rc = getRefcount(block, g.refOrder, i)
		}
		r := c.refs[cl-c.lo]
		c.checkOverlap(cl, r)
		n := uint64(r & refMax)
		if n == 0 && cl > 0 && cl < c.inUse && len(c.free) < maxFreed {
			c.free = appendSpan(c.free, cl)
		}
		if rc > 0 || n > 0 {
			c.res.ImageEnd = int64((cl + 1) << g.bits)
		}
		if rc == n || n == refMax && rc > n {
			flush()
			continue
		}
		if rc > n {
			c.leaks = appendLeak(c.leaks, leak{span{cl, 1}, n})
		}
		f := Finding{Code: "leak", Where: int64(cl << g.bits),
			Message: fmt.Sprintf("%%d clusters with refcount %d and %d references", rc, n)}
		if rc < n {
			f.Code, f.Error = "refcount", true
			c.counts++
		}
		if runLen > 0 && f.Code == run.Code && f.Message == run.Message {
			runLen++
			continue
		}
		flush()
		run, runLen = f, 1
	}
	flush()
	return nil
}

// checkOverlap finds clusters that are used for two purposes.
func (c *checker) checkOverlap(cl uint64, r uint32) {
	kinds := r & refKinds
	if kinds&(kinds-1) != 0 || kinds == refStructure && r&refMax > 1 {
		c.bad("overlap", cl<<c.geo.bits, "cluster is used for more than one purpose")
		c.overlap(cl)
	}
}

// overlap remembers a cluster that repair must leave alone.
func (c *checker) overlap(cl uint64) {
	if len(c.overlaps) < maxFreed {
		c.overlaps[cl] = struct{}{}
	}
}

// shared reports an L2 table that an L1 table names twice.
func (c *checker) shared(at, off uint64) {
	c.bad("overlap", at, "L2 table at %#x, of another entry of this L1 table too", off)
	c.overlap(off >> c.geo.bits)
}

// block reads refcount block i, or returns nil.
func (c *checker) block(i uint64) ([]byte, error) {
	if i >= uint64(len(c.reftable)) || !c.blockOK(c.reftable[i]) {
		return nil, nil
	}
	return c.table, readFile(c.file, c.table, c.reftable[i])
}

// checkBehind reports refcounts of clusters behind the end of the file.
func (c *checker) checkBehind() error {
	mask := uint64(1)<<c.geo.rbBits - 1
	for bi := (c.inUse + 1) >> c.geo.rbBits; bi < uint64(len(c.reftable)); bi++ {
		b, err := c.block(bi)
		if err != nil {
			return err
		}
		if b == nil {
			continue
		}
		for cl := max(bi<<c.geo.rbBits, c.inUse+1); cl>>c.geo.rbBits == bi; cl++ {
			if rc := getRefcount(b, c.geo.refOrder, cl&mask); rc != 0 {
				c.leaks = appendLeak(c.leaks, leak{span{cl, 1}, 0})
				c.add(Finding{"leak", int64(cl << c.geo.bits),
					fmt.Sprintf("a cluster behind the end of the file with refcount %d", rc), false}, 1)
			}
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}
