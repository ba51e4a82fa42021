package spi

import (
	"fmt"
	"strings"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/internal/array"
)

// A Part says how a chip of the 25 family is organised. Sizes are powers of two.
// Where AddressBytes have no place for the highest bit of the address, it is bit
// 3 of the instruction: A8 of a 25040.
type Part struct {
	Name         string
	Size         int64 // bytes
	Page         int   // bytes that one write cycle writes at most
	AddressBytes int   // 1 to 3
	WPEN         bool  // the status register has the bit WPEN, without which WP protects all
}

// Page sizes are Atmel's (AT25010B to AT25040B, AT25080B, AT25160B, AT25320B,
// AT25640B, AT25128B, AT25256B, AT25512, AT25M01, AT25M02); some of other
// vendors' differ.
var parts = []Part{
	{"25010", 128, 8, 1, false},
	{"25020", 256, 8, 1, false},
	{"25040", 512, 8, 1, false},
	{"25080", 1 << 10, 32, 2, true},
	{"25160", 2 << 10, 32, 2, true},
	{"25320", 4 << 10, 32, 2, true},
	{"25640", 8 << 10, 32, 2, true},
	{"25128", 16 << 10, 64, 2, true},
	{"25256", 32 << 10, 64, 2, true},
	{"25512", 64 << 10, 128, 2, true},
	{"25M01", 128 << 10, 256, 3, true},
	{"25M02", 256 << 10, 256, 3, true},
}

// Parts returns the chips that Find knows, small ones first.
func Parts() []Part { return append([]Part(nil), parts...) }

// Find returns a chip by its name, such as "25256". Case doesn't matter.
func Find(name string) (Part, error) {
	for _, p := range parts {
		if strings.EqualFold(p.Name, name) {
			return p, nil
		}
	}
	return Part{}, fmt.Errorf("%w: no SPI EEPROM %q", eeprom.ErrInvalid, name)
}

// highBit tells whether the instruction has the highest bit of the address.
func (p *Part) highBit() bool { return p.Size > int64(1)<<(8*p.AddressBytes) }

func (p *Part) check() error {
	if err := array.CheckPart(p.Name, p.Size, p.Page); err != nil {
		return err
	}
	if p.AddressBytes < 1 || p.AddressBytes > 3 || p.Size > int64(2)<<(8*p.AddressBytes) {
		return fmt.Errorf("%w: part %q of %d bytes with %d address bytes", eeprom.ErrInvalid, p.Name, p.Size, p.AddressBytes)
	}
	return nil
}
