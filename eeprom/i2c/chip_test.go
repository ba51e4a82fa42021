package i2c_test

import (
	"bytes"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/i2c"
	"nvstore.dev/eeprom/internal/chiptest"
)

func hex(t require.TestingT, s string) byte {
	v, err := strconv.ParseUint(s, 16, 8)
	require.NoError(t, err)
	return byte(v)
}

func acked(err error) string {
	switch err {
	case nil:
		return "ACK"
	case i2c.ErrNACK:
		return "NACK"
	default:
		return err.Error()
	}
}

// chip makes a chip on memory of its own.
func chip(t require.TestingT, name string, o *i2c.Options) (*i2c.Chip, *chiptest.Memory) {
	part, err := i2c.Find(name)
	require.NoError(t, err)
	mem := chiptest.New(part.Size)
	c, err := i2c.New(part, mem, o)
	require.NoError(t, err)
	return c, mem
}

// play plays recorded traffic.
func play(t *testing.T, path string) {
	events, err := chiptest.Trace(path)
	require.NoError(t, err)
	var c *i2c.Chip
	for _, e := range events {
		at := []any{"%s:%d", path, e.Line}
		switch e.Verb {
		case "chip":
			o := &i2c.Options{}
			if len(e.Args) > 1 {
				o.Pins = hex(t, e.Args[1])
			}
			c, _ = chip(t, e.Args[0], o)
		case "S":
			require.Equal(t, e.Args[2], acked(c.Start(hex(t, e.Args[0]), e.Args[1] == "R")), at...)
		case "W":
			require.Equal(t, e.Args[1], acked(c.WriteByte(hex(t, e.Args[0]))), at...)
		case "R":
			b, err := c.ReadByte()
			require.Equal(t, hex(t, e.Args[0]), b, at...)
			require.Equal(t, len(e.Args) > 1, err != nil, at...)
		case "P":
			require.NoError(t, c.Stop(), at...)
		case "WP":
			c.SetWP(e.Args[0] == "1")
		case "off":
			c.PowerCycle()
		default:
			require.Fail(t, e.Verb, at...)
		}
	}
}

func TestTraces(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.trace")
	require.NoError(t, err)
	require.Len(t, paths, 4)
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) { play(t, path) })
	}
}

// write is a whole write, up to its stop condition.
func write(c *i2c.Chip, device byte, p ...byte) error {
	if err := c.Start(device, false); err != nil {
		return err
	}
	for _, b := range p {
		if err := c.WriteByte(b); err != nil {
			return err
		}
	}
	return c.Stop()
}

func TestParts(t *testing.T) {
	for _, p := range i2c.Parts() {
		found, err := i2c.Find(p.Name)
		require.NoError(t, err)
		require.Equal(t, p, found)
		_, err = i2c.New(p, chiptest.New(p.Size), nil)
		require.NoError(t, err, p.Name)
		_, err = i2c.New(p, chiptest.New(p.Size+1), nil)
		require.ErrorIs(t, err, eeprom.ErrSize)
		_, err = i2c.New(p, nil, nil)
		require.ErrorIs(t, err, eeprom.ErrInvalid)
	}
	_, err := i2c.Find("24c03")
	require.ErrorIs(t, err, eeprom.ErrInvalid)
	for _, p := range []i2c.Part{
		{"x", 0, 8, 1}, {"x", 100, 4, 1}, {"x", 256, 7, 1}, {"x", 256, 0, 1}, {"x", 8, 16, 1}, {"x", 256, 8, 0},
		{"x", 256, 8, 3}, {"x", 4096, 32, 1}, {"x", 512 << 10, 256, 2}, {"x", -256, 8, 1}, {"x", 4096, 512, 2},
	} {
		_, err := i2c.New(p, chiptest.New(max(p.Size, 0)), nil)
		require.ErrorIs(t, err, eeprom.ErrInvalid, "%+v", p)
	}
	p, err := i2c.Find("24c16")
	require.NoError(t, err)
	for pins := range byte(9) {
		_, err := i2c.New(p, chiptest.New(p.Size), &i2c.Options{Pins: pins})
		require.Equal(t, pins == 0, err == nil, "the address has all three bits")
	}
}

// While the write isn't durable, the chip answers to nobody.
func TestBusy(t *testing.T) {
	c, mem := chip(t, "24C256", &i2c.Options{Async: true})
	mem.Gate = make(chan struct{})
	require.NoError(t, write(c, 0x50, 0, 0, 1, 2))
	for range 3 {
		require.Equal(t, i2c.ErrNACK, c.Start(0x50, false))
		require.Equal(t, i2c.ErrNACK, c.WriteByte(0))
		require.Equal(t, i2c.ErrNACK, c.Start(0x50, true))
		_, err := c.ReadByte()
		require.Equal(t, i2c.ErrNACK, err)
		require.NoError(t, c.Stop())
		require.True(t, c.Busy())
	}
	require.Equal(t, []byte{0xff, 0xff}, mem.Data[:2])
	close(mem.Gate)
	require.NoError(t, c.Wait())
	require.NoError(t, c.Start(0x50, false))
	require.Equal(t, []byte{1, 2}, mem.Data[:2])
	require.Equal(t, 1, mem.Commits)
}

// A commit that failed is never shown as done.
func TestFailure(t *testing.T) {
	for _, async := range []bool{false, true} {
		c, mem := chip(t, "24C02", &i2c.Options{Async: async})
		mem.Fail = true
		err := write(c, 0x50, 0, 1)
		if async {
			require.NoError(t, err)
			err = c.Wait()
		}
		require.ErrorIs(t, err, chiptest.ErrMemory)
		mem.Fail = false
		for range 5 {
			require.True(t, c.Busy())
			require.Equal(t, i2c.ErrNACK, c.Start(0x50, false))
			require.NoError(t, c.Stop())
		}
		require.Equal(t, byte(0xff), mem.Data[0])
		c.PowerCycle()
		require.NoError(t, write(c, 0x50, 0, 1))
		require.NoError(t, c.Wait())
		require.Equal(t, byte(1), mem.Data[0])
	}
}

func TestReadFailure(t *testing.T) {
	c, mem := chip(t, "24C02", nil)
	mem.Data[0], mem.FailRd = 7, true
	require.NoError(t, c.Start(0x50, true))
	b, err := c.ReadByte()
	require.ErrorIs(t, err, chiptest.ErrMemory)
	require.NotErrorIs(t, err, i2c.ErrNACK)
	require.Equal(t, byte(0xff), b)
	require.ErrorIs(t, write(c, 0x50, 7, 1, 2), chiptest.ErrMemory, "the rest of the page isn't known")
	require.True(t, c.Busy())
}

// A revert is a power cut.
func TestRevert(t *testing.T) {
	c, mem := chip(t, "24C02", nil)
	old := bytes.Clone(mem.Data)
	require.NoError(t, write(c, 0x50, 5, 1, 2))
	require.NoError(t, c.Start(0x50, false))
	require.NoError(t, c.WriteByte(0))
	require.NoError(t, c.WriteByte(9))
	mem.Revert(old)
	require.ErrorIs(t, c.Stop(), eeprom.ErrReverted)
	require.Equal(t, old, mem.Data)
	require.False(t, c.Busy())
	require.NoError(t, c.Start(0x50, true))
	_, err := c.ReadByte()
	require.NoError(t, err)
	require.NoError(t, c.Stop())

	require.NoError(t, write(c, 0x50, 100))
	mem.Data[0], mem.Data[100] = 3, 4
	mem.Revert(mem.Data)
	require.NoError(t, c.Start(0x50, true))
	b, err := c.ReadByte()
	require.NoError(t, err)
	require.Equal(t, byte(3), b, "the counter is 0 again")
}

// Writing what is there already is a cycle like any other.
func TestNothingLoaded(t *testing.T) {
	c, mem := chip(t, "24C256", nil)
	require.NoError(t, write(c, 0x50))
	require.NoError(t, write(c, 0x50, 0))
	require.NoError(t, write(c, 0x50, 0, 0))
	require.Zero(t, mem.Commits)
	require.NoError(t, write(c, 0x50, 0, 0, 0xff))
	require.Equal(t, 1, mem.Commits)
}
