package smbios

import (
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// A cutter collects fields without a gap.
type cutter struct {
	list []vpd.Field
	off  int64
}

func (c *cutter) add(n int, name, value, covered string) {
	if n > 0 {
		c.list = append(c.list, vpd.Field{Off: c.off, Len: int64(n), Name: name, Value: value, CoveredBy: covered})
		c.off += int64(n)
	}
}

// Fields cuts the image without a gap.
func (format) Fields(image []byte) ([]vpd.Field, error) {
	l, err := scan(image)
	if err != nil {
		return nil, err
	}
	c := new(cutter)
	if l.entry != nil {
		l.entry.cut(c)
		c.add(len(l.padding), "entry_point.padding", spec.Brief(l.padding), "")
	}
	for i := range l.structs {
		l.structs[i].cut(c, l.path(i), l.version())
	}
	c.add(len(l.tail), "tail", spec.Brief(l.tail), "")
	c.add(len(l.rest), "trailing", spec.Brief(l.rest), "")
	return c.list, nil
}

func (e *entry) cut(c *cutter) {
	const prefix = "entry_point."
	parts := slices.Clone(e.members())
	if e.is3 {
		parts = append(parts, member{name: "anchor", off: 0, size: len(anchor64)}, member{name: "major", off: 7, size: 1}, member{name: "minor", off: 8, size: 1})
	} else {
		parts = append(parts, member{name: "anchor", off: 0, size: len(anchor32)}, member{name: "major", off: 6, size: 1}, member{name: "minor", off: 7, size: 1},
			member{name: "formatted_area", off: 0x0b, size: 5}, member{name: "intermediate_anchor", off: 0x10, size: len(dmi)})
	}
	slices.SortFunc(parts, func(a, b member) int { return a.off - b.off })
	for _, m := range parts {
		value := fmt.Sprint(0)
		switch {
		case m.size == 5 || m.name == "anchor":
			value = spec.Brief(e.raw[m.off : m.off+m.size])
		case m.hex:
			value = fmt.Sprintf("0x%0*x", 2*m.size, m.get(e.raw))
		default:
			value = fmt.Sprint(m.get(e.raw))
		}
		covered := prefix + "checksum"
		if !e.is3 && m.off >= 0x10 { // which the outer one covers too
			covered = prefix + "intermediate_checksum"
		}
		c.add(m.size, prefix+m.name, value, covered)
	}
}

func (s *structure) cut(c *cutter, path string, version int) {
	c.add(headerSize, path, fmt.Sprintf("type %d, %d bytes, handle 0x%04x", s.typ(), len(s.formatted), s.handle()), "")
	list, isList := s.list()
	end := headerSize
	if d := byType(s.typ()); d != nil {
		var fields []field
		fields, end = s.fields(d)
		for _, f := range fields {
			b := s.formatted[f.off : f.off+f.size]
			value := fmt.Sprint(f.form(b, version))
			switch {
			case f.kind == octets:
				value = spec.Brief(b)
			case f.kind == text && b[0] > 0 && int(b[0]) <= len(list):
				value = spec.Brief(list[b[0]-1])
			case f.kind == text && b[0] == 0:
				value = ""
			}
			c.add(f.size, path+"."+f.name, value, "")
		}
	}
	c.add(len(s.formatted)-end, path+".data", spec.Brief(s.formatted[end:]), "")
	if !isList || len(list) == 0 {
		c.add(len(s.strings)+2, path+".strings", spec.Brief(s.strings), "")
		return
	}
	for i, b := range list {
		n := len(b) + 1
		if i == len(list)-1 {
			n++ // the zero at the end of all
		}
		c.add(n, fmt.Sprintf("%s.strings[%d]", path, i), spec.Brief(b), "")
	}
}
