package edit

import (
	"bytes"
	"encoding/json"

	"nvstore.dev/vpd/internal/spec"
)

// A node is a JSON value that keeps the order of its members.
type node struct {
	leaf    json.RawMessage // unless it is one of the others
	object  bool
	list    bool
	members []member // of an object; those of a list have no names
}

type member struct {
	name string
	node *node
}

// maxDepth is that of a spec, and room.
const maxDepth = 40

// parse reads standard JSON.
func parse(raw json.RawMessage) (*node, error) { return parseDeep(raw, 0) }

func parseDeep(raw json.RawMessage, depth int) (*node, error) {
	if depth > maxDepth {
		return nil, spec.Errorf("", "nested more than %d deep", maxDepth)
	}
	raw = bytes.TrimSpace(raw)
	if len(raw) == 0 {
		return nil, spec.Errorf("", "want a value in JSON")
	}
	switch raw[0] {
	case '{':
		o, err := spec.ParseObject("", raw)
		if err != nil {
			return nil, err
		}
		n := &node{object: true}
		for _, m := range o {
			sub, err := parseDeep(m.Value, depth+1)
			if err != nil {
				return nil, err
			}
			n.members = append(n.members, member{m.Name, sub})
		}
		return n, nil
	case '[':
		var list []json.RawMessage
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, spec.Errorf("", "%v", err)
		}
		n := &node{list: true}
		for _, e := range list {
			sub, err := parseDeep(e, depth+1)
			if err != nil {
				return nil, err
			}
			n.members = append(n.members, member{"", sub})
		}
		return n, nil
	}
	if !json.Valid(raw) {
		return nil, spec.Errorf("", "%q is not JSON", shorten(raw))
	}
	return &node{leaf: raw}, nil
}

func shorten(raw []byte) []byte {
	if len(raw) > 40 {
		return append(raw[:40:40], "..."...)
	}
	return raw
}

// MarshalJSON writes the members in their order.
func (n *node) MarshalJSON() ([]byte, error) {
	switch {
	case n.object:
		o := spec.Object{}
		for _, m := range n.members {
			raw, err := m.node.MarshalJSON()
			if err != nil {
				return nil, err
			}
			o = append(o, spec.Member{Name: m.name, Value: raw})
		}
		return o.MarshalJSON()
	case n.list:
		var b bytes.Buffer
		b.WriteByte('[')
		for i, m := range n.members {
			if i > 0 {
				b.WriteByte(',')
			}
			raw, err := m.node.MarshalJSON()
			if err != nil {
				return nil, err
			}
			b.Write(raw)
		}
		b.WriteByte(']')
		return b.Bytes(), nil
	}
	return n.leaf, nil
}

// text is the node as a spec is written.
func (n *node) text() ([]byte, error) {
	raw, err := n.MarshalJSON()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return nil, err
	}
	b.WriteByte('\n')
	return b.Bytes(), nil
}
