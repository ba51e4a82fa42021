package qcow2_test

import (
	"bytes"
	"compress/flate"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	limaimage "github.com/lima-vm/go-qcow2reader/image"
	lima "github.com/lima-vm/go-qcow2reader/image/qcow2"
	limaraw "github.com/lima-vm/go-qcow2reader/image/raw"
	limalog "github.com/lima-vm/go-qcow2reader/log"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/image/raw"
)

// diffSteps is how many operations TestDiff does, on all images together.
func diffSteps() int {
	if n, err := strconv.Atoi(os.Getenv("NVSTORE_QCOW2_STEPS")); err == nil {
		return n
	}
	if testing.Short() {
		return 150
	}
	return scale(400)
}

// A diffConfig is one combination of the format's features.
type diffConfig struct {
	cs, version, refBits int
	size                 int64
	zstd, extended, lazy bool
	data, rawData        bool
	backing              int64 // size of the backing file, or 0
	byUs                 bool  // this driver creates the image
	bitmap               bool  // there is one that records writes
	luks                 bool  // encrypted with LUKS
}

func (c diffConfig) String() string {
	return fmt.Sprintf("cluster_size=%d,compat=%d,refcount_bits=%d,size=%d,zstd=%t,extended_l2=%t,lazy=%t,data_file=%t,raw=%t,backing=%d,ours=%t,bitmap=%t,luks=%t",
		c.cs, c.version, c.refBits, c.size, c.zstd, c.extended, c.lazy, c.data, c.rawData, c.backing, c.byUs, c.bitmap, c.luks)
}

// randomDiffConfig picks a combination that both programs can make.
func randomDiffConfig(rng *rand.Rand) diffConfig {
	pick := func(list ...int) int { return list[rng.IntN(len(list))] }
	maybe := func(n int) bool { return rng.IntN(n) == 0 }
	c := diffConfig{cs: pick(512, 1024, 4096, 4096, 16384, 65536, 65536, 2<<20), version: pick(2, 3, 3, 3), refBits: 16}
	c.size = int64(1+rng.IntN(min(60, 4096/(c.cs>>9)+12)))*int64(c.cs) + int64(pick(0, 0, 512, 1536))
	c.size = min(max(c.size, 64<<10), 6<<20)
	c.byUs, c.luks = maybe(3), maybe(5)
	if maybe(3) {
		c.backing = max(512, c.size/int64(c.cs)*int64(c.cs)*int64(1+rng.IntN(4))/3) &^ 511
	}
	if c.version == 2 {
		return c
	}
	c.refBits = pick(16, 16, 8, 32, 64, 1, 2, 4)
	c.zstd, c.lazy, c.bitmap = maybe(3), maybe(4), maybe(3)
	c.extended = c.cs >= 16384 && maybe(2)
	if c.data = maybe(6); c.data {
		c.zstd = false
		if c.rawData = maybe(2); c.rawData {
			// QEMU makes encrypted ones too, in which zeros read as noise.
			c.backing, c.luks = 0, false
		}
	}
	return c
}

// A diff is an image that both programs write in turns, and what must be in it.
type diff struct {
	t     *testing.T
	rng   *rand.Rand
	cfg   diffConfig
	dir   string
	path  string
	below []byte // of the backing file
	disk  []byte
	snaps map[string][]byte
	dirty []bool // granules of the bitmap that must be dirty
	next  int
	steps int
	log   []string
}

// TestDiff makes images with qemu-img or this driver, over all combinations of
// features, and writes to them with qemu-io, qemu-img and this driver in turns.
// At every turn both must read the same bytes, and say the same of the image:
// map, check, info. lima's go-qcow2reader must agree where it can read.
func TestDiff(t *testing.T) {
	s := seed(t)
	limalog.SetWarnFunc(nil)
	lima.SetDecompressor(lima.CompressionTypeZlib, func(r io.Reader) (io.ReadCloser, error) { return whole{flate.NewReader(r)}, nil })
	lima.SetDecompressor(lima.CompressionTypeZstd, func(r io.Reader) (io.ReadCloser, error) {
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return whole{z.IOReadCloser()}, nil
	})
	only, one := os.LookupEnv("NVSTORE_QCOW2_IMAGE")
	done, images := 0, 0
	var d *diff
	i := 0
	t.Cleanup(func() {
		if t.Failed() && d != nil {
			t.Logf("image %d: %s\n%s\nrepeat with: NVSTORE_QCOW2_IMAGE=%d go test -run '^TestDiff$' ./image/qcow2 -seed=%d",
				i, d.cfg, strings.Join(d.log, "\n"), i, s)
		}
	})
	for ; done < diffSteps(); i++ {
		if one {
			i, _ = strconv.Atoi(only)
		}
		d = &diff{t: t, rng: rand.New(rand.NewPCG(s, uint64(i))), snaps: map[string][]byte{}}
		d.cfg = randomDiffConfig(d.rng)
		d.run()
		done += d.steps
		if images++; images%100 == 0 {
			t.Logf("%d steps on %d images", done, images)
		}
		if one {
			break
		}
	}
	t.Logf("%d steps on %d images; go-qcow2reader agrees on %d states, %d of them with a backing file", done, images, limaRead, limaBelow)
}

var limaRead, limaBelow int

// whole reads all that is asked for: go-qcow2reader calls Read once a cluster.
type whole struct{ io.ReadCloser }

func (w whole) Read(p []byte) (int, error) {
	n, err := io.ReadFull(w.ReadCloser, p)
	if n > 0 {
		err = nil
	}
	return n, err
}

func (d *diff) run() {
	dir, err := os.MkdirTemp(filepath.Dir(tempDir(d.t)), "qcow2diff")
	require.NoError(d.t, err)
	defer func() {
		d.keepImage()
		os.RemoveAll(dir)
	}()
	d.dir, d.path = dir, filepath.Join(dir, "img")
	d.create()
	if d.cfg.bitmap {
		d.addBitmap()
	}
	d.compare()
	for range 6 {
		if d.rng.IntN(2) == 0 {
			d.turnQEMU()
		} else {
			d.turnOurs()
		}
		d.compare()
	}
}

func (d *diff) create() {
	c := d.cfg
	d.disk = make([]byte, c.size)
	if c.backing > 0 {
		d.below = make([]byte, c.backing)
		for i := range d.below {
			d.below[i] = byte(i>>9) | 1
		}
		require.NoError(d.t, os.WriteFile(filepath.Join(d.dir, "below"), d.below, 0o600))
		copy(d.disk, d.below)
	}
	if c.byUs {
		d.createOurs()
		return
	}
	o := fmt.Sprintf("cluster_size=%d,compat=%s", c.cs, map[int]string{2: "0.10", 3: "1.1"}[c.version])
	if c.version == 3 {
		o += fmt.Sprintf(",refcount_bits=%d,lazy_refcounts=%t,extended_l2=%t,compression_type=%s", c.refBits, c.lazy, c.extended,
			map[bool]string{false: "zlib", true: "zstd"}[c.zstd])
	}
	if c.data {
		o += fmt.Sprintf(",data_file=%s,data_file_raw=%t", filepath.Join(d.dir, "data"), c.rawData)
	}
	args := []string{"create", "-q", "-f", "qcow2"}
	if c.luks {
		o += ",encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"
		args = append(args, "--object", diffSecret)
	}
	args = append(args, "-o", o)
	if c.backing > 0 {
		args = append(args, "-b", filepath.Join(d.dir, "below"), "-F", "raw")
	}
	args = append(args, d.path, fmt.Sprint(c.size))
	for range 50 {
		// QEMU times the key derivation, and gives up if a busy machine's
		// clock of CPU time stood still meanwhile.
		out, err := exec.Command("qemu-img", args...).CombinedOutput()
		if err == nil {
			return
		}
		require.Contains(d.t, string(out), "Unable to get accurate CPU usage", "%q", args)
	}
	require.Fail(d.t, "qemu-img can't time the key derivation")
}

func (d *diff) createOurs() {
	c := d.cfg
	f, err := raw.Create(d.path, 0, nil)
	require.NoError(d.t, err)
	o := &qcow2.CreateOptions{Size: c.size, ClusterSize: c.cs, Version: c.version, RefcountBits: c.refBits, ExtendedL2: c.extended}
	if c.zstd {
		o.Compression = "zstd"
	}
	if c.backing > 0 {
		o.BackingFile, o.BackingFormat = filepath.Join(d.dir, "below"), "raw"
		o.Backing = d.openRaw("below", true)
	}
	if c.data {
		o.DataFile, o.DataFileRaw = filepath.Join(d.dir, "data"), c.rawData
		data, err := raw.Create(o.DataFile, 0, nil)
		require.NoError(d.t, err)
		o.Data = data
	}
	if c.luks {
		f := &luks.FormatOptions{Version: 1, Passphrase: []byte(diffPass), Iterations: 1000}
		n, err := luks.HeaderSize(f)
		require.NoError(d.t, err)
		o.Crypt = &qcow2.Crypt{HeaderSize: n, Format: func(header image.Device) (image.SectorCipher, error) { return luks.FormatCipher(header, f) }}
	}
	im, err := qcow2.Create(f, o)
	require.NoError(d.t, err)
	if c.lazy {
		require.NoError(d.t, im.Amend(d.t.Context(), &qcow2.AmendOptions{LazyRefcounts: yes()}))
	}
	require.NoError(d.t, im.Close())
}

func (d *diff) openRaw(name string, ro bool) image.Device {
	f, err := raw.Open(filepath.Join(d.dir, name), &raw.Options{ReadOnly: ro})
	require.NoError(d.t, err)
	return f
}

func (d *diff) open(ro bool) *qcow2.Image {
	o := &qcow2.OpenOptions{ReadOnly: ro, Path: d.path}
	if d.cfg.backing > 0 {
		o.Backing = d.openRaw("below", true)
	}
	if d.cfg.data {
		o.DataFile = d.openRaw("data", ro)
	}
	if d.cfg.luks {
		o.Unlock = func(header image.Device, _ int) (image.SectorCipher, error) {
			return luks.OpenCipher(header, &luks.Options{Passphrase: []byte(diffPass)})
		}
	}
	im, err := qcow2.Open(d.openRaw("img", ro), o)
	require.NoError(d.t, err)
	return im
}

// compare has both programs say what they see.
func (d *diff) compare() {
	t := d.t
	im := d.open(true)
	defer im.Close()
	require.Equal(t, int64(len(d.disk)), im.Size())
	got := contents(t, im)
	require.True(t, bytes.Equal(d.disk, got), "this driver reads other bytes%s", firstDiff(d.disk, got))
	theirs := d.qemuRaw("")
	require.True(t, bytes.Equal(d.disk, theirs), "qemu-img reads other bytes%s", firstDiff(d.disk, theirs))
	if len(d.snaps) > 0 {
		for name, want := range d.snaps { // one of them
			got := d.qemuRaw("snapshot.name=" + name)
			n := min(len(want), len(got))
			require.True(t, bytes.Equal(want[:n], got[:n]), "snapshot %s%s", name, firstDiff(want, got))
			break
		}
	}
	require.Equal(t, d.mapQEMU(), d.mapOurs(im), "map")
	d.compareCheck(im)
	d.compareInfo(im)
	d.compareBitmap(im)
	d.compareLima()
}

// The passphrase of encrypted images.
const (
	diffPass   = "a passphrase"
	diffSecret = "secret,id=key,data=" + diffPass
)

// target names the image to QEMU's programs.
func (d *diff) target() []string {
	opts := "driver=qcow2,file.filename=" + d.path
	if d.cfg.luks {
		return []string{"--object", diffSecret, "--image-opts", opts + ",encrypt.format=luks,encrypt.key-secret=key"}
	}
	return []string{"--image-opts", opts}
}

// qemuRaw returns the content of the image, or of a snapshot, as qemu-img reads
// it.
func (d *diff) qemuRaw(snapshot string) []byte {
	return qemuRead(d.t, d.target(), snapshot)
}

const diffGranule = 4096

func (d *diff) addBitmap() {
	d.dirty = make([]bool, (len(d.disk)+diffGranule-1)/diffGranule)
	if d.rng.IntN(2) == 0 {
		tool(d.t, "qemu-img", slices.Concat([]string{"bitmap", "--add", "-g", fmt.Sprint(diffGranule)}, d.target(), []string{"b"})...)
		return
	}
	im := d.open(false)
	require.NoError(d.t, im.AddBitmap("b", &qcow2.BitmapOptions{Granularity: diffGranule}))
	require.NoError(d.t, im.Close())
}

// written notes what the bitmap must have dirty.
func (d *diff) written(off, n int64) {
	if d.cfg.bitmap {
		mark(d.dirty, diffGranule, off, n)
	}
}

func (d *diff) compareBitmap(im *qcow2.Image) {
	if !d.cfg.bitmap {
		return
	}
	got := dirtyOf(d.t, im, "b", diffGranule)
	require.Len(d.t, got, len(d.dirty))
	require.Equal(d.t, qemuDirty(d.t, d.target(), "b", diffGranule, im.Size()), got, "the bitmap, as qemu-nbd has it")
	for g, must := range d.dirty {
		require.True(d.t, got[g] || !must, "granule %d was written, and the bitmap doesn't say so", g)
	}
}

// A run is a line of qemu-img map.
type run struct {
	Start   int64  `json:"start"`
	Length  int64  `json:"length"`
	Depth   int    `json:"depth"`
	Present bool   `json:"present"`
	Zero    bool   `json:"zero"`
	Data    bool   `json:"data"`
	Offset  *int64 `json:"offset"`
}

func (d *diff) mapQEMU() []run {
	var list []run
	require.NoError(d.t, json.Unmarshal([]byte(tool(d.t, "qemu-img", append([]string{"map", "--output=json"}, d.target()...)...)), &list))
	return d.join(list)
}

func (d *diff) mapOurs(im *qcow2.Image) []run {
	var list []run
	for off := int64(0); off < im.Size(); {
		x, err := im.BlockStatus(off, im.Size()-off)
		require.NoError(d.t, err)
		r := run{Start: off, Length: x.Length, Depth: x.Depth, Present: x.Allocated, Zero: x.Zero, Data: x.Allocated && !x.Zero}
		if r.Data && x.Offset >= 0 {
			r.Offset = &x.Offset
		}
		list = append(list, r)
		off += x.Length
	}
	return d.join(list)
}

// join merges runs that go on. What is behind the end of the backing file, this
// driver takes for its, as QEMU's block layer does, and qemu-img map doesn't.
func (d *diff) join(list []run) (out []run) {
	for _, r := range list {
		if r.Zero && r.Depth > 0 && r.Start >= int64(len(d.below)) {
			r.Depth, r.Present = 0, false
		}
		if r.Data {
			r.Zero = false // it is a hole of the file
		}
		if r.Zero {
			r.Offset = nil // of a zero cluster that keeps its place
		}
		if k := len(out); k > 0 {
			l := &out[k-1]
			if l.Depth == r.Depth && l.Present == r.Present && l.Zero == r.Zero && l.Data == r.Data &&
				(l.Offset == nil) == (r.Offset == nil) && (r.Offset == nil || *l.Offset+l.Length == *r.Offset) {
				l.Length += r.Length
				continue
			}
		}
		out = append(out, r)
	}
	return out
}

func (d *diff) compareCheck(im *qcow2.Image) {
	t := d.t
	out, err := exec.Command("qemu-img", append([]string{"check", "--output=json"}, d.target()...)...).Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	var theirs, ours map[string]any
	require.NoError(t, json.Unmarshal(out, &theirs), "%s", out)
	r, err := im.Check(t.Context(), &qcow2.CheckOptions{Data: true})
	require.NoError(t, err)
	require.Zero(t, r.Errors+r.Leaks, "%+v", r.Findings)
	b, err := json.Marshal(r)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(b, &ours))
	delete(theirs, "filename")
	delete(theirs, "format")
	require.Equal(t, theirs, ours, "check")
}

func (d *diff) compareInfo(im *qcow2.Image) {
	t := d.t
	theirs := qemuInfo(t, d.path)
	info, err := im.Info()
	require.NoError(t, err)
	data := theirs["format-specific"].(map[string]any)["data"].(map[string]any)
	require.EqualValues(t, theirs["virtual-size"], info.VirtualSize)
	require.EqualValues(t, theirs["cluster-size"], info.ClusterSize)
	require.Equal(t, data["compat"], map[int]string{2: "0.10", 3: "1.1"}[info.Version])
	require.EqualValues(t, data["refcount-bits"], info.RefcountBits)
	require.Equal(t, data["compression-type"], map[string]string{"deflate": "zlib", "zstd": "zstd"}[info.Compression])
	var names []any
	if list, ok := theirs["snapshots"].([]any); ok {
		for _, s := range list {
			s := s.(map[string]any)
			names = append(names, s["id"], s["name"], s["vm-state-size"], s["date-sec"], s["date-nsec"])
		}
	}
	var mine []any
	for _, s := range info.Snapshots {
		mine = append(mine, s.ID, s.Name, float64(s.VMStateSize), float64(s.Seconds), float64(s.Nanoseconds))
	}
	require.Equal(t, names, mine, "info: snapshots")
	require.Equal(t, data["bitmaps"], d.bitmapsOurs(im), "info: bitmaps")
	crypt, _ := data["encrypt"].(map[string]any)
	require.Equal(t, d.cfg.luks, crypt["format"] == "luks")
	require.Equal(t, d.cfg.luks, info.Encryption == "luks")
}

// bitmapsOurs is what info says of bitmaps, or nil.
func (d *diff) bitmapsOurs(im *qcow2.Image) any {
	list, err := im.Bitmaps()
	require.NoError(d.t, err)
	var out []any
	for _, b := range list {
		flags := []any{}
		for _, f := range b.Flags {
			flags = append(flags, f)
		}
		out = append(out, map[string]any{"name": b.Name, "granularity": float64(b.Granularity), "flags": flags})
	}
	if out == nil {
		return nil
	}
	return out
}

// compareLima reads with lima's go-qcow2reader, where it can: it knows neither
// data files nor encryption.
func (d *diff) compareLima() {
	f, err := os.Open(d.path)
	require.NoError(d.t, err)
	defer f.Close()
	q, err := lima.Open(f, func(below io.ReaderAt, typ limaimage.Type) (limaimage.Image, error) {
		if typ != limaraw.Type {
			return nil, errors.New("no other file than that below")
		}
		return limaraw.Open(below)
	})
	if err == nil {
		err = q.Readable()
	}
	if err != nil {
		require.True(d.t, d.cfg.data || d.cfg.luks, "go-qcow2reader: %v", err)
		return
	}
	defer q.Close()
	b := make([]byte, len(d.disk))
	_, err = io.ReadFull(io.NewSectionReader(q, 0, int64(len(b))), b)
	require.NoError(d.t, err, "go-qcow2reader")
	require.True(d.t, bytes.Equal(d.disk, b), "go-qcow2reader reads other bytes%s", firstDiff(d.disk, b))
	limaRead++
	if d.cfg.backing > 0 {
		limaBelow++
	}
}
