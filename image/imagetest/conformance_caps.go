package imagetest

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
)

// testReadBatch holds a batch against the same reads one by one. Every Device
// has it, by image.BatcherOf.
func (s *suite) testReadBatch(t *testing.T) {
	d := s.make(t, 3<<20)
	size := d.Size()
	want := pattern(size, 9)
	mustWrite(t, d, want, 0)
	require.NoError(t, image.BatcherOf(d).ReadBatch(nil))
	rng := rand.New(rand.NewPCG(9, 9))
	for round := range 30 {
		reads := make([]image.Request, rng.IntN(100))
		for i := range reads {
			n := [...]int64{0, 1, 511, 512, 4096, 4097, 70_000, 2 << 20}[min(rng.IntN(12), 7)]
			if i%8 != 0 {
				n = min(n, 5000)
			}
			reads[i] = image.Request{P: make([]byte, n), Off: rng.Int64N(size - n + 1), Err: image.ErrNoSpace}
			if rng.IntN(2) == 0 {
				reads[i].Off &^= 511
			}
		}
		require.NoError(t, image.BatcherOf(d).ReadBatch(reads))
		for i, r := range reads {
			require.NoError(t, r.Err)
			mustEqual(t, want[r.Off:r.Off+int64(len(r.P))], r.P, r.Off, "round %d, read %d of %d bytes", round, i, len(r.P))
		}
	}
	// What can't be read leaves the others alone.
	read := func(off, n int64) image.Request { return image.Request{P: make([]byte, n), Off: off} }
	reads := []image.Request{read(0, 512), read(size-100, 512), read(size/2, 4096), read(-1, 10), read(size, 1), read(size-512, 512), read(1<<62, 9)}
	require.ErrorIs(t, image.BatcherOf(d).ReadBatch(reads), io.ErrUnexpectedEOF, "the first error")
	for i, r := range reads {
		switch i {
		case 3:
			require.ErrorIs(t, r.Err, image.ErrOutOfRange)
		case 1, 4, 6:
			require.ErrorIs(t, r.Err, io.ErrUnexpectedEOF, "read %d", i)
		default:
			require.NoError(t, r.Err)
			mustEqual(t, want[r.Off:r.Off+int64(len(r.P))], r.P, r.Off, "read %d beside reads that fail", i)
		}
	}
	mustClose(t, d)
	reads = reads[:1]
	require.ErrorIs(t, image.BatcherOf(d).ReadBatch(reads), image.ErrClosed)
	require.ErrorIs(t, reads[0].Err, image.ErrClosed)
}

// testWriteBatch writes in batches, makes them durable in one with reads, and
// finds what was written.
func (s *suite) testWriteBatch(t *testing.T) {
	d := s.make(t, 3<<20)
	size := d.Size()
	want := make([]byte, size)
	b := image.BatcherOf(d)
	require.NoError(t, b.WriteBatch(nil))
	require.NoError(t, b.SyncBatch(nil))
	rng := rand.New(rand.NewPCG(10, 10))
	for round := range 30 {
		var writes, reads []image.Request
		for off := rng.Int64N(100_000); ; off += rng.Int64N(200_000) {
			n := [...]int64{0, 1, 512, 4096, 4097, 70_000}[rng.IntN(6)]
			if rng.IntN(2) == 0 {
				off = (off + 511) &^ 511
			}
			if off+n > size {
				break
			}
			p := pattern(n, uint64(round+20))
			copy(want[off:], p)
			writes = append(writes, image.Request{P: p, Off: off})
			reads = append(reads, image.Request{P: make([]byte, n), Off: off})
			off += n
		}
		require.NoError(t, b.WriteBatch(writes))
		reads = append(reads, image.Request{P: make([]byte, 10), Off: size - 5})
		require.NoError(t, b.SyncBatch(reads), "what can't be read is no fault of the Sync")
		for i, r := range reads {
			if i == len(reads)-1 {
				require.ErrorIs(t, r.Err, io.ErrUnexpectedEOF)
				continue
			}
			require.NoError(t, r.Err)
			mustEqual(t, want[r.Off:r.Off+int64(len(r.P))], r.P, r.Off, "round %d", round)
		}
	}
	mustEqual(t, want, mustRead(t, d, 0, size), 0, "all of it")
	require.Error(t, b.WriteBatch([]image.Request{{P: make([]byte, 10), Off: size}}))
	mustClose(t, d)
	require.ErrorIs(t, b.WriteBatch([]image.Request{{P: make([]byte, 512)}}), image.ErrClosed)
	require.ErrorIs(t, b.SyncBatch([]image.Request{{P: make([]byte, 512)}}), image.ErrClosed)
}

func (s *suite) testResize(t *testing.T) {
	d := s.make(t, 10_000)
	defer func() { mustClose(t, d) }()
	r, ok := image.As[image.Resizer](d)
	if !ok {
		return
	}
	old := d.Size()
	mustWrite(t, d, pattern(old, 3), 0)
	err := r.Resize(s.round(50_000))
	if unsupported(err) || errors.Is(err, image.ErrNoSpace) {
		require.Equal(t, old, d.Size(), "a Resize that failed")
		mustEqual(t, pattern(old, 3), mustRead(t, d, 0, old), 0, "a Resize that failed")
		return
	}
	require.NoError(t, err)
	size := d.Size()
	require.Equal(t, s.round(50_000), size)
	want := make([]byte, size)
	copy(want, pattern(old, 3))
	mustEqual(t, want, mustRead(t, d, 0, size), 0, "grown")
	mustWrite(t, d, pattern(1000, 4), size-1000)
	copy(want[size-1000:], pattern(1000, 4))

	require.NoError(t, r.Resize(size), "the same size")
	require.Error(t, r.Resize(-1))
	require.Equal(t, size, d.Size())
	mustEqual(t, want, mustRead(t, d, 0, size), 0, "the same size")
	require.NoError(t, d.Sync())
	if s.Reopen != nil {
		d = s.Reopen(t, d)
		r, _ = image.As[image.Resizer](d)
		require.Equal(t, size, d.Size(), "reopened")
		mustEqual(t, want, mustRead(t, d, 0, size), 0, "reopened")
	}

	small := s.round(7_001)
	if err = r.Resize(small); unsupported(err) {
		require.Equal(t, size, d.Size())
		return // a format that only grows
	}
	require.NoError(t, err)
	require.Equal(t, small, d.Size())
	mustEqual(t, want[:small], mustRead(t, d, 0, small), 0, "cut")
	_, err = d.WriteAt([]byte{1}, small)
	require.ErrorIs(t, err, image.ErrOutOfRange, "write past the new size")
	require.NoError(t, r.Resize(size))
	clear(want[small:])
	mustEqual(t, want, mustRead(t, d, 0, size), 0, "cut and grown: what was cut is gone")
	require.NoError(t, r.Resize(0))
	require.Zero(t, d.Size())
	require.NoError(t, r.Resize(size))
	mustEqual(t, make([]byte, size), mustRead(t, d, 0, size), 0, "cut to nothing and grown")
}

func (s *suite) testDiscard(t *testing.T) {
	d := s.make(t, 1<<20)
	defer mustClose(t, d)
	c, ok := image.As[image.Discarder](d)
	if !ok {
		return
	}
	size := d.Size()
	want := pattern(size, 5)
	mustWrite(t, d, want, 0)
	lo, hi := int64(100_001), int64(700_003)
	err := c.Discard(lo, hi-lo)
	if unsupported(err) {
		return
	}
	require.NoError(t, err)
	require.NoError(t, c.Discard(0, 0))
	require.NoError(t, c.Discard(size, 0))
	require.Equal(t, size, d.Size())
	mustEqual(t, want[:lo], mustRead(t, d, 0, lo), 0, "below a discard")
	mustEqual(t, want[hi:], mustRead(t, d, hi, size-hi), hi, "above a discard")
	mustRead(t, d, lo, hi-lo)
	p := pattern(5000, 6)
	mustWrite(t, d, p, 300_001)
	mustEqual(t, p, mustRead(t, d, 300_001, 5000), 300_001, "written after a discard")
	require.NoError(t, c.Discard(0, size))
	require.Equal(t, size, d.Size())
	mustRead(t, d, 0, size)
	mustWrite(t, d, want, 0)
	require.NoError(t, d.Sync())
	mustEqual(t, want, mustRead(t, d, 0, size), 0, "written after a discard of all")
}

func (s *suite) testWriteZeroes(t *testing.T) {
	d := s.make(t, 1<<20+333)
	defer mustClose(t, d)
	z, ok := image.As[image.ZeroWriter](d)
	if !ok {
		return
	}
	size := d.Size()
	want := pattern(size, 7)
	mustWrite(t, d, want, 0)
	require.NoError(t, d.Sync())
	for _, c := range []struct{ off, n int64 }{
		{5, 1}, {511, 2}, {4096, 4096}, {9000, 100_000}, {65536, 65536}, {131071, 262145},
		{0, 0}, {size, 0}, {size - 1000, 1000}, {9000, 100_000}, {0, size},
	} {
		err := z.WriteZeroes(c.off, c.n)
		if unsupported(err) {
			return
		}
		require.NoError(t, err, "zeroes [%d, %d)", c.off, c.off+c.n)
		clear(want[c.off : c.off+c.n])
		mustEqual(t, want, mustRead(t, d, 0, size), 0, "zeroes [%d, %d)", c.off, c.off+c.n)
	}
	mustWrite(t, d, []byte{1}, 70_000)
	want[70_000] = 1
	mustEqual(t, want, mustRead(t, d, 0, size), 0, "a byte in zeroes")
}

func (s *suite) testBlockStatus(t *testing.T) {
	d := s.make(t, 1<<20+100)
	defer mustClose(t, d)
	b, ok := image.As[image.BlockStatuser](d)
	if !ok {
		return
	}
	size := d.Size()
	mustWrite(t, d, pattern(100_000, 8), 300_000)
	mustWrite(t, d, pattern(10, 9), size-10)
	if z, ok := image.As[image.ZeroWriter](d); ok {
		if err := z.WriteZeroes(310_000, 40_000); !unsupported(err) {
			require.NoError(t, err)
		}
	}
	for _, step := range []int64{size, 65536, 7777} {
		for off := int64(0); off < size; {
			n := min(step, size-off)
			e, err := b.BlockStatus(off, n)
			require.NoError(t, err, "status of %d bytes at %d", n, off)
			require.Equal(t, off, e.Start)
			require.GreaterOrEqual(t, e.Length, int64(1), "status of %d bytes at %d", n, off)
			require.LessOrEqual(t, e.Length, n, "status of %d bytes at %d", n, off)
			if e.Zero {
				mustEqual(t, make([]byte, e.Length), mustRead(t, d, off, e.Length), off, "said to be zeros")
			}
			off += e.Length
		}
	}
	for _, c := range []struct{ off, n int64 }{{0, 0}, {size, 0}, {size, 1}, {0, size + 1}, {-1, 1}} {
		_, err := b.BlockStatus(c.off, c.n)
		require.ErrorIs(t, err, image.ErrOutOfRange, "status of %d bytes at %d", c.n, c.off)
	}
}

func (s *suite) testDropCache(t *testing.T) {
	d := s.make(t, 100_000)
	defer mustClose(t, d)
	c, ok := image.As[image.CacheDropper](d)
	if !ok {
		return
	}
	want := pattern(d.Size(), 10)
	mustWrite(t, d, want[:50_000], 0)
	require.NoError(t, d.Sync())
	mustWrite(t, d, want[50_000:], 50_000) // dirty
	if err := c.DropCache(); unsupported(err) {
		return
	} else {
		require.NoError(t, err)
	}
	mustEqual(t, want, mustRead(t, d, 0, d.Size()), 0, "dirty data isn't dropped")
}

func (s *suite) testReopen(t *testing.T) {
	if s.Reopen == nil {
		return
	}
	d := s.make(t, 1<<20)
	want := make([]byte, d.Size())
	for i := range int64(5) {
		p := pattern(20_000, uint64(i)+20)
		mustWrite(t, d, p, i*150_007)
		copy(want[i*150_007:], p)
		if i != 4 {
			require.NoError(t, d.Sync())
		}
		// The last without a Sync: Close implies none, but a clean close
		// isn't a power cut.
		d = s.Reopen(t, d)
		require.EqualValues(t, len(want), d.Size())
		mustEqual(t, want, mustRead(t, d, 0, d.Size()), 0, "reopened, round %d", i)
	}
	mustClose(t, d)
}

func (s *suite) testReadOnly(t *testing.T) {
	if s.ReadOnly == nil {
		return
	}
	d := s.make(t, 20_000)
	want := pattern(d.Size(), 11)
	mustWrite(t, d, want, 0)
	require.NoError(t, d.Sync())
	d = s.ReadOnly(t, d)
	defer mustClose(t, d)
	_, err := d.WriteAt([]byte{1}, 5)
	require.ErrorIs(t, err, image.ErrReadOnly)
	for name, op := range rangeOps(d) {
		if err := op(0, 4096); name != "BlockStatus" && !unsupported(err) {
			require.ErrorIs(t, err, image.ErrReadOnly, name)
		}
	}
	if r, ok := image.As[image.Resizer](d); ok {
		if err := r.Resize(s.round(1000)); !unsupported(err) {
			require.ErrorIs(t, err, image.ErrReadOnly)
		}
	}
	require.NoError(t, d.Sync(), "nothing to do")
	require.True(t, bytes.Equal(want, mustRead(t, d, 0, d.Size())))
}
