package spi_test

import (
	"bytes"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/internal/chiptest"
	"nvstore.dev/eeprom/spi"
)

// chip makes a chip on memory of its own.
func chip(t require.TestingT, name string, o *spi.Options) (*spi.Chip, *chiptest.Memory) {
	part, err := spi.Find(name)
	require.NoError(t, err)
	mem := chiptest.New(part.Size)
	c, err := spi.New(part, mem, o)
	require.NoError(t, err)
	return c, mem
}

// send is a whole selection.
func send(c *spi.Chip, in ...byte) (out []byte, err error) {
	c.Select()
	for _, b := range in {
		so, err := c.Transfer(b)
		if err != nil {
			return nil, err
		}
		out = append(out, so)
	}
	return out, c.Deselect()
}

func parse(t *testing.T, words []string) (out []byte) {
	for _, w := range words {
		if w == "zz" {
			w = "ff"
		}
		v, err := strconv.ParseUint(w, 16, 8)
		require.NoError(t, err)
		out = append(out, byte(v))
	}
	return out
}

// play plays recorded traffic.
func play(t *testing.T, path string) {
	events, err := chiptest.Trace(path)
	require.NoError(t, err)
	var c *spi.Chip
	for _, e := range events {
		switch e.Verb {
		case "chip":
			c, _ = chip(t, e.Args[0], nil)
		case "cs":
			so := slices.Index(e.Args, "so")
			require.Equal(t, len(e.Args), 2*so+1, "%s:%d", path, e.Line)
			got, err := send(c, parse(t, e.Args[:so])...)
			require.NoError(t, err, "%s:%d", path, e.Line)
			require.Equal(t, parse(t, e.Args[so+1:]), got, "%s:%d", path, e.Line)
		case "wp":
			c.SetWP(e.Args[0] == "1")
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

func TestParts(t *testing.T) {
	for _, p := range spi.Parts() {
		found, err := spi.Find(p.Name)
		require.NoError(t, err)
		require.Equal(t, p, found)
		_, err = spi.New(p, chiptest.New(p.Size), nil)
		require.NoError(t, err)
		_, err = spi.New(p, chiptest.New(p.Size/2), nil)
		require.ErrorIs(t, err, eeprom.ErrSize)
		_, err = spi.New(p, nil, nil)
		require.ErrorIs(t, err, eeprom.ErrInvalid)
	}
	_, err := spi.Find("25LC040")
	require.ErrorIs(t, err, eeprom.ErrInvalid)
	for _, p := range []spi.Part{
		{"x", 1024, 16, 1, true}, {"x", 256, 16, 0, true}, {"x", 256, 16, 4, true}, {"x", 256, 3, 1, true},
		{"x", 0, 1, 1, true}, {"x", 512 << 10, 256, 3, true}, {"x", 300, 4, 2, true},
	} {
		_, err := spi.New(p, chiptest.New(p.Size), nil)
		require.ErrorIs(t, err, eeprom.ErrInvalid, "%+v", p)
	}
}

// In the write cycle the chip takes RDSR only, and shows WIP.
func TestBusy(t *testing.T) {
	for _, in := range [][]byte{{2, 0, 0, 1}, {1, 4}} {
		c, mem := chip(t, "25256", &spi.Options{Async: true})
		mem.Gate = make(chan struct{})
		_, err := send(c, 6)
		require.NoError(t, err)
		_, err = send(c, in...)
		require.NoError(t, err)
		for _, other := range [][]byte{{4}, {6}, {1, 0}, {2, 0, 0, 9}, {3, 0, 0, 0}} {
			out, err := send(c, other...)
			require.NoError(t, err)
			require.Equal(t, bytes.Repeat([]byte{0xff}, len(other)), out)
			out, err = send(c, 5, 0)
			require.NoError(t, err)
			require.Equal(t, []byte{0xff, spi.StatusWIP | spi.StatusWEL}, out)
		}
		// RDSR shows the end of the cycle while it goes on.
		c.Select()
		_, err = c.Transfer(5)
		require.NoError(t, err)
		v, err := c.Transfer(0)
		require.NoError(t, err)
		require.Equal(t, byte(3), v)
		close(mem.Gate)
		require.NoError(t, c.Wait())
		v, err = c.Transfer(0)
		require.NoError(t, err)
		require.Zero(t, v&3)
		require.NoError(t, c.Deselect())
		require.Equal(t, 1, mem.Commits)
		require.Equal(t, in[0] == 1, mem.NV == 4)
	}
}

// A commit that failed is never shown as done.
func TestFailure(t *testing.T) {
	for _, async := range []bool{false, true} {
		for _, in := range [][]byte{{2, 0, 0, 1}, {1, 4}} {
			c, mem := chip(t, "25256", &spi.Options{Async: async})
			_, err := send(c, 6)
			require.NoError(t, err)
			mem.Fail = true
			_, err = send(c, in...)
			if async {
				require.NoError(t, err)
				err = c.Wait()
			}
			require.ErrorIs(t, err, chiptest.ErrMemory)
			mem.Fail = false
			for range 3 {
				require.True(t, c.Busy())
				out, err := send(c, 5, 0)
				require.NoError(t, err)
				require.Equal(t, byte(3), out[1])
			}
			require.Zero(t, mem.NV)
			require.Equal(t, byte(0xff), mem.Data[0])
			c.PowerCycle()
			out, err := send(c, 5, 0)
			require.NoError(t, err)
			require.Zero(t, out[1])
			mem.FailRd = true
			_, err = send(c, 3, 0, 0, 0)
			require.ErrorIs(t, err, chiptest.ErrMemory)
		}
	}
}

// A revert is a power cut: WEL is 0, and what was being written isn't there.
func TestRevert(t *testing.T) {
	c, mem := chip(t, "25256", nil)
	old := bytes.Clone(mem.Data)
	_, err := send(c, 6)
	require.NoError(t, err)
	c.Select()
	for _, b := range []byte{2, 0, 0, 1} {
		_, err := c.Transfer(b)
		require.NoError(t, err)
	}
	mem.Revert(old)
	require.ErrorIs(t, c.Deselect(), eeprom.ErrReverted)
	require.Equal(t, old, mem.Data)
	out, err := send(c, 5, 0)
	require.NoError(t, err)
	require.Zero(t, out[1])

	_, err = send(c, 6)
	require.NoError(t, err)
	mem.Revert(old)
	out, err = send(c, 5, 0)
	require.NoError(t, err)
	require.Zero(t, out[1])
}
