package raw_test

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/raw"
)

func temp(t *testing.T) string { return filepath.Join(t.TempDir(), "disk.raw") }

func create(t *testing.T, size int64) (*raw.Device, string) {
	t.Helper()
	path := temp(t)
	d, err := raw.Create(path, size, nil)
	require.NoError(t, err)
	t.Cleanup(func() { d.Close() })
	return d, path
}

func open(t *testing.T, path string, o *raw.Options) *raw.Device {
	t.Helper()
	d, err := raw.Open(path, o)
	require.NoError(t, err)
	t.Cleanup(func() { d.Close() })
	return d
}

func TestConformance(t *testing.T) {
	again := func(o *raw.Options) func(*testing.T, image.Device) image.Device {
		return func(t *testing.T, d image.Device) image.Device {
			require.NoError(t, d.Close())
			return open(t, d.(*raw.Device).Path(), o)
		}
	}
	imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
		d, err := raw.Create(temp(t), size, nil)
		require.NoError(t, err)
		return d
	}, &imagetest.ConformanceOptions{Reopen: again(nil), ReadOnly: again(&raw.Options{ReadOnly: true})})
}

func TestCreate(t *testing.T) {
	old := unix.Umask(0o022)
	defer unix.Umask(old)
	d, path := create(t, 12345)
	info, err := os.Stat(path)
	require.NoError(t, err)
	require.EqualValues(t, 12345, info.Size())
	require.EqualValues(t, 0o600, info.Mode(), "state is secret")
	require.Zero(t, info.Sys().(*syscall.Stat_t).Blocks)
	_, err = d.WriteAt([]byte("keep"), 0)
	require.NoError(t, err)

	for _, overwrite := range []bool{false, true} {
		bad, err := raw.Create(path, 5, &raw.Options{Overwrite: overwrite})
		if overwrite {
			require.ErrorIs(t, err, image.ErrLocked, "in use")
		} else {
			require.ErrorIs(t, err, fs.ErrExist)
		}
		require.Nil(t, bad)
	}
	p, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, "keep", string(p[:4]))
	require.NoError(t, d.Close())

	d, err = raw.Create(path, 99, &raw.Options{Overwrite: true})
	require.NoError(t, err)
	require.EqualValues(t, 99, d.Size())
	require.NoError(t, d.Close())
	p, err = os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, make([]byte, 99), p)

	d, err = raw.Create(path+"2", 0, &raw.Options{Mode: 0o664})
	require.NoError(t, err)
	defer d.Close()
	info, err = os.Stat(path + "2")
	require.NoError(t, err)
	require.EqualValues(t, 0o644, info.Mode())
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	_, err := raw.Create(filepath.Join(dir, "a"), -1, nil)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	_, err = raw.Create(filepath.Join(dir, "a"), 1, &raw.Options{ReadOnly: true})
	require.ErrorIs(t, err, image.ErrReadOnly)
	_, err = raw.Create(filepath.Join(dir, "no", "a"), 1, nil)
	require.ErrorIs(t, err, fs.ErrNotExist)

	// Larger than any file: nothing stays behind.
	_, err = raw.Create(filepath.Join(dir, "a"), 1<<62, nil)
	require.ErrorIs(t, err, image.ErrNoSpace)
	// Creating never follows a link, not even a dangling one.
	require.NoError(t, os.Symlink(filepath.Join(dir, "target"), filepath.Join(dir, "link")))
	_, err = raw.Create(filepath.Join(dir, "link"), 1, nil)
	require.ErrorIs(t, err, fs.ErrExist)
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, left, 1)
}

func TestOpenRefusesWhatIsNoImage(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, unix.Mkfifo(fifo, 0o600))
	sock := filepath.Join(dir, "s")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	require.NoError(t, err)
	defer unix.Close(fd)
	require.NoError(t, unix.Bind(fd, &unix.SockaddrUnix{Name: sock}))
	link := filepath.Join(dir, "link")
	require.NoError(t, os.Symlink(fifo, link))

	for _, path := range []string{dir, fifo, sock, link, "/dev/null", "/dev/zero"} {
		for _, ro := range []bool{false, true} {
			d, err := raw.Open(path, &raw.Options{ReadOnly: ro})
			require.ErrorIs(t, err, image.ErrUnsupported, path)
			require.Nil(t, d)
			var fe *image.FormatError
			require.ErrorAs(t, err, &fe)
			require.Equal(t, path, fe.Path)
		}
		_, err = raw.Create(path, 5, &raw.Options{Overwrite: true})
		require.ErrorIs(t, err, image.ErrUnsupported, path)
	}
	_, err = raw.Open(filepath.Join(dir, "none"), nil)
	require.ErrorIs(t, err, fs.ErrNotExist)
}

func TestOpenThroughALink(t *testing.T) {
	_, path := create(t, 77)
	link := path + ".link"
	require.NoError(t, os.Symlink(path, link))
	_, err := raw.Open(link, nil)
	require.ErrorIs(t, err, image.ErrLocked, "the lock is the file's, not the name's")
	require.EqualValues(t, 77, open(t, link, &raw.Options{NoLock: true, ReadOnly: true}).Size())
}

func TestNoDescriptorIsInherited(t *testing.T) {
	_, path := create(t, 77)
	out, err := exec.Command("sh", "-c", "ls -l /proc/self/fd").Output()
	require.NoError(t, err)
	require.NotContains(t, string(out), filepath.Base(path))
}

func TestSizesAreExact(t *testing.T) {
	d, path := create(t, 1)
	for _, n := range []int64{0, 1, 511, 4097, 1<<40 + 3, 5} {
		require.NoError(t, d.Resize(n))
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, n, info.Size())
		require.NoError(t, d.Discard(0, n))
		require.NoError(t, d.WriteZeroes(0, n))
		info, err = os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, n, info.Size(), "neither a discard nor zeroes change the size")
	}
	require.ErrorIs(t, d.Resize(1<<62), image.ErrNoSpace)
	require.EqualValues(t, 5, d.Size())
	_, err := d.WriteAt([]byte("still works"), 0)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	_, err = d.WriteAt([]byte("still"), 0)
	require.NoError(t, err)
	require.NoError(t, d.Sync())
}

// blocks returns how many bytes a file takes.
func blocks(t *testing.T, path string) int64 {
	var st unix.Stat_t
	require.NoError(t, unix.Stat(path, &st))
	return st.Blocks * 512
}

func TestSpaceIsGivenBack(t *testing.T) {
	d, path := create(t, 1<<20+100)
	data := bytes.Repeat([]byte{1}, 1<<20+100)
	_, err := d.WriteAt(data, 0)
	require.NoError(t, err)
	require.NoError(t, d.Sync())
	full := blocks(t, path)
	require.GreaterOrEqual(t, full, int64(1<<20))

	require.NoError(t, d.Discard(4095, 4097)) // one whole block
	require.Equal(t, full-4096, blocks(t, path))
	require.NoError(t, d.Discard(8193, 4096)) // none
	require.Equal(t, full-4096, blocks(t, path))
	p := make([]byte, 1)
	_, err = d.ReadAt(p, 4095)
	require.NoError(t, err)
	require.EqualValues(t, 1, p[0], "a discard leaves partial blocks alone")
	require.NoError(t, d.Discard(1<<20, 100)) // the end of the file
	require.Equal(t, full-8192, blocks(t, path))
	require.NoError(t, d.WriteZeroes(16384, 65536))
	require.Equal(t, full-8192-65536, blocks(t, path))
	require.NoError(t, d.Discard(0, d.Size()))
	require.Zero(t, blocks(t, path))
	require.NoError(t, d.WriteZeroes(0, d.Size()))
	require.Zero(t, blocks(t, path), "zeroes in a hole stay a hole")
}

func TestBlockStatus(t *testing.T) {
	d, _ := create(t, 1<<20)
	_, err := d.WriteAt(bytes.Repeat([]byte{1}, 8192), 65536)
	require.NoError(t, err)
	var got []image.Extent
	for off := int64(0); off < d.Size(); {
		e, err := d.BlockStatus(off, d.Size()-off)
		require.NoError(t, err)
		got = append(got, e)
		off += e.Length
	}
	require.Equal(t, []image.Extent{
		{Start: 0, Length: 65536, Zero: true, Offset: -1},
		{Start: 65536, Length: 8192, Allocated: true, Offset: 65536},
		{Start: 73728, Length: 1<<20 - 73728, Zero: true, Offset: -1},
	}, got)
	e, err := d.BlockStatus(66000, 100)
	require.NoError(t, err)
	require.Equal(t, image.Extent{Start: 66000, Length: 100, Allocated: true, Offset: 66000}, e)
}

// resident counts a file's pages in the page cache.
func resident(t *testing.T, path string, size int) int {
	f, err := os.Open(path)
	require.NoError(t, err)
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	require.NoError(t, err)
	defer unix.Munmap(m)
	vec := make([]byte, (size+4095)/4096)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, addr(m), uintptr(size), addr(vec))
	require.Zero(t, errno)
	n := 0
	for _, v := range vec {
		n += int(v & 1)
	}
	return n
}

func TestDropCacheReadsFromTheMedium(t *testing.T) {
	d, path := create(t, 1<<20)
	data := bytes.Repeat([]byte{7}, 1<<20)
	_, err := d.WriteAt(data, 0)
	require.NoError(t, err)
	require.NoError(t, d.Sync())
	require.Equal(t, 256, resident(t, path, 1<<20))
	require.NoError(t, d.DropCache())
	require.Zero(t, resident(t, path, 1<<20))
	got := make([]byte, 1<<20)
	require.NoError(t, image.ReadFull(d, got, 0))
	require.Equal(t, data, got)
}

func TestFileCutUnderneath(t *testing.T) {
	d, path := create(t, 10_000)
	require.NoError(t, os.Truncate(path, 100))
	n, err := d.ReadAt(make([]byte, 1000), 0)
	require.Equal(t, 100, n)
	require.ErrorIs(t, err, io.ErrUnexpectedEOF)
	require.NotErrorIs(t, err, io.EOF)
}

// TestAllocate: blocks are there, and bytes stay.
func TestAllocate(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	d, err := raw.Create(path, 4<<20, nil)
	require.NoError(t, err)
	_, err = d.WriteAt([]byte("here"), 1<<20)
	require.NoError(t, err)
	require.ErrorIs(t, d.Allocate(0, 5<<20), image.ErrOutOfRange)
	if err := d.Allocate(0, 4<<20); !errors.Is(err, image.ErrUnsupported) { // of the file system
		require.NoError(t, err)
		var st syscall.Stat_t
		require.NoError(t, syscall.Stat(path, &st))
		require.GreaterOrEqual(t, st.Blocks*512, int64(4<<20))
	}
	got := make([]byte, 4)
	require.NoError(t, image.ReadFull(d, got, 1<<20))
	require.Equal(t, "here", string(got))
	require.Equal(t, int64(4<<20), d.Size())
	require.NoError(t, d.Close())
	require.ErrorIs(t, d.Allocate(0, 1), image.ErrClosed)
}

// TestCopyRange has the system copy between two files.
func TestCopyRange(t *testing.T) {
	dir := t.TempDir()
	text := bytes.Repeat([]byte("what the one has, "), 20000)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "src"), text, 0o600))
	src, err := raw.Open(filepath.Join(dir, "src"), &raw.Options{ReadOnly: true})
	require.NoError(t, err)
	dst, err := raw.Create(filepath.Join(dir, "dst"), 300_000, nil)
	require.NoError(t, err)
	err = dst.CopyRange(1000, src, 77, 250_000)
	want := make([]byte, 300_000)
	if err == nil {
		copy(want[1000:], text[77:][:250_000])
	} else {
		require.ErrorIs(t, err, image.ErrUnsupported, "a file system that can't")
	}
	got := make([]byte, len(want))
	require.NoError(t, image.ReadFull(dst, got, 0))
	require.True(t, bytes.Equal(want, got))
	require.ErrorIs(t, dst.CopyRange(0, src, int64(len(text))-5, 10), image.ErrOutOfRange)
	require.ErrorIs(t, dst.CopyRange(299_999, src, 0, 10), image.ErrOutOfRange)
	require.ErrorIs(t, dst.CopyRange(0, dst, 5000, 10), image.ErrUnsupported)
	require.ErrorIs(t, src.CopyRange(0, dst, 0, 10), image.ErrReadOnly)
	require.ErrorIs(t, dst.CopyRange(0, imagetest.NewMemory(100), 0, 10), image.ErrUnsupported)
	// The source is cut by somebody else. That is no fault of the target.
	require.NoError(t, os.Truncate(filepath.Join(dir, "src"), 10))
	require.Error(t, dst.CopyRange(0, src, 100, 1000))
	_, err = dst.WriteAt(text[:10], 0)
	require.NoError(t, err)
	require.NoError(t, src.Close())
	require.ErrorIs(t, dst.CopyRange(0, src, 0, 10), image.ErrClosed)
	require.NoError(t, dst.Close())
}
