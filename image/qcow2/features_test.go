package qcow2_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// A toyCipher is AES-CTR with the sector's number as the counter: good enough
// to see a sector that was encrypted for another place, or not at all.
type toyCipher struct{ block cipher.Block }

func newToyCipher(key []byte) toyCipher {
	b, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	return toyCipher{b}
}

func (c toyCipher) Encrypt(p []byte, sector uint64) error {
	if len(p)%image.SectorSize != 0 {
		return fmt.Errorf("toy cipher: %d bytes", len(p))
	}
	for ; len(p) > 0; p, sector = p[image.SectorSize:], sector+1 {
		var iv [16]byte
		binary.BigEndian.PutUint64(iv[:], sector)
		cipher.NewCTR(c.block, iv[:]).XORKeyStream(p[:image.SectorSize], p[:image.SectorSize])
	}
	return nil
}

func (c toyCipher) Decrypt(p []byte, sector uint64) error { return c.Encrypt(p, sector) }

const toyHeader = 100_000

func toyCrypt() *qcow2.Crypt {
	return &qcow2.Crypt{HeaderSize: toyHeader, Format: func(h image.Device) (image.SectorCipher, error) {
		key := []byte("the key of a toy")
		if _, err := h.WriteAt(key, toyHeader-16); err != nil {
			return nil, err
		}
		return newToyCipher(key), nil
	}}
}

func toyUnlock(h image.Device, method int) (image.SectorCipher, error) {
	if method != 2 || h.Size() != toyHeader {
		return nil, fmt.Errorf("toy: method %d, header of %d bytes", method, h.Size())
	}
	key := make([]byte, 16)
	if err := image.ReadFull(h, key, toyHeader-16); err != nil {
		return nil, err
	}
	return newToyCipher(key), nil
}

// A rig is an image with the other devices that it consists of, all of which
// outlive it.
type rig struct {
	file, backing, data *keep
	crypt               bool
	dataPath            string // QEMU takes a data file's name from the working directory
}

// A variant is a set of features.
type variant struct {
	name    string
	opts    qcow2.CreateOptions
	backing int // bytes of a backing file with random content, if not 0
	data    bool
	crypt   bool
}

// variants returns the features of images of about size bytes.
func variants(size int) []variant {
	return []variant{
		{name: "subclusters", opts: qcow2.CreateOptions{ClusterSize: 16384, ExtendedL2: true}},
		{name: "zstd", opts: qcow2.CreateOptions{ClusterSize: 4096, Compression: "zstd"}},
		{name: "backing", opts: qcow2.CreateOptions{ClusterSize: 4096}, backing: size * 3 / 4},
		{name: "backing-v2", opts: qcow2.CreateOptions{ClusterSize: 4096, Version: 2}, backing: size*3/4 + 100},
		{name: "subclusters-backing", opts: qcow2.CreateOptions{ClusterSize: 16384, ExtendedL2: true}, backing: size + 5000},
		{name: "data", opts: qcow2.CreateOptions{ClusterSize: 4096}, data: true},
		{name: "data-raw", opts: qcow2.CreateOptions{ClusterSize: 4096, DataFileRaw: true}, data: true},
		{name: "data-subclusters", opts: qcow2.CreateOptions{ClusterSize: 16384, ExtendedL2: true}, data: true},
		{name: "crypt", opts: qcow2.CreateOptions{ClusterSize: 4096}, crypt: true},
		{name: "crypt-subclusters-backing", opts: qcow2.CreateOptions{ClusterSize: 16384, ExtendedL2: true}, crypt: true, backing: size / 2},
	}
}

// open opens the rig's image.
func (r *rig) open(t testing.TB, o qcow2.OpenOptions) *qcow2.Image {
	im, err := r.tryOpen(o)
	require.NoError(t, err)
	return im
}

func (r *rig) tryOpen(o qcow2.OpenOptions) (*qcow2.Image, error) {
	if r.backing != nil {
		o.Backing = r.backing
	}
	if r.data != nil {
		o.DataFile = r.data
	}
	if r.crypt {
		o.Unlock = toyUnlock
	}
	return qcow2.Open(r.file, &o)
}

// build makes the image in file, which is empty, and returns what it reads as.
func (v *variant) build(t testing.TB, file image.Device, size int64, rng *rand.Rand) (*rig, *qcow2.Image, []byte) {
	r := &rig{file: &keep{file}, crypt: v.crypt}
	o := v.opts
	o.Size = size
	content := make([]byte, size)
	if v.backing > 0 {
		b := make([]byte, v.backing)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		clear(b[len(b)/3 : len(b)/2]) // zeros that may be known as such
		copy(content, b)
		r.backing = &keep{memory(t, b)}
		o.BackingFile, o.BackingFormat, o.Backing = "base.raw", "raw", r.backing
	}
	if v.data {
		r.data = &keep{imagetest.NewMemory(0)}
		r.dataPath = filepath.Join(tempDir(t), "data.raw")
		o.DataFile, o.Data = r.dataPath, r.data
	}
	if v.crypt {
		o.Crypt = toyCrypt()
	}
	im, err := qcow2.Create(r.file, &o)
	require.NoError(t, err)
	return r, im, content
}

// dump writes what the image's names refer to.
func (r *rig) dump(t testing.TB, dir string) {
	if r.backing != nil {
		dump(t, r.backing, filepath.Join(dir, "base.raw"))
	}
	if r.data != nil {
		dump(t, r.data, r.dataPath)
	}
}

// TestFeatureModel is TestModel on images with each feature.
func TestFeatureModel(t *testing.T) {
	s := seed(t)
	const size = 1<<20 + 512
	list := variants(size)
	for i, v := range list {
		t.Run(v.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(s, uint64(i)))
			r, im, content := v.build(t, imagetest.NewMemory(0), size, rng)
			version := v.opts.Version
			if version == 0 {
				version = 3
			}
			m := &model{t: t, rng: rng, rig: r, dev: r.file, im: im, disk: content, snaps: map[string][]byte{},
				cfg: modelConfig{cs: v.opts.ClusterSize, version: version, refBits: 16, size: size, max: 2 * size}}
			for m.ops = range modelOps() / 4 / len(list) {
				m.step()
				if m.ops%500 == 499 {
					noErrors(t, m.im, false)
				}
			}
			m.reopen()
			m.qemu()
			if r.data != nil && v.opts.DataFileRaw {
				raw := make([]byte, len(m.disk))
				_, err := r.data.ReadAt(raw, 0)
				require.True(t, err == nil || err == io.EOF)
				require.True(t, bytes.Equal(m.disk, raw), "the data file%s", firstDiff(m.disk, raw))
			}
		})
	}
}

// TestFeatureCrash is TestCrash on images with each feature. A data file is on
// the same device, so that the power is cut for both at once.
func TestFeatureCrash(t *testing.T) {
	s := seed(t)
	const size = 160 << 10
	for i, v := range variants(size) {
		t.Run(v.name, func(t *testing.T) {
			c := &crasher{t: t, cs: v.opts.ClusterSize, fix: v.data || v.backing > 0, plain: v.data || v.crypt}
			version := v.opts.Version
			if version == 0 {
				version = 3
			}
			c.noDiscard = version == 2 && v.backing > 0
			for round := range scale(1) {
				c.rng = rand.New(rand.NewPCG(s, uint64(i<<32+round)))
				c.feature(&v, size, version)
			}
			t.Logf("%d states", c.states)
		})
	}
}

func (c *crasher) feature(v *variant, size int64, version int) {
	const room = 2 << 20 // for the image, beside a data file
	var total int64
	if v.data {
		total = room + size
	}
	c.file = imagetest.NewCrash(total, &imagetest.CrashOptions{Fixed: v.data, Discard: imagetest.DiscardGarbage})
	r, _, disk := v.build(c.t, imagetest.NewMemory(0), size, c.rng)
	split := func(d image.Device) *rig {
		r := *r
		r.file = &keep{d}
		if v.data {
			w, err := image.Window(d, 0, room)
			require.NoError(c.t, err)
			data, err := image.Window(d, room, size)
			require.NoError(c.t, err)
			r.file, r.data = &keep{w}, &keep{data}
		}
		return &r
	}
	from, to := r.file, split(c.file)
	// The image as it was made, on the crash device.
	b := make([]byte, from.Size())
	require.NoError(c.t, image.ReadFull(from, b, 0))
	if rs, ok := image.As[image.Resizer](to.file); ok && !v.data {
		require.NoError(c.t, rs.Resize(int64(len(b))))
	}
	_, err := to.file.WriteAt(b, 0)
	require.NoError(c.t, err)
	c.rig = func(d image.Device) (*qcow2.Image, error) { return split(d).tryOpen(qcow2.OpenOptions{}) }
	c.run(to.open(c.t, qcow2.OpenOptions{CacheSize: c.rng.Int64N(2)}), disk, version, 24)
}

// TestFeatureConformance runs the suite over images with each feature.
func TestFeatureConformance(t *testing.T) {
	for _, v := range variants(1 << 20) {
		if v.backing > 0 {
			continue // the suite begins with zeros
		}
		t.Run(v.name, func(t *testing.T) {
			rigs := map[image.Device]*rig{}
			reopen := func(t *testing.T, d image.Device, ro bool) image.Device {
				r := rigs[d]
				require.NoError(t, d.Close())
				im := r.open(t, qcow2.OpenOptions{ReadOnly: ro})
				noErrors(t, im, false)
				rigs[im] = r
				return im
			}
			imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
				r, im, _ := v.build(t, imagetest.NewMemory(0), size, nil)
				rigs[im] = r
				return im
			}, &imagetest.ConformanceOptions{
				Granule:  512,
				Reopen:   func(t *testing.T, d image.Device) image.Device { return reopen(t, d, false) },
				ReadOnly: func(t *testing.T, d image.Device) image.Device { return reopen(t, d, true) },
			})
		})
	}
}

// TestCiphertext: what is in the file is encrypted for its place there.
func TestCiphertext(t *testing.T) {
	v := variant{opts: qcow2.CreateOptions{ClusterSize: 4096}, crypt: true}
	r, im, _ := v.build(t, imagetest.NewMemory(0), 1<<20, nil)
	text := bytes.Repeat([]byte("plain text that must not be seen"), 64)
	_, err := im.WriteAt(text, 8192+100)
	require.NoError(t, err)
	x, err := im.BlockStatus(8192, 4096)
	require.NoError(t, err)
	require.Equal(t, image.Extent{Start: 8192, Length: 4096, Allocated: true, Offset: -1}, x, "the text is nowhere in the file")
	require.NoError(t, im.Close())
	whole := make([]byte, r.file.Size())
	require.NoError(t, image.ReadFull(r.file, whole, 0))
	require.NotContains(t, string(whole), string(text[:32]))
	c := newToyCipher([]byte("the key of a toy"))
	l1 := binary.BigEndian.Uint64(whole[40:])
	l2 := binary.BigEndian.Uint64(whole[l1:]) &^ (1 << 63)
	host := binary.BigEndian.Uint64(whole[l2+2*8:]) &^ (1 << 63)
	at := whole[host:][:4096]
	require.NoError(t, c.Decrypt(at, host/512))
	require.Equal(t, make([]byte, 100), at[:100])
	require.Equal(t, text, at[100:][:len(text)])

	_, err = qcow2.Open(r.file, nil)
	require.ErrorIs(t, err, image.ErrUnsupported)
	info, err := qcow2.Inspect(r.file, "")
	require.NoError(t, err)
	require.Equal(t, "luks", info.Encryption)
}

// TestCiphertextEnds writes what begins and ends within sectors of new clusters
// that are large, with long runs of zeros around it.
func TestCiphertextEnds(t *testing.T) {
	for _, cs := range []int{65536, 1 << 20, 2 << 20} {
		for _, ext := range []bool{false, true} {
			v := variant{opts: qcow2.CreateOptions{ClusterSize: cs, ExtendedL2: ext}, crypt: true}
			for _, at := range [][2]int{{1, 100}, {1_250_083, 2_505_216}, {65_535, 2}, {300_000, 100}, {2<<20 - 100, 200}, {511, 70_000}, {5_000_001, 777}} {
				r, im, _ := v.build(t, imagetest.NewMemory(0), 6<<20, nil)
				want := make([]byte, im.Size())
				p := want[at[0]:][:at[1]]
				fill(p, 7, 1)
				_, err := im.WriteAt(p, int64(at[0]))
				require.NoError(t, err, "%d %t %v", cs, ext, at)
				require.True(t, bytes.Equal(want, contents(t, im)), "%d %t %v", cs, ext, at)
				require.NoError(t, im.Close())
				im = r.open(t, qcow2.OpenOptions{ReadOnly: true})
				require.True(t, bytes.Equal(want, contents(t, im)), "%d %t %v", cs, ext, at)
				noErrors(t, im, false)
			}
		}
	}
}

// TestFeatureQEMU has QEMU make images with each feature, and both write to
// them in turn.
func TestFeatureQEMU(t *testing.T) {
	s := seed(t)
	const size = 2 << 20
	for i, c := range []struct {
		name, opts string
		backing    int
		data       bool
	}{
		{"subclusters", "extended_l2=on,cluster_size=16k", 0, false},
		{"subclusters-64k", "extended_l2=on", 0, false},
		{"subclusters-backing", "extended_l2=on,cluster_size=16k", size - 70_000, false},
		{"backing", "cluster_size=4k", size * 2, false},
		{"backing-v2", "cluster_size=4k,compat=0.10", size / 2, false},
		{"data", "cluster_size=4k", 0, true},
		{"data-raw", "cluster_size=4k,data_file_raw=on", 0, true},
		{"data-subclusters", "cluster_size=64k,extended_l2=on", 0, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(s, uint64(i)))
			dir := tempDir(t)
			path := filepath.Join(dir, "img")
			r := &rig{file: &keep{}}
			want := make([]byte, size)
			if c.backing > 0 {
				b := make([]byte, c.backing)
				for i := range b {
					b[i] = byte(rng.Uint32())
				}
				copy(want, b)
				r.backing = &keep{memory(t, b)}
				dump(t, r.backing, filepath.Join(dir, "base"))
				c.opts += ",backing_file=base,backing_fmt=raw"
			}
			if c.data {
				r.dataPath = filepath.Join(dir, "data")
				c.opts += ",data_file=" + r.dataPath
			}
			qemuCreate(t, path, c.opts, size)
			for range scale(6) {
				var cmds []string
				for range 12 {
					cmds = append(cmds, randomCommand(rng, want, c.name == "backing-v2"))
				}
				qemuIO(t, path, cmds...)
				r.file.Device = load(t, path)
				if c.data {
					r.data = &keep{load(t, r.dataPath)}
				}
				im := r.open(t, qcow2.OpenOptions{})
				noErrors(t, im, false)
				got := contents(t, im)
				require.True(t, bytes.Equal(want, got), "after %q%s", cmds, firstDiff(want, got))
				m := &model{t: t, rng: rng, rig: r, dev: r.file, im: im, disk: want,
					cfg: modelConfig{cs: clusterSize(t, im), version: 3, size: size, max: size}}
				for range 12 {
					switch rng.IntN(4) {
					case 0:
						m.zero()
					case 1:
						if c.name != "backing-v2" {
							m.discard()
						}
					default:
						m.write()
					}
				}
				want = m.disk
				require.NoError(t, im.Close())
				os.Remove(path)
				dump(t, r.file, path)
				if c.data {
					os.Remove(r.dataPath)
					dump(t, r.data, r.dataPath)
				}
				qemuCheck(t, path, false)
				raw := qemuRaw(t, path, "")
				require.True(t, bytes.Equal(want, raw), "QEMU reads%s", firstDiff(want, raw))
			}
		})
	}
}

// randomCommand returns a command for qemu-io, and applies it to disk.
func randomCommand(rng *rand.Rand, disk []byte, noDiscard bool) string {
	off := rng.IntN(len(disk)/512) * 512
	n := min((1+rng.IntN(200))*512, len(disk)-off)
	if rng.IntN(3) == 0 {
		off &^= 65535
		n = min((1+rng.IntN(3))*65536, len(disk)-off)
	}
	b := disk[off:][:n]
	switch k := rng.IntN(6); {
	case k == 0:
		clear(b)
		return fmt.Sprintf("write -z %d %d", off, n)
	case k == 1:
		clear(b)
		return fmt.Sprintf("write -z -u %d %d", off, n)
	case k == 2 && !noDiscard:
		off, b = off&^65535, disk[off&^65535:]
		b = b[:min(65536, len(b))]
		clear(b)
		return fmt.Sprintf("discard %d %d", off, len(b))
	}
	v := byte(1 + rng.IntN(255))
	for i := range b {
		b[i] = v
	}
	return fmt.Sprintf("write -P %d %d %d", v, off, n)
}

func clusterSize(t testing.TB, im *qcow2.Image) int {
	info, err := im.Info()
	require.NoError(t, err)
	return info.ClusterSize
}

// TestCreateFeaturesLikeQEMU compares new images with those that qemu-img makes.
func TestCreateFeaturesLikeQEMU(t *testing.T) {
	const size = 100 << 20
	dir := tempDir(t)
	base := filepath.Join(dir, "base")
	require.NoError(t, os.WriteFile(base, make([]byte, size), 0o600))
	data := filepath.Join(dir, "data")
	for _, c := range []struct {
		opts string
		o    qcow2.CreateOptions
	}{
		{"extended_l2=on", qcow2.CreateOptions{ExtendedL2: true}},
		{"extended_l2=on,cluster_size=16k", qcow2.CreateOptions{ExtendedL2: true, ClusterSize: 16384}},
		{"compression_type=zstd", qcow2.CreateOptions{Compression: "zstd"}},
		{"backing_file=base,backing_fmt=raw", qcow2.CreateOptions{BackingFile: "base", BackingFormat: "raw"}},
		{"backing_file=base,backing_fmt=raw,compat=0.10", qcow2.CreateOptions{BackingFile: "base", BackingFormat: "raw", Version: 2}},
		{"data_file=" + data, qcow2.CreateOptions{DataFile: data, Data: &keep{imagetest.NewMemory(0)}}},
	} {
		path := filepath.Join(dir, "img")
		qemuCreate(t, path, c.opts, size)
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		c.o.Size = size
		im, d := create(t, &c.o)
		require.NoError(t, im.Close())
		got := make([]byte, d.Size())
		require.NoError(t, image.ReadFull(d, got, 0))
		want = append(want, make([]byte, max(0, len(got)-len(want)))...)
		require.True(t, bytes.Equal(want, got), "%s%s", c.opts, firstDiff(want, got))
	}
}

// TestChangeBacking cuts the power at each write of changes of the backing
// file: the header is the old one or the new one.
func TestChangeBacking(t *testing.T) {
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 512}, {ClusterSize: 4096}, {}, {Version: 2}, {ClusterSize: 512, Version: 2},
		{Extensions: []qcow2.Extension{{Type: 0x1234, Data: make([]byte, 3000)}}},
	} {
		file := imagetest.NewCrash(0, nil)
		o.Size, o.BackingFile, o.BackingFormat = 1<<20, "a.raw", "raw"
		im, err := qcow2.Create(&keep{file}, &o)
		require.NoError(t, err)
		base := memory(t, bytes.Repeat([]byte("base"), 1000))
		old := [2]string{"a.raw", "raw"}
		states := 0
		for _, next := range [][2]string{
			{"another-" + strings.Repeat("long-", 40) + ".qcow2", "qcow2"}, {"b", ""}, {"", ""}, {"c.qcow2", "qcow2"},
		} {
			require.NoError(t, im.Sync())
			file.Settle()
			dev := image.Device(&keep{base})
			if next[0] == "" {
				dev = nil
			}
			err := im.ChangeBacking(next[0], next[1], dev)
			require.NoError(t, err)
			info, err := im.Info()
			require.NoError(t, err)
			require.Equal(t, next, [2]string{info.BackingFile, info.BackingFormat})
			for at := range file.Len() + 1 {
				for s := range file.CrashStates(at, &imagetest.StateConfig{Exhaustive: 5, Samples: 5, Seed: uint64(at)}) {
					states++
					info, err := qcow2.Inspect(s.Open(), "")
					require.NoError(t, err, "%v", s)
					got := [2]string{info.BackingFile, info.BackingFormat}
					require.True(t, got == old || got == next, "%q: %v", got, s)
					if at == file.Len() {
						require.Equal(t, next, got)
					}
					for _, x := range o.Extensions {
						require.Contains(t, info.Extensions, x)
					}
				}
			}
			old = next
			if next[0] != "" {
				got := make([]byte, 4000)
				require.NoError(t, image.ReadFull(im, got, 0))
				require.Equal(t, bytes.Repeat([]byte("base"), 1000), got)
			}
		}
		require.NoError(t, im.Close())
		t.Logf("%d states", states)
	}
}

// TestSetExtension cuts the power at each write of changes of an extension:
// the header is the old one or the new one, and all else in it stays.
func TestSetExtension(t *testing.T) {
	const mine = 0x6e767374
	for _, o := range []qcow2.CreateOptions{
		{ClusterSize: 512}, {ClusterSize: 4096}, {}, {Version: 2, ClusterSize: 512}, {BackingFile: "b.raw", BackingFormat: "raw"},
		{Extensions: []qcow2.Extension{{Type: 0x1234, Data: make([]byte, 3000)}}},
		{Extensions: []qcow2.Extension{{Type: mine, Data: []byte("nvstore")}, {Type: 0x1234, Data: []byte{1}}}},
	} {
		file := imagetest.NewCrash(0, nil)
		o.Size = 1 << 20
		im, err := qcow2.Create(&keep{file}, &o)
		require.NoError(t, err)
		get := func(info *qcow2.Info) string {
			require.Equal(t, o.BackingFile, info.BackingFile)
			found := ""
			for _, x := range info.Extensions {
				if x.Type == mine {
					found += string(x.Data) + "."
				}
			}
			for _, x := range o.Extensions {
				if x.Type != mine {
					require.Contains(t, info.Extensions, x)
				}
			}
			return found
		}
		info, err := im.Info()
		require.NoError(t, err)
		old := get(info)
		for _, next := range []string{"machine", "adopting", strings.Repeat("long", 40), "", "short"} {
			file.Settle()
			if next == "" {
				require.NoError(t, im.SetExtension(mine, nil))
			} else {
				require.NoError(t, im.SetExtension(mine, []byte(next)))
				next += "."
			}
			for at := range file.Len() + 1 {
				for s := range file.CrashStates(at, &imagetest.StateConfig{Exhaustive: 5, Samples: 5, Seed: uint64(at)}) {
					info, err := qcow2.Inspect(s.Open(), "")
					require.NoError(t, err, "%v", s)
					got := get(info)
					require.True(t, got == old || got == next, "%q: %v", got, s)
					if at == file.Len() {
						require.Equal(t, next, got)
					}
				}
			}
			old = next
		}
		require.ErrorIs(t, im.SetExtension(0x44415441, nil), image.ErrUnsupported)
		require.ErrorIs(t, im.SetExtension(0, []byte{1}), image.ErrUnsupported)
		err = im.SetExtension(mine, make([]byte, 64<<10))
		require.ErrorIs(t, err, image.ErrNoSpace)
		now, err := im.Info()
		require.NoError(t, err)
		require.Equal(t, old, get(now))
		require.NoError(t, im.Close())
	}
}

// TestDataFileSync: a Sync makes the data file durable, too, and before the
// mapping is.
func TestDataFileSync(t *testing.T) {
	file := &keep{imagetest.NewMemory(0)}
	data := imagetest.NewCrash(1<<20, nil)
	im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: 1 << 20, DataFile: "d", Data: &keep{data}})
	require.NoError(t, err)
	text := []byte("to be durable")
	for _, off := range []int64{100, 200, 300_000} { // with a new mapping, in place, with a new one
		_, err = im.WriteAt(text, off)
		require.NoError(t, err)
		require.NoError(t, im.Sync())
		got := make([]byte, len(text))
		require.NoError(t, image.ReadFull(data.PowerCut(nil), got, off))
		require.Equal(t, text, got)
	}
	require.NoError(t, im.Close())
}
