package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

// A layout is where the store lies in the images of a machine.
type layout struct {
	store  []string // nvtpm's options
	drives []string // QEMU's; the store's node is "nv"
	nodes  []string // of a snapshot, the one for the machine's memory first
	disk   string
	state  string // the image that the store is in
}

const mib = 1 << 20

// tail makes a disk with the store behind what the guest sees.
func tail(t testing.TB) *layout {
	t.Helper()
	dir := t.TempDir()
	disk := dir + "/vm.qcow2"
	qemuImg(t, "create", "-q", "-f", "qcow2", disk, "256M")
	at := "driver=raw,offset=134217728,size=67108864,file.driver=qcow2,file.file.driver=file,file.file.filename=" + disk
	return &layout{
		store: append([]string{"--image-opts", at}, sealedStore(t, at)...),
		drives: []string{"-blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename=" + disk,
			"-blockdev", "driver=raw,node-name=guest,file=disk,offset=0,size=67108864",
			"-blockdev", "driver=raw,node-name=nv,file=disk,offset=134217728,size=67108864",
			"-device", "virtio-blk,drive=guest,share-rw=on"},
		nodes: []string{"disk"}, disk: disk, state: disk}
}

// apart makes a disk, and another image for the store.
func apart(t testing.TB) *layout {
	t.Helper()
	dir := t.TempDir()
	disk, nv := dir+"/vm.qcow2", dir+"/nv.qcow2"
	qemuImg(t, "create", "-q", "-f", "qcow2", disk, "64M")
	qemuImg(t, "create", "-q", "-f", "qcow2", nv, "64M")
	at := "driver=qcow2,file.driver=file,file.filename=" + nv
	return &layout{
		store: append([]string{"--image-opts", at}, sealedStore(t, at)...),
		drives: []string{"-blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename=" + disk,
			"-blockdev", "driver=qcow2,node-name=nv,file.driver=file,file.filename=" + nv, "-device", "virtio-blk,drive=disk"},
		nodes: []string{"disk", "nv"}, disk: disk, state: nv}
}

func qemuImg(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.Command("qemu-img", args...).CombinedOutput()
	require.NoError(t, err, "qemu-img %s: %s", strings.Join(args, " "), out)
	return string(out)
}

// sealedStore makes a store on what is there, and returns the options of its
// key.
func sealedStore(t testing.TB, location string) []string {
	t.Helper()
	cred, err := keyslot.RawKey(rawKey)
	require.NoError(t, err)
	s, err := nvstore.Create(location, &nvstore.CreateOptions{Existing: true, Key: cred})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	key := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(key, rawKey, 0o600))
	return []string{"--key-file", key}
}

// A liveMachine is a machine with the guest, and nvtpm behind it.
type liveMachine struct {
	*machine
	*guest
	tpm   *process
	proxy *proxy
	l     *layout
	cut   int // loads that cut through a commit, and were done again
}

// How nvtpm knows of its machine.
type how uint8

const (
	blind    how = iota // it doesn't
	watching            // by QMP
	export              // by QMP, and has QEMU export the store; there is no proxy
)

// goLive starts nvtpm on the image, and the machine on nvtpm.
func goLive(t testing.TB, l *layout, way how, more ...string) *liveMachine {
	t.Helper()
	args := append([]string{"--tpm2", "--ctrl", "type=unixio,path=DIR/ctrl", "--log", "fd=2"}, l.store...)
	if way == export {
		args = append(args, "--live", "nbd+unix:///nv?socket=DIR/nbd", "--export", "nv")
	} else {
		args = append(args, "--live", "nbd+unix:///nv?socket=DIR/proxy")
	}
	if way != blind {
		args = append(args, "--qmp", "DIR/qmp")
	}
	p := start(t, "", append(args, more...)...)
	p.dial("ctrl").Close()
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("nvtpm: %s", &p.out)
		}
	})
	lm := &liveMachine{tpm: p, l: l, proxy: newProxy(t, p.dir+"/proxy", p.dir+"/nbd")}
	// Not CRB: QEMU saves its buffer before the command that is in flight
	// has ended, and a guest that is loaded then takes the command for the
	// response (QEMU 7.2, also with swtpm).
	lm.machine = launch(t, &config{ctrl: p.dir + "/ctrl", frontend: "tpm-tis", disk: l.disk, drives: l.drives, guest: true,
		more: []string{"-S", "-qmp", "unix:" + p.dir + "/qmp,server=on,wait=off", "-qmp", "unix:" + p.dir + "/services,server=on,wait=off"}})
	lm.guest = meet(t, lm.machine)
	if way == export {
		require.Eventually(t, func() bool { return string(lm.qmp("query-block-exports", nil)) != "[]" }, time.Minute, waitShort,
			"nvtpm: %s", &p.out)
	} else {
		lm.export()
	}
	lm.qmp("cont", nil)
	lm.ready()
	return lm
}

// export has QEMU export the store's node.
func (lm *liveMachine) export() {
	lm.machine.t.Helper()
	lm.qmp("nbd-server-start", map[string]any{"max-connections": 1,
		"addr": map[string]any{"type": "unix", "data": map[string]any{"path": lm.tpm.dir + "/nbd"}}})
	lm.qmp("block-export-add", map[string]any{"type": "nbd", "id": "nv", "node-name": "nv", "name": "nv", "writable": true})
}

// snapshot runs snapshot-save, snapshot-load or snapshot-delete.
func (lm *liveMachine) snapshot(what, tag string) {
	lm.machine.t.Helper()
	ctx, stop := context.WithTimeout(lm.machine.t.Context(), time.Minute)
	defer stop()
	args := map[string]any{"tag": tag, "devices": lm.l.nodes}
	if what != "snapshot-delete" {
		args["vmstate"] = lm.l.nodes[0]
	}
	require.NoError(lm.machine.t, lm.mon.RunJob(ctx, what, args, nil), "QEMU: %s; nvtpm: %s", &lm.machine.out, &lm.tpm.out)
}

// revert loads a snapshot that was taken while the guest ran, and returns what
// that agrees on. A load that cut through a commit, as nvtpm says then, is done
// once more, as the README has it. Any other failure is one.
func (lm *liveMachine) revert(tag string) string {
	t := lm.machine.t
	t.Helper()
	for range 10 {
		before := lm.cuts()
		lm.snapshot("snapshot-load", tag)
		agreed, err := lm.try("agree")
		if err == nil {
			return agreed
		}
		require.Greater(t, lm.cuts(), before, "%v; nvtpm: %s", err, &lm.tpm.out)
		lm.cut++
	}
	require.Fail(t, "each of 10 loads cut through a commit", "nvtpm: %s", &lm.tpm.out)
	return ""
}

// cuts is how often nvtpm has told of a revert that cut through a commit.
func (lm *liveMachine) cuts() int {
	return strings.Count(lm.tpm.out.String(), nvstore.ErrStraddled.Error())
}

// begin has the guest begin something.
func (lm *liveMachine) begin(command string) {
	lm.machine.t.Helper()
	_, err := fmt.Fprintln(lm.guest.conn, command)
	require.NoError(lm.machine.t, err)
}

// await waits for what nvtpm does soon.
func (lm *liveMachine) await(what <-chan struct{}) {
	lm.machine.t.Helper()
	select {
	case <-what:
	case <-time.After(time.Minute):
		require.Fail(lm.machine.t, "nvtpm sends nothing to the store", "nvtpm: %s", &lm.tpm.out)
	}
}

// end shuts the machine down, and nvtpm with it.
func (lm *liveMachine) end() {
	lm.machine.t.Helper()
	lm.quit()
	require.Zero(lm.machine.t, lm.tpm.code(), "%s", &lm.tpm.out)
}

// numbers returns what the guest reads from the TPM and from the disk.
func (g *guest) numbers() (tpm, disk uint64) {
	g.t.Helper()
	_, err := fmt.Sscan(g.do("numbers"), &tpm, &disk)
	require.NoError(g.t, err)
	return tpm, disk
}

// beginning defines the NV index, with a zero in it, as on the disk. On a busy
// host SeaBIOS gives the TPM up, as any that doesn't answer for 2 s, and has its
// hierarchies disabled until the next boot (src/hw/tpm_drivers.h, src/tcgbios.c).
func (g *guest) beginning() {
	g.t.Helper()
	_, err := g.try("define 8")
	for range 3 {
		if err == nil || !strings.Contains(err.Error(), "TPM_RC_HIERARCHY") {
			break
		}
		g.t.Log("SeaBIOS gave the TPM up; booting once more")
		g.reboot()
		_, err = g.try("define 8")
	}
	require.NoError(g.t, err)
	g.do("write 0000000000000000")
}

// stored returns what the store has when no machine runs.
func stored(t testing.TB, l *layout) uint64 {
	t.Helper()
	qemuImg(t, "check", "-q", l.state)
	p, c := open(t, l.store)
	defer p.stop()
	return binary.BigEndian.Uint64(nvRead(t, c, guestIndex, 8))
}

// layouts are all, or with -short the one that is the harder.
func layouts() map[string]func(testing.TB) *layout {
	if testing.Short() {
		return map[string]func(testing.TB) *layout{"tail": tail}
	}
	return map[string]func(testing.TB) *layout{"tail": tail, "apart": apart}
}

// TestLive: nvtpm keeps its state inside of the image of the very QEMU that it
// serves; the guest's memory, TPM and disk agree after each snapshot-save and
// snapshot-load in the middle of its writes, and the store is whole.
func TestLive(t *testing.T) {
	for name, lay := range layouts() {
		t.Run(name, func(t *testing.T) {
			l := lay(t)
			lm := goLive(t, l, watching)
			lm.beginning()
			rounds := imagetest.Scale(3)
			for i := range rounds {
				tag := fmt.Sprintf("s%d", i)
				lm.do("loop")
				time.Sleep(50 * time.Millisecond) // it writes in the middle
				lm.snapshot("snapshot-save", tag)
				saved := lm.do("agree")
				time.Sleep(50 * time.Millisecond)
				now := lm.revert(tag)
				lm.do("stop")
				t.Logf("saved about round %s, and back at about %s", saved, now)
				lm.snapshot("snapshot-delete", tag)
			}
			last := lm.do("agree")
			t.Logf("%d rounds; the guest wrote %s times; %d loads cut through a commit, and were done again", rounds, last, lm.cut)
			lm.end()
			require.Equal(t, last, fmt.Sprint(stored(t, l)))
		})
	}
}

// TestLiveStall: snapshot-save while the TPM is in the middle of a command that
// stores, and its store answers nobody, ends all the same; the command is in
// the snapshot, and in the store once that answers.
func TestLiveStall(t *testing.T) {
	for name, way := range map[string]how{"with QMP": watching, "without": blind} {
		if testing.Short() && way == blind {
			continue
		}
		t.Run(name, func(t *testing.T) {
			l := tail(t)
			lm := goLive(t, l, way)
			lm.beginning()
			rounds := imagetest.Scale(3)
			var idle, held []time.Duration
			save := func(took *[]time.Duration) {
				begin := time.Now()
				lm.snapshot("snapshot-save", "s") // would wait for ever
				*took = append(*took, time.Since(begin).Round(time.Millisecond))
			}
			for i := range rounds {
				save(&idle)
				lm.snapshot("snapshot-delete", "s")
				want := fmt.Sprintf("%016x", 1000+i)
				seen := lm.proxy.hold(anything)
				lm.begin("write " + want)
				lm.await(seen)
				save(&held)
				lm.proxy.release()
				_, err := lm.line()
				require.NoError(t, err)
				require.Equal(t, want, lm.do("read 8"))
				lm.do("write ffffffffffffffff")
				lm.snapshot("snapshot-load", "s")
				_, err = lm.line() // the reply to the first write, once more
				require.NoError(t, err)
				require.Equal(t, want, lm.do("read 8"))
				lm.snapshot("snapshot-delete", "s")
			}
			slices.Sort(idle)
			slices.Sort(held)
			t.Logf("%d snapshots in the middle of a command took %v, at most %v; with an idle TPM %v, at most %v",
				rounds, held[rounds/2], held[rounds-1], idle[rounds/2], idle[rounds-1])
			lm.end()
			require.EqualValues(t, 1000+rounds-1, stored(t, l))
		})
	}
}

// TestLiveDiskOnly: snapshots that QEMU takes of the disk alone have the TPM of
// that instant, in the store.
func TestLiveDiskOnly(t *testing.T) {
	for name, lay := range layouts() {
		t.Run(name, func(t *testing.T) {
			l := lay(t)
			lm := goLive(t, l, export)
			lm.beginning()
			lm.do("loop")
			time.Sleep(100 * time.Millisecond)
			back := lm.diskOnly()
			lm.do("stop")
			at, _ := lm.numbers()
			lm.do("loop")
			time.Sleep(100 * time.Millisecond)
			lm.do("stop")
			later, _ := lm.numbers()
			require.Greater(t, later, at)
			lm.end()
			back()
			lm = goLive(t, l, export)
			tpm, disk := lm.numbers()
			t.Logf("snapshot at round %d or before, later %d; reverted: TPM %d, disk %d", at, later, tpm, disk)
			require.LessOrEqual(t, tpm, at)
			// The guest writes to the TPM first.
			require.Contains(t, []uint64{disk, disk + 1}, tpm)
			lm.end()
		})
	}
}

// diskOnly has QEMU take a snapshot of the disks alone, of the running machine.
// What it returns goes back there once the machine is off.
func (lm *liveMachine) diskOnly() (back func()) {
	t := lm.machine.t
	if l := lm.l; l.state != l.disk {
		var actions []any
		for _, n := range l.nodes {
			actions = append(actions, map[string]any{"type": "blockdev-snapshot-internal-sync", "data": map[string]any{"device": n, "name": "disk-only"}})
		}
		lm.qmp("transaction", map[string]any{"actions": actions})
		return func() {
			qemuImg(t, "snapshot", "-a", "disk-only", l.disk)
			qemuImg(t, "snapshot", "-a", "disk-only", l.state)
		}
	}
	// A node with others above it takes an external one: what was written
	// before stays in the image, and what comes later goes to an overlay.
	over := lm.dir() + "/over.qcow2"
	qemuImg(t, "create", "-q", "-f", "qcow2", over, "256M")
	lm.qmp("blockdev-add", map[string]any{"driver": "qcow2", "node-name": "over", "backing": nil, "file": map[string]any{"driver": "file", "filename": over}})
	lm.qmp("blockdev-snapshot", map[string]any{"node": "disk", "overlay": "over"})
	return func() {}
}

// TestLiveKills: QEMU, nvtpm, or both are killed while the guest writes. What
// the guest saw answered is there.
func TestLiveKills(t *testing.T) {
	l := tail(t)
	kills := imagetest.Scale(3)
	answered := uint64(0)
	for i := range kills {
		lm := goLive(t, l, export)
		if i == 0 {
			lm.beginning()
		}
		tpm, _ := lm.numbers()
		require.GreaterOrEqual(t, tpm, answered, "kill %d", i)
		lm.do("from %d", tpm)
		lm.do("loop")
		time.Sleep(time.Duration(50+37*i%200) * time.Millisecond)
		if i%3 != 1 {
			lm.tpm.kill()
		}
		if i%3 != 0 {
			lm.machine.kill()
		}
		lm.tpm.kill()
		lm.machine.kill()
		answered = max(tpm, lastRound(t, lm.dir()))
	}
	require.GreaterOrEqual(t, stored(t, l), answered)
	t.Logf("%d kills; %d writes were answered", kills, answered)
}

func (lm *liveMachine) dir() string { return lm.machine.dir }

// lastRound is the last that the guest's console tells of.
func lastRound(t testing.TB, dir string) (n uint64) {
	t.Helper()
	p, err := os.ReadFile(dir + "/console")
	require.NoError(t, err)
	for line := range strings.Lines(string(p)) {
		if !strings.HasSuffix(line, "\n") {
			break // cut
		}
		if s, ok := strings.CutPrefix(strings.TrimSpace(line), "round "); ok {
			n, err = strconv.ParseUint(s, 10, 64)
			require.NoError(t, err, line)
		}
	}
	return n
}
