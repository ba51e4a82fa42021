package qcow2_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// TestPreallocation: each cluster has a place, so that writing needs no
// metadata; the disk reads as without, here and in QEMU.
func TestPreallocation(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 1))
	const size = 3<<20 + 512
	list := append(variants(size), variant{name: "plain"}, variant{name: "v2", opts: qcow2.CreateOptions{Version: 2}},
		variant{name: "small", opts: qcow2.CreateOptions{ClusterSize: 512, RefcountBits: 64}})
	for _, v := range list {
		for _, mode := range []qcow2.Preallocation{qcow2.PreallocMetadata, qcow2.PreallocFalloc, qcow2.PreallocFull} {
			t.Run(fmt.Sprint(v.name, mode), func(t *testing.T) {
				v := v
				v.opts.Preallocation = mode
				file := imagetest.NewCrash(0, nil)
				if v.backing > 0 && !v.opts.ExtendedL2 {
					_, err := qcow2.Create(file, &qcow2.CreateOptions{Size: size, BackingFile: "x", Preallocation: mode})
					require.ErrorIs(t, err, image.ErrOutOfRange)
					return
				}
				r, im, want := v.build(t, file, size, rng)
				require.True(t, bytes.Equal(want, contents(t, im)))
				noErrors(t, im, false)
				before := file.Trace()
				p := bytes.Repeat([]byte{7}, 512)
				_, err := im.WriteAt(p, size/2&^511)
				require.NoError(t, err)
				copy(want[size/2&^511:], p)
				if !v.opts.ExtendedL2 && !v.data && !v.crypt {
					require.Equal(t, imagetest.Trace{Writes: 1, BytesWritten: 512}, file.Trace().Sub(before))
				}
				require.NoError(t, im.Close())
				m := &model{t: t, rng: rng, rig: r, dev: r.file, disk: want}
				m.qemu()
				im = r.open(t, qcow2.OpenOptions{})
				require.True(t, bytes.Equal(want, contents(t, im)))
				require.NoError(t, im.Close())
			})
		}
	}
}

// TestRawDataKept: a raw data file keeps what it holds, and is as long as the
// disk.
func TestRawDataKept(t *testing.T) {
	want := bytes.Repeat([]byte("kept"), 1<<18)
	data := &keep{memory(t, want[:len(want)-4096])}
	clear(want[len(want)-4096:])
	file := &keep{imagetest.NewMemory(0)}
	im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: 1 << 20, DataFile: "d", Data: data, DataFileRaw: true})
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, contents(t, im)))
	require.Equal(t, int64(1<<20), data.Size())
	require.NoError(t, im.Resize(2<<20))
	require.Equal(t, int64(2<<20), data.Size())
	require.NoError(t, im.Close())
	got := make([]byte, 2<<20)
	_, err = data.ReadAt(got, 0)
	require.True(t, err == nil || err == io.EOF)
	require.True(t, bytes.Equal(append(want, make([]byte, 1<<20)...), got))
}

// TestPreallocateCrash cuts the power while a disk is preallocated that has
// data.
func TestPreallocateCrash(t *testing.T) {
	file := imagetest.NewCrash(0, &imagetest.CrashOptions{Discard: imagetest.DiscardGarbage})
	im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 512})
	require.NoError(t, err)
	want := make([]byte, 1<<20)
	for off := 0; off < len(want); off += 50_000 {
		copy(want[off:], "some data")
		_, err := im.WriteAt(want[off:][:9], int64(off))
		require.NoError(t, err)
	}
	// Clusters that were used before, and aren't zeros.
	_, err = im.WriteAt(bytes.Repeat([]byte{0xaa}, 40_000), 600_000)
	require.NoError(t, err)
	require.NoError(t, im.Sync())
	require.NoError(t, im.Discard(599_040, 41_472))
	clear(want[599_040:][:41_472])
	require.NoError(t, im.Sync())
	file.Settle()
	require.NoError(t, im.Preallocate(0, 1<<20, qcow2.PreallocMetadata))
	states := 0
	for at := range file.Len() + 1 {
		for s := range file.CrashStates(at, &imagetest.StateConfig{Exhaustive: 3, Samples: 2, Seed: uint64(at)}) {
			if states++; states%7 != 0 {
				continue
			}
			im, err := qcow2.Open(s.Open(), nil)
			require.NoError(t, err)
			noErrors(t, im, true)
			got := contents(t, im)
			require.True(t, bytes.Equal(want, got), "%v%s", s, firstDiff(want, got))
		}
	}
	t.Logf("%d states", states)
}

// TestPreallocationLikeQEMU compares what qemu-img says of its images and ours.
func TestPreallocationLikeQEMU(t *testing.T) {
	dir := tempDir(t)
	for name, mode := range map[string]qcow2.Preallocation{"metadata": qcow2.PreallocMetadata, "falloc": qcow2.PreallocFalloc, "full": qcow2.PreallocFull} {
		theirs, ours := filepath.Join(dir, "theirs"), filepath.Join(dir, "ours")
		qemuCreate(t, theirs, "preallocation="+name, 20<<20)
		im, d := create(t, &qcow2.CreateOptions{Size: 20 << 20, Preallocation: mode})
		require.NoError(t, im.Close())
		dump(t, d, ours)
		qemuCheck(t, ours, false)
		im = open(t, load(t, theirs))
		a, err := im.BlockStatus(0, 20<<20)
		require.NoError(t, err)
		require.NoError(t, im.Close())
		im = open(t, d)
		b, err := im.BlockStatus(0, 20<<20)
		require.NoError(t, err)
		require.NoError(t, im.Close())
		a.Offset, b.Offset = 0, 0
		require.Equal(t, a, b, name)
	}
}
