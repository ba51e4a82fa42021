package fru

import (
	"fmt"
	"slices"

	"nvstore.dev/vpd"
)

const (
	headerSize  = 8
	offPad      = 6
	offChecksum = 7

	recordHeader = 5
	endOfList    = 0x80 // in a record's second byte
	recordFormat = 2    // in its other bits

	endMark = 0xc1 // type/length byte behind the last field
	unit    = 8    // of offsets and lengths
)

// The kinds of areas, by the place of their offset in the header.
const (
	internal = 1 + iota
	chassis
	board
	product
	multirecord
)

// A kind says what is in an area in front of its fields, and which these are.
type kind struct {
	name   string
	header int // bytes in front of the fields
	fields []string
}

var kinds = [...]kind{
	internal:    {name: "internal"},
	chassis:     {"chassis", 3, []string{"part_number", "serial_number"}},
	board:       {"board", 6, []string{"manufacturer", "product_name", "serial_number", "part_number", "file_id"}},
	product:     {"product", 3, []string{"manufacturer", "product_name", "part_number", "version", "serial_number", "asset_tag", "file_id"}},
	multirecord: {name: "multirecord"},
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image []byte
	areas []area // in ascending order of offset, disjoint
	lost  []lost // what the header points at and isn't there
}

type area struct {
	kind    int
	off     int
	data    []byte
	fields  []field  // of chassis, board and product
	end     int      // offset in data of the end mark, or where reading stopped
	stopped string   // why there is no end mark
	recs    []record // of multirecord
	unended string   // why the last record isn't marked as the last
}

type field struct {
	off  int // of the type/length byte, in the image
	code byte
	data []byte
}

type record struct {
	off  int
	head []byte
	data []byte
}

type lost struct {
	kind int
	why  string
}

func (a *area) name() string { return kinds[a.kind].name }
func (a *area) isInfo() bool { return kinds[a.kind].header > 0 }

func (r *record) typ() byte  { return r.head[0] }
func (r *record) last() bool { return r.head[1]&endOfList != 0 }

func recordName(i int) string { return fmt.Sprintf("multirecord[%d]", i) }

// scan cuts an image. It fails only if there is no header of version 1.
func scan(image []byte) (*layout, error) {
	fail := func(format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Msg: fmt.Sprintf(format, args...)}
	}
	switch {
	case len(image) > MaxSize:
		return fail("%d bytes, want at most %d", len(image), MaxSize)
	case len(image) < headerSize:
		return fail("%d bytes, and the header alone has %d", len(image), headerSize)
	case image[0] != 1:
		return fail("begins with %#02x, want version 1 of the header", image[0])
	}
	l := &layout{image: image}
	order := []int{internal, chassis, board, product, multirecord}
	order = slices.DeleteFunc(order, func(k int) bool { return image[k] == 0 })
	slices.SortStableFunc(order, func(a, b int) int { return int(image[a]) - int(image[b]) })
	for i, k := range order {
		off, limit := int(image[k])*unit, len(image)
		if off >= len(image) {
			l.lost = append(l.lost, lost{k, fmt.Sprintf("begins at %d, and the image has %d bytes", off, len(image))})
			continue
		}
		if i+1 < len(order) {
			limit = min(limit, int(image[order[i+1]])*unit)
		}
		a := area{kind: k, off: off}
		if why := a.read(image[off:limit], limit == len(image)); why != "" {
			l.lost = append(l.lost, lost{k, why})
			continue
		}
		l.areas = append(l.areas, a)
	}
	return l, nil
}

// read takes an area out of the room there is for it.
func (a *area) read(room []byte, toEnd bool) (why string) {
	switch {
	case len(room) == 0:
		return "begins where another area does"
	case a.isInfo():
		return a.readInfo(room)
	case a.kind == multirecord:
		return a.readRecords(room)
	}
	n := len(room)
	if toEnd { // it has no length of its own: leave the fill
		for n > 1 && room[n-1] == room[len(room)-1] {
			n--
		}
	}
	a.data = room[:n]
	return ""
}

func (a *area) readInfo(room []byte) (why string) {
	if len(room) < unit {
		return fmt.Sprintf("has %d bytes up to what comes next", len(room))
	}
	n := int(room[1]) * unit
	switch {
	case room[0]&0x0f != 1:
		return fmt.Sprintf("begins with %#02x, want version 1 of the area", room[0])
	case n == 0:
		return "has a length of 0"
	case n > len(room):
		return fmt.Sprintf("has a length of %d bytes, and up to what comes next there are %d", n, len(room))
	}
	a.data = room[:n]
	pos := kinds[a.kind].header
	for ; ; pos += 1 + len(a.fields[len(a.fields)-1].data) {
		switch {
		case pos == n-1:
			a.stopped = "the fields reach the checksum without an end mark 0xc1"
		case a.data[pos] == endMark:
		case pos+1+int(a.data[pos]&0x3f) > n-1:
			a.stopped = fmt.Sprintf("the field at byte %#x is cut off by the area's end", a.off+pos)
		default:
			a.fields = append(a.fields, field{a.off + pos, a.data[pos] >> 6, a.data[pos+1 : pos+1+int(a.data[pos]&0x3f)]})
			continue
		}
		a.end = pos
		return ""
	}
}

// readRecords reads until the record that is marked as the last. A record
// whose checksum is wrong counts if it looks like one otherwise.
func (a *area) readRecords(room []byte) (why string) {
	pos := 0
	for {
		why = ""
		left := room[pos:]
		switch {
		case len(left) < recordHeader:
			why = fmt.Sprintf("%d bytes are left, and a record's header has %d", len(left), recordHeader)
		case sum(left[:recordHeader]) != 0 && left[1]&^endOfList != recordFormat:
			why = "what stands there is no record"
		case recordHeader+int(left[2]) > len(left):
			why = fmt.Sprintf("the record has %d bytes of data, and %d are left", left[2], len(left)-recordHeader)
		}
		if why != "" {
			break
		}
		r := record{a.off + pos, left[:recordHeader], left[recordHeader : recordHeader+int(left[2])]}
		a.recs = append(a.recs, r)
		pos += recordHeader + len(r.data)
		if r.last() {
			break
		}
	}
	if len(a.recs) == 0 {
		return why
	}
	a.data, a.unended = room[:pos], why
	return ""
}
