// Package sfp packs and parses the EEPROMs of pluggable transceivers and
// cables, as ethtool -m dumps them.
//
//	type      standard                                     image                                  check codes
//	sff8472   SFF-8472: SFP, SFP+, SFP28                   A0h (256 bytes), and A2h behind it     0-62 → 63, 64-94 → 95; of A2h 0-94 → 95
//	sff8636   SFF-8636, SFF-8436: QSFP, QSFP+, QSFP28      lower page, page 00h, and 01h to 03h   128-190 → 191, 192-222 → 223
//
// A check code is the lower eight bits of the sum of the bytes, so that it does
// not make the sum zero. That of A2h is there if bit 6 of byte 92 says that
// the module has diagnostics.
//
// The spec:
//
//	{
//	  "format": "sfp",
//	  "type": "sff8472",
//	  "connector": "0x07",               // codes of SFF-8024
//	  "vendor_name": "...", "vendor_oui": "00:17:6a", "vendor_pn": "...", "vendor_rev": "A", "vendor_sn": "...",
//	  "date_code": "24021300",           // year, month, day, lot
//	  "wavelength": 1310,                // nm
//	  "a2": {"temp_high_alarm": "0x5a00"},   // of 1/256 degree Celsius; other units are in the schema
//	  "patches": [{"offset": "0x60", "type": "hex", "data": "..."}],   // what has no name
//	  "size": 512                        // of a module without "a2", if it isn't 256
//	}
//
// Fields lie over patches. Check codes are computed; "cc_base" in a spec is a
// wrong one.
package sfp

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
	"nvstore.dev/vpd/internal/table"
)

// Name is the format's name in a spec.
const Name = "sfp"

// MaxSize is the most bytes an image may have: A2h has pages that can be
// chosen, and dumps of them are as long as one likes.
const MaxSize = 16 << 10

var format = table.New(table.Def{
	Name: Name, Title: "Transceiver module EEPROM", Member: "type", MaxSize: MaxSize,
	Layouts: []*table.Layout{sff8472, sff8636}, Pick: pick, Plain: plain,
})

// Format returns the format.
func Format() vpd.Format { return format }

func pick(image []byte) (*table.Layout, error) {
	if len(image) == 0 {
		return nil, errors.New("is empty")
	}
	switch image[0] {
	case idGBIC, idSoldered, idSFP, idDWDMSFP:
		return sff8472, nil
	case idQSFP, idQSFPPlus, idQSFP28:
		return sff8636, nil
	}
	return nil, fmt.Errorf("byte 0 is %s, which is no SFP (0x03) or QSFP (0x0c, 0x0d, 0x11)", spec.Byte(image[0]))
}

// plain wants a name or a part number as the standards have them; both, if a
// check code is wrong.
func plain(l *table.Layout, image []byte, wrong int) bool {
	name, number := l.Has(image, "vendor_name"), l.Has(image, "vendor_pn")
	return wrong == 0 && (name || number) || wrong == 1 && name && number
}

// checkCode is CC_BASE and the like, right behind what it covers.
func checkCode(name string, from, to int) table.Sum {
	return table.Sum{Name: name, Title: "check code", Off: to, Len: 1, From: from, To: to, Of: func(b []byte) uint64 {
		var sum byte
		for _, c := range b {
			sum += c
		}
		return uint64(sum)
	}}
}

// Identifiers of SFF-8024, table 4-1.
const (
	idGBIC     = 0x01
	idSoldered = 0x02
	idSFP      = 0x03
	idDWDMSFP  = 0x0b
	idQSFP     = 0x0c
	idQSFPPlus = 0x0d
	idQSFP28   = 0x11
)

var identifiers = map[byte]string{
	idGBIC: "GBIC", idSoldered: "soldered to the motherboard", idSFP: "SFP", idDWDMSFP: "DWDM-SFP", idQSFP: "QSFP", idQSFPPlus: "QSFP+", idQSFP28: "QSFP28",
}

// connectors of SFF-8024, table 4-3.
var connectors = map[byte]string{
	0x01: "SC", 0x02: "Fibre Channel style 1 copper", 0x03: "Fibre Channel style 2 copper", 0x04: "BNC/TNC", 0x05: "Fibre Channel coax",
	0x06: "Fiber Jack", 0x07: "LC", 0x08: "MT-RJ", 0x09: "MU", 0x0a: "SG", 0x0b: "optical pigtail", 0x0c: "MPO 1x12", 0x0d: "MPO 2x16",
	0x20: "HSSDC II", 0x21: "copper pigtail", 0x22: "RJ45", 0x23: "no separable connector", 0x24: "MXC 2x16",
}

func hexes(prefix string, off int, names ...string) (list []table.Field) {
	for i, name := range names {
		if name != "" {
			list = append(list, table.Field{Name: prefix + name, Off: off + i, Len: 1, Kind: table.Hex()})
		}
	}
	return list
}

// counts are bytes one after another that are numbers of something, as their
// doc says.
func counts(off int, namesAndDocs ...string) (list []table.Field) {
	for i := 0; i < len(namesAndDocs); i += 2 {
		list = append(list, table.Field{Name: namesAndDocs[i], Off: off + i/2, Len: 1, Kind: table.Dec(), Doc: namesAndDocs[i+1]})
	}
	return list
}

func text(name string, off, n int) table.Field {
	return table.Field{Name: name, Off: off, Len: n, Kind: table.Text(' ')}
}

func meaning(fd table.Field, names map[byte]string) table.Field {
	fd.Meaning = func(b []byte) string { return names[b[0]] }
	return fd
}

// A unit is what a 16-bit value counts.
type unit struct {
	doc   string
	shown func(v uint16) string
}

var (
	celsius  = unit{"Signed, of 1/256 degree Celsius", func(v uint16) string { return fmt.Sprintf("%.2f C", float64(int16(v))/256) }}
	voltage  = unit{"Of 100 uV", func(v uint16) string { return fmt.Sprintf("%.4f V", float64(v)/10000) }}
	current  = unit{"Of 2 uA", func(v uint16) string { return fmt.Sprintf("%.3f mA", float64(v)/500) }}
	power    = unit{"Of 0.1 uW", func(v uint16) string { return fmt.Sprintf("%.4f mW", float64(v)/10000) }}
	unitless = unit{"", func(uint16) string { return "" }}
)

// values are big-endian words one after another, of one unit.
func values(prefix string, off int, u unit, names ...string) (list []table.Field) {
	for i, name := range names {
		list = append(list, table.Field{Name: prefix + name, Off: off + 2*i, Len: 2, Kind: table.HexBE(), Doc: u.doc,
			Meaning: func(b []byte) string { return u.shown(uint16(b[0])<<8 | uint16(b[1])) }})
	}
	return list
}

// thresholds are alarm and warning limits of a quantity.
func thresholds(prefix, what string, off int, u unit) []table.Field {
	return values(prefix, off, u, what+"_high_alarm", what+"_low_alarm", what+"_high_warning", what+"_low_warning")
}

// floats are IEEE 754 numbers, big-endian.
func floats(prefix string, off int, names ...string) (list []table.Field) {
	for i, name := range names {
		list = append(list, table.Field{Name: prefix + name, Off: off + 4*i, Len: 4, Kind: table.HexBE(), Doc: "IEEE 754, 32 bits",
			Meaning: func(b []byte) string {
				return fmt.Sprint(math.Float32frombits(uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])))
			}})
	}
	return list
}

// oui is a vendor's number of IEEE, three bytes.
func oui(off int) table.Field {
	return table.Field{Name: "vendor_oui", Off: off, Len: 3, Doc: "Such as 00:17:6a", Kind: table.Kind{
		Show: func(b []byte) (any, bool) { return fmt.Sprintf("%02x:%02x:%02x", b[0], b[1], b[2]), true },
		Read: func(path string, raw json.RawMessage, _ int) ([]byte, error) {
			s, err := spec.String(path, raw)
			if err != nil {
				return nil, err
			}
			b, err := spec.Hex(s)
			if err != nil || len(b) != 3 {
				return nil, spec.Errorf(path, "want three bytes such as 00:17:6a")
			}
			return b, nil
		},
		Schema: func(int) string { return `{"type": "string", "pattern": "^([ :-]*[0-9A-Fa-f]{2}){3}[ :-]*$"}` },
	}}
}
