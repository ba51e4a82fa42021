package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/internal/qmp"
	"nvstore.dev/internal/qtest"
	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

// runOK runs a command line in this process, and returns what it prints.
func runOK(t testing.TB, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	code := run(args, &out, &errs)
	require.Zero(t, code, "nvtool %q: %s", args, &errs)
	return out.String()
}

// runFails runs one that fails, and returns what it says.
func runFails(t testing.TB, want int, args ...string) string {
	t.Helper()
	var out, errs bytes.Buffer
	require.Equal(t, want, run(args, &out, &errs), "nvtool %q: %s", args, &errs)
	return errs.String()
}

func tool(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %q: %s", name, args, out)
	return string(out)
}

// A liveMachine is a QEMU that was started with what vm args prints.
type liveMachine struct {
	*qtest.Machine
	t    testing.TB
	disk string
	args vmRun
}

func startDisk(t testing.TB, disk string, more ...string) *liveMachine {
	t.Helper()
	return (&liveMachine{t: t, disk: disk}).start(more...)
}

// start takes options of vm args, and behind them QEMU's.
func (m *liveMachine) start(more ...string) *liveMachine {
	m.t.Helper()
	args := []string{"vm", "args", m.disk, "--json"}
	if len(more) > 0 && more[0] == "-U" {
		args, more = append(args, "-U"), more[1:]
	}
	text := runOK(m.t, append(append(args, "--"), more...)...)
	require.NoError(m.t, json.Unmarshal([]byte(text), &m.args))
	var err error
	m.Machine, err = qtest.Start(m.args.QEMU, append([]string{"-nodefaults", "-m", "16", "-accel", "tcg"}, m.args.Args...)...)
	require.NoError(m.t, err)
	m.t.Cleanup(func() { _ = m.Close() })
	return m
}

func (m *liveMachine) qmp(command string, args any) json.RawMessage {
	m.t.Helper()
	r, err := m.QMP(command, args)
	require.NoError(m.t, err)
	return r
}

func (m *liveMachine) hmp(format string, args ...any) string {
	m.t.Helper()
	s, err := m.HMP(fmt.Sprintf(format, args...))
	require.NoError(m.t, err)
	return s
}

// job runs a job to its end.
func (m *liveMachine) job(command string, args map[string]any) {
	m.t.Helper()
	id := fmt.Sprint("job-", command)
	args["job-id"] = id
	m.qmp(command, args)
	for {
		var jobs []struct{ ID, Type, Status, Error string }
		require.NoError(m.t, json.Unmarshal(m.qmp("query-jobs", nil), &jobs))
		for _, j := range jobs {
			if j.ID != id {
				continue
			}
			if j.Status == "ready" {
				m.qmp("job-complete", map[string]any{"id": id})
			}
			if j.Status == "concluded" {
				require.Empty(m.t, j.Error, command)
				m.qmp("job-dismiss", map[string]any{"id": id})
				return
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (m *liveMachine) snapshot(command, tag string) {
	m.t.Helper()
	m.job(command, map[string]any{"tag": tag, "vmstate": machine.DiskNode, "devices": []string{machine.DiskNode}})
}

// attach exports the state window as vm args says, and returns its URI.
func (m *liveMachine) attach() string {
	m.t.Helper()
	for _, c := range m.args.Attach {
		m.qmp(c.Execute, c.Arguments)
	}
	return "nbd+unix:///" + machine.StateNode + "?socket=" + m.args.socket()
}

// socket is where the NBD server listens.
func (r *vmRun) socket() string {
	addr := r.Attach[0].Arguments["addr"].(map[string]any)
	return addr["data"].(map[string]any)["path"].(string)
}

// store opens the store in the window.
func (m *liveMachine) store(uri string) *nvstore.Store {
	m.t.Helper()
	s, err := nvstore.Open(uri, &nvstore.Options{Idle: -1})
	require.NoError(m.t, err)
	return s
}

// guest runs a qemu-io command on the guest's device. quit looks at what it
// says.
func (m *liveMachine) guest(format string, args ...any) {
	m.t.Helper()
	require.Empty(m.t, m.hmp(`qemu-io -d /machine/peripheral/guest-disk/virtio-backend "`+format+`"`, args...))
}

// quit ends the machine, and takes its sockets away.
func (m *liveMachine) quit() {
	m.t.Helper()
	require.NoError(m.t, m.Quit())
	require.NotContains(m.t, m.Output(), "verification failed")
	_ = os.Remove(m.args.socket())
}

func putAll(t testing.TB, s *nvstore.Store, blobs map[string]string) {
	t.Helper()
	for name, text := range blobs {
		require.NoError(t, s.Put(name, []byte(text), nil))
	}
}

// requireBlobs demands that the store at a location has exactly these.
func requireBlobs(t testing.TB, location string, o *nvstore.Options, want map[string]string) {
	t.Helper()
	opts := *o
	opts.ReadOnly, opts.Idle = true, -1
	s, err := nvstore.Open(location, &opts)
	require.NoError(t, err)
	got := map[string]string{}
	list, err := s.List("")
	require.NoError(t, err)
	for _, e := range list {
		p, err := s.Get(e.Name)
		require.NoError(t, err)
		got[e.Name] = string(p)
	}
	require.Equal(t, want, got)
	rep, err := s.Check(context.Background(), nil)
	require.NoError(t, err)
	require.Empty(t, rep.Errors)
	require.NoError(t, s.Close())
}

// A QEMU that is started with what vm args prints gives the guest its disk and
// no more, and the state window to whoever attaches; its snapshots have both.
func TestMachineArgs(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "a, b's disk.qcow2")
	runOK(t, "vm", "create", disk, "--disk", "64M", "-q")
	runOK(t, "put", disk, "before", "main.go", "-q")
	m := startDisk(t, disk)

	// The device's capacity in sectors of 512 bytes, as a driver reads it
	// (Virtual I/O Device 1.2, section 5.2.4, and 4.1.4.10 for the legacy
	// interface: behind 20 bytes of BAR 0).
	dev := m.PCI(2, 0)
	id, err := dev.Config(0)
	require.NoError(t, err)
	require.Equal(t, uint32(0x10011af4), id)
	require.NoError(t, dev.Map(0, 0xc000))
	lo, err := m.In(32, 0xc014)
	require.NoError(t, err)
	hi, err := m.In(32, 0xc018)
	require.NoError(t, err)
	require.Equal(t, uint64(64<<20/512), hi<<32|lo)
	m.guest("read 67108864 512")
	m.guest("write 67108352 1024")

	// While it runs, the image is its own.
	require.Contains(t, runFails(t, 13, "ls", disk), "in use")
	require.Contains(t, runFails(t, 13, "vm", "snapshot", disk, "x"), "--qmp")
	require.Contains(t, runOK(t, "vm", "info", disk, "-U"), "64 MiB")

	m.guest("write -P 0x11 0 1M")
	s := m.store(m.attach())
	require.NoError(t, s.Put("a", []byte("one"), nil))
	m.snapshot("snapshot-save", "one")
	m.guest("write -P 0x22 0 1M")
	require.NoError(t, s.Put("a", []byte("two"), nil))
	require.NoError(t, s.Put("b", []byte("two"), nil))
	m.snapshot("snapshot-save", "two")
	m.snapshot("snapshot-load", "one")
	require.ErrorIs(t, s.Put("b", []byte("three"), nil), nvstore.ErrReverted)
	p, err := s.Get("a")
	require.NoError(t, err)
	require.Equal(t, "one", string(p))
	m.guest("read -P 0x11 0 1M")
	require.NoError(t, s.Put("c", []byte("three"), nil))
	m.snapshot("snapshot-save", "three")
	require.NoError(t, s.Close())
	m.quit()
	require.Equal(t, 2, strings.Count(m.Output(), "Input/output error"), "beyond its end there is nothing: %s", m.Output())

	tool(t, "qemu-img", "check", disk)
	runOK(t, "check", disk)
	before, err := os.ReadFile("main.go")
	require.NoError(t, err)
	for tag, want := range map[string]map[string]string{
		"one": {"a": "one"}, "two": {"a": "two", "b": "two"}, "three": {"a": "one", "c": "three"}, "": {"a": "one", "c": "three"},
	} {
		want["before"] = string(before)
		requireBlobs(t, disk, &nvstore.Options{Snapshot: tag}, want)
	}
	// The map of the whole has the guest's MiB and the tail.
	var mapped []struct {
		Start, Length int64
		Data          bool
	}
	require.NoError(t, json.Unmarshal([]byte(tool(t, "qemu-img", "map", "--output=json", "-f", "qcow2", disk)), &mapped))
	for _, e := range mapped {
		if e.Data {
			require.True(t, e.Start+e.Length <= 64<<20 || e.Start >= 16<<40, "%+v", e)
		}
	}
	runOK(t, "vm", "revert", disk, "two")
	require.Contains(t, runOK(t, "vm", "ls", disk), "three")

	// A machine that has just started loads one, and goes on from there.
	m = startDisk(t, disk)
	m.snapshot("snapshot-load", "one")
	m.guest("read -P 0x11 0 1M")
	s = m.store(m.attach())
	require.NoError(t, s.Put("d", []byte("four"), nil))
	require.NoError(t, s.Close())
	m.quit()
	requireBlobs(t, disk, &nvstore.Options{}, map[string]string{"a": "one", "d": "four", "before": string(before)})
}

// The human monitor's savevm takes one snapshot for each window, as it doesn't
// know that they are of one image; its loadvm, and -loadvm, leave the windows
// hanging (QEMU 7.2). So QMP's jobs are the way, with the image's node. A device
// that is given a new window goes on.
func TestMachineHumanMonitor(t *testing.T) {
	disk := filepath.Join(t.TempDir(), "disk.qcow2")
	runOK(t, "vm", "create", disk, "--disk", "8M", "--state", "1M", "-q")
	m := startDisk(t, disk)
	m.guest("write -P 0x11 0 1M")
	require.Empty(t, strings.TrimSpace(m.hmp("savevm one")))
	m.guest("write -P 0x22 0 1M")
	require.Empty(t, strings.TrimSpace(m.hmp("loadvm one")))
	window := m.args.Blockdev[2]
	require.Equal(t, machine.GuestNode, window.NodeName)
	window.NodeName = "guest-2"
	m.qmp("blockdev-add", window)
	m.qmp("qom-set", map[string]string{"path": "/machine/peripheral/guest-disk", "property": "drive", "value": "guest-2"})
	m.qmp("blockdev-del", map[string]string{"node-name": machine.GuestNode})
	m.guest("read -P 0x11 0 1M")
	m.guest("write -P 0x33 0 1M")
	m.guest("read -P 0x33 0 1M")
	m.quit()
	var list []vmSnapshot
	require.NoError(t, json.Unmarshal([]byte(runOK(t, "vm", "ls", disk, "--json")), &list))
	require.Len(t, list, 2)
	require.Equal(t, "one", list[0].Name)
	require.Equal(t, "one", list[1].Name)
	// Both are there for an ID.
	for range 2 {
		runOK(t, "vm", "rm", disk, "one")
	}
	require.Equal(t, "[]\n", runOK(t, "vm", "ls", disk, "--json"))
}

// What vm args prints is for a shell.
func TestMachineArgsShell(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "it's $HOME, \"100%\".qcow2")
	runOK(t, "vm", "create", disk, "--disk", "64M", "-q")
	line := runOK(t, "vm", "args", disk, "--qmp", filepath.Join(dir, "q"), "--", "-nodefaults", "-display", "none", "-S", "-m", "16", "-accel", "tcg")
	cmd := exec.Command("sh", "-c", "exec "+line)
	var errs bytes.Buffer
	cmd.Stderr = &errs
	require.NoError(t, cmd.Start())
	defer cmd.Process.Kill()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var c *qmp.Client
	for {
		var err error
		if c, err = qmp.Dial(ctx, filepath.Join(dir, "q"), nil); err == nil {
			break
		}
		require.NoError(t, ctx.Err(), "%v: %s", err, &errs)
		time.Sleep(10 * time.Millisecond)
	}
	defer c.Close()
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Size int64 `json:"virtual-size"`
		}
	}
	require.NoError(t, c.Do(ctx, "query-named-block-nodes", nil, &nodes))
	sizes := map[string]int64{}
	for _, n := range nodes {
		sizes[n.Name] = n.Image.Size
	}
	require.Equal(t, int64(64<<20), sizes[machine.GuestNode])
	require.Equal(t, int64(64<<20), sizes[machine.StateNode])
	require.NoError(t, c.Do(ctx, "quit", nil, nil))
	require.NoError(t, cmd.Wait(), "%s", &errs)
	tool(t, "qemu-img", "check", disk)
}

// The same on other images: raw, encrypted, with clusters of other sizes.
func TestMachineFormats(t *testing.T) {
	for _, f := range []struct {
		name   string
		create []string
		open   []string
	}{
		{"raw", []string{"-f", "raw"}, []string{"-f", "raw"}},
		{"clusters of 4k", []string{"--cluster-size", "4k", "--max-disk", "1G"}, nil},
		{"clusters of 2M", []string{"--cluster-size", "2M"}, nil},
	} {
		t.Run(f.name, func(t *testing.T) {
			disk := filepath.Join(t.TempDir(), "disk")
			runOK(t, append([]string{"vm", "create", disk, "--disk", "8M", "--state", "8M", "-q"}, f.create...)...)
			var r vmRun
			require.NoError(t, json.Unmarshal([]byte(runOK(t, append([]string{"vm", "args", disk, "--json"}, f.open...)...)), &r))
			q, err := qtest.Start(r.QEMU, append([]string{"-nodefaults", "-m", "16", "-accel", "tcg"}, r.Args...)...)
			require.NoError(t, err)
			m := &liveMachine{Machine: q, t: t, disk: disk, args: r}
			defer q.Close()
			m.guest("write -P 0x11 0 8M")
			s := m.store(m.attach())
			putAll(t, s, map[string]string{"a": "one"})
			require.NoError(t, s.Close())
			m.quit()
			o := &nvstore.Options{}
			if f.open != nil {
				o.Format = f.open[1]
			}
			requireBlobs(t, disk, o, map[string]string{"a": "one"})
			require.True(t, bytes.Equal(bytes.Repeat([]byte{0x11}, 8<<20), guestBytes(t, disk, o.Format)))
		})
	}
}

// guestBytes are those of the guest's disk in an image.
func guestBytes(t testing.TB, path, format string) []byte {
	t.Helper()
	a := &app{out: &bytes.Buffer{}, err: &bytes.Buffer{}}
	ref := diskRef{imageRef: imageRef{location: path, format: format, allow: true, secrets: &secretFlags{}}}
	d, err := a.openDisk(&ref, true)
	require.NoError(t, err)
	g, err := d.Guest()
	require.NoError(t, err)
	p := make([]byte, g.Size())
	require.NoError(t, image.ReadFull(g, p, 0))
	require.NoError(t, d.Device().Close())
	return p
}
