package i2c

import (
	"fmt"
	"math/bits"
	"strings"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/internal/array"
)

// A Part says how a chip of the 24C family is organised. Sizes are powers of
// two. Address bits that AddressBytes have no place for come in the device
// address, in its lowest bits: A16 of a 24CM01, A8 to A10 of a 24C16.
type Part struct {
	Name         string
	Size         int64 // bytes, at most 256 KiB
	Page         int   // bytes that one write cycle writes at most
	AddressBytes int   // 1 or 2
}

// Page sizes are Atmel's (AT24C01D to AT24C16D, AT24C32E, AT24C64D, AT24C128C,
// AT24C256C, AT24C512C, AT24CM01, AT24CM02); some of other vendors' differ.
var parts = []Part{
	{"24C01", 128, 8, 1},
	{"24C02", 256, 8, 1},
	{"24C04", 512, 16, 1},
	{"24C08", 1 << 10, 16, 1},
	{"24C16", 2 << 10, 16, 1},
	{"24C32", 4 << 10, 32, 2},
	{"24C64", 8 << 10, 32, 2},
	{"24C128", 16 << 10, 64, 2},
	{"24C256", 32 << 10, 64, 2},
	{"24C512", 64 << 10, 128, 2},
	{"24CM01", 128 << 10, 256, 2},
	{"24CM02", 256 << 10, 256, 2},
}

// Parts returns the chips that Find knows, small ones first.
func Parts() []Part { return append([]Part(nil), parts...) }

// Find returns a chip by its name, such as "24C256". Case doesn't matter.
func Find(name string) (Part, error) {
	for _, p := range parts {
		if strings.EqualFold(p.Name, name) {
			return p, nil
		}
	}
	return Part{}, fmt.Errorf("%w: no I2C EEPROM %q", eeprom.ErrInvalid, name)
}

// blockBits are the bits of the memory's address that the device address has.
func (p *Part) blockBits() int {
	return max(0, bits.Len64(uint64(p.Size-1))-8*p.AddressBytes)
}

func (p *Part) check(o *Options) error {
	if err := array.CheckPart(p.Name, p.Size, p.Page); err != nil {
		return err
	}
	if p.AddressBytes != 1 && p.AddressBytes != 2 || p.blockBits() > 3 {
		return fmt.Errorf("%w: part %q of %d bytes with %d address bytes", eeprom.ErrInvalid, p.Name, p.Size, p.AddressBytes)
	}
	if o.Pins > 7 || o.Pins&p.blockMask() != 0 {
		return fmt.Errorf("%w: pins A2 to A0 of part %q can't be %03b", eeprom.ErrInvalid, p.Name, o.Pins)
	}
	return nil
}

// blockMask has those bits of the device address that are the memory's.
func (p *Part) blockMask() byte { return byte(1)<<p.blockBits() - 1 }
