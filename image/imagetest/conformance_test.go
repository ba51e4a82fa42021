package imagetest_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
)

func crashFactory(o *imagetest.CrashOptions) func(*testing.T, int64) image.Device {
	return func(t *testing.T, size int64) image.Device { return imagetest.NewCrash(size, o) }
}

func TestConformance(t *testing.T) {
	reopen := &imagetest.ConformanceOptions{
		Reopen: func(t *testing.T, d image.Device) image.Device {
			c, ok := image.As[*imagetest.CrashDevice](d)
			require.True(t, ok)
			return c.Reopen()
		},
	}
	t.Run("Crash", func(t *testing.T) { imagetest.Conformance(t, crashFactory(nil), reopen) })
	t.Run("Fixed", func(t *testing.T) {
		imagetest.Conformance(t, crashFactory(&imagetest.CrashOptions{Fixed: true}), reopen)
	})
	t.Run("DiscardKeeps", func(t *testing.T) {
		imagetest.Conformance(t, crashFactory(&imagetest.CrashOptions{Discard: imagetest.DiscardKeeps}), nil)
	})
	t.Run("DiscardGarbage", func(t *testing.T) {
		imagetest.Conformance(t, crashFactory(&imagetest.CrashOptions{Discard: imagetest.DiscardGarbage}), nil)
	})
	t.Run("Memory", func(t *testing.T) {
		imagetest.Conformance(t, func(t *testing.T, size int64) image.Device { return imagetest.NewMemory(size) }, nil)
	})
	t.Run("Fault", func(t *testing.T) {
		imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
			return imagetest.NewFault(imagetest.NewCrash(size, nil))
		}, nil)
	})
	t.Run("FaultOverPlain", func(t *testing.T) {
		imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
			return imagetest.NewFault(plain{imagetest.NewMemory(size)})
		}, nil)
	})
	t.Run("PowerCutAfterSync", func(t *testing.T) {
		o := &imagetest.ConformanceOptions{Reopen: func(t *testing.T, d image.Device) image.Device {
			c := d.(*imagetest.CrashDevice)
			require.NoError(t, c.Sync())
			return c.PowerCut(nil)
		}}
		imagetest.Conformance(t, crashFactory(nil), o)
	})
}
