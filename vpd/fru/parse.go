package fru

import (
	"bytes"
	"time"

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
	if h := l.header(); len(h) > 0 {
		o.Add("header", h)
	}
	pos := headerSize
	for i := range l.areas {
		a := &l.areas[i]
		gap := image[pos:a.off]
		// Packing puts up to 7 zeros in front of an area by itself.
		if len(gap) < unit && len(bytes.Trim(gap, "\x00")) == 0 {
			gap = nil
		}
		o.Add(a.name(), a.spec(gap))
		pos = a.off + len(a.data)
	}
	form.AddRest(&o, image[pos:], len(image))
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

// header is what packing would not write there.
func (l *layout) header() spec.Object {
	var o spec.Object
	for _, x := range l.lost {
		o.Add(kinds[x.kind].name, spec.Byte(l.image[x.kind]))
	}
	if b := l.image[offPad]; b != 0 {
		o.Add("pad", spec.Byte(b))
	}
	if sum(l.image[:headerSize]) != 0 {
		o.Add("checksum", spec.Byte(l.image[offChecksum]))
	}
	return o
}

func (a *area) spec(gap []byte) any {
	switch {
	case a.isInfo():
		o := a.infoSpec()
		if b, err := buildInfo("", a.kind, o); err != nil || !bytes.Equal(b, a.data) {
			o = nil
			o.Add("raw", form.Hex(a.data))
		}
		if len(gap) > 0 {
			o.Add("before", form.Hex(gap))
		}
		return o
	case a.kind == internal:
		var o spec.Object
		h := form.Hex(a.data[1:])
		o.Add("type", h.Type)
		o.Add("data", h.Data)
		if a.data[0] != 1 {
			o.Add("version", spec.Byte(a.data[0]))
		}
		if len(gap) > 0 {
			o.Add("before", form.Hex(gap))
		}
		return o
	}
	return a.recordsSpec(gap)
}

func (a *area) recordsSpec(gap []byte) any {
	list := []spec.Object{}
	for i := range a.recs {
		r := &a.recs[i]
		last := i == len(a.recs)-1
		o := r.spec(last)
		whole := append(bytes.Clone(r.head), r.data...)
		if b, err := buildRecord("", o, last); err != nil || !bytes.Equal(b, whole) {
			o = nil
			o.Add("raw", form.Hex(whole))
		}
		list = append(list, o)
	}
	if len(gap) == 0 {
		return list
	}
	var o spec.Object
	o.Add("before", form.Hex(gap))
	o.Add("records", list)
	return o
}

// ascii: of the area's text fields. A chassis has no language.
func (a *area) ascii() bool { return a.kind == chassis || english(a.data[2]) }

func (a *area) infoSpec() spec.Object {
	var o spec.Object
	if a.kind == chassis {
		o.Add("type", spec.Byte(a.data[2]))
	} else {
		o.Add("language", a.data[2])
	}
	if a.kind == board {
		if t, ok := a.date(); ok {
			o.Add("date", t)
		}
	}
	names := kinds[a.kind].fields
	custom := []any{}
	for i := range a.fields {
		v := a.fields[i].value(a.ascii())
		if i < len(names) {
			o.Add(names[i], v)
		} else {
			custom = append(custom, v)
		}
	}
	if len(a.fields) < len(names) {
		o.Add(names[len(a.fields)], nil)
	}
	if len(custom) > 0 {
		o.Add("custom", custom)
	}
	if a.stopped != "" { // goes out raw
		return o
	}
	padding := a.data[a.end+1 : len(a.data)-1]
	if len(padding) >= unit {
		o.Add("area_size", len(a.data))
	}
	if kept := bytes.TrimRight(padding, "\x00"); len(kept) > 0 {
		o.Add("padding", form.Hex(kept))
	}
	if sum(a.data) != 0 {
		o.Add("checksum", spec.Byte(a.data[len(a.data)-1]))
	}
	return o
}

// date is a board's; 0 is unspecified.
func (a *area) date() (string, bool) {
	n := int(a.data[3]) | int(a.data[4])<<8 | int(a.data[5])<<16
	return epoch.Add(time.Duration(n) * time.Minute).Format(dateLayout), n != 0
}
