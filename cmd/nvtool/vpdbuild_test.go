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

// nvtool runs a command line, and returns its standard output.
func nvtool(t *testing.T, args ...string) []byte {
	var out, errs bytes.Buffer
	require.Zero(t, run(args, &out, &errs), "%v: %s", args, errs.String())
	return out.Bytes()
}

// extent returns where a blob lies in its image, in one piece.
func extent(t *testing.T, image, blob string) (off, size int64) {
	var m struct {
		Regions []struct {
			Offset, Length int64
			Kind, Blob     string
		}
	}
	require.NoError(t, json.Unmarshal(nvtool(t, "map", image, "--json"), &m))
	for _, r := range m.Regions {
		if r.Blob != blob || r.Kind != "chunk" {
			continue
		}
		if size == 0 {
			off = r.Offset
		}
		require.Equal(t, off+size, r.Offset, "%s lies in one piece", blob)
		size += r.Length
	}
	require.NotZero(t, size, "%s isn't in the map", blob)
	return off, size
}

// The EEPROMs of a BMC machine, built from a manifest into a qcow2, as an
// AST2600 in QEMU reads them over I2C: from windows into that qcow2.
func TestBMCReadsItsEEPROMs(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "bmc.qcow2")
	nvtool(t, "vpd", "build", "../../fixtures/machine/bmc.jsonc", "-o", image)
	before, err := os.ReadFile(image)
	require.NoError(t, err)

	eeproms := []struct {
		bus      int
		addr     byte
		addrSize int // bytes of an address in the memory
	}{{3, 0x50, 2}, {3, 0x51, 2}, {9, 0x56, 2}, {12, 0x50, 2}}
	args := []string{"-M", "ast2600-evb", "-nodefaults", "-blockdev", "driver=qcow2,node-name=store,file.driver=file,file.filename=" + image}
	var want [][]byte
	for i, e := range eeproms {
		want = append(want, nvtool(t, "get", image, blobName(e.bus, e.addr)))
		off, size := extent(t, image, blobName(e.bus, e.addr))
		require.Zero(t, off%4096)
		args = append(args,
			"-blockdev", fmt.Sprintf("driver=raw,node-name=e%d,file=store,offset=%d,size=%d", i, off, size),
			"-device", fmt.Sprintf("at24c-eeprom,bus=aspeed.i2c.bus.%d,address=%#x,drive=e%d,rom-size=%d", e.bus, e.addr, i, size))
	}
	m, err := qtest.Start("qemu-system-arm", args...)
	require.NoError(t, err)
	defer m.Close()
	for i, e := range eeproms {
		bus, err := m.AspeedI2C(e.bus)
		require.NoError(t, err)
		got, err := bus.EEPROM(e.addr, e.addrSize, min(len(want[i]), 2048))
		require.NoError(t, err)
		require.Equal(t, want[i][:len(got)], got, "%s", blobName(e.bus, e.addr))
	}
	require.NoError(t, m.Quit())

	// What was read is what the manifest says, and reading changed nothing.
	require.Equal(t, "NVS000042-R\n", string(nvtool(t, "vpd", "get", image, blobName(3, 0x51), "board.serial_number")))
	after, err := os.ReadFile(image)
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, after))
	nvtool(t, "check", image)
}

// An EEPROM that a manifest asks for as a live extent, in the tail of a machine's
// disk: the board reads it and writes it, and it is a blob again afterwards.
func TestBMCWritesALiveEEPROM(t *testing.T) {
	image := filepath.Join(t.TempDir(), "bmc.qcow2")
	manifest := image + ".jsonc"
	require.NoError(t, os.WriteFile(manifest, []byte(`{"manifest": 1, "store": {"disk": "64M"}, "blobs": {"i2c/3-0050/eeprom":
		{"spec": {"format": "fru", "board": {"serial_number": "NVS7"}}, "size": 8192, "live": true}}}`), 0o600))
	nvtool(t, "vpd", "build", manifest, "-o", image)
	want := nvtool(t, "get", image, blobName(3, 0x50))
	nvtool(t, "live", "attach", image)
	var printed struct {
		Blockdev []json.RawMessage
		Live     []struct{ Options []string }
	}
	require.NoError(t, json.Unmarshal(nvtool(t, "live", "args", image, "--json"), &printed))
	args := []string{"-M", "ast2600-evb", "-nodefaults"}
	for _, b := range printed.Blockdev {
		args = append(args, "-blockdev", string(b))
	}
	m, err := qtest.Start("qemu-system-arm", append(args, printed.Live[0].Options...)...)
	require.NoError(t, err)
	defer m.Close()
	bus, err := m.AspeedI2C(3)
	require.NoError(t, err)
	got, err := bus.EEPROM(0x50, 2, len(want))
	require.NoError(t, err)
	require.Equal(t, want, got)
	require.NoError(t, bus.Write(0x50, []byte{0x1f, 0, 0xaa}))
	require.NoError(t, m.Quit())
	nvtool(t, "live", "detach", image)
	nvtool(t, "check", image)
	want[0x1f00] = 0xaa
	require.Equal(t, want, nvtool(t, "get", image, blobName(3, 0x50)))
}

func blobName(bus int, addr byte) string { return fmt.Sprintf("i2c/%d-%04x/eeprom", bus, addr) }
