package qcow2_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// featureImages returns small images with each feature, and with all kinds of
// clusters.
func featureImages(t testing.TB) [][]byte {
	const size = 256 << 10
	rng := rand.New(rand.NewPCG(3, 4))
	var out [][]byte
	for _, v := range variants(size) {
		r, im, _ := v.build(t, imagetest.NewMemory(0), size, rng)
		cs := int64(v.opts.ClusterSize)
		_, err := im.WriteAt(bytes.Repeat([]byte("data"), 1000), 3*cs+600)
		require.NoError(t, err)
		require.NoError(t, im.WriteZeroes(5*cs, cs))
		if !v.data && !v.crypt {
			_, err = im.WriteCompressed(bytes.Repeat([]byte("text"), int(cs/2)), 6*cs)
			require.NoError(t, err)
		}
		if !v.data {
			require.NoError(t, im.Snapshots().Create("s"))
			_, err = im.WriteAt([]byte("later"), 3*cs+700)
			require.NoError(t, err)
		}
		require.NoError(t, im.Close())
		b := make([]byte, r.file.Size())
		require.NoError(t, image.ReadFull(r.file, b, 0))
		out = append(out, b)
	}
	return out
}

// openAny opens an image with all that it asks for.
func openAny(file image.Device, o qcow2.OpenOptions) (*qcow2.Image, error) {
	info, err := qcow2.Inspect(file, "")
	if err != nil {
		return nil, err
	}
	if info.BackingFile != "" {
		b := imagetest.NewMemory(100_000)
		_, _ = b.WriteAt([]byte("what lies below"), 5000)
		o.Backing = &keep{b}
	}
	for _, f := range info.Features {
		if f.Kind == "incompatible" && f.Bit == 2 {
			o.DataFile = &keep{imagetest.NewCrash(70_000, &imagetest.CrashOptions{MaxSize: 8 << 20})}
		}
	}
	if info.Encryption != "" {
		o.Unlock = func(image.Device, int) (image.SectorCipher, error) { return newToyCipher(make([]byte, 16)), nil }
	}
	return qcow2.Open(&keep{file}, &o)
}

// exerciseFeatures is exercise, with what the features add.
func exerciseFeatures(im *qcow2.Image) {
	exercise(im)
	p := bytes.Repeat([]byte("squeeze"), 1<<19)
	for off := int64(0); off < 1<<20; off += 256 << 10 {
		info, err := im.Info()
		if err != nil {
			return
		}
		cs := int64(info.ClusterSize)
		_, _ = im.WriteCompressed(p[:min(cs, max(0, im.Size()-off))], off)
		_, _ = im.WriteAt(p[:700], off+cs/2)
	}
	_ = im.Preallocate(0, min(im.Size(), 1<<20), qcow2.PreallocMetadata)
	_ = im.ChangeBacking("other", "raw", &keep{imagetest.NewMemory(1000)})
	_, _ = im.WriteAt(p[:5000], 300)
	_ = im.DropCache()
	_, _ = im.ReadAt(p[:100_000], 0)
}

// FuzzFeatures: no image makes the driver panic, take long, or write where its
// own check then finds more errors than before, whatever it consists of.
func FuzzFeatures(f *testing.F) {
	for _, b := range featureImages(f) {
		f.Add(b, uint32(0), uint64(0))
		for _, at := range []uint32{8, 72, 88, 112} {
			f.Add(b, at, uint64(1)<<60)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint32, flip uint64) {
		if len(b) > 1<<20 || len(b) < 8 {
			return
		}
		// A word that isn't in the header is hard to find otherwise.
		b = bytes.Clone(b)
		i := int(at) % (len(b) - 7) &^ 7
		binary.BigEndian.PutUint64(b[i:], binary.BigEndian.Uint64(b[i:])^flip)
		file := imagetest.NewCrash(int64(len(b)), &imagetest.CrashOptions{MaxSize: 8 << 20})
		_, err := file.WriteAt(b, 0)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		im, err := openAny(file, qcow2.OpenOptions{ReadOnly: true})
		if err != nil {
			var fe *image.FormatError
			require.True(t, errors.As(err, &fe), "%v", err)
			return
		}
		before, err := im.Check(ctx, &qcow2.CheckOptions{Data: true, MaxFindings: 10})
		require.NoError(t, err)
		exerciseFeatures(im)
		require.NoError(t, im.Close())
		im, err = openAny(file, qcow2.OpenOptions{InvalidateBitmaps: true})
		if err != nil {
			require.Nil(t, im)
			return
		}
		exerciseFeatures(im)
		_ = im.Close()
		im, err = openAny(file, qcow2.OpenOptions{ReadOnly: true})
		require.NoError(t, err)
		after, err := im.Check(ctx, &qcow2.CheckOptions{MaxFindings: 10})
		require.NoError(t, err)
		if before.Errors == 0 {
			require.Zero(t, after.Errors, "%+v", after.Findings)
		}
	})
}

// TestHostileEntries has one fault each in entries that only some features
// have: they aren't followed, and nothing is written.
func TestHostileEntries(t *testing.T) {
	ext := variant{opts: qcow2.CreateOptions{ClusterSize: 16384, ExtendedL2: true}}
	data := variant{opts: qcow2.CreateOptions{ClusterSize: 16384}, data: true}
	for _, c := range []struct {
		name       string
		v          variant
		word, subs func(uint64) uint64
		readsToo   bool // reading fails as well
	}{
		{"subcluster stored and zero", ext, nil, func(s uint64) uint64 { return s | s<<32 }, true},
		{"subcluster stored without a place", ext, func(uint64) uint64 { return 0 }, nil, true},
		{"the zero flag of plain entries", ext, func(w uint64) uint64 { return w | 1 }, nil, false},
		{"unaligned", ext, func(w uint64) uint64 { return w | 512 }, nil, true},
		{"compressed with subclusters", ext, func(w uint64) uint64 { return 1<<62 | 0x10000 }, nil, false},
		{"compressed in a data file", data, func(w uint64) uint64 { return 1<<62 | 0x10000 }, nil, true},
		{"another offset in a data file", data, func(w uint64) uint64 { return w + 16384 }, nil, true},
		{"shared in a data file", data, func(w uint64) uint64 { return w &^ (1 << 63) }, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, im, _ := c.v.build(t, imagetest.NewMemory(0), 1<<20, nil)
			at := int64(3 * 16384)
			_, err := im.WriteAt(bytes.Repeat([]byte("x"), 16384), at)
			require.NoError(t, err)
			require.NoError(t, im.Close())
			b := make([]byte, r.file.Size())
			require.NoError(t, image.ReadFull(r.file, b, 0))
			be := binary.BigEndian
			l2 := be.Uint64(b[be.Uint64(b[40:]):]) &^ (1 << 63)
			e := l2 + 3*8
			if c.v.opts.ExtendedL2 {
				e = l2 + 3*16
			}
			if c.word != nil {
				be.PutUint64(b[e:], c.word(be.Uint64(b[e:])))
			}
			if c.subs != nil {
				be.PutUint64(b[e+8:], c.subs(be.Uint64(b[e+8:])))
			}
			_, err = r.file.WriteAt(b, 0)
			require.NoError(t, err)
			im = r.open(t, qcow2.OpenOptions{})
			res, err := im.Check(t.Context(), nil)
			require.NoError(t, err)
			require.Positive(t, res.Errors)
			_, err = im.ReadAt(make([]byte, 512), at)
			if c.readsToo {
				require.ErrorIs(t, err, image.ErrCorrupt)
			}
			for name, op := range map[string]func() error{
				"write":   func() error { _, err := im.WriteAt(make([]byte, 1000), at+100); return err },
				"zero":    func() error { return im.WriteZeroes(at, 16384) },
				"discard": func() error { return im.Discard(at, 16384) },
			} {
				err := op()
				require.ErrorIs(t, err, image.ErrCorrupt, name)
				var fe *image.FormatError
				require.ErrorAs(t, err, &fe, name)
				require.Equal(t, int64(e), fe.Off, name)
			}
			require.NoError(t, im.Close())
			got := make([]byte, len(b))
			require.NoError(t, image.ReadFull(r.file, got, 0))
			require.True(t, bytes.Equal(b, got), "the file%s", firstDiff(b, got))
		})
	}
}

// TestHostileCrypt has encryption headers that lie.
func TestHostileCrypt(t *testing.T) {
	v := variant{opts: qcow2.CreateOptions{ClusterSize: 4096}, crypt: true}
	r, im, _ := v.build(t, imagetest.NewMemory(0), 1<<20, nil)
	require.NoError(t, im.Close())
	b := make([]byte, r.file.Size())
	require.NoError(t, image.ReadFull(r.file, b, 0))
	at := bytes.Index(b, []byte{0x05, 0x37, 0xbe, 0x77})
	require.Positive(t, at)
	for i, c := range []struct {
		off  int
		v    uint64
		want string
	}{
		{8, 0, "offset"}, {8, 512, "offset"}, {8, 1 << 60, "offset"}, {8, 1 << 40, "length"},
		{16, 0, "length"}, {16, 1 << 62, "length"}, {16, 1<<64 - 1, "length"}, {16, 64<<20 + 1, "length"},
		{8, 4096, ""}, // on the refcount table, where only writing is dangerous
	} {
		p := bytes.Clone(b)
		binary.BigEndian.PutUint64(p[at+c.off:], c.v)
		for _, ro := range []bool{true, false} {
			called := false
			_, err := qcow2.Open(memory(t, p), &qcow2.OpenOptions{ReadOnly: ro, Unlock: func(h image.Device, _ int) (image.SectorCipher, error) {
				called = true
				return newToyCipher(make([]byte, 16)), nil
			}})
			if ro && c.want == "" {
				require.NoError(t, err)
				continue
			}
			require.ErrorIs(t, err, image.ErrCorrupt, "%d", i)
			require.ErrorContains(t, err, "encryption header pointer."+c.want)
			require.Equal(t, c.want == "", called)
		}
	}
	// A wrong key is the caller's error, and nothing is open then.
	wrong := errors.New("wrong key")
	im, err := qcow2.Open(r.file, &qcow2.OpenOptions{Unlock: func(image.Device, int) (image.SectorCipher, error) { return nil, wrong }})
	require.ErrorIs(t, err, wrong)
	require.Nil(t, im)
	_, err = qcow2.Open(r.file, &qcow2.OpenOptions{Unlock: func(image.Device, int) (image.SectorCipher, error) { return nil, nil }})
	require.ErrorIs(t, err, image.ErrUnsupported)
}

// TestCreateContradiction: a raw data file reads as the disk does, so it can't be
// encrypted.
func TestCreateContradiction(t *testing.T) {
	called := false
	im, err := qcow2.Create(imagetest.NewMemory(0), &qcow2.CreateOptions{Size: 1 << 20, DataFile: "d", Data: imagetest.NewMemory(0), DataFileRaw: true,
		Crypt: &qcow2.Crypt{HeaderSize: 4096, Format: func(image.Device) (image.SectorCipher, error) {
			called = true
			return newToyCipher(make([]byte, 16)), nil
		}}})
	require.Nil(t, im)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	require.ErrorContains(t, err, "DataFileRaw")
	require.False(t, called)
}
