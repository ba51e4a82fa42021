// Package spec reads and writes the text form of images: JSON whose order
// counts, with comments on input, and values that are text or typed bytes.
package spec

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/tailscale/hujson"

	"nvstore.dev/vpd"
)

// Limits on a spec.
const (
	MaxSize  = 48 << 20 // bytes: the largest raw image in hex, and room
	maxDepth = 32
)

// Errorf makes a SpecError.
func Errorf(path, format string, args ...any) error {
	return &vpd.SpecError{Path: path, Msg: fmt.Sprintf(format, args...)}
}

// Join appends a member's name to a path.
func Join(path, name string) string {
	if path == "" {
		return name
	}
	return path + "." + name
}

// An Object is a JSON object that keeps its order, and refuses a name that
// comes twice: encoding/json would silently take the last.
type Object []Member

// A Member is a name and its value, in JSON.
type Member struct {
	Name  string
	Value json.RawMessage
}

// Parse reads a spec, which may have comments and trailing commas, and checks
// its "format". A member "$schema", which tells editors where the format's
// schema is, is dropped.
func Parse(text []byte, format string) (Object, error) {
	o, got, err := read(text)
	if err != nil {
		return nil, err
	}
	if got != format {
		return nil, Errorf("format", "%q, want %q", got, format)
	}
	if raw, ok := o.Get("$schema"); ok {
		if _, err := String("$schema", raw); err != nil {
			return nil, err
		}
		o = slices.DeleteFunc(o, func(m Member) bool { return m.Name == "$schema" })
	}
	return o, nil
}

// Format returns the "format" of a spec, without judging the rest.
func Format(text []byte) (string, error) {
	_, format, err := read(text)
	return format, err
}

func read(text []byte) (o Object, format string, err error) {
	if o, err = Read(text); err != nil {
		return nil, "", err
	}
	raw, ok := o.Get("format")
	if !ok {
		return nil, "", Errorf("format", "missing")
	}
	format, err = String("format", raw)
	if err != nil {
		return nil, "", err
	}
	return o, format, nil
}

// Read reads an object that may have comments and trailing commas, in bounded
// depth. Its values are standard JSON.
func Read(text []byte) (Object, error) {
	if len(text) > MaxSize {
		return nil, Errorf("", "%d bytes, want at most %d", len(text), MaxSize)
	}
	if depth(text) > maxDepth {
		return nil, Errorf("", "nested more than %d deep", maxDepth)
	}
	std, err := hujson.Standardize(slices.Clone(text))
	if err != nil {
		return nil, Errorf("", "%s", strings.TrimPrefix(err.Error(), "hujson: "))
	}
	return ParseObject("", std)
}

// depth is the deepest nesting of brackets outside strings and comments. The
// parser that comes next recurses, and a stack that overflows can't be
// recovered from. On text that isn't JSON the count may be wrong, but that
// parser stops where the text isn't JSON.
func depth(text []byte) int {
	deepest, now := 0, 0
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case c == '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
		case c == '/' && bytes.HasPrefix(text[i:], []byte("//")):
			i += lenUntil(text[i:], "\n")
		case c == '/' && bytes.HasPrefix(text[i:], []byte("/*")):
			i += 1 + lenUntil(text[i+2:], "*/") + 2
		case c == '{' || c == '[':
			now++
			deepest = max(deepest, now)
		case c == '}' || c == ']':
			now--
		}
	}
	return deepest
}

func lenUntil(b []byte, end string) int {
	if i := bytes.Index(b, []byte(end)); i >= 0 {
		return i
	}
	return len(b)
}

// ParseObject reads standard JSON that is an object.
func ParseObject(path string, raw []byte) (Object, error) {
	d := json.NewDecoder(bytes.NewReader(raw))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, Errorf(path, "want an object")
	}
	var o Object
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		name, ok := t.(string)
		if err != nil || !ok {
			return nil, Errorf(path, "want a member's name")
		}
		if seen[name] {
			return nil, Errorf(Join(path, name), "comes twice")
		}
		seen[name] = true
		var v json.RawMessage
		if err := d.Decode(&v); err != nil {
			return nil, Errorf(Join(path, name), "%v", err)
		}
		o = append(o, Member{name, v})
	}
	return o, nil
}

// Get returns the value of a member.
func (o Object) Get(name string) (json.RawMessage, bool) {
	for _, m := range o {
		if m.Name == name {
			return m.Value, true
		}
	}
	return nil, false
}

// Only refuses members of other names, which are most likely misspelt.
func (o Object) Only(path string, names ...string) error {
	for _, m := range o {
		if !slices.Contains(names, m.Name) {
			return Errorf(Join(path, m.Name), "unknown; want one of %s", strings.Join(names, ", "))
		}
	}
	return nil
}

// Add appends a member whose value encoding/json can write.
func (o *Object) Add(name string, v any) {
	b, err := marshal(v)
	if err != nil { // only types of our own come here
		panic("internal error: " + err.Error())
	}
	*o = append(*o, Member{name, b})
}

// marshal is json.Marshal without escapes for HTML, which a spec never is in.
func marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	err := e.Encode(v)
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), err
}

// MarshalJSON writes the members in their order.
func (o Object) MarshalJSON() ([]byte, error) {
	var b bytes.Buffer
	b.WriteByte('{')
	for i, m := range o {
		if i > 0 {
			b.WriteByte(',')
		}
		name, err := marshal(m.Name)
		if err != nil {
			return nil, err
		}
		b.Write(name)
		b.WriteByte(':')
		b.Write(m.Value)
	}
	b.WriteByte('}')
	return b.Bytes(), nil
}

// Text writes the object indented, with a final newline.
func (o Object) Text() ([]byte, error) {
	raw, err := marshal(o)
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
