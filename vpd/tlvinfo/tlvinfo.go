// Package tlvinfo packs and parses the EEPROMs of ONIE network switches: the
// TlvInfo format of the ONIE design specification, hardware requirements,
// "Board EEPROM Information Format".
//
//	+-----------+---------+-------------+------+-----+
//	| "TlvInfo" | version | total len16 | TLVs | CRC |
//	| and zero  | 1       | big-endian  |      |     |
//	+-----------+---------+-------------+------+-----+
//
// A TLV is a type, a length byte and the value. The last is the CRC-32 of
// everything in front of its value, big-endian.
//
// The spec, whose fields lie in the image in the order of its members:
//
//	{
//	  "format": "tlvinfo",
//	  "fields": {
//	    "product_name": "...", "part_number": "...", "serial_number": "...",
//	    "mac_base": "52:54:00:12:34:56", "mac_count": 32,
//	    "manufacture_date": "03/05/2024 14:30:00", "device_version": 1, "label_revision": "...",
//	    "platform_name": "...", "onie_version": "...", "manufacturer": "...", "country_code": "DE",
//	    "vendor": "...", "diag_version": "...", "service_tag": "...",
//	    "vendor_extension": {"enterprise": 33049, "type": "hex", "data": "00ff"},
//	    "0x50": "of a type that the specification doesn't name"
//	  },
//	  "size": 2048, "fill": "0xff"   // of the image, behind the last TLV
//	}
//
// The CRC is computed, and added at the end. The second TLV of a type is named
// TYPE#2; only vendor extensions may repeat.
//
// What is irregular is spelt out: a "hex" value for one that isn't what its
// type wants, "crc" among the fields as {"type": "crc32"} if it isn't the last,
// in "hex" if it is wrong and null if there is none, "tail" for bytes that
// total length counts and that are no TLV, "total_length" and "version" that are wrong,
// and "trailing" for bytes behind the TLVs that aren't fill.
package tlvinfo

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "tlvinfo"

// MaxSize is the most bytes an image may have, of which TlvInfo uses the first
// 2048.
const MaxSize = 256 << 10

const (
	signature  = "TlvInfo\x00"
	headerSize = len(signature) + 3
	maxTotal   = 2048 - headerSize
	tlvHeader  = 2
	crcSize    = 4
)

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants the signature and version 1.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	return err == nil && l.version() == 1
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image []byte
	tlvs  []tlv
	tail  []byte // counted by the total length, and no TLV
	rest  []byte
}

type tlv struct {
	off   int
	typ   byte
	value []byte
}

func (l *layout) version() byte { return l.image[len(signature)] }
func (l *layout) total() int    { return int(binary.BigEndian.Uint16(l.image[len(signature)+1:])) }
func (l *layout) end() int      { return len(l.image) - len(l.rest) }

func (t *tlv) valueOff() int { return t.off + tlvHeader }
func (t *tlv) isCRC() bool   { return t.typ == typeCRC && len(t.value) == crcSize }

// crc is what belongs into the value at off.
func crc(image []byte, off int) uint32 { return crc32.ChecksumIEEE(image[:off]) }

// scan cuts an image. It fails only if there is no header.
func scan(image []byte) (*layout, error) {
	fail := func(format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Msg: fmt.Sprintf(format, args...)}
	}
	switch {
	case len(image) > MaxSize:
		return fail("%d bytes, want at most %d", len(image), MaxSize)
	case len(image) < headerSize:
		return fail("%d bytes, and the header alone has %d", len(image), headerSize)
	case string(image[:len(signature)]) != signature:
		return fail("does not begin with the text TlvInfo and a zero")
	}
	l := &layout{image: image}
	// The type of the CRC may be a byte of any value: only walking finds
	// it.
	pos, limit := headerSize, min(headerSize+l.total(), len(image))
	for limit-pos >= tlvHeader {
		n := int(image[pos+1])
		if n > limit-pos-tlvHeader {
			break
		}
		l.tlvs = append(l.tlvs, tlv{pos, image[pos], image[pos+tlvHeader : pos+tlvHeader+n]})
		pos += tlvHeader + n
	}
	l.tail, l.rest = image[pos:limit], image[limit:]
	return l, nil
}

// Fix sets each CRC.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	var changes []vpd.Change
	for i, name := range l.names() {
		t := &l.tlvs[i]
		if !t.isCRC() {
			continue
		}
		// Of the fixed bytes: an earlier CRC counts in a later.
		got, want := binary.BigEndian.Uint32(t.value), crc(fixed, t.valueOff())
		if got != want {
			binary.BigEndian.PutUint32(fixed[t.valueOff():], want)
			changes = append(changes, vpd.Change{Area: name, Off: int64(t.valueOff()), Msg: "CRC-32",
				Old: fmt.Sprintf("0x%08x", got), New: fmt.Sprintf("0x%08x", want)})
		}
	}
	return fixed, changes, nil
}

// Fields cuts the image without a gap.
func (format) Fields(image []byte) ([]vpd.Field, error) {
	l, err := scan(image)
	if err != nil {
		return nil, err
	}
	var list []vpd.Field
	off := int64(0)
	add := func(n int, name, value string) {
		if n > 0 {
			list = append(list, vpd.Field{Off: off, Len: int64(n), Name: name, Value: value})
			off += int64(n)
		}
	}
	add(len(signature), "signature", signature[:len(signature)-1])
	add(1, "version", fmt.Sprint(l.version()))
	add(2, "total_length", fmt.Sprint(l.total()))
	names := l.names()
	for i := range l.tlvs {
		add(tlvHeader+len(l.tlvs[i].value), names[i], l.tlvs[i].brief())
	}
	add(len(l.tail), "tail", spec.Brief(l.tail))
	add(len(l.rest), "trailing", spec.Brief(l.rest))
	for i := len(l.tlvs) - 1; i >= 0; i-- {
		for n := range list {
			if l.tlvs[i].isCRC() && list[n].Off <= int64(l.tlvs[i].off) {
				list[n].CoveredBy = names[i]
			}
		}
	}
	return list, nil
}

// names gives each TLV the name of its member in the spec.
func (l *layout) names() []string {
	names := make([]string, len(l.tlvs))
	seen := map[byte]int{}
	for i, t := range l.tlvs {
		seen[t.typ]++
		names[i] = numbered(typeName(t.typ), seen[t.typ])
	}
	return names
}

func numbered(name string, nth int) string {
	if nth > 1 {
		return fmt.Sprintf("%s#%d", name, nth)
	}
	return name
}
