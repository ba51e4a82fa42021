package spec

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A Value is bytes and how a spec wrote them.
type Value struct {
	Type  string // "text" for a plain JSON string, else the member "type"
	Bytes []byte
	Attrs Object // all members of the typed form; nil for a plain string
}

// valueNames are the members of a typed value.
var valueNames = []string{"type", "data", "count", "size", "fill"}

// String reads a JSON string. encoding/json puts U+FFFD where a string isn't
// valid Unicode; bytes that nobody wrote must not get into an image.
func String(path string, raw json.RawMessage) (string, error) {
	var s string
	if !isString(raw) || json.Unmarshal(raw, &s) != nil {
		return "", Errorf(path, "want a string")
	}
	if strings.ContainsRune(s, utf8.RuneError) {
		return "", Errorf(path, "is not valid Unicode; use type hex for other bytes")
	}
	return s, nil
}

func isString(raw json.RawMessage) bool { return len(raw) > 0 && raw[0] == '"' }

// Bool reads true or false.
func Bool(path string, raw json.RawMessage) (bool, error) {
	switch string(raw) {
	case "true":
		return true, nil
	case "false":
		return false, nil
	}
	return false, Errorf(path, "want true or false")
}

// Uint reads a number from 0 to max: a JSON integer, or a string in the
// notation of Go ("0x3f").
func Uint(path string, raw json.RawMessage, max uint64) (uint64, error) {
	text := string(raw)
	base := 10
	if isString(raw) {
		s, err := String(path, raw)
		if err != nil {
			return 0, err
		}
		text, base = s, 0
	}
	n, err := strconv.ParseUint(text, base, 64)
	if err != nil || n > max {
		return 0, Errorf(path, "want an integer from 0 to %d, or a string such as \"0x3f\"", max)
	}
	return n, nil
}

// ParseValue reads bytes: a string is text, an object is typed:
//
//	{"type": "text" | "hex" | "base64", "data": "..."}
//	{"type": "u8" | "u16le" | "u16be" | "u32le" | ... | "u64be", "data": 1 | "0x1" | [1, 2]}
//
// and may have "count", to repeat data, and "size" with "fill" (0 if
// missing), to fill up to a length. The result has at most limit bytes. Extra
// names members that the caller takes care of.
func ParseValue(path string, raw json.RawMessage, limit int, extra ...string) (Value, error) {
	if isString(raw) {
		s, err := String(path, raw)
		if err != nil {
			return Value{}, err
		}
		if len(s) > limit {
			return Value{}, Errorf(path, "%d bytes, want at most %d", len(s), limit)
		}
		return Value{Type: "text", Bytes: []byte(s)}, nil
	}
	o, err := ParseObject(path, raw)
	if err != nil {
		return Value{}, Errorf(path, "want a string, or an object with type and data")
	}
	if err := o.Only(path, append(append([]string{}, valueNames...), extra...)...); err != nil {
		return Value{}, err
	}
	v := Value{Attrs: o}
	t, ok := o.Get("type")
	if !ok {
		return Value{}, Errorf(Join(path, "type"), "missing")
	}
	if v.Type, err = String(Join(path, "type"), t); err != nil {
		return Value{}, err
	}
	data, ok := o.Get("data")
	if !ok {
		return Value{}, Errorf(Join(path, "data"), "missing")
	}
	if v.Bytes, err = decode(Join(path, "data"), v.Type, data); err != nil {
		return Value{}, err
	}
	if v.Bytes, err = shape(path, o, v.Bytes, limit); err != nil {
		return Value{}, err
	}
	return v, nil
}

// shape applies count, size and fill, and the limit.
func shape(path string, o Object, b []byte, limit int) ([]byte, error) {
	if raw, ok := o.Get("count"); ok {
		n, err := Uint(Join(path, "count"), raw, uint64(limit))
		if err != nil {
			return nil, err
		}
		if n > 0 && len(b) > limit/int(n) {
			return nil, Errorf(path, "%d times %d bytes, want at most %d", n, len(b), limit)
		}
		b = bytes.Repeat(b, int(n))
	}
	if len(b) > limit {
		return nil, Errorf(path, "%d bytes, want at most %d", len(b), limit)
	}
	rawSize, sized := o.Get("size")
	rawFill, filled := o.Get("fill")
	if !sized {
		if filled {
			return nil, Errorf(Join(path, "fill"), "needs a size")
		}
		return b, nil
	}
	size, err := Uint(Join(path, "size"), rawSize, uint64(limit))
	if err != nil {
		return nil, err
	}
	var fill uint64
	if filled {
		if fill, err = Uint(Join(path, "fill"), rawFill, 0xff); err != nil {
			return nil, err
		}
	}
	if len(b) > int(size) {
		return nil, Errorf(path, "%d bytes don't fit in size %d", len(b), size)
	}
	return append(b, bytes.Repeat([]byte{byte(fill)}, int(size)-len(b))...), nil
}

func decode(path, typ string, raw json.RawMessage) ([]byte, error) {
	switch typ {
	case "text", "hex", "base64":
		s, err := String(path, raw)
		if err != nil {
			return nil, err
		}
		return decodeText(path, typ, s)
	case "u8", "u16le", "u16be", "u32le", "u32be", "u64le", "u64be":
		return decodeUints(path, typ, raw)
	}
	return nil, Errorf(path, "unknown type %q; want text, hex, base64, u8, u16le, u16be, u32le, u32be, u64le or u64be", typ)
}

func decodeText(path, typ, s string) ([]byte, error) {
	switch typ {
	case "hex":
		b, err := Hex(s)
		if err != nil {
			return nil, Errorf(path, "want pairs of hexadecimal digits, with spaces, colons or dashes between them")
		}
		return b, nil
	case "base64":
		b, err := base64.StdEncoding.Strict().DecodeString(s)
		if err != nil {
			return nil, Errorf(path, "want standard base64 with padding")
		}
		return b, nil
	}
	return []byte(s), nil
}

// Hex reads pairs of digits; between pairs, spaces, colons and dashes may
// stand, as in a MAC address.
func Hex(s string) ([]byte, error) {
	var digits strings.Builder
	digits.Grow(len(s))
	for i := 0; i < len(s); i++ {
		c := s[i]
		if c == ' ' || c == ':' || c == '-' {
			if digits.Len()%2 != 0 {
				return nil, hex.ErrLength
			}
			continue
		}
		digits.WriteByte(c)
	}
	return hex.DecodeString(digits.String())
}

func decodeUints(path, typ string, raw json.RawMessage) ([]byte, error) {
	list := []json.RawMessage{raw}
	if len(raw) > 0 && raw[0] == '[' {
		if err := json.Unmarshal(raw, &list); err != nil {
			return nil, Errorf(path, "want a list of numbers")
		}
	}
	bits, _ := strconv.Atoi(strings.TrimRight(typ[1:], "lbe"))
	out := make([]byte, 0, len(list)*bits/8)
	for i, r := range list {
		n, err := Uint(path+"["+strconv.Itoa(i)+"]", r, 1<<(bits-1)-1+1<<(bits-1))
		if err != nil {
			return nil, err
		}
		var b [8]byte
		if strings.HasSuffix(typ, "be") {
			binary.BigEndian.PutUint64(b[:], n)
			out = append(out, b[8-bits/8:]...)
		} else {
			binary.LittleEndian.PutUint64(b[:], n)
			out = append(out, b[:bits/8]...)
		}
	}
	return out, nil
}

// Typed is the JSON form of a value that isn't plain text.
type Typed struct {
	Type string `json:"type"`
	Data string `json:"data"`
}

// Show is how bytes are written in a spec: as text if they are printable
// ASCII, else in hex.
func Show(b []byte) any {
	if IsText(b) {
		return string(b)
	}
	return Typed{"hex", hex.EncodeToString(b)}
}

// IsText tells whether every byte is printable ASCII, space included.
func IsText(b []byte) bool {
	for _, c := range b {
		if c < 0x20 || c > 0x7e {
			return false
		}
	}
	return true
}

// Byte is how a byte is written.
func Byte(b byte) string { return "0x" + hex.EncodeToString([]byte{b}) }

// Brief is how bytes are shown to people: text, or hex with 0x in front, cut
// after 64 bytes.
func Brief(b []byte) string {
	cut := ""
	if len(b) > 64 {
		b, cut = b[:64], "..."
	}
	if IsText(b) {
		return string(b) + cut
	}
	return "0x" + hex.EncodeToString(b) + cut
}
