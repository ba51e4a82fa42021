package qcow2

import "encoding/binary"

// Bits of L1 and L2 entries (docs/interop/qcow2.txt, "Cluster mapping").
const (
	flagCopied     = 1 << 63
	flagCompressed = 1 << 62
	flagZero       = 1 << 0
	entryOffset    = 0x00fffffffffffe00
	l1Reserved     = 0x7f000000000001ff
	l2Reserved     = 0x3f000000000001fe
)

// A geometry holds what follows from the cluster size and refcount width.
type geometry struct {
	bits     uint32 // of the cluster size
	cs       uint64 // cluster size
	l2Bits   uint32 // of the entries in an L2 table
	refOrder uint32
	rbBits   uint32 // of the entries in a refcount block
	version  uint32
}

func newGeometry(h *header) geometry {
	return geometry{
		bits: h.clusterBits, cs: 1 << h.clusterBits, l2Bits: h.clusterBits - 3,
		refOrder: h.refOrder, rbBits: h.clusterBits + 3 - h.refOrder, version: h.version,
	}
}

// l1Entries returns how many L1 entries a disk of size bytes takes.
func (g *geometry) l1Entries(size uint64) uint64 {
	shift := g.bits + g.l2Bits
	n := size >> shift
	if size&(1<<shift-1) != 0 {
		n++
	}
	return n
}

// clusters returns how many clusters n bytes take.
func (g *geometry) clusters(n uint64) uint64 {
	c := n >> g.bits
	if n&(g.cs-1) != 0 {
		c++
	}
	return c
}

// checkTable tells what is wrong with a table of n bytes at off, or "".
func (g *geometry) checkTable(off, n uint64) string {
	switch {
	case off&(g.cs-1) != 0:
		return "aligned to a cluster"
	case n > 0 && off == 0:
		return "not the header's cluster"
	case off >= maxHostOffset || n > maxHostOffset-off:
		return "below 2^56"
	}
	return ""
}

// split takes a guest offset apart.
func (g *geometry) split(off int64) (l1, l2 uint64, in uint64) {
	u := uint64(off)
	return u >> (g.bits + g.l2Bits), u >> g.bits & (1<<g.l2Bits - 1), u & (g.cs - 1)
}

type entryKind uint8

const (
	unallocated entryKind = iota
	zeroPlain             // reads as zeros, no cluster
	zeroAlloc             // reads as zeros, cluster kept
	normal
	compressed
)

// An entry is a decoded L2 entry.
type entry struct {
	kind   entryKind
	copied bool
	host   uint64 // offset in the file; not aligned if compressed
	length uint64 // bytes stored, if compressed
}

// clusters returns the first host cluster that e refers to and how many.
func (e entry) clusters(g *geometry) (first, n uint64) {
	switch e.kind {
	case normal, zeroAlloc:
		return e.host >> g.bits, 1
	case compressed:
		first = e.host >> g.bits
		return first, (e.host+e.length-1)>>g.bits - first + 1
	}
	return 0, 0
}

// A defect tells what is wrong with a table entry. A fatal one leaves open
// what the entry refers to; others only forbid writing.
type defect struct {
	want  string
	fatal bool
}

// decode reads an L2 entry. The defect is nil for an entry as the
// specification wants it.
func (g *geometry) decode(e uint64) (entry, *defect) {
	if e&flagCompressed != 0 {
		return g.decodeCompressed(e)
	}
	d := entry{copied: e&flagCopied != 0, host: e & entryOffset}
	var bad *defect
	switch {
	case d.host&(g.cs-1) != 0:
		return d, &defect{"a cluster-aligned offset", true}
	case e&flagZero != 0 && g.version < 3:
		return d, &defect{"no zero flag in version 2", true}
	case e&l2Reserved != 0:
		bad = &defect{"reserved bits clear", false}
	case d.copied && d.host == 0:
		bad = &defect{"no copied flag without an offset", false}
	}
	switch {
	case e&flagZero != 0 && d.host != 0:
		d.kind = zeroAlloc
	case e&flagZero != 0:
		d.kind = zeroPlain
	case d.host != 0:
		d.kind = normal
	}
	return d, bad
}

func (g *geometry) decodeCompressed(e uint64) (entry, *defect) {
	x := 62 - (g.bits - 8)
	d := entry{kind: compressed, host: e & (1<<x - 1)}
	sectors := e&(1<<62-1)>>x + 1
	d.length = sectors*sector - d.host&(sector-1)
	if d.host >= maxHostOffset {
		return d, &defect{"an offset below 2^56", true}
	}
	if d.host < g.cs {
		return d, &defect{"an offset past the header", true}
	}
	if e&flagCopied != 0 {
		return d, &defect{"no copied flag on a compressed cluster", false}
	}
	return d, nil
}

// decodeL1 returns the offset of the L2 table that an L1 entry refers to; 0 is
// none.
func (g *geometry) decodeL1(e uint64) (uint64, *defect) {
	off := e & entryOffset
	switch {
	case off&(g.cs-1) != 0:
		return off, &defect{"a cluster-aligned offset", true}
	case e&l1Reserved != 0:
		return off, &defect{"reserved bits clear", false}
	case off == 0 && e != 0:
		return off, &defect{"no copied flag without an offset", false}
	}
	return off, nil
}

func getEntry(table []byte, i uint64) uint64 {
	return binary.BigEndian.Uint64(table[i*8:])
}

func putEntry(table []byte, i, v uint64) {
	binary.BigEndian.PutUint64(table[i*8:], v)
}
