package pci

import (
	"encoding/binary"
	"fmt"

	"nvstore.dev/vpd"
)

// Tags. A large resource is a byte with bit 7 set, a little-endian length of
// two bytes, and data; a small one is a byte (type << 3 | length), and data.
const (
	tagIdentifier = 0x82
	tagReadOnly   = 0x90
	tagReadWrite  = 0x91
	tagEnd        = 0x78 // small, type 0xF, length 0

	largeHeader = 3
	fieldHeader = 3
)

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	res   []resource
	end   *resource // nil if there is no end tag
	rest  []byte    // behind the end tag, or from where no resource can be read
	stop  string    // why there is no end tag
	image []byte
}

type resource struct {
	tag    byte
	off    int // of the tag
	header int // 3 or 1
	data   []byte
	fields []field // of a read-only or read-write area
	tail   []byte  // what is no field at its end
}

type field struct {
	off  int // of the keyword
	kw   string
	data []byte
}

func (r *resource) isArea() bool { return r.tag == tagReadOnly || r.tag == tagReadWrite }
func (f *field) dataOff() int    { return f.off + fieldHeader }
func (l *layout) restOff() int   { return len(l.image) - len(l.rest) }

// scan cuts an image. It fails only if the image doesn't begin as VPD does.
func scan(image []byte) (*layout, error) {
	fail := func(msg string) (*layout, error) { return nil, &vpd.ImageError{Format: Name, Msg: msg} }
	switch {
	case len(image) > MaxSize:
		return fail(fmt.Sprintf("%d bytes, and VPD has at most %d", len(image), MaxSize))
	case len(image) == 0:
		return fail("empty")
	}
	switch image[0] {
	case tagIdentifier, tagReadOnly, tagReadWrite:
	case 0x00, 0xff:
		return fail(fmt.Sprintf("begins with %#02x, as an empty memory does", image[0]))
	default:
		return fail(fmt.Sprintf("begins with %#02x, want a resource tag 0x82, 0x90 or 0x91", image[0]))
	}
	l := &layout{image: image}
	for off := 0; ; {
		r, stop := next(image, off)
		if stop != "" {
			l.stop, l.rest = stop, image[off:]
			break
		}
		off += r.header + len(r.data)
		if r.header == 1 && r.tag&0xf8 == tagEnd {
			l.end, l.rest = &r, image[off:]
			break
		}
		if r.isArea() {
			r.cut()
		}
		l.res = append(l.res, r)
	}
	if len(l.res) == 0 {
		return fail(l.stop)
	}
	return l, nil
}

// next reads the resource at off, or says why there is none.
func next(image []byte, off int) (r resource, stop string) {
	left := image[off:]
	if len(left) == 0 {
		return r, "the image ends without an end tag"
	}
	r = resource{tag: left[0], off: off, header: 1}
	n := int(r.tag & 7)
	switch {
	case r.tag == 0x00 || r.tag == 0xff: // what a memory holds that wasn't written
		return r, fmt.Sprintf("%#02x stands where a tag should be", r.tag)
	case r.tag&0x80 != 0:
		r.header = largeHeader
		if len(left) < largeHeader {
			return r, fmt.Sprintf("resource %#02x is cut off in its header", r.tag)
		}
		n = int(binary.LittleEndian.Uint16(left[1:]))
	}
	if n > len(left)-r.header {
		return r, fmt.Sprintf("resource %#02x has a length of %d bytes, and the image has %d left", r.tag, n, len(left)-r.header)
	}
	r.data = left[r.header : r.header+n]
	return r, ""
}

// cut divides an area into fields.
func (r *resource) cut() {
	d, off := r.data, r.off+r.header
	for len(d) >= fieldHeader {
		n := int(d[2])
		if n > len(d)-fieldHeader {
			break
		}
		r.fields = append(r.fields, field{off, string(d[:2]), d[fieldHeader : fieldHeader+n]})
		d, off = d[fieldHeader+n:], off+fieldHeader+n
	}
	r.tail = d
}

// checksum is the byte that makes the sum from the image's start to off,
// inclusive, zero. Its present value doesn't count.
func checksum(image []byte, off int) byte {
	var sum byte
	for _, b := range image[:off] {
		sum += b
	}
	return -sum
}

// simple tells whether the layout is what the specification describes: at most
// one of each kind of resource, in order, so that the spec needs no list.
func (l *layout) simple() bool {
	last := byte(0)
	for _, r := range l.res {
		if r.tag != tagIdentifier && !r.isArea() || r.tag <= last {
			return false
		}
		last = r.tag
	}
	return true
}
