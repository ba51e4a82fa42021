package blobdir

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// CheckName returns an ErrInvalid unless name is 1 to 255 bytes of UTF-8 in
// parts separated by "/", none of them empty, "." or "..", and without
// control characters (FORMAT.md, section 9.1).
func CheckName(name string) error {
	why := ""
	switch {
	case name == "":
		why = "it is empty"
	case len(name) > maxName:
		why = fmt.Sprintf("it has %d bytes, and %d are the most", len(name), maxName)
	case !validText(name):
		why = "it isn't UTF-8 without control characters"
	default:
		for part := range strings.SplitSeq(name, "/") {
			switch part {
			case "":
				why = `it has an empty part: "/" comes first, last or twice`
			case ".", "..":
				why = fmt.Sprintf("it has a part %q", part)
			}
		}
	}
	if why == "" {
		return nil
	}
	return fmt.Errorf("%w: blob name %q: %s", ErrInvalid, name, why)
}

func validText(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// An Attribute is a free key and value of a blob.
type Attribute struct{ Key, Value string }

// checkMeta holds type, writer and attributes to the limits, and sorts the
// attributes by key.
func checkMeta(m *Meta) error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...)
	}
	if len(m.Type) > maxType || !validText(m.Type) {
		return bad("type %q: at most %d bytes of UTF-8 without control characters", m.Type, maxType)
	}
	if len(m.Writer) > maxWriter || !validText(m.Writer) {
		return bad("writer %q: at most %d bytes of UTF-8 without control characters", m.Writer, maxWriter)
	}
	if len(m.Attributes) > maxAttrs {
		return bad("%d attributes: %d are the most", len(m.Attributes), maxAttrs)
	}
	m.Attributes = slices.Clone(m.Attributes)
	slices.SortFunc(m.Attributes, func(a, b Attribute) int { return strings.Compare(a.Key, b.Key) })
	total := 0
	for i, a := range m.Attributes {
		if a.Key == "" || len(a.Key) > maxAttrKey || !validText(a.Key) || !validText(a.Value) {
			return bad("attribute %q: a key has 1 to %d bytes, and neither key nor value control characters", a.Key, maxAttrKey)
		}
		if i > 0 && m.Attributes[i-1].Key == a.Key {
			return bad("attribute %q is there twice", a.Key)
		}
		total += len(a.Key) + len(a.Value)
	}
	if total > maxAttrBytes {
		return bad("the attributes have %d bytes, and %d are the most", total, maxAttrBytes)
	}
	if m.ChunkSize != 0 && (m.ChunkSize < minChunkSize || m.ChunkSize > maxChunkSize || m.ChunkSize&(m.ChunkSize-1) != 0) {
		return bad("chunk size %d: a power of two from %d to %d", m.ChunkSize, minChunkSize, maxChunkSize)
	}
	return nil
}
