package microwire_test

import (
	"bytes"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/internal/chiptest"
	"nvstore.dev/eeprom/microwire"
)

// chip makes a chip on memory of its own.
func chip(t require.TestingT, name string, o *microwire.Options) (*microwire.Chip, *chiptest.Memory) {
	part, err := microwire.Find(name)
	require.NoError(t, err)
	mem := chiptest.New(part.Size)
	c, err := microwire.New(part, mem, o)
	require.NoError(t, err)
	return c, mem
}

// play plays recorded traffic.
func play(t *testing.T, path string) {
	events, err := chiptest.Trace(path)
	require.NoError(t, err)
	var c *microwire.Chip
	cs := false
	for _, e := range events {
		switch e.Verb {
		case "chip":
			bits, err := strconv.Atoi(e.Args[1])
			require.NoError(t, err)
			c, _ = chip(t, e.Args[0], &microwire.Options{Bits: bits})
		case "cs":
			cs = e.Args[0] == "1"
			require.NoError(t, c.Drive(cs, false, false), "%s:%d", path, e.Line)
		case "in":
			in, out, ok := strings.Cut(strings.Join(e.Args, ""), "out")
			require.True(t, ok && len(in) == len(out), "%s:%d", path, e.Line)
			got := ""
			for _, di := range in {
				require.NoError(t, c.Drive(cs, true, di == '1'))
				got += map[bool]string{false: "0", true: "1"}[c.DO()]
				require.NoError(t, c.Drive(cs, false, di == '1'))
			}
			require.Equal(t, strings.ReplaceAll(out, "z", "1"), got, "%s:%d", path, e.Line)
		case "off":
			c.PowerCycle()
		default:
			require.Fail(t, e.Verb, "%s:%d", path, e.Line)
		}
	}
}

func TestTraces(t *testing.T) {
	paths, err := filepath.Glob("testdata/*.trace")
	require.NoError(t, err)
	require.Len(t, paths, 3)
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) { play(t, path) })
	}
}

// send is an instruction of n bits between edges of CS.
func send(t require.TestingT, c *microwire.Chip, bits uint32, n int) error {
	require.NoError(t, c.Select())
	_, err := c.Shift(bits, n)
	require.NoError(t, err)
	return c.Deselect()
}

// Instructions of a 93C46 with words of 16 bits.
const (
	ewen    = 0b1_00_110000
	write5  = 0b1_01_000101
	headLen = 9
)

func TestParts(t *testing.T) {
	for _, p := range microwire.Parts() {
		found, err := microwire.Find(p.Name)
		require.NoError(t, err)
		require.Equal(t, p, found)
		_, err = microwire.New(p, chiptest.New(p.Size), nil)
		require.NoError(t, err)
		_, err = microwire.New(p, chiptest.New(2*p.Size), nil)
		require.ErrorIs(t, err, eeprom.ErrSize)
		_, err = microwire.New(p, chiptest.New(p.Size), &microwire.Options{Bits: 9})
		require.ErrorIs(t, err, eeprom.ErrInvalid)
	}
	_, err := microwire.Find("93c47")
	require.ErrorIs(t, err, eeprom.ErrInvalid)
	for _, p := range []microwire.Part{{"x", 128, 5}, {"x", 100, 6}, {"x", 0, 6}, {"x", 128, 17}, {"x", 1, 6}} {
		_, err := microwire.New(p, chiptest.New(p.Size), nil)
		require.ErrorIs(t, err, eeprom.ErrInvalid, "%+v", p)
	}
}

// Words lie in memory as network cards' images have them, or the other way.
func TestByteOrder(t *testing.T) {
	for _, big := range []bool{false, true} {
		c, mem := chip(t, "93C46", &microwire.Options{BigEndian: big})
		require.NoError(t, send(t, c, ewen, headLen))
		require.NoError(t, send(t, c, write5<<16|0x1234, headLen+16))
		want := []byte{0x34, 0x12}
		if big {
			want = []byte{0x12, 0x34}
		}
		require.Equal(t, want, mem.Data[10:12])
		require.NoError(t, c.Select())
		_, err := c.Shift(0b1_10_000101, headLen)
		require.NoError(t, err)
		got, err := c.Shift(0, 16)
		require.NoError(t, err)
		require.Equal(t, uint32(0x1234), got)
	}
	c, _ := chip(t, "93C46", nil)
	_, err := c.Shift(0, 33)
	require.ErrorIs(t, err, eeprom.ErrInvalid)
}

// In the write cycle DO is low while CS is high, and nothing is taken.
func TestBusy(t *testing.T) {
	c, mem := chip(t, "93C46", &microwire.Options{Async: true})
	require.NoError(t, send(t, c, ewen, headLen))
	mem.Gate = make(chan struct{})
	require.NoError(t, send(t, c, write5<<16|0x1234, headLen+16))
	require.True(t, c.DO(), "CS is low")
	for range 3 {
		require.NoError(t, c.Select())
		require.False(t, c.DO())
		got, err := c.Shift(0b1_10_000101<<7, headLen+7)
		require.NoError(t, err)
		require.Zero(t, got)
		require.NoError(t, c.Deselect())
	}
	require.NoError(t, c.Select())
	close(mem.Gate)
	require.NoError(t, c.Wait())
	require.True(t, c.DO(), "ready")
	require.Equal(t, 1, mem.Commits)
	require.Equal(t, []byte{0x34, 0x12}, mem.Data[10:12])
	_, err := c.Shift(0b1_10_000101, headLen)
	require.NoError(t, err)
	got, err := c.Shift(0, 16)
	require.NoError(t, err)
	require.Equal(t, uint32(0x1234), got)
}

// A commit that failed is never shown as done.
func TestFailure(t *testing.T) {
	for _, async := range []bool{false, true} {
		c, mem := chip(t, "93C46", &microwire.Options{Async: async})
		require.NoError(t, send(t, c, ewen, headLen))
		mem.Fail = true
		err := send(t, c, write5<<16, headLen+16)
		if async {
			require.NoError(t, err)
			err = c.Wait()
		}
		require.ErrorIs(t, err, chiptest.ErrMemory)
		mem.Fail = false
		require.True(t, c.Busy())
		require.NoError(t, c.Select())
		require.False(t, c.DO())
		require.NoError(t, c.Deselect())
		c.PowerCycle()
		require.NoError(t, c.Select())
		require.True(t, c.DO())
		require.Equal(t, byte(0xff), mem.Data[10])

		mem.FailRd = true
		_, err = c.Shift(0b1_10_000101, headLen)
		require.NoError(t, err)
		got, err := c.Shift(0, 16)
		require.ErrorIs(t, err, chiptest.ErrMemory)
		require.Equal(t, uint32(0xffff), got)
	}
}

// A revert is a power cut, after which writes are disabled.
func TestRevert(t *testing.T) {
	c, mem := chip(t, "93C46", nil)
	old := bytes.Clone(mem.Data)
	require.NoError(t, send(t, c, ewen, headLen))
	require.NoError(t, c.Select())
	_, err := c.Shift(write5<<16, headLen+16)
	require.NoError(t, err)
	mem.Revert(old)
	require.ErrorIs(t, c.Deselect(), eeprom.ErrReverted)
	require.False(t, c.Busy())
	require.NoError(t, send(t, c, write5<<16, headLen+16))
	require.Equal(t, old, mem.Data)
	require.Zero(t, mem.Commits)
}
