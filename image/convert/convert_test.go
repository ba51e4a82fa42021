package convert_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/convert"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/image/raw"
)

// content makes bytes with runs of data and zeros of all lengths.
func content(rng *rand.Rand, size int64) []byte {
	p := make([]byte, size)
	for off := int64(0); off < size; {
		n := min(int64(1)<<rng.IntN(22)+rng.Int64N(5000), size-off)
		if rng.IntN(2) == 0 {
			for i := range p[off : off+n] {
				p[off+int64(i)] = byte(rng.Uint32())
			}
		}
		off += n
	}
	return p
}

func memory(t *testing.T, p []byte, size int64) image.Device {
	d := imagetest.NewMemory(size)
	for off := 0; off < len(p); off += 4096 { // leaves holes
		if b := p[off:min(off+4096, len(p))]; !bytes.Equal(b, make([]byte, len(b))) {
			_, err := d.WriteAt(b, int64(off))
			require.NoError(t, err)
		}
	}
	return d
}

func qcow(t *testing.T, size int64, o qcow2.CreateOptions) *qcow2.Image {
	o.Size = (size + 511) / 512 * 512
	im, err := qcow2.Create(imagetest.NewMemory(0), &o)
	require.NoError(t, err)
	return im
}

func all(t *testing.T, d image.Device) []byte {
	p := make([]byte, d.Size())
	require.NoError(t, image.ReadFull(d, p, 0))
	return p
}

func TestConvert(t *testing.T) {
	rng := rand.New(rand.NewPCG(imagetest.Seed(t), 0))
	targets := map[string]func(size int64) (image.Device, int64){
		"raw": func(size int64) (image.Device, int64) {
			d, err := raw.Create(filepath.Join(t.TempDir(), "x"), size, nil)
			require.NoError(t, err)
			return d, 0
		},
		"qcow2": func(size int64) (image.Device, int64) {
			return qcow(t, size, qcow2.CreateOptions{}), 64 << 10
		},
		"qcow2-512": func(size int64) (image.Device, int64) {
			return qcow(t, size, qcow2.CreateOptions{ClusterSize: 512}), 512
		},
		"bare": func(size int64) (image.Device, int64) { // without any capability
			return struct{ image.Device }{imagetest.NewMemory(size)}, 0
		},
	}
	for name, target := range targets {
		for _, size := range []int64{0, 1, 4096, 1<<20 - 1, 2<<20 + 777} {
			p := content(rng, size)
			for _, o := range []convert.Options{
				{}, {Workers: 1, OutOfOrder: true}, {Sparse: -1}, {Sparse: 512}, {Sparse: 1 << 20, Workers: 3},
			} {
				if testing.Short() && rng.IntN(3) > 0 {
					continue
				}
				for _, zero := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/%d/%+v/zero=%t", name, size, o, zero), func(t *testing.T) {
						dst, cluster := target(size)
						defer dst.Close()
						o.Cluster, o.TargetZero = cluster, zero
						if !zero {
							_, err := dst.WriteAt(bytes.Repeat([]byte{0xEE}, int(dst.Size())), 0)
							require.NoError(t, err)
						}
						last := int64(0)
						o.Progress = func(done, total int64) {
							require.Equal(t, size, total)
							require.Greater(t, done, last)
							last = done
						}
						require.NoError(t, convert.Convert(t.Context(), dst, memory(t, p, size), &o))
						got := all(t, dst)
						require.True(t, bytes.Equal(p, got[:size]), "content differs")
						require.Equal(t, size, last, "progress ends where the image does")
						diff, err := convert.Compare(t.Context(), memory(t, p, size), sized{dst, size}, nil)
						require.NoError(t, err)
						require.Nil(t, diff)
					})
				}
			}
		}
	}
}

// sized hides what a format rounded the size up to.
type sized struct {
	image.Device
	size int64
}

func (s sized) Size() int64 { return s.size }

func (s sized) ReadAt(p []byte, off int64) (int, error) { return s.Device.ReadAt(p, off) }

// What reads as zeros is neither read nor written to a target of zeros.
func TestConvertSkips(t *testing.T) {
	const size = 64 << 20
	src := imagetest.NewFault(imagetest.NewMemory(size))
	_, err := src.WriteAt([]byte("data"), 20<<20)
	require.NoError(t, err)
	dst := imagetest.NewFault(imagetest.NewMemory(size))
	require.NoError(t, convert.Convert(t.Context(), dst, src, &convert.Options{TargetZero: true}))
	require.LessOrEqual(t, src.Trace().BytesRead, int64(64<<10))
	require.Equal(t, imagetest.Trace{Writes: 1, BytesWritten: 4096}, dst.Trace())

	// And is zeroed in a few requests elsewhere.
	dst = imagetest.NewFault(imagetest.NewMemory(size))
	require.NoError(t, convert.Convert(t.Context(), dst, src, nil))
	tr := dst.Trace()
	require.Equal(t, int64(size-4096), tr.BytesZeroed)
	require.LessOrEqual(t, tr.ZeroWrites, int64(4))
}

// Pieces are written in order, unless that isn't wanted.
func TestConvertOrder(t *testing.T) {
	const size = 6 << 20
	p := make([]byte, size)
	for i := range p {
		p[i] = byte(i>>12) | 1
	}
	src := memory(t, p, size)
	dst := &recorder{Device: imagetest.NewMemory(size)}
	require.NoError(t, convert.Convert(t.Context(), dst, src, nil))
	for i := 1; i < len(dst.at); i++ {
		require.Greater(t, dst.at[i], dst.at[i-1])
	}
	require.Len(t, dst.at, 6)
}

type recorder struct {
	image.Device
	mu sync.Mutex
	at []int64
}

func (r *recorder) WriteAt(p []byte, off int64) (int, error) {
	r.mu.Lock()
	r.at = append(r.at, off)
	r.mu.Unlock()
	return r.Device.WriteAt(p, off)
}

// Each operation of source and target fails once: the error comes out, with
// its place.
func TestConvertFaults(t *testing.T) {
	const size = 4<<20 + 100
	p := content(rand.New(rand.NewPCG(2, 0)), size)
	for _, side := range []string{"source", "target"} {
		n := imagetest.EachFault(imagetest.Fault{Mode: imagetest.Fail}, func(f imagetest.Fault) int {
			src, dst := imagetest.NewFault(memory(t, p, size)), imagetest.NewFault(imagetest.NewMemory(size))
			bad := map[string]*imagetest.FaultDevice{"source": src, "target": dst}
			bad[side] = imagetest.NewFault(map[string]image.Device{"source": src, "target": dst}[side], f)
			if side == "source" {
				src = bad[side]
			} else {
				dst = bad[side]
			}
			err := convert.Convert(t.Context(), dst, src, nil)
			if bad[side].Hits() > 0 {
				require.ErrorIs(t, err, imagetest.ErrInjected)
				require.ErrorContains(t, err, "at byte ")
			} else {
				require.NoError(t, err)
			}
			return bad[side].Hits()
		})
		require.Greater(t, n, 3, side)
	}
}

func TestConvertSalvage(t *testing.T) {
	const size = 3 << 20
	p := bytes.Repeat([]byte{7}, size)
	src := &badBlocks{Device: memory(t, p, size), at: []int64{0, 1<<20 + 512, size - 512}}
	dst := imagetest.NewMemory(size)
	require.ErrorIs(t, convert.Convert(t.Context(), dst, src, nil), errBad)
	var mu sync.Mutex
	var lost []int64
	require.NoError(t, convert.Convert(t.Context(), dst, src, &convert.Options{Salvage: func(off, n int64, err error) {
		mu.Lock()
		defer mu.Unlock()
		require.Equal(t, int64(512), n)
		require.ErrorIs(t, err, errBad)
		lost = append(lost, off)
	}}))
	require.ElementsMatch(t, src.at, lost)
	for _, at := range src.at {
		clear(p[at : at+512])
	}
	require.True(t, bytes.Equal(p, all(t, dst)))
}

var errBad = errors.New("bad block")

type badBlocks struct {
	image.Device
	at []int64
}

func (b *badBlocks) ReadAt(p []byte, off int64) (int, error) {
	for _, at := range b.at {
		if off <= at && at < off+int64(len(p)) {
			return 0, errBad
		}
	}
	return b.Device.ReadAt(p, off)
}

func TestConvertRefuses(t *testing.T) {
	require.ErrorIs(t, convert.Convert(t.Context(), imagetest.NewMemory(10), imagetest.NewMemory(11), nil), image.ErrNoSpace)
	require.ErrorIs(t, convert.Convert(t.Context(), imagetest.NewMemory(10), imagetest.NewMemory(10),
		&convert.Options{Compressed: true}), image.ErrUnsupported)
	require.ErrorIs(t, convert.Convert(t.Context(), imagetest.NewMemory(10), imagetest.NewMemory(10),
		&convert.Options{Cluster: 5000}), image.ErrOutOfRange)
}

// An interrupt ends a conversion, also one that waits for its rate.
func TestConvertInterrupt(t *testing.T) {
	const size = 8 << 20
	p := bytes.Repeat([]byte{7}, size)
	for _, rate := range []int64{0, 1 << 20} {
		ctx, cancel := context.WithCancel(t.Context())
		o := &convert.Options{Rate: rate, Workers: 1, Progress: func(done, total int64) {
			if done >= 1<<20 {
				cancel()
			}
		}}
		dst := imagetest.NewFault(imagetest.NewMemory(size))
		require.ErrorIs(t, convert.Convert(ctx, dst, memory(t, p, size), o), context.Canceled)
		require.Less(t, dst.Trace().BytesWritten, int64(size))
	}
}

func TestConvertRate(t *testing.T) {
	const size = 4 << 20
	p := bytes.Repeat([]byte{7}, size)
	start := time.Now()
	require.NoError(t, convert.Convert(t.Context(), imagetest.NewMemory(size), memory(t, p, size), &convert.Options{Rate: 40 << 20}))
	// The first piece needn't wait. Slower is the machine's business.
	require.Greater(t, time.Since(start), 70*time.Millisecond)
}

func TestCompare(t *testing.T) {
	rng := rand.New(rand.NewPCG(imagetest.Seed(t), 0))
	for i := range imagetest.Scale(15) {
		size := 1 + rng.Int64N(3<<20)
		p := content(rng, size)
		q := bytes.Clone(p)
		want := int64(-1)
		for range rng.IntN(3) {
			at := rng.Int64N(size)
			q[at] ^= 0x80
			if p[at] != q[at] && (want < 0 || at < want) {
				want = at
			}
		}
		if want >= 0 && q[want] == p[want] {
			want = int64(len(p)) // flipped twice
			for at := range p {
				if p[at] != q[at] {
					want = int64(at)
					break
				}
			}
			if want == size {
				want = -1
			}
		}
		longer := rng.Int64N(3) * rng.Int64N(1<<20)
		a, b := memory(t, p, size+longer), memory(t, q, size)
		if rng.IntN(2) == 0 {
			a, b = b, a
		}
		diff, err := convert.Compare(t.Context(), a, b, nil)
		require.NoError(t, err)
		if want < 0 {
			require.Nil(t, diff, "case %d", i)
		} else {
			require.Equal(t, &convert.Difference{Kind: "content", Offset: want}, diff, "case %d", i)
		}
		if longer > 0 {
			diff, err = convert.Compare(t.Context(), a, b, &convert.CompareOptions{Strict: true})
			require.NoError(t, err)
			require.Equal(t, &convert.Difference{Kind: "size", Offset: size}, diff)
		}
	}
}

func TestCompareLonger(t *testing.T) {
	a, b := imagetest.NewMemory(1<<20), imagetest.NewMemory(3<<20)
	_, err := b.WriteAt([]byte{1}, 2<<20+5)
	require.NoError(t, err)
	for _, pair := range [][2]image.Device{{a, b}, {b, a}} {
		diff, err := convert.Compare(t.Context(), pair[0], pair[1], nil)
		require.NoError(t, err)
		require.Equal(t, &convert.Difference{Kind: "content", Offset: 2<<20 + 5}, diff)
	}
}

func TestCompareStrict(t *testing.T) {
	const size = 1 << 20
	a, b := qcow(t, size, qcow2.CreateOptions{}), qcow(t, size, qcow2.CreateOptions{})
	written(t, b, 128<<10)
	require.NoError(t, b.WriteZeroes(128<<10, 64<<10))
	diff, err := convert.Compare(t.Context(), a, b, nil)
	require.NoError(t, err)
	require.Nil(t, diff)
	diff, err = convert.Compare(t.Context(), a, b, &convert.CompareOptions{Strict: true})
	require.NoError(t, err)
	require.Equal(t, &convert.Difference{Kind: "status", Offset: 128 << 10}, diff)
}

// written makes a cluster that a zero flag can be set on.
func written(t *testing.T, d image.Device, off int64) {
	_, err := d.WriteAt(bytes.Repeat([]byte{9}, 64<<10), off)
	require.NoError(t, err)
}

func TestCompareFaults(t *testing.T) {
	const size = 3 << 20
	p := content(rand.New(rand.NewPCG(2, 0)), size)
	imagetest.EachFault(imagetest.Fault{Mode: imagetest.Fail}, func(f imagetest.Fault) int {
		d := imagetest.NewFault(memory(t, p, size), f)
		diff, err := convert.Compare(t.Context(), memory(t, p, size), d, nil)
		require.Nil(t, diff)
		if d.Hits() > 0 {
			require.ErrorIs(t, err, imagetest.ErrInjected)
		} else {
			require.NoError(t, err)
		}
		return d.Hits()
	})
}

func TestMap(t *testing.T) {
	im := qcow(t, 1<<20, qcow2.CreateOptions{})
	_, err := im.WriteAt(bytes.Repeat([]byte{1}, 128<<10), 64<<10)
	require.NoError(t, err)
	written(t, im, 512<<10)
	require.NoError(t, im.WriteZeroes(512<<10, 64<<10))
	var runs []convert.Run
	yield := func(r convert.Run) error { runs = append(runs, r); return nil }
	require.NoError(t, convert.Map(t.Context(), im, []convert.Layer{{Name: "x"}}, 0, 1<<20, yield))
	require.Len(t, runs, 5)
	at := *runs[1].Offset
	require.Equal(t, convert.Run{Start: 64 << 10, Length: 128 << 10, Present: true, Data: true, Offset: &at, Filename: "x"}, runs[1])
	require.Equal(t, convert.Run{Start: 192 << 10, Length: 320 << 10, Zero: true}, runs[2])
	require.NotNil(t, runs[3].Offset, "the cluster is kept")
	runs[3].Offset = nil
	require.Equal(t, convert.Run{Start: 512 << 10, Length: 64 << 10, Zero: true, Present: true, Filename: "x"}, runs[3])

	// Flat layers have all at its own place.
	runs = nil
	require.NoError(t, convert.Map(t.Context(), memory(t, []byte{1}, 1<<20), []convert.Layer{{Flat: true}}, 100, 1<<20-100, yield))
	require.Len(t, runs, 2)
	at = 4096
	require.Equal(t, convert.Run{Start: 4096, Length: 1<<20 - 4096, Present: true, Zero: true, Offset: &at}, runs[1])

	require.ErrorIs(t, convert.Map(t.Context(), im, nil, 1<<20, 1, yield), image.ErrOutOfRange)
	require.ErrorIs(t, convert.Map(t.Context(), im, nil, 0, 1<<20, func(convert.Run) error { return errBad }), errBad)
}
