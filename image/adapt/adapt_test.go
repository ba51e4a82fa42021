package adapt_test

import (
	"bytes"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"testing/fstest"

	limaconvert "github.com/lima-vm/go-qcow2reader/convert"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/adapt"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// newImage is a zstd qcow2, which go-qcow2reader doesn't read by itself.
func newImage(t *testing.T) (*qcow2.Image, []byte) {
	im, err := qcow2.Create(imagetest.NewMemory(0), &qcow2.CreateOptions{Size: 3 << 20, Compression: "zstd"})
	require.NoError(t, err)
	want := make([]byte, 3<<20)
	rng := rand.New(rand.NewPCG(imagetest.Seed(t), 0))
	for off := 0; off < len(want); off += 64 << 10 {
		p := want[off : off+64<<10]
		switch rng.IntN(3) {
		case 0:
			for i := range p {
				p[i] = byte(rng.Uint32() & 15)
			}
			_, err = im.WriteCompressed(p, int64(off))
		case 1:
			for i := range p {
				p[i] = byte(rng.Uint32())
			}
			_, err = im.WriteAt(p, int64(off))
		}
		require.NoError(t, err)
	}
	return im, want
}

// lima's own converter copies what it gets through the adapter.
func TestLima(t *testing.T) {
	im, want := newImage(t)
	d := adapt.Lima(im, "qcow2")
	require.Equal(t, "qcow2", string(d.Type()))
	require.NoError(t, d.Readable())
	path := filepath.Join(t.TempDir(), "x")
	f, err := os.Create(path)
	require.NoError(t, err)
	require.NoError(t, f.Truncate(d.Size()))
	require.NoError(t, limaconvert.Convert(f, d, limaconvert.Options{}))
	require.NoError(t, f.Close())
	got, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
	for _, r := range [][2]int64{{-1, 1}, {0, 0}, {0, 4 << 20}} {
		_, err := d.Extent(r[0], r[1])
		require.ErrorIs(t, err, image.ErrOutOfRange)
	}
	e, err := adapt.Lima(struct{ image.Device }{im}, "raw").Extent(5, 10)
	require.NoError(t, err)
	require.True(t, e.Allocated && !e.Zero && e.Length == 10)
	require.NoError(t, d.Close())
	require.ErrorIs(t, im.Close(), image.ErrClosed)
}

func TestFS(t *testing.T) {
	im, want := newImage(t)
	fsys := adapt.FS("disk", im)
	require.NoError(t, fstest.TestFS(fsys, "disk"))
	got, err := fs.ReadFile(fsys, "disk")
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
	require.NoError(t, im.Close())
}
