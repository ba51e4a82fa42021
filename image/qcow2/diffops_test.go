package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

// The operations of TestDiff.

func (d *diff) note(who, format string, args ...any) {
	d.steps++
	d.log = append(d.log, who+": "+fmt.Sprintf(format, args...))
}

// span is a range of whole sectors, often at borders of clusters.
func (d *diff) span() (off, n int64) {
	size := int64(len(d.disk)) / 512
	off = d.rng.Int64N(size)
	n = 1 + d.rng.Int64N(min(size-off, 1+4*int64(d.cfg.cs)/512))
	if cs := int64(d.cfg.cs) / 512; d.rng.IntN(3) == 0 {
		off = off / cs * cs
		n = min((n+cs-1)/cs*cs, size-off)
	}
	return off * 512, n * 512
}

// turnQEMU has one qemu-io do a few writes, or qemu-img change the image.
func (d *diff) turnQEMU() {
	if d.rng.IntN(4) == 0 {
		d.imgQEMU()
		return
	}
	var cmds []string
	unsure := false
	for range 3 + d.rng.IntN(6) {
		off, n := d.span()
		p := byte(1 + d.rng.IntN(255))
		var cmd string
		switch k := d.rng.IntN(10); {
		case k < 5:
			cmd = fmt.Sprintf("write -P %d %d %d", p, off, n)
		case k < 7:
			cmd, p = fmt.Sprintf("write -z %s %d %d", []string{"", "-u"}[d.rng.IntN(2)], off, n), 0
		case k < 8:
			d.note("qemu-io", "discard %d %d", off, n)
			cmds = append(cmds, fmt.Sprintf("discard %d %d", off, n))
			unsure = true
			continue
		case k < 9:
			cmd, p = "flush", 0
			n = 0
		default:
			// Where something is allocated it fails, or not: what is
			// there then is seen below.
			if d.cfg.data || d.cfg.luks {
				continue
			}
			cs := int64(d.cfg.cs)
			off = off / cs * cs
			n = min(cs, int64(len(d.disk))-off)
			d.note("qemu-io", "write -c %d %d", off, n)
			cmds = append(cmds, fmt.Sprintf("write -c -P %d %d %d", p, off, n))
			d.adopt(cmds, false)
			cmds, unsure = nil, false
			continue
		}
		if unsure {
			d.adopt(cmds, true)
			cmds, unsure = nil, false
		}
		d.note("qemu-io", "%s", cmd)
		cmds = append(cmds, cmd)
		d.written(off, n)
		fill(d.disk[off:off+n], p)
	}
	d.adopt(cmds, unsure)
}

// adopt runs commands. After discards, each byte is zero or what it was; which,
// qemu-img says. After a compressed write, it is what qemu-img says.
func (d *diff) adopt(cmds []string, discarded bool) {
	if len(cmds) == 0 {
		return
	}
	args := []string{"-d", "unmap"}
	for _, c := range cmds {
		args = append(args, "-c", c)
	}
	out, err := exec.Command("qemu-io", append(args, d.target()...)...).CombinedOutput()
	last := cmds[len(cmds)-1]
	if !strings.HasPrefix(last, "write -c") {
		require.NoError(d.t, err, "%s", out)
	}
	if !discarded && !strings.HasPrefix(last, "write -c") {
		return
	}
	got := d.qemuRaw("")
	for i, b := range got {
		if discarded && b != d.disk[i] {
			require.Zero(d.t, b, "byte %#x after a discard, was %#x", i, d.disk[i])
		}
	}
	copy(d.disk, got)
}

// imgQEMU has qemu-img make, apply or delete a snapshot, or resize.
func (d *diff) imgQEMU() {
	run := func(args ...string) bool {
		d.note("qemu-img", "%q", args)
		out, err := exec.Command("qemu-img", append(args, d.target()...)...).CombinedOutput()
		if err != nil && d.cfg.refBits < 16 {
			d.mend() // refcounts overflow, and QEMU leaks
			return false
		}
		require.NoError(d.t, err, "%s", out)
		return true
	}
	switch name := d.anySnapshot(); {
	case d.rng.IntN(3) == 0 && d.resizable():
		size := d.newSize()
		if d.cfg.version == 2 && d.cfg.backing > 0 && size > int64(len(d.disk)) {
			return // QEMU can't hide what a longer backing file has
		}
		args := slices.Concat([]string{"resize", "-q"}, d.target(), []string{fmt.Sprint(size)})
		if size < int64(len(d.disk)) {
			args = slices.Insert(args, 1, "--shrink")
		}
		d.note("qemu-img", "%q", args)
		tool(d.t, "qemu-img", args...)
		old := int64(len(d.disk))
		d.resized(size)
		if cs := int64(d.cfg.cs); size > old && old%cs != 0 {
			// QEMU shows again what a shrink had cut off there.
			end := min(size, old/cs*cs+cs)
			copy(d.disk[old:end], d.qemuRaw("")[old:end])
		}
	case d.cfg.data:
	case name == "" || len(d.snaps) < 3 && d.rng.IntN(2) == 0:
		d.next++
		name = fmt.Sprint("s", d.next)
		if run("snapshot", "-c", name) {
			d.snaps[name] = bytes.Clone(d.disk)
		}
	case d.rng.IntN(2) == 0:
		if d.cfg.bitmap {
			return // QEMU refuses
		}
		if run("snapshot", "-a", name) {
			d.disk = bytes.Clone(d.snaps[name])
		}
	default:
		if run("snapshot", "-d", name) {
			delete(d.snaps, name)
		}
	}
}

func (d *diff) mend() {
	f := d.openRaw("img", false)
	defer f.Close()
	r, err := qcow2.Repair(d.t.Context(), f, nil)
	require.NoError(d.t, err)
	require.Zero(d.t, r.Errors+r.Leaks, "%+v", r)
}

func (d *diff) anySnapshot() string {
	var names []string
	for name := range d.snaps {
		names = append(names, name)
	}
	slices.Sort(names)
	if len(names) == 0 {
		return ""
	}
	return names[d.rng.IntN(len(names))]
}

func (d *diff) resizable() bool { return d.cfg.version == 3 || len(d.snaps) == 0 }

func (d *diff) newSize() int64 {
	old := int64(len(d.disk))
	if d.rng.IntN(2) == 0 {
		return max(512, old/2+d.rng.Int64N(old/2)) &^ 511
	}
	return old + 512*d.rng.Int64N(2000)
}

// resized: new bytes are zeros, even above a longer backing file.
func (d *diff) resized(size int64) {
	old := int64(len(d.disk))
	d.disk = append(bytes.Clone(d.disk[:min(old, size)]), make([]byte, max(0, size-old))...)
	if d.cfg.bitmap {
		n := int((size + diffGranule - 1) / diffGranule)
		d.dirty = append(slices.Clone(d.dirty[:min(len(d.dirty), n)]), make([]bool, max(0, n-len(d.dirty)))...)
	}
}

// turnOurs does a few operations with this driver.
func (d *diff) turnOurs() {
	im := d.open(false)
	for range 3 + d.rng.IntN(6) {
		d.stepOurs(im)
	}
	require.NoError(d.t, im.Close())
}

func (d *diff) stepOurs(im *qcow2.Image) {
	t := d.t
	off, n := d.span()
	p := byte(1 + d.rng.IntN(255))
	switch k := d.rng.IntN(20); {
	case k < 8:
		off += d.rng.Int64N(min(n, 512))
		n = min(n, int64(len(d.disk))-off)
		d.note("ours", "write %d %d", off, n)
		d.written(off, n)
		fill(d.disk[off:off+n], p)
		_, err := im.WriteAt(d.disk[off:off+n], off)
		require.NoError(t, err)
	case k < 11:
		d.note("ours", "zero %d %d", off, n)
		d.written(off, n)
		clear(d.disk[off : off+n])
		require.NoError(t, im.WriteZeroes(off, n))
	case k < 13:
		d.note("ours", "discard %d %d", off, n)
		err := im.Discard(off, n)
		if errors.Is(err, image.ErrUnsupported) {
			return
		}
		require.NoError(t, err)
		got := contents(t, im)
		for i, b := range got {
			if b != d.disk[i] {
				require.Zero(t, b, "byte %#x after a discard, was %#x", i, d.disk[i])
			}
		}
		copy(d.disk, got)
	case k < 14:
		d.note("ours", "sync")
		require.NoError(t, im.Sync())
	case k < 16:
		if d.cfg.data || d.cfg.luks {
			return
		}
		cs := int64(d.cfg.cs)
		off = off / cs * cs
		n = min(cs, int64(len(d.disk))-off)
		d.note("ours", "compressed %d %d", off, n)
		d.written(off, n)
		fill(d.disk[off:off+n], p, p, 3)
		_, err := im.WriteCompressed(d.disk[off:off+n], off)
		require.NoError(t, err)
	case k < 17:
		if !d.resizable() {
			return
		}
		size := d.newSize()
		d.note("ours", "resize %d", size)
		require.NoError(t, im.Resize(size))
		d.resized(size)
	case k < 18:
		d.amendOurs(im)
	default:
		d.snapshotOurs(im)
	}
}

// amendOurs changes the width of refcounts.
func (d *diff) amendOurs(im *qcow2.Image) {
	if d.cfg.version == 2 {
		return
	}
	bits := 1 << d.rng.IntN(7)
	d.note("ours", "amend refcount_bits=%d", bits)
	err := im.Amend(d.t.Context(), &qcow2.AmendOptions{RefcountBits: bits})
	if errors.Is(err, image.ErrUnsupported) {
		return
	}
	require.NoError(d.t, err)
	d.cfg.refBits = bits
}

func (d *diff) snapshotOurs(im *qcow2.Image) {
	if d.cfg.data {
		return
	}
	t := d.t
	failed := func(err error) bool {
		if d.cfg.refBits < 16 && errors.Is(err, image.ErrUnsupported) {
			return true // refcounts overflow
		}
		require.NoError(t, err)
		return false
	}
	switch name := d.anySnapshot(); {
	case name == "" || len(d.snaps) < 3 && d.rng.IntN(2) == 0:
		d.next++
		name = fmt.Sprint("s", d.next)
		d.note("ours", "snapshot %s", name)
		if !failed(im.Snapshots().Create(name)) {
			d.snaps[name] = bytes.Clone(d.disk)
		}
	case d.rng.IntN(2) == 0:
		d.note("ours", "revert %s", name)
		if !failed(im.Snapshots().Revert(name)) {
			d.resized(int64(len(d.snaps[name])))
			d.disk = bytes.Clone(d.snaps[name])
			d.written(0, int64(len(d.disk)))
		}
	default:
		d.note("ours", "delete %s", name)
		if !failed(im.Snapshots().Delete(name)) {
			delete(d.snaps, name)
		}
	}
}

// keepImage copies the image of a failed test to where it can be looked at.
func (d *diff) keepImage() {
	if dir := os.Getenv("NVSTORE_QCOW2_KEEP"); dir != "" {
		b, _ := os.ReadFile(d.path)
		_ = os.WriteFile(filepath.Join(dir, "img"), b, 0o600)
	}
}
