// Package spi models serial EEPROMs of the 25 family, 25010 to 25M02.
//
// A Chip is driven as a controller drives it: Select, bytes that go in while
// others come out, Deselect.
//
// What it does, after Microchip's 25AA040A (DS21827), Atmel's AT25010B to
// AT25040B (8707) and AT25128B/AT25256B (DS20006193), and ST's M95256 for what
// those leave open:
//
//   - WREN and WRDI count when CS rises behind them. The write enable latch, WEL,
//     is also reset by power-on, and by the end of a write cycle.
//   - WRITE loads a page; the address wraps at its end. CS rising begins the
//     write cycle, unless the page is protected or WEL isn't set; WEL then stays
//     as it is.
//   - WRSR changes BP0, BP1 and WPEN, with one byte of data and the same cycle.
//   - In a write cycle the chip takes RDSR only, in which WIP is 1, and so is WEL.
//     RDSR can be read on and on, and shows the end of the cycle.
//   - READ goes on across pages, and from the last byte to the first.
//   - BP1 and BP0 protect nothing, the upper quarter, the upper half, or all.
//     While WP is low, status registers with WPEN can't be written if WPEN is
//     set; parts without WPEN can't be written at all.
//
// The non-volatile bits of the status register are kept with the memory. SO that
// nobody drives reads as 0xFF.
package spi

import (
	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/internal/array"
)

// Instructions. On parts that have a bit of the address in it, bit 3 of others
// doesn't matter.
const (
	opWRSR  = 0x01
	opWRITE = 0x02
	opREAD  = 0x03
	opWRDI  = 0x04
	opRDSR  = 0x05
	opWREN  = 0x06

	bitHigh = 0x08 // the highest bit of the address
)

// Bits of the status register.
const (
	StatusWIP  = 0x01 // a write cycle runs
	StatusWEL  = 0x02 // writes are enabled
	StatusBP0  = 0x04 // with BP1: how much is protected
	StatusBP1  = 0x08
	StatusWPEN = 0x80 // the WP pin protects the status register
)

// Memory is the array of a chip, and the non-volatile bits of its status
// register. An eeprom.Blob is one.
type Memory interface {
	eeprom.Memory

	// Status returns the non-volatile bits of the status register.
	Status() (byte, error)

	// SetStatus commits them, under the rules of eeprom.Memory's Commit.
	SetStatus(status byte, epoch int64) error
}

var _ Memory = (*eeprom.Blob)(nil)

// Options say how a chip is wired. The zero value, and nil, are fine.
type Options struct {
	// Async lets Deselect return at once, and the chip be busy until the
	// write is durable. Without it, Deselect waits for that.
	Async bool
}

// A Chip is one EEPROM. Busy and Wait may be called by any goroutine; all else
// is for one at a time.
type Chip struct {
	part Part
	mem  *array.Array
	nv   Memory
	low  bool // the level of WP

	wel     bool
	writing bool // a write cycle began, and its end wasn't looked at yet

	// The instruction that comes in.
	selected bool
	got      int64 // bytes
	op       byte
	addr     int64
	data     byte // of WRSR
	page     *array.Page
}

// New returns a chip at power-on, not selected, with WP high. The memory must be
// as large as the part.
func New(part Part, mem Memory, opts *Options) (*Chip, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	if err := part.check(); err != nil {
		return nil, err
	}
	var m eeprom.Memory
	if mem != nil {
		m = mem
	}
	a, err := array.New(part.Name, m, part.Size, o.Async)
	if err != nil {
		return nil, err
	}
	if _, err := mem.Status(); err != nil {
		return nil, err
	}
	return &Chip{part: part, mem: a, nv: mem}, nil
}

// Part returns what the chip is.
func (c *Chip) Part() Part { return c.part }

// SetWP sets the level of the write protect pin, which is high at first. It
// counts when CS rises.
func (c *Chip) SetWP(high bool) { c.low = !high }

// Select lowers CS.
func (c *Chip) Select() {
	if c.selected {
		return
	}
	if c.mem.Reverted() {
		c.wel = false
	}
	c.selected, c.got, c.op, c.addr, c.page = true, 0, 0, 0, nil
}

// Transfer is eight clocks: si goes in, and what it returns comes out. An error
// is the memory's; the byte is then 0xFF, as where the chip drives nothing.
func (c *Chip) Transfer(si byte) (so byte, err error) {
	if !c.selected {
		return 0xff, nil
	}
	at := c.got
	c.got++
	if at == 0 {
		c.instruction(si)
		return 0xff, nil
	}
	switch c.op {
	case opRDSR:
		return c.status()
	case opWRSR:
		c.data = si
	case opREAD, opWRITE:
		if at <= int64(c.part.AddressBytes) {
			c.addr = c.addr<<8 | int64(si)
			return 0xff, nil
		}
		c.addr &= c.part.Size - 1
		if c.op == opREAD {
			so, err = c.mem.Byte(c.addr)
			c.addr++
			return so, err
		}
		if c.page == nil {
			c.page = array.NewPage(c.part.Page, c.addr)
		}
		c.page.Load(si)
	}
	return 0xff, nil
}

// instruction takes the first byte. One that the chip doesn't take now is 0.
func (c *Chip) instruction(b byte) {
	if c.part.AddressBytes == 1 {
		// The data sheets of small parts have that bit as "don't care"
		// where it is no address.
		if c.part.highBit() && b&bitHigh != 0 {
			c.addr = 1
		}
		b &^= bitHigh
	}
	if b != opRDSR && c.busy() {
		b = 0
	}
	c.op = b
}

// busy tells whether a write cycle runs. The end of one resets WEL.
func (c *Chip) busy() bool {
	busy := c.mem.Busy()
	if c.writing && !busy {
		c.writing, c.wel = false, false
	}
	return busy
}

// bits are the bits of the status register that the part keeps.
func (c *Chip) bits() byte {
	if c.part.WPEN {
		return StatusBP0 | StatusBP1 | StatusWPEN
	}
	return StatusBP0 | StatusBP1
}

func (c *Chip) status() (byte, error) {
	busy := c.busy()
	v, err := c.nv.Status()
	if err != nil {
		return 0xff, err
	}
	v &= c.bits()
	if busy {
		v |= StatusWIP
	}
	if c.wel {
		v |= StatusWEL
	}
	return v, nil
}

// Deselect raises CS, which carries out what was loaded. Unless the chip is
// asynchronous, it returns when a write is durable, or with the error of the
// commit. After one other than ErrReverted the chip stays busy until PowerCycle.
func (c *Chip) Deselect() error {
	if !c.selected {
		return nil
	}
	c.selected = false
	page := c.page
	c.page = nil
	switch {
	case c.op == opWREN && c.got == 1:
		c.wel = !c.low || c.part.WPEN
	case c.op == opWRDI && c.got == 1:
		c.wel = false
	case c.op == opWRSR && c.got == 2 && c.wel:
		return c.writeStatus()
	case page != nil && c.wel:
		return c.write(page)
	}
	return nil
}

func (c *Chip) writeStatus() error {
	old, err := c.nv.Status()
	if err != nil {
		return err
	}
	if c.low && (!c.part.WPEN || old&StatusWPEN != 0) {
		return nil
	}
	v := c.data & c.bits()
	return c.cycle(func() error {
		return c.mem.Run(func(epoch int64) error { return c.nv.SetStatus(v, epoch) })
	})
}

func (c *Chip) write(page *array.Page) error {
	status, err := c.nv.Status()
	if err != nil {
		return err
	}
	if page.Address() >= c.protectedFrom(status) || c.low && !c.part.WPEN {
		return nil
	}
	return c.cycle(func() error { return c.mem.WritePage(page) })
}

// protectedFrom is the first address that BP1 and BP0 protect.
func (c *Chip) protectedFrom(status byte) int64 {
	switch status & (StatusBP0 | StatusBP1) {
	case 0:
		return c.part.Size
	case StatusBP0:
		return c.part.Size / 4 * 3
	case StatusBP1:
		return c.part.Size / 2
	default:
		return 0
	}
}

func (c *Chip) cycle(run func() error) error {
	c.writing = true
	err := run()
	c.busy()
	return err
}

// Busy tells whether the chip is in a write cycle, or stuck in one that failed.
func (c *Chip) Busy() bool { return c.mem.Busy() }

// Wait waits for the end of the write cycle, and returns the error of the last.
func (c *Chip) Wait() error { return c.mem.Wait() }

// PowerCycle switches the chip off, after its write cycle, and on again, not
// selected.
func (c *Chip) PowerCycle() {
	c.mem.PowerCycle()
	c.wel, c.writing, c.selected, c.page = false, false, false, nil
}
