package live_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
)

var ctx = context.Background()

// A store in a running machine's tail: written, snapshotted, reverted, and
// found as it must be when the machine is off.
func TestAttach(t *testing.T) {
	v := newVM(t)
	v.start()
	a := v.attach(nil)
	s := a.Store()
	require.NoError(t, s.Put("a", []byte("one"), nil))
	require.NoError(t, a.Save(ctx, "first", nil))
	require.NoError(t, s.Put("a", []byte("two"), nil))
	require.NoError(t, s.Put("b", []byte("two"), nil))
	require.ErrorIs(t, a.Save(ctx, "first", nil), image.ErrExist)
	require.NoError(t, a.Load(ctx, "first", nil))
	got, err := s.Get("a")
	require.NoError(t, err)
	require.Equal(t, "one", string(got))
	_, err = s.Stat("b")
	require.ErrorIs(t, err, nvstore.ErrNotFound)
	require.NoError(t, s.Put("c", []byte("three"), nil), "nothing is left to notice")
	list, err := a.Snapshots(ctx)
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, "first", list[0].Name)
	require.Equal(t, []string{"nvstore-disk"}, list[0].Devices)
	require.Empty(t, list[0].Missing)
	require.NotZero(t, list[0].VMStateSize)
	require.ErrorIs(t, a.Load(ctx, "none", nil), image.ErrNotFound)
	require.ErrorIs(t, a.Delete(ctx, "none", nil), image.ErrNotFound)
	require.NoError(t, a.Close())
	require.ErrorIs(t, a.Close(), nvstore.ErrClosed)
	exports, jobs := leftovers(t, v.monitor(".1"))
	require.Empty(t, exports)
	require.Empty(t, jobs)
	v.quit()
	v.offline(func(s *nvstore.Store) {
		got, err := s.Get("c")
		require.NoError(t, err)
		require.Equal(t, "three", string(got))
	})
	run(t, "qemu-img", "snapshot", "-a", "first", v.disk)
	v.offline(func(s *nvstore.Store) {
		list, err := s.List("")
		require.NoError(t, err)
		require.Len(t, list, 1)
	})
}

// The human monitor's loadvm leaves a client without answers (QEMU 7.2). That is
// noticed, and the export is made anew, so that the service goes on; its commit
// that was cut off says so.
func TestHumanMonitorLoads(t *testing.T) {
	v := newVM(t)
	v.start()
	a := v.attach(&live.Options{Timeout: 2 * time.Second})
	s := a.Store()
	require.NoError(t, s.Put("a", []byte("one"), nil))
	_, err := v.qemu.QMP("cont", nil)
	require.NoError(t, err)
	for _, line := range []string{"savevm s", "loadvm s"} {
		said, err := v.qemu.HMP(line)
		require.NoError(t, err)
		require.Empty(t, said)
		if line == "savevm s" {
			require.NoError(t, s.Put("a", []byte("two"), nil))
		}
	}
	require.Error(t, s.Put("b", []byte("three"), nil), "it was reverted, or cut off")
	require.NoError(t, a.Reopen(ctx))
	got, err := a.Store().Get("a")
	require.NoError(t, err)
	require.Equal(t, "one", string(got))
	require.NoError(t, a.Store().Put("c", []byte("four"), nil))
	require.NoError(t, a.Close())
	exports, _ := leftovers(t, v.monitor(".1"))
	require.Empty(t, exports)
	v.quit()
	v.offline(func(s *nvstore.Store) {
		list, err := s.List("")
		require.NoError(t, err)
		require.Len(t, list, 2)
	})
}

// TestHumanMonitorLoadsAtOnce: the load comes while the watcher looks at the
// store because of the save.
func TestHumanMonitorLoadsAtOnce(t *testing.T) {
	for i := range 4 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			v := newVM(t)
			v.start()
			a := v.attach(&live.Options{Timeout: 200 * time.Millisecond})
			_, err := v.qemu.QMP("cont", nil)
			require.NoError(t, err)
			require.NoError(t, a.Store().Put("a", []byte("one"), nil))
			for _, line := range []string{"savevm s", "loadvm s"} {
				said, err := v.qemu.HMP(line)
				require.NoError(t, err)
				require.Empty(t, said)
			}
			if a.Store().Put("a", []byte("two"), nil) != nil {
				require.NoError(t, a.Reopen(ctx))
			}
			require.NoError(t, a.Close())
		})
	}
}

// A store that was reverted is closed without a complaint, whether the watcher
// has seen it yet or not.
func TestCloseReverted(t *testing.T) {
	v := newVM(t)
	v.start()
	m, err := live.Connect(ctx, v.qmp+".1", nil)
	require.NoError(t, err)
	defer m.Close()
	for i := range 8 {
		a := v.attach(nil)
		require.NoError(t, a.Store().Put("a", []byte("x"), nil))
		tag := fmt.Sprint("s", i)
		require.NoError(t, m.Save(ctx, tag, nil))
		require.NoError(t, a.Store().Put("a", []byte("y"), nil))
		require.NoError(t, m.Load(ctx, tag, nil))
		require.NoError(t, a.Close())
	}
}

// The machine's run state is what it was, whatever is done.
func TestRunState(t *testing.T) {
	v := newVM(t)
	v.start()
	m, err := live.Connect(ctx, v.qmp, nil)
	require.NoError(t, err)
	defer m.Close()
	is := func(want string) {
		t.Helper()
		got, running, err := m.Status(ctx)
		require.NoError(t, err)
		require.Equal(t, want, got)
		require.Equal(t, want == "running", running)
	}
	c := v.monitor(".1")
	is("prelaunch")
	require.NoError(t, m.Save(ctx, "s", nil))
	is("prelaunch")
	require.NoError(t, m.Load(ctx, "s", nil))
	is("prelaunch")
	require.NoError(t, c.Do(ctx, "cont", nil, nil))
	require.NoError(t, m.Save(ctx, "r", nil))
	is("running")
	require.NoError(t, m.Load(ctx, "r", nil))
	is("running")
	require.Error(t, m.Load(ctx, "none", nil))
	is("running")
	require.NoError(t, m.Load(ctx, "s", nil))
	is("running")
	require.NoError(t, c.Do(ctx, "stop", nil, nil))
	require.NoError(t, m.Load(ctx, "r", nil))
	is("paused")
	require.NoError(t, m.Delete(ctx, "r", nil))
	require.NoError(t, m.Delete(ctx, "s", nil))
	is("paused")
	list, err := m.Snapshots(ctx)
	require.NoError(t, err)
	require.Empty(t, list)
}

// A revert that somebody else makes shows to readers at once, before any
// commit.
func TestRevertBehindOurBack(t *testing.T) {
	v := newVM(t)
	v.start()
	reverts := make(chan live.Revert, 10)
	a := v.attach(&live.Options{Reverted: func(r live.Revert) { reverts <- r }})
	s := a.Store()
	c := v.monitor(".1")
	require.NoError(t, c.Do(ctx, "cont", nil, nil))
	require.NoError(t, s.Put("a", []byte("one"), nil))
	dev := map[string]any{"tag": "x", "vmstate": "nvstore-disk", "devices": []string{"nvstore-disk"}}
	require.NoError(t, c.RunJob(ctx, "snapshot-save", dev, nil))
	before, err := s.Info()
	require.NoError(t, err)
	loaded := false
	for range 3 {
		require.NoError(t, s.Put("a", []byte("two"), nil))
		require.NoError(t, c.RunJob(ctx, "snapshot-load", dev, nil))
		require.Eventually(t, func() bool {
			got, err := s.Get("a")
			return err == nil && string(got) == "one" // in the middle of it, ErrReverted
		}, time.Minute, time.Millisecond, "readers see it, and nobody commits")
	}
	select {
	case r := <-reverts:
		require.NoError(t, r.Err)
		require.Equal(t, before.Generation, r.To)
		loaded = r.Loaded
	case <-time.After(time.Minute):
		require.Fail(t, "nobody told")
	}
	require.NoError(t, a.Close())
	for len(reverts) > 0 {
		r := <-reverts
		require.NoError(t, r.Err)
		loaded = loaded || r.Loaded
	}
	require.True(t, loaded, "the jobs were seen")
	v.quit()
}

// Two services on one store: the second is refused, whichever monitor it
// comes by, and takes nothing from the first.
func TestTwoServices(t *testing.T) {
	v := newVM(t)
	v.start()
	a := v.attach(nil)
	_, err := live.Attach(ctx, v.qmp+".1", nil)
	require.ErrorIs(t, err, live.ErrInUse)
	m, err := live.Connect(ctx, v.qmp+".1", nil)
	require.NoError(t, err)
	_, err = m.Detach(ctx, false)
	require.ErrorIs(t, err, live.ErrInUse)
	require.NoError(t, a.Store().Put("a", nil, nil))
	found, err := m.Detach(ctx, true)
	require.NoError(t, err)
	require.True(t, found, "by force")
	require.Error(t, a.Store().Put("b", nil, nil))
	require.NoError(t, m.Close())
	_ = a.Close()
	b := v.attach(nil)
	_, err = b.Store().Get("a")
	require.NoError(t, err)
	require.NoError(t, b.Close())
}

// What can't be attached to leaves QEMU, and the file system, as they were.
func TestAttachIsWhole(t *testing.T) {
	v := newVM(t)
	v.start("-blockdev", "driver=null-co,node-name=blank,read-zeroes=on,size=16777216")
	c := v.monitor(".1")
	file := filepath.Join(v.dir, "file")
	require.NoError(t, os.WriteFile(file, []byte("x"), 0o600))
	tmp := filepath.Join(v.dir, "tmp")
	require.NoError(t, os.Mkdir(tmp, 0o700))
	t.Setenv("TMPDIR", tmp)
	for name, o := range map[string]struct {
		opts *live.Options
		want error
	}{
		"NoNode":       {&live.Options{Node: "none"}, live.ErrNode},
		"NoStore":      {&live.Options{Node: "blank"}, nvstore.ErrFormat},
		"SocketIsFile": {&live.Options{Export: live.Export{Socket: file}}, os.ErrExist},
		"NoFolder":     {&live.Options{Export: live.Export{Socket: filepath.Join(v.dir, "none", "s")}}, os.ErrNotExist},
		"OtherImage":   {&live.Options{Image: file}, live.ErrOther},
		"NoServer":     {&live.Options{Export: live.Export{Server: "nbd+unix:///?socket=" + file}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := live.Attach(ctx, v.qmp, o.opts)
			require.Error(t, err)
			if o.want != nil {
				require.ErrorIs(t, err, o.want)
			}
			exports, _ := leftovers(t, c)
			require.Empty(t, exports)
			left, err := os.ReadDir(tmp)
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
	// Somebody else's server, with an export: left alone.
	sock := filepath.Join(v.dir, "theirs")
	require.NoError(t, c.Do(ctx, "nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": sock}}}, nil))
	require.NoError(t, c.Do(ctx, "block-export-add", map[string]any{"type": "nbd", "id": "theirs", "node-name": "blank"}, nil))
	_, err := live.Attach(ctx, v.qmp, nil)
	require.ErrorIs(t, err, live.ErrServer)
	exports, _ := leftovers(t, c)
	require.Equal(t, []string{"theirs"}, exports)
	a := v.attach(&live.Options{Export: live.Export{Server: "nbd+unix:///?socket=" + sock}})
	require.NoError(t, a.Store().Put("a", nil, nil))
	require.NoError(t, a.Close())
	exports, _ = leftovers(t, c)
	require.Equal(t, []string{"theirs"}, exports)
	left, err := os.ReadDir(tmp)
	require.NoError(t, err)
	require.Empty(t, left)
}

// A socket is for its owner only, and QEMU's directory needn't be ours.
func TestSocketMode(t *testing.T) {
	v := newVM(t)
	v.start()
	sock := filepath.Join(v.dir, "s")
	a := v.attach(&live.Options{Export: live.Export{Socket: sock}})
	info, err := os.Stat(sock)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())
	require.Equal(t, "nbd+unix:///nv?socket="+sock, a.URI())
	require.NoError(t, a.Close())
	_, err = os.Stat(sock)
	require.ErrorIs(t, err, os.ErrNotExist)
}

// QEMU ends first: what was acknowledged is there.
func TestQEMUEnds(t *testing.T) {
	v := newVM(t)
	v.start()
	a := v.attach(nil)
	require.NoError(t, a.Store().Put("a", []byte("x"), nil))
	require.NoError(t, v.qemu.Close())
	v.qemu = nil
	<-a.Ended()
	require.Error(t, a.Store().Put("b", nil, nil))
	require.NoError(t, a.Close())
	v.offline(func(s *nvstore.Store) {
		_, err := s.Get("a")
		require.NoError(t, err)
	})
}

// A snapshot that can't be whole is refused before anything changes.
func TestSnapshotsThatCantBe(t *testing.T) {
	v := newVM(t)
	second, raw := filepath.Join(v.dir, "second.qcow2"), filepath.Join(v.dir, "raw")
	run(t, "qemu-img", "create", "-q", "-f", "qcow2", second, "1M")
	run(t, "qemu-img", "create", "-q", "-f", "raw", raw, "1M")
	run(t, "qemu-img", "snapshot", "-c", "offline", v.disk)
	run(t, "qemu-img", "snapshot", "-c", "offline", second)
	run(t, "qemu-img", "snapshot", "-c", "half", v.disk)
	v.start("-blockdev", "driver=qcow2,node-name=second,file.driver=file,file.filename="+second)
	m, err := live.Connect(ctx, v.qmp, nil)
	require.NoError(t, err)
	defer m.Close()
	require.ErrorIs(t, m.Load(ctx, "offline", nil), image.ErrUnsupported, "it has no memory")
	require.ErrorIs(t, m.Load(ctx, "half", nil), image.ErrNotFound, "one disk hasn't got it")
	require.ErrorIs(t, m.Save(ctx, "half", nil), image.ErrExist)
	require.ErrorIs(t, m.Save(ctx, "", nil), image.ErrUnsupported)
	require.NoError(t, m.Save(ctx, "both", nil))
	list, err := m.Snapshots(ctx)
	require.NoError(t, err)
	require.Len(t, list, 3)
	for _, s := range list {
		require.Equal(t, map[string]int{"offline": 2, "half": 1, "both": 2}[s.Name], len(s.Devices), s.Name)
	}
	c := v.monitor(".1")
	require.NoError(t, c.Do(ctx, "blockdev-add", map[string]any{"driver": "raw", "node-name": "r", "file": map[string]any{"driver": "file", "filename": raw}}, nil))
	require.ErrorIs(t, m.Save(ctx, "more", nil), image.ErrUnsupported, "a raw disk would keep what it has")
	require.ErrorIs(t, m.Load(ctx, "both", nil), image.ErrUnsupported)
	_, running, err := m.Status(ctx)
	require.NoError(t, err)
	require.False(t, running)
	some, err := live.Connect(ctx, v.qmp+".2", &live.Options{Devices: []string{"nvstore-disk", "second"}})
	require.NoError(t, err)
	require.NoError(t, some.Load(ctx, "both", nil))
	require.NoError(t, some.Delete(ctx, "both", nil))
	require.NoError(t, some.Close())
}

// Who snapshots keeps writers of other attachments out, as processes of their
// own would be, and gives up if one of them never leaves.
func TestGateBetweenProcesses(t *testing.T) {
	v := newVM(t)
	v.start()
	a := v.attach(nil)
	m, err := live.Connect(ctx, v.qmp+".1", &live.Options{Timeout: 200 * time.Millisecond})
	require.NoError(t, err)
	defer m.Close()
	inside, leave := make(chan struct{}), make(chan struct{})
	done := make(chan error)
	go func() {
		done <- a.Store().Update(func(tx *nvstore.Tx) error {
			close(inside)
			<-leave
			return tx.Put("a", []byte("x"), nil)
		})
	}()
	<-inside
	require.ErrorIs(t, m.Save(ctx, "s", nil), live.ErrWriters)
	list, err := m.Snapshots(ctx)
	require.NoError(t, err)
	require.Empty(t, list)
	close(leave)
	require.NoError(t, <-done)
	require.NoError(t, m.Save(ctx, "s", nil))
	require.NoError(t, a.Store().Put("b", nil, nil), "the gate is open again")
	require.NoError(t, m.Load(ctx, "s", nil))
	require.NoError(t, a.Close())
	v.quit()
	v.offline(func(s *nvstore.Store) {
		_, err := s.Get("a")
		require.NoError(t, err)
		_, err = s.Get("b")
		require.ErrorIs(t, err, nvstore.ErrNotFound)
	})
}
