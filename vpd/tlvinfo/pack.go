package tlvinfo

import (
	"encoding/binary"
	"encoding/json"
	"strings"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// A builder collects the image; CRCs are set at the end, since each covers the
// header.
type builder struct {
	out    []byte
	crcs   []int // offsets of values to compute
	seen   map[byte]int
	closed bool // a CRC is there, or left out on purpose
}

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "version", "total_length", "fields", "tail", "trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	b := &builder{out: append([]byte(signature), 0, 0, 0), seen: map[byte]int{}}
	if err := b.fields(o); err != nil {
		return nil, nil, err
	}
	tail, err := form.Bytes(o, "", "tail", MaxSize)
	if err != nil {
		return nil, nil, err
	}
	b.out = append(b.out, tail...)
	if len(b.out)-headerSize > 0xffff {
		return nil, nil, spec.Errorf("fields", "take %d bytes, want at most %d", len(b.out)-headerSize, maxTotal)
	}
	if err := b.header(o); err != nil {
		return nil, nil, err
	}
	if b.out, err = form.Pad(o, b.out, MaxSize); err != nil {
		return nil, nil, err
	}
	for _, off := range b.crcs {
		binary.BigEndian.PutUint32(b.out[off:], crc(b.out, off))
	}
	l, err := scan(b.out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be TlvInfo: %v", err)
	}
	return b.out, form.Warnings(l.problems()), nil
}

func (b *builder) header(o spec.Object) error {
	used := len(b.out) - headerSize
	if _, ok := o.Get("total_length"); !ok && used > maxTotal {
		return spec.Errorf("fields", "take %d bytes, want at most %d", used, maxTotal)
	}
	total, err := form.Uint(o, "", "total_length", 0xffff, uint64(used))
	if err != nil {
		return err
	}
	version, err := form.Uint(o, "", "version", 0xff, 1)
	if err != nil {
		return err
	}
	b.out[len(signature)] = byte(version)
	binary.BigEndian.PutUint16(b.out[len(signature)+1:], uint16(total))
	return nil
}

func (b *builder) fields(o spec.Object) error {
	var fields spec.Object
	if raw, ok := o.Get("fields"); ok {
		var err error
		if fields, err = spec.ParseObject("fields", raw); err != nil {
			return err
		}
	}
	for _, m := range fields {
		if err := b.field(spec.Join("fields", m.Name), m); err != nil {
			return err
		}
	}
	if !b.closed {
		b.crc()
	}
	return nil
}

func (b *builder) crc() {
	b.out = append(b.out, typeCRC, crcSize, 0, 0, 0, 0)
	b.crcs = append(b.crcs, len(b.out)-crcSize)
}

func (b *builder) field(path string, m spec.Member) error {
	name, _, _ := strings.Cut(m.Name, "#")
	typ, ok := typeOf(name)
	if !ok {
		return spec.Errorf(path, "unknown; want a name such as serial_number, or a type such as 0x50")
	}
	if typ == typeCRC {
		b.closed = true
		if string(m.Value) == "null" {
			return nil
		}
	}
	b.seen[typ]++
	if want := numbered(name, b.seen[typ]); want != m.Name {
		return spec.Errorf(path, "TLV %d of this type is named %s", b.seen[typ], want)
	}
	if typ == typeCRC && isComputed(m.Value) {
		b.crc()
		return nil
	}
	v, err := encode(path, typ, m.Value)
	if err != nil {
		return err
	}
	if len(v) > maxValue {
		return spec.Errorf(path, "%d bytes, want at most %d", len(v), maxValue)
	}
	b.out = append(b.out, typ, byte(len(v)))
	b.out = append(b.out, v...)
	return nil
}

// isComputed: {"type": "crc32"}.
func isComputed(raw json.RawMessage) bool {
	var v map[string]string
	return json.Unmarshal(raw, &v) == nil && len(v) == 1 && v["type"] == "crc32"
}
