package uefi

import (
	"bytes"
	"errors"
	"fmt"

	"nvstore.dev/vpd"
)

// Errors of Set and Delete.
var (
	// ErrNotFound: there is no such variable.
	ErrNotFound = errors.New("no such variable")
	// ErrNoSpace: the variable doesn't fit, not even after a reclaim.
	ErrNoSpace = errors.New("the variable store is full")
	// ErrInvalid: the name, the GUID or the attributes can't be a
	// variable's, or the image is too damaged to be changed.
	ErrInvalid = errors.New("invalid variable")
)

// A Variable is one that the firmware reads.
type Variable struct {
	Name string
	GUID string // as 8be4df61-93ca-11d2-aa0d-00e098032b8c
	Attr uint32 // attributes, UEFI specification, section 8.2.1
	Data []byte
}

// Variables lists the variables that the firmware reads, in the order in which
// they lie in the image. Data is a copy.
func Variables(image []byte) ([]Variable, error) {
	l, err := scan(image)
	if err != nil {
		return nil, err
	}
	var list []Variable
	for _, v := range l.current() {
		name, _ := v.text()
		list = append(list, Variable{name, v.guid.String(), v.attr, bytes.Clone(v.data)})
	}
	return list, nil
}

// current are the variables that a reclaim keeps.
func (l *layout) current() []*variable {
	all := make([]*variable, len(l.vars))
	for i := range l.vars {
		all[i] = &l.vars[i]
	}
	return living(all)
}

// Set returns an image in which a variable has new attributes and data, as the
// firmware does it: the new one is written into free space, and the old one
// marked deleted. Time, count and key of an authenticated variable stay. If
// there is no room, all that is deleted is dropped first. The changes say what
// was done. Data must not be empty: for the firmware that is to delete.
func Set(image []byte, v Variable) ([]byte, []vpd.Change, error) {
	l, name, g, err := editable(image, v.Name, v.GUID)
	if err != nil {
		return nil, nil, err
	}
	if len(v.Data) == 0 || v.Attr&attrNonVolatile == 0 || v.Attr == 1<<32-1 {
		return nil, nil, fmt.Errorf("%w: %s: it needs data, and the attribute non-volatile", ErrInvalid, v.Name)
	}
	n := &variable{state: stateAdded, attr: v.Attr, guid: g, name: name, data: v.Data,
		nameSize: uint32(len(name)), dataSize: uint32(len(v.Data))}
	n.padding = bytes.Repeat([]byte{0xff}, n.pad())
	old := l.find(n.id())
	if old != nil {
		n.count, n.key, n.time = old.count, old.key, old.time
	}
	out := bytes.Clone(image)
	encoded := n.encode(l.geo.auth)
	if l.limit-l.end >= len(encoded) {
		changes := mark(out, l, n.id())
		copy(out[l.end:], encoded)
		return out, append(changes, vpd.Change{Area: n.label(), Off: int64(l.end), Msg: "written",
			Old: "free", New: fmt.Sprintf("%d bytes", len(encoded))}), nil
	}
	var kept []*variable
	for _, o := range l.current() {
		if o.id() != n.id() {
			kept = append(kept, o)
		}
	}
	return reclaim(out, l, append(kept, n))
}

// Delete returns an image in which a variable is marked deleted.
func Delete(image []byte, name, guid string) ([]byte, []vpd.Change, error) {
	l, n, g, err := editable(image, name, guid)
	if err != nil {
		return nil, nil, err
	}
	id := string(g[:]) + string(n)
	if l.find(id) == nil {
		return nil, nil, fmt.Errorf("%w: %s in %s", ErrNotFound, name, guid)
	}
	out := bytes.Clone(image)
	return out, mark(out, l, id), nil
}

// editable reads what Set and Delete begin with. They write into free space only if
// it is free.
func editable(image []byte, name, guidText string) (l *layout, n []byte, g guid, err error) {
	if l, err = scan(image); err != nil {
		return nil, nil, g, err
	}
	if l.stop != "" || l.cut() > 0 || !erased(l.free()) {
		return nil, nil, g, fmt.Errorf("%w: the store is damaged behind its variables, at byte %#x; unpack and pack it", ErrInvalid, l.end)
	}
	n = encodeName(name)
	g, ok := parseGUID(guidText)
	if n == nil || len(n) > maxName || !ok {
		return nil, nil, g, fmt.Errorf("%w: name %q, GUID %q", ErrInvalid, name, guidText)
	}
	return l, n, g, nil
}

func (l *layout) find(id string) *variable {
	for _, v := range l.current() {
		if v.id() == id {
			return v
		}
	}
	return nil
}

// mark clears the bits that a deleted variable lacks, of every live one of that
// name.
func mark(out []byte, l *layout, id string) []vpd.Change {
	var changes []vpd.Change
	for i := range l.vars {
		v := &l.vars[i]
		if !v.live() || v.id() != id {
			continue
		}
		out[v.off+2] &= stateDeleted
		changes = append(changes, vpd.Change{Area: v.label(), Off: int64(v.off) + 2, Msg: "marked deleted",
			Old: fmt.Sprintf("%#02x", v.state), New: fmt.Sprintf("%#02x", out[v.off+2])})
	}
	return changes
}

// reclaim writes the store anew.
func reclaim(out []byte, l *layout, kept []*variable) ([]byte, []vpd.Change, error) {
	need, room := size(kept, l.geo.auth), l.limit-l.start
	if need > room {
		return nil, nil, fmt.Errorf("%w: %d bytes are needed, and there is room for %d", ErrNoSpace, need, room)
	}
	pos := l.start
	for _, v := range kept {
		// One that lay at the very end may lack its padding.
		v.padding = bytes.Repeat([]byte{0xff}, v.pad())
		pos += copy(out[pos:l.limit], v.encode(l.geo.auth))
	}
	copy(out[pos:l.limit], bytes.Repeat([]byte{0xff}, l.limit-pos))
	return out, []vpd.Change{{Area: "variables", Off: int64(l.start), Msg: "reclaimed: the deleted are dropped",
		Old: fmt.Sprintf("%d variables", len(l.vars)), New: fmt.Sprintf("%d variables", len(kept))}}, nil
}
