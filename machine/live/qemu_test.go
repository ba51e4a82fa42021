package live_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qmp"
	"nvstore.dev/internal/qtest"
	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
)

// The disks of these tests: the guest's, and the state behind it.
const (
	guestSize = 16 << 20
	stateSize = 16 << 20
)

// A vm is a QEMU without a guest, with one disk for the guest and the state.
type vm struct {
	t    *testing.T
	dir  string
	disk string
	qmp  string // one monitor, and others: .1, .2
	qemu *qtest.Machine
}

func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %v: %s", name, args, out)
	return string(out)
}

// stack is the location of the state in the disk.
func stack(disk string) string {
	return fmt.Sprintf("driver=raw,offset=%d,size=%d,file.driver=qcow2,file.file.filename=%s", guestSize, stateSize, disk)
}

// newVM makes a disk with an empty store, and doesn't start the machine.
func newVM(t *testing.T) *vm {
	t.Helper()
	dir, err := os.MkdirTemp("", "live") // short, for the sockets
	require.NoError(t, err)
	v := &vm{t: t, dir: dir, disk: filepath.Join(dir, "disk.qcow2"), qmp: filepath.Join(dir, "qmp")}
	t.Cleanup(func() {
		if v.qemu != nil {
			_ = v.qemu.Close()
		}
		os.RemoveAll(dir)
	})
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", v.disk, fmt.Sprint(guestSize+stateSize))
	s, err := nvstore.Create(stack(v.disk), &nvstore.CreateOptions{Existing: true, MaxSize: stateSize})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	return v
}

// start starts the machine, with three monitors.
func (v *vm) start(more ...string) {
	v.t.Helper()
	v.startOn("qemu-system-x86_64", append([]string{"-accel", "tcg", "-m", "16", "-device", "virtio-blk-pci,drive=guest,share-rw=on"}, more...)...)
}

// startOn starts another board, whose guest may have no disk.
func (v *vm) startOn(binary string, more ...string) {
	v.t.Helper()
	args := []string{"-nodefaults",
		"-blockdev", "driver=file,node-name=nvstore-file,filename=" + v.disk,
		"-blockdev", "driver=qcow2,node-name=nvstore-disk,file=nvstore-file",
		"-blockdev", fmt.Sprintf("driver=raw,node-name=guest,file=nvstore-disk,offset=0,size=%d", guestSize),
		"-blockdev", fmt.Sprintf("driver=raw,node-name=nv,file=nvstore-disk,offset=%d,size=%d", guestSize, stateSize)}
	for _, n := range []string{"", ".1", ".2"} {
		_ = os.Remove(v.qmp + n)
		args = append(args, "-qmp", "unix:"+v.qmp+n+",server=on,wait=off")
	}
	m, err := qtest.Start(binary, append(args, more...)...)
	require.NoError(v.t, err)
	v.qemu = m
}

// monitor is another client's.
func (v *vm) monitor(n string) *qmp.Client {
	v.t.Helper()
	c, err := qmp.Dial(context.Background(), v.qmp+n, nil)
	require.NoError(v.t, err)
	v.t.Cleanup(func() { _ = c.Close() })
	return c
}

func (v *vm) attach(o *live.Options) *live.Attachment {
	v.t.Helper()
	a, err := live.Attach(context.Background(), v.qmp, o)
	require.NoError(v.t, err)
	return a
}

// quit ends the machine, and looks at what it leaves.
func (v *vm) quit() {
	v.t.Helper()
	require.NoError(v.t, v.qemu.Quit())
	v.qemu = nil
	run(v.t, "qemu-img", "check", "-q", v.disk)
}

// offline opens the store of a machine that is off, and finds it sound.
func (v *vm) offline(fn func(*nvstore.Store)) {
	v.t.Helper()
	s, err := nvstore.Open(stack(v.disk), nil)
	require.NoError(v.t, err)
	report, err := s.Check(context.Background(), nil)
	require.NoError(v.t, err)
	require.Empty(v.t, report.Errors)
	fn(s)
	require.NoError(v.t, s.Close())
}

// leftovers is what QEMU has beside what it was started with.
func leftovers(t *testing.T, c *qmp.Client) (exports, jobs []string) {
	t.Helper()
	var list []struct{ ID string }
	require.NoError(t, c.Do(context.Background(), "query-block-exports", nil, &list))
	for _, x := range list {
		exports = append(exports, x.ID)
	}
	all, err := c.Jobs(context.Background())
	require.NoError(t, err)
	for _, j := range all {
		jobs = append(jobs, j.ID)
	}
	return exports, jobs
}
