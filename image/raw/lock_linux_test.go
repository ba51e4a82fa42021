package raw_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"nvstore.dev/image"
	"nvstore.dev/image/raw"
)

var (
	rw = &raw.Options{}
	ro = &raw.Options{ReadOnly: true}
)

// qemu runs a QEMU tool to its end.
func qemu(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).CombinedOutput()
	return string(out), err
}

func newQcow2(t *testing.T) string {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	out, err := qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")
	require.NoError(t, err, out)
	return path
}

func newRaw(t *testing.T) string {
	path := temp(t)
	d, err := raw.Create(path, 1<<20, nil)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	return path
}

// heldLocks returns the bytes locked in a file, from /proc/self/fdinfo.
func heldLocks(t *testing.T, path string) string {
	fds, err := filepath.Glob("/proc/self/fd/*")
	require.NoError(t, err)
	var held []string
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); to != path {
			continue
		}
		text, err := os.ReadFile(strings.Replace(fd, "/fd/", "/fdinfo/", 1))
		require.NoError(t, err)
		for line := range strings.Lines(string(text)) {
			if w := strings.Fields(line); w[0] == "lock:" {
				require.Equal(t, []string{"OFDLCK", "ADVISORY", "READ"}, w[2:5])
				held = append(held, w[7]+"-"+w[8])
			}
		}
	}
	return strings.Join(held, " ")
}

func TestTheBytesQEMULocks(t *testing.T) {
	path := newRaw(t)
	d := open(t, path, rw)
	require.Equal(t, "100-101 103-103 201-201 203-203", heldLocks(t, path))
	require.NoError(t, d.Close())
	d = open(t, path, ro)
	require.Equal(t, "100-100 201-201 203-203", heldLocks(t, path))
	require.NoError(t, d.Close())
	d = open(t, path, &raw.Options{NoLock: true})
	require.Empty(t, heldLocks(t, path))
	require.NoError(t, d.Close())
}

func TestOneWriterOrManyReaders(t *testing.T) {
	path := newRaw(t)
	w := open(t, path, rw)
	for _, o := range []*raw.Options{rw, ro} {
		_, err := raw.Open(path, o)
		require.ErrorIs(t, err, image.ErrLocked)
		require.ErrorContains(t, err, "this process")
		require.ErrorContains(t, err, path)
	}
	require.Equal(t, "100-101 103-103 201-201 203-203", heldLocks(t, path), "those refused left nothing")
	require.NoError(t, w.Close())

	r1, r2 := open(t, path, ro), open(t, path, ro)
	_, err := raw.Open(path, rw)
	require.ErrorIs(t, err, image.ErrLocked)
	require.NoError(t, r1.Close())
	_, err = raw.Open(path, rw)
	require.ErrorIs(t, err, image.ErrLocked)
	require.NoError(t, r2.Close())
	require.NoError(t, open(t, path, rw).Close())
}

func TestQEMUIsRefusedWhileWeWrite(t *testing.T) {
	for format, path := range map[string]string{"qcow2": newQcow2(t), "raw": newRaw(t)} {
		t.Run(format, func(t *testing.T) {
			d := open(t, path, rw)
			out, err := qemu("qemu-io", "-f", format, "-c", "write 0 512", path)
			require.Error(t, err, out)
			require.Contains(t, out, "lock")
			out, err = qemu("qemu-img", "resize", "-f", format, path, "2M")
			require.Error(t, err, out)
			require.Contains(t, out, "lock")
			if format == "qcow2" { // a raw reader shares everything
				out, err = qemu("qemu-img", "info", path)
				require.Error(t, err, out)
				require.Contains(t, out, "lock")
				out, err = qemu("qemu-img", "check", path)
				require.Error(t, err, out)
			}
			out, err = qemu("qemu-img", "info", "-U", path)
			require.NoError(t, err, out)

			require.NoError(t, d.Close())
			out, err = qemu("qemu-io", "-f", format, "-c", "write 0 512", path)
			require.NoError(t, err, out)
			require.NotContains(t, out, "lock")
		})
	}
}

func TestQEMUMayReadWhileWeRead(t *testing.T) {
	for format, path := range map[string]string{"qcow2": newQcow2(t), "raw": newRaw(t)} {
		t.Run(format, func(t *testing.T) {
			open(t, path, ro)
			out, err := qemu("qemu-img", "info", path)
			require.NoError(t, err, out)
			out, err = qemu("qemu-io", "-f", format, "-r", "-c", "read 0 512", path)
			require.NoError(t, err, out)
			out, err = qemu("qemu-io", "-f", format, "-c", "write 0 512", path)
			require.Error(t, err, out)
			require.Contains(t, out, "lock")
		})
	}
}

// hold starts a program that keeps path open until the test ends, and waits
// until it holds the byte lock. Programs that read commands get a pipe that
// says nothing.
func hold(t *testing.T, path string, lock int, name string, args ...string) (stop func(), pid int) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	gone := make(chan struct{})
	go func() { _ = cmd.Wait(); close(gone) }()
	stop = func() {
		_, _ = io.WriteString(stdin, "quit\n")
		stdin.Close()
		_ = cmd.Process.Signal(os.Interrupt)
		<-gone
	}
	t.Cleanup(stop)
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		locks, err := os.ReadFile("/proc/locks")
		require.NoError(t, err)
		for line := range strings.Lines(string(locks)) {
			var from, to int
			_, at, ok := strings.Cut(line, fmt.Sprintf(":%d ", st.Ino))
			if _, err := fmt.Sscan(at, &from, &to); ok && err == nil && from <= lock && lock <= to {
				return stop, cmd.Process.Pid
			}
		}
		select {
		case <-gone:
			require.Fail(t, name+" ended", "%s", out.String())
		default:
		}
		require.True(t, time.Now().Before(deadline), "%s doesn't lock %s", name, path)
	}
}

func TestWeAreRefusedWhileQEMUWrites(t *testing.T) {
	for _, format := range []string{"qcow2", "raw"} {
		image_ := func(t *testing.T) string {
			if format == "qcow2" {
				return newQcow2(t)
			}
			return newRaw(t)
		}
		for _, tool := range []string{"qemu-io", "qemu-nbd", "qemu-system-x86_64"} {
			t.Run(format+" "+tool, func(t *testing.T) {
				path := image_(t)
				var args []string
				switch tool {
				case "qemu-io":
					args = []string{"-f", format, path}
				case "qemu-nbd":
					args = []string{"-t", "-f", format, "-k", filepath.Join(t.TempDir(), "s"), path}
				default:
					args = []string{
						"-S", "-machine", "q35,accel=tcg", "-m", "64", "-display", "none", "-nodefaults",
						"-drive", "if=virtio,format=" + format + ",file=" + path,
					}
				}
				stop, pid := hold(t, path, 101, tool, args...)
				_, err := raw.Open(path, rw)
				require.ErrorIs(t, err, image.ErrLocked)
				require.ErrorContains(t, err, fmt.Sprintf("process %d (", pid))
				// A raw opener that shares writing still uses it.
				_, err = raw.Open(path, ro)
				require.ErrorIs(t, err, image.ErrLocked)
				require.ErrorContains(t, err, `"write"`)
				require.NoError(t, open(t, path, &raw.Options{ReadOnly: true, NoLock: true}).Close())
				_, err = raw.Create(path, 5, &raw.Options{Overwrite: true})
				require.ErrorIs(t, err, image.ErrLocked)

				stop()
				require.NoError(t, open(t, path, rw).Close())
			})
		}
	}
}

func TestWeMayReadWhileQEMUReads(t *testing.T) {
	for format, path := range map[string]string{"qcow2": newQcow2(t), "raw": newRaw(t)} {
		t.Run(format, func(t *testing.T) {
			hold(t, path, 100, "qemu-io", "-r", "-f", format, path)
			require.NoError(t, open(t, path, ro).Close())
			if format == "qcow2" { // a raw reader shares everything
				_, err := raw.Open(path, rw)
				require.ErrorIs(t, err, image.ErrLocked)
			}
		})
	}
}

func TestAWriteLockIsHeeded(t *testing.T) {
	// libvirt's lock manager may be configured to take real write locks.
	path := newRaw(t)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	require.NoError(t, err)
	defer f.Close()
	lock := func(off int64) error {
		return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK, Start: off, Len: 1})
	}
	require.NoError(t, lock(0))
	require.NoError(t, open(t, path, rw).Close(), "byte 0 is libvirt's, not ours")
	require.NoError(t, lock(101))
	_, err = raw.Open(path, rw)
	require.ErrorIs(t, err, image.ErrLocked)
	_, err = raw.Open(path, ro)
	require.ErrorIs(t, err, image.ErrLocked)
}

func TestCloseReleasesTheLockDespiteAFork(t *testing.T) {
	// A forked child has the descriptor until it execs. A duplicate stands
	// for it: it refers to the same open file, which owns the locks.
	path := newRaw(t)
	d := open(t, path, rw)
	fds, err := filepath.Glob("/proc/self/fd/*")
	require.NoError(t, err)
	for _, fd := range fds {
		if to, _ := os.Readlink(fd); to == path {
			var n int
			_, err := fmt.Sscan(filepath.Base(fd), &n)
			require.NoError(t, err)
			dup, err := unix.Dup(n)
			require.NoError(t, err)
			defer unix.Close(dup)
		}
	}
	require.NoError(t, d.Close())
	require.NoError(t, open(t, path, rw).Close())
}
