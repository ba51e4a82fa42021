package chain_test

import (
	"bytes"
	"crypto/sha256"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/raw"
)

func qemu(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %q: %s", name, args, out)
	return string(out)
}

// create makes an image, with bytes at an offset, and closes it.
func create(t *testing.T, location string, o *chain.CreateOptions, p []byte, off int64) string {
	t.Helper()
	c, err := chain.Create(location, o)
	require.NoError(t, err)
	if p != nil {
		_, err = c.Device.WriteAt(p, off)
		require.NoError(t, err)
	}
	require.NoError(t, c.Device.Sync())
	require.NoError(t, c.Commit())
	require.NoError(t, c.Device.Close())
	return c.Location
}

func sum(t *testing.T, path string) [32]byte {
	t.Helper()
	p, err := os.ReadFile(path)
	require.NoError(t, err)
	return sha256.Sum256(p)
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	list, err := os.ReadDir(dir)
	require.NoError(t, err)
	all := []string{}
	for _, e := range list {
		all = append(all, e.Name())
	}
	return all
}

func TestOpensOnlyOurs(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }

	create(t, at("our.qcow2"), nil, nil, 0)
	create(t, at("small.qcow2"), &chain.CreateOptions{ClusterSize: 512}, nil, 0)
	create(t, at("our.raw"), &chain.CreateOptions{Format: chain.Raw}, []byte(chain.Magic), 0)
	create(t, at("touched.qcow2"), nil, nil, 0)
	qemu(t, "qemu-img", "resize", at("touched.qcow2"), "128M")
	qemu(t, "qemu-img", "snapshot", "-c", "s", at("touched.qcow2"))
	qemu(t, "qemu-img", "amend", "-o", "lazy_refcounts=on", at("touched.qcow2"))
	for name, want := range map[string]string{
		"our.qcow2": chain.QCOW2, "small.qcow2": chain.QCOW2, "our.raw": chain.Raw, "touched.qcow2": chain.QCOW2,
	} {
		got, err := chain.Detect(at(name))
		require.NoError(t, err, name)
		require.Equal(t, want, got, name)
		d, err := chain.Open(at(name), nil)
		require.NoError(t, err, name)
		require.NoError(t, d.Close())
	}

	qemu(t, "qemu-img", "create", "-f", "qcow2", at("foreign.qcow2"), "1M")
	qemu(t, "qemu-img", "create", "-f", "qcow2", "-b", at("our.qcow2"), "-F", "qcow2", at("overlay.qcow2"))
	ours, err := os.ReadFile(at("our.qcow2"))
	require.NoError(t, err)
	mark := bytes.Index(ours, []byte("nvst\x00\x00\x00\x08nvstore\x00"))
	require.Positive(t, mark, "type, length, data")
	for name, change := range map[string]func(p []byte) []byte{
		"other-data":   func(p []byte) []byte { p[mark+8] = 'N'; return p },
		"other-type":   func(p []byte) []byte { p[mark] = 'N'; return p },
		"short-data":   func(p []byte) []byte { p[mark+7] = 7; return p },
		"broken":       func(p []byte) []byte { p[20] = 0xff; return p },
		"cut":          func(p []byte) []byte { return p[:mark] },
		"empty":        func(p []byte) []byte { return nil },
		"one":          func(p []byte) []byte { return p[:1] },
		"zeros":        func(p []byte) []byte { return make([]byte, 1<<20) },
		"short-magic":  func(p []byte) []byte { return []byte(chain.Magic[:len(chain.Magic)-1]) },
		"almost-magic": func(p []byte) []byte { return append([]byte(chain.Magic[:len(chain.Magic)-1]), make([]byte, 1000)...) },
		"late-magic":   func(p []byte) []byte { return append([]byte{0}, chain.Magic...) },
	} {
		require.NoError(t, os.WriteFile(at(name), change(bytes.Clone(ours)), 0o600))
	}
	for _, name := range []string{"foreign.qcow2", "overlay.qcow2", "other-data", "other-type", "short-data", "broken",
		"cut", "empty", "one", "zeros", "short-magic", "almost-magic", "late-magic"} {
		before := sum(t, at(name))
		_, err := chain.Detect(at(name))
		require.ErrorIs(t, err, image.ErrFormat, name)
		for _, ro := range []bool{false, true} {
			d, err := chain.Open(at(name), &chain.Options{ReadOnly: ro})
			require.ErrorIs(t, err, image.ErrFormat, name)
			require.ErrorContains(t, err, "-f raw")
			require.Nil(t, d)
		}
		require.Equal(t, before, sum(t, at(name)), name)
		// Refused files aren't held.
		d, err := chain.Open(at(name), &chain.Options{Format: chain.Raw})
		require.NoError(t, err, name)
		require.NoError(t, d.Close())
	}
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	require.NoError(t, syscall.Mkfifo(fifo, 0o600))
	overlay := filepath.Join(dir, "overlay")
	qemu(t, "qemu-img", "create", "-f", "qcow2", filepath.Join(dir, "base"), "1M")
	qemu(t, "qemu-img", "create", "-f", "qcow2", "-b", "base", "-F", "qcow2", overlay)
	for _, c := range []struct {
		path, format string
		kind         error
	}{
		{filepath.Join(dir, "none"), "", fs.ErrNotExist},
		{filepath.Join(dir, "none"), chain.Raw, fs.ErrNotExist},
		{filepath.Join(dir, "none"), chain.QCOW2, fs.ErrNotExist},
		{"driver=qcow2,file.filename=" + filepath.Join(dir, "none"), "", fs.ErrNotExist},
		{fifo, "", image.ErrUnsupported},
		{dir, chain.Raw, image.ErrUnsupported},
		{overlay, chain.QCOW2, chain.ErrExternal},
		{overlay, "vmdk", image.ErrUnsupported},
		{"driver=file,filename=" + overlay, chain.Raw, chain.ErrLocation},
		{"driver=raw,offset=1G,file.filename=" + overlay, "", image.ErrOutOfRange},
		{"driver=raw,size=1G,file.filename=" + overlay, "", image.ErrOutOfRange},
		{"driver=qcow2,file.driver=raw,file.offset=512,file.file.filename=" + overlay, "", image.ErrFormat},
		{"pebble:" + filepath.Join(dir, "none"), "", fs.ErrNotExist},
		{"pebble:" + dir, "", image.ErrFormat},
		{"pebble:" + dir, chain.Raw, chain.ErrLocation},
	} {
		d, err := chain.Open(c.path, &chain.Options{Format: c.format})
		require.ErrorIs(t, err, c.kind, "%+v", c)
		require.Nil(t, d, "%+v", c)
	}
	// No failure holds a lock.
	d, err := chain.Open(overlay, &chain.Options{Format: chain.Raw})
	require.NoError(t, err)
	require.NoError(t, d.Close())
}

// The same string opens the same bytes in QEMU and here.
func TestStackIsQEMUs(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a,b.qcow2")
	p := make([]byte, 3<<20)
	for i := range p {
		p[i] = byte(i>>9*7 + i)
	}
	create(t, path, &chain.CreateOptions{Size: 8 << 20}, p, 1<<20)
	name := filepath.Join(dir, "a,,b.qcow2")
	for _, opts := range []string{
		"driver=qcow2,file.driver=file,file.filename=" + name,
		"driver=raw,offset=1M,size=2M,file.driver=qcow2,file.file.driver=file,file.file.filename=" + name,
		"driver=raw,offset=512,file.driver=qcow2,file.file.driver=file,file.file.filename=" + name,
		"file.file.filename=" + name + ",file.driver=qcow2,size=65536,driver=raw",
		"driver=raw,file.driver=file,file.filename=" + name,
		"driver=raw,offset=1k,size=0k,file.driver=file,file.filename=" + name,
	} {
		out := filepath.Join(dir, "out")
		qemu(t, "qemu-img", "convert", "--image-opts", opts, "-O", "raw", out)
		want, err := os.ReadFile(out)
		require.NoError(t, err)
		for _, ro := range []bool{true, false} {
			d, err := chain.Open(opts, &chain.Options{ReadOnly: ro})
			require.NoError(t, err)
			require.EqualValues(t, len(want), d.Size(), opts)
			got := make([]byte, len(want))
			require.NoError(t, image.ReadFull(d, got, 0))
			require.True(t, bytes.Equal(want, got), opts)
			if ro {
				_, err = d.WriteAt([]byte{1}, 0)
				require.Error(t, err)
			}
			require.NoError(t, d.Close())
		}
	}
}

func TestWindowWritesReachTheImage(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	create(t, path, &chain.CreateOptions{Size: 8 << 20}, nil, 0)
	d, err := chain.Open("driver=raw,offset=1M,size=2M,file.driver=qcow2,file.file.filename="+path, nil)
	require.NoError(t, err)
	_, err = d.WriteAt([]byte("here"), 4096)
	require.NoError(t, err)
	_, err = d.WriteAt([]byte("xx"), 2<<20-1)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	require.NoError(t, d.Sync())
	require.NoError(t, d.Close())
	out := filepath.Join(t.TempDir(), "raw")
	qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
	p, err := os.ReadFile(out)
	require.NoError(t, err)
	require.Equal(t, "here", string(p[1<<20+4096:][:4]))
}

func TestLocksAreQEMUs(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	c, err := chain.Create(path, nil)
	require.NoError(t, err)
	require.NoError(t, c.Commit())
	// From Create on, without a gap at Commit.
	_, err = chain.Open(path, nil)
	require.ErrorIs(t, err, image.ErrLocked)
	_, err = chain.Detect(path)
	require.NoError(t, err, "which only looks")
	out, err := exec.Command("qemu-img", "info", path).CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "lock")
	require.NoError(t, c.Device.Close())
	qemu(t, "qemu-img", "info", path)
	for _, location := range []string{path, "driver=qcow2,file.filename=" + path} {
		d, err := chain.Open(location, nil)
		require.NoError(t, err)
		_, err = chain.Open(path, &chain.Options{Format: chain.Raw, ReadOnly: true})
		require.ErrorIs(t, err, image.ErrLocked)
		require.NoError(t, d.Close())
	}
}

func TestCreateAppearsAtCommit(t *testing.T) {
	for _, format := range []string{chain.Raw, chain.QCOW2} {
		dir := t.TempDir()
		path := filepath.Join(dir, "x")
		c, err := chain.Create(path, &chain.CreateOptions{Format: format, Size: 1 << 20})
		require.NoError(t, err)
		require.Equal(t, path, c.Location)
		require.EqualValues(t, 1<<20, c.Device.Size())
		_, err = os.Lstat(path)
		require.ErrorIs(t, err, fs.ErrNotExist)
		require.Len(t, names(t, dir), 1)
		require.Regexp(t, `^\.nvstore-[0-9a-f]{16}\.new$`, names(t, dir)[0])
		require.NoError(t, c.Commit())
		require.Equal(t, []string{"x"}, names(t, dir))
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.EqualValues(t, 0o600, info.Mode())
		require.ErrorIs(t, c.Commit(), image.ErrClosed)
		require.NoError(t, c.Abort(), "nothing to do")
		_, err = c.Device.WriteAt([]byte("still open"), 0)
		require.NoError(t, err)
		require.NoError(t, c.Device.Close())
		require.Equal(t, []string{"x"}, names(t, dir))

		d, err := chain.Open(path, &chain.Options{Format: format})
		require.NoError(t, err)
		require.EqualValues(t, 1<<20, d.Size())
		require.NoError(t, d.Close())
		if format == chain.QCOW2 {
			qemu(t, "qemu-img", "check", path)
		}
	}
}

func TestCreateReplacesNothing(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	require.NoError(t, os.WriteFile(path, []byte("precious"), 0o600))
	_, err := chain.Create(path, nil)
	require.ErrorIs(t, err, fs.ErrExist)
	link := filepath.Join(dir, "dangling")
	require.NoError(t, os.Symlink("nowhere", link))
	_, err = chain.Create(link, nil)
	require.ErrorIs(t, err, fs.ErrExist)

	// Somebody else is faster.
	other := filepath.Join(dir, "y")
	c, err := chain.Create(other, nil)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(other, []byte("theirs"), 0o600))
	require.ErrorIs(t, c.Commit(), fs.ErrExist)
	require.NoError(t, c.Abort())
	require.NoError(t, c.Abort(), "once more")
	p, err := os.ReadFile(other)
	require.NoError(t, err)
	require.Equal(t, "theirs", string(p))
	require.Equal(t, []string{"dangling", "x", "y"}, names(t, dir))
}

func TestAbortLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	c, err := chain.Create(filepath.Join(dir, "x"), nil)
	require.NoError(t, err)
	require.NoError(t, c.Device.Close(), "as a store does that failed")
	require.NoError(t, c.Abort())
	require.Empty(t, names(t, dir))
	require.ErrorIs(t, c.Commit(), image.ErrClosed)

	for _, o := range []chain.CreateOptions{
		{Size: 1000}, {Size: -1}, {Size: -1, Format: chain.Raw}, {ClusterSize: 3}, {Format: "vdi"}, {Size: 1 << 62},
	} {
		c, err := chain.Create(filepath.Join(dir, "x"), &o)
		require.Error(t, err, "%+v", o)
		require.Nil(t, c)
		require.Empty(t, names(t, dir), "%+v", o)
	}
	_, err = chain.Create(filepath.Join(dir, "no", "x"), nil)
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = chain.Create("driver=qcow2,file.filename=x", nil)
	require.ErrorIs(t, err, chain.ErrLocation)
	_, err = chain.Create("http://x", nil)
	require.ErrorIs(t, err, image.ErrUnsupported)
}

func TestCommitFailsCleanly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "d")
	require.NoError(t, os.Mkdir(dir, 0o700))
	c, err := chain.Create(filepath.Join(dir, "x"), nil)
	require.NoError(t, err)
	moved := dir + "2"
	require.NoError(t, os.Rename(dir, moved))
	require.ErrorIs(t, c.Commit(), fs.ErrNotExist)
	require.NoError(t, os.Rename(moved, dir))
	require.NoError(t, c.Abort())
	require.Empty(t, names(t, dir))
}

func TestCommitSyncsTheDirectory(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "x")
	var synced []string
	var fail error
	defer chain.ReplaceSyncDir(func(d string) error {
		_, err := os.Lstat(path)
		require.NoError(t, err, "before it has the name")
		synced = append(synced, d)
		return fail
	})()
	create(t, path, nil, nil, 0)
	require.Equal(t, []string{dir}, synced)
	require.NoError(t, os.Remove(path))

	fail = syscall.EIO
	c, err := chain.Create(path, nil)
	require.NoError(t, err)
	require.ErrorIs(t, c.Commit(), syscall.EIO)
	require.NoError(t, c.Abort())
	require.Empty(t, names(t, dir))

	// The name is somebody else's by now.
	c, err = chain.Create(path, nil)
	require.NoError(t, err)
	require.ErrorIs(t, c.Commit(), syscall.EIO)
	require.NoError(t, os.Remove(path))
	require.NoError(t, os.WriteFile(path, []byte("theirs"), 0o600))
	require.NoError(t, c.Abort())
	require.Equal(t, []string{"x"}, names(t, dir))
}

func TestLinkOver(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	require.NoError(t, os.WriteFile(a, []byte("a"), 0o600))
	require.NoError(t, chain.LinkOver(a, b))
	require.Equal(t, []string{"b"}, names(t, dir))
	require.NoError(t, os.WriteFile(a, []byte("new"), 0o600))
	require.Equal(t, syscall.EEXIST, chain.LinkOver(a, b))
	p, err := os.ReadFile(b)
	require.NoError(t, err)
	require.Equal(t, "a", string(p))
	require.Equal(t, []string{"a", "b"}, names(t, dir))
}

func TestPebble(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "nv")
	_, err := chain.Machines(dir)
	require.ErrorIs(t, err, fs.ErrNotExist)

	_, err = chain.Create("pebble:"+dir, &chain.CreateOptions{Format: chain.Raw})
	require.ErrorIs(t, err, chain.ErrLocation)
	first := create(t, "pebble:"+dir, &chain.CreateOptions{Size: 1 << 20}, []byte("one"), 0)
	require.Regexp(t, `^pebble:`+dir+`/[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`, first)
	read := func(location string) string {
		d, err := chain.Open(location, &chain.Options{ReadOnly: true})
		require.NoError(t, err)
		p := make([]byte, 3)
		require.NoError(t, image.ReadFull(d, p, 0))
		_, err = d.WriteAt(p, 0)
		require.ErrorIs(t, err, image.ErrReadOnly)
		require.NoError(t, d.Close())
		return string(p)
	}
	require.Equal(t, "one", read(first))
	require.Equal(t, "one", read("pebble:"+dir), "the only one")
	require.Equal(t, "one", read("driver=pebble,dir="+dir))

	second := create(t, "pebble:"+dir+"/"+uuid, nil, []byte("two"), 0)
	require.Equal(t, "pebble:"+dir+"/"+uuid, second)
	require.Equal(t, "one", read(first))
	require.Equal(t, "two", read(second))
	require.Equal(t, "two", read("driver=pebble,dir="+dir+",machine="+uuid))
	list, err := chain.Machines(dir)
	require.NoError(t, err)
	require.ElementsMatch(t, []string{first[len(first)-36:], uuid}, list)
	require.IsIncreasing(t, list)

	_, err = chain.Open("pebble:"+dir, nil)
	require.ErrorIs(t, err, chain.ErrLocation)
	require.ErrorContains(t, err, list[0]+", "+list[1])
	_, err = chain.Open("pebble:"+dir+"/00000000-0000-4000-8000-000000000000", nil)
	require.ErrorIs(t, err, image.ErrNotFound)
	_, err = chain.Open("driver=pebble,dir="+dir+",machine=42", nil)
	require.ErrorIs(t, err, chain.ErrLocation)
	_, err = chain.Create(second, nil)
	require.ErrorIs(t, err, image.ErrExist)
	require.Equal(t, "two", read(second))

	// Two machines at once; one only once; and Machines meanwhile.
	a, err := chain.Open(first, nil)
	require.NoError(t, err)
	b, err := chain.Open(second, nil)
	require.NoError(t, err)
	_, err = chain.Open(second, nil)
	require.ErrorIs(t, err, image.ErrLocked)
	list, err = chain.Machines(dir)
	require.NoError(t, err)
	require.Len(t, list, 2)
	require.NoError(t, a.Close())
	require.NoError(t, b.Close())

	c, err := chain.Create("pebble:"+dir, nil)
	require.NoError(t, err)
	require.NoError(t, c.Abort())
	list, err = chain.Machines(dir)
	require.NoError(t, err)
	require.Len(t, list, 2, "gone again")
}

func TestPebbleOfOthers(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "CURRENT"), []byte("x"), 0o600))
	_, err := chain.Create("pebble:"+dir, nil)
	require.ErrorIs(t, err, image.ErrFormat)
	require.Equal(t, []string{"CURRENT"}, names(t, dir))
}

func TestPebbleManyMachines(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "nv")
	for range 18 {
		create(t, "pebble:"+dir, &chain.CreateOptions{Size: 4096}, nil, 0)
	}
	_, err := chain.Open("pebble:"+dir, nil)
	require.ErrorIs(t, err, chain.ErrLocation)
	require.ErrorContains(t, err, "and 2 more")
}

// A raw file keeps its capabilities through a stack without a window.
func TestRawWithoutWindowResizes(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	d, err := raw.Create(path, 4096, nil)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	c, err := chain.Open("driver=raw,file.filename="+path, nil)
	require.NoError(t, err)
	r, ok := image.As[image.Resizer](c)
	require.True(t, ok)
	require.NoError(t, r.Resize(8192))
	require.NoError(t, c.Close())
}

// What is replaced is there until Commit, stays if there is none, and isn't
// touched while somebody has it open.
func TestReplace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	was := func() string { p, err := os.ReadFile(path); require.NoError(t, err); return string(p) }
	require.NoError(t, os.WriteFile(path, []byte("old"), 0o640))
	for _, o := range []chain.CreateOptions{{Format: chain.Raw, Size: 4}, {Format: chain.Raw, Size: 4, LateSync: true}, {Format: chain.QCOW2, NoSync: true}} {
		_, err := chain.Create(path, &o)
		require.ErrorIs(t, err, fs.ErrExist)
		o.Replace = true
		p, err := chain.Create(path, &o)
		require.NoError(t, err)
		_, err = chain.Open(path, &chain.Options{Format: chain.Raw, ReadOnly: true})
		require.ErrorIs(t, err, image.ErrLocked, "it is about to go")
		require.Equal(t, "old", was())
		require.NoError(t, p.Abort())
		require.Equal(t, "old", was())

		busy, err := chain.Open(path, &chain.Options{Format: chain.Raw, ReadOnly: true})
		require.NoError(t, err)
		_, err = chain.Create(path, &o)
		require.ErrorIs(t, err, image.ErrLocked)
		require.NoError(t, busy.Close())

		p, err = chain.Create(path, &o)
		require.NoError(t, err)
		_, err = p.Device.WriteAt([]byte("new!"), 0)
		require.NoError(t, err)
		require.NoError(t, p.Device.Sync())
		require.NoError(t, p.Device.Close())
		require.NoError(t, p.Commit())
		require.NoError(t, p.Abort())
		d, err := chain.Open(path, &chain.Options{Format: o.Format})
		require.NoError(t, err)
		b := make([]byte, 4)
		require.NoError(t, image.ReadFull(d, b, 0))
		require.Equal(t, "new!", string(b))
		require.NoError(t, d.Close())
		info, err := os.Stat(path)
		require.NoError(t, err)
		require.Equal(t, fs.FileMode(0o640), info.Mode().Perm())
		left, err := filepath.Glob(filepath.Join(filepath.Dir(path), ".nvstore-*"))
		require.NoError(t, err)
		require.Empty(t, left)
		require.NoError(t, os.WriteFile(path, []byte("old"), 0o640))
	}
	require.NoError(t, os.Symlink(path, path+".link"))
	p, err := chain.Create(path+".link", &chain.CreateOptions{Format: chain.Raw, Empty: true, Replace: true})
	require.NoError(t, err)
	require.NoError(t, p.Commit())
	require.NoError(t, p.Device.Close())
	require.Empty(t, was(), "the link's target is replaced")
	_, err = chain.Create(t.TempDir(), &chain.CreateOptions{Replace: true})
	require.ErrorIs(t, err, image.ErrUnsupported)
}
