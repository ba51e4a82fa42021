// Package hat packs and parses the ID EEPROMs of Raspberry Pi HATs: the "B+
// HAT ID EEPROM format specification" (eeprom-format.md of raspberrypi/hats),
// and the HAT+ specification for version 2.
//
//	+--------+---------+---+-----------+----------+-------+
//	| "R-Pi" | version | 0 | atoms 16  | bytes 32 | atoms |
//	+--------+---------+---+-----------+----------+-------+
//
// An atom is a type, a count that goes up from 0, the length of data and CRC,
// the data, and a CRC-16 (ARC) of all in front of it. Numbers are
// little-endian.
//
// The spec:
//
//	{
//	  "format": "hat",
//	  "version": 2,   // 1 for a HAT, 2 for a HAT+
//	  "atoms": [
//	    {"vendor": {"uuid": "01234567-89ab-4def-8123-456789abcdef", "product_id": "0x0001", "product_version": "0x0001",
//	                "vendor": "...", "product": "..."}},
//	    {"gpio_bank0": {"type": "hex", "data": "..."}},   // 30 bytes
//	    {"device_tree": "name-of-overlay"},               // or the blob itself
//	    {"custom": {"type": "base64", "data": "..."}},
//	    {"gpio_bank1": {"type": "hex", "data": "..."}},   // 20 bytes
//	    {"power_supply_ma": 3000},
//	    {"type": "0x0007", "data": "of a type that the specification doesn't name"}
//	  ],
//	  "size": 4096, "fill": "0xff"   // of the image, behind the atoms
//	}
//
// What is irregular is spelt out: "count" and "crc" of an atom that are wrong,
// {"type", "data"} with bytes for one that isn't what its type wants,
// "reserved", "atom_count" and "length" of the header that are wrong, "tail" for bytes
// that the length counts and that are no atom, and "trailing" for bytes
// behind that aren't fill.
package hat

import (
	"encoding/binary"
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "hat"

// MaxSize is the most bytes an image may have: eight times the largest EEPROM
// that the specification recommends.
const MaxSize = 256 << 10

const (
	signature  = "R-Pi"
	headerSize = 12
	atomHeader = 8
	crcSize    = 2
)

// Types of atoms.
const (
	typeVendor = 1 + iota
	typeGPIO0
	typeDeviceTree
	typeCustom
	typeGPIO1
	typePower
)

var typeNames = []string{
	typeVendor: "vendor", typeGPIO0: "gpio_bank0", typeDeviceTree: "device_tree",
	typeCustom: "custom", typeGPIO1: "gpio_bank1", typePower: "power_supply_ma",
}

// dataSizes: the atoms of a fixed size.
var dataSizes = map[uint16]int{typeGPIO0: 30, typeGPIO1: 20, typePower: 4}

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants the signature, a version that exists, and an atom.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	return err == nil && (l.version() == 1 || l.version() == 2) && len(l.atoms) > 0
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image []byte
	atoms []atom
	tail  []byte // counted by the length, and no atom
	rest  []byte
	stop  string // why there are fewer atoms than the header says
}

type atom struct {
	off   int
	typ   uint16
	count uint16
	data  []byte
	crc   uint16
	want  uint16
}

func (a *atom) crcOff() int { return a.off + atomHeader + len(a.data) }

func (l *layout) version() byte  { return l.image[4] }
func (l *layout) reserved() byte { return l.image[5] }
func (l *layout) atomCount() int { return int(binary.LittleEndian.Uint16(l.image[6:])) }
func (l *layout) length() uint32 { return binary.LittleEndian.Uint32(l.image[8:]) }
func (l *layout) end() int       { return len(l.image) - len(l.rest) }

func atomName(i int) string { return fmt.Sprintf("atoms[%d]", i) }

// crc16 is CRC-16/ARC: polynomial 0x8005 reflected, beginning with 0.
func crc16(b []byte) (crc uint16) {
	for _, c := range b {
		crc ^= uint16(c)
		for range 8 {
			crc = crc>>1 ^ 0xa001&-(crc&1)
		}
	}
	return crc
}

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
		return fail("does not begin with the text R-Pi")
	}
	l := &layout{image: image}
	limit := int(max(headerSize, min(int64(l.length()), int64(len(image)))))
	pos := headerSize
	for len(l.atoms) < l.atomCount() {
		left := image[pos:limit]
		if len(left) < atomHeader+crcSize {
			l.stop = fmt.Sprintf("%d bytes are left, and an atom has at least %d", len(left), atomHeader+crcSize)
			break
		}
		n := binary.LittleEndian.Uint32(left[4:])
		if n < crcSize || uint64(n) > uint64(len(left)-atomHeader) {
			l.stop = fmt.Sprintf("an atom has a length of %d bytes, and %d are left", n, len(left)-atomHeader)
			break
		}
		end := atomHeader + int(n) - crcSize
		l.atoms = append(l.atoms, atom{pos, binary.LittleEndian.Uint16(left), binary.LittleEndian.Uint16(left[2:]),
			left[atomHeader:end], binary.LittleEndian.Uint16(left[end:]), crc16(left[:end])})
		pos += atomHeader + int(n)
	}
	l.tail, l.rest = image[pos:limit], image[limit:]
	return l, nil
}

func hex16(n uint16) string { return fmt.Sprintf("0x%04x", n) }

// Fix sets the CRC of each atom.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	var changes []vpd.Change
	for i, a := range l.atoms {
		if a.crc != a.want {
			binary.LittleEndian.PutUint16(fixed[a.crcOff():], a.want)
			changes = append(changes, vpd.Change{Area: atomName(i), Off: int64(a.crcOff()), Msg: "CRC-16",
				Old: hex16(a.crc), New: hex16(a.want)})
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
	off := 0
	check := ""
	add := func(n int, name, value string) {
		if value == "" {
			value = spec.Brief(image[off : off+n])
		}
		if n > 0 {
			list = append(list, vpd.Field{Off: int64(off), Len: int64(n), Name: name, Value: value, CoveredBy: check})
			off += n
		}
	}
	add(4, "signature", "")
	add(1, "version", fmt.Sprint(l.version()))
	add(1, "reserved", spec.Byte(l.reserved()))
	add(2, "atom_count", fmt.Sprint(l.atomCount()))
	add(4, "length", fmt.Sprint(l.length()))
	for i, a := range l.atoms {
		name := atomName(i)
		check = name + ".crc"
		add(2, name+".type", typeName(a.typ))
		add(2, name+".count", fmt.Sprint(a.count))
		add(4, name+".length", fmt.Sprint(len(a.data)+crcSize))
		if v, ok := a.vendor(); ok {
			add(16, name+".vendor.uuid", v.UUID)
			add(2, name+".vendor.product_id", v.ID)
			add(2, name+".vendor.product_version", v.Version)
			add(2, name+".vendor.lengths", "")
			add(len(v.Vendor), name+".vendor.vendor", v.Vendor)
			add(len(v.Product), name+".vendor.product", v.Product)
		} else {
			add(len(a.data), name+".data", "")
		}
		add(crcSize, check, hex16(a.crc))
	}
	check = ""
	add(len(l.tail), "tail", "")
	add(len(l.rest), "trailing", "")
	return list, nil
}

func typeName(typ uint16) string {
	if int(typ) < len(typeNames) && typ > 0 {
		return typeNames[typ]
	}
	return hex16(typ)
}
