package tlvinfo

import (
	"encoding/binary"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	o.Add("format", Name)
	if v := l.version(); v != 1 {
		o.Add("version", v)
	}
	used := l.end() - headerSize
	if l.total() != used || used > maxTotal {
		o.Add("total_length", l.total())
	}
	o.Add("fields", l.fields())
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

func (l *layout) fields() spec.Object {
	fields := spec.Object{}
	closed := false
	for i, name := range l.names() {
		t := &l.tlvs[i]
		if t.typ != typeCRC {
			fields.Add(name, t.form())
			continue
		}
		good := t.isCRC() && binary.BigEndian.Uint32(t.value) == crc(l.image, t.valueOff())
		switch {
		case !good:
			fields.Add(name, form.Hex(t.value))
		case closed || i < len(l.tlvs)-1:
			fields.Add(name, map[string]string{"type": "crc32"})
		}
		closed = true
	}
	if !closed {
		fields.Add("crc", nil)
	}
	return fields
}

// Verify checks structure, values and CRC.
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
	if v := l.version(); v != 1 {
		add("version", len(signature), "is %d, want 1", v)
	}
	switch {
	case l.total() > len(l.image)-headerSize:
		add("total_length", len(signature)+1, "is %d, and the image has %d bytes behind the header", l.total(), len(l.image)-headerSize)
	case l.total() > maxTotal:
		add("total_length", len(signature)+1, "is %d, want at most %d", l.total(), maxTotal)
	}
	seen := map[byte]bool{}
	for i, name := range l.names() {
		t := &l.tlvs[i]
		if seen[t.typ] && t.typ != typeExtension {
			add(name, t.off, "type comes more than once")
		}
		seen[t.typ] = true
		if t.typ == typeCRC {
			list = append(list, l.crcProblems(name, i)...)
		} else if msg := t.fault(); msg != "" {
			add(name, t.off, "%s", msg)
		}
	}
	if len(l.tail) > 0 {
		add("tail", l.end()-len(l.tail), "%d bytes that the total length counts are no TLV", len(l.tail))
	}
	if !seen[typeCRC] {
		add("crc", -1, "is missing")
	}
	return list
}

func (l *layout) crcProblems(name string, i int) []vpd.Problem {
	t := &l.tlvs[i]
	if !t.isCRC() {
		return []vpd.Problem{{Area: name, Off: int64(t.off), Msg: fmt.Sprintf("has %d bytes, want 4", len(t.value))}}
	}
	var list []vpd.Problem
	if got, want := binary.BigEndian.Uint32(t.value), crc(l.image, t.valueOff()); got != want {
		list = append(list, vpd.Problem{Area: name, Off: int64(t.valueOff()), Msg: "wrong CRC-32",
			Got: fmt.Sprintf("0x%08x", got), Want: fmt.Sprintf("0x%08x", want), Fixable: true})
	}
	if i < len(l.tlvs)-1 {
		list = append(list, vpd.Problem{Area: name, Off: int64(t.off), Msg: "is not the last TLV"})
	}
	return list
}

// fault is what is wrong with a value for its type.
func (t *tlv) fault() string {
	_, ok := t.plain()
	switch {
	case t.typ == typeExtension && len(t.value) < 4:
		return fmt.Sprintf("has %d bytes, and the vendor's number takes 4", len(t.value))
	case t.typ == typeExtension || !t.known():
		return ""
	case !ok && t.typ == typeMAC:
		return fmt.Sprintf("has %d bytes, want 6", len(t.value))
	case t.typ == typeMAC && t.value[0]&1 != 0:
		return "is a multicast address"
	case !ok && (t.typ == typeVersion || t.typ == typeMACCount):
		return fmt.Sprintf("is a number of %d bytes, want %d", len(t.value), map[byte]int{typeVersion: 1, typeMACCount: 2}[t.typ])
	case !ok && t.typ == typeDate:
		return "is not a date such as 03/05/2024 14:30:00"
	case !ok && t.typ == typeCountry:
		return "is not two capital letters"
	case !ok:
		return "holds bytes that are not printable ASCII"
	}
	return ""
}
