package raw_test

import (
	"bytes"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/raw"
)

// loop returns a block device of size zero bytes.
func loop(t *testing.T, size int64) string {
	t.Helper()
	file := temp(t)
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	require.NoError(t, os.Truncate(file, size))
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	require.NoError(t, err, "%s", out)
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		out, err := exec.Command("losetup", "--detach", dev).CombinedOutput()
		require.NoError(t, err, "%s", out)
	})
	return dev
}

func TestBlockDevice(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root makes block devices")
	}
	t.Run("Conformance", func(t *testing.T) {
		imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
			return open(t, loop(t, size), nil)
		}, &imagetest.ConformanceOptions{
			Granule: 512,
			Reopen: func(t *testing.T, d image.Device) image.Device {
				require.NoError(t, d.Close())
				return open(t, d.(*raw.Device).Path(), nil)
			},
		})
	})
	dev := loop(t, 1<<20)
	d := open(t, dev, nil)
	require.EqualValues(t, 1<<20, d.Size())
	require.ErrorIs(t, d.Resize(1<<21), image.ErrUnsupported)
	_, err := raw.Open(dev, nil)
	require.ErrorIs(t, err, image.ErrLocked)
	_, err = d.WriteAt(bytes.Repeat([]byte{1}, 20_000), 0)
	require.NoError(t, err)
	require.NoError(t, d.WriteZeroes(1000, 10_000))
	p := make([]byte, 20_000)
	require.NoError(t, image.ReadFull(d, p, 0))
	want := bytes.Repeat([]byte{1}, 20_000)
	clear(want[1000:11_000])
	require.Equal(t, want, p)
	require.NoError(t, d.Close())
	_, err = raw.Create(dev, 5, &raw.Options{Overwrite: true})
	require.ErrorIs(t, err, image.ErrUnsupported)
}
