package qcow2

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/stretchr/testify/require"
)

// TestEntries: each entry without defects encodes to what it was decoded from,
// with all of the features that change how entries are read.
func TestEntries(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := &header{version: uint32(rapid.IntRange(2, 3).Draw(t, "version")), clusterBits: rapid.Uint32Range(9, 21).Draw(t, "bits"), refOrder: 4}
		if h.version == 3 {
			if h.clusterBits >= extendedMinBits && rapid.Bool().Draw(t, "extended") {
				h.incompat |= incompatExtendedL2
			}
			if rapid.Bool().Draw(t, "external") {
				h.incompat |= incompatDataFile
			}
		}
		g := newGeometry(h)
		v := l2Entry{word: rapid.Uint64().Draw(t, "word")}
		if rapid.Bool().Draw(t, "tidy") {
			v.word &= flagCopied | flagZero | entryOffset&^(g.cs-1)
		}
		if g.extended() {
			v.subs = rapid.Uint64().Draw(t, "subs")
			if rapid.Bool().Draw(t, "disjoint") {
				v.subs &^= v.subs << 32
			}
		}
		table := make([]byte, g.cs)
		i := rapid.Uint64Range(0, g.l2Entries()-1).Draw(t, "i")
		g.put(table, i, v)
		require.Equal(t, v, g.get(table, i))
		e, bad := g.decode(v)
		if bad != nil {
			return
		}
		require.Equal(t, v, g.encode(e))
		for s := range g.subs {
			switch k := e.sub(s); {
			case e.kind == compressed:
				require.Equal(t, compressed, k)
			case e.kind == zeroAlloc, e.kind == zeroPlain:
				require.Equal(t, e.kind, k)
			case k == normal:
				require.True(t, e.placed)
			}
		}
	})
}

func TestSubMask(t *testing.T) {
	g := newGeometry(&header{version: 3, clusterBits: 16, refOrder: 4, incompat: incompatExtendedL2})
	require.Equal(t, uint32(1<<32-1), g.subMask(0, 65536))
	require.Equal(t, uint32(1), g.subMask(0, 1))
	require.Equal(t, uint32(3), g.subMask(2047, 2049))
	require.Equal(t, uint32(1<<31), g.subMask(65535, 65536))
	require.Zero(t, g.subMask(4096, 4096))
	require.Equal(t, uint64(4096), g.l2Entries())
	require.Equal(t, uint64(16), g.entrySize())
	g = newGeometry(&header{version: 3, clusterBits: 16, refOrder: 4})
	require.Equal(t, uint32(1), g.subMask(0, 65536))
	require.Equal(t, uint32(1), g.subMask(60000, 60001))
}
