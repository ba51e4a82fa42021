package image_test

import (
	"bytes"
	"io"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/raw"
)

const margin = 70_001 // unaligned on purpose

// newFrame returns a window in the middle of d, whose rest must not change.
func newFrame(t *testing.T, d image.Device, size int64) image.Device {
	for _, off := range []int64{0, margin + size} {
		_, err := d.WriteAt(bytes.Repeat([]byte{0xF0}, margin), off)
		require.NoError(t, err)
	}
	w, err := image.Window(d, margin, size)
	require.NoError(t, err)
	return w
}

func TestWindowConformance(t *testing.T) {
	t.Run("Memory", func(t *testing.T) {
		imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
			d := imagetest.NewMemory(size + 2*margin)
			w := newFrame(t, d, size)
			t.Cleanup(func() {
				c := image.Device(d.(*imagetest.CrashDevice).Reopen())
				for _, off := range []int64{0, margin + size} {
					p := make([]byte, margin)
					require.NoError(t, image.ReadFull(c, p, off))
					require.Equal(t, bytes.Repeat([]byte{0xF0}, margin), p, "outside of the window")
				}
			})
			return w
		}, nil)
	})
	t.Run("Raw", func(t *testing.T) {
		imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
			d, err := raw.Create(filepath.Join(t.TempDir(), "x"), size+2*margin, nil)
			require.NoError(t, err)
			return newFrame(t, d, size)
		}, nil)
	})
	t.Run("WindowInWindow", func(t *testing.T) {
		imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
			return newFrame(t, newFrame(t, imagetest.NewMemory(size+4*margin), size+2*margin), size)
		}, nil)
	})
	t.Run("NoCapabilities", func(t *testing.T) {
		imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
			return newFrame(t, struct{ image.Device }{imagetest.NewMemory(size + 2*margin)}, size)
		}, nil)
	})
}

func TestWindowBounds(t *testing.T) {
	d := imagetest.NewMemory(1000)
	for _, c := range []struct{ off, size int64 }{
		{-1, 5}, {0, 1001}, {1000, 1}, {1001, 0}, {5, -1}, {1 << 62, 1 << 62}, {1<<63 - 1, 1},
	} {
		w, err := image.Window(d, c.off, c.size)
		require.ErrorIs(t, err, image.ErrOutOfRange, "%+v", c)
		require.Nil(t, w)
	}
	w, err := image.Window(d, 1000, 0)
	require.NoError(t, err)
	n, err := w.ReadAt(make([]byte, 1), 0)
	require.Zero(t, n)
	require.Equal(t, io.EOF, err)
}

func TestWindowHidesWhatIsntItsOwn(t *testing.T) {
	d := imagetest.NewCrash(1000, nil)
	w, err := image.Window(d, 100, 500)
	require.NoError(t, err)
	_, ok := w.(image.Wrapper)
	require.False(t, ok, "it moves addresses")
	_, ok = image.As[*imagetest.CrashDevice](w)
	require.False(t, ok)
	_, ok = image.As[image.Snapshotter](w)
	require.False(t, ok)
	require.ErrorIs(t, w.(image.Resizer).Resize(5), image.ErrUnsupported)
	require.NoError(t, w.Close())
	require.ErrorIs(t, d.Close(), image.ErrClosed)
}

func TestWindowOverACutDevice(t *testing.T) {
	d := imagetest.NewCrash(1000, nil)
	w, err := image.Window(d, 100, 500)
	require.NoError(t, err)
	require.NoError(t, d.Resize(300))
	n, err := w.ReadAt(make([]byte, 500), 0)
	require.Equal(t, 200, n)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF, "inside of the window: not its end")
	_, err = w.WriteAt(make([]byte, 201), 0)
	require.ErrorIs(t, err, image.ErrOutOfRange)
}

func TestWindowPassesCapabilitiesOn(t *testing.T) {
	d := imagetest.NewFault(imagetest.NewCrash(1<<20, nil))
	w, err := image.Window(d, 4096, 1<<19)
	require.NoError(t, err)
	_, err = w.WriteAt([]byte{1}, 65536)
	require.NoError(t, err)
	e, err := w.(image.BlockStatuser).BlockStatus(0, 1<<19)
	require.NoError(t, err)
	require.Equal(t, image.Extent{Start: 0, Length: 65536, Zero: true, Offset: -1}, e)
	e, err = w.(image.BlockStatuser).BlockStatus(65540, 1<<18)
	require.NoError(t, err)
	require.Equal(t, image.Extent{Start: 65540, Length: 4092, Allocated: true, Offset: 4096 + 65540}, e)

	require.NoError(t, w.(image.Discarder).Discard(0, 512))
	require.NoError(t, w.(image.ZeroWriter).WriteZeroes(0, 100))
	require.NoError(t, w.(image.CacheDropper).DropCache())
	require.NoError(t, w.Sync())
	require.Equal(t, imagetest.Trace{
		Writes: 1, BytesWritten: 1, Syncs: 1, CacheDrops: 1,
		Discards: 1, BytesDiscarded: 512, ZeroWrites: 1, BytesZeroed: 100,
	}, d.Trace())
}
