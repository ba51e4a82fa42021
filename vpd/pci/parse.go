package pci

import (
	"encoding/hex"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// sized is the text form of RV and RW.
type sized struct {
	Type string `json:"type"`
	Size int    `json:"size"`
	Data string `json:"data,omitempty"` // hex; missing if all zero
}

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	o.Add("format", Name)
	if l.simple() {
		for i := range l.res {
			o.Add(member(l.res[i].tag), l.value(&l.res[i]))
		}
	} else {
		list := []any{}
		for i := range l.res {
			list = append(list, l.element(&l.res[i]))
		}
		o.Add("resources", list)
	}
	switch {
	case l.end == nil:
		o.Add("end_tag", false)
	case len(l.end.data) > 0:
		o.Add("end_tag", spec.Typed{Type: "hex", Data: hex.EncodeToString(l.end.data)})
	}
	l.addRest(&o)
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, warnings(l.problems()), nil
}

// element is a resource in the list form.
func (l *layout) element(r *resource) any {
	var o spec.Object
	if m := member(r.tag); m != "data" {
		o.Add(m, l.value(r))
		return o
	}
	o.Add("tag", spec.Byte(r.tag))
	o.Add("data", spec.Typed{Type: "hex", Data: hex.EncodeToString(r.data)})
	return o
}

func (l *layout) value(r *resource) any {
	if !r.isArea() {
		return spec.Show(r.data)
	}
	o := spec.Object{}
	closed := false
	closing := closingKeyword(r.tag)
	for j, k := range keys(r.fields) {
		f := &r.fields[j]
		closed = closed || f.kw == closing
		o.Add(k, l.fieldValue(r, f))
	}
	if !closed {
		o.Add(closing, nil)
	}
	if len(r.tail) > 0 {
		o.Add("tail", spec.Typed{Type: "hex", Data: hex.EncodeToString(r.tail)})
	}
	return o
}

func closingKeyword(tag byte) string {
	if tag == tagReadOnly {
		return "RV"
	}
	return "RW"
}

// fieldValue spells out an RV or RW that isn't what packing would compute.
func (l *layout) fieldValue(r *resource, f *field) any {
	inHex := spec.Typed{Type: "hex", Data: hex.EncodeToString(f.data)}
	switch {
	case f.kw == "RV" && r.tag == tagReadOnly:
		if len(f.data) == 0 || f.data[0] != checksum(l.image, f.dataOff()) {
			return inHex
		}
		return sized{"checksum", len(f.data), hexUnlessZero(f.data[1:])}
	case f.kw == "RW" && r.tag == tagReadWrite:
		return sized{"free", len(f.data), hexUnlessZero(f.data)}
	case f.kw == "RV" || f.kw == "RW":
		return inHex
	}
	return spec.Show(f.data)
}

func hexUnlessZero(b []byte) string {
	if slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) {
		return hex.EncodeToString(b)
	}
	return ""
}

// addRest writes what lies behind the end tag as bytes and a run of fill.
func (l *layout) addRest(o *spec.Object) {
	if len(l.rest) == 0 {
		return
	}
	fill := l.rest[len(l.rest)-1]
	kept := l.rest
	for len(kept) > 0 && kept[len(kept)-1] == fill {
		kept = kept[:len(kept)-1]
	}
	if len(kept) > 0 {
		o.Add("trailing", spec.Typed{Type: "hex", Data: hex.EncodeToString(kept)})
	}
	o.Add("size", len(l.image))
	o.Add("fill", spec.Byte(fill))
}
