package pci

import (
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Verify checks structure and checksum.
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
	if !l.simple() {
		add("image", -1, "resources are not one each of identifier, read-only and read-write, in this order")
	}
	names := l.names()
	readOnly := false
	for i := range l.res {
		r := &l.res[i]
		if r.tag == tagReadOnly {
			readOnly = true
		}
		if r.isArea() {
			list = append(list, l.area(r, names[i])...)
		}
		if r.tag == tagIdentifier && !spec.IsText(r.data) {
			add(names[i], r.off, "holds bytes that are not printable ASCII")
		}
	}
	if l.res[0].tag != tagIdentifier {
		add("identifier", 0, "is missing")
	}
	if !readOnly {
		add("read_only", -1, "is missing, and with it the checksum")
	}
	switch {
	case l.end == nil:
		add("end_tag", l.restOff(), "no end tag: %s", l.stop)
	case len(l.end.data) > 0:
		add("end_tag", l.end.off, "has %d bytes of data, want none", len(l.end.data))
	}
	return list
}

// area checks the fields of one area. The last field of a read-only area is
// RV, that of a read-write area RW.
func (l *layout) area(r *resource, name string) []vpd.Problem {
	var list []vpd.Problem
	add := func(field string, off int, format string, args ...any) {
		list = append(list, vpd.Problem{Area: field, Off: int64(off), Msg: fmt.Sprintf(format, args...)})
	}
	closing, foreign := "RV", "RW"
	if r.tag == tagReadWrite {
		closing, foreign = foreign, closing
	}
	seen := map[string]bool{}
	for j, k := range keys(r.fields) {
		f := &r.fields[j]
		path := name + "." + k
		switch {
		case seen[f.kw]:
			add(path, f.off, "keyword comes more than once")
		case !isKeyword(f.kw):
			add(path, f.off, "keyword is not two upper-case letters or digits")
		case f.kw == foreign:
			add(path, f.off, "does not belong in this area")
		case f.kw == closing && j < len(r.fields)-1:
			add(path, f.off, "is not the area's last field")
		case f.kw == "RV" && len(f.data) == 0:
			add(path, f.off, "has no checksum byte")
		}
		if f.kw == "RV" && r.tag == tagReadOnly && len(f.data) > 0 {
			off := f.dataOff()
			if got, want := l.image[off], checksum(l.image, off); got != want {
				list = append(list, vpd.Problem{Area: path, Off: int64(off), Msg: "wrong checksum",
					Got: spec.Byte(got), Want: spec.Byte(want), Fixable: true})
			}
		}
		if isTextKeyword(f.kw) && !spec.IsText(f.data) {
			what := "holds bytes that are not printable ASCII"
			if !slices.ContainsFunc(f.data, func(c byte) bool { return c != 0xff }) {
				what = "holds nothing but 0xff: it was never written"
			}
			add(path, f.dataOff(), "%s", what)
		}
		seen[f.kw] = true
	}
	if !seen[closing] {
		add(name+"."+closing, -1, "is missing")
	}
	if n := len(r.tail); n > 0 {
		add(name+".tail", r.off+r.header+len(r.data)-n, "%d bytes at the area's end are no field", n)
	}
	return list
}

// isTextKeyword: the keywords that hold alphanumeric text. Vendor fields (Vx)
// and system fields (Yx) may hold anything, except the asset tag.
func isTextKeyword(kw string) bool {
	switch kw {
	case "PN", "EC", "FG", "LC", "MN", "PG", "SN", "YA":
		return true
	}
	return false
}

// warnings turns problems into warnings.
func warnings(problems []vpd.Problem) []vpd.Warning {
	var list []vpd.Warning
	for _, p := range problems {
		msg := p.Msg
		if p.Want != "" {
			msg += ": got " + p.Got + ", want " + p.Want
		}
		list = append(list, vpd.Warning{Off: p.Off, Field: p.Area, Msg: msg})
	}
	return list
}
