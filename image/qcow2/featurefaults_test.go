package qcow2_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// featureWorkload stops at the first error.
func featureWorkload(im *qcow2.Image, v *variant) error {
	cs := int64(v.opts.ClusterSize)
	p := bytes.Repeat([]byte("some text "), 4000)
	ops := []func() error{
		func() error { _, err := im.WriteAt(p[:3000], cs+100); return err },
		func() error { _, err := im.WriteAt(p[:2*cs], 4*cs); return err },
		im.Sync,
		func() error { return im.WriteZeroes(4*cs, cs+cs/2) },
		func() error { _, err := im.WriteAt(p[:700], 5*cs-300); return err },
	}
	if !v.data && !v.crypt {
		ops = append(ops, func() error { _, err := im.WriteCompressed(p[:2*cs], 7*cs); return err },
			im.Sync,
			func() error { _, err := im.WriteAt(p[:100], 7*cs+50); return err })
	}
	if v.opts.ExtendedL2 || v.backing == 0 {
		ops = append(ops, func() error { return im.Preallocate(0, 10*cs, qcow2.PreallocMetadata) })
	}
	if !v.opts.DataFileRaw {
		ops = append(ops, func() error { return im.ChangeBacking("z", "raw", &keep{imagetest.NewMemory(5000)}) })
	}
	ops = append(ops, func() error { _, err := im.WriteAt(p[:5000], 2*cs); return err }, im.Sync)
	for _, op := range ops {
		if err := op(); err != nil {
			return err
		}
	}
	return nil
}

// TestFeatureFaults breaks each write, Sync and read of a workload in turn, on
// images with each feature: the error shows, and the image has no errors.
func TestFeatureFaults(t *testing.T) {
	const size = 200 << 10
	for _, v := range variants(size) {
		for _, f := range []imagetest.Fault{
			{Mode: imagetest.Fail, Ops: imagetest.OpWrite},
			{Mode: imagetest.Short, Ops: imagetest.OpWrite},
			{Mode: imagetest.FailAfter, Ops: imagetest.OpSync},
			{Mode: imagetest.Fail, Ops: imagetest.OpRead},
		} {
			r, im, _ := v.build(t, imagetest.NewCrash(0, nil), size, rand.New(rand.NewPCG(1, 2)))
			require.NoError(t, im.Close())
			base, ok := r.file.Device.(*imagetest.CrashDevice)
			require.True(t, ok)
			base.Settle()
			n := imagetest.EachFault(f, func(f imagetest.Fault) int {
				now, file := *r, base.Fork()
				d := imagetest.NewFault(file, f)
				now.file = &keep{d}
				if r.data != nil {
					now.data = &keep{imagetest.NewMemory(0)}
				}
				im, err := now.tryOpen(qcow2.OpenOptions{CacheSize: 1})
				if err == nil {
					err = featureWorkload(im, &v)
					_ = im.Close()
				}
				if d.Hits() > 0 && f.Ops != imagetest.OpRead {
					require.ErrorIs(t, err, imagetest.ErrInjected, "%s %+v", v.name, f)
				} else if err != nil {
					require.ErrorIs(t, err, imagetest.ErrInjected, "%s %+v", v.name, f)
				}
				for _, cut := range []func(int, int64) bool{nil, func(int, int64) bool { return true }} {
					now.file = &keep{file.PowerCut(cut)}
					im, err := now.tryOpen(qcow2.OpenOptions{})
					if err != nil && v.backing == 0 && !v.opts.DataFileRaw {
						// It may have a backing file by now.
						now.backing = &keep{imagetest.NewMemory(5000)}
						im, err = now.tryOpen(qcow2.OpenOptions{})
					}
					require.NoError(t, err, "%s %+v", v.name, f)
					noErrors(t, im, true)
					require.NoError(t, im.Close())
					now.backing = r.backing
				}
				return d.Hits()
			})
			require.Positive(t, n, v.name)
		}
	}
}

// TestBackingFaults: what the backing file doesn't give isn't made up.
func TestBackingFaults(t *testing.T) {
	broken := errors.New("broken")
	v := variant{opts: qcow2.CreateOptions{ClusterSize: 4096}, backing: 100_000}
	r, im, want := v.build(t, imagetest.NewMemory(0), 128<<10, rand.New(rand.NewPCG(1, 2)))
	require.NoError(t, im.Close())
	good := r.backing.Device
	r.backing.Device = failing{good, broken}
	im = r.open(t, qcow2.OpenOptions{})
	_, err := im.ReadAt(make([]byte, 100), 5000)
	require.ErrorIs(t, err, broken)
	_, err = im.WriteAt(make([]byte, 100), 5000)
	require.ErrorIs(t, err, broken)
	_, err = im.WriteAt(bytes.Repeat([]byte("w"), 4096), 8192) // a whole cluster
	require.NoError(t, err)
	copy(want[8192:], bytes.Repeat([]byte("w"), 4096))
	noErrors(t, im, false)
	r.backing.Device = good
	require.True(t, bytes.Equal(want, contents(t, im)))
	require.NoError(t, im.Close())
}

type failing struct {
	image.Device
	err error
}

func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }
