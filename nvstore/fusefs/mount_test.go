package fusefs_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
	"nvstore.dev/nvstore/fusefs"
)

func TestMain(m *testing.M) {
	if path := os.Getenv(mapEnv); path != "" {
		if err := mapIn(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// A mounted store, on a device that outlives it.
type mounted struct {
	dir   string
	dev   *imagetest.CrashDevice
	store *nvstore.Store
	mount *fusefs.Mount
}

func mount(t *testing.T, dev *imagetest.CrashDevice, o *fusefs.Options) *mounted {
	t.Helper()
	m := &mounted{dir: t.TempDir(), dev: dev}
	var err error
	if m.dev == nil {
		m.dev = imagetest.NewCrash(64<<20, nil)
		m.store, err = nvstore.CreateDevice(m.dev, &nvstore.CreateOptions{Idle: -1})
	} else {
		m.store, err = nvstore.OpenDevice(m.dev, &nvstore.Options{Idle: -1, ReadOnly: o != nil && o.ReadOnly})
	}
	require.NoError(t, err)
	m.mount, err = fusefs.New(m.dir, m.store, o)
	require.NoError(t, err)
	t.Cleanup(func() {
		if m.mount != nil {
			// Whatever a test that failed left open.
			_ = syscall.Unmount(m.dir, syscall.MNT_DETACH)
			_ = m.mount.Wait()
			_ = m.store.Close()
		}
	})
	return m
}

// unmount ends the mount, and returns the store, open.
func (m *mounted) unmount(t *testing.T) *nvstore.Store {
	t.Helper()
	require.NoError(t, m.mount.Unmount())
	require.NoError(t, m.mount.Wait())
	m.mount = nil
	t.Cleanup(func() { m.store.Close() })
	return m.store
}

func (m *mounted) path(name string) string { return filepath.Join(m.dir, name) }

func names(t *testing.T, s *nvstore.Store) []string {
	t.Helper()
	list, err := s.List("")
	require.NoError(t, err)
	out := []string{}
	for _, e := range list {
		out = append(out, e.Name)
	}
	return out
}

func TestFiles(t *testing.T) {
	m := mount(t, nil, nil)
	want := bytes.Repeat([]byte("0123456789"), 100_000)
	require.NoError(t, os.MkdirAll(m.path("tpm/deep/er"), 0o755))
	require.NoError(t, os.WriteFile(m.path("tpm/permanent"), want, 0o640))
	got, err := os.ReadFile(m.path("tpm/permanent"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
	info, err := os.Stat(m.path("tpm/permanent"))
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o640), info.Mode())
	require.EqualValues(t, len(want), info.Size())

	f, err := os.OpenFile(m.path("tpm/permanent"), os.O_RDWR|os.O_APPEND, 0)
	require.NoError(t, err)
	_, err = f.Write([]byte("more"))
	require.NoError(t, err)
	require.NoError(t, f.Truncate(1_000_002))
	require.NoError(t, f.Sync())
	stored, err := m.store.Get("tpm/permanent")
	require.NoError(t, err)
	require.True(t, bytes.Equal(append(want, "mo"...), stored), "fsync is a commit")
	require.NoError(t, os.Truncate(m.path("tpm/permanent"), 5))
	require.NoError(t, f.Close())
	require.NoError(t, os.Truncate(m.path("tpm/permanent"), 3), "of a file that nobody has open")

	require.NoError(t, os.WriteFile(m.path("a"), []byte("a"), 0o600))
	require.NoError(t, os.Rename(m.path("a"), m.path("tpm/deep/b")))
	require.NoError(t, os.Rename(m.path("tpm/deep"), m.path("shallow")))
	list, err := os.ReadDir(m.path("shallow"))
	require.NoError(t, err)
	require.Len(t, list, 2)
	require.True(t, list[1].IsDir())
	var st syscall.Statfs_t
	require.NoError(t, syscall.Statfs(m.dir, &st))
	require.NotZero(t, st.Bavail)

	s := m.unmount(t)
	require.Equal(t, []string{"shallow/b", "tpm/permanent"}, names(t, s))
	stored, err = s.Get("tpm/permanent")
	require.NoError(t, err)
	require.Equal(t, "012", string(stored))
}

// A folder stays when the last blob in it goes, as long as the mount lasts.
func TestFoldersStay(t *testing.T) {
	m := mount(t, nil, nil)
	for _, name := range []string{"a/b/c", "d/e", "f/g"} {
		require.NoError(t, m.store.Put(name, nil, nil))
	}
	require.NoError(t, os.Remove(m.path("a/b/c")))
	require.NoError(t, os.Rename(m.path("d/e"), m.path("e")))
	require.NoError(t, os.Rename(m.path("f"), m.path("a/f")))
	require.Equal(t, []string{"a", "a/b", "a/f", "a/f/g", "d", "e"}, tree(t, m.dir))
	require.NoError(t, syscall.Rmdir(m.path("a/b")))
	require.NoError(t, os.Remove(m.path("a/f/g")))
	require.NoError(t, syscall.Rmdir(m.path("a/f")))
	require.Equal(t, []string{"a", "d", "e"}, tree(t, m.dir))
	require.Equal(t, []string{"e"}, names(t, m.unmount(t)))
}

// tree lists all that is below a folder.
func tree(t rapid.TB, root string) (list []string) {
	t.Helper()
	require.NoError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if rel, _ := filepath.Rel(root, path); rel != "." {
			list = append(list, rel)
		}
		return err
	}))
	return list
}

// What the store can't have is refused in the kernel's words.
func TestRefused(t *testing.T) {
	m := mount(t, nil, nil)
	require.NoError(t, os.Mkdir(m.path("d"), 0o700))
	require.NoError(t, os.WriteFile(m.path("f"), nil, 0o600))
	long := strings.Repeat("x", 250)
	for name, c := range map[string]struct {
		do   func() error
		want syscall.Errno
	}{
		"control character": {func() error { return os.WriteFile(m.path("a\nb"), nil, 0o600) }, syscall.EINVAL},
		"no UTF-8":          {func() error { return os.WriteFile(m.path("a\xff"), nil, 0o600) }, syscall.EINVAL},
		"long in all": {func() error {
			if err := os.Mkdir(m.path(long), 0o700); err != nil {
				return err
			}
			return os.WriteFile(m.path(long+"/123456"), nil, 0o600)
		}, syscall.EINVAL},
		"folder without room":  {func() error { return os.Mkdir(m.path(long+"xxxx"), 0o700) }, syscall.EINVAL},
		"our own":              {func() error { return os.Mkdir(m.path(".nvtool-unlinked"), 0o700) }, syscall.EINVAL},
		"missing folder":       {func() error { return os.WriteFile(m.path("x/y"), nil, 0o600) }, syscall.ENOENT},
		"file as a folder":     {func() error { return os.WriteFile(m.path("f/y"), nil, 0o600) }, syscall.ENOTDIR},
		"folder that is there": {func() error { return os.Mkdir(m.path("d"), 0o700) }, syscall.EEXIST},
		"file as new folder":   {func() error { return os.Mkdir(m.path("f"), 0o700) }, syscall.EEXIST},
		"symbolic link":        {func() error { return os.Symlink("f", m.path("l")) }, syscall.ENOTSUP},
		"hard link":            {func() error { return os.Link(m.path("f"), m.path("l")) }, syscall.ENOTSUP},
		"device":               {func() error { return syscall.Mknod(m.path("n"), syscall.S_IFCHR|0o600, 0x103) }, syscall.EPERM},
		"too large":            {func() error { return os.Truncate(m.path("f"), 1<<41) }, syscall.EINVAL},
		"file over a folder":   {func() error { return os.Rename(m.path("f"), m.path("d")) }, syscall.EEXIST},
		"folder over a file":   {func() error { return os.Rename(m.path("d"), m.path("f")) }, syscall.ENOTDIR},
		"folder into itself":   {func() error { return syscall.Rename(m.path("d"), m.path("d/e")) }, syscall.EINVAL},
		"bad new name":         {func() error { return os.Rename(m.path("f"), m.path("g\x01")) }, syscall.EINVAL},
		"exchange":             {func() error { return unix.Renameat2(-1, m.path("f"), -1, m.path("d"), unix.RENAME_EXCHANGE) }, syscall.EINVAL},
		"rename, no replace":   {func() error { return unix.Renameat2(-1, m.path("d"), -1, m.path("f"), unix.RENAME_NOREPLACE) }, syscall.EEXIST},
		"removing a full folder": {func() error {
			if err := os.WriteFile(m.path("d/x"), nil, 0o600); err != nil {
				return err
			}
			return syscall.Rmdir(m.path("d"))
		}, syscall.ENOTEMPTY},
	} {
		err := c.do()
		require.True(t, errors.Is(err, c.want) || name == "file over a folder" && errors.Is(err, fs.ErrExist), "%s: %v", name, err)
	}
	require.ErrorIs(t, os.Remove(m.path("nothing")), fs.ErrNotExist)
}

func TestReadOnly(t *testing.T) {
	m := mount(t, nil, nil)
	require.NoError(t, os.WriteFile(m.path("f"), []byte("content"), 0o600))
	require.NoError(t, m.unmount(t).Close())
	m = mount(t, m.dev.Reopen(), &fusefs.Options{ReadOnly: true})
	got, err := os.ReadFile(m.path("f"))
	require.NoError(t, err)
	require.Equal(t, "content", string(got))
	require.ErrorIs(t, os.WriteFile(m.path("f"), nil, 0o600), syscall.EROFS)
	require.ErrorIs(t, os.WriteFile(m.path("g"), nil, 0o600), syscall.EROFS)
	require.ErrorIs(t, os.Remove(m.path("f")), syscall.EROFS)
	require.ErrorIs(t, os.Chmod(m.path("f"), 0o700), syscall.EROFS)
	m.unmount(t)
}

// A removed file lives on while it is open; what a crash leaves is swept up.
func TestUnlinkedWhileOpen(t *testing.T) {
	m := mount(t, nil, nil)
	f, err := os.Create(m.path("f"))
	require.NoError(t, err)
	_, err = f.Write([]byte("before "))
	require.NoError(t, err)
	require.NoError(t, os.Remove(m.path("f")))
	require.NoError(t, os.WriteFile(m.path("f"), []byte("another"), 0o600))
	g, err := os.Open(m.path("f"))
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(m.path("h"), []byte("over"), 0o600))
	require.NoError(t, os.Rename(m.path("h"), m.path("f")))
	_, err = f.Write([]byte("after"))
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	p := make([]byte, 100)
	n, err := f.ReadAt(p, 0)
	require.Equal(t, "before after", string(p[:n]), "%v", err)
	n, err = g.ReadAt(p, 0)
	require.Equal(t, "another", string(p[:n]), "%v", err)
	got, err := os.ReadFile(m.path("f"))
	require.NoError(t, err)
	require.Equal(t, "over", string(got))
	list, err := os.ReadDir(m.dir)
	require.NoError(t, err)
	require.Len(t, list, 1)

	crashed := m.dev.Fork().Reopen()
	s, err := nvstore.OpenDevice(crashed, nil)
	require.NoError(t, err)
	require.Len(t, names(t, s), 3)
	require.NoError(t, s.Close())
	again := mount(t, crashed.Reopen(), nil)
	require.Equal(t, []string{"f"}, names(t, again.unmount(t)))

	require.NoError(t, f.Close())
	require.NoError(t, g.Close())
	require.Equal(t, []string{"f"}, names(t, m.unmount(t)))
}

// A file that is written and renamed over another replaces it whole: a power
// cut at any write leaves one or the other.
func TestReplaceIsAtomic(t *testing.T) {
	m := mount(t, nil, nil)
	old, young := bytes.Repeat([]byte("old"), 10_000), bytes.Repeat([]byte("new!"), 9_000)
	require.NoError(t, os.WriteFile(m.path("f"), old, 0o600))
	from := m.dev.Len()
	require.NoError(t, os.WriteFile(m.path("f.tmp"), young, 0o600))
	require.NoError(t, os.Rename(m.path("f.tmp"), m.path("f")))
	to := m.dev.Len()
	require.Greater(t, to, from)
	var olds, youngs int
	for at := from; at <= to; at++ {
		for _, all := range []bool{true, false} {
			dev := m.dev.StateAt(at, func(int, int64) bool { return all }).Open()
			s, err := nvstore.OpenDevice(dev, nil)
			require.NoError(t, err, "after %d writes", at)
			got, err := s.Get("f")
			require.NoError(t, err)
			switch {
			case bytes.Equal(got, old):
				olds++
			case bytes.Equal(got, young):
				youngs++
			default:
				require.Fail(t, "neither the old nor the new file", "after %d writes", at)
			}
			require.NoError(t, s.Close())
		}
	}
	require.Positive(t, olds)
	require.Positive(t, youngs)
	m.unmount(t)
}

// A rename commits what was written to the file, also if nobody synced it.
func TestRenameCommits(t *testing.T) {
	m := mount(t, nil, nil)
	f, err := os.Create(m.path("f.tmp"))
	require.NoError(t, err)
	defer f.Close()
	_, err = f.Write([]byte("content"))
	require.NoError(t, err)
	require.NoError(t, os.Rename(m.path("f.tmp"), m.path("f")))
	s, err := nvstore.OpenDevice(m.dev.PowerCut(func(int, int64) bool { return false }), nil)
	require.NoError(t, err)
	defer s.Close()
	got, err := s.Get("f")
	require.NoError(t, err)
	require.Equal(t, "content", string(got))
	_, err = f.Write([]byte(", and more"))
	require.NoError(t, err)
	require.NoError(t, f.Sync())
	got, err = m.store.Get("f")
	require.NoError(t, err)
	require.Equal(t, "content, and more", string(got))
}

// Unmounting commits what nobody synced, also when it is somebody else who
// unmounts, and with files still open: then the kernel refuses.
func TestUnmount(t *testing.T) {
	m := mount(t, nil, nil)
	f, err := os.Create(m.path("f"))
	require.NoError(t, err)
	_, err = f.Write([]byte("content"))
	require.NoError(t, err)
	require.Error(t, m.mount.Unmount(), "it is in use")
	require.NoError(t, syscall.Unmount(m.dir, syscall.MNT_DETACH))
	_, err = f.Write([]byte(" and more"))
	require.NoError(t, err)
	require.NoError(t, f.Close())
	require.NoError(t, m.mount.Wait())
	m.mount = nil
	got, err := m.store.Get("f")
	require.NoError(t, err)
	require.Equal(t, "content and more", string(got))
	require.NoError(t, m.store.Close())
}

// Memory-mapped files, shared between two who have one open. They are mapped in
// a process of its own: a page fault stops a thread without Go's knowing, and if
// the collector waits for it, also those that would serve it.
func TestMmap(t *testing.T) {
	m := mount(t, nil, nil)
	require.NoError(t, os.WriteFile(m.path("f"), make([]byte, 20_000), 0o600))
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), mapEnv+"="+m.path("f"))
	var said bytes.Buffer
	cmd.Stderr = &said
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line, err := bufio.NewReader(out).ReadString('\n')
	require.NoError(t, err, "%s", &said)
	require.Equal(t, "synced\n", line)
	got, err := m.store.Get("f")
	require.NoError(t, err)
	require.Equal(t, "mapped", string(got[12_345:12_351]), "msync is a commit")
	require.NoError(t, in.Close())
	require.NoError(t, cmd.Wait(), "%s", &said)
	m.unmount(t)
}

// mapEnv names the file that a child is to map.
const mapEnv = "NVSTORE_TEST_MAP"

// mapIn writes to a file through memory, says so, waits until its input ends,
// and reads from memory what it writes to the file.
func mapIn(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	p, err := unix.Mmap(int(f.Fd()), 0, 20_000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return err
	}
	copy(p[12_345:], "mapped")
	if err := unix.Msync(p, unix.MS_SYNC); err != nil {
		return err
	}
	fmt.Println("synced")
	_, _ = io.Copy(io.Discard, os.Stdin)
	if _, err := f.WriteAt([]byte("written"), 100); err != nil {
		return err
	}
	if got := string(p[100:107]); got != "written" {
		return fmt.Errorf("memory has %q", got)
	}
	return errors.Join(unix.Munmap(p), f.Close())
}

// Locks exclude each other between processes' descriptors.
func TestLocks(t *testing.T) {
	m := mount(t, nil, nil)
	a, err := os.Create(m.path("f"))
	require.NoError(t, err)
	defer a.Close()
	b, err := os.OpenFile(m.path("f"), os.O_RDWR, 0)
	require.NoError(t, err)
	defer b.Close()
	require.NoError(t, syscall.Flock(int(a.Fd()), syscall.LOCK_EX|syscall.LOCK_NB))
	require.ErrorIs(t, syscall.Flock(int(b.Fd()), syscall.LOCK_EX|syscall.LOCK_NB), syscall.EWOULDBLOCK)
	require.NoError(t, syscall.Flock(int(a.Fd()), syscall.LOCK_UN))
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: 5, Len: 5}
	require.NoError(t, unix.FcntlFlock(a.Fd(), unix.F_OFD_SETLK, &lock))
	require.ErrorIs(t, unix.FcntlFlock(b.Fd(), unix.F_OFD_SETLK, &lock), syscall.EAGAIN)
}

// A tree can't show a blob that is also a folder.
func TestClash(t *testing.T) {
	s, err := nvstore.CreateDevice(imagetest.NewMemory(1<<20), &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	defer s.Close()
	for _, name := range []string{"a", "a.b", "a/b"} {
		require.NoError(t, s.Put(name, nil, nil))
	}
	m, err := fusefs.New(t.TempDir(), s, nil)
	require.ErrorIs(t, err, image.ErrUnsupported)
	require.ErrorContains(t, err, `"a"`)
	require.Nil(t, m)
	require.NoError(t, s.Rename("a", "c"))
	dir := t.TempDir()
	m, err = fusefs.New(filepath.Join(dir, "nosuch"), s, nil)
	require.Error(t, err)
	require.Nil(t, m)
	m, err = fusefs.New(dir, s, nil)
	require.NoError(t, err)
	require.NoError(t, m.Unmount())
	require.NoError(t, m.Wait())
}

// The store is reverted underneath: open files show what there was, and say
// once that what was written since is lost.
func TestRevert(t *testing.T) {
	defer fusefs.SetWriteback(time.Hour)()
	t.Run("fsync", func(t *testing.T) { testRevert(t, false) })
	t.Run("background", func(t *testing.T) { testRevert(t, true) })
}

func testRevert(t *testing.T, background bool) {
	m := mount(t, nil, nil)
	require.NoError(t, os.WriteFile(m.path("f"), []byte("first"), 0o600))
	before := m.dev.Fork()
	require.NoError(t, os.WriteFile(m.path("f"), []byte("second"), 0o600))
	f, err := os.OpenFile(m.path("f"), os.O_RDWR|syscall.O_DIRECT, 0)
	require.NoError(t, err)
	defer f.Close()
	_, err = f.WriteAt([]byte("lost"), 0)
	require.NoError(t, err)
	revert(t, m.dev, before)
	if background {
		m.mount.WriteBack() // the error comes when nobody waits for it
	}
	require.ErrorIs(t, f.Sync(), syscall.EIO)
	require.NoError(t, f.Sync())
	require.NoError(t, f.Close())
	got, err := m.store.Get("f")
	require.NoError(t, err)
	require.Equal(t, "first", string(got))
	m.unmount(t)
}

// revert puts a device's older content back.
func revert(t *testing.T, dev, before *imagetest.CrashDevice) {
	t.Helper()
	hand := dev.Share()
	const all = 1 << 20 // of the device is in use
	p := make([]byte, all)
	require.NoError(t, image.ReadFull(before, p, 0))
	_, err := hand.WriteAt(p, 0)
	require.NoError(t, err)
}

// A live extent is a file of a fixed size, and busy while it is attached.
func TestLiveExtents(t *testing.T) {
	m := mount(t, nil, nil)
	vars := bytes.Repeat([]byte("uefi"), 5000)
	require.NoError(t, m.store.Update(func(tx *nvstore.Tx) error {
		if err := tx.CreateLive("uefi/vars", 20000, nil); err != nil {
			return err
		}
		return tx.Put("uefi/vars", vars, nil)
	}))
	got, err := os.ReadFile(m.path("uefi/vars"))
	require.NoError(t, err)
	require.Equal(t, vars, got)
	vars[7], vars[19999] = 1, 2
	require.NoError(t, os.WriteFile(m.path("uefi/vars"), vars, 0o600))
	got, err = m.store.Get("uefi/vars")
	require.NoError(t, err)
	require.Equal(t, vars, got)
	e, err := m.store.Stat("uefi/vars")
	require.NoError(t, err)
	require.True(t, e.Live)

	require.NoError(t, m.store.Attach())
	_, err = os.ReadFile(m.path("uefi/vars"))
	require.ErrorIs(t, err, syscall.EBUSY)
	require.ErrorIs(t, os.WriteFile(m.path("uefi/vars"), vars, 0o600), syscall.EBUSY)
	require.ErrorIs(t, os.Remove(m.path("uefi/vars")), syscall.EBUSY)
	info, err := os.Stat(m.path("uefi/vars"))
	require.NoError(t, err)
	require.EqualValues(t, 20000, info.Size())
	require.NoError(t, m.store.Detach())
	got, err = os.ReadFile(m.path("uefi/vars"))
	require.NoError(t, err)
	require.Equal(t, vars, got)
	require.NoError(t, os.Remove(m.path("uefi/vars")))
	s := m.unmount(t)
	require.Empty(t, names(t, s))
	require.NoError(t, s.Close())
}
