package uefi_test

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/console"
	"nvstore.dev/vpd/uefi"
)

// OVMF boots by the boot entry of the store that we packed and edited, reads
// our variables, changes one and adds its own; what it leaves is good, keeps the
// rest, and comes out again byte for byte.
func TestOVMFBootsOnOurStore(t *testing.T) {
	image, _, err := f.Pack(read(t, "machine.uefi.jsonc"))
	require.NoError(t, err)
	image, _, err = uefi.Set(image, uefi.Variable{Name: "Edited", GUID: ours, Attr: 7, Data: []byte("by nvstore")})
	require.NoError(t, err)
	image, _, err = uefi.Set(image, uefi.Variable{Name: "Serial", GUID: ours, Attr: 3, Data: []byte("NVS-0002")})
	require.NoError(t, err)
	image, _, err = uefi.Set(image, uefi.Variable{Name: "Dropped", GUID: ours, Attr: 3, Data: []byte("gone")})
	require.NoError(t, err)
	image, _, err = uefi.Delete(image, "Dropped", ours)
	require.NoError(t, err)
	path := filepath.Join(t.TempDir(), "vars.fd")
	require.NoError(t, os.WriteFile(path, image, 0o600))

	m, err := console.Start("qemu-system-x86_64", "-machine", "q35,accel=tcg", "-m", "256", "-display", "none", "-nodefaults",
		"-serial", "stdio", "-net", "none",
		"-drive", "if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
		"-drive", "if=pflash,format=raw,file="+path)
	require.NoError(t, err)
	defer m.Close()
	// The entry's file isn't there, so the boot manager says which entry it
	// was, and goes on to the shell.
	require.NoError(t, m.WaitFor(`failed to load Boot0007 "nvstore test entry" from \nvstore.efi: Not Found`))
	require.NoError(t, m.WaitFor("or any other key to continue"))
	require.NoError(t, m.Type("\r"))
	require.NoError(t, m.WaitFor("Shell> "))
	shown, err := m.Run("dmpstore -guid "+ours, "Shell> ")
	require.NoError(t, err)
	for _, line := range []string{":Serial' DataSize = 0x08", "4E 56 53 2D 30 30 30 32", "NV+BS '", ":Edited' DataSize = 0x0A", "NV+RT+BS '",
		"62 79 20 6E 76 73 74 6F-72 65", ":Private' DataSize = 0x03", "NV+RT+BS+AT '"} {
		require.Contains(t, shown, line)
	}
	require.NotContains(t, shown, "Dropped")
	_, err = m.Run("setvar Edited -guid "+ours+" -nv -bs -rt =L\"ok\"", "Shell> ")
	require.NoError(t, err)
	require.NoError(t, m.Type("reset -s\r"))
	require.NoError(t, m.Wait())

	after := readFile(t, path)
	require.Empty(t, f.Verify(after))
	list, err := uefi.Variables(after)
	require.NoError(t, err)
	require.Greater(t, len(list), 9) // the firmware's own are there
	got := map[string]string{}
	for _, v := range list {
		got[v.Name] = string(v.Data)
	}
	require.Equal(t, "NVS-0002", got["Serial"])
	require.Equal(t, "o\x00k\x00", got["Edited"])
	require.Equal(t, "\x01\x02\x03", got["Private"])
	require.True(t, strings.HasPrefix(got["BootOrder"], "\x07\x00"), "%x", got["BootOrder"])
	require.NotContains(t, got, "Dropped")
	spec, _, err := f.Parse(after)
	require.NoError(t, err)
	again, _, err := f.Pack(spec)
	require.NoError(t, err)
	require.True(t, bytes.Equal(after, again))
}
