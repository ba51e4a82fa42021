// Package spd packs and parses the serial presence detect EEPROMs of memory
// modules.
//
//	type         standard                           CRC-16 of bytes → stored at
//	ddr3         JEDEC 21-C, 4.1.2.11 (annex K)     0-125, or 0-116 if byte 0 says so → 126
//	ddr4         JEDEC 21-C, 4.1.2.12 (annex L)     0-125 → 126, 128-253 → 254
//	ddr5         JESD400-5                          0-509 → 510
//	ddr4-ddimm   IBM's DDIMMs, of OpenPOWER         0-125 → 126, 192-445 → 446
//	ddr5-ddimm   the same with DDR5                 0-125 → 126, 192-445 → 446, 512-637 → 638
//
// The CRC is CRC-16/XMODEM (polynomial 0x1021, beginning with 0), stored with
// its lower byte first. What a DDIMM has from byte 1024 on, extended function
// data with CRCs of its own, is kept and not checked.
//
// The spec:
//
//	{
//	  "format": "spd",
//	  "type": "ddr4",
//	  "module_type": "0x02",                  // bytes have the standard's names, as below
//	  "module_manufacturer": "0x802c",        // JEP106: number of the bank, code; each with its parity bit
//	  "date": "2024-W07",                     // of manufacturing
//	  "serial_number": "0xdeadbeef",
//	  "part_number": "NVSTORE-DDR4-DEMO",
//	  "patches": [{"offset": 0, "type": "hex", "data": "..."}],  // what has no name, or a dump of all
//	  "size": 512
//	}
//
// Fields lie over patches: to give a module another serial number, patch the
// dump in whole and name the serial number. CRCs are computed; "crc" in a spec
// is a wrong one.
package spd

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
	"nvstore.dev/vpd/internal/table"
)

// Name is the format's name in a spec.
const Name = "spd"

// MaxSize is the most bytes an image may have: twice a DDIMM's.
const MaxSize = 8 << 10

// Bytes that all types have, and values of theirs.
const (
	offBytes  = 0
	offType   = 2
	offModule = 3

	typeDDR3 = 0x0b
	typeDDR4 = 0x0c
	typeDDR5 = 0x12

	moduleDDIMM = 0x0a
)

var format = table.New(table.Def{
	Name: Name, Title: "Memory module's serial presence detect EEPROM", Member: "type", MaxSize: MaxSize,
	Layouts: []*table.Layout{ddr3, ddr4, ddr5, ddr4DDIMM, ddr5DDIMM}, Pick: pick, Plain: plain,
})

// Format returns the format.
func Format() vpd.Format { return format }

func pick(image []byte) (*table.Layout, error) {
	if len(image) < 128 {
		return nil, errors.New("has less than 128 bytes")
	}
	ddimm := image[offModule]&0x0f == moduleDDIMM
	switch t := image[offType]; {
	case t == typeDDR3:
		return ddr3, nil
	case t == typeDDR4 && ddimm:
		return ddr4DDIMM, nil
	case t == typeDDR4:
		return ddr4, nil
	case t == typeDDR5 && ddimm:
		return ddr5DDIMM, nil
	case t == typeDDR5:
		return ddr5, nil
	default:
		return nil, fmt.Errorf("byte 2 is %s, which is neither DDR3 (0x0b), DDR4 (0x0c) nor DDR5 (0x12)", spec.Byte(t))
	}
}

// plain wants the size of a memory that there is, and right CRCs or a maker's
// code and part number.
func plain(l *table.Layout, image []byte, wrong int) bool {
	switch len(image) {
	case 256, 512, 1024, 2048, 4096:
		return wrong == 0 || l.Has(image, "module_manufacturer") && l.Has(image, "part_number")
	}
	return false
}

// crc16 is CRC-16/XMODEM.
func crc16(b []byte) uint64 {
	var crc uint16
	for _, c := range b {
		crc ^= uint16(c) << 8
		for range 8 {
			crc = crc<<1 ^ 0x1021&-(crc>>15)
		}
	}
	return uint64(crc)
}

// crc is a CRC right behind what it covers.
func crc(name string, from, to int) table.Sum {
	return table.Sum{Name: name, Title: "CRC-16", Off: to, Len: 2, From: from, To: to, Of: crc16}
}

// idKind is a code of JEP106: the number of continuation codes, and the last
// code, each with an odd parity bit.
func idKind() table.Kind {
	k := table.HexBE()
	k.Check = func(b []byte) string {
		for _, c := range b {
			for s := 4; s > 0; s /= 2 {
				c ^= c >> s
			}
			if c&1 == 0 && !table.Blank(b) {
				return fmt.Sprintf("is no code of JEP106, which has odd parity: 0x%x", b)
			}
		}
		return ""
	}
	return k
}

// makers are a few of JEP106's, for inspection.
var makers = map[string]string{
	"\x80\x2c": "Micron", "\x80\xad": "SK hynix", "\x80\xce": "Samsung", "\x01\x98": "Kingston", "\x01\x94": "SMART Modular",
	"\x02\xfe": "Elpida", "\x02\x9e": "Corsair", "\x83\x0b": "Nanya", "\x04\xcb": "A-DATA", "\x04\xcd": "G Skill", "\x04\x43": "Ramaxel",
	"\x85\x9b": "Crucial", "\x01\x4f": "Transcend", "\x04\xef": "Team Group", "\x80\xb3": "IDT", "\x86\x32": "Montage", "\x80\xa4": "IBM",
}

func maker(b []byte) string { return makers[string(b)] }

var week = regexp.MustCompile(`^20[0-9]{2}-W(0[1-9]|[1-4][0-9]|5[0-3])$`)

// dateKind is the year of the century and the week, in BCD; in text, as ISO
// 8601 writes weeks.
func dateKind() table.Kind {
	show := func(b []byte) (string, bool) {
		s := fmt.Sprintf("20%02x-W%02x", b[0], b[1])
		return s, week.MatchString(s)
	}
	return table.Kind{
		Show: func(b []byte) (any, bool) { return show(b) },
		Read: func(path string, raw json.RawMessage, _ int) ([]byte, error) {
			s, err := spec.String(path, raw)
			if err != nil {
				return nil, err
			}
			if !week.MatchString(s) {
				return nil, spec.Errorf(path, "want a year and a week, such as 2024-W07")
			}
			year, err1 := strconv.ParseUint(s[2:4], 16, 8)
			n, err2 := strconv.ParseUint(s[6:], 16, 8)
			return []byte{byte(year), byte(n)}, errors.Join(err1, err2)
		},
		Check: func(b []byte) string {
			if _, ok := show(b); !ok && !table.Blank(b) {
				return fmt.Sprintf("is no year and week in BCD: 0x%x", b)
			}
			return ""
		},
		Schema: func(int) string { return fmt.Sprintf(`{"type": "string", "pattern": %q}`, week) },
	}
}

// identity is what the maker of a module writes.
func identity(manufacturer, part, partLen, revisionLen int) []table.Field {
	revision := part + partLen
	return []table.Field{
		{Name: "module_manufacturer", Off: manufacturer, Len: 2, Kind: idKind(), Meaning: maker, Doc: "Code of JEP106, such as 0x802c"},
		hex1("location", manufacturer+2),
		{Name: "date", Off: manufacturer + 3, Len: 2, Kind: dateKind(), Doc: "Of manufacturing, such as 2024-W07"},
		{Name: "serial_number", Off: manufacturer + 5, Len: 4, Kind: table.HexBE()},
		{Name: "part_number", Off: part, Len: partLen, Kind: table.Text(' ')},
		{Name: "revision", Off: revision, Len: revisionLen, Kind: table.HexBE()},
		{Name: "dram_manufacturer", Off: revision + revisionLen, Len: 2, Kind: idKind(), Meaning: maker, Doc: "Code of JEP106, such as 0x802c"},
	}
}

func hex1(name string, off int) table.Field {
	return table.Field{Name: name, Off: off, Len: 1, Kind: table.Hex()}
}

// hexes are bytes one after another, of which "" has no name.
func hexes(off int, names ...string) (list []table.Field) {
	for i, name := range names {
		if name != "" {
			list = append(list, hex1(name, off+i))
		}
	}
	return list
}

// words are 16-bit numbers one after another.
func words(off int, names ...string) (list []table.Field) {
	for i, name := range names {
		list = append(list, table.Field{Name: name, Off: off + 2*i, Len: 2, Kind: table.Dec()})
	}
	return list
}
