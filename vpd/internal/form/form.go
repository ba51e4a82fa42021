// Package form is what the formats' specs share beyond package spec: optional
// members, lists, and what lies behind the data of an image.
package form

import (
	"bytes"
	"encoding/hex"
	"encoding/json"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Uint reads an optional number from 0 to max.
func Uint(o spec.Object, path, name string, max, missing uint64) (uint64, error) {
	raw, ok := o.Get(name)
	if !ok {
		return missing, nil
	}
	return spec.Uint(spec.Join(path, name), raw, max)
}

// Bytes reads an optional value of at most limit bytes.
func Bytes(o spec.Object, path, name string, limit int) ([]byte, error) {
	raw, ok := o.Get(name)
	if !ok {
		return nil, nil
	}
	v, err := spec.ParseValue(spec.Join(path, name), raw, limit)
	return v.Bytes, err
}

// Text reads a value, of which text must be printable ASCII; hex, base64 and
// numbers say that the bytes are meant.
func Text(path string, raw json.RawMessage, limit int) ([]byte, error) {
	v, err := spec.ParseValue(path, raw, limit)
	if err != nil {
		return nil, err
	}
	if v.Type == "text" && !spec.IsText(v.Bytes) {
		return nil, spec.Errorf(path, "holds characters that are not printable ASCII; use type hex for other bytes")
	}
	return v.Bytes, nil
}

// List reads an optional list of at most limit elements.
func List(o spec.Object, path, name string, limit int) ([]json.RawMessage, error) {
	raw, ok := o.Get(name)
	if !ok {
		return nil, nil
	}
	path = spec.Join(path, name)
	var list []json.RawMessage
	if err := json.Unmarshal(raw, &list); err != nil || string(raw) == "null" {
		return nil, spec.Errorf(path, "want a list")
	}
	if len(list) > limit {
		return nil, spec.Errorf(path, "%d elements, want at most %d", len(list), limit)
	}
	return list, nil
}

// Hex is how bytes are written that are no text.
func Hex(b []byte) spec.Typed { return spec.Typed{Type: "hex", Data: hex.EncodeToString(b)} }

// AddRest writes what lies behind the data, for Pad: as "trailing", and
// "size" and "fill" of the image.
func AddRest(o *spec.Object, rest []byte, size int) {
	if len(rest) == 0 {
		return
	}
	n := len(rest)
	fill := rest[n-1]
	for n > 0 && rest[n-1] == fill {
		n--
	}
	if n > 0 {
		o.Add("trailing", Hex(rest[:n]))
	}
	o.Add("size", size)
	o.Add("fill", spec.Byte(fill))
}

// Pad appends what a spec's "trailing", "size" and "fill" say. The image has
// at most limit bytes.
func Pad(o spec.Object, out []byte, limit int) ([]byte, error) {
	trailing, err := Bytes(o, "", "trailing", limit)
	if err != nil {
		return nil, err
	}
	out = append(out, trailing...)
	if len(out) > limit {
		return nil, spec.Errorf("", "the image would have %d bytes, want at most %d", len(out), limit)
	}
	fill, err := Uint(o, "", "fill", 0xff, 0xff)
	if err != nil {
		return nil, err
	}
	raw, ok := o.Get("size")
	if !ok {
		if _, filled := o.Get("fill"); filled {
			return nil, spec.Errorf("fill", "needs a size")
		}
		return out, nil
	}
	size, err := spec.Uint("size", raw, uint64(limit))
	if err != nil {
		return nil, err
	}
	if int(size) < len(out) {
		return nil, spec.Errorf("size", "%d, and the data takes %d bytes", size, len(out))
	}
	return append(out, bytes.Repeat([]byte{byte(fill)}, int(size)-len(out))...), nil
}

// Warnings turns problems into warnings.
func Warnings(problems []vpd.Problem) []vpd.Warning {
	var list []vpd.Warning
	for _, p := range problems {
		msg := p.Msg
		if p.Got != "" || p.Want != "" {
			msg += ": got " + p.Got + ", want " + p.Want
		}
		list = append(list, vpd.Warning{Off: p.Off, Field: p.Area, Msg: msg})
	}
	return list
}
