package machine

import (
	"bytes"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"strings"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"nvstore.dev/image"
)

// oidLayout is arc.1.9 of FORMAT.md, section 3.
var oidLayout = asn1.ObjectIdentifier{1, 2, 840, 113556, 1, 8000, 2554, 64817, 25853, 8626, 17789, 42095, 794743, 15004100, 1, 9}

var crcTable = crc32.MakeTable(crc32.Castagnoli)

// An Error says what is wrong with a layout record.
type Error struct {
	Off   int64  // byte offset in the image
	Field string // of the record
	Got   any    // nil if not meaningful
	Want  string
	Rule  string // of FORMAT.md, section 18
	Kind  error  // image.ErrCorrupt or image.ErrUnsupported
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("layout record")
	if e.Field != "" {
		b.WriteString("." + e.Field)
	}
	fmt.Fprintf(&b, " at byte %#x: ", e.Off)
	if e.Got != nil {
		fmt.Fprintf(&b, "got %v, ", e.Got)
	}
	fmt.Fprintf(&b, "want %s (%s): %v", e.Want, e.Rule, e.Kind)
	return b.String()
}

// Unwrap returns the kind.
func (e *Error) Unwrap() error { return e.Kind }

// A record is one copy of the layout.
type record struct {
	Layout
	slot int
}

// slotOffset is where in an image of this size a copy lies.
func slotOffset(size int64, slot int) int64 { return size - Reserved + int64(slot)*slotDistance }

func (r *record) appendBody(b *cryptobyte.Builder) {
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(oidLayout)
		b.AddASN1Int64(1)
		b.AddASN1Int64(int64(r.slot))
		b.AddASN1Int64(r.Sequence)
		b.AddASN1OctetString(r.Machine[:])
		for _, v := range []int64{r.ImageSize, r.DiskSize, r.StateOffset, r.StateSize} {
			b.AddASN1Int64(v)
		}
	})
}

// encode gives the one encoding of the record.
func (r *record) encode() []byte {
	var b cryptobyte.Builder
	b.AddASN1(cbasn1.SEQUENCE, func(b *cryptobyte.Builder) {
		var body cryptobyte.Builder
		r.appendBody(&body)
		p := body.BytesOrPanic() // sizes are bounded
		b.AddBytes(p)
		b.AddASN1OctetString(binary.BigEndian.AppendUint32(nil, crc32.Checksum(p, crcTable)))
	})
	return b.BytesOrPanic()
}

// magic is the type, as DER: a record begins with a SEQUENCE that begins with a
// SEQUENCE that begins with it.
var magic = func() []byte {
	var b cryptobyte.Builder
	b.AddASN1ObjectIdentifier(oidLayout)
	return b.BytesOrPanic()
}()

// claims tells whether there is something that means to be a record, of a
// version to come as well.
func claims(p []byte) bool {
	const lengths = 2 * 6 // two tags with lengths
	return p[0] == 0x30 && bytes.Contains(p[:lengths+len(magic)], magic)
}

// parse reads the copy at off, which claims to be one, in an image of size
// bytes.
func parse(p []byte, off, size int64, slot int) (*record, error) {
	bad := func(rule, field string, got any, want string) (*record, error) {
		return nil, &Error{Off: off, Field: field, Got: got, Want: want, Rule: rule, Kind: image.ErrCorrupt}
	}
	s := cryptobyte.String(p)
	var whole, element, in, body, crc cryptobyte.String
	if !s.ReadASN1Element(&whole, cbasn1.SEQUENCE) {
		return bad("L1", "", nil, "a DER SEQUENCE of at most 512 bytes")
	}
	outer := whole
	if !outer.ReadASN1(&in, cbasn1.SEQUENCE) || !in.ReadASN1Element(&element, cbasn1.SEQUENCE) ||
		!in.ReadASN1(&crc, cbasn1.OCTET_STRING) || !in.Empty() {
		return bad("L1", "", nil, "a body and its CRC, and nothing else")
	}
	if len(crc) != 4 || binary.BigEndian.Uint32(crc) != crc32.Checksum(element, crcTable) {
		return bad("L2", "crc32c", nil, "the CRC of the body")
	}
	r := new(record)
	var oid, id cryptobyte.String
	var version int64
	inner := element
	if !inner.ReadASN1(&body, cbasn1.SEQUENCE) || !body.ReadASN1Element(&oid, cbasn1.OBJECT_IDENTIFIER) || !bytes.Equal(oid, magic) {
		return bad("L1", "type", nil, oidLayout.String())
	}
	if !body.ReadASN1Integer(&version) {
		return bad("L1", "version", nil, "an INTEGER")
	}
	if version != 1 {
		return nil, &Error{Off: off, Field: "version", Got: version, Want: "1", Rule: "L3", Kind: image.ErrUnsupported}
	}
	var at int64
	for _, f := range []struct {
		name   string
		v      *int64
		lo, hi int64
	}{
		{"slot", &at, 0, 1}, {"sequence", &r.Sequence, 1, maxSize}, {"machine", nil, 0, 0},
		{"imageSize", &r.ImageSize, Reserved, maxSize}, {"diskSize", &r.DiskSize, 0, maxSize},
		{"stateOffset", &r.StateOffset, 0, maxSize}, {"stateSize", &r.StateSize, 0, maxSize},
	} {
		if f.v == nil {
			if !body.ReadASN1(&id, cbasn1.OCTET_STRING) {
				return bad("L1", f.name, nil, "an OCTET STRING")
			}
			if len(id) != len(r.Machine) || bytes.Equal(id, make([]byte, len(id))) {
				return bad("L4", f.name, nil, "16 bytes that aren't all zero")
			}
			copy(r.Machine[:], id)
			continue
		}
		if !body.ReadASN1Integer(f.v) {
			return bad("L1", f.name, nil, "a DER INTEGER of at most 64 bits")
		}
		if *f.v < f.lo || *f.v > f.hi {
			return bad("L4", f.name, *f.v, fmt.Sprintf("%d to %d", f.lo, f.hi))
		}
	}
	r.slot = int(at)
	switch {
	case !body.Empty():
		return bad("L1", "", nil, "no elements beyond those defined")
	case r.slot != slot:
		return bad("L5", "slot", r.slot, fmt.Sprintf("%d, that of its place", slot))
	case r.ImageSize != size:
		return bad("L6", "imageSize", r.ImageSize, fmt.Sprintf("%d, the image's size", size))
	case !bytes.Equal(r.encode(), whole):
		return bad("L1", "", nil, "the one DER encoding of its content")
	}
	if rule, field, got, want := r.check(); rule != "" {
		return bad(rule, field, got, want)
	}
	return r, nil
}
