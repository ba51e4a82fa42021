package spi_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/eeprom/internal/chiptest"
	"nvstore.dev/eeprom/spi"
)

// reference is a chip by whole selections.
type reference struct {
	part   spi.Part
	data   []byte
	nv     byte
	wel    bool
	wp     bool // low
	noWPEN bool
}

func (r *reference) do(in []byte) (out []byte) {
	out = bytes.Repeat([]byte{0xff}, len(in))
	if len(in) == 0 {
		return out
	}
	op, a8 := in[0], 0
	if r.part.AddressBytes == 1 {
		if r.part.Size == 512 {
			a8 = int(op >> 3 & 1)
		}
		op &= 0xf7
	}
	n := 1 + r.part.AddressBytes
	addr := a8
	for i := 1; i < n && i < len(in); i++ {
		addr = addr*256 + int(in[i])
	}
	addr %= len(r.data)
	switch {
	case op == 6 && len(in) == 1:
		r.wel = !(r.wp && r.noWPEN)
	case op == 4 && len(in) == 1:
		r.wel = false
	case op == 5:
		for i := range out[1:] {
			out[1+i] = r.nv
			if r.wel {
				out[1+i] |= 2
			}
		}
	case op == 1 && len(in) == 2 && r.wel:
		if r.wp && (r.noWPEN || r.nv&0x80 != 0) {
			break
		}
		r.nv, r.wel = in[1]&0x8c, false
		if r.noWPEN {
			r.nv &= 0x0c
		}
	case op == 3 && len(in) > n:
		for i := n; i < len(in); i++ {
			out[i] = r.data[(addr+i-n)%len(r.data)]
		}
	case op == 2 && len(in) > n && r.wel:
		r.program(addr, in[n:])
	}
	return out
}

func (r *reference) program(addr int, p []byte) {
	open := len(r.data) * []int{4, 3, 2, 0}[r.nv>>2&3] / 4
	if addr >= open || r.wp && r.noWPEN {
		return
	}
	base := addr / r.part.Page * r.part.Page
	for i, b := range p {
		r.data[base+(addr-base+i)%r.part.Page] = b
	}
	r.wel = false
}

func TestModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := rapid.SampledFrom(spi.Parts()).Draw(t, "part")
		mem := chiptest.New(p.Size)
		c, err := spi.New(p, mem, nil)
		require.NoError(t, err)
		r := &reference{part: p, data: bytes.Repeat([]byte{0xff}, int(p.Size)), noWPEN: p.Size < 1024}
		for range rapid.IntRange(1, 60).Draw(t, "n") {
			switch rapid.IntRange(0, 20).Draw(t, "what") {
			case 0:
				r.wp = !r.wp
				c.SetWP(!r.wp)
				continue
			case 1:
				c.PowerCycle()
				r.wel = false
				continue
			}
			in := selection(t, p)
			want := r.do(in)
			got, err := send(c, in...)
			require.NoError(t, err)
			require.Equal(t, len(want), len(got))
			require.True(t, bytes.Equal(want, got), "% x: % x, not % x", in, got, want)
		}
		require.True(t, bytes.Equal(r.data, mem.Data))
		require.Equal(t, r.nv, mem.NV)
	})
}

func selection(t *rapid.T, p spi.Part) []byte {
	op := rapid.OneOf(rapid.SampledFrom([]byte{1, 2, 2, 3, 3, 4, 5, 6, 6, 6, 2 | 8, 3 | 8, 6 | 8}), rapid.Byte()).Draw(t, "op")
	switch op &^ 8 {
	case 4, 6:
		return append([]byte{op}, rapid.SliceOfN(rapid.Byte(), 0, rapid.SampledFrom([]int{0, 0, 0, 2}).Draw(t, "more")).Draw(t, "rest")...)
	case 1:
		return append([]byte{op}, rapid.SliceOfN(rapid.Byte(), 0, 2).Draw(t, "rest")...)
	default:
		return append([]byte{op}, rapid.SliceOfN(rapid.Byte(), 0, p.AddressBytes+p.Page+8).Draw(t, "rest")...)
	}
}

// A master that obeys no rule: nothing panics, and only a rising CS writes.
func FuzzBus(f *testing.F) {
	f.Add(byte(2), []byte{0, 1, 6, 2, 0, 1, 2, 1, 0, 1, 9, 2})
	f.Fuzz(func(t *testing.T, which byte, ops []byte) {
		p := spi.Parts()[int(which)%len(spi.Parts())]
		mem := chiptest.New(p.Size)
		c, err := spi.New(p, mem, nil)
		require.NoError(t, err)
		for len(ops) > 1 {
			op, arg := ops[0], ops[1]
			ops = ops[1:]
			commits := mem.Commits
			switch op % 6 {
			case 0:
				c.Select()
			case 1:
				_, err := c.Transfer(arg)
				require.NoError(t, err)
				ops = ops[1:]
			case 2:
				_ = c.Deselect()
				commits = mem.Commits
			case 3:
				c.SetWP(arg&1 != 0)
			case 4:
				c.PowerCycle()
			case 5:
				mem.Revert(mem.Data)
			}
			require.Equal(t, commits, mem.Commits)
			require.Zero(t, mem.NV&^(spi.StatusBP0|spi.StatusBP1|spi.StatusWPEN))
		}
	})
}
