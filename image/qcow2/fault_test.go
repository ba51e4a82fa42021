package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// workload changes an image in every way, and stops at the first error.
func workload(im *qcow2.Image) error {
	rng := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, 9000)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	for i := int64(0); i < 12; i++ {
		if _, err := im.WriteAt(p, i*17000); err != nil {
			return err
		}
	}
	for _, op := range []func() error{
		im.Sync,
		func() error { return im.Snapshots().Create("a") },
		func() error { _, err := im.WriteAt(p, 5000); return err },
		func() error { return im.Discard(60000, 50000) },
		func() error { return im.WriteZeroes(8000, 9000) },
		im.Sync,
		func() error { return im.Resize(600 << 10) },
		func() error { _, err := im.WriteAt(p, 500<<10); return err },
		func() error { return im.Snapshots().Create("b") },
		func() error { return im.Snapshots().Revert("a") },
		func() error { return im.Snapshots().Delete("a") },
		func() error { _, err := im.WriteAt(p, 90000); return err },
		im.Sync,
	} {
		if err := op(); err != nil {
			return err
		}
	}
	return nil
}

// TestFaults breaks each write, Sync and Resize of a workload in turn. The
// error must show, nothing may be written after it, and the image must have no
// errors after a power cut.
func TestFaults(t *testing.T) {
	for _, cs := range []int{512, 4096} {
		for _, f := range []imagetest.Fault{
			{Mode: imagetest.Fail, Ops: imagetest.OpWrite},
			{Mode: imagetest.Short, Ops: imagetest.OpWrite},
			{Mode: imagetest.FailAfter, Ops: imagetest.OpWrite},
			{Mode: imagetest.Fail, Ops: imagetest.OpSync},
			{Mode: imagetest.FailAfter, Ops: imagetest.OpSync},
			{Mode: imagetest.Fail, Ops: imagetest.OpResize},
		} {
			base := imagetest.NewCrash(0, nil)
			im, err := qcow2.Create(base, &qcow2.CreateOptions{Size: 300 << 10, ClusterSize: cs})
			require.NoError(t, err)
			require.NoError(t, im.Close())
			base = base.Reopen()
			base.Settle()
			n := imagetest.EachFault(f, func(f imagetest.Fault) int { return withFault(t, base.Fork(), f) })
			require.Positive(t, n)
			t.Logf("clusters of %d: %v of %v, %d times", cs, f.Mode, f.Ops, n)
		}
	}
}

func withFault(t *testing.T, file *imagetest.CrashDevice, f imagetest.Fault) int {
	d := imagetest.NewFault(file, f)
	im, err := qcow2.Open(d, nil)
	require.NoError(t, err)
	err = workload(im)
	if d.Hits() == 0 {
		require.NoError(t, err)
		require.NoError(t, im.Close())
		return 0
	}
	what := fmt.Sprintf("%+v", f)
	require.ErrorIs(t, err, imagetest.ErrInjected, what)
	logged := file.Len()
	_, err = im.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, image.ErrPoisoned, what)
	for _, err := range []error{im.Sync(), im.Discard(0, 1<<20>>4), im.WriteZeroes(0, 4096), im.Resize(1 << 20),
		im.Snapshots().Create("z"), im.Snapshots().Delete("a")} {
		require.ErrorIs(t, err, image.ErrPoisoned, what)
	}
	// What the medium got can be looked at.
	require.NoError(t, im.DropCache())
	_ = contents(t, im)
	require.NoError(t, im.Close())
	require.Equal(t, logged, file.Len(), "%s: written to after the failure", what)

	for _, keep := range []func(int, int64) bool{nil, func(int, int64) bool { return true }, func(op int, s int64) bool { return (int64(op)+s)%2 == 0 }} {
		im, err := qcow2.Open(file.PowerCut(keep), nil)
		require.NoError(t, err, what)
		noErrors(t, im, true)
		require.NoError(t, im.Close())
	}
	return d.Hits()
}

// TestReadFaults breaks each read in turn. Nothing that was written wrongly
// for want of it may be left.
func TestReadFaults(t *testing.T) {
	base := imagetest.NewCrash(0, nil)
	im, err := qcow2.Create(base, &qcow2.CreateOptions{Size: 300 << 10, ClusterSize: 512})
	require.NoError(t, err)
	require.NoError(t, im.Close())
	base = base.Reopen()
	n := imagetest.EachFault(imagetest.Fault{Mode: imagetest.Fail, Ops: imagetest.OpRead}, func(f imagetest.Fault) int {
		file := base.Fork()
		d := imagetest.NewFault(file, f)
		im, err := qcow2.Open(d, &qcow2.OpenOptions{CacheSize: 1})
		if err == nil {
			if err = workload(im); err != nil {
				require.ErrorIs(t, err, imagetest.ErrInjected)
			}
			_ = im.Close()
		} else {
			require.ErrorIs(t, err, imagetest.ErrInjected)
		}
		im, err = qcow2.Open(file.Reopen(), nil)
		require.NoError(t, err)
		noErrors(t, im, true)
		return d.Hits()
	})
	t.Logf("%d reads", n)
}

// TestNoSpace fills the file. The image stays usable, and has no leaks.
func TestNoSpace(t *testing.T) {
	for max := int64(200 << 10); max < 260<<10; max += 1536 {
		file := imagetest.NewCrash(0, &imagetest.CrashOptions{MaxSize: max})
		d := &keep{file}
		im, err := qcow2.Create(d, &qcow2.CreateOptions{Size: 300 << 10, ClusterSize: 512})
		require.NoError(t, err)
		want := make([]byte, im.Size())
		p := bytes.Repeat([]byte{7}, 10_000)
		var full bool
		for off := int64(0); off < 290<<10; off += 10_000 {
			n, err := im.WriteAt(p, off)
			copy(want[off:], p[:n])
			if err != nil {
				require.ErrorIs(t, err, image.ErrNoSpace)
				full = true
			}
		}
		require.True(t, full)
		require.NoError(t, im.Sync())
		require.True(t, bytes.Equal(want, contents(t, im)))
		err = im.Snapshots().Create("s")
		if err == nil {
			require.NoError(t, im.Snapshots().Delete("s"))
		} else {
			require.ErrorIs(t, err, image.ErrNoSpace)
		}
		if err := im.Resize(900 << 10); err != nil {
			require.ErrorIs(t, err, image.ErrNoSpace)
		} else {
			want = append(want, make([]byte, 600<<10)...)
		}
		noErrors(t, im, false)
		require.NoError(t, im.Discard(0, 50_000/512*512))
		clear(want[:50_000/512*512])
		require.NoError(t, im.Sync())
		_, err = im.WriteAt(p, 100)
		require.NoError(t, err)
		copy(want[100:], p)
		noErrors(t, im, false)
		require.NoError(t, im.Close())
		im = open(t, d)
		require.True(t, bytes.Equal(want, contents(t, im)))
	}
}

// TestSyncs counts what durability costs.
func TestSyncs(t *testing.T) {
	file := imagetest.NewCrash(0, nil)
	im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: 1 << 30})
	require.NoError(t, err)
	cost := func(op func()) imagetest.Trace {
		before := file.Trace()
		op()
		return file.Trace().Sub(before)
	}
	write := func(off int64) func() {
		return func() {
			_, err := im.WriteAt(make([]byte, 4096), off)
			require.NoError(t, err)
			require.NoError(t, im.Sync())
		}
	}
	c := cost(write(0))
	require.Equal(t, int64(2), c.Syncs, "the first write allocates an L2 table and a cluster")
	for i := int64(1); i < 16; i++ {
		c = cost(write(i * 4096))
		require.Equal(t, imagetest.Trace{Writes: 1, BytesWritten: 4096, Syncs: 1}, c, "a write in place")
	}
	c = cost(write(1 << 20))
	require.Equal(t, imagetest.Trace{Writes: 2, BytesWritten: 4096 + 512, Syncs: 1}, c, "a new cluster")
	c = cost(func() {
		for i := int64(2); i < 100; i++ {
			_, err := im.WriteAt(make([]byte, 4096), i<<20)
			require.NoError(t, err)
		}
		require.NoError(t, im.Sync())
	})
	require.Equal(t, int64(2), c.Syncs, "98 new clusters")
	c = cost(func() { require.NoError(t, im.Sync()) })
	require.Equal(t, imagetest.Trace{Syncs: 1}, c, "nothing to do")
	c = cost(func() { require.NoError(t, im.Discard(0, 1<<20)); require.NoError(t, im.Sync()) })
	require.Equal(t, int64(1), c.Syncs, "a discard")
	c = cost(write(1 << 20))
	require.Equal(t, imagetest.Trace{Writes: 1, BytesWritten: 4096, Syncs: 1}, c, "lowered refcounts wait")
	require.NoError(t, im.Close())
}

// TestConcurrency has readers, writers and a snapshot keeper at once. Each
// writer has a stripe of its own and looks after it.
func TestConcurrency(t *testing.T) {
	s := seed(t)
	for _, cs := range []int{512, 65536} {
		im, d := create(t, &qcow2.CreateOptions{Size: 4 << 20, ClusterSize: cs})
		var wg sync.WaitGroup
		fail := make(chan error, 16)
		for w := range 4 {
			wg.Go(func() {
				if err := stripe(im, rand.New(rand.NewPCG(s, uint64(w))), int64(w)<<20, scale(300)); err != nil {
					fail <- err
				}
			})
		}
		wg.Go(func() {
			for i := range 10 {
				name := fmt.Sprint("s", i)
				if err := errors.Join(im.Snapshots().Create(name), im.Sync()); err != nil {
					fail <- err
				}
				if _, err := im.Check(t.Context(), nil); err != nil {
					fail <- err
				}
				if err := errors.Join(im.DropCache(), im.Snapshots().Delete(name)); err != nil {
					fail <- err
				}
			}
		})
		wg.Wait()
		close(fail)
		for err := range fail {
			require.NoError(t, err)
		}
		noErrors(t, im, false)
		want := contents(t, im)
		require.NoError(t, im.Close())
		checkDevice(t, d, want)
	}
}

func stripe(im *qcow2.Image, rng *rand.Rand, base int64, n int) error {
	want := make([]byte, 1<<20)
	got := make([]byte, 1<<20)
	for i := range n {
		off, n := rng.IntN(1<<20-40000), 1+rng.IntN(40000)
		switch rng.IntN(8) {
		case 0:
			if err := im.WriteZeroes(base+int64(off), int64(n)); err != nil {
				return err
			}
			clear(want[off : off+n])
		case 1:
			if err := im.Sync(); err != nil {
				return err
			}
		default:
			p := bytes.Repeat([]byte{byte(i)}, n)
			if _, err := im.WriteAt(p, base+int64(off)); err != nil {
				return err
			}
			copy(want[off:], p)
		}
		if err := image.ReadFull(im, got[:n], base+int64(off)); err != nil {
			return err
		}
		if !bytes.Equal(want[off:off+n], got[:n]) {
			return fmt.Errorf("stripe at %#x, op %d: read %#x+%#x%s", base, i, off, n, firstDiff(want[off:off+n], got[:n]))
		}
	}
	return nil
}
