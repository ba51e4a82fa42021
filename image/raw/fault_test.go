package raw_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"nvstore.dev/image"
	"nvstore.dev/image/raw"
)

// flaky is an operating system with errors to give.
type flaky struct {
	raw.OS
	write, sync, data, punch, zero, truncate, seek error

	calls []string
}

func (f *flaky) say(call string, err error, ok func() error) error {
	f.calls = append(f.calls, call)
	if err != nil {
		return &os.PathError{Op: call, Path: "x", Err: err}
	}
	return ok()
}

func (f *flaky) WriteAt(p []byte, off int64) (n int, err error) {
	if f.write != nil {
		n, _ = f.OS.WriteAt(p[:len(p)/2], off)
	}
	err = f.say(fmt.Sprintf("write %d", len(p)), f.write, func() error { n, err = f.OS.WriteAt(p, off); return err })
	return n, err
}
func (f *flaky) Sync() error     { return f.say("fsync", f.sync, f.OS.Sync) }
func (f *flaky) DataSync() error { return f.say("fdatasync", f.data, f.OS.DataSync) }
func (f *flaky) Punch(off, n int64) error {
	return f.say("punch", f.punch, func() error { return f.OS.Punch(off, n) })
}
func (f *flaky) Zero(off, n int64) error {
	return f.say("zero", f.zero, func() error { return f.OS.Zero(off, n) })
}
func (f *flaky) Truncate(n int64) error {
	return f.say("truncate", f.truncate, func() error { return f.OS.Truncate(n) })
}
func (f *flaky) SeekData(off int64) (int64, error) {
	if f.seek != nil {
		return 0, f.seek
	}
	return f.OS.SeekData(off)
}

func newFlaky(t *testing.T, size int64) (*raw.Device, *flaky) {
	d, _ := create(t, size)
	f := &flaky{}
	d.ReplaceOS(func(os raw.OS) raw.OS { f.OS = os; return f })
	return d, f
}

func TestFailurePoisons(t *testing.T) {
	p := bytes.Repeat([]byte{1}, 4096)
	for name, c := range map[string]struct {
		set  func(f *flaky, err error)
		call func(d *raw.Device) error
	}{
		"write":     {func(f *flaky, err error) { f.write = err }, func(d *raw.Device) error { _, err := d.WriteAt(p, 0); return err }},
		"fdatasync": {func(f *flaky, err error) { f.data = err }, (*raw.Device).Sync},
		"fsync": {func(f *flaky, err error) { f.sync = err }, func(d *raw.Device) error {
			if err := d.Resize(9000); err != nil {
				return err
			}
			return d.Sync()
		}},
		"discard": {func(f *flaky, err error) { f.punch = err }, func(d *raw.Device) error { return d.Discard(0, 4096) }},
		"zeroes":  {func(f *flaky, err error) { f.punch = err }, func(d *raw.Device) error { return d.WriteZeroes(0, 4096) }},
	} {
		for _, cause := range []error{syscall.EIO, syscall.ENOSPC, syscall.EDQUOT} {
			t.Run(name+" "+cause.Error(), func(t *testing.T) {
				d, f := newFlaky(t, 8192)
				c.set(f, cause)
				err := c.call(d)
				require.ErrorIs(t, err, cause)
				require.NotErrorIs(t, err, image.ErrPoisoned, "the first error is its own")
				full := cause != syscall.EIO
				if full {
					require.ErrorIs(t, err, image.ErrNoSpace)
				} else {
					require.NotErrorIs(t, err, image.ErrNoSpace)
				}

				// The system is right again; the Device must not believe it.
				c.set(f, nil)
				before := len(f.calls)
				_, werr := d.WriteAt(p, 0)
				for _, err := range []error{
					werr, d.Sync(), d.Discard(0, 4096), d.WriteZeroes(0, 1), d.Resize(5),
				} {
					require.ErrorIs(t, err, image.ErrPoisoned)
					require.ErrorIs(t, err, cause, "the first cause")
				}
				require.Len(t, f.calls, before, "nothing reaches the system")

				n, err := d.ReadAt(make([]byte, 8192), 0)
				require.NoError(t, err, "reads go on")
				require.Equal(t, 8192, n)
				require.NoError(t, d.DropCache())
				require.NoError(t, d.Close())
			})
		}
	}
}

func TestShortWriteIsReported(t *testing.T) {
	d, f := newFlaky(t, 8192)
	f.write = syscall.ENOSPC
	n, err := d.WriteAt(bytes.Repeat([]byte{1}, 1000), 0)
	require.ErrorIs(t, err, image.ErrNoSpace)
	require.Equal(t, 500, n)
}

func TestRefusedRequestsDontPoison(t *testing.T) {
	d, f := newFlaky(t, 8192)
	_, err := d.WriteAt([]byte{1}, 8192)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	f.truncate = syscall.ENOSPC
	require.ErrorIs(t, d.Resize(1<<30), image.ErrNoSpace)
	require.EqualValues(t, 8192, d.Size())
	_, err = d.WriteAt([]byte{1}, 8191)
	require.NoError(t, err)
	require.NoError(t, d.Sync())
}

func TestSyncIsFullAfterAResize(t *testing.T) {
	d, f := newFlaky(t, 8192)
	require.NoError(t, d.Sync())
	require.NoError(t, d.Resize(9000))
	require.NoError(t, d.Sync())
	require.NoError(t, d.Sync())
	require.Equal(t, []string{"fdatasync", "truncate", "fsync", "fdatasync"}, f.calls)
}

func TestFileSystemsWithoutHoles(t *testing.T) {
	const size = 300_000
	d, f := newFlaky(t, size)
	data := bytes.Repeat([]byte{5}, size)
	_, err := d.WriteAt(data, 0)
	require.NoError(t, err)
	check := func() {
		t.Helper()
		got := make([]byte, size)
		require.NoError(t, image.ReadFull(d, got, 0))
		require.True(t, bytes.Equal(data, got))
	}

	f.punch = syscall.EOPNOTSUPP
	require.NoError(t, d.Discard(0, size), "merely advice")
	check()
	f.calls = nil
	require.NoError(t, d.WriteZeroes(1, 70_000))
	clear(data[1:70_001])
	require.Equal(t, []string{"punch", "zero"}, f.calls)
	check()

	f.zero, f.calls = syscall.EOPNOTSUPP, nil
	require.NoError(t, d.WriteZeroes(100_001, 150_000))
	clear(data[100_001:250_001])
	require.Equal(t, []string{"punch", "zero", "write 65536", "write 65536", "write 18928"}, f.calls, "in bounded chunks")
	check()

	f.seek = syscall.EINVAL
	e, err := d.BlockStatus(5, 1000)
	require.NoError(t, err)
	require.Equal(t, image.Extent{Start: 5, Length: 1000, Allocated: true, Offset: 5}, e)
	f.seek = syscall.EIO
	_, err = d.BlockStatus(5, 1000)
	require.ErrorIs(t, err, syscall.EIO)
}

// TestFileSizeLimit meets a real EFBIG: in a process of its own, since the
// limit is the process's.
func TestFileSizeLimit(t *testing.T) {
	if os.Getenv("RAW_TEST_LIMIT") == "" {
		cmd := exec.Command(os.Args[0], "-test.run=^TestFileSizeLimit$", "-test.v")
		cmd.Env = append(os.Environ(), "RAW_TEST_LIMIT=1")
		out, err := cmd.CombinedOutput()
		require.NoError(t, err, "%s", out)
		require.Contains(t, string(out), "--- PASS: TestFileSizeLimit")
		return
	}
	d, _ := create(t, 1<<20)
	require.NoError(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 8192, Max: 8192}))
	n, err := d.WriteAt(make([]byte, 8192), 4096)
	require.ErrorIs(t, err, image.ErrNoSpace)
	require.ErrorIs(t, err, syscall.EFBIG)
	require.Equal(t, 4096, n)
	require.ErrorIs(t, d.Sync(), image.ErrPoisoned)
}
