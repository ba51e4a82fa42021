package imagetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
)

// ConformanceOptions say what to leave out. Nil means the zero value: a Device
// of any size, that reads as zeros when new.
type ConformanceOptions struct {
	// Granule: sizes are multiples of this many bytes; 0 means 1.
	Granule int64

	// Garbage: a new Device's content is undefined.
	Garbage bool

	// Reopen closes d and opens what it stored again. Nil leaves the tests
	// of persistence out.
	Reopen func(t *testing.T, d image.Device) image.Device

	// ReadOnly closes d and opens what it stored for reading. Nil leaves
	// the tests of that out.
	ReadOnly func(t *testing.T, d image.Device) image.Device
}

// A suite is what the parts of Conformance share.
type suite struct {
	ConformanceOptions
	factory func(t *testing.T, size int64) image.Device
}

// Conformance holds a Device against the contract in package image. factory
// returns a new, writable one of the given size, a few MiB at most; the suite
// closes it. Capabilities are tested if image.As finds them, and may answer
// image.ErrUnsupported (Resize also image.ErrNoSpace).
func Conformance(t *testing.T, factory func(t *testing.T, size int64) image.Device, o *ConformanceOptions) {
	s := &suite{factory: factory}
	if o != nil {
		s.ConformanceOptions = *o
	}
	if s.Granule == 0 {
		s.Granule = 1
	}
	t.Run("Size", s.testSize)
	t.Run("Bounds", s.testBounds)
	t.Run("EOF", s.testEOF)
	t.Run("NewReadsZeros", s.testNew)
	t.Run("Boundaries", s.testBoundaries)
	t.Run("RandomOps", s.testRandomOps)
	t.Run("ReadBatch", s.testReadBatch)
	t.Run("WriteBatch", s.testWriteBatch)
	t.Run("Concurrency", s.testConcurrency)
	t.Run("Resize", s.testResize)
	t.Run("Discard", s.testDiscard)
	t.Run("WriteZeroes", s.testWriteZeroes)
	t.Run("BlockStatus", s.testBlockStatus)
	t.Run("DropCache", s.testDropCache)
	t.Run("Reopen", s.testReopen)
	t.Run("ReadOnly", s.testReadOnly)
	t.Run("Closed", s.testClosed)
	t.Run("CloseWhileBusy", s.testCloseWhileBusy)
}

// round rounds a size up to what the Device has.
func (s *suite) round(n int64) int64 { return (n + s.Granule - 1) / s.Granule * s.Granule }

// make returns a Device of n bytes, rounded up, that reads as zeros.
func (s *suite) make(t *testing.T, n int64) image.Device {
	t.Helper()
	n = s.round(n)
	d := s.factory(t, n)
	require.NotNil(t, d)
	require.Equal(t, n, d.Size(), "size of a new Device")
	if s.Garbage {
		mustWrite(t, d, make([]byte, n), 0)
	}
	return d
}

func mustWrite(t *testing.T, d image.Device, p []byte, off int64) {
	t.Helper()
	n, err := d.WriteAt(p, off)
	require.NoError(t, err, "write of %d bytes at %d", len(p), off)
	require.Equal(t, len(p), n)
}

func mustRead(t *testing.T, d image.Device, off, n int64) []byte {
	t.Helper()
	p := bytes.Repeat([]byte{0xCC}, int(n))
	require.NoError(t, image.ReadFull(d, p, off), "read of %d bytes at %d", n, off)
	return p
}

func mustEqual(t *testing.T, want, got []byte, at int64, msg string, args ...any) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	i := 0
	for i < len(want) && i < len(got) && want[i] == got[i] {
		i++
	}
	require.Fail(t, fmt.Sprintf("bytes differ from %d on: %s", at+int64(i), fmt.Sprintf(msg, args...)))
}

func mustClose(t *testing.T, d image.Device) {
	t.Helper()
	require.NoError(t, d.Close())
}

// pattern is n bytes that differ by place and by tag.
func pattern(n int64, tag uint64) []byte {
	p := make([]byte, n)
	var key [32]byte
	for i := range 8 {
		key[i] = byte(tag >> (8 * i))
	}
	_, _ = rand.NewChaCha8(key).Read(p)
	return p
}

// unsupported tells whether a capability that is there says that it isn't.
func unsupported(err error) bool { return errors.Is(err, image.ErrUnsupported) }

func (s *suite) testSize(t *testing.T) {
	for _, n := range []int64{0, 1, 511, 512, 4096, 4097, 65536, 1 << 20, 3<<20 + 17} {
		d := s.make(t, n)
		require.Equal(t, s.round(n), d.Size())
		mustEqual(t, make([]byte, d.Size()), mustRead(t, d, 0, d.Size()), 0, "size %d", n)
		mustClose(t, d)
	}
}

func (s *suite) testBounds(t *testing.T) {
	d := s.make(t, 10000)
	defer mustClose(t, d)
	size := d.Size()
	mustWrite(t, d, pattern(size, 1), 0)
	big := make([]byte, 2*size)
	for _, c := range []struct{ off, n int64 }{
		{-1, 1}, {-1, 0}, {-512, 1024}, {-1 << 62, 10}, {-1 << 63, 10}, {-1 << 63, 0},
		{size, 1}, {size - 1, 2}, {0, size + 1}, {size + 1, 0}, {size + 1, 1},
		{1 << 62, 1}, {1<<63 - 1, 1}, {1<<63 - 1, 0}, {1<<63 - 512, 1024},
	} {
		n, err := d.WriteAt(big[:c.n], c.off)
		require.ErrorIs(t, err, image.ErrOutOfRange, "write of %d bytes at %d", c.n, c.off)
		require.Zero(t, n)
		if c.off < 0 {
			n, err = d.ReadAt(big[:c.n], c.off)
			require.ErrorIs(t, err, image.ErrOutOfRange, "read of %d bytes at %d", c.n, c.off)
			require.Zero(t, n)
		}
		for name, op := range rangeOps(d) {
			mustBeOutside(t, op(c.off, c.n), "%s of %d bytes at %d", name, c.n, c.off)
		}
	}
	for name, op := range rangeOps(d) {
		mustBeOutside(t, op(0, -1), "%s of -1 bytes", name)
		mustBeOutside(t, op(size, -size), "%s backwards", name)
	}
	require.Equal(t, size, d.Size())
	mustEqual(t, pattern(size, 1), mustRead(t, d, 0, size), 0, "after refused writes")

	for _, off := range []int64{0, 1, size / 2, size} {
		n, err := d.WriteAt(nil, off)
		require.NoError(t, err, "write of no bytes at %d of %d", off, size)
		require.Zero(t, n)
		n, err = d.ReadAt(nil, off)
		require.NoError(t, err, "read of no bytes at %d of %d", off, size)
		require.Zero(t, n)
	}
	mustEqual(t, pattern(size, 1), mustRead(t, d, 0, size), 0, "after empty writes")
}

func mustBeOutside(t *testing.T, err error, msg string, args ...any) {
	t.Helper()
	if !unsupported(err) {
		require.ErrorIs(t, err, image.ErrOutOfRange, append([]any{msg}, args...)...)
	}
}

// rangeOps returns the capabilities of d that take a range.
func rangeOps(d image.Device) map[string]func(off, n int64) error {
	ops := map[string]func(off, n int64) error{}
	if c, ok := image.As[image.Discarder](d); ok {
		ops["Discard"] = c.Discard
	}
	if c, ok := image.As[image.ZeroWriter](d); ok {
		ops["WriteZeroes"] = c.WriteZeroes
	}
	if c, ok := image.As[image.BlockStatuser](d); ok {
		ops["BlockStatus"] = func(off, n int64) error {
			_, err := c.BlockStatus(off, n)
			return err
		}
	}
	return ops
}

func (s *suite) testEOF(t *testing.T) {
	d := s.make(t, 5000)
	defer mustClose(t, d)
	size := d.Size()
	want := pattern(size, 2)
	mustWrite(t, d, want, 0)
	for _, c := range []struct{ off, n, got int64 }{
		{0, size, size}, {size - 1, 1, 1}, {0, size + 1, size}, {size - 1, 2, 1},
		{size - 700, 5000, 700}, {size, 1, 0}, {size + 1, 1, 0}, {1 << 62, 10, 0}, {1<<63 - 1, 10, 0},
	} {
		p := bytes.Repeat([]byte{0xCC}, int(c.n))
		n, err := d.ReadAt(p, c.off)
		require.EqualValues(t, c.got, n, "read of %d bytes at %d of %d", c.n, c.off, size)
		switch {
		case c.got < c.n:
			require.Equal(t, io.EOF, err, "read of %d bytes at %d of %d", c.n, c.off, size)
		case err != io.EOF: // allowed where the range ends at Size
			require.NoError(t, err)
		}
		if n > 0 {
			mustEqual(t, want[c.off:c.off+c.got], p[:n], c.off, "near the end")
		}
	}
	_, err := io.ReadAll(io.NewSectionReader(d, 0, size+10))
	require.NoError(t, err)
}

func (s *suite) testNew(t *testing.T) {
	if s.Garbage {
		return
	}
	d := s.make(t, 3<<20+100)
	defer mustClose(t, d)
	mustEqual(t, make([]byte, d.Size()), mustRead(t, d, 0, d.Size()), 0, "a new Device")
	mustWrite(t, d, []byte{1}, 1<<20+77)
	want := make([]byte, d.Size())
	want[1<<20+77] = 1
	mustEqual(t, want, mustRead(t, d, 0, d.Size()), 0, "one byte in a hole")
}

// testBoundaries writes ranges that begin and end around the units that media
// write at once.
func (s *suite) testBoundaries(t *testing.T) {
	const size = 200 << 10
	d := s.make(t, size)
	defer mustClose(t, d)
	model := make([]byte, d.Size())
	var edges []int64
	for _, at := range []int64{0, 512, 4096, 65536, 131072} {
		for _, by := range []int64{-1, 0, 1, 13} {
			if at+by >= 0 {
				edges = append(edges, at+by)
			}
		}
	}
	tag := uint64(100)
	for _, lo := range edges {
		for _, hi := range edges {
			if lo >= hi {
				continue
			}
			p := pattern(hi-lo, tag)
			tag++
			mustWrite(t, d, p, lo)
			copy(model[lo:], p)
			from, to := max(lo-600, 0), min(hi+600, size)
			mustEqual(t, model[from:to], mustRead(t, d, from, to-from), from, "write of [%d, %d)", lo, hi)
		}
	}
	mustEqual(t, model, mustRead(t, d, 0, d.Size()), 0, "after all writes")
}
