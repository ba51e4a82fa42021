// Package vpd is what the formats of vital product data and EEPROM content
// have in common. Each format is one package below it that implements Format,
// and package formats has the table of them all.
//
// An image is the bytes of the memory. A spec is its text form: JSON in a
// stable order, in which comments and trailing commas are allowed on input.
// Packing is strict, because a mistake ends up in hardware; parsing is
// lenient, because what is out there is what it is. Between the two, nothing
// is lost: packing what Parse returned gives the image again, byte by byte,
// so a spec spells out whatever is irregular about an image.
//
// Images and specs may come from anyone. Both are bounded in size, and no
// function panics on them.
package vpd

import (
	"errors"
	"fmt"
)

// Kinds of errors, for errors.Is.
var (
	// ErrSpec: the spec can't be packed. It comes as a SpecError.
	ErrSpec = errors.New("invalid spec")
	// ErrImage: the image isn't of the format at all. It comes as an
	// ImageError.
	ErrImage = errors.New("not an image of this format")
)

// A Format packs, parses and checks one kind of image. Its methods are safe
// for concurrent use, keep nothing of their arguments, and return nil with an
// error.
type Format interface {
	// Name is the value of "format" in a spec, such as "pci".
	Name() string

	// Detect tells whether the image is plainly of this format. It errs
	// towards false.
	Detect(image []byte) bool

	// Pack makes an image of a spec, computing checksums. It refuses
	// what the format forbids unless the spec says it explicitly, as
	// Parse does of irregular images; that becomes a warning.
	Pack(spec []byte) (image []byte, warnings []Warning, err error)

	// Parse makes a spec of an image, as indented standard JSON with a
	// final newline. Damage becomes a warning as long as there is
	// something of the format.
	Parse(image []byte) (spec []byte, warnings []Warning, err error)

	// Verify lists what is wrong with an image: nothing, if it is good.
	Verify(image []byte) []Problem

	// Fix returns a copy in which every checksum is right, and what was
	// changed for that. It changes nothing else.
	Fix(image []byte) (fixed []byte, changes []Change, err error)

	// Fields names the image's parts in ascending order of offset.
	Fields(image []byte) ([]Field, error)

	// Schema is the JSON Schema, of draft 2020-12, of a spec without
	// comments. What Parse returns fits it. It is not all that Pack
	// wants: lengths and checks across members are Pack's.
	Schema() []byte
}

// An Adjuster is a Format in whose specs some members depend on others in ways
// that Pack can't know of, such as free space that an edit may use up.
type Adjuster interface {
	// Adjust takes the spec that Parse made and the same with edits, and
	// returns the latter with such members brought in line.
	Adjust(before, after []byte) ([]byte, error)
}

// A Warning is something irregular that was let pass.
type Warning struct {
	Off   int64  `json:"offset"` // in the image; -1 if there is no one place
	Field string `json:"field"`  // e.g. "read_only.SN"
	Msg   string `json:"message"`
}

func (w Warning) String() string { return at(w.Field, w.Off) + ": " + w.Msg }

// A Problem is something wrong with an image.
type Problem struct {
	Area    string `json:"area"`   // e.g. "read_only"
	Off     int64  `json:"offset"` // in the image; -1 if there is no one place
	Msg     string `json:"message"`
	Got     string `json:"got,omitempty"`
	Want    string `json:"want,omitempty"`
	Fixable bool   `json:"fixable"` // Fix repairs it: it is a checksum
}

func (p Problem) String() string {
	s := at(p.Area, p.Off) + ": " + p.Msg
	if p.Got != "" || p.Want != "" {
		s += fmt.Sprintf(": got %s, want %s", p.Got, p.Want)
	}
	return s
}

// A Change is one thing that Fix did.
type Change struct {
	Area string `json:"area"`
	Off  int64  `json:"offset"`
	Msg  string `json:"message"`
	Old  string `json:"old"`
	New  string `json:"new"`
}

func (c Change) String() string {
	return fmt.Sprintf("%s: %s: %s -> %s", at(c.Area, c.Off), c.Msg, c.Old, c.New)
}

// A Field is a part of an image, for inspection.
type Field struct {
	Off       int64  `json:"offset"`
	Len       int64  `json:"length"`
	Name      string `json:"name"`                 // as in a spec, e.g. "read_only.PN"
	Value     string `json:"value,omitempty"`      // text, or hex with a "0x" in front
	CoveredBy string `json:"covered_by,omitempty"` // name of the field with the checksum over all of it
}

func at(name string, off int64) string {
	if off < 0 {
		return name
	}
	return fmt.Sprintf("%s at byte %#x", name, off)
}

// A SpecError says where a spec is wrong. Its kind is ErrSpec.
type SpecError struct {
	Path string // e.g. "read_only.SN"; empty for the whole
	Msg  string
}

func (e *SpecError) Error() string {
	if e.Path == "" {
		return "spec: " + e.Msg
	}
	return "spec: " + e.Path + ": " + e.Msg
}

// Is makes every SpecError an ErrSpec.
func (e *SpecError) Is(target error) bool { return target == ErrSpec }

// An ImageError says why an image isn't of a format. Its kind is ErrImage.
type ImageError struct {
	Format string
	Off    int64 // byte offset in the image
	Msg    string
}

func (e *ImageError) Error() string {
	return fmt.Sprintf("%s image at byte %#x: %s", e.Format, e.Off, e.Msg)
}

// Is makes every ImageError an ErrImage.
func (e *ImageError) Is(target error) bool { return target == ErrImage }
