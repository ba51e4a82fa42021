package eeprom_test

import (
	"bytes"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/i2c"
	"nvstore.dev/eeprom/microwire"
	"nvstore.dev/eeprom/spi"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// store makes a store in memory, sealed.
func store(t testing.TB) (*nvstore.Store, *imagetest.CrashDevice) {
	d := imagetest.NewCrash(2<<20, nil)
	key, err := keyslot.RawKey(bytes.Repeat([]byte{1}, 32))
	require.NoError(t, err)
	s, err := nvstore.CreateDevice(d, &nvstore.CreateOptions{Key: key, Idle: -1})
	require.NoError(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s, d
}

func open(t testing.TB, s *nvstore.Store, name string, size int64) *eeprom.Blob {
	b, err := eeprom.Open(s, name, size, nil)
	require.NoError(t, err)
	return b
}

func TestOpen(t *testing.T) {
	s, _ := store(t)
	b, err := eeprom.Open(s, "i2c/8-0050/eeprom", 256, &nvstore.Meta{Type: "fru", Writer: "test"})
	require.NoError(t, err)
	require.Equal(t, "i2c/8-0050/eeprom", b.Name())
	require.Equal(t, int64(256), b.Size())
	got, err := s.Get(b.Name())
	require.NoError(t, err)
	require.Equal(t, bytes.Repeat([]byte{0xff}, 256), got)

	// What is there stays, and so does what is said of it.
	require.NoError(t, b.Commit([]byte{1, 2}, 254, b.Epoch()))
	b, err = eeprom.Open(s, b.Name(), 256, &nvstore.Meta{Type: "other"})
	require.NoError(t, err)
	p := make([]byte, 2)
	_, err = b.ReadAt(p, 254)
	require.NoError(t, err)
	require.Equal(t, []byte{1, 2}, p)
	e, err := s.Stat(b.Name())
	require.NoError(t, err)
	require.Equal(t, "fru", e.Type)
	require.Equal(t, "test", e.Writer)

	_, err = eeprom.Open(s, b.Name(), 512, nil)
	require.ErrorIs(t, err, eeprom.ErrSize)
	var se *eeprom.SizeError
	require.ErrorAs(t, err, &se)
	require.Equal(t, eeprom.SizeError{Name: `"i2c/8-0050/eeprom"`, Got: 256, Want: 512}, *se)
	for _, size := range []int64{0, -1, eeprom.MaxSize + 1, 1 << 62} {
		_, err = eeprom.Open(s, "new", size, nil)
		require.ErrorIs(t, err, eeprom.ErrInvalid)
	}
	_, err = eeprom.Open(s, "../x", 256, nil)
	require.ErrorIs(t, err, nvstore.ErrInvalid)

	for _, off := range []int64{-1, 255, 256, 1 << 62} {
		require.ErrorIs(t, b.Commit([]byte{1, 2}, off, b.Epoch()), eeprom.ErrInvalid)
	}
	// A blob that somebody cut, or removed, is no memory.
	require.NoError(t, s.Put(b.Name(), []byte("short"), nil))
	require.ErrorIs(t, b.Commit([]byte{1}, 0, b.Epoch()), eeprom.ErrSize)
	require.NoError(t, s.Delete(b.Name()))
	require.ErrorIs(t, b.Commit([]byte{1}, 0, b.Epoch()), nvstore.ErrNotFound)
	_, err = b.Status()
	require.ErrorIs(t, err, nvstore.ErrNotFound)
	require.NoError(t, s.Close())
	require.Error(t, b.Commit([]byte{1}, 0, b.Epoch()))
	require.Equal(t, int64(-1), b.Epoch())
}

// The status register is kept beside other attributes.
func TestStatus(t *testing.T) {
	s, _ := store(t)
	b, err := eeprom.Open(s, "spi", 128, &nvstore.Meta{Type: "eeprom", Attributes: []blobdir.Attribute{{Key: "a", Value: "b"}}})
	require.NoError(t, err)
	for _, want := range []byte{0, 0x8c, 0x04} {
		if want != 0 {
			require.NoError(t, b.SetStatus(want, b.Epoch()))
		}
		v, err := b.Status()
		require.NoError(t, err)
		require.Equal(t, want, v)
	}
	e, err := s.Stat("spi")
	require.NoError(t, err)
	require.ElementsMatch(t, []blobdir.Attribute{{Key: "a", Value: "b"}, {Key: "eeprom.status", Value: "04"}}, e.Attributes)
	require.Equal(t, "eeprom", e.Type)
	require.ErrorIs(t, b.SetStatus(0, b.Epoch()-1), eeprom.ErrReverted)

	for _, bad := range []string{"", "4", "0x4", "104", "zz", "-1"} {
		e.Attributes = []blobdir.Attribute{{Key: "eeprom.status", Value: bad}}
		require.NoError(t, s.Update(func(tx *nvstore.Tx) error { return tx.SetMeta("spi", &e.Meta) }))
		_, err = b.Status()
		require.ErrorIs(t, err, eeprom.ErrStatus, "%q", bad)
		p, err := spi.Find("25010")
		require.NoError(t, err)
		_, err = spi.New(p, b, nil)
		require.ErrorIs(t, err, eeprom.ErrStatus)
	}
}

// i2cWrite is what Linux's at24 driver does: it repeats a write until it is
// acknowledged.
func i2cWrite(t testing.TB, c *i2c.Chip, addr int, p []byte) {
	for {
		if err := c.Start(0x50, false); err != nil {
			require.Equal(t, i2c.ErrNACK, err)
			time.Sleep(10 * time.Microsecond)
			continue
		}
		for _, b := range append([]byte{byte(addr >> 8), byte(addr)}, p...) {
			require.NoError(t, c.WriteByte(b))
		}
		require.NoError(t, c.Stop())
		return
	}
}

func i2cRead(t testing.TB, c *i2c.Chip, addr, n int) []byte {
	for c.Start(0x50, false) != nil {
		time.Sleep(10 * time.Microsecond)
	}
	require.NoError(t, c.WriteByte(byte(addr>>8)))
	require.NoError(t, c.WriteByte(byte(addr)))
	require.NoError(t, c.Start(0x50, true))
	out := make([]byte, n)
	for i := range out {
		b, err := c.ReadByte()
		require.NoError(t, err)
		out[i] = b
	}
	require.NoError(t, c.Stop())
	return out
}

func newI2C(t testing.TB, mem eeprom.Memory, o *i2c.Options) *i2c.Chip {
	p, err := i2c.Find("24C256")
	require.NoError(t, err)
	c, err := i2c.New(p, mem, o)
	require.NoError(t, err)
	return c
}

// Chips of one store, each written by its driver at the same time.
func TestConcurrentChips(t *testing.T) {
	s, _ := store(t)
	var wg sync.WaitGroup
	for i, name := range []string{"a", "b", "c"} {
		b := open(t, s, name, 32<<10)
		c := newI2C(t, b, &i2c.Options{Async: i > 0})
		wg.Go(func() {
			want := bytes.Repeat([]byte(name), 1000)
			for off := 0; off < len(want); off += 64 {
				i2cWrite(t, c, off, want[off:min(off+64, len(want))])
			}
			require.Equal(t, want, i2cRead(t, c, 0, len(want)))
			require.NoError(t, c.Wait())
		})
	}
	wg.Wait()
	rep, err := s.Check(t.Context(), nil)
	require.NoError(t, err)
	require.Empty(t, rep.Errors)
}

// A page write is one commit with one Sync, an address alone is none.
func TestOneSync(t *testing.T) {
	s, d := store(t)
	c := newI2C(t, open(t, s, "x", 32<<10), nil)
	before := d.Trace()
	i2cWrite(t, c, 64, bytes.Repeat([]byte{5}, 64))
	require.Equal(t, int64(1), d.Trace().Sub(before).Syncs)
	before = d.Trace()
	i2cRead(t, c, 0, 100)
	i2cWrite(t, c, 64, nil)
	require.Zero(t, d.Trace().Sub(before).Writes)
}

// A snapshot loaded underneath is to each chip a power cut.
func TestRevert(t *testing.T) {
	img, err := chain.Create(filepath.Join(t.TempDir(), "x.qcow2"), &chain.CreateOptions{})
	require.NoError(t, err)
	require.NoError(t, img.Commit())
	snaps, ok := image.As[image.Snapshotter](img.Device)
	require.True(t, ok)
	s, err := nvstore.CreateDevice(img.Device, &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()

	c := newI2C(t, open(t, s, "i2c", 32<<10), nil)
	p, err := spi.Find("25256")
	require.NoError(t, err)
	f, err := spi.New(p, open(t, s, "spi", p.Size), nil)
	require.NoError(t, err)
	i2cWrite(t, c, 0, []byte("AAAA"))
	spiSend(t, f, 6)
	spiSend(t, f, 1, spi.StatusBP0)
	require.NoError(t, snaps.Snapshots().Create("a"))
	i2cWrite(t, c, 0, []byte("BBBB"))
	spiSend(t, f, 6)
	spiSend(t, f, 1, 0)
	spiSend(t, f, 6)

	// The driver is in the middle of a page.
	require.NoError(t, c.Start(0x50, false))
	for _, b := range []byte("\x00\x00CC") {
		require.NoError(t, c.WriteByte(b))
	}
	require.NoError(t, snaps.Snapshots().Revert("a"))
	require.ErrorIs(t, c.Stop(), eeprom.ErrReverted)
	require.Equal(t, []byte("AAAA"), i2cRead(t, c, 0, 4))
	require.Equal(t, byte(spi.StatusBP0), spiSend(t, f, 5, 0)[1], "WEL too is gone")
	i2cWrite(t, c, 0, []byte("DD"))
	require.Equal(t, []byte("DDAA"), i2cRead(t, c, 0, 4))
}

func spiSend(t testing.TB, c *spi.Chip, in ...byte) (out []byte) {
	c.Select()
	for _, b := range in {
		so, err := c.Transfer(b)
		require.NoError(t, err)
		out = append(out, so)
	}
	require.NoError(t, c.Deselect())
	return out
}

func microwireSend(t testing.TB, c *microwire.Chip, bits uint32, n int) {
	require.NoError(t, c.Select())
	_, err := c.Shift(bits, n)
	require.NoError(t, err)
	require.NoError(t, c.Deselect())
}
