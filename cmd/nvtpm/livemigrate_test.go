package main

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// created is a machine's disk as nvtool makes it; like, if there is one, says of
// which size.
func created(t testing.TB, like *layout) *layout {
	t.Helper()
	dir := t.TempDir()
	disk, key := dir+"/vm.qcow2", dir+"/key"
	require.NoError(t, os.WriteFile(key, rawKey, 0o600))
	if like == nil {
		nvtool(t, "vm", "create", disk, "--disk", "64M", "--key-file", key)
	} else {
		nvtool(t, "vm", "create", disk, "--like", like.disk)
	}
	l := &layout{store: []string{"--store", disk, "--key-file", key}, nodes: []string{"nvstore-disk"}, disk: disk, state: disk}
	args := strings.Fields(strings.ReplaceAll(nvtool(t, "vm", "args", disk), "\\\n", " "))
	for i := 1; i+1 < len(args); i += 2 {
		if args[i] == "-blockdev" || args[i] == "-device" {
			l.drives = append(l.drives, args[i], args[i+1])
		}
	}
	return l
}

// A status of a migration.
func (m *machine) migration() (status string) {
	m.t.Helper()
	var s struct{ Status string }
	require.NoError(m.t, json.Unmarshal(m.qmp("query-migrate", nil), &s))
	return s.Status
}

func (m *machine) awaitMigration(status string) {
	m.t.Helper()
	require.Eventually(m.t, func() bool { return m.migration() == status }, 3*time.Minute, 5*time.Millisecond,
		"migration: %s; QEMU: %s", m.qmp("query-migrate", nil), &m.out)
}

// pausing has migrations stop before QEMU gives its disks away, until they are
// told to go on; or not.
func (m *machine) pausing(on bool) {
	m.t.Helper()
	m.qmp("migrate-set-capabilities", map[string]any{"capabilities": []any{map[string]any{"capability": "pause-before-switchover", "state": on}}})
}

// exports is how many QEMU has.
func (m *machine) exports() int {
	m.t.Helper()
	var list []any
	require.NoError(m.t, json.Unmarshal(m.qmp("query-block-exports", nil), &list))
	return len(list)
}

// TestLiveMigration: a machine whose disk has its TPM's state migrates, to a host
// that has the same image next, and to one with an image of its own.
func TestLiveMigration(t *testing.T) {
	key := filepath.Join(t.TempDir(), "migration-key")
	require.NoError(t, os.WriteFile(key, []byte("000102030405060708090a0b0c0d0e0f"), 0o600))
	for _, shared := range []bool{true, false} {
		t.Run(fmt.Sprintf("shared=%v", shared), func(t *testing.T) {
			from := created(t, nil)
			to := from
			if !shared {
				to = created(t, from)
			}
			lm := goLive(t, from, export, "--migration", "release-lock-outgoing", "--migration-key", "file="+key)
			lm.beginning()
			lm.do("loop")
			if shared {
				lm.stays()
			}
			there := lm.expect(to, "--migration", "incoming", "--migration-key", "file="+key)
			if !shared {
				lm.mirror(there)
			}
			before := lm.leave(there, shared)
			there.agreeBeyond(before)
			lm.end()
			there.do("loop")
			time.Sleep(50 * time.Millisecond)
			there.do("stop")
			last := there.do("agree")
			there.end()
			nvtool(t, append([]string{"check", to.disk}, to.store[2:]...)...)
			require.Equal(t, last, fmt.Sprint(stored(t, to)))
			if !shared {
				nvtool(t, append([]string{"check", from.disk}, from.store[2:]...)...)
			}
			t.Logf("left at round %s or later, ended at %s", before, last)
		})
	}
}

// stays has a migration fail when it has all but ended: the machine and its TPM
// go on where they are.
func (lm *liveMachine) stays() {
	t := lm.machine.t
	t.Helper()
	l, err := net.Listen("unix", lm.dir()+"/nowhere")
	require.NoError(t, err)
	defer l.Close()
	lm.pausing(true)
	lm.qmp("migrate", map[string]string{"uri": "unix:" + lm.dir() + "/nowhere"})
	conn, err := l.Accept()
	require.NoError(t, err)
	go func() {
		b := make([]byte, 1<<20)
		for {
			if _, err := conn.Read(b); err != nil {
				return
			}
		}
	}()
	lm.awaitMigration("pre-switchover")
	conn.Close()
	lm.qmp("migrate-continue", map[string]any{"state": "pre-switchover"})
	lm.awaitMigration("failed")
	before := lm.do("agree")
	time.Sleep(50 * time.Millisecond)
	lm.agreeBeyond(before)
}

// agreeBeyond demands that TPM and disk agree, and have all of what was before.
func (lm *liveMachine) agreeBeyond(before string) {
	t := lm.machine.t
	t.Helper()
	var was, is uint64
	_, err := fmt.Sscan(before, &was)
	require.NoError(t, err)
	now := lm.do("agree")
	_, err = fmt.Sscan(now, &is)
	require.NoError(t, err, "%q; console: %s", now, lm.console())
	require.GreaterOrEqual(t, is, was)
}

// expect starts nvtpm, and on that a machine that waits for this one.
func (lm *liveMachine) expect(l *layout, more ...string) *liveMachine {
	t := lm.machine.t
	t.Helper()
	p := start(t, "", append(append([]string{"--tpm2", "--ctrl", "type=unixio,path=DIR/ctrl", "--log", "fd=2", "--qmp", "DIR/qmp",
		"--live", "nbd+unix:///nv?socket=DIR/nbd", "--export", "nv"}, l.store...), more...)...)
	p.dial("ctrl").Close()
	there := &liveMachine{tpm: p, l: l}
	there.machine = launch(t, &config{ctrl: p.dir + "/ctrl", frontend: "tpm-tis", disk: l.disk, drives: l.drives, guest: true,
		more: []string{"-incoming", "defer", "-qmp", "unix:" + p.dir + "/qmp,server=on,wait=off"}})
	there.guest = meet(t, there.machine)
	return there
}

// mirror copies both windows to another machine's.
func (lm *liveMachine) mirror(there *liveMachine) {
	lm.machine.t.Helper()
	sock := there.dir() + "/copy"
	there.qmp("nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": sock}}})
	for _, node := range []string{"guest", "nv"} {
		there.qmp("block-export-add", map[string]any{"type": "nbd", "id": "copy-" + node, "node-name": node, "name": node, "writable": true})
		lm.qmp("blockdev-add", map[string]any{"driver": "nbd", "node-name": "target-" + node, "export": node,
			"server": map[string]any{"type": "unix", "path": sock}})
		lm.qmp("blockdev-mirror", map[string]any{"job-id": node, "device": node, "target": "target-" + node, "sync": "full"})
	}
	require.Eventually(lm.machine.t, func() bool {
		return strings.Count(string(lm.qmp("query-jobs", nil)), `"ready"`) == 2
	}, 3*time.Minute, 5*time.Millisecond)
}

// leave migrates to there, and returns what TPM and disk had before. Where images
// are shared, there is no pause, and the TPM is idle at the end; else the guest
// goes on writing.
func (lm *liveMachine) leave(there *liveMachine, shared bool) (before string) {
	t := lm.machine.t
	t.Helper()
	uri := map[string]string{"uri": "unix:" + there.dir() + "/migrate"}
	begun := time.Now()
	step := func(what string) { t.Logf("%6.2f s: %s", time.Since(begun).Seconds(), what) }
	there.qmp("migrate-incoming", uri)
	if shared {
		lm.pausing(false)
		lm.qmp("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 20})
		lm.qmp("migrate", uri)
		require.Eventually(t, func() bool { return lm.exports() == 0 }, 3*time.Minute, 5*time.Millisecond)
		lm.awaitMigration("active")
		step("active")
		before = lm.do("agree") // commits go on, with an export for each
		step("TPM and disk agree")
		lm.do("stop")
		step("idle")
		require.Eventually(t, func() bool { return lm.exports() == 0 }, 3*time.Minute, 5*time.Millisecond)
		lm.qmp("migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 30})
	} else {
		before = lm.do("agree")
		lm.pausing(true)
		lm.qmp("migrate", uri)
		lm.awaitMigration("pre-switchover")
		for _, node := range []string{"guest", "nv"} {
			lm.qmp("block-job-cancel", map[string]any{"device": node})
		}
		require.Eventually(t, func() bool { return string(lm.qmp("query-jobs", nil)) == "[]" }, 3*time.Minute, 5*time.Millisecond)
		there.qmp("nbd-server-stop", nil)
		require.Eventually(t, func() bool { return lm.exports() == 0 }, 3*time.Minute, 5*time.Millisecond)
		lm.qmp("migrate-continue", map[string]any{"state": "pre-switchover"})
	}
	step("nothing is exported")
	lm.awaitMigration("completed")
	there.awaitMigration("completed")
	step("completed")
	return before
}
