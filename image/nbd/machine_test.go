package nbd_test

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/nbd"
)

// A machine is a QEMU without a guest, driven over QMP.
type machine struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
	cmd *exec.Cmd
	err output
}

// An output is what a process says, read while it goes on saying.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}

func startMachine(t *testing.T, args ...string) *machine {
	t.Helper()
	m := &machine{t: t, cmd: exec.Command("qemu-system-x86_64", append([]string{"-nodefaults", "-display", "none", "-S",
		"-accel", "tcg", "-m", "16", "-qmp", "stdio"}, args...)...)}
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	m.cmd.Stderr = &m.err
	in, err := m.cmd.StdinPipe()
	require.NoError(t, err)
	out, err := m.cmd.StdoutPipe()
	require.NoError(t, err)
	m.in, m.out = in, bufio.NewReader(out)
	require.NoError(t, m.cmd.Start())
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
	})
	m.do(`{"execute":"qmp_capabilities"}`)
	return m
}

// do runs a command and returns what it returns.
func (m *machine) do(command string, args ...any) string {
	m.t.Helper()
	_, err := fmt.Fprintf(m.in, command+"\n", args...)
	require.NoError(m.t, err)
	for {
		line, err := m.out.ReadBytes('\n')
		require.NoError(m.t, err, "%s", &m.err)
		if line[0] != '{' {
			continue // qemu-io's output
		}
		var reply struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		require.NoError(m.t, json.Unmarshal(line, &reply), "%s", line)
		if reply.Error != nil {
			require.Fail(m.t, "QMP says no", "%s: %s", command, reply.Error.Desc)
		}
		if reply.Return != nil {
			return string(reply.Return)
		}
	}
}

// job waits for a job's end.
func (m *machine) job(id string) {
	m.t.Helper()
	for {
		var jobs []struct{ ID, Status, Error string }
		require.NoError(m.t, json.Unmarshal([]byte(m.do(`{"execute":"query-jobs"}`)), &jobs))
		for _, j := range jobs {
			if j.ID == id && j.Status == "concluded" {
				require.Empty(m.t, j.Error)
				m.do(`{"execute":"job-dismiss","arguments":{"id":"%s"}}`, id)
				return
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// A running machine exports a node: the client writes to it, the machine takes
// a snapshot and loads it, and the same connection reads what was there then.
func TestLiveSnapshot(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.qcow2")
	run(t, "qemu-img", "create", "-f", "qcow2", disk, "1M")
	sock := socket(t)
	m := startMachine(t, "-blockdev", "driver=file,filename="+disk+",node-name=f", "-blockdev", "driver=qcow2,file=f,node-name=nv")
	m.do(`{"execute":"nbd-server-start","arguments":{"addr":{"type":"unix","data":{"path":"%s"}}}}`, sock)
	m.do(`{"execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"nv","name":"nv","writable":true}}`)
	d := open(t, "nbd+unix:///nv?socket="+sock, &nbd.Options{Reconnect: -1})
	defer func() { require.NoError(t, d.Close()) }()
	put := func(b byte) {
		_, err := d.WriteAt(bytes.Repeat([]byte{b}, 100_000), 5000)
		require.NoError(t, err)
		require.NoError(t, d.Sync())
	}
	has := func(b byte) {
		t.Helper()
		p := make([]byte, 100_000)
		require.NoError(t, image.ReadFull(d, p, 5000))
		require.Equal(t, bytes.Repeat([]byte{b}, 100_000), p)
	}
	put(0x11)
	m.do(`{"execute":"snapshot-save","arguments":{"job-id":"s","tag":"one","vmstate":"nv","devices":["nv"]}}`)
	m.job("s")
	put(0x22)
	m.do(`{"execute":"snapshot-load","arguments":{"job-id":"l","tag":"one","vmstate":"nv","devices":["nv"]}}`)
	m.job("l")
	has(0x11)
	put(0x33)
	m.do(`{"execute":"quit"}`)
	require.NoError(t, m.cmd.Wait())
	_, err := d.ReadAt(make([]byte, 10), 0)
	require.ErrorIs(t, err, nbd.ErrDisconnected, "the machine is gone, and nothing was at stake")
	run(t, "qemu-img", "check", disk)
	run(t, "qemu-io", "-f", "qcow2", "-c", "read -P 0x33 5000 100000", disk)
}

// A machine's block devices lie in our exports: what its block layer writes
// and flushes arrives.
func TestMachineOnOurExports(t *testing.T) {
	vars := imagetest.NewMemory(540_672)
	s := serve(t, nil, &nbd.Export{Name: "vars", Device: vars}, &nbd.Export{Name: "disk", Device: imagetest.NewMemory(4 << 20)})
	m := startMachine(t,
		"-blockdev", "driver=nbd,node-name=vars,export=vars,server.type=unix,server.path="+s.sock,
		"-blockdev", "driver=nbd,node-name=n,export=disk,server.type=unix,server.path="+s.sock,
		"-blockdev", "driver=raw,node-name=disk,file=n", "-device", "virtio-blk-pci,drive=disk")
	m.do(`{"execute":"human-monitor-command","arguments":{"command-line":"qemu-io vars \"write -P 7 1000 3000\""}}`)
	m.do(`{"execute":"human-monitor-command","arguments":{"command-line":"qemu-io vars flush"}}`)
	m.do(`{"execute":"human-monitor-command","arguments":{"command-line":"qemu-io disk \"write -z 0 1M\""}}`)
	p := make([]byte, 3000)
	require.NoError(t, image.ReadFull(vars, p, 1000))
	require.Equal(t, bytes.Repeat([]byte{7}, 3000), p)
	m.do(`{"execute":"quit"}`)
	require.NoError(t, m.cmd.Wait())
	require.Empty(t, s.told())
}

// OVMF boots on a pflash whose variables are an export, and stores them there.
func TestOVMF(t *testing.T) {
	if testing.Short() {
		return // half a minute under the race detector, which learns nothing of QEMU
	}
	const ovmf = "/usr/share/OVMF/"
	blank, err := os.ReadFile(ovmf + "OVMF_VARS_4M.fd")
	require.NoError(t, err)
	vars := imagetest.NewMemory(int64(len(blank)))
	_, err = vars.WriteAt(blank, 0)
	require.NoError(t, err)
	s := serve(t, nil, &nbd.Export{Name: "uefi/vars", Device: vars})
	m := startMachine(t, "-m", "128", "-machine", "q35,pflash0=code,pflash1=vars",
		"-blockdev", "driver=file,node-name=code,read-only=on,filename="+ovmf+"OVMF_CODE_4M.fd",
		"-blockdev", "driver=nbd,node-name=vars,export=uefi/vars,server.type=unix,server.path="+s.sock)
	m.do(`{"execute":"cont"}`)
	p := make([]byte, len(blank))
	for begun := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		require.NoError(t, image.ReadFull(vars, p, 0))
		if !bytes.Equal(p, blank) && bytes.Contains(p, []byte("B\x00o\x00o\x00t\x00O\x00r\x00d\x00e\x00r\x00")) {
			break
		}
		require.Less(t, time.Since(begun), 5*time.Minute, "the firmware stores no boot order")
	}
	m.do(`{"execute":"quit"}`)
	require.NoError(t, m.cmd.Wait())
	require.Empty(t, s.told())
}
