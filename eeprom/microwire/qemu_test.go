package microwire_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/eeprom/internal/chiptest"
	"nvstore.dev/eeprom/microwire"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/internal/qtest"
)

// A wire is a 93C46 by its pins.
type wire interface {
	set(cs, clk, di bool) error
	get() (bool, error)
}

type ours struct{ *microwire.Chip }

func (o ours) set(cs, clk, di bool) error { return o.Drive(cs, clk, di) }
func (o ours) get() (bool, error)         { return o.DO(), nil }

// A register is where a network card shows its EEPROM's pins.
type register struct {
	device          string
	bar, bits       int
	off             uint64
	always          uint64
	clk, cs, di, do uint64
	reads           bool // it takes no instruction but READ
	on              bool // a READ goes on with the next word
	m               *qtest.Machine
}

const window = 0xe0000000

func (r *register) set(cs, clk, di bool) error {
	v := r.always
	for _, b := range []struct {
		on  bool
		bit uint64
	}{{cs, r.cs}, {clk, r.clk}, {di, r.di}} {
		if b.on {
			v |= b.bit
		}
	}
	return r.m.Write(r.bits, window+r.off, v)
}

func (r *register) get() (bool, error) {
	v, err := r.m.Read(r.bits, window+r.off)
	return v&r.do != 0, err
}

// cards are QEMU's network cards with a 93C46, with three models of it:
// hw/nvram/eeprom93xx.c for the i82559c and the tulip, hw/net/rtl8139.c, and
// hw/net/e1000.c.
func cards() []*register {
	return []*register{
		{device: "i82559c", bits: 16, off: 0x0e, clk: 1, cs: 2, di: 4, do: 8},
		{device: "tulip", bar: 1, bits: 32, off: 0x48, always: 1<<11 | 1<<14, clk: 2, cs: 1, di: 4, do: 8},
		{device: "rtl8139", bar: 1, bits: 8, off: 0x50, always: 0x80, clk: 4, cs: 8, di: 2, do: 1, reads: true},
		{device: "e1000", bits: 32, off: 0x10, clk: 1, cs: 2, di: 4, do: 8, reads: true, on: true},
	}
}

func (r *register) start(t *testing.T) {
	m, err := qtest.Start("qemu-system-x86_64", "-M", "pc", "-nodefaults", "-device", r.device+",addr=4,mac=52:54:00:12:34:56")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	require.NoError(t, m.PCI(4, 0).Map(r.bar, window))
	r.m = m
}

// clocks sends an instruction and reads n bits behind it, as drivers do: DO is
// looked at while CLK is high.
func clocks(t *testing.T, w wire, bits string, n int) (out string) {
	if r, ok := w.(*register); ok && r.device == "e1000" {
		bits = bits[1:] // it counts the zero
	}
	require.NoError(t, w.set(true, false, false))
	for i := range len(bits) + n {
		di := i < len(bits) && bits[i] == '1'
		require.NoError(t, w.set(true, false, di))
		require.NoError(t, w.set(true, true, di))
		if i >= len(bits) {
			v, err := w.get()
			require.NoError(t, err)
			out += map[bool]string{false: "0", true: "1"}[v]
		}
	}
	require.NoError(t, w.set(true, false, false))
	require.NoError(t, w.set(false, false, false))
	return out
}

// Instructions, with the zero in front of the start bit that some need.
func instruction46(op, addr int) string { return fmt.Sprintf("01%02b%06b", op, addr) }

// copyOf is one of our chips with the content that a card has.
func copyOf(t *testing.T, r *register) *microwire.Chip {
	c, mem := chip(t, "93C46", nil)
	for word := range 64 {
		var v int
		_, err := fmt.Sscanf(clocks(t, r, instruction46(0b10, word), 16), "%b", &v)
		require.NoError(t, err)
		mem.Data[2*word], mem.Data[2*word+1] = byte(v), byte(v>>8)
	}
	require.NotEqual(t, chiptest.New(128).Data, mem.Data)
	return c
}

// What a driver does that goes by the data sheet, EWEN, ERASE, WRITE, READ, is
// the same on QEMU's network cards and on ours.
func TestQEMUAgrees(t *testing.T) {
	rng := rand.New(rand.NewPCG(imagetest.Seed(t), 0))
	for _, r := range cards() {
		t.Run(r.device, func(t *testing.T) {
			r.start(t)
			c := copyOf(t, r)
			both := func(bits string, n int) {
				require.Equal(t, clocks(t, r, bits, n), clocks(t, ours{c}, bits, n), bits)
			}
			both(instruction46(0b00, 0b110000), 0)
			n := imagetest.Scale(150)
			for range n {
				word, what := rng.IntN(64), rng.IntN(8)
				if r.reads {
					what = 7
				}
				switch what {
				case 0:
					both(instruction46(0b11, word), 0)
				case 1, 2:
					both(instruction46(0b11, word), 0) // older parts need it
					both(instruction46(0b01, word)+fmt.Sprintf("%016b", rng.IntN(1<<16)), 0)
				case 3:
					if rng.IntN(10) == 0 {
						both(instruction46(0b00, 0b100000), 0)
						both(instruction46(0b00, 0b010000)+fmt.Sprintf("%016b", rng.IntN(1<<16)), 0)
					}
				default:
					both(instruction46(0b10, word), 16)
				}
			}
			for word := range 64 {
				both(instruction46(0b10, word), 16)
			}
			t.Logf("%d instructions alike", n)
		})
	}
}

// Where QEMU's models and the data sheets differ, ours is with the data sheets.
// If one of these fails, QEMU has changed.
func TestQEMUDiffers(t *testing.T) {
	a, b := strings.Repeat("10", 8), strings.Repeat("1100", 4)
	and := strings.Repeat("1000", 4)
	write := func(word int, data string) string { return instruction46(0b01, word) + data }
	read := func(word int) string { return instruction46(0b10, word) }
	for _, r := range cards() {
		t.Run(r.device, func(t *testing.T) {
			r.start(t)
			c := copyOf(t, r)
			both := func(bits string, n int) (theirs, our string) {
				return clocks(t, r, bits, n), clocks(t, ours{c}, bits, n)
			}
			both(instruction46(0b00, 0b110000), 0)
			both(instruction46(0b11, 5), 0)
			both(instruction46(0b11, 6), 0)
			both(write(5, a), 0)
			both(write(6, a), 0)
			both(write(5, b), 0)
			theirs, our := both(read(5), 32)
			require.Equal(t, b+a, our)
			if r.reads {
				require.NotEqual(t, b, theirs[:16], "writes aren't stored")
				c := copyOf(t, r)
				require.Equal(t, r.on, clocks(t, r, read(62), 48) == clocks(t, ours{c}, read(62), 48), "reading on")
				return
			}
			require.Equal(t, and, theirs[:16], "a write clears bits, and sets none")
			require.NotEqual(t, a, theirs[16:], "a read ends with its word")
		})
	}
}
