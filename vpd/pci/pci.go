// Package pci packs and parses the vital product data of PCI devices: PCI
// Local Bus Specification 3.0 appendix I, PCI Express Base Specification 4.0
// section 6.28.
//
//	+------+---------+------------+
//	| 0x82 | len16le | identifier |          product name
//	+------+---------+------------+
//	| 0x90 | len16le | fields     |          read-only; the last is RV
//	+------+---------+------------+
//	| 0x91 | len16le | fields     |          read-write; the last is RW
//	+------+---------+------------+
//	| 0x78 |                                end tag
//	+------+
//
// A field is a keyword of two characters, a length byte and data. The first
// byte of RV makes the sum of all bytes from the start to itself zero; the
// bytes behind it in RV are reserved, and RW is free space.
//
// The spec:
//
//	{
//	  "format": "pci",
//	  "identifier": "product name",
//	  "read_only": {"PN": "part number", "SN": "serial number", "V0": {"type": "hex", "data": "00ff"}},
//	  "read_write": {"YA": "asset tag", "RW": {"type": "free", "size": 64}},
//	  "size": 256, "fill": "0xff"   // of the image, behind the end tag
//	}
//
// RV and RW are computed, and added if missing: RV as {"type": "checksum",
// "size": 1}, of which "data" may give the reserved bytes, and RW as {"type":
// "free"} with the "size" of the field or the "area_size" of the whole area.
//
// What is irregular is spelt out: null for an RV or RW that is left out on
// purpose, a "hex" value for one that is wrong, KW#2 for the second field of a
// keyword, 0xff01 for a keyword that isn't text, "tail" for what isn't a field
// at an area's end, "end_tag": false, "trailing" for bytes behind the end
// tag that aren't fill, and "resources", a list of {"identifier": ...},
// {"read_only": ...}, {"read_write": ...} and {"tag": "0x84", "data": ...},
// instead of the three members if they aren't all there is, once and in
// order.
package pci

import (
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "pci"

// MaxSize is the most bytes an address of 15 bits reaches.
const MaxSize = 1 << 15

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants a read-only area of fields with keywords as they should be.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	if err != nil || l.res[0].tag == tagReadWrite {
		return false
	}
	i := slices.IndexFunc(l.res, func(r resource) bool { return r.tag == tagReadOnly })
	if i < 0 || len(l.res[i].fields) == 0 || len(l.res[i].tail) > 0 {
		return false
	}
	return !slices.ContainsFunc(l.res[i].fields, func(f field) bool { return !isKeyword(f.kw) })
}

// isKeyword: two upper-case letters or digits.
func isKeyword(kw string) bool {
	for _, c := range []byte(kw) {
		if (c < 'A' || c > 'Z') && (c < '0' || c > '9') {
			return false
		}
	}
	return len(kw) == 2
}

// Fix sets the first byte of RV.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	var changes []vpd.Change
	names := l.names()
	for i, r := range l.res {
		if r.tag != tagReadOnly {
			continue
		}
		for j, f := range r.fields {
			if f.kw != "RV" || len(f.data) == 0 {
				continue
			}
			off := f.dataOff()
			// Of the fixed bytes: an earlier RV counts in a later.
			want := checksum(fixed, off)
			if got := fixed[off]; got != want {
				fixed[off] = want
				changes = append(changes, vpd.Change{Area: names[i] + "." + keys(r.fields)[j], Off: int64(off),
					Msg: "checksum", Old: spec.Byte(got), New: spec.Byte(want)})
			}
		}
	}
	return fixed, changes, nil
}

// Fields cuts the image without a gap.
func (format) Fields(image []byte) ([]vpd.Field, error) {
	l, err := scan(image)
	if err != nil {
		return nil, err
	}
	var list []vpd.Field
	names := l.names()
	add := func(off, n int, name, value string) {
		list = append(list, vpd.Field{Off: int64(off), Len: int64(n), Name: name, Value: value})
	}
	for i, r := range l.res {
		if !r.isArea() {
			add(r.off, r.header+len(r.data), names[i], spec.Brief(r.data))
			continue
		}
		add(r.off, r.header, names[i], fmt.Sprintf("%d bytes", len(r.data)))
		for j, k := range keys(r.fields) {
			f := &r.fields[j]
			add(f.off, fieldHeader+len(f.data), names[i]+"."+k, spec.Brief(f.data))
		}
		if n := len(r.tail); n > 0 {
			add(r.off+r.header+len(r.data)-n, n, names[i]+".tail", spec.Brief(r.tail))
		}
	}
	if l.end != nil {
		add(l.end.off, 1+len(l.end.data), "end_tag", spec.Brief(l.end.data))
	}
	if len(l.rest) > 0 {
		add(l.restOff(), len(l.rest), "trailing", spec.Brief(l.rest))
	}
	l.cover(list, names)
	return list, nil
}

// cover marks the fields that lie wholly under a checksum.
func (l *layout) cover(list []vpd.Field, names []string) {
	for i := len(l.res) - 1; i >= 0; i-- {
		r := &l.res[i]
		for j, k := range keys(r.fields) {
			f := &r.fields[j]
			if r.tag != tagReadOnly || f.kw != "RV" || len(f.data) == 0 {
				continue
			}
			for n := range list {
				if list[n].Off+list[n].Len <= int64(f.dataOff()+1) {
					list[n].CoveredBy = names[i] + "." + k
				}
			}
		}
	}
}

// names gives each resource the path of its member in the spec.
func (l *layout) names() []string {
	names := make([]string, len(l.res))
	for i, r := range l.res {
		names[i] = member(r.tag)
		if !l.simple() {
			names[i] = fmt.Sprintf("resources[%d].%s", i, names[i])
		}
	}
	return names
}

func member(tag byte) string {
	switch tag {
	case tagIdentifier:
		return "identifier"
	case tagReadOnly:
		return "read_only"
	case tagReadWrite:
		return "read_write"
	}
	return "data"
}

// keys gives each field its name in the spec: the keyword, and from the second
// of the same on a number.
func keys(fields []field) []string {
	names := make([]string, len(fields))
	seen := map[string]int{}
	for i, f := range fields {
		seen[f.kw]++
		names[i] = key(f.kw, seen[f.kw])
	}
	return names
}

func key(kw string, nth int) string {
	k := kw
	if kw[0] <= ' ' || kw[0] > '~' || kw[1] <= ' ' || kw[1] > '~' {
		k = fmt.Sprintf("0x%x", kw)
	}
	if nth > 1 {
		k += fmt.Sprintf("#%d", nth)
	}
	return k
}
