// Package ipz packs and parses the IPZ VPD of OpenPOWER machines: records of
// keywords with a table of contents (the public parser is OpenBMC's
// openpower-vpd-parser, ipz_parser.cpp and constants.hpp).
//
//	+---------+---------+---------+-----------+-----+----------------+
//	| ECC of  | VHDR    | VTOC    | record    | ... | ECC of VTOC    |
//	| VHDR 11 | at 11   |         |           |     | and of records |
//	+---------+---------+---------+-----------+-----+----------------+
//
// Each of VHDR, VTOC and the records is 0x84, a 16-bit length, keywords, and
// 0x78. A keyword is two characters, a length byte (two, if its name begins with
// #) and the value. The first is RT, the record's name. Keywords PT hold, for
// each record, name, type, offset, length, and offset and length of its ECC.
// Numbers are little-endian.
//
// The ECC can correct and prove a record, but how it is computed isn't public. It
// is kept, and Verify says nothing about it. A spec notes which bytes each ECC
// protects, and Pack refuses a spec that changes them: it can't make the new ECC.
// Records without ECC, as in QEMU's machines, can be changed as one likes.
//
// The spec:
//
//	{
//	  "format": "ipz",
//	  "header": {"version": "01", "ecc": ..., "protects": "SHA-256 of VHDR"},
//	  "toc": {"type": 213, "padding": ..., "ecc_offset": 2390, "ecc": ..., "protects": ...},
//	  "records": [
//	    {"name": "VINI", "type": 213, "keywords": {"DR": "SYSTEM BACKPLANE", "SN": "..."}, "ecc_offset": 2357, "ecc": ..., "protects": ...}
//	  ],
//	  "size": 8192, "fill": 0
//	}
//
// Records follow one another, unless they have an "offset". Padding is the
// keyword PF of the table of contents.
//
// What is irregular is spelt out: "tag" and "end" that aren't 0x84 and 0x78,
// "raw" instead of "keywords" for a record that isn't made of them, "gaps" for bytes that
// are in no record and no ECC and aren't fill, and "image" for the whole of an
// image of which the records can't be told.
package ipz

import (
	"encoding/binary"
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "ipz"

// MaxSize is the most bytes an image may have. Offsets have 16 bits.
const MaxSize = 128 << 10

const (
	headerOffset = 11 // behind its ECC
	headerSize   = 44
	headerEnd    = headerOffset + headerSize
	leastSize    = 43 // with the header's entry for the table of contents

	tagRecord = 0x84
	tagEnd    = 0x78
	frame     = 4 // tag, length and end of a record

	headerName = "VHDR"
	tocName    = "VTOC"
	entrySize  = 14
	maxEntries = 255 / entrySize // in one PT
	maxRecords = 256             // each may be as long as the image
)

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants the header, and a table of contents where it says.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	return err == nil && image[headerOffset] == tagRecord && string(image[17:21]) == headerName && string(image[29:33]) == tocName &&
		l.toc.inside && l.toc.named()
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image   []byte
	toc     record
	records []record
	tocFail string // why the table of contents can't be read
}

// A record is an entry of the table of contents, and what it points at.
type record struct {
	name           string
	typ            uint16
	off, size      int
	eccOff, eccLen int
	inside         bool   // it lies in the image
	raw            []byte // with tag, length and end
	eccInside      bool
	ecc            []byte
}

// readEntry reads a PT entry.
func readEntry(image, b []byte) record {
	le := binary.LittleEndian
	r := record{name: string(b[:4]), typ: le.Uint16(b[4:]), off: int(le.Uint16(b[6:])), size: int(le.Uint16(b[8:])),
		eccOff: int(le.Uint16(b[10:])), eccLen: int(le.Uint16(b[12:]))}
	if r.inside = r.off+r.size <= len(image); r.inside {
		r.raw = image[r.off : r.off+r.size]
	}
	if r.eccInside = r.eccOff+r.eccLen <= len(image); r.eccInside {
		r.ecc = image[r.eccOff : r.eccOff+r.eccLen]
	}
	return r
}

// named tells whether a record is the one that the table of contents says.
func (r *record) named() bool {
	k, _ := readKeywords(r.data())
	return len(k) > 0 && k[0].name == "RT" && string(k[0].value) == r.name
}

// data is the keywords: what lies between length and end.
func (r *record) data() []byte {
	if len(r.raw) < frame {
		return nil
	}
	return r.raw[frame-1 : len(r.raw)-1]
}

// A keyword is a part of a record.
type keyword struct {
	off   int // in the record's data
	name  string
	value []byte
}

// readKeywords cuts a record's data; fail says where it isn't keywords.
func readKeywords(data []byte) (list []keyword, fail string) {
	for pos := 0; pos < len(data); {
		b := data[pos:]
		head := 3
		if b[0] == '#' {
			head = 4
		}
		if len(b) < head {
			return list, fmt.Sprintf("%d bytes behind its keywords are none", len(b))
		}
		n := int(b[2])
		if head == 4 {
			n = int(binary.LittleEndian.Uint16(b[2:]))
		}
		if n > len(b)-head {
			return list, fmt.Sprintf("its keyword %s has %d bytes, and %d are left", spec.Brief(b[:2]), n, len(b)-head)
		}
		list = append(list, keyword{pos, string(b[:2]), b[head : head+n]})
		pos += head + n
	}
	return list, ""
}

// scan cuts an image. It fails if the header isn't there.
func scan(image []byte) (*layout, error) {
	fail := func(off int, format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Off: int64(off), Msg: fmt.Sprintf(format, args...)}
	}
	switch {
	case len(image) > MaxSize:
		return fail(0, "%d bytes, want at most %d", len(image), MaxSize)
	case len(image) < leastSize:
		return fail(0, "%d bytes, and the header ends at %d", len(image), headerEnd)
	case string(image[14:17]) != "RT\x04" || string(image[26:29]) != "PT\x0e":
		return fail(headerOffset, "no header with the keywords RT and PT")
	}
	l := &layout{image: image, toc: readEntry(image, image[29:])}
	switch {
	case !l.toc.inside:
		l.tocFail = fmt.Sprintf("lies at %d to %d, and the image has %d bytes", l.toc.off, l.toc.off+l.toc.size, len(image))
		return l, nil
	case len(l.toc.raw) < frame:
		l.tocFail = fmt.Sprintf("has %d bytes", len(l.toc.raw))
		return l, nil
	}
	var list []keyword
	list, l.tocFail = readKeywords(l.toc.data())
	for _, k := range list {
		if k.name != "PT" {
			continue
		}
		if len(k.value)%entrySize != 0 && l.tocFail == "" {
			l.tocFail = fmt.Sprintf("its keyword PT has %d bytes, and an entry has %d", len(k.value), entrySize)
		}
		for v := k.value; len(v) >= entrySize; v = v[entrySize:] {
			if len(l.records) == maxRecords {
				l.tocFail = fmt.Sprintf("has more than %d records", maxRecords)
				return l, nil
			}
			l.records = append(l.records, readEntry(image, v))
		}
	}
	return l, nil
}

// Verify checks the header, the table of contents and the records; not the ECC.
func (format) Verify(image []byte) []vpd.Problem {
	l, err := scan(image)
	if err != nil {
		return []vpd.Problem{{Area: "image", Off: 0, Msg: err.Error()}}
	}
	return l.problems()
}

func (l *layout) problems() []vpd.Problem {
	var list []vpd.Problem
	add := func(area string, off int, format string, args ...any) {
		list = append(list, vpd.Problem{Area: area, Off: int64(off), Msg: fmt.Sprintf(format, args...)})
	}
	head := l.image[headerOffset:]
	switch {
	case len(head) < headerSize:
		add("header", len(l.image), "the image ends in it")
	case head[0] != tagRecord || binary.LittleEndian.Uint16(head[1:]) != headerSize-frame || head[headerSize-1] != tagEnd:
		add("header", headerOffset, "begins with %02x %02x %02x and ends with %02x, want 84 28 00 and 78", head[0], head[1], head[2], head[headerSize-1])
	}
	if string(head[6:10]) != headerName {
		add("header", headerOffset+6, "is of record %s, want %s", spec.Brief(head[6:10]), headerName)
	}
	if l.toc.name != tocName {
		add("header", 29, "points at record %s, want %s", spec.Brief([]byte(l.toc.name)), tocName)
	}
	if l.tocFail != "" {
		add("toc", l.toc.off, "%s", l.tocFail)
	} else {
		list = append(list, l.toc.problems("toc")...)
	}
	for i := range l.records {
		list = append(list, l.records[i].problems(l.path(i))...)
	}
	return append(list, l.overlaps()...)
}

func (r *record) problems(path string) []vpd.Problem {
	var list []vpd.Problem
	add := func(off int, format string, args ...any) {
		list = append(list, vpd.Problem{Area: path, Off: int64(off), Msg: fmt.Sprintf(format, args...)})
	}
	if !r.eccInside {
		add(-1, "its ECC, at %d to %d, is not in the image", r.eccOff, r.eccOff+r.eccLen)
	}
	switch {
	case !r.inside:
		add(-1, "it would lie at %d to %d, which is not in the image", r.off, r.off+r.size)
		return list
	case len(r.raw) < frame:
		add(r.off, "has %d bytes", len(r.raw))
		return list
	}
	if n := int(binary.LittleEndian.Uint16(r.raw[1:])); n != len(r.raw)-frame {
		add(r.off+1, "its length is %d, and in the table of contents %d", n, len(r.raw)-frame)
	}
	if tag, end := r.raw[0], r.raw[len(r.raw)-1]; tag != tagRecord || end != tagEnd {
		add(r.off, "begins with %02x and ends with %02x, want 84 and 78", tag, end)
	}
	keywords, fail := readKeywords(r.data())
	switch {
	case fail != "":
		add(r.off, "%s", fail)
	case len(keywords) == 0 || keywords[0].name != "RT":
		add(r.off+frame-1, "doesn't begin with the keyword RT")
	case !r.named():
		add(r.off+frame-1, "its keyword RT says %s", spec.Brief(keywords[0].value))
	}
	return list
}

// path is that of a record in the spec, and what it is called.
func (l *layout) path(i int) string {
	return fmt.Sprintf("records[%d] %s", i, spec.Brief([]byte(l.records[i].name)))
}

// A piece is a part of the image that belongs to something.
type piece struct {
	off, size int
	name      string
}

func (l *layout) pieces() []piece {
	list := []piece{{0, headerOffset, "header.ecc"}, {headerOffset, min(headerSize, len(l.image)-headerOffset), "header"}}
	add := func(r *record, path string) {
		if r.inside && r.size > 0 {
			list = append(list, piece{r.off, r.size, path})
		}
		if r.eccInside && r.eccLen > 0 {
			list = append(list, piece{r.eccOff, r.eccLen, path + ".ecc"})
		}
	}
	add(&l.toc, "toc")
	for i := range l.records {
		add(&l.records[i], l.path(i))
	}
	slices.SortStableFunc(list, func(a, b piece) int { return a.off - b.off })
	return list
}

func (l *layout) overlaps() []vpd.Problem {
	var list []vpd.Problem
	end, last := 0, ""
	for _, p := range l.pieces() {
		if p.off < end {
			list = append(list, vpd.Problem{Area: p.name, Off: int64(p.off), Msg: "overlaps " + last})
		}
		if p.off+p.size > end {
			end, last = p.off+p.size, p.name
		}
	}
	return list
}

// Fix returns a copy: what the ECC should be isn't public.
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
	off := 0
	add := func(n int, name, value, covered string) {
		if n > 0 {
			list = append(list, vpd.Field{Off: int64(off), Len: int64(n), Name: name, Value: value, CoveredBy: covered})
			off += n
		}
	}
	ecc := map[string]bool{"header.ecc": true}
	pieces := l.pieces()
	end := 0
	for _, p := range pieces {
		if p.off >= end { // of those that overlap, the first is shown
			ecc[p.name], end = true, p.off+p.size
		}
	}
	for _, p := range pieces {
		if p.off < off {
			continue
		}
		add(p.off-off, fmt.Sprintf("gap at %#x", off), spec.Brief(image[off:p.off]), "")
		covered := ""
		if ecc[p.name+".ecc"] {
			covered = p.name + ".ecc"
		}
		b := image[p.off : p.off+p.size]
		keywords, fail := readKeywords(b[min(len(b), frame-1):max(len(b)-1, min(len(b), frame-1))])
		if len(b) < frame || fail != "" || p.name == "header.ecc" || len(p.name) > 4 && p.name[len(p.name)-4:] == ".ecc" {
			add(p.size, p.name, spec.Brief(b), covered)
			continue
		}
		add(frame-1, p.name, spec.Brief(b[:frame-1]), covered)
		seen := map[string]int{}
		for _, k := range keywords {
			name := spec.Brief([]byte(k.name))
			if seen[name]++; seen[name] > 1 {
				name = fmt.Sprintf("%s#%d", name, seen[name])
			}
			head := 3
			if k.name[0] == '#' {
				head = 4
			}
			add(head+len(k.value), p.name+"."+name, spec.Brief(k.value), covered)
		}
		add(1, p.name+".end", spec.Byte(b[len(b)-1]), covered)
	}
	add(len(image)-off, "trailing", spec.Brief(image[off:]), "")
	return list, nil
}
