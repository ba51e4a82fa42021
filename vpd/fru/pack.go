package fru

import (
	"encoding/json"
	"fmt"
	"time"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

const (
	dateLayout = "2006-01-02T15:04Z"
	maxMinutes = 1<<24 - 1
	maxArea    = 0xff * unit
)

// epoch is where a board's date counts minutes from. The document doesn't
// name a time zone; UTC is what tools write.
var epoch = time.Date(1996, 1, 1, 0, 0, 0, 0, time.UTC)

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "header", "internal", "chassis", "board", "product", "multirecord",
		"trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	out := make([]byte, headerSize)
	out[0] = 1
	for _, m := range o {
		for k := range kinds {
			if kinds[k].name == m.Name && m.Name != "" {
				if out, err = place(out, k, m.Value); err != nil {
					return nil, nil, err
				}
			}
		}
	}
	if out, err = form.Pad(o, out, MaxSize); err != nil {
		return nil, nil, err
	}
	if err := header(out[:headerSize], o); err != nil {
		return nil, nil, err
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be a FRU image: %v", err)
	}
	return out, form.Warnings(l.problems()), nil
}

// header closes the header, of which areas have set the offsets.
func header(h []byte, o spec.Object) error {
	h[offChecksum] = -sum(h)
	raw, ok := o.Get("header")
	if !ok {
		return nil
	}
	o, err := spec.ParseObject("header", raw)
	if err != nil {
		return err
	}
	if err := o.Only("header", "internal", "chassis", "board", "product", "multirecord", "pad", "checksum"); err != nil {
		return err
	}
	set := func(name string, off int) error {
		n, err := form.Uint(o, "header", name, 0xff, uint64(h[off]))
		if err == nil && off < offPad && h[off] != 0 && byte(n) != h[off] {
			return spec.Errorf("header."+name, "is where the area lies")
		}
		h[off] = byte(n)
		return err
	}
	for k := internal; k <= multirecord; k++ {
		if err := set(kinds[k].name, k); err != nil {
			return err
		}
	}
	if err := set("pad", offPad); err != nil {
		return err
	}
	h[offChecksum] = 0
	h[offChecksum] = -sum(h)
	return set("checksum", offChecksum)
}

// place appends an area, at a multiple of 8, and notes its offset.
func place(out []byte, k int, raw json.RawMessage) ([]byte, error) {
	path := kinds[k].name
	var o spec.Object
	var err error
	object := len(raw) > 0 && raw[0] == '{'
	if object {
		if o, err = spec.ParseObject(path, raw); err != nil {
			return nil, err
		}
	}
	before, err := form.Bytes(o, path, "before", MaxSize)
	if err != nil {
		return nil, err
	}
	out = append(out, before...)
	out = append(out, make([]byte, (unit-len(out)%unit)%unit)...)
	if len(out) > maxArea {
		return nil, spec.Errorf(path, "would begin at byte %d, and the header reaches byte %d", len(out), maxArea)
	}
	out[k] = byte(len(out) / unit)
	var data []byte
	switch {
	case k == internal:
		data, err = buildInternal(path, raw, o)
	case k == multirecord:
		data, err = buildRecords(path, raw, object, o)
	case !object:
		err = spec.Errorf(path, "want an object")
	default:
		data, err = buildInfo(path, k, o)
	}
	return append(out, data...), err
}

// buildInternal: the version, and bytes that only the maker knows.
func buildInternal(path string, raw json.RawMessage, o spec.Object) ([]byte, error) {
	v, err := spec.ParseValue(path, raw, MaxSize, "before", "version")
	if err != nil {
		return nil, err
	}
	version, err := form.Uint(o, path, "version", 0xff, 1)
	if err != nil {
		return nil, err
	}
	return append([]byte{byte(version)}, v.Bytes...), nil
}

func rawArea(path string, o spec.Object) ([]byte, error) {
	if err := o.Only(path, "before", "raw"); err != nil {
		return nil, err
	}
	b, err := form.Bytes(o, path, "raw", maxArea)
	if err != nil {
		return nil, err
	}
	if len(b) < unit || b[0]&0x0f != 1 || int(b[1])*unit != len(b) {
		return nil, spec.Errorf(path+".raw", "want version 1 in the first byte, and in the second the length of all, in units of 8 bytes")
	}
	return b, nil
}

// buildInfo makes a chassis, board or product area (sections 10 to 12).
func buildInfo(path string, k int, o spec.Object) ([]byte, error) {
	if _, ok := o.Get("raw"); ok {
		return rawArea(path, o)
	}
	names := append([]string{"before"}, kinds[k].fields...)
	names = append(names, "custom", "area_size", "padding", "checksum")
	out := make([]byte, kinds[k].header)
	out[0] = 1
	code := "language"
	if k == chassis {
		code = "type"
	}
	if err := o.Only(path, append(names, code, "date")...); err != nil {
		return nil, err
	}
	n, err := form.Uint(o, path, code, 0xff, 0)
	if err != nil {
		return nil, err
	}
	out[2] = byte(n)
	if raw, ok := o.Get("date"); ok {
		if k != board {
			return nil, spec.Errorf(path+".date", "only a board has one")
		}
		if err := putDate(path+".date", raw, out[3:]); err != nil {
			return nil, err
		}
	}
	out, err = buildFields(path, k, o, out, k == chassis || english(byte(n)))
	if err != nil {
		return nil, err
	}
	return closeArea(path, o, append(out, endMark))
}

func putDate(path string, raw json.RawMessage, out []byte) error {
	s, err := spec.String(path, raw)
	if err != nil {
		return err
	}
	t, err := time.Parse(dateLayout, s)
	n := int64(t.Sub(epoch) / time.Minute)
	if err != nil || n < 1 || n > maxMinutes {
		return spec.Errorf(path, "want a date from %s to %s", epoch.Add(time.Minute).Format(dateLayout), epoch.Add(maxMinutes*time.Minute).Format(dateLayout))
	}
	out[0], out[1], out[2] = byte(n), byte(n>>8), byte(n>>16)
	return nil
}

func buildFields(path string, k int, o spec.Object, out []byte, ascii bool) ([]byte, error) {
	left := ""
	add := func(path string, raw json.RawMessage) error {
		b, err := encodeField(path, raw, ascii)
		if err == nil && left != "" {
			err = spec.Errorf(path, "can't follow %s, which is null", left)
		}
		out = append(out, b...)
		return err
	}
	for _, name := range kinds[k].fields {
		raw, ok := o.Get(name)
		if ok && string(raw) == "null" {
			left = name
			continue
		}
		if !ok && left != "" {
			continue
		}
		if !ok {
			raw = json.RawMessage(`""`)
		}
		if err := add(spec.Join(path, name), raw); err != nil {
			return nil, err
		}
	}
	custom, err := form.List(o, path, "custom", maxArea)
	if err != nil {
		return nil, err
	}
	for i, raw := range custom {
		if err := add(fmt.Sprintf("%s.custom[%d]", path, i), raw); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// closeArea pads an area and sets its length and checksum.
func closeArea(path string, o spec.Object, out []byte) ([]byte, error) {
	used := len(out) + 1
	least := uint64(used+unit-1) / unit * unit
	size, err := form.Uint(o, path, "area_size", maxArea, least)
	if err != nil {
		return nil, err
	}
	if size < least || size > maxArea || size%unit != 0 {
		return nil, spec.Errorf(path, "takes %d bytes, want an area of a multiple of 8 up to %d; area_size is %d", used, maxArea, size)
	}
	padding, err := form.Bytes(o, path, "padding", int(size)-used)
	if err != nil {
		return nil, err
	}
	out = append(out, padding...)
	out = append(out, make([]byte, int(size)-len(out))...)
	out[1] = byte(size / unit)
	check, err := form.Uint(o, path, "checksum", 0xff, uint64(-sum(out)))
	if err != nil {
		return nil, err
	}
	out[size-1] = byte(check)
	return out, nil
}
