// Package fru packs and parses the inventory of field-replaceable units: IPMI
// Platform Management FRU Information Storage Definition v1.0, revision 1.3.
//
//	+--------+----------+---------+-------+---------+-------------+
//	| header | internal | chassis | board | product | multirecord |
//	+--------+----------+---------+-------+---------+-------------+
//
// The header (section 8) has 8 bytes: version 1, the offsets of the areas in
// units of 8 bytes with 0 for none, a pad byte, and a checksum. Every checksum
// makes the sum of what it covers zero: the header, each of the chassis, board
// and product areas, and the header and the data of each record.
//
// The spec, whose areas lie in the image in the order of its members:
//
//	{
//	  "format": "fru",
//	  "internal": {"type": "hex", "data": "00ff"},
//	  "chassis": {"type": "0x17", "part_number": "...", "serial_number": "...", "custom": ["..."]},
//	  "board": {"language": 0, "date": "2022-01-07T18:30Z", "manufacturer": "...", "product_name": "...",
//	            "serial_number": "...", "part_number": "...", "file_id": "...", "custom": []},
//	  "product": {"language": 0, "manufacturer": "...", "product_name": "...", "part_number": "...",
//	              "version": "...", "serial_number": "...", "asset_tag": "...", "file_id": "...", "custom": []},
//	  "multirecord": [{"type": "0x03", "subtype": "0x07", "data": {"type": "hex", "data": "..."}},
//	                  {"type": "0x01", "fields": {"output": 1, "nominal_10mv": 1200, ...}},
//	                  {"type": "0xc0", "manufacturer_id": "0x00a67f", "data": "..."}],
//	  "size": 1024, "fill": "0xff"   // of the image, behind the areas
//	}
//
// Records of type 0x00 (power supply), 0x01 (DC output) and 0x02 (DC load) have
// "fields", numbers, of which Parse shows the names; of others, the data.
//
// A field (section 13) is a string, or typed: {"type": "text" | "6bit" |
// "bcd", "data": "characters"}, or {"type": "hex", "data": "00ff", "encoding":
// "binary"} with bytes as they are, where encoding may also be text, 6bit or
// bcd. Text is ASCII, or UCS-2 in an area whose language isn't English (0 and
// 25). One byte of text can't be written, since its type/length byte 0xC1 ends
// the area: a string of one character becomes 6-bit ASCII, and is refused if
// it isn't in that set. A field that is missing is empty; null leaves out
// it and all behind it.
//
// What is irregular is spelt out: "area_size" of an area with more room than
// it needs and "padding" for what isn't zero in it, "checksum" for one that is
// wrong, "before" for bytes in front of an area, "raw" for an area or a record
// that can't be written otherwise, "header" for its pad byte, its checksum and
// the offsets of areas that aren't there, and "trailing" for bytes behind the
// areas that aren't fill.
package fru

import (
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "fru"

// MaxSize is the most bytes an image may have, as many as the largest I2C
// EEPROMs.
const MaxSize = 256 << 10

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants a good header checksum, and each area where it says.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	return err == nil && sum(image[:headerSize]) == 0 && image[offPad] == 0 && len(l.areas) > 0 && len(l.lost) == 0
}

// Verify checks structure and checksums.
func (format) Verify(image []byte) []vpd.Problem {
	l, err := scan(image)
	if err != nil {
		return []vpd.Problem{{Area: "image", Off: 0, Msg: err.Error()}}
	}
	return l.problems()
}

// Fix sets the checksums of the header, the areas and the records.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	var changes []vpd.Change
	for _, c := range l.checksums() {
		// Of the fixed bytes: a record's header covers the checksum
		// of its data.
		want := c.want(fixed)
		if got := fixed[c.off]; got != want {
			fixed[c.off] = want
			changes = append(changes, vpd.Change{Area: c.area, Off: int64(c.off),
				Msg: c.what, Old: spec.Byte(got), New: spec.Byte(want)})
		}
	}
	return fixed, changes, nil
}

// A sumByte is a byte that makes the sum of a range zero.
type sumByte struct {
	area, what string
	off        int // of the byte, in the range or not
	from, to   int
}

func (c sumByte) want(image []byte) byte {
	s := sum(image[c.from:c.to])
	if c.off >= c.from && c.off < c.to {
		s -= image[c.off]
	}
	return -s
}

// checksums lists every checksum, in the order in which they can be set.
func (l *layout) checksums() []sumByte {
	list := []sumByte{{"header", "checksum", offChecksum, 0, headerSize}}
	for i := range l.areas {
		a := &l.areas[i]
		switch {
		case a.isInfo():
			list = append(list, sumByte{a.name(), "checksum", a.off + len(a.data) - 1, a.off, a.off + len(a.data)})
		case a.kind == multirecord:
			for j, r := range a.recs {
				end := r.off + recordHeader + len(r.data)
				list = append(list,
					sumByte{recordName(j), "checksum of the data", r.off + 3, r.off + recordHeader, end},
					sumByte{recordName(j), "checksum of the header", r.off + 4, r.off, r.off + recordHeader})
			}
		}
	}
	return list
}

// sum is the sum of all bytes, modulo 256.
func sum(b []byte) (s byte) {
	for _, c := range b {
		s += c
	}
	return s
}
