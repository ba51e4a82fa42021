package convert_test

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/convert"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// kept is closed by the test.
type kept struct{ image.Device }

func (k kept) Unwrap() image.Device { return k.Device }
func (kept) Close() error           { return nil }

// A stack is a qcow2 with a backing file, on devices that crash.
type stack struct {
	t         *testing.T
	top, base *imagetest.CrashDevice
	qcow2Base bool
	want      []byte // what the guest reads
	im        *qcow2.Image
	below     image.Device
}

const cluster = 4096

// newStack makes one whose layers have some clusters each, the base being the
// shorter one.
func newStack(t *testing.T, seed uint64, qcow2Base bool) *stack {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := &stack{t: t, qcow2Base: qcow2Base, top: imagetest.NewCrash(0, nil), base: imagetest.NewCrash(0, nil)}
	const size, small = 40 * cluster, 25 * cluster
	var err error
	if qcow2Base {
		_, err = qcow2.Create(s.base, &qcow2.CreateOptions{Size: small, ClusterSize: cluster})
	} else {
		err = s.base.Resize(small)
	}
	require.NoError(t, err)
	s.below = s.openBase(s.base)
	s.im, err = qcow2.Create(kept{s.top}, &qcow2.CreateOptions{Size: size, ClusterSize: cluster, BackingFile: "old", Backing: kept{s.below}})
	require.NoError(t, err)
	s.want = make([]byte, size)
	fill := func(d image.Device, n int64, tag byte) {
		for off := int64(0); off < n; off += cluster {
			p := s.want[off : off+cluster]
			switch rng.IntN(4) {
			case 0:
				for i := range p {
					p[i] = byte(rng.Uint32()) | tag
				}
				_, err := d.WriteAt(p, off)
				require.NoError(t, err)
			case 1:
				clear(p)
				require.NoError(t, d.(image.ZeroWriter).WriteZeroes(off, cluster))
			}
		}
	}
	fill(s.below, small, 1)
	fill(s.im, size, 2)
	require.NoError(t, s.below.Sync())
	require.NoError(t, s.im.Sync())
	s.top.Settle()
	s.base.Settle()
	require.True(t, bytes.Equal(s.want, all(t, s.im)))
	return s
}

func (s *stack) openBase(d image.Device) image.Device {
	if !s.qcow2Base {
		return d
	}
	im, err := qcow2.Open(kept{d}, nil)
	require.NoError(s.t, err)
	return im
}

// reads checks what the guest reads of a top and a base.
func (s *stack) reads(top, base image.Device, msg any) {
	im, err := qcow2.Open(kept{top}, &qcow2.OpenOptions{ReadOnly: true, Backing: kept{s.openBase(base)}})
	require.NoError(s.t, err, "%v", msg)
	require.True(s.t, bytes.Equal(s.want, all(s.t, im)), "%v", msg)
	res, err := im.Check(s.t.Context(), nil)
	require.NoError(s.t, err)
	require.Zero(s.t, res.Errors, "%v: %v", msg, res.Findings)
}

func states(seed int) *imagetest.StateConfig {
	return &imagetest.StateConfig{Exhaustive: 4, Samples: 4, Seed: uint64(seed)}
}

// A power cut at any write of a commit: the disk reads the same. The base is
// durable before the top changes, so a crash finds either an old top with any
// state of the base, or any state of the top with the new base.
func TestCommitCrash(t *testing.T) {
	seed := imagetest.Seed(t)
	count := 0
	for i := range uint64(imagetest.Scale(4)) {
		for _, qcow2Base := range []bool{false, true} {
			s := newStack(t, seed+i, qcow2Base)
			oldTop := s.top.StateAt(0, nil).Open()
			var tops []int // top's writes so far, at each Sync of base
			base := imagetest.NewFault(s.below, imagetest.Fault{Mode: imagetest.Call, Ops: imagetest.OpSync, Forever: true,
				Do: func() { tops = append(tops, s.top.Len()) }})
			require.NoError(t, convert.Commit(t.Context(), s.im, base, &convert.CommitOptions{Cluster: cluster}))
			require.Equal(t, []int{0}, tops, "base is synced before top changes")
			require.True(t, bytes.Equal(s.want, all(t, s.im)))
			require.True(t, bytes.Equal(s.want, all(t, s.below)), "base has it all")
			e, err := s.im.BlockStatus(0, s.im.Size())
			require.NoError(t, err)
			require.Equal(t, 1, e.Depth, "top is empty")

			final := s.base.StateAt(s.base.Len(), nil).Open()
			for at := range s.base.Len() + 1 {
				for st := range s.base.CrashStates(at, states(at)) {
					count++
					s.reads(oldTop, st.Open(), st)
				}
			}
			for at := range s.top.Len() + 1 {
				for st := range s.top.CrashStates(at, states(at)) {
					count++
					s.reads(st.Open(), final, st)
				}
			}
		}
	}
	t.Logf("%d states", count)
}

// A power cut at any write of a rebase: with the backing file that the header
// then names, the disk reads the same.
func TestRebaseCrash(t *testing.T) {
	seed := imagetest.Seed(t)
	count := 0
	for i := range uint64(imagetest.Scale(4)) {
		for _, kind := range []string{"shorter", "longer", "none"} {
			s := newStack(t, seed+i, false)
			var next image.Device
			name := ""
			if kind != "none" {
				size := map[string]int64{"shorter": 7 * cluster, "longer": 60 * cluster}[kind]
				p := bytes.Repeat([]byte{0x77}, int(size))
				copy(p[3*cluster:], s.want[3*cluster:5*cluster])
				name, next = "new", memory(t, p, size)
			}
			require.NoError(t, convert.Rebase(t.Context(), s.im, next, &convert.RebaseOptions{Cluster: cluster}))
			require.True(t, bytes.Equal(s.want, all(t, s.im)))
			require.NoError(t, s.im.Sync())
			var backing image.Device
			if next != nil {
				backing = kept{next}
			}
			require.NoError(t, s.im.ChangeBacking(name, "", backing))
			require.True(t, bytes.Equal(s.want, all(t, s.im)))
			seen := map[string]int{}
			for at := range s.top.Len() + 1 {
				for st := range s.top.CrashStates(at, states(at)) {
					count++
					top := st.Open()
					info, err := qcow2.Inspect(top, "")
					require.NoError(t, err)
					seen[info.BackingFile]++
					if info.BackingFile == "old" {
						s.reads(top, s.below, st)
						continue
					}
					o := &qcow2.OpenOptions{ReadOnly: true, Backing: backing}
					require.Equal(t, name, info.BackingFile)
					im, err := qcow2.Open(kept{top}, o)
					require.NoError(t, err)
					require.True(t, bytes.Equal(s.want, all(t, im)), "%s: %v", kind, st)
				}
			}
			require.Len(t, seen, 2)
		}
	}
	t.Logf("%d states", count)
}

// What top has itself isn't written again, nor what is the same below.
func TestRebaseWritesLittle(t *testing.T) {
	s := newStack(t, 5, false)
	same := imagetest.NewFault(s.im)
	require.NoError(t, convert.Rebase(t.Context(), same, s.below, &convert.RebaseOptions{Cluster: cluster}))
	require.Zero(t, same.Trace().Writes)
	require.Zero(t, same.Trace().ZeroWrites)
}

func TestCommitRefuses(t *testing.T) {
	s := newStack(t, 5, false)
	require.ErrorIs(t, convert.Commit(t.Context(), s.im, s.below, &convert.CommitOptions{Layers: 2}), image.ErrUnsupported)
	require.ErrorIs(t, convert.Commit(t.Context(), imagetest.NewMemory(5), imagetest.NewMemory(5), nil), image.ErrUnsupported)
	fixed := struct{ image.Device }{imagetest.NewMemory(5)}
	require.ErrorIs(t, convert.Commit(t.Context(), s.im, fixed, nil), image.ErrUnsupported)
	require.NoError(t, convert.Commit(t.Context(), s.im, s.below, &convert.CommitOptions{Keep: true}))
	require.True(t, bytes.Equal(s.want, all(t, s.below)))
	e, err := s.im.BlockStatus(0, s.im.Size())
	require.NoError(t, err)
	require.LessOrEqual(t, e.Length, s.im.Size())
	require.ErrorIs(t, convert.Rebase(t.Context(), s.im, nil, &convert.RebaseOptions{Cluster: 3}), image.ErrOutOfRange)
}
