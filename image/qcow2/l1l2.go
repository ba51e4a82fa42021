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
	l2ReservedExt  = l2Reserved | flagZero // with extended entries the bitmap says what is zero
)

// extendedSubclusters is how many parts of a cluster an extended L2 entry
// describes.
const (
	extendedSubclusters = 32
	extendedMinBits     = 14 // of the cluster size: a subcluster is a sector at least
)

// A geometry holds what follows from the cluster size, the refcount width and
// the features that change how tables are read.
type geometry struct {
	bits     uint32 // of the cluster size
	cs       uint64 // cluster size
	l2Bits   uint32 // of the entries in an L2 table
	subBits  uint32 // of the subcluster size: the cluster size, without extended L2
	subs     uint32 // subclusters in a cluster: 1 or 32
	all      uint32 // a bit for each of them
	refOrder uint32
	rbBits   uint32 // of the entries in a refcount block
	version  uint32
	external bool // data lies in a data file
}

func newGeometry(h *header) geometry {
	g := geometry{
		bits: h.clusterBits, cs: 1 << h.clusterBits, l2Bits: h.clusterBits - 3,
		subBits: h.clusterBits, subs: 1, all: 1,
		refOrder: h.refOrder, rbBits: h.clusterBits + 3 - h.refOrder, version: h.version,
		external: h.incompat&incompatDataFile != 0,
	}
	if h.incompat&incompatExtendedL2 != 0 {
		g.l2Bits--
		g.subBits, g.subs, g.all = h.clusterBits-5, extendedSubclusters, 1<<extendedSubclusters-1
	}
	return g
}

func (g *geometry) extended() bool { return g.subs > 1 }

// l2Entries returns how many entries an L2 table has.
func (g *geometry) l2Entries() uint64 { return 1 << g.l2Bits }

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
	unallocated entryKind = iota // reads as the backing file does, or as zeros
	zeroPlain                    // reads as zeros, no cluster
	zeroAlloc                    // reads as zeros, cluster kept
	normal
	compressed
)

// An entry is a decoded L2 entry. Without extended L2, a cluster is its only
// subcluster.
type entry struct {
	// kind is that of the whole cluster: normal if it has a place and isn't
	// all zeros, unallocated if it has none and isn't all zeros.
	kind   entryKind
	copied bool
	placed bool   // host is the cluster's place, even if it is 0 (in a data file)
	host   uint64 // offset in the file; not aligned if compressed
	length uint64 // bytes stored, if compressed

	alloc, zero uint32 // subclusters stored, and those that are zeros
}

// clusters returns the first cluster of the image's file that e refers to and
// how many.
func (e entry) clusters(g *geometry) (first, n uint64) {
	switch {
	case e.kind == compressed:
		first = e.host >> g.bits
		return first, (e.host+e.length-1)>>g.bits - first + 1
	case e.placed && !g.external:
		return e.host >> g.bits, 1
	}
	return 0, 0
}

// sub is the kind of subcluster i. One that isn't stored is unallocated, even
// if the cluster has a place for it.
func (e entry) sub(i uint32) entryKind {
	switch bit := uint32(1) << i; {
	case e.kind == compressed:
		return compressed
	case e.zero&bit != 0 && e.placed:
		return zeroAlloc
	case e.zero&bit != 0:
		return zeroPlain
	case e.alloc&bit != 0:
		return normal
	}
	return unallocated
}

// subMask has a bit for each subcluster that [lo, hi) of a cluster touches.
func (g *geometry) subMask(lo, hi uint64) uint32 {
	if lo >= hi {
		return 0
	}
	return uint32(1<<((hi-1)>>g.subBits+1) - 1<<(lo>>g.subBits))
}

// A defect tells what is wrong with a table entry. A fatal one leaves open
// what the entry refers to; others only forbid writing.
type defect struct {
	want  string
	fatal bool
}

// An l2Entry is an L2 entry as it is stored. subs is the second word of an
// extended entry: which subclusters are stored in its low half, which are zeros
// in the high one.
type l2Entry struct{ word, subs uint64 }

func (g *geometry) entrySize() uint64 { return g.cs >> g.l2Bits }

func (g *geometry) get(table []byte, i uint64) l2Entry {
	if !g.extended() {
		return l2Entry{word: binary.BigEndian.Uint64(table[i*8:])}
	}
	b := table[i*16:]
	return l2Entry{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

func (g *geometry) put(table []byte, i uint64, v l2Entry) {
	if !g.extended() {
		binary.BigEndian.PutUint64(table[i*8:], v.word)
		return
	}
	b := table[i*16:]
	binary.BigEndian.PutUint64(b, v.word)
	binary.BigEndian.PutUint64(b[8:], v.subs)
}

// decode reads an L2 entry. The defect is nil for an entry as the
// specification wants it.
func (g *geometry) decode(v l2Entry) (entry, *defect) {
	w := v.word
	if w&flagCompressed != 0 {
		return g.decodeCompressed(v)
	}
	e := entry{copied: w&flagCopied != 0, host: w & entryOffset}
	// Offset 0 is a place in a data file only, and only the flag tells.
	e.placed = e.host != 0 || g.external && e.copied && (g.extended() || w&flagZero == 0)
	if e.host&(g.cs-1) != 0 {
		return e, &defect{"a cluster-aligned offset", true}
	}
	var bad *defect
	reserved := uint64(l2Reserved)
	if g.extended() {
		reserved = l2ReservedExt
		e.alloc, e.zero = uint32(v.subs), uint32(v.subs>>32)
		switch {
		case e.alloc&e.zero != 0:
			return e, &defect{"no subcluster both stored and zero", true}
		case e.alloc != 0 && !e.placed:
			return e, &defect{"no subcluster stored without an offset", true}
		}
	} else if w&flagZero != 0 {
		if g.version < 3 {
			return e, &defect{"no zero flag in version 2", true}
		}
		e.zero = 1
	} else if e.placed {
		e.alloc = 1
	}
	switch {
	case w&reserved != 0:
		bad = &defect{"reserved bits clear", false}
	case e.placed && !e.copied && g.external:
		bad = &defect{"the copied flag, as clusters of a data file are never shared", false}
	case e.copied && !e.placed && !g.external: // there, zeros at offset 0 keep it
		bad = &defect{"no copied flag without an offset", false}
	}
	e.kind = e.summary(g)
	return e, bad
}

// summary is the kind of a cluster that isn't compressed.
func (e entry) summary(g *geometry) entryKind {
	switch {
	case e.placed && e.zero == g.all:
		return zeroAlloc
	case e.placed:
		return normal
	case e.zero == g.all:
		return zeroPlain
	}
	return unallocated
}

// encode is the reverse of decode, for entries without defects.
func (g *geometry) encode(e entry) l2Entry {
	v := l2Entry{word: e.host}
	if e.kind == compressed {
		x := 62 - (g.bits - 8)
		sectors := (e.host&(sector-1) + e.length + sector - 1) / sector
		v.word |= flagCompressed | (sectors-1)<<x
		return v
	}
	if e.copied {
		v.word |= flagCopied
	}
	if g.extended() {
		v.subs = uint64(e.zero)<<32 | uint64(e.alloc)
	} else if e.zero != 0 {
		v.word |= flagZero
	}
	return v
}

func (g *geometry) decodeCompressed(v l2Entry) (entry, *defect) {
	x := 62 - (g.bits - 8)
	d := entry{kind: compressed, host: v.word & (1<<x - 1)}
	sectors := v.word&(1<<62-1)>>x + 1
	d.length = sectors*sector - d.host&(sector-1)
	switch {
	case g.external:
		return d, &defect{"no compressed cluster beside a data file", true}
	case d.host >= maxHostOffset:
		return d, &defect{"an offset below 2^56", true}
	case d.host < g.cs:
		return d, &defect{"an offset past the header", true}
	case v.word&flagCopied != 0:
		return d, &defect{"no copied flag on a compressed cluster", false}
	case v.subs != 0:
		return d, &defect{"no subclusters in a compressed cluster", false}
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
