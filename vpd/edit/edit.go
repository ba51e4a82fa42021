// Package edit reads, changes and compares fields of images by their paths in
// the spec. It works for every format: what isn't changed comes out of a
// spec as it went in, byte by byte, in another place if need be; and what the
// format can't represent, its Pack refuses.
//
// A path is that of a spec's member as errors and warnings name it,
// "board.serial_number" or "board.custom[0]". A name with a period in it is
// found if it is there, and may be quoted: values["a.b"]. A list ends in [+],
// where a value is appended. An element of a list may be called by its member
// "name" or "type": variables.Timeout.data. A path that begins with a slash is a
// JSON Pointer.
package edit

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// ErrNotFound: a spec has nothing at a path.
var ErrNotFound = errors.New("no such field")

// A Change sets a value, or takes it away.
type Change struct {
	Path  string
	Value json.RawMessage // nil takes the member, or the list's element, away
}

// String is the JSON of a text.
func String(s string) (json.RawMessage, error) {
	raw, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	if _, err := spec.String("", raw); err != nil {
		return nil, err
	}
	return raw, nil
}

// Bytes is the JSON of a value: as text if it is printable ASCII, else in hex.
func Bytes(b []byte) (json.RawMessage, error) { return json.Marshal(spec.Show(b)) }

// Get returns the value at a path of a spec in standard JSON, such as Parse
// returns. An error is of kind ErrNotFound, or vpd.ErrSpec.
func Get(text []byte, at string) (json.RawMessage, error) {
	n, err := parse(text)
	if err != nil {
		return nil, err
	}
	for p := newPath(at); !p.done(); {
		s := p.next(n)
		if p.err != nil {
			return nil, p.err
		}
		i := n.at(s)
		if i < 0 {
			return nil, fmt.Errorf("%s: %w", at, ErrNotFound)
		}
		n = n.members[i].node
	}
	return n.MarshalJSON()
}

// Text makes changes in a spec in standard JSON, without judging the result.
func Text(text []byte, changes []Change) ([]byte, error) {
	n, err := parse(text)
	if err != nil {
		return nil, err
	}
	for _, c := range changes {
		if err := n.change(c); err != nil {
			return nil, err
		}
	}
	return n.text()
}

// Apply changes an image: it parses it, makes the changes in their order, and
// packs the result. Where that is shorter and the spec doesn't say a size, it
// is filled up to the length that it had, as a memory's contents don't make it
// smaller. Warnings are those of Pack. What was wrong about the image and isn't
// changed stays wrong, and among the warnings.
func Apply(f vpd.Format, image []byte, changes []Change) ([]byte, []vpd.Warning, error) {
	before, _, err := f.Parse(image)
	if err != nil {
		return nil, nil, err
	}
	after, err := Text(before, changes)
	if err != nil {
		return nil, nil, err
	}
	if a, ok := f.(vpd.Adjuster); ok {
		if after, err = a.Adjust(before, after); err != nil {
			return nil, nil, err
		}
	}
	out, warnings, err := f.Pack(after)
	if err != nil {
		return nil, nil, err
	}
	if _, err := Get(after, "size"); len(out) < len(image) && err != nil {
		if filled, w, err := f.Pack(sized(after, len(image))); err == nil {
			return filled, w, nil
		}
	}
	return out, warnings, nil
}

func sized(text []byte, size int) []byte {
	o, err := spec.ParseObject("", text)
	if err != nil {
		return nil
	}
	o.Add("size", size)
	out, err := o.Text()
	if err != nil {
		return nil
	}
	return out
}

// change makes one change. Objects that are missing on the way are made.
func (n *node) change(c Change) error {
	p := newPath(c.Path)
	if p.done() {
		return spec.Errorf("", "a path is empty")
	}
	for {
		s := p.next(n)
		if p.err != nil {
			return p.err
		}
		i := n.at(s)
		last := p.done()
		switch {
		case c.Value == nil && i < 0:
			return fmt.Errorf("%s: %w", c.Path, ErrNotFound)
		case c.Value == nil && last:
			n.members = slices.Delete(n.members, i, i+1)
			return nil
		case i < 0:
			sub := &node{object: true}
			if !last && (p.rest[0] == '[' && len(p.rest) > 1 && p.rest[1] != '"') {
				sub = &node{list: true}
			}
			if err := n.add(c.Path, s, sub); err != nil {
				return err
			}
			i = len(n.members) - 1
		}
		if last {
			v, err := parse(c.Value)
			if err != nil {
				return fmt.Errorf("%s: %w", c.Path, err)
			}
			n.members[i].node = v
			return nil
		}
		n = n.members[i].node
	}
}

// add appends a member to an object, or an element to a list.
func (n *node) add(path string, s step, sub *node) error {
	switch {
	case n.object && !s.place:
		n.members = append(n.members, member{s.name, sub})
	case n.list && s.place && (s.index == appendIndex || s.index == len(n.members)):
		n.members = append(n.members, member{"", sub})
	case n.list && s.place:
		return spec.Errorf(path, "the list has %d elements; write [+] to append one", len(n.members))
	case n.list:
		return spec.Errorf(path, "%q is looked for in a list, and no element has that name or type; write [+] to append one", s.name)
	case n.object:
		return spec.Errorf(path, "place %d is looked for in an object", s.index)
	default:
		return spec.Errorf(path, "what is in front of the last part is a value, and has no members")
	}
	return nil
}
