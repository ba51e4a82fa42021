package qcow2_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

var clusterSizes = []int{512, 4096, 65536, 2 << 20}

func TestWriteReadReopen(t *testing.T) {
	for _, v := range []int{2, 3} {
		for _, cs := range clusterSizes {
			im, d := create(t, &qcow2.CreateOptions{Size: 10 << 20, ClusterSize: cs, Version: v})
			want := make([]byte, 10<<20)
			for _, off := range []int{0, 1000, 65536 - 7, 4<<20 + 511, 10<<20 - 5000} {
				p := bytes.Repeat([]byte{byte(off/3 + 1)}, 5000)
				copy(want[off:], p)
				n, err := im.WriteAt(p, int64(off))
				require.NoError(t, err)
				require.Equal(t, len(p), n)
			}
			require.True(t, bytes.Equal(want, contents(t, im)))
			require.NoError(t, im.Sync())
			noErrors(t, im, false)
			require.NoError(t, im.Close())
			checkDevice(t, d, want)
			im = open(t, d)
			require.True(t, bytes.Equal(want, contents(t, im)))
			require.NoError(t, im.Resize(40<<20))
			_, err := im.WriteAt([]byte("end"), 40<<20-3)
			require.NoError(t, err)
			want = append(want, make([]byte, 30<<20)...)
			copy(want[40<<20-3:], "end")
			noErrors(t, im, false)
			require.NoError(t, im.Close())
			checkDevice(t, d, want)
		}
	}
}

func TestSnapshots(t *testing.T) {
	for _, v := range []int{2, 3} {
		for _, cs := range clusterSizes {
			im, d := create(t, &qcow2.CreateOptions{Size: 3 << 20, ClusterSize: cs, Version: v})
			a := bytes.Repeat([]byte{1}, 3<<20)
			_, err := im.WriteAt(a, 0)
			require.NoError(t, err)
			s := im.Snapshots()
			require.NoError(t, s.Create("a"))
			require.ErrorIs(t, s.Create("a"), image.ErrExist)
			require.NoError(t, s.Create("a2"))
			b := bytes.Clone(a)
			copy(b[70000:], bytes.Repeat([]byte{2}, 100000))
			_, err = im.WriteAt(b[70000:170000], 70000)
			require.NoError(t, err)
			require.NoError(t, s.Create("b"))
			require.True(t, bytes.Equal(b, contents(t, im)))
			require.NoError(t, s.Revert("a"))
			require.True(t, bytes.Equal(a, contents(t, im)))
			noErrors(t, im, false)
			require.NoError(t, im.Close())
			checkDevice(t, d, a)
			im = open(t, d)
			s = im.Snapshots()
			require.NoError(t, s.Delete("1"))
			require.ErrorIs(t, s.Delete("a"), image.ErrNotFound)
			require.NoError(t, s.Revert("b"))
			require.True(t, bytes.Equal(b, contents(t, im)))
			noErrors(t, im, false)
			require.NoError(t, im.Close())
			checkDevice(t, d, b)
			im = open(t, d)
			s = im.Snapshots()
			list, err := s.List()
			require.NoError(t, err)
			require.Len(t, list, 2)
			require.NoError(t, s.Delete("b"))
			require.NoError(t, s.Delete("a2"))
			noErrors(t, im, false)
			require.NoError(t, im.Close())
			checkDevice(t, d, b)
		}
	}
}

// TestIncompleteCluster has a file that ends inside its last cluster, as QEMU
// leaves it, and a file that was cut.
func TestIncompleteCluster(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 1 << 20})
	_, err := im.WriteAt(bytes.Repeat([]byte{1}, 200_000), 0)
	require.NoError(t, err)
	require.NoError(t, im.Close())
	r, _ := image.As[image.Resizer](d)
	require.NoError(t, r.Resize(d.Size()-65536+1000))
	im = open(t, d)
	noErrors(t, im, false)
	want := contents(t, im)
	require.Equal(t, byte(0), want[199_000])
	p := bytes.Repeat([]byte{2}, 150_000)
	_, err = im.WriteAt(p, 60_000)
	require.NoError(t, err)
	copy(want[60_000:], p)
	require.True(t, bytes.Equal(want, contents(t, im)))
	require.NoError(t, im.Close())
	checkDevice(t, d, want)

	require.NoError(t, r.Resize(d.Size()-100_000))
	im, err = qcow2.Open(d, &qcow2.OpenOptions{ReadOnly: true})
	require.NoError(t, err)
	_, err = im.ReadAt(make([]byte, 200_000), 0)
	require.ErrorIs(t, err, image.ErrCorrupt)
	require.ErrorContains(t, err, "inside the file")
}
