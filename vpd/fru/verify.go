package fru

import (
	"bytes"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

func (l *layout) problems() []vpd.Problem {
	var list []vpd.Problem
	add := func(area string, off int, format string, args ...any) {
		list = append(list, vpd.Problem{Area: area, Off: int64(off), Msg: fmt.Sprintf(format, args...)})
	}
	for _, c := range l.checksums() {
		if got, want := l.image[c.off], c.want(l.image); got != want {
			list = append(list, vpd.Problem{Area: c.area, Off: int64(c.off), Msg: "wrong " + c.what,
				Got: spec.Byte(got), Want: spec.Byte(want), Fixable: true})
		}
	}
	if l.image[offPad] != 0 {
		add("header.pad", offPad, "is %#02x, want 0", l.image[offPad])
	}
	for _, x := range l.lost {
		add(kinds[x.kind].name, x.kind, "is not where the header says: %s", x.why)
	}
	for i := range l.areas {
		a := &l.areas[i]
		if a.isInfo() {
			a.infoProblems(add)
		}
		if a.kind == internal && a.data[0]&0x0f != 1 {
			add("internal", a.off, "begins with %#02x, want version 1 of the area", a.data[0])
		}
		for j := range a.recs {
			a.recs[j].problems(recordName(j), add)
		}
		if a.unended != "" {
			add(a.name(), a.off+len(a.data), "the last record is not marked as the last: %s", a.unended)
		}
	}
	return list
}

type adder func(area string, off int, format string, args ...any)

func (a *area) infoProblems(add adder) {
	name := a.name()
	if a.data[0] != 1 {
		add(name, a.off, "begins with %#02x, want 1: the upper bits are reserved", a.data[0])
	}
	for i := range a.fields {
		f := &a.fields[i]
		switch f.code {
		case codeBCD:
			if _, ok := decodeBCD(f.data); !ok {
				add(a.fieldName(i), f.off, "holds digits that BCD plus has not")
			}
		case codeText:
			if _, ok := f.text(a.ascii()); !ok && !(a.ascii() && isLatin1(f.data)) {
				add(a.fieldName(i), f.off, "holds characters that are not printable")
			}
		}
	}
	if a.stopped != "" {
		add(name, a.off+a.end, "%s", a.stopped)
		return
	}
	if n, want := len(a.fields), kinds[a.kind].fields; n < len(want) {
		add(name+"."+want[n], a.off+a.end, "is missing: the area ends in front of it")
	}
	if padding := a.data[a.end+1 : len(a.data)-1]; len(bytes.Trim(padding, "\x00")) > 0 {
		add(name+".padding", a.off+a.end+1, "is not zero: this may be what a text field of one character cut off, whose type/length byte is the end mark 0xc1")
	}
}

// isLatin1: printable in ISO 8859-1, which 8-bit text is. Zeros at the end are
// common, and nothing forbids them.
func isLatin1(b []byte) bool {
	for _, c := range bytes.TrimRight(b, "\x00") {
		if c < 0x20 || c >= 0x7f && c < 0xa0 {
			return false
		}
	}
	return true
}

func (r *record) problems(name string, add adder) {
	if v := r.head[1] &^ endOfList; v != recordFormat {
		add(name, r.off+1, "has format version %d, want 2", v)
	}
	want, fixed := dataSizes[r.typ()]
	switch {
	case fixed && len(r.data) != want:
		add(name, r.off+2, "has %d bytes of data, and a record of type %#02x has %d", len(r.data), r.typ(), want)
	case r.typ() == managementAccess && len(r.data) == 0:
		add(name, r.off+2, "has no subtype")
	case r.typ() >= firstOEM && len(r.data) < 3:
		add(name, r.off+2, "has %d bytes of data, and the manufacturer's number takes 3", len(r.data))
	}
}

// fieldName is that of a field's member in the spec.
func (a *area) fieldName(i int) string {
	if names := kinds[a.kind].fields; i < len(names) {
		return a.name() + "." + names[i]
	}
	return fmt.Sprintf("%s.custom[%d]", a.name(), i-len(kinds[a.kind].fields))
}

// Fields cuts the image without a gap.
func (format) Fields(image []byte) ([]vpd.Field, error) {
	l, err := scan(image)
	if err != nil {
		return nil, err
	}
	p := &parts{image: image}
	p.add(1, "header.version", "1", "header.checksum")
	for k := internal; k <= multirecord; k++ {
		value := "none"
		if image[k] != 0 {
			value = fmt.Sprintf("%#x", int(image[k])*unit)
		}
		p.add(1, "header."+kinds[k].name, value, "header.checksum")
	}
	p.add(1, "header.pad", "", "header.checksum")
	p.add(1, "header.checksum", spec.Byte(image[offChecksum]), "header.checksum")
	for i := range l.areas {
		a := &l.areas[i]
		p.to(a.off, a.name()+".before", "")
		switch {
		case a.isInfo():
			p.info(a)
		case a.kind == internal:
			p.add(1, "internal.version", spec.Byte(a.data[0]), "")
			p.to(a.off+len(a.data), "internal", "")
		default:
			for j := range a.recs {
				p.record(recordName(j), &a.recs[j])
			}
		}
	}
	p.to(len(image), "trailing", "")
	return p.list, nil
}

// parts collects fields from the image's start on.
type parts struct {
	image []byte
	pos   int
	list  []vpd.Field
}

func (p *parts) add(n int, name, value, covered string) {
	if n > 0 {
		p.list = append(p.list, vpd.Field{Off: int64(p.pos), Len: int64(n), Name: name, Value: value, CoveredBy: covered})
		p.pos += n
	}
}

// to adds what there is up to an offset.
func (p *parts) to(off int, name, covered string) {
	p.add(off-p.pos, name, spec.Brief(p.image[p.pos:off]), covered)
}

func (p *parts) info(a *area) {
	name, check := a.name(), a.name()+".checksum"
	p.add(1, name+".area_version", spec.Byte(a.data[0]), check)
	p.add(1, name+".length", fmt.Sprintf("%d bytes", len(a.data)), check)
	if a.kind == chassis {
		p.add(1, name+".type", spec.Byte(a.data[2]), check)
	} else {
		p.add(1, name+".language", spec.Byte(a.data[2]), check)
	}
	if a.kind == board {
		date, ok := a.date()
		if !ok {
			date = "unspecified"
		}
		p.add(3, name+".date", date, check)
	}
	for i := range a.fields {
		p.add(1+len(a.fields[i].data), a.fieldName(i), a.fields[i].brief(a.ascii()), check)
	}
	last := a.off + len(a.data) - 1
	if a.stopped == "" {
		p.add(1, name+".end", "", check)
		p.to(last, name+".padding", check)
	} else {
		p.to(last, name+".rest", check)
	}
	p.add(1, check, spec.Byte(a.data[len(a.data)-1]), check)
}

func (p *parts) record(name string, r *record) {
	check := name + ".header_checksum"
	p.add(3, name, r.brief(), check)
	p.add(1, name+".checksum", spec.Byte(r.head[3]), check)
	p.add(1, check, spec.Byte(r.head[4]), check)
	p.to(r.off+recordHeader+len(r.data), name+".data", name+".checksum")
}
