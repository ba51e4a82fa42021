package ubootenv

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

const defaultFill = 0xff

// isText: U-Boot doesn't care, but a JSON string can have no other bytes.
func isText(b []byte) bool {
	return utf8.Valid(b) && !strings.ContainsRune(string(b), utf8.RuneError)
}

func show(b []byte) any {
	if isText(b) {
		return string(b)
	}
	return form.Hex(b)
}

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	first := &l.envs[0]
	o.Add("format", Name)
	o.Add("env_size", fmt.Sprintf("%#x", first.size))
	if first.flagged {
		o.Add("redundant", true)
		list := []spec.Object{}
		at := 0
		for i := range l.envs {
			list = append(list, l.envs[i].spec(at))
			at = l.envs[i].end()
		}
		o.Add("copies", list)
	} else {
		o = append(o, first.spec(0)...)
	}
	fill := l.fill()
	covered := 0
	base := bytes.Repeat([]byte{fill}, len(image))
	list := []form.Patch{}
	for _, e := range l.envs {
		list = append(list, form.Patches(image, base, covered, e.off, 1)...)
		covered = e.end()
	}
	list = append(list, form.Patches(image, base, covered, len(image), 1)...)
	if len(list) > 0 {
		o.Add("patches", list)
	}
	if covered != len(image) {
		o.Add("size", fmt.Sprintf("%#x", len(image)))
	}
	if fill != defaultFill {
		o.Add("fill", spec.Byte(fill))
	}
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

// fill is what most of the image outside of the copies is.
func (l *layout) fill() byte {
	var zeros, ones int
	pos := 0
	for _, e := range append(slices.Clone(l.envs), env{off: len(l.image)}) {
		zeros += bytes.Count(l.image[pos:e.off], []byte{0})
		ones += bytes.Count(l.image[pos:e.off], []byte{0xff})
		pos = e.end()
	}
	if zeros > ones {
		return 0
	}
	return defaultFill
}

// spec is a copy's text form; at is where one would expect it.
func (e *env) spec(at int) (o spec.Object) {
	if e.flagged {
		o.Add("flag", e.flag())
		if e.off != at {
			o.Add("offset", fmt.Sprintf("%#x", e.off))
		}
	}
	c := e.content()
	if !c.ended {
		o.Add("data", form.Hex(e.data()))
	} else {
		if names, values, ok := c.variables(); ok {
			list := spec.Object{}
			for i, name := range names {
				list.Add(name, show(values[i]))
			}
			o.Add("variables", list)
		} else {
			list := []any{}
			for _, b := range c.entries {
				list = append(list, show(b))
			}
			o.Add("entries", list)
		}
		if len(c.rest) > 0 {
			o.Add("rest", form.Hex(c.rest))
		}
		if len(c.pad) > 0 && c.pad[0] != defaultFill {
			o.Add("pad", spec.Byte(c.pad[0]))
		}
	}
	if !e.good {
		o.Add("crc", hex32(e.crc()))
	}
	return o
}

// Verify checks CRCs and variables.
func (format) Verify(image []byte) []vpd.Problem {
	l, err := scan(image)
	if err != nil {
		return []vpd.Problem{{Area: "image", Off: 0, Msg: err.Error()}}
	}
	return l.problems()
}

func (l *layout) problems() (list []vpd.Problem) {
	add := func(i int, member string, off int, format string, args ...any) {
		list = append(list, vpd.Problem{Area: l.name(i, member), Off: int64(off), Msg: fmt.Sprintf(format, args...)})
	}
	for i := range l.envs {
		e := &l.envs[i]
		if !e.good {
			list = append(list, l.badCRC(i))
			if !l.fixable() {
				continue // what an interrupted write left there
			}
		}
		c := e.content()
		if !c.ended {
			add(i, "data", e.entriesOff(), "the variables have no end: no two zero bytes")
			continue
		}
		off := e.entriesOff()
		seen := map[string]bool{}
		for n, b := range c.entries {
			name, _, ok := bytes.Cut(b, []byte("="))
			member := fmt.Sprintf("entries[%d]", n)
			switch {
			case !ok:
				add(i, member, off, "has no =")
			case len(name) == 0:
				add(i, member, off, "has no name")
			case seen[string(name)]:
				add(i, member, off, "%s comes twice", spec.Brief(name))
			}
			seen[string(name)] = true
			off += len(b) + 1
		}
	}
	return list
}

func (l *layout) badCRC(i int) vpd.Problem {
	e := &l.envs[i]
	p := vpd.Problem{Area: l.name(i, "crc"), Off: int64(e.off), Msg: "wrong CRC-32", Got: hex32(e.crc()), Want: hex32(e.want()), Fixable: l.fixable()}
	switch {
	case l.fixable():
	case l.envs[1-i].good:
		p.Msg = fmt.Sprintf("wrong CRC-32; U-Boot takes %s, and this one is not to be fixed", copyName(1-i))
	default:
		p.Msg = "wrong CRC-32, as in the other copy; which of them is right nothing says"
	}
	return p
}

// Fix sets the CRC of an environment that is alone. Of two copies it fixes
// none: U-Boot takes the good one, and if both are bad, neither is better.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	e := &l.envs[0]
	if !l.fixable() || e.good {
		return fixed, nil, nil
	}
	binary.LittleEndian.PutUint32(fixed[e.off:], e.want())
	return fixed, []vpd.Change{{Area: l.name(0, "crc"), Off: int64(e.off), Msg: "CRC-32", Old: hex32(e.crc()), New: hex32(e.want())}}, nil
}

// Fields cuts the image without a gap.
func (format) Fields(image []byte) ([]vpd.Field, error) {
	l, err := scan(image)
	if err != nil {
		return nil, err
	}
	var list []vpd.Field
	pos, check := 0, ""
	add := func(n int, name, value string) {
		if n > 0 {
			list = append(list, vpd.Field{Off: int64(pos), Len: int64(n), Name: name, Value: value, CoveredBy: check})
			pos += n
		}
	}
	gap := func(end int) {
		if n := end - pos; n > 0 {
			add(n, fmt.Sprintf("bytes[%#x]", pos), spec.Brief(image[pos:end]))
		}
	}
	for i := range l.envs {
		e := &l.envs[i]
		gap(e.off)
		check = l.name(i, "crc")
		add(crcSize, check, hex32(e.crc()))
		if e.flagged {
			check = ""
			add(1, l.name(i, "flag"), fmt.Sprint(e.flag())+l.activity(i))
			check = l.name(i, "crc")
		}
		c := e.content()
		names, values, ok := c.variables()
		for n, b := range c.entries {
			if ok {
				add(len(b)+1, l.name(i, "variables."+names[n]), spec.Brief(values[n]))
			} else {
				add(len(b)+1, l.name(i, fmt.Sprintf("entries[%d]", n)), spec.Brief(b))
			}
		}
		if c.ended {
			add(1, l.name(i, "end"), "0x00")
			add(len(c.rest), l.name(i, "rest"), spec.Brief(c.rest))
			if len(c.pad) > 0 {
				add(len(c.pad), l.name(i, "pad"), spec.Byte(c.pad[0]))
			}
		} else {
			add(len(c.rest), l.name(i, "data"), spec.Brief(c.rest))
		}
		check = ""
	}
	gap(len(image))
	return list, nil
}

// activity says which copy U-Boot takes.
func (l *layout) activity(i int) string {
	if len(l.envs) == 1 {
		return ""
	}
	if l.active() == i {
		return " active"
	}
	return " not active"
}

// active is the copy that U-Boot takes: of two good ones the one with the
// greater flag, but 0 is greater than 255 (env_import_redund).
func (l *layout) active() int {
	a, b := &l.envs[0], &l.envs[1]
	switch {
	case !a.good && !b.good:
		return -1
	case !b.good:
		return 0
	case !a.good:
		return 1
	case a.flag() == 255 && b.flag() == 0:
		return 1
	case b.flag() == 255 && a.flag() == 0:
		return 0
	case b.flag() > a.flag():
		return 1
	}
	return 0
}
