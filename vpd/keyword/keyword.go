// Package keyword packs and parses the keyword VPD of OpenPOWER machines' parts
// (the public parser is OpenBMC's openpower-vpd-parser,
// keyword_vpd_parser.cpp).
//
//	+------+-------+------+------+-------+----------+------+----------+------+
//	| 0x82 | len16 | name | 0x84 | len16 | keywords | 0x79 | checksum | 0x78 |
//	+------+-------+------+------+-------+----------+------+----------+------+
//
// Lengths are little-endian. The second tag may be 0x90. A keyword is two
// characters, a length byte and the value. The bytes from the second tag to the
// checksum add up to 0.
//
// The spec:
//
//	{
//	  "format": "keyword",
//	  "name": "...",
//	  "keywords": {"FN": "...", "PN": "...", "SN": "...", "B2": {"type": "hex", "data": "..."}},
//	  "size": 8192, "fill": 0   // of the image, behind the end
//	}
//
// What is irregular is spelt out: a "tag" other than 0x84, "data" instead of
// "keywords" if that isn't a list of them, "checksum" that is wrong, or null if
// checksum and end are missing, and "trailing" for bytes behind that aren't
// fill.
package keyword

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "keyword"

// MaxSize is the most bytes an image may have.
const MaxSize = 256 << 10

const (
	tagName     = 0x82
	tagKeywords = 0x84
	tagOther    = 0x90
	tagChecksum = 0x79
	tagEnd      = 0x78

	tagSize    = 3
	headSize   = 3 // of a keyword
	endSize    = 3
	maxKeyword = 0xff
)

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants everything right: PCI VPD begins in the same way.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	return err == nil && l.ended && len(l.list) > 0 && len(l.problems()) == 0
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image []byte
	name  []byte
	off   int // of the second tag
	data  []byte
	list  []entry
	fail  string // why data isn't keywords
	ended bool   // checksum and end are there
	rest  []byte
}

type entry struct {
	off   int // in the image
	name  string
	value []byte
}

func (l *layout) end() int       { return l.off + tagSize + len(l.data) }
func (l *layout) checksum() byte { return l.image[l.end()+1] }

// want is what belongs into the checksum.
func (l *layout) want() (sum byte) {
	for _, c := range l.image[l.off:l.end()] {
		sum -= c
	}
	return sum
}

// resource reads a tag with its length.
func resource(image []byte, off int) (data []byte, msg string) {
	if len(image)-off < tagSize {
		return nil, "the image ends where a tag should be"
	}
	n := int(binary.LittleEndian.Uint16(image[off+1:]))
	if n > len(image)-off-tagSize {
		return nil, fmt.Sprintf("its data has %d bytes, and %d are left", n, len(image)-off-tagSize)
	}
	return image[off+tagSize : off+tagSize+n], ""
}

// scan cuts an image. It fails if the two tags aren't there.
func scan(image []byte) (*layout, error) {
	fail := func(off int, format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Off: int64(off), Msg: fmt.Sprintf(format, args...)}
	}
	if len(image) > MaxSize {
		return fail(0, "%d bytes, want at most %d", len(image), MaxSize)
	}
	if len(image) == 0 || image[0] != tagName {
		return fail(0, "doesn't begin with the tag 0x82")
	}
	l := &layout{image: image}
	var msg string
	if l.name, msg = resource(image, 0); msg != "" {
		return fail(0, "the name: %s", msg)
	}
	l.off = tagSize + len(l.name)
	if l.off >= len(image) || image[l.off] != tagKeywords && image[l.off] != tagOther {
		return fail(l.off, "no tag 0x84 or 0x90 behind the name")
	}
	if l.data, msg = resource(image, l.off); msg != "" {
		return fail(l.off, "the keywords: %s", msg)
	}
	l.list, l.fail = entries(l.data, l.off+tagSize)
	l.rest = image[l.end():]
	if len(l.rest) >= endSize && l.rest[0] == tagChecksum && l.rest[2] == tagEnd {
		l.ended, l.rest = true, l.rest[endSize:]
	}
	return l, nil
}

func entries(data []byte, base int) (list []entry, fail string) {
	seen := map[string]bool{}
	for pos := 0; pos < len(data); {
		b := data[pos:]
		if len(b) < headSize {
			return nil, fmt.Sprintf("%d bytes behind the keywords are none", len(b))
		}
		n, name := int(b[2]), string(b[:2])
		switch {
		case n > len(b)-headSize:
			return nil, fmt.Sprintf("keyword %s has %d bytes, and %d are left", spec.Brief(b[:2]), n, len(b)-headSize)
		case !spec.IsText(b[:2]):
			return nil, fmt.Sprintf("keyword %s is not two printable characters", spec.Brief(b[:2]))
		case seen[name]:
			return nil, fmt.Sprintf("keyword %s comes more than once", name)
		}
		seen[name] = true
		list = append(list, entry{base + pos, name, b[headSize : headSize+n]})
		pos += headSize + n
	}
	return list, ""
}

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "name", "tag", "keywords", "data", "checksum", "trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	out, off, err := packTags(o)
	if err != nil {
		return nil, nil, err
	}
	raw, ok := o.Get("checksum")
	if !ok || string(raw) != "null" {
		var sum byte
		for _, c := range out[off:] {
			sum -= c
		}
		n, err := form.Uint(o, "", "checksum", 0xff, uint64(sum))
		if err != nil {
			return nil, nil, err
		}
		out = append(out, tagChecksum, byte(n), tagEnd)
	}
	if out, err = form.Pad(o, out, MaxSize); err != nil {
		return nil, nil, err
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be keyword VPD: %v", err)
	}
	if l.ended == (ok && string(raw) == "null") {
		return nil, nil, spec.Errorf("trailing", "is a checksum and an end")
	}
	return out, form.Warnings(l.problems()), nil
}

// packTags writes name and keywords; off is where the second tag lies.
func packTags(o spec.Object) (out []byte, off int, err error) {
	raw, ok := o.Get("name")
	if !ok {
		return nil, 0, spec.Errorf("name", "missing")
	}
	name, err := form.Text("name", raw, 0xffff)
	if err != nil {
		return nil, 0, err
	}
	tag, err := form.Uint(o, "", "tag", 0xff, tagKeywords)
	if err != nil {
		return nil, 0, err
	}
	if tag != tagKeywords && tag != tagOther {
		return nil, 0, spec.Errorf("tag", "%#x, want 0x84 or 0x90", tag)
	}
	data, err := packData(o)
	if err != nil {
		return nil, 0, err
	}
	out = binary.LittleEndian.AppendUint16([]byte{tagName}, uint16(len(name)))
	out = append(out, name...)
	off = len(out)
	out = binary.LittleEndian.AppendUint16(append(out, byte(tag)), uint16(len(data)))
	return append(out, data...), off, nil
}

func packData(o spec.Object) ([]byte, error) {
	raw, ok := o.Get("keywords")
	if !ok {
		return form.Bytes(o, "", "data", 0xffff)
	}
	if _, both := o.Get("data"); both {
		return nil, spec.Errorf("data", "can't stand beside keywords")
	}
	keywords, err := spec.ParseObject("keywords", raw)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, m := range keywords {
		b, err := packKeyword(m.Name, m.Value)
		if err != nil {
			return nil, err
		}
		if out = append(out, b...); len(out) > 0xffff {
			return nil, spec.Errorf("keywords", "take more than %d bytes", 0xffff)
		}
	}
	return out, nil
}

func packKeyword(name string, raw json.RawMessage) ([]byte, error) {
	path := spec.Join("keywords", name)
	if len(name) != 2 || !spec.IsText([]byte(name)) {
		return nil, spec.Errorf(path, "a keyword has two printable characters")
	}
	v, err := form.Text(path, raw, maxKeyword)
	if err != nil {
		return nil, err
	}
	return append([]byte{name[0], name[1], byte(len(v))}, v...), nil
}

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	o.Add("format", Name)
	o.Add("name", spec.Show(l.name))
	if tag := image[l.off]; tag != tagKeywords {
		o.Add("tag", spec.Byte(tag))
	}
	if l.fail == "" {
		keywords := spec.Object{}
		for _, e := range l.list {
			keywords.Add(e.name, spec.Show(e.value))
		}
		o.Add("keywords", keywords)
	} else {
		o.Add("data", form.Hex(l.data))
	}
	if !l.ended {
		o.Add("checksum", nil)
	} else if l.checksum() != l.want() {
		o.Add("checksum", spec.Byte(l.checksum()))
	}
	form.AddRest(&o, l.rest, len(image))
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

// Verify checks structure and checksum.
func (format) Verify(image []byte) []vpd.Problem {
	l, err := scan(image)
	if err != nil {
		return []vpd.Problem{{Area: "image", Off: 0, Msg: err.Error()}}
	}
	return l.problems()
}

func (l *layout) problems() []vpd.Problem {
	var list []vpd.Problem
	if l.fail != "" {
		list = append(list, vpd.Problem{Area: "keywords", Off: int64(l.off + tagSize), Msg: l.fail})
	}
	switch {
	case !l.ended:
		list = append(list, vpd.Problem{Area: "checksum", Off: int64(l.end()), Msg: "no checksum, 0x79 in front and 0x78 behind, stands there"})
	case l.checksum() != l.want():
		list = append(list, vpd.Problem{Area: "checksum", Off: int64(l.end() + 1), Msg: "is wrong",
			Got: spec.Byte(l.checksum()), Want: spec.Byte(l.want()), Fixable: true})
	}
	return list
}

// Fix sets the checksum.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	if !l.ended || l.checksum() == l.want() {
		return fixed, nil, nil
	}
	fixed[l.end()+1] = l.want()
	return fixed, []vpd.Change{{Area: "checksum", Off: int64(l.end() + 1), Msg: "checksum",
		Old: spec.Byte(l.checksum()), New: spec.Byte(l.want())}}, nil
}

// Fields cuts the image without a gap.
func (format) Fields(image []byte) ([]vpd.Field, error) {
	l, err := scan(image)
	if err != nil {
		return nil, err
	}
	var list []vpd.Field
	off := int64(0)
	covered := ""
	add := func(n int, name, value string) {
		if n > 0 {
			list = append(list, vpd.Field{Off: off, Len: int64(n), Name: name, Value: value, CoveredBy: covered})
			off += int64(n)
		}
	}
	add(tagSize, "name.tag", fmt.Sprintf("0x82, %d bytes", len(l.name)))
	add(len(l.name), "name", spec.Brief(l.name))
	if l.ended {
		covered = "checksum"
	}
	add(tagSize, "keywords.tag", fmt.Sprintf("%#02x, %d bytes", image[l.off], len(l.data)))
	if l.fail == "" {
		for _, e := range l.list {
			add(headSize+len(e.value), "keywords."+e.name, spec.Brief(e.value))
		}
	} else {
		add(len(l.data), "data", spec.Brief(l.data))
	}
	if l.ended {
		add(1, "checksum.tag", "0x79")
		list[len(list)-1].CoveredBy = ""
		add(1, "checksum", spec.Byte(l.checksum()))
		covered = ""
		add(1, "end", "0x78")
	}
	add(len(l.rest), "trailing", spec.Brief(l.rest))
	return list, nil
}
