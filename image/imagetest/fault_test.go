package imagetest_test

import (
	"bytes"
	"errors"
	"math/bits"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
)

func TestFaultOnceAndForever(t *testing.T) {
	for _, forever := range []bool{false, true} {
		c := imagetest.NewCrash(4096, nil)
		f := imagetest.NewFault(c, imagetest.Fault{Ops: imagetest.OpWrite, At: 2, Forever: forever})
		var failed []int
		for i := range 5 {
			_, _ = f.ReadAt(make([]byte, 1), 0) // not counted by the fault
			if _, err := f.WriteAt([]byte{byte(i + 1)}, int64(i)); err != nil {
				require.ErrorIs(t, err, imagetest.ErrInjected)
				require.ErrorIs(t, err, syscall.EIO)
				failed = append(failed, i)
			}
		}
		if forever {
			require.Equal(t, []int{2, 3, 4}, failed)
			require.Equal(t, []byte{1, 2, 0, 0, 0}, all(t, c)[:5])
		} else {
			require.Equal(t, []int{2}, failed)
			require.Equal(t, []byte{1, 2, 0, 4, 5}, all(t, c)[:5])
		}
		require.Equal(t, len(failed), f.Hits())
		require.EqualValues(t, 5, f.Trace().Writes)
		require.EqualValues(t, 5, f.Trace().Reads)
	}
}

func TestFaultErrorIsTheCallers(t *testing.T) {
	f := imagetest.NewFault(imagetest.NewCrash(0, nil), imagetest.Fault{Ops: imagetest.OpResize, Err: image.ErrNoSpace})
	require.ErrorIs(t, f.Resize(5), image.ErrNoSpace)
	require.NoError(t, f.Resize(5))
}

func TestFaultShort(t *testing.T) {
	c := imagetest.NewCrash(4096, nil)
	f := imagetest.NewFault(c,
		imagetest.Fault{Mode: imagetest.Short, Ops: imagetest.OpWrite},
		imagetest.Fault{Mode: imagetest.Short, Ops: imagetest.OpRead, N: 3})
	n, err := f.WriteAt([]byte("abcdefgh"), 0)
	require.ErrorIs(t, err, imagetest.ErrInjected)
	require.Equal(t, 4, n)
	require.Equal(t, "abcd\x00", string(all(t, c)[:5]))
	p := make([]byte, 4)
	n, err = f.ReadAt(p, 0)
	require.ErrorIs(t, err, imagetest.ErrInjected)
	require.Equal(t, 3, n)
	require.Equal(t, "abc\x00", string(p))
	require.ErrorIs(t, image.ReadFull(imagetest.NewFault(c, imagetest.Fault{Mode: imagetest.Short, N: 100}), p, 0), imagetest.ErrInjected)
}

func TestFaultDamage(t *testing.T) {
	for n := 1; n <= 8; n++ {
		c := imagetest.NewCrash(4096, nil)
		write(t, c, 0, fill(4096, 0x55))
		f := imagetest.NewFault(c, imagetest.Fault{Mode: imagetest.FlipBits, Ops: imagetest.OpRead, N: n, Seed: 7})
		flipped := 0
		for _, b := range all(t, f) {
			flipped += bits.OnesCount8(b ^ 0x55)
		}
		require.Equal(t, n, flipped)
		require.Equal(t, fill(4096, 0x55), all(t, f), "the medium is right")
	}

	c := imagetest.NewCrash(4096, nil)
	f := imagetest.NewFault(c, imagetest.Fault{Mode: imagetest.ZeroSector, Ops: imagetest.OpWrite, Seed: 3})
	p := fill(4096, 1)
	write(t, f, 0, p)
	require.Equal(t, fill(4096, 1), p, "the caller's buffer is untouched")
	zeros := 0
	for i := 0; i < 4096; i += 512 {
		if bytes.Equal(all(t, c)[i:i+512], make([]byte, 512)) {
			zeros++
		}
	}
	require.Equal(t, 1, zeros)
}

func TestFaultMisdirectStaleLose(t *testing.T) {
	c := imagetest.NewCrash(16384, nil)
	f := imagetest.NewFault(c, imagetest.Fault{Mode: imagetest.Misdirect, Ops: imagetest.OpWrite})
	write(t, f, 12288, []byte("here"))
	require.Equal(t, make([]byte, 4), all(t, c)[12288:12292])
	require.Equal(t, "here", string(all(t, c)[8192:8196]))
	f = imagetest.NewFault(c, imagetest.Fault{Mode: imagetest.Misdirect, N: 8192})
	p := make([]byte, 4)
	require.NoError(t, image.ReadFull(f, p, 0))
	require.Equal(t, "here", string(p))

	f = imagetest.NewFault(c, imagetest.Fault{Mode: imagetest.StaleRead})
	write(t, f, 100, []byte("one one"))
	write(t, f, 104, []byte("two"))
	p = make([]byte, 9)
	require.NoError(t, image.ReadFull(f, p, 99))
	require.Equal(t, "\x00\x00\x00\x00\x00one\x00", string(p))
	require.NoError(t, image.ReadFull(f, p, 99))
	require.Equal(t, "\x00one two\x00", string(p))

	f = imagetest.NewFault(c, imagetest.Fault{Mode: imagetest.Lose})
	write(t, f, 100, []byte("gone"))
	require.Equal(t, "one two", string(all(t, c)[100:107]))
}

func TestFaultSync(t *testing.T) {
	run := func(mode imagetest.FaultMode) (*imagetest.CrashDevice, error, error) {
		c := imagetest.NewCrash(512, nil)
		f := imagetest.NewFault(c, imagetest.Fault{Mode: mode, Ops: imagetest.OpSync})
		write(t, f, 0, []byte("x"))
		return c, f.Sync(), f.Sync()
	}
	durable := func(c *imagetest.CrashDevice) bool { return all(t, c.PowerCut(nil))[0] == 'x' }

	c, first, second := run(imagetest.Fail)
	require.ErrorIs(t, first, imagetest.ErrInjected)
	require.NoError(t, second)
	require.False(t, durable(c), "pages lost, and the next Sync doesn't know")
	require.Equal(t, byte('x'), all(t, c)[0])

	c, first, second = run(imagetest.Lose)
	require.NoError(t, first, "a lie")
	require.NoError(t, second)
	require.True(t, durable(c))
	c, _, _ = run(imagetest.FailAfter)
	require.True(t, durable(c))
}

func TestFaultCall(t *testing.T) {
	c := imagetest.NewCrash(512, nil)
	snap := c.Snapshot()
	f := imagetest.NewFault(c, imagetest.Fault{
		Mode: imagetest.Call, Ops: imagetest.OpWrite, At: 1, Do: func() { c.Revert(snap) },
	})
	write(t, f, 0, []byte("a"))
	write(t, f, 1, []byte("b"))
	require.Equal(t, "\x00b", string(all(t, c)[:2]))
	require.Equal(t, 1, f.Hits())
}

// plain has no capabilities.
type plain struct{ image.Device }

func TestFaultCapabilities(t *testing.T) {
	f := imagetest.NewFault(plain{imagetest.NewCrash(512, nil)})
	require.ErrorIs(t, f.Resize(1), image.ErrUnsupported)
	require.ErrorIs(t, f.Discard(0, 1), image.ErrUnsupported)
	require.ErrorIs(t, f.WriteZeroes(0, 1), image.ErrUnsupported)
	require.ErrorIs(t, f.DropCache(), image.ErrUnsupported)
	_, ok := image.As[image.BlockStatuser](image.Device(f))
	require.False(t, ok)
	_, ok = image.As[image.BlockStatuser](image.Device(imagetest.NewFault(imagetest.NewCrash(512, nil))))
	require.True(t, ok)
}

func TestEachFault(t *testing.T) {
	// A workload of four operations that gives up at the first error.
	work := func(d image.Device) error {
		for i := range int64(3) {
			if _, err := d.WriteAt([]byte{1}, i); err != nil {
				return err
			}
		}
		return d.Sync()
	}
	var errs []error
	n := imagetest.EachFault(imagetest.Fault{}, func(x imagetest.Fault) int {
		f := imagetest.NewFault(imagetest.NewCrash(512, nil), x)
		errs = append(errs, work(f))
		return f.Hits()
	})
	require.Equal(t, 4, n)
	require.Len(t, errs, 5)
	require.NoError(t, errs[4])
	require.ErrorIs(t, errors.Join(errs[:4]...), imagetest.ErrInjected)
}
