// Package gvpd packs and parses the vital product data of ChromeOS devices:
// "ChromeOS Vital Product Data (VPD) Binary Blob 2.0", the README of
// chromiumos/platform/vpd.
//
//	+----------------+--------------------------------+---------+----+
//	| what is before | fe 09 01 "gVpdInfo" 04 size 32 | entries | 00 |
//	+----------------+--------------------------------+---------+----+
//
// The header lies at 0x600 of the regions RO_VPD and RW_VPD, behind room for
// SMBIOS tables. The size, little-endian, counts entries and terminator. An
// entry is a type, 1, and a key and a value with their lengths in front: 7 bits
// a byte, the highest first, and bit 7 set in all but the last byte. There is no
// checksum.
//
// The spec:
//
//	{
//	  "format": "gvpd",
//	  "values": {"serial_number": "...", "ethernet_mac": "...", "region": "de"},
//	  "size": 16384, "fill": "0xff"   // of the image, behind the terminator
//	}
//
// Keys are letters, digits, underscores and periods.
//
// What is irregular is spelt out: "before" for what lies in front of the header
// if it isn't 0x600 bytes of 0xff, "entries", a list of {"key": ..., "value":
// ...} with a "type" if it isn't 1, or of {"raw": ...}, instead of
// "values" if keys come twice or have other characters or lengths aren't in the shortest form,
// "tail" for what stands behind the entries if it isn't a zero, "data_size" if it is
// wrong, and "trailing" for bytes behind that aren't fill.
package gvpd

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "gvpd"

// MaxSize is the most bytes an image may have: a region, not a whole flash.
const MaxSize = 256 << 10

const (
	magic      = "\xfe\x09\x01gVpdInfo\x04"
	headerSize = len(magic) + 4
	offset     = 0x600

	typeEnd     = 0x00
	typeString  = 0x01
	typeInfo    = 0xfe
	typeErased  = 0xff // ends the entries, too
	moreBit     = 0x80
	maxLenBytes = 5
)

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants the header where it belongs, or at the image's start.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	return err == nil && (l.off == offset || l.off == 0)
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image   []byte
	off     int // of the header
	entries []entry
	tail    []byte // the terminator, or what stands there
	rest    []byte
	stop    string // why there is no terminator
	simple  bool   // all entries can be members of values
}

type entry struct {
	off        int
	typ        byte
	raw        []byte
	key, value []byte
}

func (l *layout) size() uint32 { return binary.LittleEndian.Uint32(l.image[l.off+len(magic):]) }
func (l *layout) end() int     { return len(l.image) - len(l.rest) }
func (l *layout) tailOff() int { return l.end() - len(l.tail) }

// plain tells whether an entry can be a member of values.
func (e *entry) plain() bool {
	return e.typ == typeString && isKey(e.key) && bytes.Equal(e.raw, encode(e.typ, e.key, e.value))
}

func isKey(key []byte) bool {
	for _, c := range key {
		if (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && (c < '0' || c > '9') && c != '_' && c != '.' {
			return false
		}
	}
	return len(key) > 0
}

// find looks for the header where it belongs, at the start, and anywhere.
func find(image []byte) int {
	for _, off := range []int{offset, 0} {
		if len(image) >= off+headerSize && bytes.HasPrefix(image[off:], []byte(magic)) {
			return off
		}
	}
	if len(image) < headerSize {
		return -1
	}
	return bytes.Index(image[:len(image)-4], []byte(magic))
}

// scan cuts an image. It fails only if there is no header.
func scan(image []byte) (*layout, error) {
	fail := func(format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Msg: fmt.Sprintf(format, args...)}
	}
	if len(image) > MaxSize {
		return fail("%d bytes, want at most %d", len(image), MaxSize)
	}
	l := &layout{image: image, off: find(image)}
	if l.off < 0 {
		return fail("has no header fe 09 01 \"gVpdInfo\" 04")
	}
	pos := l.off + headerSize
	limit := pos + int(min(int64(l.size()), int64(len(image)-pos)))
	for l.stop == "" {
		var e entry
		if e, l.stop = next(image[pos:limit]); e.raw == nil {
			break
		}
		e.off = pos
		pos += len(e.raw)
		l.entries = append(l.entries, e)
	}
	l.tail, l.rest = image[pos:limit], image[limit:]
	l.simple = simple(l.entries)
	return l, nil
}

// next reads an entry. It returns none at a terminator, and none and why if
// what stands there is neither.
func next(b []byte) (e entry, stop string) {
	if len(b) == 0 {
		return e, "the data ends without one"
	}
	switch b[0] {
	case typeEnd, typeErased:
		return e, ""
	case typeString, typeInfo:
	default:
		return e, fmt.Sprintf("type %#02x stands there", b[0])
	}
	pos := 1
	var part [2][]byte
	for i, what := range []string{"key", "value"} {
		n, used := length(b[pos:])
		if used == 0 {
			return e, fmt.Sprintf("the length of an entry's %s is cut off, or has more than 32 bits", what)
		}
		pos += used
		if n > uint64(len(b)-pos) {
			return e, fmt.Sprintf("an entry's %s has %d bytes, and %d are left", what, n, len(b)-pos)
		}
		part[i] = b[pos : pos+int(n)]
		pos += int(n)
	}
	return entry{typ: b[0], raw: b[:pos], key: part[0], value: part[1]}, ""
}

// length reads a length of at most 32 bits, and how many bytes it takes; 0 if
// there is none.
func length(b []byte) (n uint64, used int) {
	for i, c := range b[:min(maxLenBytes, len(b))] {
		n = n<<7 | uint64(c&^moreBit)
		if n > 1<<32-1 {
			return 0, 0
		}
		if c&moreBit == 0 {
			return n, i + 1
		}
	}
	return 0, 0
}

func appendLength(b []byte, n int) []byte {
	groups := []byte{byte(n & 0x7f)}
	for n >>= 7; n > 0; n >>= 7 {
		groups = append(groups, byte(n&0x7f)|moreBit)
	}
	slices.Reverse(groups)
	return append(b, groups...)
}

func encode(typ byte, key, value []byte) []byte {
	b := appendLength([]byte{typ}, len(key))
	b = appendLength(append(b, key...), len(value))
	return append(b, value...)
}

// Fix returns a copy: there are no checksums.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	if _, err := scan(image); err != nil {
		return nil, nil, err
	}
	return slices.Clone(image), nil, nil
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
	add(l.off, "before", spec.Brief(image[:l.off]))
	add(len(magic), "header", "gVpdInfo")
	add(4, "data_size", fmt.Sprint(l.size()))
	for i := range l.entries {
		add(len(l.entries[i].raw), l.name(i), spec.Brief(l.entries[i].value))
	}
	add(len(l.tail), "tail", spec.Brief(l.tail))
	add(len(l.rest), "trailing", spec.Brief(l.rest))
	return list, nil
}

// name is the path of an entry in the spec.
func (l *layout) name(i int) string {
	if l.simple {
		return "values." + string(l.entries[i].key)
	}
	return fmt.Sprintf("entries[%d]", i)
}

func simple(entries []entry) bool {
	seen := map[string]bool{}
	for i := range entries {
		e := &entries[i]
		if !e.plain() || seen[string(e.key)] {
			return false
		}
		seen[string(e.key)] = true
	}
	return true
}
