package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/tcp"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/internal/qmp"
)

// A machine is a QEMU.
type machine struct {
	t    testing.TB
	cmd  *exec.Cmd
	mon  *qmp.Client
	out  syncBuffer
	dir  string // of its sockets
	disk string
}

// A config says what is in a machine.
type config struct {
	ctrl, frontend string
	disk           string   // a qcow2 for the disk and the snapshots; "" is a new one
	drives         []string // in place of that disk
	guest          bool     // Linux boots, else firmware only
	more           []string
}

// boot starts a machine with a TPM on a control channel, and without a guest.
func boot(t testing.TB, ctrl, frontend string, more ...string) *machine {
	t.Helper()
	return launch(t, &config{ctrl: ctrl, frontend: frontend, more: more})
}

// launch starts a machine.
func launch(t testing.TB, c *config) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "nvtpm")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	m := &machine{t: t, dir: dir, disk: c.disk}
	if m.disk == "" {
		m.disk = dir + "/disk.qcow2"
		out, err := exec.Command("qemu-img", "create", "-q", "-f", "qcow2", m.disk, "64M").CombinedOutput()
		require.NoError(t, err, "%s", out)
	}
	args := []string{"-M", "q35", "-accel", "tcg", "-display", "none", "-nodefaults",
		"-no-user-config", "-m", "128", "-qmp", "unix:" + dir + "/qmp,server=on,wait=off",
		"-chardev", "socket,id=c,path=" + c.ctrl, "-tpmdev", "emulator,id=t,chardev=c", "-device", c.frontend + ",tpmdev=t"}
	if c.drives != nil {
		args = append(args, c.drives...)
	} else {
		args = append(args, "-blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename="+m.disk, "-device", "virtio-blk,drive=disk")
	}
	if c.guest {
		args = append(args, guestArgs(t, dir)...)
	}
	m.cmd = exec.Command("qemu-system-x86_64", append(args, c.more...)...)
	m.cmd.Stdout, m.cmd.Stderr = &m.out, &m.out
	require.NoError(t, m.cmd.Start())
	t.Cleanup(m.kill)
	m.mon, err = qmp.New(t.Context(), m.dial("qmp"), nil)
	require.NoError(t, err, "%s", &m.out)
	return m
}

// dial connects to one of its sockets.
func (m *machine) dial(name string) (conn net.Conn) {
	m.t.Helper()
	require.Eventually(m.t, func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", m.dir+"/"+name)
		return err == nil
	}, waitLong, waitShort, "%s", &m.out)
	m.t.Cleanup(func() { conn.Close() })
	return conn
}

func (m *machine) kill() {
	m.cmd.Process.Kill()
	m.cmd.Wait()
}

// qmp executes a command and returns what it returns.
func (m *machine) qmp(command string, args any) (result json.RawMessage) {
	m.t.Helper()
	require.NoError(m.t, m.mon.Do(m.t.Context(), command, args, &result), "%s", &m.out)
	return result
}

// hmp executes a command of the human monitor, which must have nothing to say.
func (m *machine) hmp(line string) {
	m.t.Helper()
	out := m.qmp("human-monitor-command", map[string]string{"command-line": line})
	require.Equal(m.t, `""`, string(out), line)
}

// migrate writes the machine to a file, and ends it.
func (m *machine) migrate(to string) {
	m.t.Helper()
	m.qmp("migrate", map[string]string{"uri": "exec:cat > " + to})
	require.Eventually(m.t, func() bool {
		return strings.Contains(string(m.qmp("query-migrate", nil)), `"completed"`)
	}, time.Minute, 20*time.Millisecond)
	m.quit()
}

// arrive starts a machine from what migrate wrote.
func arrive(t testing.TB, c *config, from string) *machine {
	t.Helper()
	in := *c
	in.more = append([]string{"-incoming", "exec:cat " + from}, c.more...)
	m := launch(t, &in)
	require.Eventually(t, func() bool {
		return strings.Contains(string(m.qmp("query-status", nil)), `"running": true`)
	}, time.Minute, 20*time.Millisecond, "%s", &m.out)
	return m
}

func (m *machine) quit() {
	m.t.Helper()
	m.qmp("quit", nil)
	m.cmd.Wait()
}

// beside connects a client beside the machine, through the simulator's port.
func beside(t testing.TB, port int) transport.TPMCloser {
	t.Helper()
	c, err := tcp.Open(tcp.Config{CommandAddress: fmt.Sprintf("127.0.0.1:%d", port), PlatformAddress: fmt.Sprintf("127.0.0.1:%d", port+1)})
	require.NoError(t, err)
	t.Cleanup(func() { c.Close() })
	return c
}

func pcr(t testing.TB, c transport.TPM, n uint) string {
	t.Helper()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(n)}}}}.Execute(c)
	require.NoError(t, err)
	return fmt.Sprintf("%x", rsp.PCRValues.Digests[0].Buffer)
}

func extend(t testing.TB, c transport.TPM, n uint32) {
	t.Helper()
	_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(n), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}}}.Execute(c)
	require.NoError(t, err)
}

var zeroPCR = strings.Repeat("0", 64)

// waitLog waits until nvtpm's log has a line.
func waitLog(t testing.TB, p *process, what string) {
	t.Helper()
	require.Eventually(t, func() bool { return strings.Contains(p.out.String(), what) }, 3*time.Minute, 20*time.Millisecond,
		"the log has no %q: %s", what, &p.out)
}

// TestFirmware boots SeaBIOS and OVMF on nvtpm: each measures into the TPM.
func TestFirmware(t *testing.T) {
	vars := filepath.Join(t.TempDir(), "vars.fd")
	p, err := os.ReadFile("/usr/share/OVMF/OVMF_VARS_4M.fd")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(vars, p, 0o600))
	for name, c := range map[string]struct {
		frontend string
		tpm12    bool
		more     []string
		extend   string // the log's line for a measurement
	}{
		"SeaBIOS, TPM 2.0 CRB": {frontend: "tpm-crb", extend: "command 0x182: response code 0x0"},
		"SeaBIOS, TPM 2.0 TIS": {frontend: "tpm-tis", extend: "command 0x182: response code 0x0"},
		"SeaBIOS, TPM 1.2 TIS": {frontend: "tpm-tis", tpm12: true, extend: "command 0x14: response code 0x0"},
		"OVMF, TPM 2.0 CRB": {frontend: "tpm-crb", extend: "command 0x182: response code 0x0", more: []string{
			"-drive", "if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd",
			"-drive", "if=pflash,unit=1,format=raw,file=" + vars}},
	} {
		t.Run(name, func(t *testing.T) {
			port := freePort(t)
			store := newStore(t, true)
			// A QEMU that quits while a command is in flight says no SHUTDOWN.
			args := append([]string{"--ctrl", "type=unixio,path=DIR/ctrl", "--terminate", "--log", "fd=2,level=5"}, store...)
			if !c.tpm12 {
				args = append(args, "--tpm2", "--mssim", fmt.Sprintf("port=%d", port))
			}
			p := start(t, "", args...)
			p.dial("ctrl").Close()
			m := boot(t, p.dir+"/ctrl", c.frontend, c.more...)
			waitLog(t, p, c.extend)
			if !c.tpm12 {
				c := beside(t, port)
				require.Eventually(t, func() bool { return pcr(t, c, 0) != zeroPCR }, time.Minute, 50*time.Millisecond)
			}
			m.quit()
			require.Zero(t, p.code(), "%s", &p.out)
		})
	}
}

// TestSnapshots: savevm and loadvm bring the TPM back as it was, what is in
// its NV memory, what was measured, and in the store.
func TestSnapshots(t *testing.T) {
	port := freePort(t)
	store := newStore(t, true)
	p := start(t, "", append([]string{"--tpm2", "--ctrl", "type=unixio,path=DIR/ctrl", "--mssim", fmt.Sprintf("port=%d", port), "--log", "fd=2,level=5"}, store...)...)
	p.dial("ctrl").Close()
	m := boot(t, p.dir+"/ctrl", "tpm-crb")
	waitLog(t, p, "command 0x182: response code 0x0")
	c := &retry{beside(t, port)}
	marker := []byte("MARKER-OF-THE-NV")
	nv := func(p []byte) error {
		pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(c)
		if err != nil {
			return err
		}
		return nvWriteTo(c, pub, p)
	}
	require.NoError(t, defineOn(c, 16))
	require.NoError(t, nv(marker))
	rounds := imagetest.Scale(4)
	for round := range rounds {
		tag := fmt.Sprintf("s%d", round)
		require.NoError(t, nv(fmt.Appendf(nil, "before, round %02d", round)[:16]))
		extend(t, c, 16)
		want, was := pcr(t, c, 16), nvReadFrom(t, c)
		m.hmp("savevm " + tag)
		require.NoError(t, nv([]byte("after-----------")))
		extend(t, c, 16)
		require.NotEqual(t, want, pcr(t, c, 16))
		m.hmp("loadvm " + tag)
		require.Equal(t, want, pcr(t, c, 16), "round %d", round)
		require.Equal(t, was, nvReadFrom(t, c), "round %d", round)
	}
	require.NoError(t, nv(marker))
	m.hmp("savevm last")
	m.quit()
	require.Zero(t, p.code(), "%s", &p.out)
	t.Logf("%d rounds of savevm and loadvm", rounds)
	disk, err := os.ReadFile(m.disk)
	require.NoError(t, err)
	require.Zero(t, bytes.Count(disk, marker), "the snapshot has what is in the TPM's NV memory in clear")
	// And the store has the state that the last load brought.
	p, after := open(t, store)
	require.Equal(t, marker, nvRead(t, after, index, 16))
	p.stop()

	// swtpm, to compare with: its own file is encrypted, the snapshot isn't.
	key := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(key, []byte("000102030405060708090a0b0c0d0e0f"), 0o600))
	place := []string{"--tpm2", "--tpmstate", "dir=" + t.TempDir(), "--key", "file=" + key}
	p = start(t, "swtpm", append(place, "--server", "type=unixio,path=DIR/data", "--ctrl", "type=unixio,path=DIR/ctrl", "--flags", "not-need-init,startup-clear")...)
	sw := &tpm{t, p.dial("data")}
	nvDefine(t, sw, index, 16)
	require.NoError(t, nvWrite(sw, nvPublic(t, sw, index), index, 0, marker))
	p.kill()
	p = start(t, "swtpm", append(place, "--ctrl", "type=unixio,path=DIR/ctrl")...)
	require.Eventually(t, func() bool { _, err := os.Stat(p.dir + "/ctrl"); return err == nil }, waitLong, waitShort)
	m = boot(t, p.dir+"/ctrl", "tpm-crb", "-S")
	m.hmp("savevm last")
	m.quit()
	disk, err = os.ReadFile(m.disk)
	require.NoError(t, err)
	t.Logf("the marker is in a snapshot %d times with swtpm, and never with nvtpm", bytes.Count(disk, marker))
	require.NotZero(t, bytes.Count(disk, marker))
}

// TestMigration moves a machine from nvtpm to swtpm and on to nvtpm, through
// QEMU's migration stream: what was measured before comes along.
func TestMigration(t *testing.T) {
	stream := t.TempDir()
	store := newStore(t, true)
	port := freePort(t)
	ours := func(store []string, more ...string) *process {
		p := start(t, "", append(append([]string{"--tpm2", "--ctrl", "type=unixio,path=DIR/ctrl", "--mssim", fmt.Sprintf("port=%d", port),
			"--migration", "allow-plain", "--log", "fd=2,level=5"}, store...), more...)...)
		p.dial("ctrl").Close()
		return p
	}
	p := ours(store)
	m := boot(t, p.dir+"/ctrl", "tpm-crb")
	waitLog(t, p, "command 0x182: response code 0x0")
	c := &retry{beside(t, port)}
	extend(t, c, 16)
	require.NoError(t, defineOn(c, 16))
	want := pcr(t, c, 16)
	c.TPMCloser.Close()
	m.migrate(stream + "/1")
	p.code()

	p = start(t, "swtpm", "--tpm2", "--tpmstate", "dir="+t.TempDir(), "--ctrl", "type=unixio,path=DIR/ctrl")
	require.Eventually(t, func() bool { _, err := os.Stat(p.dir + "/ctrl"); return err == nil }, waitLong, waitShort)
	arrive(t, &config{ctrl: p.dir + "/ctrl", frontend: "tpm-crb"}, stream+"/1").migrate(stream + "/2")

	p = ours(newStore(t, true), "--migration", "incoming,allow-plain")
	m = arrive(t, &config{ctrl: p.dir + "/ctrl", frontend: "tpm-crb"}, stream+"/2")
	c = &retry{beside(t, port)}
	require.Equal(t, want, pcr(t, c, 16))
	_, err := tpm2.NVReadPublic{NVIndex: index}.Execute(c)
	require.NoError(t, err)
	m.quit()
	p.code()
}

// retry is a transport that repeats what the TPM was not able to start.
type retry struct{ transport.TPMCloser }

func (r *retry) Send(cmd []byte) ([]byte, error) {
	for {
		rsp, err := r.TPMCloser.Send(cmd)
		if err != nil || len(rsp) < headerLen || code(rsp) != 0x922 {
			return rsp, err
		}
	}
}

func defineOn(c transport.TPM, size uint16) error {
	_, err := tpm2.NVDefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: size,
			Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, NoDA: true, NT: tpm2.TPMNTOrdinary}}),
	}.Execute(c)
	return err
}

func nvWriteTo(c transport.TPM, pub *tpm2.NVReadPublicResponse, p []byte) error {
	_, err := tpm2.NVWrite{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName},
		Data:       tpm2.TPM2BMaxNVBuffer{Buffer: p},
	}.Execute(c)
	return err
}

func nvReadFrom(t testing.TB, c transport.TPM) []byte {
	t.Helper()
	pub, err := tpm2.NVReadPublic{NVIndex: index}.Execute(c)
	require.NoError(t, err)
	rsp, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: pub.NVName, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: pub.NVName}, Size: 16,
	}.Execute(c)
	require.NoError(t, err)
	return rsp.Data.Buffer
}
