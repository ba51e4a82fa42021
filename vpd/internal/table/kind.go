package table

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strings"

	"nvstore.dev/vpd/internal/spec"
)

// A Kind is how a field's bytes are written. Whatever the kind, a spec may
// give bytes as {"type", "data"} instead.
type Kind struct {
	// Show is the plain form of bytes, if they have one. It is what
	// encoding/json can write, and no object.
	Show func(b []byte) (v any, ok bool)

	// Read is its inverse. N is the length that is wanted, or the most of
	// a field that moves.
	Read func(path string, raw json.RawMessage, n int) ([]byte, error)

	// Check says what is wrong with bytes; "" or nil for nothing.
	Check func(b []byte) string

	// Schema is the JSON Schema of the plain form of a field of n bytes;
	// nil if it has none.
	Schema func(n int) string
}

func (k *Kind) check(b []byte) string {
	if k.Check == nil {
		return ""
	}
	return k.Check(b)
}

// Blank tells whether bytes are all zero, or all ones, as where nothing was
// ever written.
func Blank(b []byte) bool {
	return filled(b, 0x00) || filled(b, 0xff)
}

// Bytes have no plain form.
func Bytes() Kind { return Kind{} }

// Text is printable ASCII, filled up with a byte.
func Text(pad byte) Kind {
	shown := func(b []byte) (string, bool) {
		n := len(b)
		for n > 0 && b[n-1] == pad {
			n--
		}
		return string(b[:n]), spec.IsText(b[:n])
	}
	return Kind{
		Show: func(b []byte) (any, bool) { return shown(b) },
		Read: func(path string, raw json.RawMessage, n int) ([]byte, error) {
			s, err := spec.String(path, raw)
			switch {
			case err != nil:
				return nil, err
			case !spec.IsText([]byte(s)):
				return nil, spec.Errorf(path, "holds characters that are not printable ASCII; use type hex for other bytes")
			case len(s) > n:
				return nil, spec.Errorf(path, "%d bytes, want at most %d", len(s), n)
			}
			return append([]byte(s), bytes.Repeat([]byte{pad}, n-len(s))...), nil
		},
		Check: func(b []byte) string {
			if _, ok := shown(b); ok || Blank(b) {
				return ""
			}
			return fmt.Sprintf("is not printable ASCII with %s behind it", spec.Byte(pad))
		},
		Schema: func(n int) string { return fmt.Sprintf(`{"type": "string", "pattern": "^[ -~]{0,%d}$"}`, n) },
	}
}

// Dec is a little-endian number, written in decimal.
func Dec() Kind { return numeric(false, func(v uint64, n int) any { return v }) }

// DecBE is a big-endian number, written in decimal.
func DecBE() Kind { return numeric(true, func(v uint64, n int) any { return v }) }

// Hex is a little-endian number, written in hex.
func Hex() Kind { return numeric(false, hexNumber) }

// HexBE is a big-endian number, written in hex.
func HexBE() Kind { return numeric(true, hexNumber) }

func hexNumber(v uint64, n int) any { return fmt.Sprintf("0x%0*x", 2*n, v) }

func numeric(bigEndian bool, show func(v uint64, n int) any) Kind {
	return Kind{
		Show: func(b []byte) (any, bool) { return show(number(b, bigEndian), len(b)), true },
		Read: func(path string, raw json.RawMessage, n int) ([]byte, error) {
			v, err := spec.Uint(path, raw, 1<<(8*n-1)-1+1<<(8*n-1))
			if err != nil {
				return nil, err
			}
			b := make([]byte, n)
			putNumber(b, v, bigEndian)
			return b, nil
		},
		Schema: func(n int) string { return fmt.Sprintf(`{"$ref": "#/$defs/u%d"}`, 8*n) },
	}
}

// number reads up to 8 bytes.
func number(b []byte, bigEndian bool) (v uint64) {
	for i := range b {
		if bigEndian {
			v = v<<8 | uint64(b[i])
		} else {
			v = v<<8 | uint64(b[len(b)-1-i])
		}
	}
	return v
}

func putNumber(b []byte, v uint64, bigEndian bool) {
	for i := range b {
		if bigEndian {
			b[len(b)-1-i] = byte(v)
		} else {
			b[i] = byte(v)
		}
		v >>= 8
	}
}

// MAC is an Ethernet address, in the order of its bytes on the wire.
func MAC() Kind {
	return Kind{
		Show: func(b []byte) (any, bool) { return colons(b), len(b) == 6 },
		Read: func(path string, raw json.RawMessage, n int) ([]byte, error) {
			s, err := spec.String(path, raw)
			if err != nil {
				return nil, err
			}
			b, err := spec.Hex(s)
			if err != nil || len(b) != 6 {
				return nil, spec.Errorf(path, "want a MAC address such as 52:54:00:12:34:56")
			}
			return b, nil
		},
		Check: func(b []byte) string {
			if b[0]&1 != 0 && !Blank(b) {
				return "is a multicast address: " + colons(b)
			}
			return ""
		},
		Schema: func(int) string { return `{"$ref": "#/$defs/mac"}` },
	}
}

func colons(b []byte) string {
	var s []string
	for _, c := range b {
		s = append(s, hex.EncodeToString([]byte{c}))
	}
	return strings.Join(s, ":")
}
