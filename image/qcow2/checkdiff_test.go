package qcow2_test

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

// qemuVerdict is qemu-img check's exit code: 0, 2 for errors, 3 for leaks, 1 if
// it can't open the image.
func qemuVerdict(t *testing.T, b []byte) (int, string) {
	path := filepath.Join(tempDir(t), "img")
	dump(t, memory(t, b), path)
	return qemuVerdictOf(t, path)
}

func qemuVerdictOf(t *testing.T, path string) (int, string) {
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode(), string(out)
	}
	require.NoError(t, err)
	return 0, string(out)
}

// TestCheckAgreesWithQEMU damages an entry of some table and compares Check
// with qemu-img check: what QEMU finds, Check finds.
func TestCheckAgreesWithQEMU(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 5))
	var agreed, stricter int
	for range scale(150) {
		v := newVictim(t)
		tables := []uint64{v.l1, v.l2, v.rt, v.rb, v.st, v.sl1, v.l2, v.rb}
		off := tables[rng.IntN(len(tables))] + 8*uint64(rng.IntN(16))
		old := v.get(off)
		v.put(off, damage(rng, old))
		code, out := qemuVerdict(t, v.b)

		im, err := qcow2.Open(memory(t, v.b), &qcow2.OpenOptions{ReadOnly: true})
		if err != nil {
			require.NotZero(t, code, "%#x: %#x for %#x: %v; qemu-img: %s", off, v.get(off), old, err, out)
			continue
		}
		r, err := im.Check(t.Context(), nil)
		require.NoError(t, err)
		ours := 0
		if r.Errors > 0 {
			ours = 2
		} else if r.Leaks > 0 {
			ours = 3
		}
		what := []any{"%#x: %#x for %#x: %+v; qemu-img: %s", off, v.get(off), old, r, out}
		switch {
		case code == ours:
			agreed++
		case code == 0 || code == 3 && ours == 2:
			stricter++ // reserved bits, overlaps, ...
			for _, f := range r.Findings {
				require.Contains(t, []string{"l1-entry", "l2-entry", "overlap", "snapshot", "refcount-table", "leak", "outside"}, f.Code, what...)
			}
		default:
			require.Equal(t, 1, code, what...)
		}
	}
	t.Logf("%d verdicts agree, %d are stricter", agreed, stricter)
	require.Greater(t, agreed, stricter)
}

// damage changes an entry a little, or altogether.
func damage(rng *rand.Rand, v uint64) uint64 {
	switch rng.IntN(6) {
	case 0:
		return 0
	case 1:
		return v ^ 1<<rng.IntN(64)
	case 2:
		return v ^ 1<<63
	case 3:
		return uint64(rng.IntN(16))<<12 | uint64(rng.IntN(2))<<63
	case 4:
		var b [8]byte
		binary.BigEndian.PutUint64(b[:], v)
		b[rng.IntN(8)] = byte(rng.Uint32())
		return binary.BigEndian.Uint64(b[:])
	}
	return rng.Uint64()
}

// TestCheckMemory counts references in many small windows.
func TestCheckMemory(t *testing.T) {
	im, _ := create(t, &qcow2.CreateOptions{Size: 4 << 20, ClusterSize: 512})
	_, err := im.WriteAt(make([]byte, 3<<20), 12345)
	require.NoError(t, err)
	require.NoError(t, im.Snapshots().Create("s"))
	_, err = im.WriteAt(make([]byte, 1<<20), 0)
	require.NoError(t, err)
	for _, mem := range []int64{1, 9000, 100000} {
		r, err := im.Check(t.Context(), &qcow2.CheckOptions{Memory: mem})
		require.NoError(t, err)
		require.Zero(t, r.Errors+r.Leaks, "%+v", r.Findings)
		require.Equal(t, int64(6169), r.Allocated)
	}
}

// TestCheckLeaks finds what nothing refers to, also where qemu-img doesn't look:
// behind the end of the file.
func TestCheckLeaks(t *testing.T) {
	v := newVictim(t)
	end := uint64(len(v.b)) / 4096
	for _, c := range []uint64{end, end + 1, end + 2, end + 100, 2047} {
		v.refcount(c, 3)
	}
	im, err := qcow2.Open(memory(t, v.b), &qcow2.OpenOptions{ReadOnly: true})
	require.NoError(t, err)
	r, err := im.Check(t.Context(), nil)
	require.NoError(t, err)
	require.Equal(t, int64(5), r.Leaks)
	require.Zero(t, r.Errors)
}

// TestRepairLeaks repairs what crashes leave, and leaks anywhere.
func TestRepairLeaks(t *testing.T) {
	v := newVictim(t)
	end := uint64(len(v.b)) / 4096
	for _, c := range []uint64{end, end + 1, 2047} {
		v.refcount(c, 3)
	}
	v.refcount(v.cluster(v.data), 2)   // with a copied flag
	v.refcount(v.cluster(v.shared), 7) // of 2
	v.refcount(v.l2/4096, 2)
	d := &keep{memory(t, v.b)}
	im := open(t, d)
	want := contents(t, im)
	r, err := im.RepairLeaks(t.Context())
	require.NoError(t, err)
	require.Equal(t, int64(6), r.Leaks)
	require.Equal(t, int64(2), r.Errors, "copied flags")
	noErrors(t, im, false)
	_, err = im.WriteAt([]byte("usable"), 4*4096)
	require.NoError(t, err)
	copy(want[4*4096:], "usable")
	require.NoError(t, im.Close())
	checkDevice(t, d, want)

	v.refcount(v.cluster(v.shared), 1)
	im = open(t, memory(t, v.b))
	_, err = im.RepairLeaks(t.Context())
	require.ErrorIs(t, err, image.ErrCorrupt)
}
