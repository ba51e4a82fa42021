package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf16"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/internal/qmp"
	"nvstore.dev/nvstore"
)

var nvtoolProgram = sync.OnceValues(func() (string, error) {
	path := filepath.Join(shared, "nvtool")
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, "../nvtool")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

func nvtool(t testing.TB, args ...string) string {
	t.Helper()
	path, err := nvtoolProgram()
	require.NoError(t, err)
	cmd := exec.Command(path, args...)
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	require.NoError(t, err, "nvtool %s: %s", strings.Join(args, " "), &said)
	return string(out)
}

const eeprom = "i2c/8-0050/eeprom"

// made is a machine's disk as the README has it made, with UEFI variables and
// an EEPROM as live extents beside the TPM's state.
func made(t testing.TB) *layout {
	t.Helper()
	dir := t.TempDir()
	disk, key := dir+"/vm.qcow2", dir+"/key"
	require.NoError(t, os.WriteFile(key, rawKey, 0o600))
	require.NoError(t, os.WriteFile(dir+"/eeprom", make([]byte, 4096), 0o600))
	nvtool(t, "vm", "create", disk, "--disk", "64M", "--key-file", key)
	nvtool(t, "put", disk, "uefi/vars", "/usr/share/OVMF/OVMF_VARS_4M.fd", "--live", "--plain", "--key-file", key)
	nvtool(t, "put", disk, eeprom, dir+"/eeprom", "--live", "--plain", "--key-file", key)
	nvtool(t, "live", "attach", disk, "--key-file", key)
	l := &layout{store: []string{"--store", disk, "--key-file", key}, nodes: []string{"nvstore-disk"}, disk: disk, state: disk}
	args := strings.Fields(strings.ReplaceAll(nvtool(t, "vm", "args", disk), "\\\n", " "))
	for i := 1; i < len(args); i++ {
		switch a := args[i]; {
		case a == "-qmp":
			i++ // the test has its own
		case strings.HasPrefix(a, "at24c-eeprom,"):
			// Of an Aspeed machine, and it hangs when a snapshot is loaded
			// (QEMU 7.2). The live extent is the same behind another device.
			_, node, ok := strings.Cut(a, "drive=")
			require.True(t, ok, a)
			node, _, _ = strings.Cut(node, ",")
			l.drives = append(l.drives, "virtio-blk-pci,share-rw=on,drive="+node)
		default:
			l.drives = append(l.drives, a)
		}
	}
	return l
}

// TestLiveDevices: all that the machine keeps is in its one disk, and agrees
// after each snapshot and each load: the guest's memory, its disk, the TPM, a
// UEFI variable, and an EEPROM.
func TestLiveDevices(t *testing.T) {
	if testing.Short() {
		t.Skip("the firmware takes long to boot; TestLive is the same without it")
	}
	l := made(t)
	lm := goLive(t, l, export)
	lm.beginning()
	rounds := imagetest.Scale(2)
	for i := range rounds {
		lm.do("loop")
		time.Sleep(100 * time.Millisecond)
		lm.do("stop") // TestLive saves in the middle of writes
		lm.snapshot("snapshot-save", "s")
		saved := lm.do("agree")
		lm.do("loop")
		time.Sleep(100 * time.Millisecond)
		require.Equal(t, saved, lm.revert("s"), "round %d", i)
		lm.snapshot("snapshot-delete", "s")
	}
	require.Len(t, strings.Fields(lm.do("numbers")), 4, "TPM, disk, EEPROM, variable")
	var last uint64
	_, err := fmt.Sscan(lm.do("agree"), &last)
	require.NoError(t, err)
	t.Logf("%d rounds; the guest wrote %d times; %d loads cut through a commit, and were done again", rounds, last, lm.cut)
	lm.end()

	// And in the image, when the machine is off.
	nvtool(t, append([]string{"live", "detach", l.disk}, l.store[2:]...)...)
	nvtool(t, append([]string{"check", l.disk}, l.store[2:]...)...)
	require.Equal(t, last, stored(t, l))
	cred, err := keyslot.RawKey(rawKey)
	require.NoError(t, err)
	s, err := nvstore.Open(l.disk, &nvstore.Options{Key: cred, ReadOnly: true})
	require.NoError(t, err)
	defer s.Close()
	p, err := s.Get(eeprom)
	require.NoError(t, err)
	require.Equal(t, last, binary.BigEndian.Uint64(p))
	vars, err := s.Get("uefi/vars")
	require.NoError(t, err)
	require.True(t, bytes.Contains(vars, binary.BigEndian.AppendUint64(utf16z("NvstoreRound"), last)), "the variable's last value")
}

// TestLiveReadme: what the README has typed starts a machine whose disk has its
// TPM's state, with a monitor for nvtpm and one for nvtool.
func TestLiveReadme(t *testing.T) {
	tool, err := nvtoolProgram()
	require.NoError(t, err)
	disk := created(t, nil)
	p := start(t, "", append([]string{"--tpm2", "--ctrl", "type=unixio,path=DIR/tpm.sock", "--log", "fd=2,level=5",
		"--live", "nbd+unix:///nv?socket=DIR/nbd.sock", "--qmp", "DIR/tpm.qmp", "--export", "nv"}, disk.store...)...)
	p.dial("tpm.sock").Close()
	line := fmt.Sprintf(`eval "exec $('%s' vm args '%s' --qmp q --qmp tpm.qmp --tpm tpm.sock -- -M q35 -nodefaults -display none -m 64)"`, tool, disk.disk)
	cmd := exec.Command("sh", "-c", line)
	cmd.Dir = p.dir
	var said syncBuffer
	cmd.Stdout, cmd.Stderr = &said, &said
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill() })
	m := &machine{t: t, dir: p.dir}
	mon, err := qmp.New(t.Context(), m.dial("q"), nil)
	require.NoError(t, err)
	waitLog(t, p, "command 0x182: response code 0x0") // the firmware measures
	require.NoError(t, mon.Close())
	nvtool(t, "vm", "snapshot", "--qmp", p.dir+"/q", "one")
	mon, err = qmp.New(t.Context(), m.dial("q"), nil)
	require.NoError(t, err)
	require.NoError(t, mon.Do(t.Context(), "quit", nil, nil))
	require.NoError(t, cmd.Wait(), "%s", &said)
	require.Zero(t, p.code(), "%s", &p.out)
	require.Contains(t, nvtool(t, "vm", "ls", disk.disk), "one")
	nvtool(t, append([]string{"check", disk.disk}, disk.store[2:]...)...)
}

func utf16z(s string) []byte {
	var b []byte
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
