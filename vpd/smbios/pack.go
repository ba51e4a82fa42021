package smbios

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strings"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

const maxStrings = 0xff // to which a field can refer

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "entry_point", "structures", "tail", "trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	version := latest
	var e *entry
	var entrySpec spec.Object
	var out []byte
	if raw, ok := o.Get("entry_point"); ok {
		if entrySpec, err = spec.ParseObject("entry_point", raw); err != nil {
			return nil, nil, err
		}
		var padding []byte
		if e, padding, err = packEntry(entrySpec); err != nil {
			return nil, nil, err
		}
		version = e.version()
		out = append(bytes.Clone(e.raw), padding...)
	}
	table := len(out)
	count, out, err := packStructures(o, out, version)
	if err != nil {
		return nil, nil, err
	}
	tail, err := form.Bytes(o, "", "tail", MaxSize)
	if err != nil {
		return nil, nil, err
	}
	if len(tail) > 0 && e == nil {
		return nil, nil, spec.Errorf("tail", "needs an entry point; without one, it is trailing")
	}
	out = append(out, tail...)
	end := len(out)
	if out, err = form.Pad(o, out, MaxSize); err != nil {
		return nil, nil, err
	}
	if e != nil {
		if err := finishEntry(entrySpec, e, out, table, end); err != nil {
			return nil, nil, err
		}
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be SMBIOS: %v", err)
	}
	if len(l.structs) != count || l.table != table {
		return nil, nil, spec.Errorf("", "the address or the size of the table, the tail or what is trailing would make %d structures at %#x of %d at %#x",
			len(l.structs), l.table, count, table)
	}
	return out, form.Warnings(l.problems()), nil
}

// finishEntry computes what depends on the table, which lies in out from table
// to end, and writes the entry point.
func finishEntry(o spec.Object, e *entry, out []byte, table, end int) error {
	l := &layout{image: out, entry: e, table: table, rest: out[end:]}
	for pos := table; pos < end; {
		s, _ := readStructure(out[pos:end])
		if s.formatted == nil {
			break
		}
		l.structs = append(l.structs, s)
		pos += s.size()
		if s.typ() == typeEnd {
			break
		}
	}
	if err := l.set(o); err != nil {
		return err
	}
	copy(out, e.raw)
	return nil
}

func packStructures(o spec.Object, out []byte, version int) (count int, _ []byte, err error) {
	list, err := form.List(o, "", "structures", MaxSize/6)
	if err != nil {
		return 0, nil, err
	}
	next := 0
	for i, raw := range list {
		path := fmt.Sprintf("structures[%d]", i)
		b, err := packStructure(path, raw, version, next)
		if err != nil {
			return 0, nil, err
		}
		if b[0] == typeEnd && i < len(list)-1 {
			return 0, nil, spec.Errorf(path, "is the end, and more follow")
		}
		next = int(binary.LittleEndian.Uint16(b[2:])) + 1
		if out = append(out, b...); len(out) > MaxSize {
			return 0, nil, spec.Errorf(path, "the image would exceed %d bytes", MaxSize)
		}
	}
	return len(list), out, nil
}

// A builder is a structure that comes to be.
type builder struct {
	path      string
	version   int
	def       *definition // nil if the type isn't known
	formatted []byte
	end       int // behind the last field that is given
	strings   [][]byte
	explicit  bool   // the strings are given, and fields are their numbers
	area      []byte // instead of strings
}

func packStructure(path string, raw json.RawMessage, version, next int) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	b := &builder{path: path, version: version, formatted: make([]byte, 256+8), end: headerSize}
	if err := b.header(o, next); err != nil {
		return nil, err
	}
	if err := b.readStrings(o); err != nil {
		return nil, err
	}
	if b.def == nil {
		err = b.data(o)
	} else {
		err = b.fields(o)
	}
	if err != nil {
		return nil, err
	}
	b.formatted[1] = byte(b.end)
	out := b.formatted[:b.end]
	area := b.area
	if area == nil {
		area = bytes.Join(b.strings, []byte{0})
	}
	if len(out)+len(area) > MaxSize {
		return nil, spec.Errorf(path, "the image would exceed %d bytes", MaxSize)
	}
	return append(append(out, area...), 0, 0), nil
}

func (b *builder) header(o spec.Object, next int) error {
	path := b.path + ".type"
	raw, ok := o.Get("type")
	if !ok {
		return spec.Errorf(path, "missing")
	}
	var typ uint64
	if s, err := spec.String(path, raw); err == nil && byName(s) != nil {
		typ = uint64(byName(s).typ)
	} else if typ, err = spec.Uint(path, raw, 0xff); err != nil {
		return spec.Errorf(path, "want an integer from 0 to 255, or one of %s", strings.Join(typeNames(), ", "))
	}
	b.def = byType(byte(typ))
	handle, err := form.Uint(o, b.path, "handle", 0xffff, uint64(next&0xffff))
	if err != nil {
		return err
	}
	b.formatted[0] = byte(typ)
	binary.LittleEndian.PutUint16(b.formatted[2:], uint16(handle))
	return nil
}

func typeNames() []string {
	var names []string
	for _, d := range definitions {
		names = append(names, d.name)
	}
	return names
}

// readStrings reads the strings, if they are given apart from the fields.
func (b *builder) readStrings(o spec.Object) error {
	raw, ok := o.Get("strings")
	if b.explicit = ok; !ok {
		return nil
	}
	path := b.path + ".strings"
	if len(raw) > 0 && raw[0] == '{' {
		v, err := spec.ParseValue(path, raw, MaxSize)
		if err != nil {
			return err
		}
		if i := bytes.Index(append(bytes.Clone(v.Bytes), 0, 0), []byte{0, 0}); i != len(v.Bytes) {
			return spec.Errorf(path, "hold two zeros, which would end them, at byte %d", i)
		}
		b.area = v.Bytes
		if len(v.Bytes) > 0 {
			b.strings = bytes.Split(v.Bytes, []byte{0})
		}
		return nil
	}
	list, err := form.List(o, b.path, "strings", MaxSize)
	if err != nil {
		return err
	}
	for i, raw := range list {
		s, err := readString(fmt.Sprintf("%s[%d]", path, i), raw)
		if err != nil {
			return err
		}
		if len(s) == 0 {
			return spec.Errorf(fmt.Sprintf("%s[%d]", path, i), "is empty, which would end the strings")
		}
		b.strings = append(b.strings, s)
	}
	return nil
}

func readString(path string, raw json.RawMessage) ([]byte, error) {
	s, err := form.Text(path, raw, MaxSize)
	if err == nil && bytes.IndexByte(s, 0) >= 0 {
		return nil, spec.Errorf(path, "holds a zero byte, which would end it")
	}
	return s, err
}

// data is the formatted area of a type that isn't known.
func (b *builder) data(o spec.Object) error {
	if err := o.Only(b.path, "type", "handle", "data", "strings"); err != nil {
		return err
	}
	data, err := form.Bytes(o, b.path, "data", 0xff-headerSize)
	b.end += copy(b.formatted[headerSize:], data)
	return err
}

// fields is the formatted area of a type that is known.
func (b *builder) fields(o spec.Object) error {
	names := []string{"type", "handle", "length", "extra", "strings"}
	for _, f := range b.def.fields {
		names = append(names, f.name)
	}
	if err := o.Only(b.path, names...); err != nil {
		return err
	}
	for _, f := range b.def.fields {
		raw, ok := o.Get(f.name)
		switch {
		case ok:
			if err := b.field(f, raw); err != nil {
				return err
			}
			b.end = f.off + f.size
		case b.def.listed():
			b.formatted[f.off] = byte(len(b.strings))
			if _, ok := o.Get("extra"); ok {
				b.end = f.off + f.size
			}
		}
	}
	if last := b.def.fields; len(last) > 0 && len(b.def.known(b.formatted)) < len(last) {
		if f := last[len(last)-1]; b.end > f.off {
			return spec.Errorf(b.path+"."+f.name, "lies behind the contained elements; put both into extra")
		}
	}
	return b.length(o)
}

// length is what the version has, or the fields need, or the spec says.
func (b *builder) length(o spec.Object) error {
	extra, err := form.Bytes(o, b.path, "extra", 0xff)
	if err != nil {
		return err
	}
	raw, ok := o.Get("length")
	switch {
	case ok && len(extra) > 0:
		return spec.Errorf(b.path+".length", "can't stand beside extra")
	case ok:
		n, err := spec.Uint(b.path+".length", raw, 0xff)
		if err != nil {
			return err
		}
		if int(n) < b.end {
			return spec.Errorf(b.path+".length", "%d, and its fields take %d bytes", n, b.end)
		}
		b.end = int(n)
	case len(extra) > 0:
		if b.end+len(extra) > 0xff {
			return spec.Errorf(b.path+".extra", "the structure would have %d bytes, want at most 255", b.end+len(extra))
		}
		b.end += copy(b.formatted[b.end:], extra)
	default:
		b.end = max(b.end, b.def.length(b.version))
	}
	return nil
}

func (b *builder) field(f field, raw json.RawMessage) error {
	path := b.path + "." + f.name
	to := b.formatted[f.off : f.off+f.size]
	switch f.kind {
	case text:
		if b.explicit {
			n, err := spec.Uint(path, raw, maxStrings)
			to[0] = byte(n)
			return err
		}
		s, err := readString(path, raw)
		if err != nil || len(s) == 0 {
			return err
		}
		b.strings = append(b.strings, s)
		to[0] = byte(len(b.strings))
		return nil
	case uuid:
		s, err := spec.String(path, raw)
		if err != nil {
			return err
		}
		u, err := spec.Hex(s)
		if err != nil || len(u) != f.size {
			return spec.Errorf(path, "want a UUID such as 01234567-89ab-4def-8123-456789abcdef")
		}
		copy(to, swapUUID(u, b.version))
		return nil
	case octets:
		v, err := form.Text(path, raw, f.size)
		copy(to, v)
		return err
	}
	var n8 [8]byte
	n, err := spec.Uint(path, raw, 1<<(8*f.size-1)-1+1<<(8*f.size-1))
	binary.LittleEndian.PutUint64(n8[:], n)
	copy(to, n8[:])
	return err
}
