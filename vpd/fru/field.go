package fru

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"slices"
	"strings"
	"unicode/utf16"

	"nvstore.dev/vpd/internal/spec"
)

// Codes of a field's encoding, bits 7:6 of its type/length byte.
const (
	codeBinary = iota
	codeBCD
	code6Bit
	codeText
)

var codeNames = []string{"binary", "bcd", "6bit", "text"}

const (
	maxField  = 0x3f
	bcdDigits = "0123456789 -."
)

// english: the languages whose text is ASCII; that of others is UCS-2.
func english(language byte) bool { return language == 0 || language == 25 }

// encodeField reads a field's value and makes its bytes, with the type/length
// byte in front.
func encodeField(path string, raw json.RawMessage, ascii bool) ([]byte, error) {
	code, data, err := encodeValue(path, raw, ascii)
	if err != nil {
		return nil, err
	}
	if len(data) > maxField {
		return nil, spec.Errorf(path, "%d bytes, want at most %d", len(data), maxField)
	}
	if code == codeText && len(data) == 1 {
		return nil, spec.Errorf(path, "one byte of text can't be written: its type/length byte 0xc1 ends the area")
	}
	return append([]byte{byte(code)<<6 | byte(len(data))}, data...), nil
}

func encodeValue(path string, raw json.RawMessage, ascii bool) (code int, data []byte, err error) {
	if len(raw) > 0 && raw[0] == '"' {
		s, err := spec.String(path, raw)
		if err != nil {
			return 0, nil, err
		}
		if len(s) == 1 && ascii {
			data, err = encode6Bit(path, s)
			return code6Bit, data, err
		}
		data, err = encodeText(path, s, ascii)
		return codeText, data, err
	}
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return 0, nil, spec.Errorf(path, "want a string, or an object with type and data")
	}
	if err := o.Only(path, "type", "data", "encoding"); err != nil {
		return 0, nil, err
	}
	var part [2]string
	for i, name := range []string{"type", "data"} {
		raw, ok := o.Get(name)
		if !ok {
			return 0, nil, spec.Errorf(spec.Join(path, name), "missing")
		}
		if part[i], err = spec.String(spec.Join(path, name), raw); err != nil {
			return 0, nil, err
		}
	}
	rawCode, coded := o.Get("encoding")
	if coded && part[0] != "hex" {
		return 0, nil, spec.Errorf(path+".encoding", "is only for type hex")
	}
	switch part[0] {
	case "text":
		data, err = encodeText(path+".data", part[1], ascii)
		return codeText, data, err
	case "6bit":
		data, err = encode6Bit(path+".data", part[1])
		return code6Bit, data, err
	case "bcd":
		data, err = encodeBCD(path+".data", part[1])
		return codeBCD, data, err
	case "hex":
		return encodeHex(path, part[1], rawCode)
	}
	return 0, nil, spec.Errorf(path+".type", "unknown type %q; want text, 6bit, bcd or hex", part[0])
}

func encodeHex(path, digits string, rawCode json.RawMessage) (code int, data []byte, err error) {
	if rawCode != nil {
		name, err := spec.String(path+".encoding", rawCode)
		if err != nil {
			return 0, nil, err
		}
		if code = slices.Index(codeNames, name); code < 0 {
			return 0, nil, spec.Errorf(path+".encoding", "%q, want one of %s", name, strings.Join(codeNames, ", "))
		}
	}
	if data, err = spec.Hex(digits); err != nil {
		return 0, nil, spec.Errorf(path+".data", "want pairs of hexadecimal digits, with spaces, colons or dashes between them")
	}
	return code, data, nil
}

func encodeText(path, s string, ascii bool) ([]byte, error) {
	if ascii {
		if !spec.IsText([]byte(s)) {
			return nil, spec.Errorf(path, "holds characters that are not printable ASCII; use type hex with encoding text for other bytes")
		}
		return []byte(s), nil
	}
	var b []byte
	for _, r := range s {
		if r < 0x20 || r > 0xffff {
			return nil, spec.Errorf(path, "holds characters that UCS-2 text has not; use type hex with encoding text for other bytes")
		}
		b = binary.LittleEndian.AppendUint16(b, uint16(r))
	}
	return b, nil
}

// encode6Bit packs characters of six bits, the first in the lowest bits
// (section 13).
func encode6Bit(path, s string) ([]byte, error) {
	b := make([]byte, (len(s)*6+7)/8)
	for i, c := range []byte(s) {
		if c < 0x20 || c > 0x5f {
			return nil, spec.Errorf(path, "%q is not in 6-bit ASCII, which goes from the space to the underscore", string(s[i]))
		}
		v := uint(c-0x20) << (i * 6 % 8)
		b[i*6/8] |= byte(v)
		if v > 0xff {
			b[i*6/8+1] |= byte(v >> 8)
		}
	}
	return b, nil
}

// decode6Bit reads as many characters as there is room for.
func decode6Bit(b []byte) string {
	s := make([]byte, len(b)*8/6)
	for i := range s {
		v := uint(b[i*6/8])
		if i*6/8+1 < len(b) {
			v |= uint(b[i*6/8+1]) << 8
		}
		s[i] = byte(v>>(i*6%8))&0x3f + 0x20
	}
	return string(s)
}

// encodeBCD packs two characters in a byte, the first in the upper bits
// (section 13). The document does not say which comes first; this is how
// ipmitool reads it.
func encodeBCD(path, s string) ([]byte, error) {
	if len(s)%2 != 0 {
		return nil, spec.Errorf(path, "has %d characters; two share a byte, so add a space", len(s))
	}
	b := make([]byte, len(s)/2)
	for i, c := range []byte(s) {
		n := strings.IndexByte(bcdDigits, c)
		if n < 0 {
			return nil, spec.Errorf(path, "%q is not in BCD plus, which has digits, space, dash and period", string(s[i]))
		}
		b[i/2] = b[i/2]<<4 | byte(n)
	}
	return b, nil
}

// decodeBCD fails on the digits 13 to 15, which are reserved.
func decodeBCD(b []byte) (string, bool) {
	var s strings.Builder
	for _, c := range b {
		if int(c>>4) >= len(bcdDigits) || int(c&0xf) >= len(bcdDigits) {
			return "", false
		}
		s.WriteByte(bcdDigits[c>>4])
		s.WriteByte(bcdDigits[c&0xf])
	}
	return s.String(), true
}

// decodeUCS2 fails on what encodeText would not write.
func decodeUCS2(b []byte) (string, bool) {
	if len(b)%2 != 0 {
		return "", false
	}
	var s strings.Builder
	for i := 0; i < len(b); i += 2 {
		r := rune(binary.LittleEndian.Uint16(b[i:]))
		if r < 0x20 || r == 0xfffd || utf16.IsSurrogate(r) {
			return "", false
		}
		s.WriteRune(r)
	}
	return s.String(), true
}

// encodedHex is a field's text form when its characters don't say all.
type encodedHex struct {
	Type     string `json:"type"`
	Data     string `json:"data"`
	Encoding string `json:"encoding,omitempty"`
}

// value is a field's text form. Whatever form it takes gives the same bytes
// again.
func (f *field) value(ascii bool) any {
	switch f.code {
	case codeBCD:
		if s, ok := decodeBCD(f.data); ok {
			return spec.Typed{Type: "bcd", Data: s}
		}
	case code6Bit:
		for _, s := range []string{strings.TrimSuffix(decode6Bit(f.data), " "), decode6Bit(f.data)} {
			b, err := encode6Bit("", s)
			if err != nil || string(b) != string(f.data) {
				continue
			}
			if len(s) == 1 && ascii {
				return s
			}
			return spec.Typed{Type: "6bit", Data: s}
		}
	case codeText:
		if s, ok := f.text(ascii); ok {
			return s
		}
	}
	h := encodedHex{Type: "hex", Data: hex.EncodeToString(f.data)}
	if f.code != codeBinary {
		h.Encoding = codeNames[f.code]
	}
	return h
}

// text is that of a text field, unless it has unprintable characters.
func (f *field) text(ascii bool) (string, bool) {
	if !ascii {
		return decodeUCS2(f.data)
	}
	return string(f.data), spec.IsText(f.data)
}

// brief shows a field to people.
func (f *field) brief(ascii bool) string {
	switch v := f.value(ascii).(type) {
	case string:
		return v
	case spec.Typed:
		return v.Data
	}
	return spec.Brief(f.data)
}
