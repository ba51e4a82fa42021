package table

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"strings"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// maxBrief is how many bytes of a gap are shown.
const maxBrief = 16

// Pack makes an image of a spec.
func (f *format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, f.Def.Name)
	if err != nil {
		return nil, nil, err
	}
	l, err := f.named(o)
	if err != nil {
		return nil, nil, err
	}
	values, err := f.flatten(l, o)
	if err != nil {
		return nil, nil, err
	}
	image, err := f.blank(l, o, values)
	if err != nil {
		return nil, nil, err
	}
	if err := l.putFields(image, values); err != nil {
		return nil, nil, err
	}
	if l.Complete != nil {
		l.Complete(image, func(name string) bool { return values[name] != nil })
	}
	if err := l.putSums(image, values); err != nil {
		return nil, nil, err
	}
	if err := f.recognise(l, image); err != nil {
		return nil, nil, err
	}
	return image, form.Warnings(l.problems(image)), nil
}

// recognise refuses an image that would be read as something else.
func (f *format) recognise(l *Layout, image []byte) error {
	got, err := f.pick(image)
	if err != nil {
		return spec.Errorf(f.Member, "the result would not be recognised: %v", err)
	}
	if got != l {
		return spec.Errorf(f.Member, "the result would be recognised as %s, not %s", got.Name, l.Name)
	}
	return nil
}

func (f *format) names() string {
	var names []string
	for _, l := range f.Layouts {
		names = append(names, l.Name)
	}
	return strings.Join(names, ", ")
}

// named finds the layout that a spec names.
func (f *format) named(o spec.Object) (*Layout, error) {
	if f.Member == "" {
		return f.Layouts[0], nil
	}
	raw, ok := o.Get(f.Member)
	if !ok {
		return nil, spec.Errorf(f.Member, "missing; want one of %s", f.names())
	}
	name, err := spec.String(f.Member, raw)
	if err != nil {
		return nil, err
	}
	l := f.layout(name)
	if l == nil {
		return nil, spec.Errorf(f.Member, "unknown %q; want one of %s", name, f.names())
	}
	return l, nil
}

// members returns the names of a layout's fields and checksums.
func (l *Layout) members() []string {
	var list []string
	for i := range l.Fields {
		list = append(list, l.Fields[i].Name)
	}
	for i := range l.Sums {
		list = append(list, l.Sums[i].Name)
	}
	return list
}

// head is the members that a spec begins with.
func (f *format) head() []string {
	if f.Member == "" {
		return []string{"format"}
	}
	return []string{"format", f.Member}
}

// flatten gives the members of a spec's objects the names of fields.
func (f *format) flatten(l *Layout, o spec.Object) (map[string]json.RawMessage, error) {
	groups := map[string][]string{}
	top := f.head()
	for _, name := range l.members() {
		group, member, ok := strings.Cut(name, ".")
		if !ok {
			top = append(top, name)
			continue
		}
		if groups[group] == nil {
			top = append(top, group)
		}
		groups[group] = append(groups[group], member)
	}
	if err := o.Only("", append(top, "patches", "size", "fill")...); err != nil {
		return nil, err
	}
	values := map[string]json.RawMessage{}
	for _, m := range o {
		if groups[m.Name] == nil {
			values[m.Name] = m.Value
			continue
		}
		inner, err := spec.ParseObject(m.Name, m.Value)
		if err != nil {
			return nil, err
		}
		if err := inner.Only(m.Name, groups[m.Name]...); err != nil {
			return nil, err
		}
		for _, i := range inner {
			values[m.Name+"."+i.Name] = i.Value
		}
	}
	for i := range l.Fields {
		if fd := &l.Fields[i]; fd.Required && values[fd.Name] == nil {
			return nil, spec.Errorf(fd.Name, "missing")
		}
	}
	return values, nil
}

// size is an image's if the spec doesn't say.
func (l *Layout) size(values map[string]json.RawMessage) int {
	for i := range l.Fields {
		if fd := &l.Fields[i]; values[fd.Name] != nil && fd.At == nil && fd.Off >= l.Size && l.Large > 0 {
			return l.Large
		}
	}
	return l.Size
}

// blank makes the image of size, fill and patches.
func (f *format) blank(l *Layout, o spec.Object, values map[string]json.RawMessage) ([]byte, error) {
	size, err := form.Uint(o, "", "size", uint64(f.MaxSize), uint64(l.size(values)))
	if err != nil {
		return nil, err
	}
	if int(size) < l.Min {
		return nil, spec.Errorf("size", "%d, and %s takes %d", size, l.Name, l.Min)
	}
	fill, err := form.Uint(o, "", "fill", 0xff, uint64(l.Fill))
	if err != nil {
		return nil, err
	}
	image := l.base(int(size), byte(fill))
	return image, form.ApplyPatches(o, image)
}

// putFields sets the fields that a spec gives: those that move last, since
// others say where to.
func (l *Layout) putFields(image []byte, values map[string]json.RawMessage) error {
	for _, moving := range []bool{false, true} {
		for i := range l.Fields {
			fd := &l.Fields[i]
			raw, ok := values[fd.Name]
			if !ok || (fd.At != nil) != moving {
				continue
			}
			if err := l.putField(image, fd, raw); err != nil {
				return err
			}
		}
	}
	return nil
}

func (l *Layout) putField(image []byte, fd *Field, raw json.RawMessage) error {
	off, n := fd.Off, fd.Len
	if fd.At != nil {
		var ok bool
		if off, _, ok = fd.At(image); !ok {
			return spec.Errorf(fd.Name, "nothing points to it")
		}
		n = len(image) - off
	}
	if n < 1 || off+n > len(image) {
		return spec.Errorf(fd.Name, "lies behind the image, which has %d bytes", len(image))
	}
	b, err := fd.read(raw, n)
	if err != nil {
		return err
	}
	if fd.At != nil {
		rest := slices.DeleteFunc(l.spans(image), func(s span) bool { return s.field == fd })
		if overlaps(rest, off, off+len(b)) {
			return spec.Errorf(fd.Name, "overlaps other fields at byte %#x", off)
		}
	}
	copy(image[off:], b)
	return nil
}

// read reads a value of n bytes, or up to n for a field that moves.
func (fd *Field) read(raw json.RawMessage, n int) ([]byte, error) {
	if len(raw) > 0 && raw[0] != '{' && fd.Kind.Read != nil {
		return fd.Kind.Read(fd.Name, raw, n)
	}
	v, err := spec.ParseValue(fd.Name, raw, n)
	if err != nil {
		return nil, err
	}
	if len(v.Bytes) != n && (fd.At == nil || len(v.Bytes) == 0) {
		return nil, spec.Errorf(fd.Name, "%d bytes, want %d", len(v.Bytes), n)
	}
	return v.Bytes, nil
}

// putSums sets the checksums: computed, unless the spec has them.
func (l *Layout) putSums(image []byte, values map[string]json.RawMessage) error {
	for i := range l.Sums {
		s := l.Sums[i].in(image)
		raw, given := values[s.Name]
		if !s.present {
			if given && s.wanted {
				return spec.Errorf(s.Name, "lies behind the image, which has %d bytes", len(image))
			}
			if given {
				return spec.Errorf(s.Name, "an image with these fields has none")
			}
			continue
		}
		v := s.want
		if given {
			var err error
			if v, err = spec.Uint(s.Name, raw, 1<<(8*s.Len)-1); err != nil {
				return err
			}
		}
		s.put(image, v)
	}
	return nil
}

// Parse makes a spec of an image.
func (f *format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := f.pick(image)
	if err != nil {
		return nil, nil, err
	}
	spans := l.spans(image)
	fill := l.chooseFill(image, spans)
	base := l.base(len(image), fill)
	var o spec.Object
	o.Add("format", f.Def.Name)
	if f.Member != "" {
		o.Add(f.Member, l.Name)
	}
	l.addFields(&o, image, base, fill, spans)
	if list := l.patches(image, base, spans); len(list) > 0 {
		o.Add("patches", list)
	}
	if len(image) != l.Size {
		o.Add("size", len(image))
	}
	if fill != l.Fill {
		o.Add("fill", spec.Byte(fill))
	}
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems(image)), nil
}

// chooseFill is the layout's own fill byte, or its opposite where that makes
// the spec shorter.
func (l *Layout) chooseFill(image []byte, spans []span) byte {
	var same, other int
	count := func(b []byte) {
		for _, c := range b {
			switch c {
			case l.Fill:
				same++
			case ^l.Fill:
				other++
			}
		}
	}
	pos := 0
	for _, s := range spans {
		count(image[pos:s.off])
		pos = s.end
	}
	if count(image[pos:]); other > same {
		return ^l.Fill
	}
	return l.Fill
}

// addFields writes what isn't fill, in the order of the layout.
func (l *Layout) addFields(o *spec.Object, image, base []byte, fill byte, spans []span) {
	values := map[string]any{}
	for _, s := range spans {
		b := image[s.off:s.end]
		switch {
		case s.sum != nil && s.sum.got != s.sum.want:
			values[s.sum.Name] = s.sum.hex(s.sum.got)
		case s.field != nil && (s.field.Required || s.field.At != nil || !filled(b, fill) || string(b) != string(base[s.off:s.end])):
			values[s.field.Name] = s.field.form(b)
		}
	}
	groups := map[string]*spec.Object{}
	var order []string
	for _, name := range l.members() {
		v, ok := values[name]
		if !ok {
			continue
		}
		group, member, nested := strings.Cut(name, ".")
		if !nested {
			group = name
		}
		if groups[group] == nil {
			groups[group] = &spec.Object{}
			order = append(order, group)
		}
		groups[group].Add(member, v) // under "" if it isn't nested
	}
	for _, name := range order {
		if v, ok := groups[name].Get(""); ok {
			*o = append(*o, spec.Member{Name: name, Value: v})
		} else {
			o.Add(name, *groups[name])
		}
	}
}

func filled(b []byte, fill byte) bool {
	return !slices.ContainsFunc(b, func(c byte) bool { return c != fill })
}

// form is how bytes are written in a spec.
func (fd *Field) form(b []byte) any {
	if v, ok := fd.show(b); ok {
		return v
	}
	return form.Hex(b)
}

func (fd *Field) show(b []byte) (any, bool) {
	if fd.Kind.Show == nil {
		return nil, false
	}
	return fd.Kind.Show(b)
}

// patches are the bytes outside of spans that aren't in the base.
func (l *Layout) patches(image, base []byte, spans []span) (list []form.Patch) {
	pos := 0
	for _, s := range append(spans, span{off: len(image)}) {
		list = append(list, form.Patches(image, base, pos, s.off, max(1, l.Align))...)
		pos = s.end
	}
	return list
}

// Fields cuts the image without a gap.
func (f *format) Fields(image []byte) ([]vpd.Field, error) {
	l, err := f.pick(image)
	if err != nil {
		return nil, err
	}
	spans := l.spans(image)
	var sums []*sum
	cuts := []int{len(image)}
	for _, s := range spans {
		if s.sum != nil {
			sums = append(sums, s.sum)
			cuts = append(cuts, s.sum.from, s.sum.to)
		}
	}
	sort.Ints(cuts)
	var list []vpd.Field
	add := func(off, end int, name, value, check string) {
		list = append(list, vpd.Field{Off: int64(off), Len: int64(end - off), Name: name, Value: value, CoveredBy: check})
	}
	pos := 0
	gap := func(end int) {
		for _, cut := range cuts {
			if cut = min(cut, end); cut > pos {
				add(pos, cut, fmt.Sprintf("bytes[%#x]", pos), briefGap(image[pos:cut]), covering(sums, pos, cut))
				pos = cut
			}
		}
	}
	for _, s := range spans {
		gap(s.off)
		if s.sum != nil {
			add(s.off, s.end, s.sum.Name, s.sum.hex(s.sum.got), s.sum.Name)
		} else {
			add(s.off, s.end, s.field.Name, s.field.brief(image[s.off:s.end]), covering(sums, s.off, s.end))
		}
		pos = s.end
	}
	gap(len(image))
	return list, nil
}

// briefGap shows less than spec.Brief: a gap is mostly unused.
func briefGap(b []byte) string {
	if len(b) <= maxBrief {
		return spec.Brief(b)
	}
	return "0x" + hex.EncodeToString(b[:maxBrief]) + "..."
}

// covering is the name of the checksum of the smallest range that has all of
// the bytes.
func covering(sums []*sum, off, end int) string {
	var best *sum
	for _, s := range sums {
		if s.from <= off && end <= s.to && (best == nil || s.to-s.from < best.to-best.from) {
			best = s
		}
	}
	if best == nil {
		return ""
	}
	return best.Name
}

func (fd *Field) brief(b []byte) string {
	s := spec.Brief(b)
	if v, ok := fd.show(b); ok {
		s = fmt.Sprint(v)
	}
	if fd.Meaning != nil {
		if m := fd.Meaning(b); m != "" {
			s += " " + m
		}
	}
	return s
}
