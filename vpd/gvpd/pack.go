package gvpd

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "before", "values", "entries", "tail", "data_size", "trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	out := bytes.Repeat([]byte{0xff}, offset)
	if _, ok := o.Get("before"); ok {
		if out, err = form.Bytes(o, "", "before", MaxSize); err != nil {
			return nil, nil, err
		}
	}
	off := len(out)
	data, err := buildEntries(o)
	if err != nil {
		return nil, nil, err
	}
	tail := []byte{typeEnd}
	if _, ok := o.Get("tail"); ok {
		if tail, err = form.Bytes(o, "", "tail", MaxSize); err != nil {
			return nil, nil, err
		}
	}
	data = append(data, tail...)
	size, err := form.Uint(o, "", "data_size", 1<<32-1, uint64(len(data)))
	if err != nil {
		return nil, nil, err
	}
	out = append(out, magic...)
	out = binary.LittleEndian.AppendUint32(out, uint32(size))
	if out, err = form.Pad(o, append(out, data...), MaxSize); err != nil {
		return nil, nil, err
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be Google VPD: %v", err)
	}
	if l.off != off {
		return nil, nil, spec.Errorf("before", "holds a header of its own at %#x", l.off)
	}
	return out, form.Warnings(l.problems()), nil
}

func buildEntries(o spec.Object) ([]byte, error) {
	list, err := form.List(o, "", "entries", MaxSize)
	if err != nil {
		return nil, err
	}
	var out []byte
	add := func(path string, b []byte) error {
		if out = append(out, b...); len(out) > MaxSize {
			return spec.Errorf(path, "the image would exceed %d bytes", MaxSize)
		}
		return nil
	}
	if raw, ok := o.Get("values"); ok {
		if _, both := o.Get("entries"); both {
			return nil, spec.Errorf("values", "can't stand beside entries; put them into the list")
		}
		values, err := spec.ParseObject("values", raw)
		if err != nil {
			return nil, err
		}
		for _, m := range values {
			path := spec.Join("values", m.Name)
			if !isKey([]byte(m.Name)) {
				return nil, spec.Errorf(path, "a key is of letters, digits, underscores and periods")
			}
			v, err := form.Text(path, m.Value, MaxSize)
			if err != nil {
				return nil, err
			}
			if err := add(path, encode(typeString, []byte(m.Name), v)); err != nil {
				return nil, err
			}
		}
	}
	for i, raw := range list {
		path := fmt.Sprintf("entries[%d]", i)
		b, err := buildEntry(path, raw)
		if err != nil {
			return nil, err
		}
		if err := add(path, b); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func buildEntry(path string, raw json.RawMessage) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	if _, ok := o.Get("raw"); ok {
		if err := o.Only(path, "raw"); err != nil {
			return nil, err
		}
		b, err := form.Bytes(o, path, "raw", MaxSize)
		if e, stop := next(b); err == nil && (stop != "" || len(e.raw) != len(b) || len(b) == 0) {
			err = spec.Errorf(path+".raw", "is not one entry")
		}
		return b, err
	}
	if err := o.Only(path, "type", "key", "value"); err != nil {
		return nil, err
	}
	typ, err := form.Uint(o, path, "type", 0xff, typeString)
	if err != nil {
		return nil, err
	}
	if typ != typeString && typ != typeInfo {
		return nil, spec.Errorf(path+".type", "want 0x01 or 0xfe")
	}
	var part [2][]byte
	for i, name := range []string{"key", "value"} {
		raw, ok := o.Get(name)
		if !ok {
			return nil, spec.Errorf(spec.Join(path, name), "missing")
		}
		if part[i], err = form.Text(spec.Join(path, name), raw, MaxSize); err != nil {
			return nil, err
		}
	}
	return encode(byte(typ), part[0], part[1]), nil
}

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	o.Add("format", Name)
	before := image[:l.off]
	if !bytes.Equal(before, bytes.Repeat([]byte{0xff}, offset)) {
		o.Add("before", filled(before))
	}
	l.addEntries(&o)
	if !bytes.Equal(l.tail, []byte{typeEnd}) {
		o.Add("tail", form.Hex(l.tail))
	}
	if int64(l.size()) != int64(l.end()-l.off-headerSize) {
		o.Add("data_size", l.size())
	}
	form.AddRest(&o, l.rest, len(image))
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

// filled is bytes with the run of 0xff at their end left to size and fill.
func filled(b []byte) any {
	kept := b
	for len(kept) > 0 && kept[len(kept)-1] == 0xff {
		kept = kept[:len(kept)-1]
	}
	var o spec.Object
	h := form.Hex(kept)
	o.Add("type", h.Type)
	o.Add("data", h.Data)
	if len(kept) < len(b) {
		o.Add("size", len(b))
		o.Add("fill", "0xff")
	}
	return o
}

func (l *layout) addEntries(o *spec.Object) {
	if l.simple {
		values := spec.Object{}
		for _, e := range l.entries {
			values.Add(string(e.key), spec.Show(e.value))
		}
		o.Add("values", values)
		return
	}
	var list []spec.Object
	for _, e := range l.entries {
		var m spec.Object
		if !bytes.Equal(e.raw, encode(e.typ, e.key, e.value)) {
			m.Add("raw", form.Hex(e.raw))
		} else {
			if e.typ != typeString {
				m.Add("type", spec.Byte(e.typ))
			}
			m.Add("key", spec.Show(e.key))
			m.Add("value", spec.Show(e.value))
		}
		list = append(list, m)
	}
	o.Add("entries", list)
}

// Verify checks structure; there are no checksums.
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
	if room := len(l.image) - l.off - headerSize; int64(l.size()) > int64(room) {
		add("data_size", l.off+len(magic), "is %d, and the image has %d bytes behind the header", l.size(), room)
	}
	seen := map[string]bool{}
	for i := range l.entries {
		if l.simple {
			break
		}
		e := &l.entries[i]
		name := fmt.Sprintf("entries[%d]", i)
		switch {
		case !isKey(e.key) && e.typ == typeString:
			add(name, e.off, "key is not letters, digits, underscores and periods")
		case seen[string(e.key)]:
			add(name, e.off, "key %s comes more than once", spec.Brief(e.key))
		case !bytes.Equal(e.raw, encode(e.typ, e.key, e.value)):
			add(name, e.off, "a length is not in the shortest form")
		}
		seen[string(e.key)] = true
	}
	switch {
	case l.stop != "":
		add("tail", l.tailOff(), "no terminator behind %d entries: %s", len(l.entries), l.stop)
	case len(l.tail) > 1:
		add("tail", l.tailOff()+1, "%d bytes that the size counts stand behind the terminator", len(l.tail)-1)
	}
	return list
}
