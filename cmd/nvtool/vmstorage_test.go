package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

// A storageMachine is a machine whose state goes wherever QEMU takes its disk.
type storageMachine struct {
	*liveMachine
	dir   string
	state *nvstore.Store
	blobs map[string]string
	disk  []byte // the guest's
}

const storageDisk = 8 << 20

func startStorage(t *testing.T) *storageMachine {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk.qcow2")
	runOK(t, "vm", "create", disk, "--disk", fmt.Sprint(storageDisk), "--max-disk", "1G", "--state", "4M", "-q")
	m := &storageMachine{liveMachine: startDisk(t, disk), dir: dir, blobs: map[string]string{}, disk: make([]byte, storageDisk)}
	m.state = m.store(m.attach())
	return m
}

// write changes the guest's disk and the state.
func (m *storageMachine) write(n byte) {
	m.t.Helper()
	for i := range 3 {
		off := (int(n)*3 + i) << 16
		m.guest("write -P %d %d 65536", n, off)
		copy(m.disk[off:], bytes.Repeat([]byte{n}, 65536))
	}
	for name, text := range map[string]string{"a": fmt.Sprint("a", n), fmt.Sprint("b", n): string(bytes.Repeat([]byte{n}, 20_000))} {
		require.NoError(m.t, m.state.Put(name, []byte(text), nil))
		m.blobs[name] = text
	}
}

// is what disk and state have now.
func (m *storageMachine) is() (blobs map[string]string, disk []byte) {
	blobs = map[string]string{}
	for k, v := range m.blobs {
		blobs[k] = v
	}
	return blobs, bytes.Clone(m.disk)
}

func (m *storageMachine) stop() {
	m.t.Helper()
	require.NoError(m.t, m.state.Close())
	m.quit()
}

// size is that of the image.
func (m *storageMachine) size() int64 {
	m.t.Helper()
	var info struct {
		Size int64 `json:"virtual_size"`
	}
	require.NoError(m.t, json.Unmarshal([]byte(runOK(m.t, "vm", "info", m.liveMachine.disk, "-U", "--json")), &info))
	return info.Size
}

// target makes an image of the disk's size for QEMU to write to, and a node.
func (m *storageMachine) target(name, format string) string {
	m.t.Helper()
	path := filepath.Join(m.dir, name)
	tool(m.t, "qemu-img", "create", "-q", "-f", format, path, fmt.Sprint(m.size()))
	m.qmp("blockdev-add", map[string]any{"driver": format, "node-name": name, "file": map[string]any{"driver": "file", "filename": path}})
	return path
}

// requireMachine demands that an image opens offline with these blobs and this
// disk.
func requireMachine(t testing.TB, path, format string, blobs map[string]string, disk []byte) {
	t.Helper()
	requireBlobs(t, path, &nvstore.Options{Format: format, AllowExternal: true}, blobs)
	require.True(t, bytes.Equal(disk, guestBytes(t, path, format)), "the guest's disk in %s", path)
	if format == "qcow2" {
		tool(t, "qemu-img", "check", "-q", path)
	}
	runOK(t, "check", "-f", format, "--allow-external", path)
}

// An external snapshot puts an overlay on the disk: it has the new state, and
// the image below keeps the old one.
func TestMachineOverlay(t *testing.T) {
	m := startStorage(t)
	m.write(1)
	blobs, disk := m.is()
	over := filepath.Join(m.dir, "over.qcow2")
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", over)
	m.qmp("blockdev-add", map[string]any{"driver": "qcow2", "node-name": "over", "backing": nil,
		"file": map[string]any{"driver": "file", "filename": over}})
	m.qmp("blockdev-snapshot", map[string]any{"node": machine.DiskNode, "overlay": "over"})
	m.write(2)
	newBlobs, newDisk := m.is()
	m.stop()
	requireMachine(t, m.liveMachine.disk, "qcow2", blobs, disk)
	requireMachine(t, over, "qcow2", newBlobs, newDisk)
	// Without leave nobody opens what an image names.
	require.Contains(t, runFails(t, 18, "ls", "-f", "qcow2", over), "--allow-external")
	// Committed offline, the image below has it all.
	runOK(t, "img", "commit", "-f", "qcow2", "--allow-external", over, "-q")
	requireMachine(t, m.liveMachine.disk, "qcow2", newBlobs, newDisk)
}

// An overlay on other storage, into which QEMU streams what is below, takes disk
// and state there.
func TestMachineStream(t *testing.T) {
	m := startStorage(t)
	m.write(1)
	blobs, disk := m.is()
	path := m.target("stream", "qcow2")
	m.qmp("blockdev-snapshot", map[string]any{"node": machine.DiskNode, "overlay": "stream"})
	m.write(2)
	m.qmp("block-stream", map[string]any{"job-id": "s", "device": "stream"})
	m.write(3)
	m.finish("s")
	newBlobs, newDisk := m.is()
	m.stop()
	requireMachine(t, m.liveMachine.disk, "qcow2", blobs, disk)
	require.NotContains(t, tool(t, "qemu-img", "info", path), "backing")
	requireMachine(t, path, "qcow2", newBlobs, newDisk)
}

// QEMU begins a mirror of no node that has others above it, and goes on with one
// all the same. So the windows look elsewhere for a moment, and then through the
// mirror; where it ends they look into the copy. What reads or writes them in
// that moment gets an error.
func TestMachineMirror(t *testing.T) {
	m := startStorage(t)
	m.write(1)
	path := filepath.Join(m.dir, "copy.qcow2")
	runOK(t, "vm", "create", path, "--like", m.liveMachine.disk)
	m.qmp("blockdev-add", map[string]any{"driver": "qcow2", "node-name": "copy", "discard": "unmap",
		"file": map[string]any{"driver": "file", "filename": path, "discard": "unmap"}})
	mirror := func(node string) error {
		_, err := m.QMP("blockdev-mirror", map[string]any{"job-id": "m", "device": node, "target": "copy", "sync": "full",
			"filter-node-name": "mirror", "copy-mode": "write-blocking"})
		return err
	}
	for _, node := range []string{machine.DiskNode, machine.FileNode} {
		require.ErrorContains(t, mirror(node), "Need a root block node")
	}
	var fails []map[string]any
	for _, what := range []string{"read", "write", "write-zeroes", "discard"} {
		fails = append(fails, map[string]any{"event": "none", "iotype": what, "errno": 5})
	}
	m.qmp("blockdev-add", map[string]any{"driver": "blkdebug", "node-name": "nowhere", "inject-error": fails,
		"image": map[string]any{"driver": "null-co", "size": m.size()}})
	m.qmp("stop", nil) // or the guest would get an error, too
	m.look("nowhere")
	require.Error(t, m.state.Put("nowhere", []byte("x"), nil))
	require.NoError(t, mirror(machine.DiskNode))
	m.look("mirror")
	m.qmp("cont", nil)
	_ = m.state.Close() // a write that failed ended it
	m.state = m.store("nbd+unix:///" + machine.StateNode + "?socket=" + m.args.socket())
	m.write(2)
	m.ready("m")
	m.write(3)
	blobs, disk := m.is()
	m.finish("m")
	for _, node := range []string{machine.DiskNode, machine.FileNode, "nowhere"} {
		m.qmp("blockdev-del", map[string]any{"node-name": node})
	}
	requireMachine(t, m.liveMachine.disk, "qcow2", blobs, disk)
	m.write(4)
	newBlobs, newDisk := m.is()
	runOK(t, "vm", "snapshot", "--qmp", m.args.QMP, "-q", "there")
	m.write(5)
	runOK(t, "vm", "revert", "--qmp", m.args.QMP, "-q", "there")
	_ = m.state.Close() // it was reverted underneath
	m.quit()
	requireMachine(t, m.liveMachine.disk, "qcow2", blobs, disk)
	requireMachine(t, path, "qcow2", newBlobs, newDisk)
}

// look has the windows look into a node.
func (m *storageMachine) look(node string) {
	m.t.Helper()
	var windows []machine.Blockdev
	for _, b := range m.args.Blockdev {
		if b.NodeName == machine.GuestNode || b.NodeName == machine.StateNode {
			b.File = node
			windows = append(windows, b)
		}
	}
	m.qmp("blockdev-reopen", map[string]any{"options": windows})
}

// ready waits until a mirror has caught up.
func (m *storageMachine) ready(id string) {
	m.t.Helper()
	for {
		var jobs []struct{ ID, Status string }
		require.NoError(m.t, json.Unmarshal(m.qmp("query-jobs", nil), &jobs))
		require.Len(m.t, jobs, 1)
		require.Equal(m.t, id, jobs[0].ID)
		if jobs[0].Status == "ready" {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// finish completes a job that is ready, and waits for its end.
func (m *liveMachine) finish(id string) {
	m.t.Helper()
	m.end(id, "job-complete", "id")
}

// end has a command end a job that is ready.
func (m *liveMachine) end(id, command, key string) {
	m.t.Helper()
	completed := false
	for {
		var jobs []struct{ ID, Status, Error string }
		require.NoError(m.t, json.Unmarshal(m.qmp("query-jobs", nil), &jobs))
		found := false
		for _, j := range jobs {
			if j.ID != id {
				continue
			}
			found = true
			require.Empty(m.t, j.Error)
			if j.Status == "ready" && !completed {
				m.qmp(command, map[string]any{key: id})
				completed = true
			}
		}
		if !found {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// A backup has the state of the moment at which it began, though the state
// goes on changing.
func TestMachineBackup(t *testing.T) {
	for _, format := range []string{"qcow2", "raw"} {
		t.Run(format, func(t *testing.T) {
			m := startStorage(t)
			m.write(1)
			blobs, disk := m.is()
			path := m.target("backup", format)
			m.qmp("blockdev-backup", map[string]any{"job-id": "b", "device": machine.DiskNode, "target": "backup", "sync": "full", "speed": 1 << 20})
			m.write(2)
			m.qmp("block-job-set-speed", map[string]any{"device": "b", "speed": 0})
			m.finish("b")
			m.write(3)
			newBlobs, newDisk := m.is()
			m.stop()
			requireMachine(t, path, format, blobs, disk)
			requireMachine(t, m.liveMachine.disk, "qcow2", newBlobs, newDisk)
		})
	}
}

// A machine migrates, to another host that sees the same image, or to one of
// its own.
func TestMachineMigration(t *testing.T) {
	for _, shared := range []bool{true, false} {
		t.Run(fmt.Sprintf("shared=%v", shared), func(t *testing.T) {
			m := startStorage(t)
			m.write(1)
			path := m.liveMachine.disk
			if !shared {
				path = filepath.Join(m.dir, "other.qcow2")
				runOK(t, "vm", "create", path, "--like", m.liveMachine.disk)
			}
			dst := startIncoming(t, path)
			if !shared {
				m.copyTo(dst)
			}
			m.write(2)
			// The service lets go of the node before the machine leaves.
			require.NoError(t, m.state.Close())
			m.qmp("block-export-del", map[string]any{"id": machine.StateNode, "mode": "hard"})
			m.qmp("nbd-server-stop", nil)
			if !shared {
				// The mirrors are whole, and the machine stays where
				// it is until it leaves.
				m.end(machine.GuestNode, "block-job-cancel", "device")
				m.end(machine.StateNode, "block-job-cancel", "device")
				for _, node := range []string{machine.GuestNode, machine.StateNode} {
					m.qmp("blockdev-del", map[string]any{"node-name": "target-" + node})
				}
				dst.qmp("nbd-server-stop", nil)
			}
			m.migrate(dst)
			blobs, disk := m.is()
			m.quit()
			old := m.liveMachine.disk
			m.liveMachine = dst
			m.state = m.store(m.attach())
			m.write(3)
			newBlobs, newDisk := m.is()
			m.stop()
			requireMachine(t, path, "qcow2", newBlobs, newDisk)
			if !shared {
				requireMachine(t, old, "qcow2", blobs, disk)
			}
		})
	}
}

// startIncoming starts a machine that waits for one to come. Its sockets have
// other names, as it is on another host.
func startIncoming(t *testing.T, path string) *liveMachine {
	t.Helper()
	link := path
	if _, err := os.Lstat(path + ".qmp"); err == nil {
		link = filepath.Join(t.TempDir(), "host2.qcow2")
		require.NoError(t, os.Symlink(path, link))
	}
	m := &liveMachine{t: t, disk: link}
	return m.start("-U", "-incoming", "defer")
}

// copyTo mirrors both windows to another machine's, over NBD.
func (m *storageMachine) copyTo(dst *liveMachine) {
	m.t.Helper()
	sock := filepath.Join(m.dir, "copy.nbd")
	dst.qmp("nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": sock}}})
	for _, node := range []string{machine.GuestNode, machine.StateNode} {
		dst.qmp("block-export-add", map[string]any{"type": "nbd", "id": "copy-" + node, "node-name": node, "name": node, "writable": true})
		m.qmp("blockdev-add", map[string]any{"driver": "nbd", "node-name": "target-" + node, "export": node,
			"server": map[string]any{"type": "unix", "path": sock}})
		m.qmp("blockdev-mirror", map[string]any{"job-id": node, "device": node, "target": "target-" + node, "sync": "full"})
	}
}

func (m *liveMachine) migrate(dst *liveMachine) {
	m.t.Helper()
	uri := "unix:" + filepath.Join(m.t.(*testing.T).TempDir(), "migrate")
	dst.qmp("migrate-incoming", map[string]any{"uri": uri})
	m.qmp("migrate", map[string]any{"uri": uri})
	for _, side := range []*liveMachine{m, dst} {
		for {
			var s struct {
				Status string
				Error  string `json:"error-desc"`
			}
			require.NoError(m.t, json.Unmarshal(side.qmp("query-migrate", nil), &s))
			require.NotEqual(m.t, "failed", s.Status, "%s; %s", s.Error, dst.qmp("query-migrate", nil))
			if s.Status == "completed" {
				break
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}
