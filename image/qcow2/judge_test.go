package qcow2_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

var seedFlag = flag.Uint64("seed", 0, "seed of the random tests; 0 takes the time")

// seed picks the seed of a random test and says how to repeat it.
func seed(t testing.TB) uint64 {
	s := *seedFlag
	if v := os.Getenv("NVSTORE_SEED"); s == 0 && v != "" {
		s, _ = strconv.ParseUint(v, 10, 64)
	}
	if s == 0 {
		s = uint64(time.Now().UnixNano())
	}
	t.Logf("repeat with: go test -run '^%s$' ./image/qcow2 -seed=%d", t.Name(), s)
	return s
}

// scale multiplies the length of long loops.
func scale(n int) int {
	if k, err := strconv.Atoi(os.Getenv("NVSTORE_SCALE")); err == nil && k > 0 {
		return n * k
	}
	return n
}

// tempDir is in memory where the machine has such a place.
func tempDir(t testing.TB) string {
	dir, err := os.MkdirTemp("/dev/shm", "qcow2test")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// dump copies a device to a file, with holes where there are zeros.
func dump(t testing.TB, d image.Device, path string) {
	f, err := os.Create(path)
	require.NoError(t, err)
	defer f.Close()
	buf, zero := make([]byte, 64<<10), make([]byte, 64<<10)
	for off := int64(0); off < d.Size(); off += int64(len(buf)) {
		n, err := d.ReadAt(buf, off)
		if err != nil && err != io.EOF {
			require.NoError(t, err)
		}
		if bytes.Equal(buf[:n], zero[:n]) {
			continue
		}
		_, err = f.WriteAt(buf[:n], off)
		require.NoError(t, err)
	}
	require.NoError(t, f.Truncate(d.Size()))
}

// load reads a file into memory.
func load(t testing.TB, path string) image.Device {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return memory(t, b)
}

func memory(t testing.TB, b []byte) image.Device {
	d := imagetest.NewMemory(int64(len(b)))
	_, err := d.WriteAt(b, 0)
	require.NoError(t, err)
	return d
}

// tool runs a program that must succeed.
func tool(t testing.TB, name string, args ...string) string {
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %q:\n%s", name, args, out)
	return string(out)
}

// qemuCheck runs qemu-img check, and fails on errors; on leaks too, unless
// they are allowed.
func qemuCheck(t testing.TB, path string, leaks bool) {
	t.Helper()
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	var exit *exec.ExitError
	if leaks && errors.As(err, &exit) && exit.ExitCode() == 3 {
		return
	}
	require.NoError(t, err, "%s", out)
}

// qemuRaw returns the content of an image, or of a snapshot, as qemu-img reads
// it.
func qemuRaw(t testing.TB, path, snapshot string) []byte {
	return qemuRead(t, plain(path), snapshot)
}

// qemuRead is qemuRaw of what a program of QEMU's takes for an image.
func qemuRead(t testing.TB, target []string, snapshot string) []byte {
	raw := filepath.Join(tempDir(t), "raw")
	args := []string{"convert", "-O", "raw"}
	if snapshot != "" {
		args = append(args, "-l", snapshot)
	}
	tool(t, "qemu-img", append(append(args, target...), raw)...)
	b, err := os.ReadFile(raw)
	require.NoError(t, err)
	os.Remove(raw)
	return b
}

// checkDevice closes im, whose file is d, and has qemu-img look at it.
func checkDevice(t testing.TB, d *keep, want []byte) {
	t.Helper()
	path := filepath.Join(tempDir(t), "img")
	dump(t, d, path)
	qemuCheck(t, path, false)
	if want != nil {
		got := qemuRaw(t, path, "")
		require.True(t, bytes.Equal(want, got), "qemu-img reads other bytes%s", firstDiff(want, got))
	}
	os.Remove(path)
}

func firstDiff(a, b []byte) string {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf(": at %#x want %#x got %#x", i, a[i], b[i])
		}
	}
	return fmt.Sprintf(": lengths %d and %d", len(a), len(b))
}

// keep is a device that outlives Close.
type keep struct{ image.Device }

func (k *keep) Close() error         { return nil }
func (k *keep) Unwrap() image.Device { return k.Device }

// create makes an image in memory.
func create(t testing.TB, o *qcow2.CreateOptions) (*qcow2.Image, *keep) {
	d := &keep{imagetest.NewMemory(0)}
	im, err := qcow2.Create(d, o)
	require.NoError(t, err)
	return im, d
}

func open(t testing.TB, d image.Device) *qcow2.Image {
	im, err := qcow2.Open(d, nil)
	require.NoError(t, err)
	return im
}

// contents reads the whole disk.
func contents(t testing.TB, im image.Device) []byte {
	b := make([]byte, im.Size())
	require.NoError(t, image.ReadFull(im, b, 0))
	return b
}

// noErrors runs Check, which must find neither errors nor, unless they are
// allowed, leaks.
func noErrors(t testing.TB, im *qcow2.Image, leaks bool) {
	t.Helper()
	r, err := im.Check(t.Context(), nil)
	require.NoError(t, err)
	require.Zero(t, r.Errors, "%+v", r.Findings)
	if !leaks {
		require.Zero(t, r.Leaks, "%+v", r.Findings)
	}
}

// pipe runs a program that must succeed, with an input.
func pipe(t testing.TB, input, name string, args ...string) string {
	cmd := exec.Command(name, args...)
	cmd.Stdin = strings.NewReader(input)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s %q:\n%s", name, args, out)
	return string(out)
}
