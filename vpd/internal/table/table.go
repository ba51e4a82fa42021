// Package table makes a vpd.Format of tables: images of a known size whose
// fields lie at known places, with checksums over ranges of them, as
// identification EEPROMs have them.
//
// A spec names its layout, then has a member for each field. A dot in a
// field's name makes an object: "lan1.mac" is {"lan1": {"mac": ...}}. Bytes
// that belong to no field are patches, as in package raw, and lie below the
// fields: a dump of a whole image can be one patch, and fields change parts of
// it. What isn't said is the fill byte. Checksums are computed; a member with
// a checksum's name is one that is wrong, or not wanted.
package table

import (
	"fmt"
	"slices"
	"sync"

	"nvstore.dev/vpd"
)

// A Def is what makes a format.
type Def struct {
	Name   string
	Title  string // e.g. "Network card EEPROM"
	Member string // of a spec, with the layout's name, e.g. "model"; empty if there is one

	MaxSize int
	Layouts []*Layout

	// Pick returns the layout of an image of at most MaxSize bytes, or why
	// it has none. It must not depend on checksums alone, for then a wrong
	// one would not be found.
	Pick func(image []byte) (*Layout, error)

	// Plain tells whether an image of a layout is so beyond doubt; wrong is
	// how many of its checksums are.
	Plain func(l *Layout, image []byte, wrong int) bool
}

// A Layout is one kind of image.
type Layout struct {
	Name  string
	Size  int  // of an image if the spec doesn't say
	Large int  // the same if the spec has a field behind Size; Size if it is 0
	Min   int  // the least size
	Fill  byte // where nothing is

	// Align is what patches begin and end at multiples of; 1 if it is 0.
	Align int

	Signature []Patch
	Fields    []Field // in the order of a spec; no two overlap
	Sums      []Sum   // in the order in which they are computed

	// Complete sets what follows from the fields that a spec gives, and that
	// it doesn't give itself; nil for nothing.
	Complete func(image []byte, given func(name string) bool)

	// Check finds what is wrong apart from checksums and values that
	// aren't of their kind; nil for nothing.
	Check func(image []byte) []vpd.Problem
}

// A Patch is bytes at an offset.
type Patch struct {
	Off  int
	Data []byte
}

// A Field is a value in an image.
type Field struct {
	Name     string
	Off, Len int // in bytes
	Kind     Kind

	// At finds a field that moves; Off and Len don't count then. On
	// packing, its length is what the spec gives.
	At func(image []byte) (off, n int, ok bool)

	// Required: a spec must have it.
	Required bool

	// Doc says to people what it is, if its name doesn't.
	Doc string

	// Meaning is what inspection adds to the value, or "".
	Meaning func(b []byte) string
}

// A Sum is a checksum.
type Sum struct {
	Name      string
	Title     string // e.g. "CRC-16"
	Off, Len  int    // where it is stored; Off is from the end if negative
	BigEndian bool

	// From and To are the range that it covers; To is from the end if not
	// positive. Span, if not nil, says so instead.
	From, To int
	Span     func(image []byte) (from, to int)

	// When tells whether an image has it; nil if each has.
	When func(image []byte) bool

	// Of computes it from the range.
	Of func(covered []byte) uint64
}

type format struct {
	Def
	schema func() []byte
}

// New returns the format.
func New(d Def) vpd.Format {
	f := &format{Def: d}
	f.schema = sync.OnceValue(f.makeSchema)
	return f
}

func (f *format) Name() string { return f.Def.Name }

func (f *format) layout(name string) *Layout {
	for _, l := range f.Layouts {
		if l.Name == name {
			return l
		}
	}
	return nil
}

// pick finds the layout of an image.
func (f *format) pick(image []byte) (*Layout, error) {
	if len(image) > f.MaxSize {
		return nil, f.errorf("%d bytes, want at most %d", len(image), f.MaxSize)
	}
	l, err := f.Pick(image)
	if err != nil {
		return nil, f.errorf("%v", err)
	}
	if len(image) < l.Min {
		return nil, f.errorf("%d bytes, and %s takes %d", len(image), l.Name, l.Min)
	}
	return l, nil
}

func (f *format) errorf(format string, args ...any) error {
	return &vpd.ImageError{Format: f.Def.Name, Msg: fmt.Sprintf(format, args...)}
}

// Detect asks Plain.
func (f *format) Detect(image []byte) bool {
	l, err := f.pick(image)
	if err != nil {
		return false
	}
	wrong := 0
	for i := range l.Sums {
		if s := l.Sums[i].in(image); s.wanted && (!s.present || s.got != s.want) {
			wrong++
		}
	}
	return f.Plain(l, image, wrong)
}

// A span is a field or a checksum in an image, or bytes between them.
type span struct {
	off, end int
	field    *Field
	sum      *sum
}

// A sum is a checksum in an image.
type sum struct {
	*Sum
	wanted    bool
	present   bool
	off       int
	from, to  int
	got, want uint64
}

func (s *Sum) in(image []byte) *sum {
	r := &sum{Sum: s, off: s.Off, from: s.From, to: s.To}
	if r.off < 0 {
		r.off += len(image)
	}
	if r.to <= 0 {
		r.to += len(image)
	}
	if s.Span != nil {
		r.from, r.to = s.Span(image)
	}
	r.wanted = s.When == nil || s.When(image)
	r.present = r.wanted && r.off >= 0 && r.off+s.Len <= len(image) && r.from <= r.to && r.to <= len(image)
	if r.present {
		r.got = number(image[r.off:r.off+s.Len], s.BigEndian)
		r.want = s.Of(image[r.from:r.to])
	}
	return r
}

func (s *sum) put(image []byte, v uint64) {
	putNumber(image[s.off:s.off+s.Len], v, s.BigEndian)
}

func (s *sum) hex(v uint64) string { return fmt.Sprintf("0x%0*x", 2*s.Len, v) }

// locate returns where a field lies in the image, if it does.
func (fd *Field) locate(image []byte) (off, end int, ok bool) {
	off, n := fd.Off, fd.Len
	if fd.At != nil {
		if off, n, ok = fd.At(image); !ok {
			return 0, 0, false
		}
	}
	return off, off + n, off >= 0 && n > 0 && off <= len(image)-n
}

// spans returns the fields and checksums that lie in the image, in ascending
// order. A field that moved onto another one doesn't count.
func (l *Layout) spans(image []byte) []span {
	var list []span
	for i := range l.Sums {
		if s := l.Sums[i].in(image); s.present {
			list = append(list, span{off: s.off, end: s.off + s.Len, sum: s})
		}
	}
	for _, moving := range []bool{false, true} {
		for i := range l.Fields {
			fd := &l.Fields[i]
			off, end, ok := fd.locate(image)
			if (fd.At != nil) == moving && ok && !overlaps(list, off, end) {
				list = append(list, span{off: off, end: end, field: fd})
			}
		}
	}
	slices.SortFunc(list, func(a, b span) int { return a.off - b.off })
	return list
}

// Has tells whether an image has a field of that name, with a value that is
// of its kind and not blank.
func (l *Layout) Has(image []byte, name string) bool {
	for i := range l.Fields {
		fd := &l.Fields[i]
		if off, end, ok := fd.locate(image); fd.Name == name && ok {
			return fd.Kind.check(image[off:end]) == "" && !Blank(image[off:end])
		}
	}
	return false
}

func overlaps(list []span, off, end int) bool {
	return slices.ContainsFunc(list, func(s span) bool { return off < s.end && s.off < end })
}

// base is an image of which nothing is known but its layout.
func (l *Layout) base(size int, fill byte) []byte {
	image := slices.Repeat([]byte{fill}, size)
	for _, p := range l.Signature {
		if p.Off < size {
			copy(image[p.Off:], p.Data)
		}
	}
	return image
}

// problems are what is wrong with an image.
func (l *Layout) problems(image []byte) []vpd.Problem {
	var list []vpd.Problem
	for _, s := range l.spans(image) {
		off := int64(s.off)
		if s.sum != nil {
			if s.sum.got != s.sum.want {
				list = append(list, vpd.Problem{Area: s.sum.Name, Off: off, Msg: "wrong " + s.sum.Title,
					Got: s.sum.hex(s.sum.got), Want: s.sum.hex(s.sum.want), Fixable: true})
			}
		} else if msg := s.field.Kind.check(image[s.off:s.end]); msg != "" {
			list = append(list, vpd.Problem{Area: s.field.Name, Off: off, Msg: msg})
		}
	}
	for i := range l.Sums {
		if s := l.Sums[i].in(image); s.wanted && !s.present {
			list = append(list, vpd.Problem{Area: s.Name, Off: -1, Msg: "is missing: the image ends before it"})
		}
	}
	if l.Check != nil {
		list = append(list, l.Check(image)...)
	}
	return list
}

// Verify checks checksums and values.
func (f *format) Verify(image []byte) []vpd.Problem {
	l, err := f.pick(image)
	if err != nil {
		return []vpd.Problem{{Area: "image", Off: 0, Msg: err.Error()}}
	}
	return l.problems(image)
}

// Fix sets the checksums.
func (f *format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := f.pick(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	var changes []vpd.Change
	for i := range l.Sums {
		s := l.Sums[i].in(fixed)
		if !s.present || s.got == s.want {
			continue
		}
		s.put(fixed, s.want)
		changes = append(changes, vpd.Change{Area: s.Name, Off: int64(s.off), Msg: s.Title, Old: s.hex(s.got), New: s.hex(s.want)})
	}
	return fixed, changes, nil
}
