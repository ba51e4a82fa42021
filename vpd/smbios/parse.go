package smbios

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// swapsUUID is the version from which on a UUID's first three parts are
// little-endian.
const swapsUUID = 0x206

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	o.Add("format", Name)
	if l.entry != nil {
		o.Add("entry_point", l.entryForm())
	}
	var list []spec.Object
	next := 0
	for i := range l.structs {
		s := &l.structs[i]
		list = append(list, s.form(l.version(), next))
		next = int(s.handle()) + 1
	}
	o.Add("structures", list)
	if len(l.tail) > 0 {
		o.Add("tail", form.Hex(l.tail))
	}
	form.AddRest(&o, l.rest, len(image))
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

// form is a structure's text form.
func (s *structure) form(version, nextHandle int) spec.Object {
	var o spec.Object
	d := byType(s.typ())
	if d == nil {
		o.Add("type", s.typ())
	} else {
		o.Add("type", d.name)
	}
	if s.typ() != typeEnd || int(s.handle()) != nextHandle {
		o.Add("handle", fmt.Sprintf("0x%04x", s.handle()))
	}
	list, isList := s.list()
	if d == nil {
		if len(s.formatted) > headerSize {
			o.Add("data", form.Hex(s.formatted[headerSize:]))
		}
		s.addStrings(&o, list, isList)
		return o
	}
	fields, end := s.fields(d)
	extra := s.formatted[end:]
	if len(extra) == 0 && len(s.formatted) != max(end, d.length(version)) {
		o.Add("length", len(s.formatted))
	}
	inOrder := isList && !d.listed() && s.inOrder(fields, len(list))
	for _, f := range fields {
		b := s.formatted[f.off : f.off+f.size]
		switch {
		case d.listed() && isList && int(b[0]) == len(list): // the count
		case f.kind == text && inOrder:
			o.Add(f.name, s.text(b[0], list))
		default:
			o.Add(f.name, f.form(b, version))
		}
	}
	if len(extra) > 0 {
		o.Add("extra", form.Hex(extra))
	}
	if !inOrder {
		s.addStrings(&o, list, isList)
	}
	return o
}

func (s *structure) addStrings(o *spec.Object, list [][]byte, isList bool) {
	if !isList {
		o.Add("strings", form.Hex(s.strings))
		return
	}
	if d := byType(s.typ()); len(list) == 0 && (d == nil || d.listed() && len(s.formatted) > headerSize && s.formatted[headerSize] == 0) {
		return
	}
	all := make([]any, len(list))
	for i := range list {
		all[i] = spec.Show(list[i])
	}
	o.Add("strings", all)
}

// fields are those that the structure is long enough for, and where they end.
func (s *structure) fields(d *definition) (list []field, end int) {
	end = headerSize
	for _, f := range d.known(s.formatted) {
		if f.off+f.size > len(s.formatted) {
			break
		}
		list = append(list, f)
		end = f.off + f.size
	}
	return list, end
}

// inOrder tells whether the strings are numbered in the order of the fields,
// each once.
func (s *structure) inOrder(fields []field, count int) bool {
	next := 1
	for _, f := range fields {
		if f.kind != text || s.formatted[f.off] == 0 {
			continue
		}
		if int(s.formatted[f.off]) != next {
			return false
		}
		next++
	}
	return next-1 == count
}

// text is the string of a number, as a spec writes it.
func (s *structure) text(n byte, list [][]byte) any {
	if n == 0 || int(n) > len(list) {
		return ""
	}
	return spec.Show(list[n-1])
}

func (f *field) form(b []byte, version int) any {
	switch f.kind {
	case uuid:
		return formatUUID(b, version)
	case octets:
		return form.Hex(b)
	case hexNumber:
		return fmt.Sprintf("0x%0*x", 2*f.size, f.number(b))
	}
	return f.number(b)
}

func (f *field) number(b []byte) uint64 {
	var n [8]byte
	copy(n[:], b)
	return binary.LittleEndian.Uint64(n[:])
}

func swapUUID(b []byte, version int) []byte {
	b = slices.Clone(b)
	if version >= swapsUUID {
		slices.Reverse(b[:4])
		slices.Reverse(b[4:6])
		slices.Reverse(b[6:8])
	}
	return b
}

func formatUUID(b []byte, version int) string {
	h := hex.EncodeToString(swapUUID(b, version))
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// Verify checks the entry point and the structures.
func (format) Verify(image []byte) []vpd.Problem {
	l, err := scan(image)
	if err != nil {
		return []vpd.Problem{{Area: "image", Off: 0, Msg: err.Error()}}
	}
	return l.problems()
}

func (l *layout) problems() []vpd.Problem {
	list := l.entryProblems()
	add := func(area string, off int, format string, args ...any) {
		list = append(list, vpd.Problem{Area: area, Off: int64(off), Msg: fmt.Sprintf(format, args...)})
	}
	handles := map[uint16]bool{}
	for i := range l.structs {
		s := &l.structs[i]
		if handles[s.handle()] {
			add(l.path(i), s.off+2, "handle 0x%04x comes more than once", s.handle())
		}
		handles[s.handle()] = true
		strings, isList := s.list()
		if !isList {
			add(l.path(i), s.off+len(s.formatted), "one of its strings is empty")
		}
		d := byType(s.typ())
		if d == nil {
			continue
		}
		if len(s.formatted) < d.least() {
			add(l.path(i), s.off+1, "has %d bytes, want at least %d", len(s.formatted), d.least())
		}
		fields, _ := s.fields(d)
		for _, f := range fields {
			n := int(s.formatted[f.off])
			switch {
			case d.listed() && n != len(strings):
				add(l.path(i), s.off+f.off, "counts %d strings, and has %d", n, len(strings))
			case f.kind == text && n > len(strings):
				add(l.path(i)+"."+f.name, s.off+f.off, "is string %d, and there are %d", n, len(strings))
			}
		}
	}
	if !l.ended() {
		add("structures", l.end()-len(l.tail), "no structure of type 127 is the last: %s", l.stop)
	}
	if l.entry == nil && len(l.rest) > 0 {
		add("trailing", l.end(), "%d bytes behind the last structure", len(l.rest))
	}
	return list
}

func (l *layout) entryProblems() []vpd.Problem {
	if l.entry == nil {
		return nil
	}
	var list []vpd.Problem
	for _, c := range l.entry.sums() {
		list = append(list, vpd.Problem{Area: c.Area, Off: c.Off, Msg: "wrong " + c.Msg, Got: c.Old, Want: c.New, Fixable: true})
	}
	for _, m := range l.entry.members() {
		got, want := m.get(l.entry.raw), m.compute(l)
		var bad bool
		switch m.name {
		case "length": // 30 is what version 2.1 of the specification said
			bad = got != want && (l.entry.is3 || got != size32-1)
		case "count":
			bad = got != want
		case "largest":
			bad = got < want
		case "table_size": // of 64 bits, it is a maximum
			bad = !l.entry.is3 && (got != want || len(l.tail) > 0)
			want -= uint64(len(l.tail))
		}
		if bad {
			list = append(list, vpd.Problem{Area: "entry_point." + m.name, Off: int64(m.off), Msg: "is wrong",
				Got: fmt.Sprint(got), Want: fmt.Sprint(want)})
		}
	}
	return list
}

// path is that of a structure in the spec, and what it is called.
func (l *layout) path(i int) string {
	if d := byType(l.structs[i].typ()); d != nil {
		return fmt.Sprintf("structures[%d] %s", i, d.name)
	}
	return fmt.Sprintf("structures[%d] type %d", i, l.structs[i].typ())
}

// Fix sets the checksums of the entry point.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	if l.entry == nil {
		return fixed, nil, nil
	}
	changes := l.entry.sums()
	for _, c := range changes {
		n, err := hex.DecodeString(c.New[2:])
		if err != nil {
			return nil, nil, err
		}
		fixed[c.Off] = n[0]
	}
	return fixed, changes, nil
}
