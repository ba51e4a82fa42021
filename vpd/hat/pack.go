package hat

import (
	"encoding/binary"
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
	if err := o.Only("", "format", "version", "reserved", "atom_count", "length", "atoms", "tail", "trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	out := append([]byte(signature), make([]byte, headerSize-len(signature))...)
	list, err := form.List(o, "", "atoms", MaxSize/(atomHeader+crcSize))
	if err != nil {
		return nil, nil, err
	}
	for i, raw := range list {
		b, err := buildAtom(atomName(i), raw, i)
		if err != nil {
			return nil, nil, err
		}
		if out = append(out, b...); len(out) > MaxSize {
			return nil, nil, spec.Errorf(atomName(i), "the image would exceed %d bytes", MaxSize)
		}
	}
	tail, err := form.Bytes(o, "", "tail", MaxSize)
	if err != nil {
		return nil, nil, err
	}
	out = append(out, tail...)
	if err := header(o, out, len(list)); err != nil {
		return nil, nil, err
	}
	if out, err = form.Pad(o, out, MaxSize); err != nil {
		return nil, nil, err
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be a HAT image: %v", err)
	}
	return out, form.Warnings(l.problems()), nil
}

func header(o spec.Object, out []byte, atoms int) error {
	var v [4]uint64
	for i, f := range []struct {
		name         string
		max, missing uint64
	}{{"version", 0xff, 1}, {"reserved", 0xff, 0}, {"atom_count", 0xffff, uint64(atoms)}, {"length", 1<<32 - 1, uint64(len(out))}} {
		n, err := form.Uint(o, "", f.name, f.max, f.missing)
		if err != nil {
			return err
		}
		v[i] = n
	}
	out[4], out[5] = byte(v[0]), byte(v[1])
	binary.LittleEndian.PutUint16(out[6:], uint16(v[2]))
	binary.LittleEndian.PutUint32(out[8:], uint32(v[3]))
	return nil
}

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	o.Add("format", Name)
	o.Add("version", l.version())
	if b := l.reserved(); b != 0 {
		o.Add("reserved", spec.Byte(b))
	}
	if l.atomCount() != len(l.atoms) {
		o.Add("atom_count", l.atomCount())
	}
	if int64(l.length()) != int64(l.end()) {
		o.Add("length", l.length())
	}
	list := []spec.Object{}
	for i := range l.atoms {
		list = append(list, l.atoms[i].spec(i))
	}
	o.Add("atoms", list)
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

// Verify checks structure and CRCs.
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
	if v := l.version(); v != 1 && v != 2 {
		add("version", 4, "is %d, want 1 for a HAT or 2 for a HAT+", v)
	}
	if b := l.reserved(); b != 0 {
		add("reserved", 5, "is %#02x, want 0", b)
	}
	if l.stop != "" {
		add("atom_count", 6, "is %d, and there are %d atoms: %s", l.atomCount(), len(l.atoms), l.stop)
	}
	switch n := int64(l.length()); {
	case n > int64(len(l.image)):
		add("length", 8, "is %d, and the image has %d bytes", n, len(l.image))
	case n < headerSize:
		add("length", 8, "is %d, and the header alone has %d", n, headerSize)
	}
	for i := range l.atoms {
		a := &l.atoms[i]
		if a.crc != a.want {
			list = append(list, vpd.Problem{Area: atomName(i), Off: int64(a.crcOff()), Msg: "wrong CRC-16",
				Got: hex16(a.crc), Want: hex16(a.want), Fixable: true})
		}
		if a.count != uint16(i) {
			add(atomName(i), a.off+2, "has count %d, want %d", a.count, i)
		}
		if msg := a.fault(); msg != "" {
			add(atomName(i), a.off, "%s", msg)
		}
	}
	if len(l.tail) > 0 && l.stop == "" {
		add("tail", l.end()-len(l.tail), "%d bytes that the length counts are no atom", len(l.tail))
	}
	if l.stop == "" && (len(l.atoms) == 0 || l.atoms[0].typ != typeVendor) {
		add(atomName(0), headerSize, "is not the vendor atom")
	}
	return list
}

// fault is what is wrong with an atom for its type.
func (a *atom) fault() string {
	_, isVendor := a.vendor()
	want, fixed := dataSizes[a.typ]
	switch {
	case a.typ == 0 || a.typ == 0xffff:
		return fmt.Sprintf("has the invalid type %s", hex16(a.typ))
	case a.typ == typeVendor && !isVendor:
		return "is a vendor atom whose strings don't fill it, or are not printable ASCII"
	case fixed && len(a.data) != want:
		return fmt.Sprintf("has %d bytes of data, and an atom of type %s has %d", len(a.data), typeName(a.typ), want)
	case a.typ == typeCustom && len(a.data) == 0:
		return "has no data, and such an atom is known to hide the HAT from the firmware"
	}
	return ""
}
