// Package smbios packs and parses SMBIOS tables: the dumps of dmidecode, with an
// entry point in front, and tables alone, as in /sys/firmware/dmi/tables/DMI and
// QEMU's -smbios file=. The source is the System Management BIOS Reference
// Specification, DMTF DSP0134, version 3.7.
//
//	+-------------+---------+------------+     +------------+----------+
//	| entry point | padding | structure  | ... | structure  | trailing |
//	| checksums   | to 0x20 |            |     | of type 127|          |
//	+-------------+---------+------------+     +------------+----------+
//
// A structure is a formatted area, of type, length, 16-bit handle and fields,
// and behind it strings, each with a zero at its end and one more at the end of
// all. Fields give a string by its number, from 1; 0 is none.
//
// The spec:
//
//	{
//	  "format": "smbios",
//	  "entry_point": {"bits": 64, "version": "3.3"},   // none: the tables alone
//	  "structures": [
//	    {"type": "system", "handle": "0x0100", "manufacturer": "...", "serial_number": "...", "uuid": "..."},
//	    {"type": "oem_strings", "handle": "0x0b00", "strings": ["one", "two"]},
//	    {"type": 221, "handle": "0x00dd", "data": {"type": "hex", "data": "..."}, "strings": ["..."]},
//	    {"type": "end"}
//	  ]
//	}
//
// Types that are known have names, and fields with the names of the
// specification; others have "data" and "strings". Fields that are missing are
// 0; a structure is as long as its version says. One without a handle follows
// the one in front. Checksums, sizes and counts are computed.
//
// What is irregular is spelt out: "length" of a structure that is another, and
// "extra" for bytes behind its known fields; "strings" in a structure whose
// strings aren't numbered in the order of its fields, which are then numbers, or
// in hex if they aren't a list; "count" of listed strings that is wrong; in the
// entry point "checksum", "intermediate_checksum", "length", "table_size",
// "count", "largest", "address" (of the table), "revision", "docrev", "reserved", "bcd_revision" and
// "padding"; "tail" for what the table holds behind the last structure, and "trailing", "size"
// and "fill" for what lies behind the table.
package smbios

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"nvstore.dev/vpd"
)

// Name is the format's name in a spec.
const Name = "smbios"

// MaxSize is the most bytes an image may have.
const MaxSize = 1 << 20

const (
	headerSize = 4
	latest     = 0x307 // for tables without an entry point
)

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants an entry point with right checksums, or tables that end with
// their end.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	if err != nil || !l.ended() || len(l.structs) < 2 {
		return false
	}
	if l.entry != nil {
		return len(l.entry.sums()) == 0
	}
	return len(l.tail) == 0 && len(l.rest) == 0 && l.structs[0].typ() <= typeEnd
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image   []byte
	entry   *entry // nil if there is none
	padding []byte
	table   int // offset
	structs []structure
	tail    []byte // in the table, behind the last structure
	rest    []byte // behind the table
	stop    string // why the structures end without one of type 127
}

// A structure is one of a table.
type structure struct {
	off       int
	formatted []byte
	strings   []byte // without the zeros that end them
}

func (s *structure) typ() byte      { return s.formatted[0] }
func (s *structure) handle() uint16 { return binary.LittleEndian.Uint16(s.formatted[2:]) }
func (s *structure) size() int      { return len(s.formatted) + len(s.strings) + 2 }

// list cuts the strings; ok is false if there is an empty one.
func (s *structure) list() (list [][]byte, ok bool) {
	if len(s.strings) == 0 {
		return nil, true
	}
	list = bytes.Split(s.strings, []byte{0})
	for _, b := range list {
		if len(b) == 0 {
			return nil, false
		}
	}
	return list, true
}

func (l *layout) ended() bool { return l.stop == "" }

func (l *layout) version() int {
	if l.entry == nil {
		return latest
	}
	return l.entry.version()
}

// end is where the table ends.
func (l *layout) end() int { return len(l.image) - len(l.rest) }

// scan cuts an image. It fails if there isn't one structure.
func scan(image []byte) (*layout, error) {
	fail := func(off int, format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Off: int64(off), Msg: fmt.Sprintf(format, args...)}
	}
	if len(image) > MaxSize {
		return fail(0, "%d bytes, want at most %d", len(image), MaxSize)
	}
	l := &layout{image: image, entry: readEntry(image)}
	size := len(image)
	if e := l.entry; e != nil {
		l.table = e.table(len(image))
		if l.table < 0 {
			return fail(len(image), "ends with its entry point")
		}
		l.padding = image[len(e.raw):l.table]
		size = int(min(uint64(e.tableSize()), uint64(len(image)-l.table)))
	}
	table := image[l.table : l.table+min(size, len(image)-l.table)]
	l.rest = image[l.table+len(table):]
	pos := 0
	for {
		s, stop := readStructure(table[pos:])
		if s.formatted == nil {
			l.stop = stop
			break
		}
		s.off = l.table + pos
		pos += s.size()
		l.structs = append(l.structs, s)
		if s.typ() == typeEnd {
			break
		}
	}
	l.tail = table[pos:]
	if len(l.structs) == 0 {
		return fail(l.table, "no structure stands there: %s", l.stop)
	}
	if l.entry == nil { // there is no size that tells the two apart
		l.tail, l.rest = nil, l.tail
	}
	return l, nil
}

// readStructure reads one; none, and why, if there is none.
func readStructure(b []byte) (s structure, stop string) {
	if len(b) == 0 {
		return s, "the table ends"
	}
	if len(b) < headerSize {
		return s, fmt.Sprintf("%d bytes are left, and a structure's header has %d", len(b), headerSize)
	}
	n := int(b[1])
	if n < headerSize || n > len(b) {
		return s, fmt.Sprintf("its length is %d, and %d bytes are left", n, len(b))
	}
	i := bytes.Index(b[n:], []byte{0, 0})
	if i < 0 {
		return s, "its strings have no end"
	}
	return structure{formatted: b[:n], strings: b[n : n+i]}, ""
}
