package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

func bytesOf(t testing.TB, d image.Device) []byte {
	b := make([]byte, d.Size())
	require.NoError(t, image.ReadFull(d, b, 0))
	return b
}

func repair(t testing.TB, d image.Device, o *qcow2.RepairOptions) *qcow2.CheckResult {
	t.Helper()
	r, err := qcow2.Repair(t.Context(), d, o)
	require.NoError(t, err)
	return r
}

// TestRepairAgreesWithQEMU damages entries of tables and repairs. What
// qemu-img check -r all makes whole is made whole, with the same content.
func TestRepairAgreesWithQEMU(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 6))
	var whole, beyond, neither, skipped int
	path := filepath.Join(tempDir(t), "img")
	for range scale(60) {
		v := newVictim(t)
		tables := []uint64{v.l1, v.l2, v.rt, v.rb, v.rb, v.rb}
		for range 1 + rng.IntN(4) {
			off := tables[rng.IntN(len(tables))] + 8*uint64(rng.IntN(16))
			v.put(off, damage(rng, v.get(off)))
		}
		dump(t, memory(t, v.b), path)
		_, _ = exec.Command("qemu-img", "check", "-f", "qcow2", "-r", "all", path).CombinedOutput()
		code, out := qemuVerdictOf(t, path)

		d := memory(t, v.b)
		r, err := qcow2.Repair(t.Context(), d, nil)
		if err != nil {
			require.ErrorIs(t, err, image.ErrCorrupt)
			skipped++
			continue
		}
		require.Zero(t, r.Leaks, "%+v", r)
		switch {
		case r.Errors == 0:
			ours, msg := qemuVerdict(t, bytesOf(t, d))
			require.Zero(t, ours, msg)
			noErrors(t, open(t, &keep{d}), false)
			if code == 0 {
				whole++
				if theirs, ok := tryRaw(path); ok { // a clean image may not be readable
					require.Equal(t, theirs, contents(t, open(t, &keep{d})))
				}
			} else {
				beyond++
			}
		case code != 0:
			neither++
		default:
			// What is left is what qemu-img doesn't look for.
			// Tables that lie where something else does aren't touched.
			var codes []string
			for _, f := range r.Findings {
				codes = append(codes, f.Code)
			}
			require.Subset(t, []string{"overlap", "outside", "l1-entry", "l2-entry", "copied"}, codes, "%+v; qemu-img: %s", r, out)
			require.False(t, slices.Contains(codes, "copied") && !slices.Contains(codes, "overlap"), "%+v", r)
		}
	}
	t.Logf("%d repaired by both, %d by this driver only, %d by neither, %d refused", whole, beyond, neither, skipped)
	require.Greater(t, whole, 20)
}

// tryRaw returns the content as qemu-img reads it, if it can.
func tryRaw(path string) ([]byte, bool) {
	raw := path + ".raw"
	defer os.Remove(raw)
	if exec.Command("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, raw).Run() != nil {
		return nil, false
	}
	b, err := os.ReadFile(raw)
	return b, err == nil
}

// TestRepairStructures has one fault each that is repaired to the last error.
func TestRepairStructures(t *testing.T) {
	for name, fault := range map[string]func(v *victim){
		"no refcounts":         func(v *victim) { clear(v.b[v.rb : v.rb+4096]) },
		"all refcounts 1":      func(v *victim) { fill(v.b[v.rb:v.rb+4096], 0, 1) },
		"refcounts of 0xffff":  func(v *victim) { fill(v.b[v.rb:v.rb+4096], 0xff, 0xff) },
		"no refcount block":    func(v *victim) { v.put(v.rt, 0) },
		"block unaligned":      func(v *victim) { v.put(v.rt, v.rb+512) },
		"block outside":        func(v *victim) { v.put(v.rt, 1<<40) },
		"block is the L1":      func(v *victim) { v.put(v.rt, v.l1) },
		"block twice":          func(v *victim) { v.put(v.rt+8, v.rb) },
		"table of junk":        func(v *victim) { fill(v.b[v.rt:v.rt+4096], 0xa5, 0x17) },
		"live cluster at 0":    func(v *victim) { v.refcount(v.cluster(v.data), 0) },
		"dirty":                func(v *victim) { v.b[79] |= 1 },
		"dirty and refcounts":  func(v *victim) { v.b[79] |= 1; v.refcount(v.cluster(v.data), 0) },
		"corrupt":              func(v *victim) { v.b[79] |= 2 },
		"copied flag":          func(v *victim) { v.put(v.data, v.get(v.data)&^(1<<63)) },
		"copied flag, shared":  func(v *victim) { v.put(v.shared, v.get(v.shared)|1<<63) },
		"L1 copied flag":       func(v *victim) { v.put(v.l1, v.get(v.l1)&^(1<<63)) },
		"L1 reserved bits":     func(v *victim) { v.put(v.l1, v.get(v.l1)|1<<57|1) },
		"L2 reserved bits":     func(v *victim) { v.put(v.data, v.get(v.data)|1<<58|4) },
		"copied, no cluster":   func(v *victim) { v.put(v.l2+8, 1<<63) },
		"zero, unaligned":      func(v *victim) { v.put(v.l2+8, v.get(v.data)|512|1) },
		"odd size":             func(v *victim) { v.put(24, 4<<20-1) },
		"header of 105":        func(v *victim) { v.put32(100, 109) },
		"bitmaps, no bitmaps":  func(v *victim) { v.b[95] |= 1 },
		"bitmaps outside":      func(v *victim) { v.bitmaps(1, 32, 1<<40) },
		"extra data too long":  func(v *victim) { v.put32(v.st+36, 1100) },
		"more snapshots":       func(v *victim) { v.put32(60, 300) },
		"no refcount table":    func(v *victim) { v.put32(56, 0) },
		"table of 16 MiB":      func(v *victim) { v.put32(56, 4096) },
		"table unaligned":      func(v *victim) { v.put(48, v.rt+512) },
		"table outside":        func(v *victim) { v.put(48, 1<<40) },
		"table beyond 2^56":    func(v *victim) { v.put(48, 1<<60) },
		"table at 0":           func(v *victim) { v.put(48, 0) },
		"100000 snapshots":     func(v *victim) { v.put32(60, 100_000) },
		"leaks":                func(v *victim) { v.refcount(100, 7); v.refcount(v.cluster(v.data), 3) },
		"leaks behind the end": func(v *victim) { v.refcount(2000, 1) },
	} {
		t.Run(name, func(t *testing.T) {
			v := newVictim(t)
			want := bytesOf(t, open(t, &keep{memory(t, v.b)}))
			fault(v)
			for _, fixed := range []bool{false, true} {
				file := imagetest.NewCrash(int64(len(v.b)), &imagetest.CrashOptions{Fixed: fixed})
				_, err := file.WriteAt(v.b, 0)
				require.NoError(t, err)
				r, err := qcow2.Repair(t.Context(), file, &qcow2.RepairOptions{Check: qcow2.CheckOptions{Memory: 1}})
				if fixed && err != nil {
					require.ErrorIs(t, err, image.ErrNoSpace)
					continue
				}
				require.NoError(t, err)
				require.Zero(t, r.Errors+r.Leaks, "%+v", r)
				require.NotZero(t, len(r.Fixed)+boolInt(name == "extra data too long" || name == "more snapshots"), "%+v", r)
				code, out := qemuVerdict(t, bytesOf(t, file))
				require.Zero(t, code, out)
				im := open(t, &keep{file})
				require.True(t, bytes.Equal(want[:im.Size()], contents(t, im)))
				_, err = im.WriteAt([]byte("usable"), 100*4096)
				require.NoError(t, errorUnless(fixed, err))
			}
		})
	}
}

// TestRepairSnapshots has more snapshots than there may be: the first 65536 stay.
func TestRepairSnapshots(t *testing.T) {
	v := newVictim(t)
	want := bytesOf(t, open(t, &keep{memory(t, v.b)}))
	be := binary.BigEndian
	const n = 65_540
	at := uint64(len(v.b)+4095) / 4096 * 4096
	table := make([]byte, 0, n*72)
	for i := range n {
		e := make([]byte, 72)
		id := fmt.Sprint(100_000 + i)
		be.PutUint16(e[12:], uint16(len(id)))
		be.PutUint32(e[36:], 24) // extra data: a disk of 0 bytes, for which no L1 table is needed
		be.PutUint64(e[56:], 1<<64-1)
		copy(e[64:], id)
		table = append(table, e...)
	}
	b := append(append(bytes.Clone(v.b), make([]byte, at-uint64(len(v.b)))...), table...)
	be.PutUint32(b[60:], n)
	be.PutUint64(b[64:], at)
	d := &keep{memory(t, b)}
	_, err := qcow2.Open(d, nil)
	require.ErrorIs(t, err, image.ErrFormat)
	r := repair(t, d, nil)
	require.Zero(t, r.Errors+r.Leaks, "%+v", r)
	im := open(t, d)
	list, err := im.Snapshots().List()
	require.NoError(t, err)
	require.Len(t, list, 65_536)
	require.Equal(t, "165535", list[65_535].ID)
	require.True(t, bytes.Equal(want, contents(t, im)))
	require.NoError(t, im.Snapshots().Delete("100000"))
	noErrors(t, im, false)
	require.NoError(t, im.Close())
	checkDevice(t, d, want)
}

func errorUnless(ok bool, err error) error {
	if ok {
		return nil
	}
	return err
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

func fill(b []byte, p ...byte) {
	for i := range b {
		b[i] = p[i%len(p)]
	}
}

// bitmaps adds a bitmaps extension.
func (v *victim) bitmaps(n uint32, size, off uint64) {
	v.extension(0x23852875, 24, "")
	v.put32(120, n)
	v.put(128, size)
	v.put(136, off)
	v.b[95] |= 1
}

// TestRepairLeaksOnly lowers refcounts and leaves errors alone.
func TestRepairLeaksOnly(t *testing.T) {
	v := newVictim(t)
	v.refcount(200, 5)
	v.refcount(v.cluster(v.data), 0)
	d := memory(t, v.b)
	r := repair(t, d, &qcow2.RepairOptions{LeaksOnly: true})
	require.Zero(t, r.Leaks)
	require.Equal(t, int64(1), r.LeaksFixed)
	require.Equal(t, int64(2), r.Errors, "refcount and copied flag: %+v", r.Findings)
	r = repair(t, d, nil)
	require.Zero(t, r.Errors)
	require.Equal(t, int64(2), r.ErrorsFixed)
}

// TestRepairCrash cuts the power at every write of a repair. The image is no
// worse then: another repair makes it whole.
func TestRepairCrash(t *testing.T) {
	faults := map[string]func(v *victim){
		"refcounts": func(v *victim) {
			clear(v.b[v.rb : v.rb+32])
			v.put(v.data, v.get(v.data)&^(1<<63))
			v.put(v.shared, v.get(v.shared)|1<<63)
			v.put(v.l1, v.get(v.l1)|1<<57)
		},
		"snapshots": func(v *victim) { v.put32(60, 2); v.b[79] |= 3 },
		"bitmaps":   func(v *victim) { v.bitmaps(1, 32, 1<<40) },
	}
	states := 0
	for name, fault := range faults {
		v := newVictim(t)
		want := contents(t, open(t, &keep{memory(t, v.b)}))
		fault(v)
		file := imagetest.NewCrash(int64(len(v.b)), nil)
		_, err := file.WriteAt(v.b, 0)
		require.NoError(t, err)
		require.NoError(t, file.Sync())
		file.Settle()
		r := repair(t, file, nil)
		require.Zero(t, r.Errors, "%+v", r)
		for at := range file.Len() + 1 {
			cfg := &imagetest.StateConfig{Exhaustive: 6, Samples: 6, Seed: uint64(at)}
			for s := range file.CrashStates(at, cfg) {
				states++
				d := s.Open()
				r, err := qcow2.Repair(t.Context(), d, nil)
				require.NoError(t, err, "%s: %s", name, s)
				require.Zero(t, r.Errors+r.Leaks, "%s: %s: %+v", name, s, r)
				im := open(t, d)
				require.True(t, bytes.Equal(want, contents(t, im)), "%s: %s", name, s)
				list, err := im.Snapshots().List()
				require.NoError(t, err)
				require.Len(t, list, 1)
			}
		}
	}
	t.Logf("%d states", states)
}

// TestDirty repairs on open for writing what QEMU left dirty.
func TestDirty(t *testing.T) {
	path := filepath.Join(tempDir(t), "img")
	qemuCreate(t, path, "cluster_size=4096,lazy_refcounts=on", 1<<20)
	// qemu-io kills itself, so that refcounts aren't written.
	_ = exec.Command("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 300k", "-c", "flush", "-c", "sigraise 9", path).Run()
	d := &keep{load(t, path)}
	code, out := qemuVerdict(t, bytesOf(t, d))
	require.Equal(t, 2, code, out)
	ro, err := qcow2.Open(d, &qcow2.OpenOptions{ReadOnly: true})
	require.NoError(t, err)
	r, err := ro.Check(t.Context(), nil)
	require.NoError(t, err)
	require.Positive(t, r.Errors)
	im := open(t, d)
	noErrors(t, im, false)
	want := make([]byte, 1<<20)
	fill(want[:300<<10], 7)
	require.Equal(t, want, contents(t, im))
	_, err = im.WriteAt([]byte("more"), 400<<10)
	require.NoError(t, err)
	copy(want[400<<10:], "more")
	require.NoError(t, im.Close())
	checkDevice(t, d, want)
}

// TestLazyRefcounts writes refcounts when the image is closed. Killed before,
// it is dirty, and QEMU and this driver repair it when they open it.
func TestLazyRefcounts(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	require.NoError(t, im.Amend(t.Context(), &qcow2.AmendOptions{LazyRefcounts: yes()}))
	dirty := func() bool { return bytesOf(t, d)[79]&1 != 0 }
	want := make([]byte, 4<<20)
	for i := range 20 {
		off := i * 150_000
		fill(want[off:off+70_000], byte(i+1))
		_, err := im.WriteAt(want[off:off+70_000], int64(off))
		require.NoError(t, err)
		require.NoError(t, im.Sync())
	}
	require.True(t, dirty())
	killed := bytesOf(t, d)
	noErrors(t, im, false) // which writes refcounts
	require.NoError(t, im.Close())
	require.False(t, dirty())
	checkDevice(t, d, want)

	path := filepath.Join(tempDir(t), "img")
	dump(t, memory(t, killed), path)
	code, out := qemuVerdictOf(t, path)
	require.Equal(t, 2, code, out)
	qemuIO(t, path, "write -P 9 0 4k")
	qemuCheck(t, path, false)
	again := &keep{memory(t, killed)}
	im = open(t, again)
	require.Equal(t, want, contents(t, im))
	require.NoError(t, im.Amend(t.Context(), &qcow2.AmendOptions{LazyRefcounts: no()}))
	require.NoError(t, im.Close())
	checkDevice(t, again, want)
}
