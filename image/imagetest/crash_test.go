package imagetest_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
)

func all(t *testing.T, d image.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	require.NoError(t, image.ReadFull(d, p, 0))
	return p
}

func write(t *testing.T, d image.Device, off int64, p []byte) {
	t.Helper()
	n, err := d.WriteAt(p, off)
	require.NoError(t, err)
	require.Equal(t, len(p), n)
}

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

func TestWhatASyncCoveredSurvives(t *testing.T) {
	d := imagetest.NewCrash(1<<20, nil)
	write(t, d, 1000, fill(3000, 1))
	require.NoError(t, d.Sync())
	at := d.Len()
	write(t, d, 5000, fill(10, 2))

	require.Equal(t, 2, at)
	want := make([]byte, 1<<20)
	copy(want[1000:], fill(3000, 1))
	require.Equal(t, want, all(t, d.PowerCut(nil)))
	require.Equal(t, fill(10, 2), all(t, d.PowerCut(func(int, int64) bool { return true }))[5000:5010])

	// A cut between the write and the Sync promises nothing.
	n := 0
	for range d.CrashStates(1, nil) {
		n++
	}
	require.Equal(t, 1<<7, n, "seven sectors in flight") // 1..7
	require.Equal(t, make([]byte, 1<<20), all(t, d.StateAt(1, nil).Open()))
	require.Equal(t, []string{"write [0x3e8, 0xfa0)", "sync", "write [0x1388, 0x1392)"},
		[]string{d.Log()[0].String(), d.Log()[1].String(), d.Log()[2].String()})
}

func TestIdenticalBytesAreNoNewState(t *testing.T) {
	d := imagetest.NewCrash(4096, nil)
	write(t, d, 0, fill(512, 7))
	require.NoError(t, d.Sync())
	write(t, d, 0, fill(512, 7))
	write(t, d, 512, fill(512, 0))
	n := 0
	for range d.CrashStates(d.Len(), nil) {
		n++
	}
	require.Equal(t, 1, n)

	cfg := &imagetest.StateConfig{Seen: map[uint64]bool{}}
	write(t, d, 0, fill(512, 8))
	count := func() (n int) {
		for range d.CrashStates(d.Len(), cfg) {
			n++
		}
		return n
	}
	require.Equal(t, 2, count())
	require.Equal(t, 0, count())
	write(t, d, 512, fill(512, 8))
	require.Equal(t, 2, count(), "of four, two are new")
}

func TestNotableStatesWhereThereAreTooMany(t *testing.T) {
	d := imagetest.NewCrash(1<<20, nil)
	for i := range 4 {
		write(t, d, int64(i)*8192, fill(8192, byte(i+1)))
	}
	want := map[string]bool{}
	for _, kept := range []string{"0000", "1111", "0111", "1011", "1101", "1110", "1000", "0100", "0010", "0001", "1100"} {
		p := make([]byte, 1<<20)
		for i, k := range kept {
			if k == '1' {
				copy(p[i*8192:], fill(8192, byte(i+1)))
			}
		}
		want[string(p)] = true
	}
	got := map[string]bool{}
	for st := range d.CrashStates(4, nil) {
		got[string(all(t, st.Open()))] = true
	}
	require.Equal(t, len(want), len(got))
	for p := range want {
		require.True(t, got[p])
	}
	// One kind of sample is a prefix with its last operation torn.
	torn := 0
	for st := range d.CrashStates(4, &imagetest.StateConfig{Samples: 100, Seed: 5}) {
		p := all(t, st.Open())
		got := bytes.Count(p[2*8192:3*8192], []byte{3})
		if bytes.Equal(p[:16384], append(fill(8192, 1), fill(8192, 2)...)) && p[3*8192] == 0 &&
			got > 0 && got < 8192 && bytes.Count(p, []byte{4}) == 0 {
			torn++
		}
	}
	require.NotZero(t, torn)

	// Samples add to these, and repeat by seed.
	run := func(seed uint64) (hashes []uint64) {
		for st := range d.CrashStates(4, &imagetest.StateConfig{Samples: 100, Seed: seed}) {
			hashes = append(hashes, st.Hash)
		}
		return hashes
	}
	require.Greater(t, len(run(1)), len(want)+60)
	require.Equal(t, run(1), run(1))
	require.NotEqual(t, run(1), run(2))
}

func TestLostSync(t *testing.T) {
	d := imagetest.NewCrash(8192, nil)
	write(t, d, 0, fill(512, 1))
	require.NoError(t, d.Sync())
	write(t, d, 0, fill(512, 2))
	write(t, d, 512, fill(512, 2))
	write(t, d, 1024, fill(512, 2))
	d.LoseSync(func(op int, sector int64) bool { return sector == 2 })

	require.Equal(t, fill(1536, 2), all(t, d)[:1536], "reads still show it")
	write(t, d, 512, fill(512, 3))
	require.NoError(t, d.Sync(), "later Syncs succeed")
	require.Equal(t, fill(512, 2), all(t, d)[:512])

	medium := slices.Concat(fill(512, 1), fill(512, 3), fill(512, 2))
	require.Equal(t, medium, all(t, d.PowerCut(nil))[:1536], "only the sector written again is durable")

	write(t, d, 2048, fill(512, 4))
	require.NoError(t, d.DropCache())
	require.Equal(t, medium, all(t, d)[:1536], "past the cache reads show the medium")
	require.Equal(t, fill(512, 4), all(t, d)[2048:2560], "what is dirty isn't dropped")
	require.NoError(t, d.Sync())
	require.Equal(t, all(t, d), all(t, d.PowerCut(nil)))

	// Before the failed Sync, anything could have been written back.
	n := 0
	for range d.CrashStates(5, nil) {
		n++
	}
	require.Equal(t, 8, n)
}

func TestLostSyncKeepsTheSizeInFlight(t *testing.T) {
	d := imagetest.NewCrash(512, nil)
	require.NoError(t, d.Resize(2048))
	write(t, d, 512, fill(512, 1))
	d.LoseSync(nil)
	sizes := map[int64]bool{}
	for st := range d.CrashStates(d.Len(), nil) {
		sizes[st.Open().Size()] = true
	}
	require.Equal(t, map[int64]bool{512: true, 2048: true}, sizes)
	require.NoError(t, d.DropCache())
	require.Equal(t, make([]byte, 2048), all(t, d))
	require.NoError(t, d.Sync())
	require.EqualValues(t, 2048, d.PowerCut(nil).Size())
}

func TestZeroesOverWhatASyncLost(t *testing.T) {
	// The cache shows zeros where the medium has ones: writing the zeros
	// again must count.
	d := imagetest.NewCrash(4096, nil)
	write(t, d, 0, fill(4096, 1))
	require.NoError(t, d.Sync())
	require.NoError(t, d.WriteZeroes(0, 4096))
	d.LoseSync(nil)
	require.NoError(t, d.Sync())
	require.Equal(t, fill(4096, 1), all(t, d.PowerCut(nil)))
	require.NoError(t, d.WriteZeroes(0, 4096))
	require.NoError(t, d.Sync())
	require.Equal(t, make([]byte, 4096), all(t, d.PowerCut(nil)))
}

func TestReopenKeepsThePageCache(t *testing.T) {
	d := imagetest.NewCrash(4096, nil)
	write(t, d, 0, []byte("dirty"))
	e := d.Reopen()
	_, err := d.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, image.ErrClosed)
	require.Equal(t, "dirty", string(all(t, e)[:5]))
	require.Equal(t, make([]byte, 4096), all(t, e.PowerCut(nil)), "dirty still")
	require.NoError(t, e.Close())
	require.ErrorIs(t, e.Close(), image.ErrClosed)
	require.Equal(t, "dirty", string(all(t, e.Reopen())[:5]))
}

func TestShare(t *testing.T) {
	d := imagetest.NewCrash(4096, nil)
	e := d.Share()
	write(t, d, 0, []byte("a"))
	write(t, e, 1, []byte("b"))
	require.NoError(t, d.Close())
	require.Equal(t, "ab", string(all(t, e)[:2]))
	require.Equal(t, 2, e.Len())
}

func TestStatesOpenInParallel(t *testing.T) {
	d := imagetest.NewCrash(1<<20, nil)
	write(t, d, 0, fill(1<<20, 7))
	require.NoError(t, d.Sync())
	for i := range int64(10) {
		write(t, d, i*5000, fill(10, byte(i)))
	}
	var wg sync.WaitGroup
	for st := range d.CrashStates(d.Len(), nil) {
		wg.Go(func() {
			e := st.Open()
			assert.Equal(t, st.Hash, e.Hash())
			_, err := e.WriteAt([]byte{1}, 1<<19)
			assert.NoError(t, err)
			assert.NoError(t, e.Sync())
		})
	}
	wg.Wait()
	require.Equal(t, fill(100, 7), all(t, d)[1<<19:1<<19+100])
}

func TestRevertUnderneath(t *testing.T) {
	d := imagetest.NewCrash(4096, nil)
	write(t, d, 0, []byte("old"))
	snap := d.Snapshot() // not synced: a snapshot has what the cache has
	require.NoError(t, d.Resize(8192))
	write(t, d, 0, []byte("new"))
	require.NoError(t, d.Sync())
	write(t, d, 100, []byte("lost by the revert"))
	d.Revert(snap)
	write(t, d, 3, []byte("er"))

	require.EqualValues(t, 4096, d.Size())
	require.Equal(t, "older", string(all(t, d)[:5]))
	cut := d.PowerCut(nil)
	require.Equal(t, "old\x00\x00", string(all(t, cut)[:5]), "durable at once")
	require.Equal(t, snap.Hash(), cut.Hash())
	require.Equal(t, "new", string(all(t, d.StateAt(4, nil).Open())[:3]), "the cut before the revert")
	require.Equal(t, imagetest.OpRevert, d.Log()[5].Kind)

	// The snapshot is of no one device.
	e := imagetest.NewCrash(1, nil)
	e.Revert(snap)
	require.Equal(t, snap.Hash(), e.Hash())
}

func TestForkAndNestedCrash(t *testing.T) {
	d := imagetest.NewCrash(4096, nil)
	for range 3 { // the log's slice has room to spare then
		write(t, d, 0, fill(512, 1))
	}
	f := d.Fork()
	write(t, d, 1024, fill(512, 3))
	write(t, f, 512, fill(512, 2))
	require.Equal(t, 4, f.Len())
	require.Equal(t, make([]byte, 512), all(t, d)[512:1024])
	require.Equal(t, make([]byte, 512), all(t, f)[1024:1536])
	require.EqualValues(t, 1024, d.Log()[3].Off, "a fork's log is its own")
	require.EqualValues(t, 512, f.Log()[3].Off)

	// Crash, write in recovery, crash again.
	states := map[uint64]bool{}
	for st := range d.CrashStates(d.Len(), nil) {
		r := st.Open()
		write(t, r, 2048, fill(512, 9))
		for st2 := range r.CrashStates(r.Len(), nil) {
			states[st2.Hash] = true
		}
	}
	require.Len(t, states, 8)
}

func TestDiscardModes(t *testing.T) {
	for mode, want := range map[imagetest.DiscardMode]func(p []byte){
		imagetest.DiscardZeros:   func(p []byte) { require.Equal(t, make([]byte, 1024), p) },
		imagetest.DiscardKeeps:   func(p []byte) { require.Equal(t, fill(1024, 1), p) },
		imagetest.DiscardGarbage: func(p []byte) { require.NotEqual(t, make([]byte, 1024), p); require.NotEqual(t, fill(1024, 1), p) },
	} {
		t.Run(fmt.Sprint(mode), func(t *testing.T) {
			d := imagetest.NewCrash(4096, &imagetest.CrashOptions{Discard: mode})
			write(t, d, 0, fill(4096, 1))
			require.NoError(t, d.Sync())
			require.NoError(t, d.Discard(500, 1100)) // sectors 1 and 2 whole
			got := all(t, d)
			want(got[512:1536])
			require.Equal(t, fill(512, 1), got[:512])
			require.Equal(t, fill(4096-1536, 1), got[1536:])
			require.Equal(t, fill(4096, 1), all(t, d.PowerCut(nil)))
			require.NoError(t, d.Sync())
			require.Equal(t, got, all(t, d.PowerCut(nil)))
			same := imagetest.NewCrash(4096, nil)
			write(t, same, 0, got)
			require.Equal(t, same.Hash(), d.Hash())
		})
	}
}

func TestNoSpace(t *testing.T) {
	d := imagetest.NewCrash(4096, &imagetest.CrashOptions{Fixed: true})
	require.ErrorIs(t, d.Resize(8192), image.ErrNoSpace)
	require.ErrorIs(t, d.Resize(1), image.ErrNoSpace)
	require.NoError(t, d.Resize(4096))
	d = imagetest.NewCrash(4096, &imagetest.CrashOptions{MaxSize: 8192})
	require.NoError(t, d.Resize(8192))
	require.ErrorIs(t, d.Resize(8193), image.ErrNoSpace)
	require.ErrorIs(t, d.Resize(-1), image.ErrOutOfRange)
	require.EqualValues(t, 8192, d.Size())
}

func TestSettle(t *testing.T) {
	d := imagetest.NewCrash(4096, nil)
	write(t, d, 0, fill(512, 1))
	d.Settle()
	require.Zero(t, d.Len())
	require.Equal(t, all(t, d), all(t, d.PowerCut(nil)))
}

func TestHugeAndSparse(t *testing.T) {
	const size = 1 << 50
	d := imagetest.NewCrash(size, nil)
	write(t, d, size-700, fill(700, 1))
	write(t, d, 12345, fill(700, 2))
	require.NoError(t, d.Sync())
	require.NoError(t, d.WriteZeroes(0, size))
	n := 0
	for st := range d.CrashStates(d.Len(), nil) {
		require.EqualValues(t, size, st.Open().Size())
		n++
	}
	require.Equal(t, 1<<4, n, "two sectors at either end")
	e, err := d.BlockStatus(0, size)
	require.NoError(t, err)
	require.EqualValues(t, 0, e.Start)
	require.EqualValues(t, size, e.Start+e.Length)
	require.True(t, e.Zero)
	require.NoError(t, d.Resize(0))
	require.NoError(t, d.Resize(size))
	require.Zero(t, imagetest.NewCrash(size, nil).Hash()^d.Hash(), "the same content, the same hash")
}

func TestTrace(t *testing.T) {
	d := imagetest.NewCrash(4096, nil)
	before := d.Trace()
	write(t, d, 0, fill(100, 1))
	write(t, d, 0, fill(200, 1))
	require.NoError(t, d.Sync())
	_ = all(t, d)
	require.NoError(t, d.Discard(0, 512))
	require.NoError(t, d.WriteZeroes(0, 5))
	require.NoError(t, d.Resize(5))
	require.NoError(t, d.DropCache())
	require.Equal(t, imagetest.Trace{
		Reads: 1, Writes: 2, Syncs: 1, Resizes: 1, Discards: 1, ZeroWrites: 1, CacheDrops: 1,
		BytesRead: 4096, BytesWritten: 300, BytesDiscarded: 512, BytesZeroed: 5,
	}, d.Trace().Sub(before))
}

func BenchmarkOpenState(b *testing.B) {
	d := imagetest.NewCrash(64<<20, nil)
	p := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(p)
	for off := int64(0); off < d.Size(); off += int64(len(p)) {
		_, _ = d.WriteAt(p, off)
	}
	d.Settle()
	for i := range int64(5) {
		_, _ = d.WriteAt(p[i:i+4096], i*3<<20)
	}
	b.ReportAllocs()
	n := 0
	for b.Loop() {
		for st := range d.CrashStates(d.Len(), &imagetest.StateConfig{Exhaustive: -1, Samples: 100}) {
			_ = st.Open()
			n++
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/state")
}
