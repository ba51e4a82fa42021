// Package microwire models serial EEPROMs of the 93C family, 93C46 to 93C86,
// with words of 8 or 16 bits.
//
// A Chip is driven by its pins, a level at a time (Drive and DO), or by whole
// numbers of clocks (Select, Shift, Deselect), for controllers that have a shift
// register.
//
// What it does, after Microchip's 93LC46/56/66 (DS21712), 93XX46A/B/C
// (DS20001749) and 93XX46X to 93XX86X (DS21929):
//
//   - The first clock with CS and DI high is the start bit. Two bits of opcode
//     and the address follow; all is taken at the rising edge of CLK.
//   - READ: DO is 0 from the last bit of the address on, the dummy bit; the next
//     rising edges bring data, most significant bit first, and go on with the
//     words behind, from the last to the first.
//   - WRITE, WRAL, ERASE and ERAL are carried out by the falling edge of CS, if
//     all bits were clocked in, and EWEN came before. More clocks do nothing.
//     They erase what they write.
//   - In the write cycle no instruction is taken, and DO is 0 while CS is high.
//   - EWEN and EWDS count from their last bit on. At power-on writes are disabled.
//
// A DO that nobody drives reads as 1: the model has the pull-up in it. The
// PE and ORG pins of the larger parts are tied: PE high, ORG as Options.Bits.
package microwire

import (
	"fmt"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/internal/array"
)

// Options say how a chip is wired. The zero value, and nil, are fine.
type Options struct {
	// Bits of a word, 8 or 16 (the ORG pin); 0 is 16.
	Bits int

	// BigEndian has the upper half of a word of 16 bits in the first of its
	// two bytes. By default it is in the second, as ethtool and the images of
	// network cards have it.
	BigEndian bool

	// Async lets the falling edge of CS return at once, and the chip be busy
	// until the write is durable. Without it, that waits.
	Async bool
}

// Opcodes, and those that two address bits tell apart.
const (
	opExtended = 0b00
	opWrite    = 0b01
	opRead     = 0b10
	opErase    = 0b11

	extEWDS = 0b00
	extWRAL = 0b01
	extERAL = 0b10
	extEWEN = 0b11
)

// A Chip is one EEPROM. Busy and Wait may be called by any goroutine; all else
// is for one at a time.
type Chip struct {
	part      Part
	bits      int
	bigEndian bool
	mem       *array.Array

	cs, clk bool
	do      bool
	enabled bool // by EWEN

	// The instruction that comes in.
	started bool
	got     int    // bits behind the start bit
	op      uint32 // opcode and address
	data    uint32 // what to write, or what to read from
	word    int64  // that is being read
	left    int    // bits of data to be read
}

// New returns a chip at power-on, with all inputs low. The memory must be as
// large as the part.
func New(part Part, mem eeprom.Memory, opts *Options) (*Chip, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	if err := part.check(&o); err != nil {
		return nil, err
	}
	if o.Bits == 0 {
		o.Bits = 16
	}
	a, err := array.New(part.Name, mem, part.Size, o.Async)
	if err != nil {
		return nil, err
	}
	return &Chip{part: part, bits: o.Bits, bigEndian: o.BigEndian, mem: a, do: true}, nil
}

// Part returns what the chip is.
func (c *Chip) Part() Part { return c.part }

func (c *Chip) addressBits() int {
	if c.bits == 8 {
		return c.part.AddressBits + 1
	}
	return c.part.AddressBits
}

// Drive sets the levels of CS, CLK and DI. Unless the chip is asynchronous, the
// edge of CS that begins a write cycle returns when the write is durable, or
// with the error of the commit; after one other than ErrReverted the chip stays
// busy until PowerCycle. An error of the edge of CLK is one of reading: the chip
// then drives ones.
func (c *Chip) Drive(cs, clk, di bool) (err error) {
	switch {
	case cs && !c.cs:
		if c.mem.Reverted() {
			c.enabled = false
		}
		c.idle()
	case !cs && c.cs:
		err = c.program()
		c.idle()
	}
	rising := clk && !c.clk
	c.cs, c.clk = cs, clk
	if cs && rising && !c.mem.Busy() {
		err = c.clock(di)
	}
	return err
}

// DO returns the level of DO, 1 where the chip doesn't drive it.
func (c *Chip) DO() bool { return c.do && !(c.cs && c.mem.Busy()) }

// idle waits for a start bit.
func (c *Chip) idle() {
	c.started, c.do, c.got, c.op, c.data, c.left = false, true, 0, 0, 0, 0
}

// clock is a rising edge of CLK.
func (c *Chip) clock(di bool) error {
	bit := uint32(0)
	if di {
		bit = 1
	}
	head := 2 + c.addressBits()
	switch {
	case !c.started:
		c.started = di
		return nil
	case c.got < head:
		c.op = c.op<<1 | bit
		if c.got++; c.got == head {
			c.decode()
		}
	case c.opcode() == opRead:
		return c.shiftOut()
	case c.got < head+c.bits:
		c.data = c.data<<1 | bit
		c.got++
	}
	return nil
}

func (c *Chip) opcode() uint32 { return c.op >> c.addressBits() }

// extended is what an instruction with opcode 00 is.
func (c *Chip) extended() uint32 { return c.op >> (c.addressBits() - 2) & 3 }

// address is that of the instruction's word.
func (c *Chip) address() int64 {
	return int64(c.op&(1<<c.addressBits()-1)) & (c.words() - 1)
}

func (c *Chip) words() int64 { return c.part.Size * 8 / int64(c.bits) }

// decode does what the last bit of the address does.
func (c *Chip) decode() {
	switch c.opcode() {
	case opRead:
		c.do, c.word, c.left = false, c.address(), 0
	case opExtended:
		switch c.extended() {
		case extEWEN:
			c.enabled = true
		case extEWDS:
			c.enabled = false
		}
	}
}

// shiftOut brings the next bit of what is read.
func (c *Chip) shiftOut() (err error) {
	if c.left == 0 {
		if c.data, err = c.load(c.word); err != nil {
			c.data = 0xffff
		}
		c.word = (c.word + 1) & (c.words() - 1)
		c.left = c.bits
	}
	c.left--
	c.do = c.data>>c.left&1 != 0
	return err
}

// load reads a word from memory.
func (c *Chip) load(word int64) (uint32, error) {
	if c.bits == 8 {
		b, err := c.mem.Byte(word)
		return uint32(b), err
	}
	first, err := c.mem.Byte(2 * word)
	if err != nil {
		return 0, err
	}
	second, err := c.mem.Byte(2*word + 1)
	if err != nil {
		return 0, err
	}
	if c.bigEndian {
		first, second = second, first
	}
	return uint32(first) | uint32(second)<<8, nil
}

// unit is a word as memory has it.
func (c *Chip) unit(v uint32) []byte {
	switch {
	case c.bits == 8:
		return []byte{byte(v)}
	case c.bigEndian:
		return []byte{byte(v >> 8), byte(v)}
	default:
		return []byte{byte(v), byte(v >> 8)}
	}
}

// program carries out an instruction that writes, if it is whole.
func (c *Chip) program() error {
	head := 2 + c.addressBits()
	if !c.enabled || c.got < head {
		return nil
	}
	all, full := ^uint32(0), c.got == head+c.bits
	off := c.address() * int64(c.bits/8)
	switch op := c.opcode(); {
	case op == opErase:
		return c.mem.Write(c.unit(all), off)
	case op == opWrite && full:
		return c.mem.Write(c.unit(c.data), off)
	case op == opExtended && c.extended() == extERAL:
		return c.mem.Fill(c.unit(all))
	case op == opExtended && c.extended() == extWRAL && full:
		return c.mem.Fill(c.unit(c.data))
	}
	return nil
}

// Select raises CS.
func (c *Chip) Select() error { return c.Drive(true, false, false) }

// Shift clocks the n lowest bits of out in, most significant first, and returns
// DO behind each rising edge; n is 0 to 32. It needs Select before it.
func (c *Chip) Shift(out uint32, n int) (in uint32, err error) {
	if n < 0 || n > 32 {
		return 0, fmt.Errorf("%w: %d clocks at once; 0 to 32", eeprom.ErrInvalid, n)
	}
	for i := n - 1; i >= 0; i-- {
		di := out>>i&1 != 0
		if e := c.Drive(c.cs, true, di); e != nil && err == nil {
			err = e
		}
		in <<= 1
		if c.DO() {
			in |= 1
		}
		_ = c.Drive(c.cs, false, di) // a falling edge does nothing
	}
	return in, err
}

// Deselect lowers CS, which begins the write cycle, as in Drive.
func (c *Chip) Deselect() error { return c.Drive(false, false, false) }

// Busy tells whether the chip is in a write cycle, or stuck in one that failed.
func (c *Chip) Busy() bool { return c.mem.Busy() }

// Wait waits for the end of the write cycle, and returns the error of the last.
func (c *Chip) Wait() error { return c.mem.Wait() }

// PowerCycle switches the chip off, after its write cycle, and on again, with
// all inputs low.
func (c *Chip) PowerCycle() {
	c.mem.PowerCycle()
	c.enabled, c.cs, c.clk = false, false, false
	c.idle()
}
