package nbd_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/nbd"
)

// The client is a Device, whoever serves.
func TestConformance(t *testing.T) {
	for name, s := range map[string]struct {
		granule int64
		serve   func(t *testing.T, n int64) string
	}{
		"qemu-nbd": {512, func(t *testing.T, n int64) string {
			return qemuNBD(t, blank(t, n), "--discard=unmap", "--detect-zeroes=unmap").uri("")
		}},
		"nbdkit memory": {1, func(t *testing.T, n int64) string { return nbdkit(t, "memory", size(n)).uri("") }},
		"nbdkit file":   {1, func(t *testing.T, n int64) string { return nbdkit(t, "file", blank(t, n)).uri("") }},
		"nbdkit, blocks of 4096": {4096, func(t *testing.T, n int64) string {
			return nbdkit(t, "--filter=blocksize-policy", "memory", size(n), "blocksize-minimum=4096", "blocksize-error-policy=error").uri("")
		}},
		"nbdkit, simple replies": {1, func(t *testing.T, n int64) string { return nbdkit(t, "--no-sr", "memory", size(n)).uri("") }},
		"nbdkit, bare": {1, func(t *testing.T, n int64) string {
			return nbdkit(t, "--filter=nozero", "--filter=noextents", "memory", size(n), "zeromode=none").uri("")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			uris := map[image.Device]string{}
			imagetest.Conformance(t, func(t *testing.T, n int64) image.Device {
				uri := s.serve(t, n)
				d := open(t, uri, nil)
				uris[d] = uri
				return d
			}, &imagetest.ConformanceOptions{
				Granule: s.granule,
				Reopen: func(t *testing.T, d image.Device) image.Device {
					require.NoError(t, d.Close())
					again := open(t, uris[d], nil)
					uris[again] = uris[d]
					return again
				},
				ReadOnly: func(t *testing.T, d image.Device) image.Device {
					require.NoError(t, d.Close())
					return open(t, uris[d], &nbd.Options{ReadOnly: true})
				},
			})
		})
	}
}
