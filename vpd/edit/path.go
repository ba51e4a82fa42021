package edit

import (
	"bytes"
	"encoding/json"
	"slices"
	"strconv"
	"strings"

	"nvstore.dev/vpd/internal/spec"
)

// A step is one part of a path: a member's name, or a place in a list.
type step struct {
	name  string
	index int // if name is empty; appendIndex for the place behind the last
	place bool
}

const appendIndex = -1

// A path is read along a spec, because names may have periods in them:
// "board.custom[0]", "values.a.b", "values[\"a.b\"]", "board.custom[+]"; or
// as a JSON Pointer (RFC 6901): "/board/custom/0".
type path struct {
	text string
	rest string
	ptr  bool
	err  error
}

func newPath(text string) *path {
	p := &path{text: text, rest: text}
	if strings.HasPrefix(text, "/") {
		p.ptr = true
	}
	return p
}

func (p *path) done() bool { return p.rest == "" || p.err != nil }

func (p *path) fail(format string, args ...any) {
	p.err = spec.Errorf(p.text, format, args...)
}

// next reads the step at n, which may be nil.
func (p *path) next(n *node) step {
	if p.ptr {
		return p.pointer(n)
	}
	if strings.HasPrefix(p.rest, "[") {
		return p.bracket()
	}
	if p.rest != p.text {
		if !strings.HasPrefix(p.rest, ".") {
			p.fail("want a period or a bracket in front of %q", p.rest)
			return step{}
		}
		p.rest = p.rest[1:]
	}
	name := ""
	if n != nil && n.object {
		// The longest of the names that are there.
		for _, m := range n.members {
			if rest, ok := strings.CutPrefix(p.rest, m.name); ok && len(m.name) > len(name) &&
				(rest == "" || rest[0] == '.' || rest[0] == '[') {
				name = m.name
			}
		}
	}
	if name == "" {
		name = p.rest
		if i := strings.IndexAny(name, ".["); i >= 0 {
			name = name[:i]
		}
	}
	if name == "" {
		p.fail("has an empty part; write [\"\"] for a member without a name")
	}
	p.rest = p.rest[len(name):]
	return step{name: name}
}

// bracket reads [0], [+] or ["name"].
func (p *path) bracket() step {
	if strings.HasPrefix(p.rest, `["`) {
		quoted, err := strconv.QuotedPrefix(p.rest[1:])
		after := strings.TrimPrefix(p.rest[1:], quoted)
		if err != nil || !strings.HasPrefix(after, "]") {
			p.fail("want a quoted name in brackets")
			return step{}
		}
		name, _ := strconv.Unquote(quoted)
		p.rest = after[1:]
		return step{name: name}
	}
	inside, rest, ok := strings.Cut(p.rest[1:], "]")
	if !ok {
		p.fail("a bracket isn't closed")
		return step{}
	}
	p.rest = rest
	return p.place(inside, "+")
}

func (p *path) place(text, end string) step {
	if text == end {
		return step{index: appendIndex, place: true}
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil || text != strconv.FormatUint(n, 10) {
		p.fail("%q is no place in a list: want a number from 0, or %s to append", text, end)
	}
	return step{index: int(n), place: true}
}

func (p *path) pointer(n *node) step {
	token, rest, more := strings.Cut(p.rest[1:], "/")
	if p.rest = ""; more {
		p.rest = "/" + rest
	}
	if n != nil && n.list {
		return p.place(token, "-")
	}
	return step{name: strings.NewReplacer("~1", "/", "~0", "~").Replace(token)}
}

// at finds the member that a step names: -1 if there is none.
func (n *node) at(s step) int {
	if s.place {
		if !n.list || s.index < 0 || s.index >= len(n.members) {
			return -1
		}
		return s.index
	}
	if n.list {
		return n.named(s.name)
	}
	if !n.object {
		return -1
	}
	return slices.IndexFunc(n.members, func(m member) bool { return m.name == s.name })
}

// named finds the element of a list that has a name, or a type that is one.
// Of several it is the last, since a new value of a UEFI variable is written
// behind the old ones, and one without a state, or that is only being
// replaced, since others are deleted or half written.
func (n *node) named(name string) int {
	want, err := json.Marshal(name)
	if err != nil {
		return -1
	}
	found, best := -1, 0
	for i, m := range n.members {
		is, rank := false, 3
		for _, sub := range m.node.members {
			switch sub.name {
			case "name", "type":
				is = is || bytes.Equal(sub.node.leaf, want)
			case "state":
				if rank = 1; string(sub.node.leaf) == `"0x3e"` {
					rank = 2
				}
			}
		}
		if is && rank >= best {
			found, best = i, rank
		}
	}
	return found
}

// join writes a step behind a path, so that it can be read again.
func join(path string, s step) string {
	switch {
	case s.place:
		return path + "[" + strconv.Itoa(s.index) + "]"
	case s.name == "" || strings.ContainsAny(s.name, ".[]\"\\/") || !isPlain(s.name):
		return path + "[" + strconv.Quote(s.name) + "]"
	}
	return spec.Join(path, s.name)
}

func isPlain(s string) bool { return spec.IsText([]byte(s)) && !strings.Contains(s, " ") }
