package tlvinfo

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Types that the code knows by name; typeNames has all.
const (
	typeMAC       = 0x24
	typeDate      = 0x25
	typeVersion   = 0x26
	typeMACCount  = 0x2a
	typeCountry   = 0x2c
	typeExtension = 0xfd
	typeCRC       = 0xfe

	maxValue   = 0xff
	dateLayout = "01/02/2006 15:04:05"
)

var typeNames = map[byte]string{
	0x21: "product_name", 0x22: "part_number", 0x23: "serial_number", typeMAC: "mac_base",
	typeDate: "manufacture_date", typeVersion: "device_version", 0x27: "label_revision",
	0x28: "platform_name", 0x29: "onie_version", typeMACCount: "mac_count", 0x2b: "manufacturer",
	typeCountry: "country_code", 0x2d: "vendor", 0x2e: "diag_version", 0x2f: "service_tag",
	typeExtension: "vendor_extension", typeCRC: "crc",
}

func typeName(typ byte) string {
	if name, ok := typeNames[typ]; ok {
		return name
	}
	return spec.Byte(typ)
}

// typeOf reads a member's name without its number.
func typeOf(name string) (byte, bool) {
	for typ, n := range typeNames {
		if n == name {
			return typ, true
		}
	}
	b, err := hex.DecodeString(strings.TrimPrefix(name, "0x"))
	if err != nil || len(b) != 1 || typeName(b[0]) != name {
		return 0, false
	}
	return b[0], true
}

// known tells the types of the specification from others.
func (t *tlv) known() bool { return typeNames[t.typ] != "" }

// plain is a value's text form if it is what its type wants.
func (t *tlv) plain() (v any, ok bool) {
	switch n := len(t.value); {
	case t.typ == typeMAC:
		return mac(t.value), n == 6
	case t.typ == typeVersion && n == 1:
		return t.value[0], true
	case t.typ == typeMACCount && n == 2:
		return binary.BigEndian.Uint16(t.value), true
	case t.typ == typeVersion || t.typ == typeMACCount || t.typ == typeExtension || t.typ == typeCRC:
		return nil, false
	case t.typ == typeDate:
		return string(t.value), isDate(string(t.value))
	case t.typ == typeCountry:
		return string(t.value), isCountry(string(t.value))
	}
	return string(t.value), spec.IsText(t.value)
}

func mac(b []byte) string {
	s := hex.EncodeToString(b)
	for i := len(s) - 2; i > 0; i -= 2 {
		s = s[:i] + ":" + s[i:]
	}
	return s
}

func isDate(s string) bool {
	_, err := time.Parse(dateLayout, s)
	return err == nil && len(s) == len(dateLayout)
}

// isCountry: ISO 3166-1 alpha-2.
func isCountry(s string) bool {
	return len(s) == 2 && s[0] >= 'A' && s[0] <= 'Z' && s[1] >= 'A' && s[1] <= 'Z'
}

// extension is a vendor's, with its IANA enterprise number in front.
type extension struct {
	Enterprise uint32 `json:"enterprise"`
	Type       string `json:"type"`
	Data       string `json:"data"`
}

// form is a value's text form. Whatever it is gives the same bytes again.
func (t *tlv) form() any {
	if v, ok := t.plain(); ok {
		return v
	}
	if t.typ == typeExtension && len(t.value) >= 4 {
		return extension{binary.BigEndian.Uint32(t.value), "hex", hex.EncodeToString(t.value[4:])}
	}
	return form.Hex(t.value)
}

func (t *tlv) brief() string {
	if v, ok := t.plain(); ok {
		return fmt.Sprint(v)
	}
	return spec.Brief(t.value)
}

// encode reads a value of a type. Types say how a string or a number is meant;
// an object has bytes.
func encode(path string, typ byte, raw json.RawMessage) ([]byte, error) {
	if len(raw) > 0 && raw[0] == '{' {
		return encodeBytes(path, typ, raw)
	}
	switch typ {
	case typeVersion:
		n, err := spec.Uint(path, raw, 0xff)
		return []byte{byte(n)}, err
	case typeMACCount:
		n, err := spec.Uint(path, raw, 0xffff)
		return binary.BigEndian.AppendUint16(nil, uint16(n)), err
	case typeExtension:
		return nil, spec.Errorf(path, "want an object with enterprise, type and data")
	case typeCRC:
		return nil, spec.Errorf(path, `is computed; want {"type": "crc32"}, or leave it out`)
	}
	s, err := spec.String(path, raw)
	switch {
	case err != nil:
		return nil, err
	case typ == typeMAC:
		b, err := spec.Hex(s)
		if err != nil || len(b) != 6 {
			return nil, spec.Errorf(path, "want a MAC address such as 52:54:00:12:34:56")
		}
		return b, nil
	case typ == typeDate && !isDate(s):
		return nil, spec.Errorf(path, "want a date such as 03/05/2024 14:30:00, month first")
	case typ == typeCountry && !isCountry(s):
		return nil, spec.Errorf(path, "want two capital letters, as in ISO 3166-1")
	}
	return form.Text(path, raw, maxValue)
}

func encodeBytes(path string, typ byte, raw json.RawMessage) ([]byte, error) {
	if typ != typeExtension {
		return form.Text(path, raw, maxValue)
	}
	v, err := spec.ParseValue(path, raw, maxValue, "enterprise")
	if err != nil {
		return nil, err
	}
	n, ok := v.Attrs.Get("enterprise")
	if !ok { // the number may be missing, in an image
		return v.Bytes, nil
	}
	id, err := spec.Uint(path+".enterprise", n, 1<<32-1)
	if err != nil {
		return nil, err
	}
	return append(binary.BigEndian.AppendUint32(nil, uint32(id)), v.Bytes...), nil
}
