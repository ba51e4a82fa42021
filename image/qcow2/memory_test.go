package qcow2_test

import (
	"encoding/binary"
	"io"
	"math/rand/v2"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

// TestMetaSet holds the set of metadata clusters against a map.
func TestMetaSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s qcow2.MetaSet
		model := map[uint64]int{}
		top := rapid.SampledFrom([]uint64{3000, 1 << 20, 1 << 34, 1 << 47}).Draw(t, "top")
		step := rapid.SampledFrom([]int64{0, 1, -1, 65, -8193, 1 << 27}).Draw(t, "step")
		at := rapid.Uint64Range(0, top-1).Draw(t, "from")
		rng := rand.New(rand.NewPCG(rapid.Uint64().Draw(t, "seed"), 1))
		for range rapid.IntRange(1, 4000).Draw(t, "n") {
			if step == 0 || rng.IntN(50) == 0 {
				at = rng.Uint64N(top)
			} else {
				at = (at + uint64(step)) % top
			}
			if rng.IntN(4) == 0 {
				s.Del(at)
				delete(model, at)
			} else {
				k := 1 + rng.IntN(9)
				s.Set(at, k)
				model[at] = k
			}
			near := at + rng.Uint64N(3)
			require.Equal(t, model[near], s.Get(near))
		}
		for c, k := range model {
			require.Equal(t, k, s.Get(c))
		}
		for c := range model {
			s.Del(c)
		}
		require.Zero(t, s.Blocks())
	})
}

// TestMetaSetBlocks counts what images with a million tables take, in whatever
// order these are.
func TestMetaSetBlocks(t *testing.T) {
	const n = 1 << 20
	perm := rand.New(rand.NewPCG(1, 1)).Perm(n)
	for name, at := range map[string]func(i int) uint64{
		"up": func(i int) uint64 { return uint64(i) }, "down": func(i int) uint64 { return uint64(n - i) },
		"random":  func(i int) uint64 { return uint64(perm[i]) },
		"two way": func(i int) uint64 { return uint64(n + (i%2*2-1)*i/2) },
	} {
		var s qcow2.MetaSet
		for i := range n {
			s.Set(at(i)*8193, 5)
		}
		require.LessOrEqual(t, s.Blocks(), n/256, name)
	}
}

// A huge image is computed: 1024Ki refcount blocks, which is all that the format
// has, and four L2 tables in the reach of each, all empty.
type huge struct {
	written map[int64][]byte // sectors
	entries int64            // of the L1 table
}

const (
	hugeBlocks   = 1 << 20
	hugeReftable = 1               // cluster of the refcount table
	hugeL1       = 1 + 8<<20/512   // of the L1 table
	hugeHead     = hugeL1 + 64<<10 // where the first refcount blocks are
	hugeGroup    = 323             // from here on they are the last of what they count
)

func newHuge() *huge { return &huge{map[int64][]byte{}, (hugeBlocks - hugeGroup) * 4} }

func (h *huge) Size() int64  { return hugeBlocks * 256 * 512 }
func (h *huge) Sync() error  { return nil }
func (h *huge) Close() error { return nil }

func (h *huge) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		if off >= h.Size() {
			return n, io.EOF
		}
		b := h.sector(off / 512)
		k := copy(p[n:], b[off%512:])
		n, off = n+k, off+int64(k)
	}
	return len(p), nil
}

func (h *huge) WriteAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		b := h.sector(off / 512)
		k := copy(b[off%512:], p[n:])
		h.written[off/512] = b[:]
		n, off = n+k, off+int64(k)
	}
	return len(p), nil
}

// block is where refcount block k is.
func (h *huge) block(k int64) int64 {
	if k < hugeGroup {
		return hugeHead + k
	}
	return k*256 + 255
}

func (h *huge) sector(c int64) (b [512]byte) {
	if w := h.written[c]; w != nil {
		return [512]byte(w)
	}
	be := binary.BigEndian
	switch {
	case c == 0:
		copy(b[:], "QFI\xfb")
		be.PutUint32(b[4:], 3)
		be.PutUint32(b[20:], 9)
		be.PutUint64(b[24:], uint64(h.entries)*64*512)
		be.PutUint32(b[36:], uint32(h.entries))
		be.PutUint64(b[40:], hugeL1*512)
		be.PutUint64(b[48:], hugeReftable*512)
		be.PutUint32(b[56:], 8<<20/512)
		be.PutUint32(b[96:], 4)
		be.PutUint32(b[100:], 104)
	case c < hugeL1:
		for i := range int64(64) {
			be.PutUint64(b[i*8:], uint64(h.block((c-hugeReftable)*64+i)*512))
		}
	case c < hugeHead:
		for i := range int64(64) {
			if e := (c-hugeL1)*64 + i; e < h.entries {
				be.PutUint64(b[i*8:], 1<<63|uint64(((e/4+hugeGroup)*256+e%4*65)*512))
			}
		}
	case c < hugeHead+hugeGroup, c%256 == 255:
		for i := range 256 {
			be.PutUint16(b[i*2:], 1)
		}
	}
	return b
}

// TestMemory: an image with as many L2 tables and refcount blocks as the format
// allows is opened, read and written to in bounded memory. What opening
// allocates is counted, not what is left of it, so no collection of garbage has
// a part in it.
func TestMemory(t *testing.T) {
	const mib = 1 << 20
	for _, ro := range []bool{true, false} {
		file := newHuge()
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		im, err := qcow2.Open(file, &qcow2.OpenOptions{ReadOnly: ro})
		require.NoError(t, err)
		runtime.ReadMemStats(&after)
		opened := after.TotalAlloc - before.TotalAlloc
		rng := rand.New(rand.NewPCG(seed(t), 4))
		p := make([]byte, 512)
		for range 20000 {
			_, err := im.ReadAt(p, rng.Int64N(im.Size()/512)*512)
			require.NoError(t, err)
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		kept := int64(after.HeapAlloc) - int64(before.HeapAlloc)
		t.Logf("read-only %t: opening allocates %.1f MiB; %.1f MiB are in use after 20000 reads", ro, float64(opened)/mib, float64(kept)/mib)
		require.Less(t, kept, int64(64*mib))
		runtime.KeepAlive(im)
		if !ro {
			_, err := im.WriteAt(p, 12345678)
			require.ErrorIs(t, err, image.ErrNoSpace, "the file and the refcounts are full")
		}
		require.NoError(t, im.Close())
	}
}
