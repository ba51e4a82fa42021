package i2c_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/i2c"
	"nvstore.dev/eeprom/internal/chiptest"
)

// A transfer between two start conditions, or a start and a stop.
type transfer struct {
	device byte
	read   bool
	bytes  []byte // written, or as many as are read
	stop   bool
}

// reference is a chip by whole transfers.
type reference struct {
	part    i2c.Part
	pins    byte
	data    []byte
	counter int
	wp      bool
}

// do returns which bytes are acknowledged, or read.
func (r *reference) do(x transfer) (ack int, out []byte) {
	size, blocks := len(r.data), len(r.data)>>(8*r.part.AddressBytes)
	block := 0
	if blocks > 1 {
		block = int(x.device) % blocks
	}
	if int(x.device) != 0x50+int(r.pins)+block {
		return -1, nil
	}
	if x.read {
		for range x.bytes {
			out = append(out, r.data[r.counter])
			r.counter = (r.counter + 1) % size
		}
		return 0, out
	}
	if len(x.bytes) < r.part.AddressBytes {
		return len(x.bytes), nil
	}
	addr := block
	for _, b := range x.bytes[:r.part.AddressBytes] {
		addr = addr*256 + int(b)
	}
	addr %= size
	base := addr / r.part.Page * r.part.Page
	for _, b := range x.bytes[r.part.AddressBytes:] {
		if x.stop && !r.wp {
			r.data[addr] = b
		}
		addr = base + (addr+1-base)%r.part.Page
	}
	r.counter = addr
	return len(x.bytes), nil
}

func transfers(p i2c.Part) *rapid.Generator[transfer] {
	return rapid.Custom(func(t *rapid.T) transfer {
		x := transfer{read: rapid.Bool().Draw(t, "read"), stop: rapid.IntRange(0, 3).Draw(t, "stop") > 0}
		x.device = byte(rapid.OneOf(rapid.IntRange(0x50, 0x57), rapid.IntRange(0, 0x7f)).Draw(t, "device"))
		x.bytes = rapid.SliceOfN(rapid.Byte(), 0, p.Page+8).Draw(t, "bytes")
		return x
	})
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.SampledFrom(i2c.Parts()).Draw(t, "part")
		mem := chiptest.New(p.Size)
		r := &reference{part: p, data: bytes.Repeat([]byte{0xff}, int(p.Size))}
		blocks := byte(max(p.Size>>(8*p.AddressBytes), 1))
		r.pins = byte(rapid.IntRange(0, 7).Draw(t, "pins")) / blocks * blocks
		c, err := i2c.New(p, mem, &i2c.Options{Pins: r.pins})
		require.NoError(t, err)
		for range rapid.IntRange(1, 60).Draw(t, "n") {
			switch rapid.IntRange(0, 20).Draw(t, "what") {
			case 0:
				r.wp = !r.wp
				c.SetWP(r.wp)
			case 1:
				c.PowerCycle()
				r.counter = 0
			default:
				compare(t, c, r, transfers(p).Draw(t, "transfer"))
			}
		}
		require.True(t, bytes.Equal(r.data, mem.Data))
	})
}

func compare(t *rapid.T, c *i2c.Chip, r *reference, x transfer) {
	ack, want := r.do(x)
	require.Equal(t, ack >= 0, c.Start(x.device, x.read) == nil)
	for i, b := range x.bytes {
		if x.read {
			got, err := c.ReadByte()
			if ack >= 0 {
				require.NoError(t, err)
				require.Equal(t, want[i], got)
			}
			continue
		}
		require.Equal(t, i < ack, c.WriteByte(b) == nil)
	}
	if x.stop {
		require.NoError(t, c.Stop())
	}
}

// A master that obeys no rule: nothing panics, and a page is all that a stop
// condition changes.
func FuzzBus(f *testing.F) {
	f.Add(byte(3), []byte{0, 0x50, 2, 1, 2, 2, 2, 3, 4})
	f.Add(byte(8), []byte{0, 0x50, 2, 0, 2, 0, 2, 9, 4, 1, 0x50, 3, 3, 5, 0, 6})
	f.Fuzz(func(t *testing.T, which byte, ops []byte) {
		p := i2c.Parts()[int(which)%len(i2c.Parts())]
		mem := chiptest.New(p.Size)
		c, err := i2c.New(p, mem, &i2c.Options{})
		require.NoError(t, err)
		before := bytes.Clone(mem.Data)
		for len(ops) > 1 {
			op, arg := ops[0], ops[1]
			ops = ops[1:]
			commits := mem.Commits
			switch op % 8 {
			case 0:
				_ = c.Start(arg, false)
			case 1:
				_ = c.Start(arg, true)
			case 2:
				_ = c.WriteByte(arg)
			case 3:
				b, err := c.ReadByte()
				require.True(t, err == nil || b == 0xff)
				continue
			case 4:
				if err := c.Stop(); err != nil {
					require.ErrorIs(t, err, eeprom.ErrReverted)
				}
				pageOnly(t, p.Page, before, mem.Data)
				copy(before, mem.Data)
				continue
			case 5:
				c.SetWP(arg&1 != 0)
			case 6:
				c.PowerCycle()
				continue
			case 7:
				mem.Revert(mem.Data)
				continue
			}
			ops = ops[1:]
			require.Equal(t, commits, mem.Commits, "only a stop condition writes")
		}
	})
}

// pageOnly requires that memory differs within one page at most.
func pageOnly(t *testing.T, page int, a, b []byte) {
	require.Len(t, b, len(a))
	if bytes.Equal(a, b) {
		return
	}
	first := 0
	for a[first] == b[first] {
		first++
	}
	base := first / page * page
	require.True(t, bytes.Equal(a[base+page:], b[base+page:]))
}
