package pci

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

const (
	maxField    = 0xff
	maxResource = 0xffff
)

// A builder collects the image. The checksums are set at the end, from the
// start on, because each covers everything in front of it.
type builder struct {
	out       []byte
	checksums []int // offsets of bytes to compute
}

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "identifier", "read_only", "read_write", "resources",
		"end_tag", "trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	b := &builder{}
	if err := b.resources(o); err != nil {
		return nil, nil, err
	}
	if err := b.end(o); err != nil {
		return nil, nil, err
	}
	if err := b.pad(o); err != nil {
		return nil, nil, err
	}
	for _, off := range b.checksums {
		b.out[off] = checksum(b.out, off)
	}
	// Reading the result back shows what is irregular about it, and
	// whether it is VPD at all.
	l, err := scan(b.out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be VPD: %v", err)
	}
	return b.out, warnings(l.problems()), nil
}

func (b *builder) resources(o spec.Object) error {
	list, listed := o.Get("resources")
	for _, m := range []string{"identifier", "read_only", "read_write"} {
		raw, ok := o.Get(m)
		if ok && listed {
			return spec.Errorf(m, "can't stand beside resources; put it into the list")
		}
		if ok {
			if err := b.resource(m, m, raw); err != nil {
				return err
			}
		}
	}
	if !listed {
		return nil
	}
	var elements []json.RawMessage
	if err := json.Unmarshal(list, &elements); err != nil || string(list) == "null" {
		return spec.Errorf("resources", "want a list")
	}
	for i, raw := range elements {
		if err := b.element(fmt.Sprintf("resources[%d]", i), raw); err != nil {
			return err
		}
	}
	return nil
}

func (b *builder) element(path string, raw json.RawMessage) error {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return err
	}
	if tag, ok := o.Get("tag"); ok {
		return b.unknown(path, o, tag)
	}
	if len(o) != 1 {
		return spec.Errorf(path, "want one member, identifier, read_only or read_write, or tag and data")
	}
	return b.resource(spec.Join(path, o[0].Name), o[0].Name, o[0].Value)
}

// unknown adds a resource whose meaning isn't known.
func (b *builder) unknown(path string, o spec.Object, rawTag json.RawMessage) error {
	if err := o.Only(path, "tag", "data"); err != nil {
		return err
	}
	tag, err := spec.Uint(path+".tag", rawTag, 0xff)
	if err != nil {
		return err
	}
	rawData, ok := o.Get("data")
	if !ok {
		return spec.Errorf(path+".data", "missing")
	}
	v, err := spec.ParseValue(path+".data", rawData, maxResource)
	if err != nil {
		return err
	}
	switch {
	case member(byte(tag)) != "data":
		return spec.Errorf(path+".tag", "write %s instead", member(byte(tag)))
	case tag == 0x00 || tag == 0xff || tag&0xf8 == tagEnd:
		return spec.Errorf(path+".tag", "0x00, 0xff and the end tag can't stand here")
	case tag < 0x80 && int(tag&7) != len(v.Bytes):
		return spec.Errorf(path+".data", "%d bytes, and the tag says %d", len(v.Bytes), tag&7)
	case tag < 0x80:
		return b.add(path, append([]byte{byte(tag)}, v.Bytes...))
	}
	return b.large(path, byte(tag), v.Bytes)
}

// add appends bytes, keeping to the limit early.
func (b *builder) add(path string, p []byte) error {
	if len(b.out)+len(p) > MaxSize {
		return spec.Errorf(path, "the image would exceed %d bytes", MaxSize)
	}
	b.out = append(b.out, p...)
	return nil
}

func (b *builder) large(path string, tag byte, data []byte) error {
	if len(data) > maxResource {
		return spec.Errorf(path, "%d bytes, want at most %d", len(data), maxResource)
	}
	header := binary.LittleEndian.AppendUint16([]byte{tag}, uint16(len(data)))
	return b.add(path, append(header, data...))
}

func (b *builder) resource(path, kind string, raw json.RawMessage) error {
	switch kind {
	case "identifier":
		v, err := text(path, raw, maxResource)
		if err != nil {
			return err
		}
		return b.large(path, tagIdentifier, v)
	case "read_only":
		return b.area(path, tagReadOnly, raw)
	case "read_write":
		return b.area(path, tagReadWrite, raw)
	}
	return spec.Errorf(path, "unknown; want identifier, read_only or read_write")
}

// text reads a value, of which text must be printable ASCII; hex, base64 and
// numbers say that the bytes are meant.
func text(path string, raw json.RawMessage, limit int) ([]byte, error) {
	v, err := spec.ParseValue(path, raw, limit)
	if err != nil {
		return nil, err
	}
	if v.Type == "text" && !spec.IsText(v.Bytes) {
		return nil, spec.Errorf(path, "holds characters that are not printable ASCII; use type hex for other bytes")
	}
	return v.Bytes, nil
}

// area adds an area of fields, and the one that must close it.
func (b *builder) area(path string, tag byte, raw json.RawMessage) error {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return err
	}
	a := &area{path: path, tag: tag, base: len(b.out) + largeHeader, seen: map[string]int{}}
	for i, m := range o {
		if m.Name == "tail" {
			if i < len(o)-1 {
				return spec.Errorf(path+".tail", "must be the last member")
			}
			if err := a.close(); err != nil {
				return err
			}
			v, err := spec.ParseValue(path+".tail", m.Value, maxResource)
			if err != nil {
				return err
			}
			a.data = append(a.data, v.Bytes...)
			break
		}
		if err := a.field(m); err != nil {
			return err
		}
	}
	if err := a.close(); err != nil {
		return err
	}
	b.checksums = append(b.checksums, a.checksums...)
	return b.large(path, tag, a.data)
}

type area struct {
	path      string
	tag       byte
	base      int // offset of the area's data in the image
	data      []byte
	checksums []int
	seen      map[string]int
	closed    bool // the closing field is there, or left out on purpose
}

func (a *area) closing() string { return closingKeyword(a.tag) }

func (a *area) close() error {
	if a.closed {
		return nil
	}
	a.closed = true
	if a.tag == tagReadOnly {
		a.checksums = append(a.checksums, a.base+len(a.data)+fieldHeader)
		return a.put(a.path+".RV", "RV", []byte{0})
	}
	return a.put(a.path+".RW", "RW", nil)
}

func (a *area) put(path, kw string, data []byte) error {
	if len(data) > maxField {
		return spec.Errorf(path, "%d bytes, want at most %d", len(data), maxField)
	}
	a.data = append(a.data, kw[0], kw[1], byte(len(data)))
	a.data = append(a.data, data...)
	if len(a.data) > MaxSize {
		return spec.Errorf(path, "the image would exceed %d bytes", MaxSize)
	}
	return nil
}

func (a *area) field(m spec.Member) error {
	path := spec.Join(a.path, m.Name)
	kw, err := a.keyword(path, m.Name)
	if err != nil {
		return err
	}
	if kw == a.closing() {
		a.closed = true
		if string(m.Value) == "null" {
			return nil
		}
	}
	if kw == "RV" || kw == "RW" {
		return a.special(path, kw, m.Value)
	}
	data, err := text(path, m.Value, maxField)
	if err != nil {
		return err
	}
	return a.put(path, kw, data)
}

// keyword reads a member's name: PN, PN#2, 0xff01.
func (a *area) keyword(path, name string) (string, error) {
	base, number, numbered := name, "", false
	if i := strings.LastIndexByte(name, '#'); i >= 2 {
		base, number, numbered = name[:i], name[i+1:], true
	}
	kw := base
	if len(base) == 6 && strings.HasPrefix(base, "0x") {
		raw, err := spec.Hex(base[2:])
		if err != nil || len(raw) != 2 {
			return "", spec.Errorf(path, "a keyword in hex is 0x and four digits")
		}
		kw = string(raw)
	}
	if len(kw) != 2 {
		return "", spec.Errorf(path, "a keyword has two characters")
	}
	a.seen[kw]++
	nth := a.seen[kw]
	if key(kw, nth) != name {
		if numbered && number != strconv.Itoa(nth) || !numbered && nth > 1 {
			return "", spec.Errorf(path, "field %d of this keyword is named %s", nth, key(kw, nth))
		}
		return "", spec.Errorf(path, "write %s instead", key(kw, nth))
	}
	return kw, nil
}

// special adds an RV or RW: computed in its own area, and anywhere as bytes
// in hex, since those are what someone wrote down on purpose.
func (a *area) special(path, kw string, raw json.RawMessage) error {
	want := "checksum"
	if kw == "RW" {
		want = "free"
	}
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return spec.Errorf(path, `is computed; want {"type": %q}, or leave it out`, want)
	}
	rawType, _ := o.Get("type")
	typ, err := spec.String(path+".type", rawType)
	if err != nil {
		return err
	}
	if typ == "hex" {
		v, err := spec.ParseValue(path, raw, maxField)
		if err != nil {
			return err
		}
		return a.put(path, kw, v.Bytes)
	}
	if kw != a.closing() {
		return spec.Errorf(path, "does not belong in this area")
	}
	if typ != want {
		return spec.Errorf(path+".type", "%q, want %q", typ, want)
	}
	if kw == "RV" {
		return a.checksum(path, o)
	}
	return a.free(path, o)
}

func (a *area) checksum(path string, o spec.Object) error {
	if err := o.Only(path, "type", "size", "data"); err != nil {
		return err
	}
	size := uint64(1)
	if raw, ok := o.Get("size"); ok {
		var err error
		if size, err = spec.Uint(path+".size", raw, maxField); err != nil {
			return err
		}
		if size == 0 {
			return spec.Errorf(path+".size", "want 1 or more: the checksum itself is a byte")
		}
	}
	data := make([]byte, size)
	if err := fillFrom(path, o, data[1:]); err != nil {
		return err
	}
	a.checksums = append(a.checksums, a.base+len(a.data)+fieldHeader)
	return a.put(path, "RV", data)
}

func (a *area) free(path string, o spec.Object) error {
	if err := o.Only(path, "type", "size", "area_size", "data"); err != nil {
		return err
	}
	rawSize, sized := o.Get("size")
	rawArea, byArea := o.Get("area_size")
	var size uint64
	var err error
	switch {
	case sized && byArea:
		return spec.Errorf(path, "has both size and area_size")
	case sized:
		if size, err = spec.Uint(path+".size", rawSize, maxField); err != nil {
			return err
		}
	case byArea:
		total, err := spec.Uint(path+".area_size", rawArea, maxResource)
		if err != nil {
			return err
		}
		used := uint64(len(a.data) + fieldHeader)
		if total < used || total-used > maxField {
			return spec.Errorf(path+".area_size", "want %d to %d: the other fields take %d bytes", used, used+maxField, used)
		}
		size = total - used
	}
	data := make([]byte, size)
	if err := fillFrom(path, o, data); err != nil {
		return err
	}
	return a.put(path, "RW", data)
}

// fillFrom sets dst to the member data, in hex, if there is one.
func fillFrom(path string, o spec.Object, dst []byte) error {
	raw, ok := o.Get("data")
	if !ok {
		return nil
	}
	s, err := spec.String(path+".data", raw)
	if err != nil {
		return err
	}
	b, err := spec.Hex(s)
	if err != nil || len(b) != len(dst) {
		return spec.Errorf(path+".data", "want %d bytes in hex", len(dst))
	}
	copy(dst, b)
	return nil
}

func (b *builder) end(o spec.Object) error {
	raw, ok := o.Get("end_tag")
	if !ok || string(raw) == "true" {
		return b.add("end_tag", []byte{tagEnd})
	}
	if string(raw) == "false" {
		return nil
	}
	v, err := spec.ParseValue("end_tag", raw, 7)
	if err != nil {
		return err
	}
	return b.add("end_tag", append([]byte{tagEnd | byte(len(v.Bytes))}, v.Bytes...))
}

// pad adds what lies behind the end tag.
func (b *builder) pad(o spec.Object) error {
	if raw, ok := o.Get("trailing"); ok {
		v, err := spec.ParseValue("trailing", raw, MaxSize)
		if err != nil {
			return err
		}
		if err := b.add("trailing", v.Bytes); err != nil {
			return err
		}
	}
	fill := uint64(0xff)
	rawFill, filled := o.Get("fill")
	if filled {
		var err error
		if fill, err = spec.Uint("fill", rawFill, 0xff); err != nil {
			return err
		}
	}
	raw, ok := o.Get("size")
	if !ok {
		if filled {
			return spec.Errorf("fill", "needs a size")
		}
		return nil
	}
	size, err := spec.Uint("size", raw, MaxSize)
	if err != nil {
		return err
	}
	if int(size) < len(b.out) {
		return spec.Errorf("size", "%d, and the data takes %d bytes", size, len(b.out))
	}
	b.out = append(b.out, bytes.Repeat([]byte{byte(fill)}, int(size)-len(b.out))...)
	return nil
}
