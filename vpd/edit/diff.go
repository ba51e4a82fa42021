package edit

import (
	"bytes"
	"encoding/json"
)

// A Difference is a field that two specs don't have alike.
type Difference struct {
	Path string          `json:"path"`
	Old  json.RawMessage `json:"old,omitempty"` // missing if only the new one has it
	New  json.RawMessage `json:"new,omitempty"`
}

// String is the difference in one line.
func (d Difference) String() string {
	switch {
	case d.Old == nil:
		return "+ " + d.Path + ": " + show(d.New)
	case d.New == nil:
		return "- " + d.Path + ": " + show(d.Old)
	}
	return "~ " + d.Path + ": " + show(d.Old) + " -> " + show(d.New)
}

// show writes a value for people: of typed bytes, type and data.
func show(raw json.RawMessage) string {
	var t struct{ Type, Data string }
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if d.Decode(&t) == nil && t.Type != "" {
		return t.Type + ":" + t.Data
	}
	var b bytes.Buffer
	if json.Compact(&b, raw) != nil {
		return string(raw)
	}
	return b.String()
}

// Diff compares two specs in standard JSON, such as Parse returns, member by
// member.
func Diff(older, newer []byte) ([]Difference, error) {
	a, err := parse(older)
	if err != nil {
		return nil, err
	}
	b, err := parse(newer)
	if err != nil {
		return nil, err
	}
	var list []Difference
	return list, diff("", a, b, &list)
}

func diff(path string, a, b *node, list *[]Difference) error {
	if a.object && b.object && !a.isValue() && !b.isValue() || a.list && b.list {
		return diffMembers(path, a, b, list)
	}
	x, err := a.MarshalJSON()
	if err != nil {
		return err
	}
	y, err := b.MarshalJSON()
	if err == nil && !bytes.Equal(x, y) {
		*list = append(*list, Difference{path, x, y})
	}
	return err
}

// isValue tells a typed value, which is one field, from an object of fields.
func (n *node) isValue() bool {
	return n.at(step{name: "type"}) >= 0 && n.at(step{name: "data"}) >= 0 && len(n.members) == 2
}

func diffMembers(path string, a, b *node, list *[]Difference) error {
	only := func(path string, n *node, older bool) error {
		raw, err := n.MarshalJSON()
		d := Difference{Path: path, New: raw}
		if older {
			d = Difference{Path: path, Old: raw}
		}
		*list = append(*list, d)
		return err
	}
	for i, m := range a.members {
		s := step{name: m.name, index: i, place: a.list}
		sub := join(path, s)
		var err error
		if j := b.at(s); j >= 0 {
			err = diff(sub, m.node, b.members[j].node, list)
		} else {
			err = only(sub, m.node, true)
		}
		if err != nil {
			return err
		}
	}
	for i, m := range b.members {
		s := step{name: m.name, index: i, place: b.list}
		if a.at(s) < 0 {
			if err := only(join(path, s), m.node, false); err != nil {
				return err
			}
		}
	}
	return nil
}
