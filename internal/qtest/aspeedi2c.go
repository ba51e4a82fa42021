package qtest

import "fmt"

// The I2C controller of ASPEED's AST2600 has a register file of 128 bytes for
// each of its 16 buses; in the mode that it begins in, the registers are those
// of the AST2500.
const (
	aspeedI2C       = 0x1e78a000
	aspeedBus0      = 0x80
	aspeedBusSize   = 0x80
	regControl      = 0x00
	regInterrupt    = 0x0c // what has raised one
	regIntrStatus   = 0x10
	regCommand      = 0x14
	regByte         = 0x20
	controlMaster   = 1
	statusTxAck     = 1 << 0
	statusTxNak     = 1 << 1
	statusRxDone    = 1 << 2
	commandStart    = 1 << 0
	commandTx       = 1 << 1
	commandRx       = 1 << 3
	commandLastNack = 1 << 4
	commandStop     = 1 << 5
)

// AspeedI2C is a bus of an AST2600.
type AspeedI2C struct {
	m    *Machine
	base uint64
}

// AspeedI2C returns a bus, 0 to 15, as its master.
func (m *Machine) AspeedI2C(bus int) (*AspeedI2C, error) {
	b := &AspeedI2C{m, aspeedI2C + aspeedBus0 + uint64(bus)*aspeedBusSize}
	if err := b.set(regControl, controlMaster); err != nil {
		return nil, err
	}
	return b, b.set(regInterrupt, 0xffffffff)
}

func (b *AspeedI2C) set(reg, v uint64) error { return b.m.Write(32, b.base+reg, v) }

// command runs a command and returns what status it raised.
func (b *AspeedI2C) command(c uint64) (uint64, error) {
	if err := b.set(regIntrStatus, 0xffffffff); err != nil {
		return 0, err
	}
	if err := b.set(regCommand, c); err != nil {
		return 0, err
	}
	return b.m.Read(32, b.base+regIntrStatus)
}

func (b *AspeedI2C) send(c uint64, v byte) error {
	ack, err := b.Send(c, v)
	if err == nil && !ack {
		err = fmt.Errorf("no acknowledge of I2C byte %#02x", v)
	}
	return err
}

func (b *AspeedI2C) stop() error {
	_, err := b.command(commandStop)
	return err
}

// Write sends bytes to a device, between a start and a stop.
func (b *AspeedI2C) Write(addr byte, p []byte) error {
	if err := b.write(addr, p); err != nil {
		b.stop()
		return err
	}
	return b.stop()
}

func (b *AspeedI2C) write(addr byte, p []byte) error {
	if err := b.send(commandStart, addr<<1); err != nil {
		return err
	}
	for _, v := range p {
		if err := b.send(0, v); err != nil {
			return err
		}
	}
	return nil
}

// Read sends bytes to a device, such as an address in its memory, and reads n
// bytes behind a repeated start.
func (b *AspeedI2C) Read(addr byte, p []byte, n int) ([]byte, error) {
	out, err := b.read(addr, p, n)
	if serr := b.stop(); err == nil && serr != nil {
		return nil, serr
	}
	return out, err
}

func (b *AspeedI2C) read(addr byte, p []byte, n int) ([]byte, error) {
	if err := b.write(addr, p); err != nil {
		return nil, err
	}
	if err := b.send(commandStart, addr<<1|1); err != nil {
		return nil, err
	}
	out := make([]byte, n)
	for i := range out {
		v, err := b.Receive(i == n-1)
		if err != nil {
			return nil, err
		}
		out[i] = v
	}
	return out, nil
}

// Start is a start condition, or a repeated one, with a device address and the
// direction; ack tells whether the device answered.
func (b *AspeedI2C) Start(addr byte, read bool) (ack bool, err error) {
	v := addr << 1
	if read {
		v |= 1
	}
	return b.Send(commandStart, v)
}

// Send sends a byte, with flags of the command register (0: none); ack tells
// whether the device acknowledged it.
func (b *AspeedI2C) Send(flags uint64, v byte) (ack bool, err error) {
	if err := b.set(regByte, uint64(v)); err != nil {
		return false, err
	}
	status, err := b.command(flags | commandTx)
	return status&statusTxNak == 0, err
}

// Receive takes a byte, and acknowledges it unless it is the last.
func (b *AspeedI2C) Receive(last bool) (byte, error) {
	c := uint64(commandRx)
	if last {
		c |= commandLastNack
	}
	if _, err := b.command(c); err != nil {
		return 0, err
	}
	v, err := b.m.Read(32, b.base+regByte)
	return byte(v >> 8), err
}

// Stop is a stop condition.
func (b *AspeedI2C) Stop() error { return b.stop() }

// EEPROM reads n bytes from the start of an EEPROM, of which addrSize bytes
// are the address, 1 or 2.
func (b *AspeedI2C) EEPROM(addr byte, addrSize, n int) ([]byte, error) {
	return b.Read(addr, make([]byte, addrSize), n)
}
