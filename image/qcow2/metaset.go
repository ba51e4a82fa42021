package qcow2

import (
	"slices"
	"sort"
)

// A metaKind says what a metadata cluster is used for.
type metaKind uint8

const (
	metaNone metaKind = iota
	metaHeader
	metaReftable
	metaRefblock
	metaL1
	metaL2
	metaSnapshots
	metaSnapshotL1
	metaBitmap
	metaCrypt
)

var metaNames = [...]string{"data", "the header", "the refcount table", "a refcount block",
	"the L1 table", "an L2 table", "the snapshot table", "a snapshot's L1 table", "a bitmap", "the encryption header"}

// A metaSet knows what every metadata cluster that is in use by the active
// state holds. Every write asks it first, because refcounts in a damaged image
// may call such a cluster free. L2 tables of snapshots aren't in it; their
// refcounts protect them.
//
// An image may have millions of tables and of blocks, each in ascending order
// as a rule. They are apart, so that their lists are dense.
type metaSet struct{ tables, rest metaList }

// get returns what cluster c holds.
func (m *metaSet) get(c uint64) metaKind {
	if k := m.rest.get(c); k != metaNone {
		return k
	}
	return m.tables.get(c)
}

// set enters cluster c.
func (m *metaSet) set(c uint64, k metaKind) {
	m.del(c)
	if k == metaL2 {
		m.tables.set(c, k)
	} else {
		m.rest.set(c, k)
	}
}

// del drops cluster c.
func (m *metaSet) del(c uint64) {
	m.tables.del(c)
	m.rest.del(c)
}

// add enters n bytes at off. It returns the kind that is there already, if
// any.
func (m *metaSet) add(g *geometry, off, n uint64, k metaKind) (metaKind, bool) {
	first := off >> g.bits
	for i := range g.clusters(n) {
		if old := m.get(first + i); old != metaNone {
			return old, false
		}
		m.set(first+i, k)
	}
	return k, true
}

// A metaList has clusters with their kinds, four bytes each, in sorted blocks
// that are sorted themselves.
type metaList struct{ blocks []metaBlock }

// A metaBlock is a part of a metaList: distances from the first cluster, each
// with its kind in the lowest bits.
type metaBlock struct {
	first uint64
	list  []uint32
}

const (
	metaKindBits  = 4
	metaSpan      = 1 << (32 - metaKindBits) // clusters that a block reaches
	metaBlockFull = 512                      // entries
)

// find returns the block that has cluster c, or would have it, and the place
// there. The block may be one too many, for a cluster before all others.
func (l *metaList) find(c uint64) (b, i int, found bool) {
	b = max(0, sort.Search(len(l.blocks), func(k int) bool { return l.blocks[k].first > c })-1)
	if b == len(l.blocks) || c < l.blocks[b].first {
		return b, 0, false
	}
	list, d := l.blocks[b].list, c-l.blocks[b].first
	if d >= metaSpan {
		return b, len(list), false
	}
	at := uint32(d) << metaKindBits
	i, _ = slices.BinarySearch(list, at)
	return b, i, i < len(list) && list[i]>>metaKindBits == uint32(d)
}

// get returns what cluster c holds.
func (l *metaList) get(c uint64) metaKind {
	b, i, found := l.find(c)
	if !found {
		return metaNone
	}
	return metaKind(l.blocks[b].list[i] & (1<<metaKindBits - 1))
}

// set enters cluster c.
func (l *metaList) set(c uint64, k metaKind) {
	b, i, found := l.find(c)
	if found {
		l.blocks[b].list[i] = l.blocks[b].list[i]&^(1<<metaKindBits-1) | uint32(k)
		return
	}
	if b < len(l.blocks) && c >= l.blocks[b].first {
		if c-l.blocks[b].first >= metaSpan || i == metaBlockFull {
			b, i = b+1, 0 // behind all that this one can take
		} else if len(l.blocks[b].list) == metaBlockFull {
			l.split(b)
			b, i, _ = l.find(c)
		}
	}
	if b == len(l.blocks) || c < l.blocks[b].first && !l.lower(b, c) {
		room := 8
		if b > 0 && b == len(l.blocks) { // a long list, in ascending order
			room = metaBlockFull
		}
		l.blocks = slices.Insert(l.blocks, b, metaBlock{c, make([]uint32, 0, room)})
	}
	t := &l.blocks[b]
	t.list = slices.Insert(t.list, i, uint32(c-t.first)<<metaKindBits|uint32(k))
}

// lower makes block b begin at cluster c, if it has room for it and reaches that
// far. So a table that counts down takes no more blocks than one that counts up.
func (l *metaList) lower(b int, c uint64) bool {
	t := &l.blocks[b]
	d := t.first - c
	if n := len(t.list); n == metaBlockFull || d >= metaSpan || d+uint64(t.list[n-1]>>metaKindBits) >= metaSpan {
		return false
	}
	for i := range t.list {
		t.list[i] += uint32(d) << metaKindBits
	}
	t.first = c
	return true
}

// split makes two blocks of a full one.
func (l *metaList) split(b int) {
	t := &l.blocks[b]
	const half = metaBlockFull / 2
	delta := t.list[half] >> metaKindBits
	next := metaBlock{t.first + uint64(delta), make([]uint32, 0, metaBlockFull)}
	for _, x := range t.list[half:] {
		next.list = append(next.list, x-delta<<metaKindBits)
	}
	t.list = t.list[:half]
	l.blocks = slices.Insert(l.blocks, b+1, next)
}

// del drops cluster c.
func (l *metaList) del(c uint64) {
	b, i, found := l.find(c)
	if !found {
		return
	}
	t := &l.blocks[b]
	if t.list = slices.Delete(t.list, i, i+1); len(t.list) == 0 {
		l.blocks = slices.Delete(l.blocks, b, b+1)
	}
}
