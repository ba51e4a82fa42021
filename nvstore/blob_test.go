package nvstore_test

import (
	"bytes"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

func testBlob(t *testing.T, p *place) {
	s := p.create(t, nil)
	_, err := s.Blob("i2c/8-0050/eeprom", nil)
	require.ErrorIs(t, err, nvstore.ErrNotFound)
	b, err := s.Blob("i2c/8-0050/eeprom", &nvstore.Meta{Type: "24c02", Writer: "test"})
	require.NoError(t, err)
	require.Equal(t, "i2c/8-0050/eeprom", b.Name())
	require.Zero(t, b.Size())
	e, err := s.Stat("i2c/8-0050/eeprom")
	require.NoError(t, err, "made at once")
	require.Equal(t, "24c02", e.Type)

	n, err := b.WriteAt([]byte("hello"), 10)
	require.NoError(t, err)
	require.Equal(t, 5, n)
	require.EqualValues(t, 15, b.Size())
	got := make([]byte, 20)
	n, err = b.ReadAt(got, 0)
	require.Equal(t, io.EOF, err)
	require.Equal(t, "\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00hello", string(got[:n]))
	get(t, s, "i2c/8-0050/eeprom", []byte{})
	require.NoError(t, b.Sync())
	get(t, s, "i2c/8-0050/eeprom", []byte("\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00hello"))

	// The edges.
	n, err = b.ReadAt(nil, 0)
	require.NoError(t, err)
	require.Zero(t, n)
	_, err = b.ReadAt(got, 15)
	require.Equal(t, io.EOF, err)
	n, err = b.ReadAt(got, 1<<50)
	require.Equal(t, io.EOF, err)
	require.Zero(t, n)
	n, err = b.WriteAt(nil, 1<<30)
	require.NoError(t, err)
	require.Zero(t, n)
	require.EqualValues(t, 15, b.Size())
	_, err = b.ReadAt(got, -1)
	require.ErrorIs(t, err, nvstore.ErrInvalid)
	_, err = b.WriteAt(got, -1)
	require.ErrorIs(t, err, nvstore.ErrInvalid)
	_, err = b.WriteAt(got, blobdir.MaxBlobSize-19)
	require.ErrorIs(t, err, nvstore.ErrInvalid)
	_, err = b.WriteAt(got, 1<<63-1)
	require.ErrorIs(t, err, nvstore.ErrInvalid)
	require.ErrorIs(t, b.Truncate(-1), nvstore.ErrInvalid)
	require.ErrorIs(t, b.Truncate(blobdir.MaxBlobSize+1), nvstore.ErrInvalid)

	// A hole costs nothing.
	require.NoError(t, b.Truncate(1<<40))
	require.NoError(t, b.Sync())
	n, err = b.ReadAt(got, 1<<40-10)
	require.Equal(t, io.EOF, err)
	require.Equal(t, make([]byte, 10), got[:n])
	require.NoError(t, b.Truncate(12))
	_, err = b.WriteAt([]byte("closing syncs"), 0)
	require.NoError(t, err)
	require.NoError(t, b.Close())
	require.ErrorIs(t, b.Close(), nvstore.ErrClosed)
	_, err = b.ReadAt(got, 0)
	require.ErrorIs(t, err, nvstore.ErrClosed)
	_, err = b.WriteAt(got, 0)
	require.ErrorIs(t, err, nvstore.ErrClosed)
	require.ErrorIs(t, b.Truncate(0), nvstore.ErrClosed)
	require.ErrorIs(t, b.Sync(), nvstore.ErrClosed)
	s = p.reopen(t, s)
	get(t, s, "i2c/8-0050/eeprom", []byte("closing syncs"))

	// Deleted under it: nothing is made anew.
	b, err = s.Blob("i2c/8-0050/eeprom", &nvstore.Meta{})
	require.NoError(t, err)
	require.NoError(t, s.Delete("i2c/8-0050/eeprom"))
	_, err = b.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, nvstore.ErrNotFound)
	require.NoError(t, b.Truncate(0))
	require.ErrorIs(t, b.Sync(), nvstore.ErrNotFound)
	require.ErrorIs(t, b.Close(), nvstore.ErrNotFound)
	absent(t, s, "i2c/8-0050/eeprom")
}

// testBlobModel compares a Blob with a slice of bytes, and what is stored with
// what the slice was at the last Sync.
func testBlobModel(t *testing.T, p *place) {
	rng := newRand(t)
	s := p.create(t, nil)
	open := func() *nvstore.Blob {
		b, err := s.Blob("x", &nvstore.Meta{})
		require.NoError(t, err)
		return b
	}
	b := open()
	var mem, synced []byte
	for range imagetest.Scale(300) {
		switch op := rng.IntN(40); {
		case op < 14:
			mem = modelWrite(t, b, mem, rng)
		case op < 24:
			modelRead(t, b, mem, rng)
		case op < 33:
			size := randSize(rng)
			require.NoError(t, b.Truncate(int64(size)))
			next := make([]byte, size)
			copy(next, mem)
			mem = next
		case op < 38:
			require.NoError(t, b.Sync())
			synced = bytes.Clone(mem)
		case op == 38:
			require.NoError(t, b.Close())
			synced = bytes.Clone(mem)
			if rng.IntN(3) == 0 {
				s = p.reopen(t, s)
			}
			b = open()
		case op == 39: // it gives up what it didn't sync
			s = p.reopen(t, s)
			b, mem = open(), bytes.Clone(synced)
		}
		require.EqualValues(t, len(mem), b.Size())
		get(t, s, "x", append([]byte{}, synced...))
	}
	got := make([]byte, len(mem))
	n, err := b.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, mem, got[:n])
}

// randSize is small often, and near the edges of pages and chunks.
func randSize(rng *rand.Rand) int {
	n := rng.IntN(1 << (1 + rng.IntN(17)))
	if rng.IntN(3) == 0 {
		n = max(0, n&^4095+rng.IntN(3)-1)
	}
	return n
}

func modelWrite(t *testing.T, b *nvstore.Blob, mem []byte, rng *rand.Rand) []byte {
	p := make([]byte, 1+rng.IntN(1<<rng.IntN(15)))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	off := randSize(rng)
	n, err := b.WriteAt(p, int64(off))
	require.NoError(t, err)
	require.Equal(t, len(p), n)
	next := make([]byte, max(len(mem), off+len(p)))
	copy(next, mem)
	copy(next[off:], p)
	return next
}

func modelRead(t *testing.T, b *nvstore.Blob, mem []byte, rng *rand.Rand) {
	p := bytes.Repeat([]byte{0xee}, randSize(rng))
	off := randSize(rng)
	n, err := b.ReadAt(p, int64(off))
	want := mem[min(off, len(mem)):]
	want = want[:min(len(p), len(want))]
	require.Equal(t, len(want), n)
	if n < len(p) {
		require.Equal(t, io.EOF, err)
	} else {
		require.NoError(t, err)
	}
	require.True(t, bytes.Equal(want, p[:n]), "%d bytes at %d", n, off)
}

// testBlobBig writes more than is kept in memory.
func testBlobBig(t *testing.T, p *place) {
	s := p.create(t, nil)
	b, err := s.Blob("x", &nvstore.Meta{})
	require.NoError(t, err)
	gen := generation(t, s)
	want := fill(5<<20+123, "big")
	_, err = b.WriteAt(want, 0)
	require.NoError(t, err)
	require.Equal(t, gen+1, generation(t, s), "4 MiB went by themselves")
	got := make([]byte, len(want))
	_, err = b.ReadAt(got, 0)
	require.NoError(t, err)
	require.True(t, bytes.Equal(want, got))
	require.NoError(t, b.Close())
	require.Equal(t, gen+2, generation(t, s))
	get(t, s, "x", want)
}
