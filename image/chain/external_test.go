package chain_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
)

// qemuImage makes an image with qemu-img, and runs commands of qemu-io on it.
func qemuImage(t *testing.T, path, opts, size string, cmds ...string) {
	t.Helper()
	args := []string{"create", "-q", "-f", "qcow2"}
	if opts != "" {
		args = append(args, "-o", opts)
	}
	if args = append(args, path); size != "" {
		args = append(args, size)
	}
	qemu(t, "qemu-img", args...)
	for _, c := range cmds {
		qemu(t, "qemu-io", "-f", "qcow2", "-c", c, path)
	}
}

func readAll(t *testing.T, d image.Device) []byte {
	t.Helper()
	b := make([]byte, d.Size())
	require.NoError(t, image.ReadFull(d, b, 0))
	return b
}

// TestBackingChain: a chain of qcow2 over qcow2 over raw, in folders of their
// own, is opened only if that is allowed, and reads as for QEMU.
func TestBackingChain(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "base"), 0o700))
	base := bytes.Repeat([]byte("base"), 1<<18)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "base", "raw"), base, 0o600))
	mid, top := filepath.Join(dir, "base", "mid"), filepath.Join(dir, "top")
	qemuImage(t, mid, "backing_file=raw,backing_fmt=raw", "", "write -P 1 64k 64k")
	qemuImage(t, top, "backing_file=base/mid,backing_fmt=qcow2", "", "write -P 2 128k 64k", "write -z 256k 64k")
	qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, filepath.Join(dir, "flat"))
	want, err := os.ReadFile(filepath.Join(dir, "flat"))
	require.NoError(t, err)
	for _, ro := range []bool{true, false} {
		_, err := chain.Open(top, &chain.Options{Format: chain.QCOW2, ReadOnly: ro})
		require.ErrorIs(t, err, chain.ErrExternal)
		require.ErrorContains(t, err, "base/mid")
		d, err := chain.Open(top, &chain.Options{Format: chain.QCOW2, ReadOnly: ro, AllowExternal: true})
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, readAll(t, d)))
		s, ok := image.As[image.BlockStatuser](d)
		require.True(t, ok)
		for off, depth := range map[int64]int{0: 2, 64 << 10: 1, 128 << 10: 0, 256 << 10: 0} {
			x, err := s.BlockStatus(off, 64<<10)
			require.NoError(t, err)
			require.Equal(t, depth, x.Depth, "%+v", x)
			require.Equal(t, off == 256<<10, x.Zero)
		}
		if !ro {
			_, err = d.WriteAt([]byte("a part of a cluster"), 100)
			require.NoError(t, err)
			copy(want[100:], "a part of a cluster")
			// Nobody writes to what is below, and others may read it.
			_, err := chain.Open(mid, &chain.Options{Format: chain.QCOW2, NoBacking: true})
			require.ErrorIs(t, err, image.ErrLocked)
			qemu(t, "qemu-img", "info", mid)
		}
		require.NoError(t, d.Close())
	}
	qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, filepath.Join(dir, "flat"))
	got, err := os.ReadFile(filepath.Join(dir, "flat"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))

	d, err := chain.Open(top, &chain.Options{Format: chain.QCOW2, NoBacking: true})
	require.NoError(t, err)
	_, err = d.ReadAt(make([]byte, 512), 512<<10)
	require.ErrorIs(t, err, image.ErrUnsupported)
	require.NoError(t, d.Close())
}

// TestExternalNames has names that aren't opened, even if it is allowed.
func TestExternalNames(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "img")
	require.NoError(t, os.WriteFile(filepath.Join(dir, "base"), make([]byte, 1<<20), 0o600))
	for name, c := range map[string]struct {
		file, format string
		kind         error
	}{
		"protocol":          {"nbd://localhost:1/x", "raw", image.ErrUnsupported},
		"json":              {`json:{"driver":"raw","file":{"driver":"file","filename":"/etc/hostname"}}`, "raw", image.ErrUnsupported},
		"file protocol":     {"file:base", "raw", image.ErrUnsupported},
		"no format":         {"base", "", image.ErrFormat},
		"unknown format":    {"base", "vmdk", image.ErrUnsupported},
		"missing":           {"nothing", "raw", os.ErrNotExist},
		"itself":            {"img", "qcow2", image.ErrCorrupt},
		"not of the format": {"base", "qcow2", image.ErrFormat},
	} {
		t.Run(name, func(t *testing.T) {
			opts := []string{"create", "-q", "-u", "-f", "qcow2", "-b", c.file}
			if c.format != "" {
				opts = append(opts, "-F", c.format)
			} else {
				opts = append(opts, "-F", "raw")
			}
			qemu(t, "qemu-img", append(opts, path, "1M")...)
			if c.format == "" {
				b, err := os.ReadFile(path)
				require.NoError(t, err)
				i := bytes.Index(b, []byte{0xe2, 0x79, 0x2a, 0xca})
				b[i] = 0 // an unknown extension
				require.NoError(t, os.WriteFile(path, b, 0o600))
			}
			before := sum(t, path)
			for _, allow := range []bool{false, true} {
				d, err := chain.Open(path, &chain.Options{Format: chain.QCOW2, AllowExternal: allow})
				require.Nil(t, d)
				if allow {
					require.ErrorIs(t, err, c.kind)
				} else {
					require.ErrorIs(t, err, chain.ErrExternal)
				}
			}
			require.Equal(t, before, sum(t, path))
		})
	}
	// Told the format, it opens.
	qemu(t, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "base", "-F", "raw", path, "1M")
	d, err := chain.Open(path, &chain.Options{Format: chain.QCOW2, AllowExternal: true})
	require.NoError(t, err)
	require.NoError(t, d.Close())
}

// TestBackingLoop: two images that are each other's backing file, also through
// links, and a chain that is too long.
func TestBackingLoop(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	qemu(t, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "b", "-F", "qcow2", a, "1M")
	qemu(t, "qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "c", "-F", "qcow2", b, "1M")
	require.NoError(t, os.Symlink("a", filepath.Join(dir, "c")))
	o := &chain.Options{Format: chain.QCOW2, ReadOnly: true, AllowExternal: true}
	_, err := chain.Open(a, o)
	require.ErrorIs(t, err, image.ErrCorrupt)
	require.ErrorContains(t, err, "loop")

	img, err := os.ReadFile(a)
	require.NoError(t, err)
	for i := range 203 {
		// Names of a length, in the place of "b".
		name := fmt.Sprintf("%04d", i+1)
		p := bytes.Clone(img)
		at := int(p[14])<<8 | int(p[15])
		p[19] = 4
		copy(p[at:], name)
		require.NoError(t, os.WriteFile(filepath.Join(dir, fmt.Sprintf("%04d", i)), p, 0o600))
	}
	_, err = chain.Open(filepath.Join(dir, "0000"), o)
	require.ErrorIs(t, err, image.ErrUnsupported)
	require.ErrorContains(t, err, "200")
}

// TestDataFile: QEMU's image with a data file, named relative to the folder.
func TestDataFile(t *testing.T) {
	dir := t.TempDir()
	path, data := filepath.Join(dir, "img"), filepath.Join(dir, "data")
	qemuImage(t, path, "data_file="+data, "1M", "write -P 5 100k 100k")
	_, err := chain.Open(path, &chain.Options{Format: chain.QCOW2})
	require.ErrorIs(t, err, chain.ErrExternal)
	d, err := chain.Open(path, &chain.Options{Format: chain.QCOW2, AllowExternal: true})
	require.NoError(t, err)
	want := make([]byte, 1<<20)
	copy(want[100<<10:], bytes.Repeat([]byte{5}, 100<<10))
	require.True(t, bytes.Equal(want, readAll(t, d)))
	_, err = d.WriteAt([]byte("ours"), 0)
	require.NoError(t, err)
	copy(want, "ours")
	require.NoError(t, d.Sync())
	require.NoError(t, d.Close())
	qemu(t, "qemu-img", "check", path)
	qemu(t, "qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, filepath.Join(dir, "flat"))
	got, err := os.ReadFile(filepath.Join(dir, "flat"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
}

// TestNamedInLocation: backing and data files that the location gives stand for
// those that the image names, which nobody looks for.
func TestNamedInLocation(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	base := bytes.Repeat([]byte("base"), 1<<18)
	require.NoError(t, os.WriteFile(at("raw"), base, 0o600))
	qemuImage(t, at("mid"), "backing_file=raw,backing_fmt=raw", "", "write -P 1 64k 64k")
	qemuImage(t, at("top"), "backing_file=mid,backing_fmt=qcow2,data_file="+at("data"), "", "write -P 2 128k 64k")
	for _, name := range []string{"raw", "mid", "data"} {
		require.NoError(t, os.Rename(at(name), at("moved-"+name)))
	}
	want := bytes.Clone(base)
	copy(want[64<<10:], bytes.Repeat([]byte{1}, 64<<10))
	copy(want[128<<10:], bytes.Repeat([]byte{2}, 64<<10))
	top := "driver=qcow2,file.filename=" + at("top")
	mid := ",backing.driver=qcow2,backing.file.filename=" + at("moved-mid")
	below := ",backing.backing.driver=raw,backing.backing.file.filename=" + at("moved-raw")
	data := ",data-file.filename=" + at("moved-data")
	d, err := chain.Open(top+mid+below+data, nil)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, readAll(t, d)))
	_, err = d.WriteAt([]byte("written"), 0)
	require.NoError(t, err)
	copy(want, "written")
	// What is below is only read, and locked against writers.
	_, err = chain.Open(at("moved-raw"), &chain.Options{Format: chain.Raw})
	require.ErrorIs(t, err, image.ErrLocked)
	require.NoError(t, d.Close())
	qemu(t, "qemu-img", "convert", "-O", "raw", "--image-opts", top+mid+below+data, at("flat"))
	got, err := os.ReadFile(at("flat"))
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got), "qemu-img takes the same location")

	for _, c := range []struct {
		location string
		kind     error
		says     string
	}{
		{top + mid + below, chain.ErrExternal, "data_file"},
		{top + mid + data, chain.ErrExternal, "raw"},
		{top + data, chain.ErrExternal, "mid"},
		{top + data + ",backing.driver=qcow2,backing.file.filename=" + at("top"), nil, ""},
		{"driver=qcow2,file.filename=" + at("moved-mid") + ",backing.driver=raw,backing.file.filename=" + at("moved-raw") + data, chain.ErrLocation, "data_file"},
		{top + data + ",backing.driver=qcow2,backing.backing.driver=raw,backing.backing.file.filename=" + at("moved-raw") + ",backing.file.filename=" + at("none"), nil, "none"},
	} {
		d, err := chain.Open(c.location, nil)
		require.Nil(t, d, c.location)
		require.Error(t, err, c.location)
		if c.kind != nil {
			require.ErrorIs(t, err, c.kind, c.location)
		}
		require.ErrorContains(t, err, c.says)
	}
	// Nothing is left locked.
	for _, name := range []string{"top", "moved-mid", "moved-raw", "moved-data"} {
		f, err := chain.Open(at(name), &chain.Options{Format: chain.Raw})
		require.NoError(t, err, name)
		require.NoError(t, f.Close())
	}
}
