// Package chassis packs and parses the one byte that a PCI bridge to an
// expansion chassis keeps: its Chassis Number register, the only non-volatile
// one of the Slot Numbering capability of the PCI-to-PCI Bridge Architecture
// Specification 1.2. In configuration space it is at byte 3 of the capability,
// whose ID is 0x04.
//
// The spec:
//
//	{
//	  "format": "chassis",
//	  "number": 3   // 1 to 255, different from other chassis's; 0 is that of the host
//	}
//
// The image may be larger, if it is a memory of which the first byte counts:
// "size", "fill" and "patches" say so.
package chassis

import (
	"errors"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/table"
)

// Name is the format's name in a spec.
const Name = "chassis"

// MaxSize is the most bytes an image may have: the smallest EEPROM there is has
// 128.
const MaxSize = 4096

var layout = &table.Layout{
	Size: 1, Min: 1, Fill: 0xff,
	Fields: []table.Field{{Name: "number", Off: 0, Len: 1, Kind: table.Dec(), Required: true, Doc: "1 to 255, different from other chassis's"}},
	Check:  check,
}

var format = table.New(table.Def{
	Name: Name, Title: "PCI chassis number", MaxSize: MaxSize, Layouts: []*table.Layout{layout},
	Pick: func(image []byte) (*table.Layout, error) {
		if len(image) == 0 {
			return nil, errors.New("is empty")
		}
		return layout, nil
	},
	Plain: func(*table.Layout, []byte, int) bool { return false }, // it could be any byte
})

// Format returns the format.
func Format() vpd.Format { return format }

func check(image []byte) []vpd.Problem {
	if image[0] != 0 {
		return nil
	}
	return []vpd.Problem{{Area: "number", Off: 0, Msg: "is 0, which is the chassis that the host is in; no bridge leads there"}}
}
