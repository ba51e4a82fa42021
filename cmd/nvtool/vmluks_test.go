package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qtest"
)

// An encryptedMachine has its disk in a LUKS container, or in a qcow2 that is
// encrypted by itself.
type encryptedMachine struct {
	*liveMachine
	image []string // arguments that say which image, and how it opens
}

func newEncrypted(t *testing.T, contained bool) *encryptedMachine {
	t.Helper()
	dir := t.TempDir()
	disk, pass := filepath.Join(dir, "disk"), filepath.Join(dir, "pass")
	require.NoError(t, os.WriteFile(pass, []byte("correct horse"), 0o600))
	size := []string{"--state", "4M", "--max-disk", "1G", "-q"}
	m := &encryptedMachine{&liveMachine{t: t, disk: disk}, []string{"-f", "qcow2", disk, "--secret-file", pass}}
	if !contained {
		runOK(t, "img", "create", "-q", "-f", "qcow2", "-o", "encrypt.format=luks,encrypt.iter-time=10", "--secret-file", pass, disk, "8M")
		runOK(t, m.with(append(size, "vm", "adopt")...)...)
		return m
	}
	m.image = []string{"--image-opts", "driver=qcow2,file.driver=luks,file.key-secret=k,file.file.filename=" + disk, "--secret-file", "k=" + pass}
	runOK(t, append(size, "vm", "create", disk+".plain", "--disk", "8M")...)
	runOK(t, "img", "convert", "-q", "-f", "raw", "-O", "luks", "-o", "iter-time=10", "--secret-file", pass, disk+".plain", disk)
	return m
}

func (m *encryptedMachine) with(verb ...string) []string { return append(verb, m.image...) }

func (m *encryptedMachine) start() {
	m.t.Helper()
	require.NoError(m.t, json.Unmarshal([]byte(runOK(m.t, m.with("vm", "args", "--json")...)), &m.args))
	var err error
	m.Machine, err = qtest.Start(m.args.QEMU, append([]string{"-nodefaults", "-m", "16", "-accel", "tcg"}, m.args.Args...)...)
	require.NoError(m.t, err)
	m.t.Cleanup(func() { _ = m.Close() })
}

// put stores a blob through QEMU.
func (m *encryptedMachine) put(text string) {
	m.t.Helper()
	file := filepath.Join(m.t.TempDir(), "blob")
	require.NoError(m.t, os.WriteFile(file, []byte(text), 0o600))
	runOK(m.t, "vm", "attach", "--qmp", m.args.QMP, "--", "nvtool", "put", "-q", "{}", "a", file)
}

// has demands what blob and disk are when the machine is off, or in a snapshot.
func (m *encryptedMachine) has(text string, more ...string) {
	m.t.Helper()
	require.Equal(m.t, text, runOK(m.t, append(m.with("get"), append([]string{"a"}, more...)...)...))
}

// TestMachineEncrypted: machines' disks that are encrypted run under QEMU, with
// what vm args prints, and are snapshotted and reverted, on and off. QEMU puts no
// memory into a qcow2 that is encrypted by itself, and aborts if it is asked to
// (7.2), so it isn't asked.
func TestMachineEncrypted(t *testing.T) {
	for name, contained := range map[string]bool{"LUKS in a qcow2": false, "qcow2 in LUKS": true} {
		t.Run(name, func(t *testing.T) {
			m := newEncrypted(t, contained)
			m.start()
			m.guest("write -P 0x11 0 8M")
			m.put("one")
			m.quit()
			m.has("one")
			runOK(t, append(m.with("vm", "snapshot", "-q"), "off")...)
			m.start()
			m.guest("read -P 0x11 0 8M")
			m.guest("write -P 0x22 0 4M")
			m.put("two")
			if contained {
				runOK(t, "vm", "snapshot", "--qmp", m.args.QMP, "-q", "on")
				m.guest("write -P 0x33 0 4M")
				m.put("three")
				runOK(t, "vm", "revert", "--qmp", m.args.QMP, "-q", "on")
				m.guest("read -P 0x22 0 4M")
			} else {
				require.Contains(t, runFails(t, 18, "vm", "snapshot", "--qmp", m.args.QMP, "on"), "encrypted by itself")
			}
			m.quit()
			m.has("two")
			m.has("one", "--snapshot", "off")
			runOK(t, m.with("check", "-q")...)
			runOK(t, append(m.with("vm", "revert", "-q"), "off")...)
			m.start()
			m.guest("read -P 0x11 0 8M")
			m.quit()
			m.has("one")
		})
	}
}

// TestMachineArgsEncrypted: what QEMU can't have is refused, with a reason.
func TestMachineArgsEncrypted(t *testing.T) {
	dir := t.TempDir()
	pass, line, disk := filepath.Join(dir, "pass"), filepath.Join(dir, "line"), filepath.Join(dir, "disk")
	require.NoError(t, os.WriteFile(pass, []byte("correct horse"), 0o600))
	require.NoError(t, os.WriteFile(line, []byte("correct horse\n"), 0o600))
	runOK(t, "luks", "format", disk, "--size", "32M", "--secret-file", pass, "--zero", "-q")
	runOK(t, "vm", "create", "-f", "luks", disk, "--existing", "--disk", "8M", "--state", "4M", "--secret-file", pass, "-q")
	require.Contains(t, runFails(t, 18, "vm", "args", "-f", "luks", disk, "--secret-file", pass), "LUKS2")

	m := newEncrypted(t, false)
	ref := []string{"vm", "args", "-f", "qcow2", m.disk}
	require.Contains(t, runFails(t, 18, append(ref, "--secret-file", line)...), "newline")
	require.Contains(t, runOK(t, append(ref, "--secret-key-file", pass)...), "-object secret,id=nvstore-secret,file="+pass)
	m = newEncrypted(t, true)
	text := runOK(t, m.with("vm", "args")...)
	require.Contains(t, text, "driver=luks,node-name=nvstore-luks,file=nvstore-file,key-secret=nvstore-luks-secret,")
	require.Contains(t, text, "driver=qcow2,node-name=nvstore-disk,file=nvstore-luks,")
	require.Contains(t, runOK(t, "vm", "args", "--image-opts", m.image[1], "--object", "secret,id=k,format=raw,file="+pass),
		"-object secret,id=nvstore-luks-secret,file="+pass+",format=raw")
	require.Contains(t, runFails(t, 18, "vm", "args", "--image-opts", "driver=raw,file.driver=qcow2,file.file.filename="+m.disk+".plain"), "luks container")
}
