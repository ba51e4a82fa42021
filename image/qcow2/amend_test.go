package qcow2_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

func yes() *bool { b := true; return &b }
func no() *bool  { return new(bool) }

// amends are steps from one image to the next, with qemu-img amend's options
// for the same.
var amends = []struct {
	o    qcow2.AmendOptions
	qemu string
}{
	{qcow2.AmendOptions{RefcountBits: 64}, "refcount_bits=64"},
	{qcow2.AmendOptions{RefcountBits: 8}, "refcount_bits=8"},
	{qcow2.AmendOptions{LazyRefcounts: yes()}, "lazy_refcounts=on"},
	{qcow2.AmendOptions{RefcountBits: 16, LazyRefcounts: no()}, "refcount_bits=16,lazy_refcounts=off"},
	{qcow2.AmendOptions{Version: 2}, "compat=0.10"},
	{qcow2.AmendOptions{Version: 3}, "compat=1.1"},
	{qcow2.AmendOptions{Size: 6 << 20, RefcountBits: 32}, "size=6M,refcount_bits=32"},
}

// amendable makes an image with a snapshot, zero clusters of both kinds, shared
// and not, and a compressed cluster.
func amendable(t testing.TB, cs int) []byte {
	path := filepath.Join(tempDir(t), "img")
	qemuCreate(t, path, fmt.Sprint("cluster_size=", cs), 4<<20)
	qemuIO(t, path, "write -P 1 0 1M", "write -c -P 2 2M 64k", "write -z 128k 64k", "write -z 3M 128k")
	tool(t, "qemu-img", "snapshot", "-c", "s", path)
	qemuIO(t, path, "write -P 3 512k 100k", "write -z 600k 64k", "write -z 3300k 64k")
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// qemuInfo is what qemu-img info says, without what depends on the file.
func qemuInfo(t testing.TB, path string) map[string]any {
	var m map[string]any
	require.NoError(t, json.Unmarshal([]byte(tool(t, "qemu-img", "info", "-f", "qcow2", "--output=json", path)), &m))
	for _, k := range []string{"filename", "actual-size", "dirty-flag"} {
		delete(m, k)
	}
	return m
}

// TestAmendLikeQEMU amends one image step by step, and a copy with qemu-img.
// Both say the same of themselves afterwards, and have the same content.
func TestAmendLikeQEMU(t *testing.T) {
	for _, cs := range []int{4096, 65536} {
		t.Run(fmt.Sprint(cs), func(t *testing.T) {
			dir := tempDir(t)
			ours, theirs := filepath.Join(dir, "ours"), filepath.Join(dir, "theirs")
			b := amendable(t, cs)
			require.NoError(t, os.WriteFile(theirs, b, 0o600))
			d := &keep{memory(t, b)}
			saved := qemuRaw(t, theirs, "s")
			for _, a := range amends {
				im := open(t, d)
				require.NoError(t, im.Amend(t.Context(), &a.o), a.qemu)
				noErrors(t, im, false)
				_, err := im.WriteAt([]byte(a.qemu), 1234567)
				require.NoError(t, err)
				require.NoError(t, im.Close())
				dump(t, d, ours)
				qemuCheck(t, ours, false)

				tool(t, "qemu-img", "amend", "-f", "qcow2", "-o", a.qemu, theirs)
				f := strings.NewReader(a.qemu)
				pattern := filepath.Join(dir, "pattern")
				p, _ := io.ReadAll(f)
				require.NoError(t, os.WriteFile(pattern, p, 0o600))
				qemuIO(t, theirs, fmt.Sprintf("write -s %s 1234567 %d", pattern, len(p)))
				require.Equal(t, qemuInfo(t, theirs), qemuInfo(t, ours), a.qemu)
				require.True(t, bytes.Equal(qemuRaw(t, theirs, ""), qemuRaw(t, ours, "")), a.qemu)
				got := qemuRaw(t, ours, "s")
				require.True(t, bytes.Equal(saved, got[:len(saved)]), "%s: snapshot%s", a.qemu, firstDiff(saved, got))
			}
		})
	}
}

// TestAmendRefused leaves an image that can't be what is asked as it is.
func TestAmendRefused(t *testing.T) {
	for name, c := range map[string]struct {
		create qcow2.CreateOptions
		amend  qcow2.AmendOptions
	}{
		"version 4":                {qcow2.CreateOptions{}, qcow2.AmendOptions{Version: 4}},
		"refcounts of 3":           {qcow2.CreateOptions{}, qcow2.AmendOptions{RefcountBits: 3}},
		"refcounts of 128":         {qcow2.CreateOptions{}, qcow2.AmendOptions{RefcountBits: 128}},
		"narrow refcounts in v2":   {qcow2.CreateOptions{Version: 2}, qcow2.AmendOptions{RefcountBits: 8}},
		"v2 with narrow refcounts": {qcow2.CreateOptions{RefcountBits: 8}, qcow2.AmendOptions{Version: 2}},
		"lazy refcounts in v2":     {qcow2.CreateOptions{Version: 2}, qcow2.AmendOptions{LazyRefcounts: yes()}},
		"data file":                {qcow2.CreateOptions{}, qcow2.AmendOptions{DataFile: "x"}},
		"raw data file":            {qcow2.CreateOptions{}, qcow2.AmendOptions{RawDataFile: yes()}},
		"odd size":                 {qcow2.CreateOptions{}, qcow2.AmendOptions{Size: 1000}},
		"1 bit for a snapshot":     {qcow2.CreateOptions{}, qcow2.AmendOptions{RefcountBits: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			c.create.Size = 1 << 20
			im, d := create(t, &c.create)
			_, err := im.WriteAt([]byte("something"), 5000)
			require.NoError(t, err)
			require.NoError(t, im.Snapshots().Create("s"))
			before := bytesOf(t, d)
			require.ErrorIs(t, im.Amend(t.Context(), &c.amend), image.ErrUnsupported)
			require.True(t, bytes.Equal(before[:512], bytesOf(t, d)[:512]))
			noErrors(t, im, false)
			_, err = im.WriteAt([]byte("usable"), 5000)
			require.NoError(t, err)
			require.NoError(t, im.Close())
			checkDevice(t, d, nil)
		})
	}
}

// TestAmendCrash cuts the power at every write of each step.
func TestAmendCrash(t *testing.T) {
	file := imagetest.NewCrash(0, nil)
	b := amendable(t, 4096)
	require.NoError(t, file.Resize(int64(len(b))))
	_, err := file.WriteAt(b, 0)
	require.NoError(t, err)
	states := 0
	for _, a := range amends {
		file = file.Reopen()
		require.NoError(t, file.Sync())
		file.Settle()
		im, err := qcow2.Open(file, nil)
		require.NoError(t, err)
		want := contents(t, im)
		require.NoError(t, im.Amend(t.Context(), &a.o), a.qemu)
		for at := range file.Len() + 1 {
			cfg := &imagetest.StateConfig{Exhaustive: 3, Samples: 2, Seed: uint64(at)}
			for s := range file.CrashStates(at, cfg) {
				if states++; states%4 > 0 {
					continue
				}
				im, err := qcow2.Open(s.Open(), nil)
				require.NoError(t, err, "%s: %s", a.qemu, s)
				noErrors(t, im, true)
				got := contents(t, im)
				require.True(t, bytes.Equal(want, got[:len(want)]), "%s: %s", a.qemu, s)
				require.NoError(t, im.Snapshots().Revert("s"))
			}
		}
		require.NoError(t, im.Close())
	}
	t.Logf("%d states", states)
}

// TestVMStateWritten writes a VM's state, takes it into a snapshot and reads it from
// there, also after the disk changed its size and QEMU had the image.
func TestVMStateWritten(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{{ClusterSize: 512}, {ClusterSize: 4096, Version: 2}, {}} {
		o.Size = 1<<20 + 512
		im, d := create(t, &o)
		_, err := im.WriteAt([]byte("disk"), o.Size-4)
		require.NoError(t, err)
		state := bytes.Repeat([]byte("state of a VM. "), 20000)
		for off := 0; off < len(state); off += 70000 {
			p := state[off:min(off+70000, len(state))]
			n, err := im.WriteVMState(p, int64(off))
			require.NoError(t, err)
			require.Equal(t, len(p), n)
		}
		count := int64(12345)
		spec := &qcow2.SnapshotSpec{Name: "vm", ID: "7", VMState: int64(len(state)), VMClock: time.Hour, ICount: &count,
			Time: time.Unix(1e9, 5)}
		require.NoError(t, im.TakeSnapshot(spec))
		require.ErrorIs(t, im.TakeSnapshot(&qcow2.SnapshotSpec{Name: "7"}), image.ErrExist)
		require.ErrorIs(t, im.TakeSnapshot(&qcow2.SnapshotSpec{Name: "x", VMState: 1}), image.ErrOutOfRange, "it is gone")
		require.NoError(t, im.TakeSnapshot(&qcow2.SnapshotSpec{Name: "none"}))
		if o.Version != 2 {
			require.NoError(t, im.Resize(5<<20))
		}
		noErrors(t, im, false)
		require.NoError(t, im.Close())

		path := filepath.Join(tempDir(t), "img")
		dump(t, d, path)
		qemuCheck(t, path, false)
		snaps := qemuInfo(t, path)["snapshots"].([]any)
		first := snaps[0].(map[string]any)
		require.Equal(t, map[string]any{"id": "7", "name": "vm", "icount": 12345., "vm-state-size": float64(len(state)),
			"date-sec": 1e9, "date-nsec": 5., "vm-clock-sec": 3600., "vm-clock-nsec": 0.}, first)
		require.Equal(t, "8", snaps[1].(map[string]any)["id"])
		tool(t, "qemu-img", "snapshot", "-d", "none", path)
		qemuIO(t, path, "write -P 9 0 64k")

		im = open(t, load(t, path))
		r, err := im.VMState("vm")
		require.NoError(t, err)
		require.Equal(t, int64(len(state)), r.Size())
		got, err := io.ReadAll(r)
		require.NoError(t, err)
		require.True(t, bytes.Equal(state, got), firstDiff(state, got))
		require.NoError(t, im.Snapshots().Revert("vm"))
		require.Equal(t, o.Size, im.Size())
		got, err = io.ReadAll(io.NewSectionReader(r, 100, 1000))
		require.NoError(t, err)
		require.Equal(t, state[100:1100], got)
		list, err := im.Snapshots().List()
		require.NoError(t, err)
		require.Equal(t, &count, list[0].ICount)
		require.NoError(t, im.Snapshots().Delete("7"))
		_, err = r.ReadAt(got, 0)
		require.ErrorIs(t, err, image.ErrNotFound)
		noErrors(t, im, false)
	}
}

// TestVMStateByQEMU reads what a VM's savevm wrote.
func TestVMStateByQEMU(t *testing.T) {
	path := filepath.Join(tempDir(t), "img")
	qemuCreate(t, path, "cluster_size=65536", 8<<20)
	cmd := "savevm first\nqemu-io d \"write -P 7 0 64k\"\nsavevm second\nquit\n"
	pipe(t, cmd, "qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none", "-monitor", "stdio",
		"-drive", "if=none,id=d,format=qcow2,file="+path)
	d := &keep{load(t, path)}
	im := open(t, d)
	list, err := im.Snapshots().List()
	require.NoError(t, err)
	require.Len(t, list, 2)
	for _, s := range list {
		r, err := im.VMState(s.Name)
		require.NoError(t, err)
		b, err := io.ReadAll(r)
		require.NoError(t, err)
		require.Positive(t, len(b))
		require.Equal(t, []byte("QEVM"), b[:4])
	}
	require.NoError(t, im.Snapshots().Delete("first"))
	require.NoError(t, im.Resize(20<<20))
	require.NoError(t, im.Close())
	dump(t, d, path)
	qemuCheck(t, path, false)
	out := pipe(t, "loadvm second\ninfo status\nquit\n", "qemu-system-x86_64", "-M", "none", "-nodefaults", "-display", "none",
		"-monitor", "stdio", "-drive", "if=none,id=d,format=qcow2,file="+path)
	require.NotContains(t, out, "rror")
	require.Equal(t, int64(8<<20), open(t, load(t, path)).Size())
	require.False(t, slices.Contains(qemuRaw(t, path, "")[:64<<10], 0))
}
