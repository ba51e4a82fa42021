package blobdir

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Encoding appends; decoding goes through cryptobyte, which is strict about
// lengths and integers, and is followed by a comparison with the encoding of
// what was understood. Together they accept exactly one encoding.

const (
	tagSequence = 0x30
	tagTime     = 0x18
)

// context tags: primitive and constructed.
func ctxP(n byte) byte { return 0x80 | n }
func ctxC(n byte) byte { return 0xa0 | n }

// appendTLV appends tag, length and what f appends.
func appendTLV(dst []byte, tag byte, f func([]byte) []byte) []byte {
	start := len(dst)
	dst = f(append(dst, tag, 0))
	n := len(dst) - start - 2
	if n < 0x80 {
		dst[start+1] = byte(n)
		return dst
	}
	extra := 1
	for v := n >> 8; v > 0; v >>= 8 {
		extra++
	}
	dst = append(dst, make([]byte, extra)...)
	copy(dst[start+2+extra:], dst[start+2:start+2+n])
	dst[start+1] = 0x80 | byte(extra)
	for i := range extra {
		dst[start+2+i] = byte(n >> (8 * (extra - 1 - i)))
	}
	return dst
}

func appendSequence(dst []byte, f func([]byte) []byte) []byte {
	return appendTLV(dst, tagSequence, f)
}

func appendBytes(dst []byte, tag byte, p []byte) []byte {
	return appendTLV(dst, tag, func(b []byte) []byte { return append(b, p...) })
}

func appendOctets(dst, p []byte) []byte { return appendBytes(dst, byte(cbasn1.OCTET_STRING), p) }

func appendUTF8(dst []byte, s string) []byte {
	return appendTLV(dst, byte(cbasn1.UTF8String), func(b []byte) []byte { return append(b, s...) })
}

func appendInt(dst []byte, v int64) []byte {
	n := 1
	for w := v >> 7; w > 0; w >>= 8 {
		n++
	}
	dst = append(dst, byte(cbasn1.INTEGER), byte(n))
	for i := n - 1; i >= 0; i-- {
		dst = append(dst, byte(v>>(8*i)))
	}
	return dst
}

func appendBool(dst []byte, v bool) []byte {
	b := byte(0)
	if v {
		b = 0xff
	}
	return append(dst, byte(cbasn1.BOOLEAN), 1, b)
}

const timeFormat = "20060102150405Z"

func appendTime(dst []byte, t time.Time) []byte {
	dst = append(dst, tagTime, byte(len(timeFormat)))
	return t.UTC().AppendFormat(dst, timeFormat)
}

// A decoder reads one structure and keeps the first error, with the offset
// at which it was met.
type decoder struct {
	whole []byte
	off   int64 // where whole lies on the device
	name  string
	err   error
}

func newDecoder(p []byte, off int64, name string) *decoder {
	return &decoder{whole: p[:len(p):len(p)], off: off, name: name}
}

// pos is the device offset of what s has left. Substrings of one array share
// its end, so capacities tell positions.
func (d *decoder) pos(s cryptobyte.String) int64 {
	return d.off + int64(cap(d.whole)-cap([]byte(s)))
}

func (d *decoder) fail(s cryptobyte.String, rule, field string, got any, want string) {
	if d.err == nil {
		d.err = corrupt(d.pos(s), rule, d.name, field, got, want)
	}
}

// all opens the outermost SEQUENCE, which must fill the input.
func (d *decoder) all() cryptobyte.String {
	s := cryptobyte.String(d.whole)
	in := d.seq(&s, tagSequence, "")
	if d.err == nil && !s.Empty() {
		d.fail(s, "R1", "", nil, "no bytes behind the structure")
	}
	return in
}

// all0 gives the whole input, for items that are a SEQUENCE themselves.
func (d *decoder) all0() cryptobyte.String { return cryptobyte.String(d.whole) }

// first opens the SEQUENCE at the start of the input, and returns its length.
func (d *decoder) first() (int, bool) {
	s := cryptobyte.String(d.whole)
	var el cryptobyte.String
	if !s.ReadASN1Element(&el, cbasn1.SEQUENCE) {
		return 0, false
	}
	return len(el), true
}

func (d *decoder) seq(s *cryptobyte.String, tag byte, field string) cryptobyte.String {
	var in cryptobyte.String
	if d.err != nil {
		return nil
	}
	at := *s
	if !s.ReadASN1(&in, cbasn1.Tag(tag)) {
		d.fail(at, "R1", field, nil, fmt.Sprintf("a DER element of tag %#02x", tag))
		return nil
	}
	return in
}

// end demands that a SEQUENCE has been used up.
func (d *decoder) end(s cryptobyte.String, field string) {
	if d.err == nil && !s.Empty() {
		d.fail(s, "R1", field, nil, "no elements beyond those defined")
	}
}

func (d *decoder) int(s *cryptobyte.String, field string, lo, hi int64) int64 {
	if d.err != nil {
		return 0
	}
	at := *s
	var v int64
	if !s.ReadASN1Integer(&v) {
		d.fail(at, "R1", field, nil, "a DER INTEGER of at most 64 bits")
		return 0
	}
	if v < lo || v > hi {
		d.fail(at, "R4", field, v, fmt.Sprintf("%d to %d", lo, hi))
		return 0
	}
	return v
}

// octets reads an OCTET STRING (or another string tag) of lo to hi bytes.
func (d *decoder) octets(s *cryptobyte.String, tag byte, field string, lo, hi int) []byte {
	at := *s
	in := d.seq(s, tag, field)
	if d.err == nil && (len(in) < lo || len(in) > hi) {
		d.fail(at, "R5", field, len(in), fmt.Sprintf("%d to %d bytes", lo, hi))
		return nil
	}
	return in
}

func (d *decoder) utf8(s *cryptobyte.String, field string, hi int) string {
	at := *s
	p := d.octets(s, byte(cbasn1.UTF8String), field, 0, hi)
	if d.err == nil && !validText(string(p)) {
		d.fail(at, "R6", field, nil, "UTF-8 without control characters")
	}
	return string(p)
}

func (d *decoder) array(s *cryptobyte.String, tag byte, field string, out []byte) {
	copy(out, d.octets(s, tag, field, len(out), len(out)))
}

func (d *decoder) bool(s *cryptobyte.String, field string) bool {
	var v bool
	at := *s
	if d.err == nil && !s.ReadASN1Boolean(&v) {
		d.fail(at, "R1", field, nil, "a DER BOOLEAN")
	}
	return v
}

func (d *decoder) time(s *cryptobyte.String, field string) time.Time {
	at := *s
	p := d.octets(s, tagTime, field, len(timeFormat), len(timeFormat))
	if d.err != nil {
		return time.Time{}
	}
	t, err := time.Parse(timeFormat, string(p))
	if err != nil {
		d.fail(at, "R7", field, string(p), "a GeneralizedTime of the form YYYYMMDDHHMMSSZ")
	}
	return t
}

// oid demands this object identifier, given as DER.
func (d *decoder) oid(s *cryptobyte.String, want []byte) {
	if d.err != nil {
		return
	}
	at := *s
	var el cryptobyte.String
	if !s.ReadASN1Element(&el, cbasn1.OBJECT_IDENTIFIER) || !bytes.Equal(el, want) {
		d.fail(at, "R2", "type", oidString(el), oidString(want))
	}
}

func oidString(der []byte) string {
	var o asn1.ObjectIdentifier
	if _, err := asn1.Unmarshal(der, &o); err != nil {
		return "no OBJECT IDENTIFIER"
	}
	return o.String()
}

// canonical demands that encoding what was understood gives the input back.
func (d *decoder) canonical(again []byte) error {
	if d.err != nil {
		return d.err
	}
	if !bytes.Equal(again, d.whole) {
		return corrupt(d.off, "R1", d.name, "", nil, "the one DER encoding of its content")
	}
	return nil
}

// An extension is a field that version 1 doesn't define.
type extension struct {
	id       []byte // DER of the OBJECT IDENTIFIER
	critical bool
	value    []byte
}

func appendExtensions(dst []byte, tag byte, xs []extension) []byte {
	if len(xs) == 0 {
		return dst
	}
	return appendTLV(dst, tag, func(b []byte) []byte {
		for _, x := range xs {
			b = appendSequence(b, func(b []byte) []byte {
				b = append(b, x.id...)
				if x.critical { // DEFAULT FALSE is not encoded
					b = appendBool(b, true)
				}
				return appendOctets(b, x.value)
			})
		}
		return b
	})
}

// extensions reads an optional extension list and refuses critical ones:
// version 1 knows none.
func (d *decoder) extensions(s *cryptobyte.String, tag byte) []extension {
	if d.err != nil || !s.PeekASN1Tag(cbasn1.Tag(tag)) {
		return nil
	}
	at := *s
	list := d.seq(s, tag, "extensions")
	var xs []extension
	for d.err == nil && !list.Empty() {
		if len(xs) == maxExtensions {
			d.fail(list, "R8", "extensions", nil, fmt.Sprintf("at most %d extensions", maxExtensions))
			return nil
		}
		in := d.seq(&list, tagSequence, "extension")
		var x extension
		var el cryptobyte.String
		if d.err == nil && !in.ReadASN1Element(&el, cbasn1.OBJECT_IDENTIFIER) {
			d.fail(in, "R1", "extension.id", nil, "an OBJECT IDENTIFIER")
		}
		x.id = el
		var number cryptobyte.String
		if d.err == nil && (!el.ReadASN1(&number, cbasn1.OBJECT_IDENTIFIER) || !validOID(number)) {
			d.fail(in, "R1", "extension.id", nil, "a DER OBJECT IDENTIFIER")
		}
		if d.err == nil && in.PeekASN1Tag(cbasn1.BOOLEAN) {
			x.critical = d.bool(&in, "extension.critical")
		}
		x.value = d.octets(&in, byte(cbasn1.OCTET_STRING), "extension.value", 0, maxNode)
		d.end(in, "extension")
		if d.err == nil && x.critical {
			d.err = &Error{Off: d.pos(at), Struct: d.name, Field: "extensions", Got: oidString(x.id),
				Want: "no critical extension", Rule: "R8", Kind: ErrUnsupported}
		}
		xs = append(xs, x)
	}
	if d.err == nil && len(xs) == 0 {
		d.fail(at, "R1", "extensions", nil, "absent rather than empty")
	}
	return xs
}

// validOID tells whether these are the contents of an OBJECT IDENTIFIER: at
// least one number, each in the fewest bytes. Numbers may be of any size.
func validOID(p []byte) bool {
	start := true
	for _, b := range p {
		if start && b == 0x80 {
			return false
		}
		start = b < 0x80
	}
	return len(p) > 0 && start
}

// unsupported tells an unsupported structure from a damaged one.
func unsupported(err error) bool { return errors.Is(err, ErrUnsupported) }
