package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qtest"
)

// QEMU takes what live args prints: for a store in a raw or qcow2 file, and in
// the tail of a machine's disk, each device has its window, and what is written
// to it is in the blob.
func TestLiveArgs(t *testing.T) {
	nvtool := func(t *testing.T, args ...string) []byte {
		t.Helper()
		var out, errs bytes.Buffer
		require.Zero(t, run(args, &out, &errs), "nvtool %q: %s", args, &errs)
		return out.Bytes()
	}
	for _, board := range []struct {
		binary, machine string
		blobs           map[string]int
	}{
		{"qemu-system-x86_64", "q35", map[string]int{"uefi/vars": 528 << 10, "net0/nvm": 300}},
		{"qemu-system-arm", "ast2600-evb", map[string]int{"i2c/8-0050/eeprom": 8192, "i2c/3-0051/eeprom": 512, "spi/0/flash": 64 << 20}},
		{"qemu-system-ppc64", "pseries", map[string]int{"spapr/nvram": 64 << 10}},
	} {
		for _, make := range [][]string{{"create", "-f", "raw"}, {"create", "-f", "qcow2"}, {"vm", "create", "--disk", "1M", "--max-disk", "1G", "--state", "96M"}} {
			if testing.Short() && make[0] != "vm" {
				continue
			}
			t.Run(board.machine+"/"+make[len(make)-1], func(t *testing.T) {
				dir, err := os.MkdirTemp("", "live")
				require.NoError(t, err)
				t.Cleanup(func() { os.RemoveAll(dir) })
				img := filepath.Join(dir, "img")
				nvtool(t, append(make, img)...)
				for name, size := range board.blobs {
					nvtool(t, "put", img, name, "/dev/null", "--live", "--size", fmt.Sprint(size))
				}
				nvtool(t, "live", "attach", img)
				var printed struct {
					Blockdev []json.RawMessage
					Live     []struct {
						Name     string
						Options  []string
						Device   bool
						Blockdev struct {
							Node string `json:"node-name"`
						}
					}
				}
				require.NoError(t, json.Unmarshal(nvtool(t, "live", "args", img, "--json"), &printed))
				args := []string{"-nodefaults", "-machine", board.machine}
				for _, b := range printed.Blockdev {
					args = append(args, "-blockdev", string(b))
				}
				for _, l := range printed.Live {
					require.Equal(t, l.Name != "net0/nvm", l.Device, l.Name)
					args = append(args, l.Options...)
				}
				require.Len(t, printed.Live, len(board.blobs))
				m, err := qtest.Start(board.binary, args...)
				require.NoError(t, err)
				defer m.Close()
				for i, l := range printed.Live {
					said, err := m.HMP(fmt.Sprintf(`qemu-io %s "write -P %d 100 50"`, l.Blockdev.Node, i+1))
					require.NoError(t, err)
					require.NotContains(t, said, "rror")
				}
				require.NoError(t, m.Quit())
				nvtool(t, "live", "detach", img)
				nvtool(t, "check", img)
				for i, l := range printed.Live {
					p := nvtool(t, "get", img, l.Name)
					require.Equal(t, bytes.Repeat([]byte{byte(i + 1)}, 50), p[100:150], l.Name)
					require.Len(t, p, board.blobs[l.Name])
				}
			})
		}
	}
}
