package microwire

import (
	"fmt"
	"strings"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/internal/array"
)

// A Part says how a chip of the 93C family is organised.
type Part struct {
	Name        string
	Size        int64 // bytes, a power of two
	AddressBits int   // in instructions for words of 16 bits; those for bytes have one more
}

// The 93C56 and 93C76 have the instructions of the chip twice their size, with
// an address bit that they don't look at.
var parts = []Part{
	{"93C46", 128, 6},
	{"93C56", 256, 8},
	{"93C66", 512, 8},
	{"93C76", 1 << 10, 10},
	{"93C86", 2 << 10, 10},
}

// Parts returns the chips that Find knows, small ones first.
func Parts() []Part { return append([]Part(nil), parts...) }

// Find returns a chip by its name, such as "93C46". Case doesn't matter.
func Find(name string) (Part, error) {
	for _, p := range parts {
		if strings.EqualFold(p.Name, name) {
			return p, nil
		}
	}
	return Part{}, fmt.Errorf("%w: no Microwire EEPROM %q", eeprom.ErrInvalid, name)
}

func (p *Part) check(o *Options) error {
	if err := array.CheckPart(p.Name, p.Size, 2); err != nil {
		return err
	}
	if p.AddressBits < 2 || p.AddressBits > 16 || int64(2)<<p.AddressBits < p.Size {
		return fmt.Errorf("%w: part %q of %d bytes with %d address bits", eeprom.ErrInvalid, p.Name, p.Size, p.AddressBits)
	}
	if o.Bits != 0 && o.Bits != 8 && o.Bits != 16 {
		return fmt.Errorf("%w: part %q with words of %d bits; 8 or 16", eeprom.ErrInvalid, p.Name, o.Bits)
	}
	return nil
}
