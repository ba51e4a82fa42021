// Package i2c models serial EEPROMs of the 24C family, 24C01 to 24CM02.
//
// A Chip is driven as the bus drives it: a start condition with the device
// address, bytes to and fro, a stop condition. An error is what the chip does
// with SDA in the ninth clock: nil is an acknowledge, and anything else is none.
// ErrNACK is the chip's own refusal; other errors are the memory's, for whoever
// runs the machine.
//
// What it does, after the data sheets of Atmel's AT24C16D, AT24C256C and
// AT24CM02 (DS20005858, DS20006042, DS20006197), sections on device addressing,
// write and read operations:
//
//   - A write loads a page. Its address wraps at the end of the page, and what
//     was loaded twice has the later byte. The stop condition begins the write
//     cycle, in which the chip answers to no address: that is how a guest polls.
//   - A write without data sets the address only; a start condition in its place
//     is a random read. A start condition after data drops what was loaded.
//   - Reads go on from the address counter, across pages, and from the last byte
//     to the first. The counter outlives stop conditions, and is 0 at power-on.
//     It counts behind what was written last, within that page.
//   - In the device address of a read, the bits that would be the memory's are
//     acknowledged and not loaded: the counter has them from the write before.
//   - While WP is high, data is acknowledged, and no write cycle begins.
package i2c

import (
	"errors"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/internal/array"
)

// ErrNACK: the chip doesn't acknowledge. It isn't addressed, or it is busy.
var ErrNACK = errors.New("no acknowledge")

// deviceType is the upper half of the device address, as of a 7-bit address.
const deviceType = 0x50

// Options say how a chip is wired. The zero value, and nil, are fine.
type Options struct {
	// Pins are the levels of A2, A1 and A0, 0 to 7. Those that the part has
	// no use for, because the memory's address takes their place, are 0.
	Pins byte

	// Async lets Stop return at once, and the chip be busy until the write is
	// durable. Without it, Stop waits for that.
	Async bool
}

// state is what the chip expects on the bus.
type state int

const (
	idle    state = iota // not addressed
	address              // bytes of the memory's address
	data                 // bytes to write
	reading              // to be read from
)

// A Chip is one EEPROM. Busy and Wait may be called by any goroutine; all else
// is for one at a time.
type Chip struct {
	part Part
	pins byte
	wp   bool
	mem  *array.Array

	state   state
	counter int64 // the address counter
	got     int   // bytes of the address
	addr    int64 // the address so far
	page    *array.Page
}

// New returns a chip at power-on. The memory must be as large as the part.
func New(part Part, mem eeprom.Memory, opts *Options) (*Chip, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	if err := part.check(&o); err != nil {
		return nil, err
	}
	a, err := array.New(part.Name, mem, part.Size, o.Async)
	if err != nil {
		return nil, err
	}
	return &Chip{part: part, pins: o.Pins, mem: a}, nil
}

// Part returns what the chip is.
func (c *Chip) Part() Part { return c.part }

// SetWP sets the level of the write protect pin, which is low at first. It
// counts at the stop condition.
func (c *Chip) SetWP(high bool) { c.wp = high }

// Start is a start condition, or a repeated one, with a device address of 7
// bits and the direction.
func (c *Chip) Start(device byte, read bool) error {
	if c.mem.Reverted() {
		c.reset()
	}
	// Only a stop condition lets a write begin.
	c.state, c.page = idle, nil
	block := device & c.part.blockMask()
	if device&^c.part.blockMask() != deviceType|c.pins || c.mem.Busy() {
		return ErrNACK
	}
	if read {
		c.state = reading
		return nil
	}
	c.state, c.got, c.addr = address, 0, int64(block)
	return nil
}

// WriteByte is a byte from the master.
func (c *Chip) WriteByte(b byte) error {
	switch c.state {
	case address:
		c.addr = c.addr<<8 | int64(b)
		if c.got++; c.got == c.part.AddressBytes {
			c.counter = c.addr & (c.part.Size - 1)
			c.state = data
		}
		return nil
	case data:
		if c.page == nil {
			c.page = array.NewPage(c.part.Page, c.counter)
		}
		c.page.Load(b)
		c.counter = c.page.Address()
		return nil
	default:
		return ErrNACK
	}
}

// ReadByte is a byte to the master, whether or not that acknowledges it. Where
// the chip doesn't drive the bus, the byte is 0xFF, and the error ErrNACK; where
// its memory can't be read, it is 0xFF, too.
func (c *Chip) ReadByte() (byte, error) {
	if c.state != reading {
		return 0xff, ErrNACK
	}
	b, err := c.mem.Byte(c.counter)
	c.counter = (c.counter + 1) & (c.part.Size - 1)
	return b, err
}

// Stop is a stop condition, which begins the write cycle if data was loaded.
// Unless the chip is asynchronous, it returns when the data is durable, or with
// the error of the commit. After an error other than ErrReverted the chip stays
// busy until PowerCycle.
func (c *Chip) Stop() error {
	page := c.page
	c.state, c.page = idle, nil
	if page == nil || c.wp {
		return nil
	}
	return c.mem.WritePage(page)
}

// Busy tells whether the chip is in a write cycle, or stuck in one that failed.
func (c *Chip) Busy() bool { return c.mem.Busy() }

// Wait waits for the end of the write cycle, and returns the error of the last.
func (c *Chip) Wait() error { return c.mem.Wait() }

// PowerCycle switches the chip off, after its write cycle, and on again.
func (c *Chip) PowerCycle() {
	c.mem.PowerCycle()
	c.reset()
}

func (c *Chip) reset() { c.state, c.counter, c.page = idle, 0, nil }
