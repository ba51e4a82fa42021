package imagetest_test

import (
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
)

// A naive model of the same promise: whole contents as byte slices, every
// subset of the writes of a sector, every prefix of the resizes.
type naiveOp struct {
	resize bool
	size   int64
	sector int64
	data   []byte // the sector
}

func naiveStates(durable []byte, ops []naiveOp) map[string]bool {
	resizes, writes := 0, 0
	for _, op := range ops {
		if op.resize {
			resizes++
		} else {
			writes++
		}
	}
	states := map[string]bool{}
	for n := 0; n <= resizes; n++ {
		for set := 0; set < 1<<writes; set++ {
			// Room for any size; cut at the end.
			disk := make([]byte, 1<<16)
			copy(disk, durable)
			size, r, w := int64(len(durable)), 0, 0
			for _, op := range ops {
				if op.resize {
					if r++; r <= n {
						clear(disk[op.size:])
						size = op.size
					}
					continue
				}
				if set&(1<<w) != 0 {
					copy(disk[op.sector*512:], op.data)
				}
				w++
			}
			states[string(disk[:size])] = true
		}
	}
	return states
}

// TestCrashStatesAreExactlyTheLegalOnes compares the enumeration with the naive
// one, for random short histories.
func TestCrashStatesAreExactlyTheLegalOnes(t *testing.T) {
	s := imagetest.Seed(t)
	total := 0
	for round := range imagetest.Scale(150) {
		rng := rand.New(rand.NewPCG(s, uint64(round)))
		d := imagetest.NewCrash(rng.Int64N(3000), nil)
		write(t, d, 0, fill(int(d.Size()), 0xEE))
		require.NoError(t, d.Sync())

		durable := all(t, d)
		var ops []naiveOp
		for writes := 0; writes < 9; {
			size := d.Size()
			sectors := func(off, n int64) {
				for sec := off / 512; sec*512 < off+n; sec++ {
					p := make([]byte, 512)
					_, _ = d.ReadAt(p, sec*512)
					ops = append(ops, naiveOp{sector: sec, data: p})
					writes++
				}
			}
			switch rng.IntN(6) {
			case 0:
				n := rng.Int64N(4000)
				require.NoError(t, d.Resize(n))
				ops = append(ops, naiveOp{resize: true, size: n})
				if n == size {
					ops = ops[:len(ops)-1]
				}
				writes++ // bound the history
			case 1:
				if size > 0 {
					off := rng.Int64N(size)
					n := rng.Int64N(min(size-off, 700)) + 1
					require.NoError(t, d.WriteZeroes(off, n))
					sectors(off, n)
				}
			case 2:
				if rng.IntN(8) == 0 {
					require.NoError(t, d.Sync())
					durable, ops, writes = all(t, d), nil, 0
				}
			default:
				if size > 0 {
					off := rng.Int64N(size)
					n := rng.Int64N(min(size-off, 900)) + 1
					write(t, d, off, fill(int(n), byte(rng.IntN(3))))
					sectors(off, n)
				}
			}
			if size == 0 && rng.IntN(20) == 0 {
				break
			}
		}
		want := naiveStates(durable, ops)
		got := map[string]bool{}
		hashes := map[uint64]bool{}
		for st := range d.CrashStates(d.Len(), &imagetest.StateConfig{Exhaustive: 64}) {
			dev := st.Open()
			require.Equal(t, st.Hash, dev.Hash(), "hash of a state that was opened, round %d", round)
			c := string(all(t, dev))
			require.False(t, got[c], "a state twice, round %d", round)
			require.False(t, hashes[st.Hash])
			got[c], hashes[st.Hash] = true, true
		}
		require.Len(t, got, len(want), "round %d", round)
		for c := range want {
			require.True(t, got[c], "missing a legal state, round %d", round)
		}
		total += len(got)

		// Samples are legal too.
		for st := range d.CrashStates(d.Len(), &imagetest.StateConfig{Exhaustive: -1, Samples: 50, Seed: s}) {
			require.True(t, want[string(all(t, st.Open()))], "round %d: %v", round, st)
		}
	}
	t.Logf("%d distinct states", total)
}
