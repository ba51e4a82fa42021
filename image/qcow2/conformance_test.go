package qcow2_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

func TestConformance(t *testing.T) {
	for _, v := range []int{2, 3} {
		for _, cs := range clusterSizes {
			t.Run(fmt.Sprintf("%d-v%d", cs, v), func(t *testing.T) {
				files := map[image.Device]*keep{}
				reopen := func(t *testing.T, d image.Device, ro bool) image.Device {
					f := files[d]
					require.NotNil(t, f)
					require.NoError(t, d.Close())
					if cs < 2<<20 {
						checkDevice(t, f, nil)
					}
					im, err := qcow2.Open(f, &qcow2.OpenOptions{ReadOnly: ro})
					require.NoError(t, err)
					files[im] = f
					return im
				}
				imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
					im, f := create(t, &qcow2.CreateOptions{Size: size, ClusterSize: cs, Version: v})
					files[im] = f
					return im
				}, &imagetest.ConformanceOptions{
					Granule:  512,
					Reopen:   func(t *testing.T, d image.Device) image.Device { return reopen(t, d, false) },
					ReadOnly: func(t *testing.T, d image.Device) image.Device { return reopen(t, d, true) },
				})
			})
		}
	}
}

// A fixed device is as large as it is, and full of an older image.
func TestCreateOnFixedDevice(t *testing.T) {
	d := &keep{imagetest.NewCrash(1<<20, &imagetest.CrashOptions{Fixed: true})}
	junk := make([]byte, 1<<20)
	for i := range junk {
		junk[i] = 0xee
	}
	_, err := d.WriteAt(junk, 0)
	require.NoError(t, err)
	im, err := qcow2.Create(d, &qcow2.CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	require.NoError(t, err)
	want := make([]byte, 4<<20)
	copy(want[10000:], "in the middle of a cluster")
	_, err = im.WriteAt([]byte("in the middle of a cluster"), 10000)
	require.NoError(t, err)
	require.NoError(t, im.Close())
	checkDevice(t, d, want)
	im = open(t, d)
	_, err = im.WriteAt(junk, 1<<20)
	require.ErrorIs(t, err, image.ErrNoSpace)
	_, err = im.WriteAt([]byte("still usable"), 10000)
	require.NoError(t, err)
	require.NoError(t, im.Sync())
	require.NoError(t, im.Discard(0, 4<<20))
	require.NoError(t, im.Sync())
	noErrors(t, im, false)
	_, err = im.WriteAt(junk[:512<<10], 1<<20)
	require.NoError(t, err)
	require.NoError(t, im.Close())
	checkDevice(t, d, nil)

	_, err = qcow2.Create(&keep{imagetest.NewCrash(1024, &imagetest.CrashOptions{Fixed: true})}, nil)
	require.ErrorIs(t, err, image.ErrNoSpace)
}
