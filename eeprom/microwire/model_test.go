package microwire_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/eeprom/internal/chiptest"
	"nvstore.dev/eeprom/microwire"
)

// reference is a chip by whole instructions.
type reference struct {
	words []uint32
	bits  int
	ones  uint32
	ewen  bool
}

// An instruction has more or fewer data bits than it should at times.
type instruction struct {
	op    uint32
	addr  uint32
	data  uint32
	short int // bits that are missing at its end
	extra int // bits too many
	lead  int // zeros before the start bit
}

func (r *reference) do(x instruction, addrBits int) {
	missing := x.short > 0
	word := int(x.addr) % len(r.words)
	ext := x.addr >> (addrBits - 2)
	if x.op == 0 && (ext == 0 || ext == 3) && !missing {
		r.ewen = ext == 3
	}
	if !r.ewen || missing {
		return
	}
	set := func(from, to int, v uint32) {
		for i := from; i < to; i++ {
			r.words[i] = v & r.ones
		}
	}
	switch {
	case x.op == 1:
		set(word, word+1, x.data)
	case x.op == 3:
		set(word, word+1, r.ones)
	case x.op == 0 && ext == 1:
		set(0, len(r.words), x.data)
	case x.op == 0 && ext == 2:
		set(0, len(r.words), r.ones)
	}
}

func (r *reference) bytes() []byte {
	var out []byte
	for _, w := range r.words {
		out = append(out, byte(w))
		if r.bits == 16 {
			out = append(out, byte(w>>8))
		}
	}
	return out
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.SampledFrom(microwire.Parts()).Draw(t, "part")
		bits := rapid.SampledFrom([]int{8, 16}).Draw(t, "bits")
		mem := chiptest.New(p.Size)
		c, err := microwire.New(p, mem, &microwire.Options{Bits: bits})
		require.NoError(t, err)
		r := &reference{bits: bits, ones: 1<<bits - 1}
		r.words = make([]uint32, int(p.Size)*8/bits)
		for i := range r.words {
			r.words[i] = r.ones
		}
		addrBits := p.AddressBits
		if bits == 8 {
			addrBits++
		}
		for range rapid.IntRange(1, 60).Draw(t, "n") {
			run(t, c, r, addrBits)
		}
		require.True(t, bytes.Equal(r.bytes(), mem.Data))
	})
}

func run(t *rapid.T, c *microwire.Chip, r *reference, addrBits int) {
	x := instruction{
		op:   uint32(rapid.IntRange(0, 3).Draw(t, "op")),
		addr: uint32(rapid.IntRange(0, 1<<addrBits-1).Draw(t, "addr")),
		data: uint32(rapid.IntRange(0, int(r.ones)).Draw(t, "data")),
		lead: rapid.IntRange(0, 3).Draw(t, "lead"),
	}
	switch rapid.IntRange(0, 9).Draw(t, "what") {
	case 0:
		c.PowerCycle()
		r.ewen = false
		return
	case 1:
		x.short = rapid.IntRange(1, 5).Draw(t, "short")
	case 2:
		x.extra = rapid.IntRange(1, 40).Draw(t, "extra")
	case 3, 4:
		x.op, x.addr = 0, 3<<(addrBits-2)
	}
	require.NoError(t, c.Select())
	shift(t, c, 0, x.lead)
	head := uint32(1)<<(2+addrBits) | x.op<<addrBits | x.addr
	inHead := x.short // bits that the head lacks
	if hasData(x, addrBits) {
		inHead = 0
	}
	head = shift(t, c, head>>inHead, 3+addrBits-inHead)
	if x.op == 2 && x.short == 0 {
		require.Zero(t, head&1, "the dummy bit")
		for i := range rapid.IntRange(0, 5).Draw(t, "words") {
			got := shift(t, c, 0, r.bits)
			require.Equal(t, r.words[(int(x.addr)+i)%len(r.words)], got)
		}
	}
	if hasData(x, addrBits) {
		shift(t, c, x.data>>x.short, r.bits-x.short)
	}
	shift(t, c, 0xffffffff, min(x.extra, 32))
	require.NoError(t, c.Deselect())
	if x.op != 2 {
		r.do(x, addrBits)
	}
}

// hasData tells whether data follows the address.
func hasData(x instruction, addrBits int) bool {
	return x.op == 1 || x.op == 0 && x.addr>>(addrBits-2) == 1
}

func shift(t *rapid.T, c *microwire.Chip, bits uint32, n int) uint32 {
	got, err := c.Shift(bits, n)
	require.NoError(t, err)
	return got
}

// Pins at random: nothing panics, and only a falling CS writes.
func FuzzPins(f *testing.F) {
	f.Add(byte(0), []byte{4, 5, 7, 4, 6, 0})
	f.Fuzz(func(t *testing.T, which byte, levels []byte) {
		p := microwire.Parts()[int(which/2)%len(microwire.Parts())]
		mem := chiptest.New(p.Size)
		c, err := microwire.New(p, mem, &microwire.Options{Bits: 8 + 8*int(which%2)})
		require.NoError(t, err)
		cs := false
		for _, l := range levels {
			commits, was := mem.Commits, cs
			switch {
			case l == 0xff:
				c.PowerCycle()
				cs = false
			case l == 0xfe:
				mem.Revert(mem.Data)
			default:
				cs = l&4 != 0
				require.NoError(t, c.Drive(cs, l&2 != 0, l&1 != 0))
			}
			c.DO()
			if !was || cs {
				require.Equal(t, commits, mem.Commits)
			}
		}
	})
}
