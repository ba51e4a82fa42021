package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// qemuIO runs qemu-io commands on an image.
func qemuIO(t testing.TB, path string, cmds ...string) {
	args := []string{"-f", "qcow2"}
	for _, c := range cmds {
		args = append(args, "-c", c)
	}
	tool(t, "qemu-io", append(args, path)...)
}

func qemuCreate(t testing.TB, path, opts string, size int64) {
	tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", opts, path, fmt.Sprint(size))
}

var compat = map[int]string{2: "0.10", 3: "1.1"}

// TestCreateLikeQEMU compares whole images with those that qemu-img makes.
func TestCreateLikeQEMU(t *testing.T) {
	dir := tempDir(t)
	for v, c := range compat {
		for _, cs := range append(clusterSizes, 1024, 32768) {
			for _, size := range []int64{512, 1 << 20, 100 << 20, 1 << 30} {
				if size/int64(cs)*4/int64(cs) > 200 {
					continue // QEMU grows its refcounts in another order
				}
				path := filepath.Join(dir, "img")
				qemuCreate(t, path, fmt.Sprintf("compat=%s,cluster_size=%d", c, cs), size)
				want, err := os.ReadFile(path)
				require.NoError(t, err)
				im, d := create(t, &qcow2.CreateOptions{Size: size, ClusterSize: cs, Version: v})
				require.NoError(t, im.Close())
				got := make([]byte, d.Size())
				require.NoError(t, image.ReadFull(d, got, 0))
				// QEMU leaves the last cluster incomplete.
				want = append(want, make([]byte, max(0, len(got)-len(want)))...)
				require.True(t, bytes.Equal(want, got), "version %d, clusters of %d, %d bytes%s", v, cs, size, firstDiff(want, got))
			}
		}
	}
}

// TestTurns has qemu-io and this driver write to an image in turns.
func TestTurns(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 1))
	for v, c := range compat {
		for _, cs := range clusterSizes {
			t.Run(fmt.Sprintf("%d-v%d", cs, v), func(t *testing.T) {
				const size = 5 << 20
				path := filepath.Join(tempDir(t), "img")
				qemuCreate(t, path, fmt.Sprintf("compat=%s,cluster_size=%d", c, cs), size)
				want := make([]byte, size)
				for range 4 {
					turnQEMU(t, rng, path, want)
					turnOurs(t, rng, path, want)
					qemuCheck(t, path, false)
					require.True(t, bytes.Equal(want, qemuRaw(t, path, "")))
				}
			})
		}
	}
}

func turnQEMU(t *testing.T, rng *rand.Rand, path string, want []byte) {
	var cmds []string
	for range 6 {
		off := rng.IntN(len(want)-300<<10) / 512 * 512
		n := (1 + rng.IntN(200)) * 512
		p := byte(1 + rng.IntN(255))
		switch rng.IntN(4) {
		case 0:
			cmds = append(cmds, fmt.Sprintf("write -z %d %d", off, n))
			p = 0
		case 1:
			// Compressed writes take whole clusters that aren't
			// allocated; others fail, and qemu-io goes on.
			cmds = append(cmds, fmt.Sprintf("write -P %d %d %d", p, off, n))
		default:
			cmds = append(cmds, fmt.Sprintf("write -P %d %d %d", p, off, n))
		}
		copy(want[off:off+n], bytes.Repeat([]byte{p}, n))
	}
	qemuIO(t, path, cmds...)
}

func turnOurs(t *testing.T, rng *rand.Rand, path string, want []byte) {
	d := &keep{load(t, path)}
	im := open(t, d)
	require.True(t, bytes.Equal(want, contents(t, im)), "what qemu-io wrote%s", firstDiff(want, contents(t, im)))
	noErrors(t, im, false)
	for range 6 {
		off := rng.IntN(len(want) - 300<<10)
		p := make([]byte, rng.IntN(100000))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		_, err := im.WriteAt(p, int64(off))
		require.NoError(t, err)
		copy(want[off:], p)
	}
	noErrors(t, im, false)
	require.NoError(t, im.Close())
	dump(t, d, path)
}

// TestSnapshotsWithQEMU makes, applies and deletes snapshots by both.
func TestSnapshotsWithQEMU(t *testing.T) {
	for v, c := range compat {
		for _, cs := range clusterSizes {
			t.Run(fmt.Sprintf("%d-v%d", cs, v), func(t *testing.T) { snapshotsWithQEMU(t, c, cs) })
		}
	}
}

func snapshotsWithQEMU(t *testing.T, compat string, cs int) {
	const size = 3 << 20
	path := filepath.Join(tempDir(t), "img")
	qemuCreate(t, path, fmt.Sprintf("compat=%s,cluster_size=%d", compat, cs), size)
	qemuIO(t, path, "write -P 1 0 2M")
	tool(t, "qemu-img", "snapshot", "-c", "theirs", path)
	qemuIO(t, path, "write -P 2 512k 1M")
	one := bytes.Repeat([]byte{1}, size)
	clear(one[2<<20:])
	two := bytes.Clone(one)
	copy(two[512<<10:], bytes.Repeat([]byte{2}, 1<<20))

	d := &keep{load(t, path)}
	im := open(t, d)
	list, err := im.Snapshots().List()
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, "theirs", list[0].Name)
	require.Equal(t, "1", list[0].ID)
	require.Equal(t, int64(size), list[0].DiskSize)
	require.Positive(t, list[0].Seconds)
	require.NoError(t, im.Snapshots().Create("ours"))
	require.NoError(t, im.Snapshots().Revert("theirs"))
	require.True(t, bytes.Equal(one, contents(t, im)))
	_, err = im.WriteAt([]byte("three"), 100)
	require.NoError(t, err)
	require.NoError(t, im.Close())
	dump(t, d, path)

	qemuCheck(t, path, false)
	out := tool(t, "qemu-img", "snapshot", "-l", path)
	require.Regexp(t, `(?m)^1 +theirs `, out)
	require.Regexp(t, `(?m)^2 +ours `, out)
	tool(t, "qemu-img", "snapshot", "-a", "ours", path)
	qemuCheck(t, path, false)
	require.True(t, bytes.Equal(two, qemuRaw(t, path, "")))
	tool(t, "qemu-img", "snapshot", "-d", "theirs", path)
	qemuCheck(t, path, false)
	qemuIO(t, path, "write -P 7 1M 64k")
	copy(two[1<<20:], bytes.Repeat([]byte{7}, 64<<10))

	d = &keep{load(t, path)}
	im = open(t, d)
	require.True(t, bytes.Equal(two, contents(t, im)))
	noErrors(t, im, false)
	require.NoError(t, im.Snapshots().Delete("ours"))
	noErrors(t, im, false)
	require.NoError(t, im.Close())
	checkDevice(t, d, two)
}

// TestRevertChangesSize goes between snapshots of different sizes.
func TestRevertChangesSize(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 512})
	_, err := im.WriteAt([]byte("small"), 1<<20-5)
	require.NoError(t, err)
	require.NoError(t, im.Snapshots().Create("small"))
	require.NoError(t, im.Resize(9<<20))
	_, err = im.WriteAt([]byte("large"), 9<<20-5)
	require.NoError(t, err)
	require.NoError(t, im.Snapshots().Create("large"))
	for range 2 {
		require.NoError(t, im.Snapshots().Revert("small"))
		require.Equal(t, int64(1<<20), im.Size())
		noErrors(t, im, false)
		require.NoError(t, im.Snapshots().Revert("2"))
		require.Equal(t, int64(9<<20), im.Size())
		noErrors(t, im, false)
	}
	want := make([]byte, 9<<20)
	copy(want[1<<20-5:], "small")
	copy(want[9<<20-5:], "large")
	require.True(t, bytes.Equal(want, contents(t, im)))
	require.NoError(t, im.Close())
	checkDevice(t, d, want)
}

// TestVMState leaves the state of a stopped machine with its snapshot.
func TestVMState(t *testing.T) {
	dir := tempDir(t)
	path := filepath.Join(dir, "img")
	qemuCreate(t, path, "cluster_size=4096", 1<<20)
	// -b writes to the VM state area of the active L1 table.
	qemuIO(t, path, "write -P 3 0 64k", "write -b -P 9 0 128k")
	tool(t, "qemu-img", "snapshot", "-c", "s", path)
	d := &keep{load(t, path)}
	im := open(t, d)
	noErrors(t, im, false)
	require.NoError(t, im.Snapshots().Revert("s"))
	noErrors(t, im, false)
	// Growing into the state must not show it.
	require.NoError(t, im.Resize(64<<20))
	b := contents(t, im)
	require.True(t, bytes.Equal(make([]byte, 63<<20), b[1<<20:]))
	require.NoError(t, im.Close())
	dump(t, d, path)
	qemuCheck(t, path, false)
	tool(t, "qemu-img", "snapshot", "-a", "s", path)
	qemuCheck(t, path, false)
	qemuIO(t, path, "read -b -P 9 0 128k")
}

// TestGrowIntoVMState grows a disk whose active L1 table still maps state.
func TestGrowIntoVMState(t *testing.T) {
	path := filepath.Join(tempDir(t), "img")
	qemuCreate(t, path, "cluster_size=4096", 1<<20+512)
	qemuIO(t, path, "write -P 3 1M 512", "write -b -P 9 0 128k")
	d := &keep{load(t, path)}
	im := open(t, d)
	require.NoError(t, im.Resize(64<<20))
	b := contents(t, im)
	require.Equal(t, bytes.Repeat([]byte{3}, 512), b[1<<20:1<<20+512])
	require.True(t, bytes.Equal(make([]byte, 63<<20-512), b[1<<20+512:]))
	require.NoError(t, im.Close())
	checkDevice(t, d, b)
}

// TestCompressed reads what QEMU compressed, and writes over it.
func TestCompressed(t *testing.T) {
	for _, typ := range []string{"zlib", "zstd"} {
		for _, cs := range []int{512, 4096, 65536, 2 << 20} {
			t.Run(fmt.Sprintf("%s-%d", typ, cs), func(t *testing.T) {
				dir := tempDir(t)
				rng := rand.New(rand.NewPCG(7, uint64(cs)))
				want := make([]byte, 5<<20)
				for i := range want {
					want[i] = byte(rng.IntN(1 + i>>18)) // from zeros to noise
				}
				raw, path := filepath.Join(dir, "raw"), filepath.Join(dir, "img")
				require.NoError(t, os.WriteFile(raw, want, 0o600))
				tool(t, "qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o",
					fmt.Sprintf("compression_type=%s,cluster_size=%d", typ, cs), raw, path)
				d := &keep{load(t, path)}
				im := open(t, d)
				require.True(t, bytes.Equal(want, contents(t, im)))
				r, err := im.Check(t.Context(), &qcow2.CheckOptions{Data: true})
				require.NoError(t, err)
				require.Zero(t, r.Errors+r.Leaks, "%+v", r)
				require.Positive(t, r.Compressed)
				require.NoError(t, im.Snapshots().Create("s"))
				overwriteSome(t, im, want)
				noErrors(t, im, false)
				require.NoError(t, im.Close())
				checkDevice(t, d, want)
				im = open(t, d)
				require.NoError(t, im.Snapshots().Delete("s"))
				noErrors(t, im, false)
				overwriteSome(t, im, want)
				require.NoError(t, im.Close())
				checkDevice(t, d, want)
			})
		}
	}
}

func overwriteSome(t *testing.T, im *qcow2.Image, want []byte) {
	for off := int64(1000); off < int64(len(want))-100000; off += 777_777 {
		p := []byte(fmt.Sprint("written over at ", off))
		_, err := im.WriteAt(p, off)
		require.NoError(t, err)
		copy(want[off:], p)
	}
	require.NoError(t, im.WriteZeroes(3<<20, 300_000))
	clear(want[3<<20:][:300_000])
	require.NoError(t, im.Sync())
}

// TestInvalidateBitmaps refuses to make bitmaps stale that it can't keep true,
// unless told to.
func TestInvalidateBitmaps(t *testing.T) {
	path := filepath.Join(tempDir(t), "img")
	qemuCreate(t, path, "cluster_size=4096", 8<<20)
	tool(t, "qemu-img", "bitmap", "--add", "-g", "4k", path, "b0")
	qemuIO(t, path, "write -P 5 1M 1M")
	d := &keep{load(t, path)}
	im := open(t, d)
	info, err := im.Info()
	require.NoError(t, err)
	require.Equal(t, 1, info.Bitmaps)
	require.Equal(t, []qcow2.Feature{{Kind: "autoclear", Bit: 0, Name: "bitmaps"}}, info.Features)
	require.NoError(t, im.Close())

	b := bytesOf(t, d)
	ext := bytes.Index(b[:4096], []byte{0x23, 0x85, 0x28, 0x75})
	dir := binary.BigEndian.Uint64(b[ext+24:])
	b[dir+15] |= 4 // a flag that QEMU doesn't know either
	d = &keep{memory(t, b)}
	_, err = qcow2.Open(d, nil)
	require.ErrorIs(t, err, image.ErrUnsupported)
	var fe *image.FormatError
	require.ErrorAs(t, err, &fe)
	require.Equal(t, int64(dir+12), fe.Off)
	require.Equal(t, b, bytesOf(t, d))
	im, err = qcow2.Open(d, &qcow2.OpenOptions{ReadOnly: true})
	require.NoError(t, err)
	_, err = im.Bitmaps()
	require.ErrorIs(t, err, image.ErrUnsupported)
	require.NoError(t, im.Close())

	im, err = qcow2.Open(d, &qcow2.OpenOptions{InvalidateBitmaps: true})
	require.NoError(t, err)
	_, err = im.WriteAt([]byte("x"), 0)
	require.NoError(t, err)
	r, err := im.Check(t.Context(), nil)
	require.NoError(t, err)
	require.Zero(t, r.Errors)
	require.Positive(t, r.Leaks)
	require.NoError(t, im.Close())
	dump(t, d, path)
	qemuCheck(t, path, true)
	tool(t, "qemu-img", "check", "-f", "qcow2", "-r", "leaks", path)
	qemuCheck(t, path, false)
}

// TestRefused has images that QEMU makes and this driver doesn't open.
func TestRefused(t *testing.T) {
	dir := tempDir(t)
	base := filepath.Join(dir, "base")
	qemuCreate(t, base, "cluster_size=65536", 1<<20)
	for _, c := range []struct{ name, opts, want string }{
		{"backing", "backing_file=base,backing_fmt=qcow2", "no backing file"},
		{"data", "data_file=" + filepath.Join(dir, "data.raw"), "no external data file"},
		{"aes", "encrypt.format=aes,encrypt.key-secret=s", "encrypted"},
		{"luks", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "encrypted"},
	} {
		path := filepath.Join(dir, c.name)
		create := []string{"create", "-q", "--object", "secret,id=s,data=123456", "-f", "qcow2", "-o", c.opts, path, "1M"}
		for try := 0; exec.Command("qemu-img", create...).Run() != nil; try++ {
			// Its measurement of PBKDF2 fails now and then.
			require.Less(t, try, 50, "qemu-img %q", create)
		}
		for _, ro := range []bool{false, true} {
			_, err := qcow2.Open(load(t, path), &qcow2.OpenOptions{Path: path, ReadOnly: ro})
			require.ErrorIs(t, err, image.ErrUnsupported, c.name)
			require.ErrorContains(t, err, c.want)
			var fe *image.FormatError
			require.ErrorAs(t, err, &fe)
			require.Equal(t, path, fe.Path)
		}
		info, err := qcow2.Inspect(load(t, path), path)
		require.NoError(t, err)
		require.Equal(t, int64(1<<20), info.VirtualSize)
		switch c.name {
		case "backing":
			require.Equal(t, "base", info.BackingFile)
			require.Equal(t, "qcow2", info.BackingFormat)
		case "data":
			require.Equal(t, filepath.Join(dir, "data.raw"), info.DataFile)
		case "aes", "luks":
			require.Equal(t, c.name, info.Encryption)
		}
	}
}

// TestRefcountWidths writes images of all widths by both.
func TestRefcountWidths(t *testing.T) {
	for bits := 1; bits <= 64; bits *= 2 {
		for _, cs := range []int{512, 65536} {
			path := filepath.Join(tempDir(t), "img")
			qemuCreate(t, path, fmt.Sprintf("refcount_bits=%d,cluster_size=%d", bits, cs), 4<<20)
			qemuIO(t, path, "write -P 1 0 1M", "write -P 2 3M 100k")
			d := &keep{load(t, path)}
			im := open(t, d)
			info, err := im.Info()
			require.NoError(t, err)
			require.Equal(t, bits, info.RefcountBits)
			_, err = im.WriteAt(bytes.Repeat([]byte{3}, 2<<20), 1<<20)
			require.NoError(t, err)
			noErrors(t, im, false)
			want := contents(t, im)
			require.NoError(t, im.Close())
			checkDevice(t, d, want)

			im, d = create(t, &qcow2.CreateOptions{Size: 4 << 20, RefcountBits: bits, ClusterSize: cs})
			_, err = im.WriteAt(want, 0)
			require.NoError(t, err)
			require.NoError(t, im.Close())
			checkDevice(t, d, want)
		}
	}
}

// TestHuge opens and writes the largest images without memory to match.
func TestHuge(t *testing.T) {
	for _, c := range []struct {
		cs   int
		size int64
	}{{65536, 16 << 40}, {2 << 20, 1 << 60}, {512, 120 << 30}, {4096, 8 << 40}} {
		im, d := create(t, &qcow2.CreateOptions{Size: c.size, ClusterSize: c.cs})
		for i := int64(0); i < 40; i++ {
			_, err := im.WriteAt([]byte("some bytes"), c.size/40*i)
			require.NoError(t, err)
		}
		_, err := im.WriteAt([]byte("the end"), c.size-7)
		require.NoError(t, err)
		require.NoError(t, im.Snapshots().Create("s"))
		require.NoError(t, im.Discard(0, c.size))
		require.NoError(t, im.Snapshots().Revert("s"))
		noErrors(t, im, false)
		require.NoError(t, im.Close())
		path := filepath.Join(tempDir(t), "img")
		dump(t, d, path)
		qemuCheck(t, path, false)
		qemuIO(t, path, fmt.Sprintf("read -P 0 %d 512", c.size-1024))
		im = open(t, d)
		p := make([]byte, 7)
		require.NoError(t, image.ReadFull(im, p, c.size-7))
		require.Equal(t, "the end", string(p))
	}
}

// TestExtensions keeps what it doesn't know.
func TestExtensions(t *testing.T) {
	for _, cs := range []int{512, 65536} {
		x := []qcow2.Extension{{Type: 0x6e767374, Data: []byte("first")}, {Type: 0x12345678, Data: []byte("12345678")}}
		im, d := create(t, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs, Extensions: x})
		require.NoError(t, im.Snapshots().Create("s"))
		require.NoError(t, im.Resize(90<<20))
		require.NoError(t, im.Close())
		checkDevice(t, d, make([]byte, 90<<20))
		path := filepath.Join(tempDir(t), "img")
		dump(t, d, path)
		tool(t, "qemu-img", "snapshot", "-d", "s", path)
		info, err := qcow2.Inspect(load(t, path), "")
		require.NoError(t, err)
		require.Subset(t, info.Extensions, x)
	}
	_, err := qcow2.Create(imagetest.NewMemory(0), &qcow2.CreateOptions{ClusterSize: 512,
		Extensions: []qcow2.Extension{{Type: 1, Data: make([]byte, 400)}}})
	require.ErrorIs(t, err, image.ErrOutOfRange)
}
