package edid

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Tags of display descriptors (EDID 1.4, section 3.10.3).
const (
	tagDummy  = 0x10
	tagName   = 0xfc
	tagRange  = 0xfd
	tagText   = 0xfe
	tagSerial = 0xff

	maxText = 13
)

var textTags = map[string]byte{"name": tagName, "text": tagText, "serial": tagSerial}

// defaultRange is what stands behind the limits if nothing does: no timing
// formula, and padding.
var defaultRange = []byte{0x00, 0x0a, 0x20, 0x20, 0x20, 0x20, 0x20, 0x20}

// isTiming tells a detailed timing from a display descriptor, whose pixel
// clock is 0.
func isTiming(d []byte) bool { return d[0] != 0 || d[1] != 0 }

// buildDescriptor makes the 18 bytes of a descriptor.
func buildDescriptor(path string, raw json.RawMessage) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	if _, ok := o.Get("type"); ok {
		return sized(path, raw, descriptorSize)
	}
	if len(o) != 1 {
		return nil, spec.Errorf(path, "want one member: timing, range_limits, name, serial, text or dummy; or type and data")
	}
	name, value := o[0].Name, o[0].Value
	path = spec.Join(path, name)
	switch name {
	case "timing":
		return buildTiming(path, value)
	case "range_limits":
		return buildRange(path, value)
	case "name", "serial", "text":
		return buildText(path, textTags[name], value)
	case "dummy":
		if ok, err := spec.Bool(path, value); err != nil || !ok {
			return nil, spec.Errorf(path, "want true")
		}
		return dummy(), nil
	}
	return nil, spec.Errorf(path, "unknown; want timing, range_limits, name, serial, text or dummy")
}

func dummy() []byte {
	d := make([]byte, descriptorSize)
	d[3] = tagDummy
	return d
}

// sized reads exactly n bytes.
func sized(path string, raw json.RawMessage, n int) ([]byte, error) {
	v, err := spec.ParseValue(path, raw, n)
	if err == nil && len(v.Bytes) != n {
		err = spec.Errorf(path, "%d bytes, want %d", len(v.Bytes), n)
	}
	return v.Bytes, err
}

// buildText: the text, a newline if there is room, and spaces.
func buildText(path string, tag byte, raw json.RawMessage) ([]byte, error) {
	s, err := form.Text(path, raw, maxText)
	if err != nil {
		return nil, err
	}
	d := append([]byte{0, 0, 0, tag, 0}, s...)
	if len(s) < maxText {
		d = append(d, '\n')
	}
	return append(d, bytes.Repeat([]byte{' '}, descriptorSize-len(d))...), nil
}

func buildRange(path string, raw json.RawMessage) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	names := []string{"v_min_hz", "v_max_hz", "h_min_khz", "h_max_khz", "clock_max_mhz"}
	if err := o.Only(path, append(names, "more")...); err != nil {
		return nil, err
	}
	d := []byte{0, 0, 0, tagRange, 0}
	for _, name := range names {
		raw, ok := o.Get(name)
		if !ok {
			return nil, spec.Errorf(spec.Join(path, name), "missing")
		}
		n, err := spec.Uint(spec.Join(path, name), raw, 2550)
		if err != nil {
			return nil, err
		}
		if name == "clock_max_mhz" {
			if n%10 != 0 {
				return nil, spec.Errorf(spec.Join(path, name), "want a multiple of 10")
			}
			n /= 10
		}
		if n == 0 || n > 0xff {
			return nil, spec.Errorf(spec.Join(path, name), "want 1 to 255, or 10 to 2550 for the clock")
		}
		d = append(d, byte(n))
	}
	more := defaultRange
	if raw, ok := o.Get("more"); ok {
		if more, err = sized(path+".more", raw, len(defaultRange)); err != nil {
			return nil, err
		}
	}
	return append(d, more...), nil
}

// timingFields are a detailed timing's members, and their greatest values.
var timingFields = []struct {
	name string
	max  uint64
}{
	{"clock_khz", 655350}, {"h_active", 4095}, {"h_blank", 4095}, {"h_sync_offset", 1023}, {"h_sync_width", 1023},
	{"v_active", 4095}, {"v_blank", 4095}, {"v_sync_offset", 63}, {"v_sync_width", 63},
	{"width_mm", 4095}, {"height_mm", 4095}, {"h_border", 255}, {"v_border", 255}, {"flags", 255},
}

// buildTiming makes a detailed timing (EDID 1.4, section 3.10.2).
func buildTiming(path string, raw json.RawMessage) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	var names []string
	var v [14]int
	for i, f := range timingFields {
		names = append(names, f.name)
		if _, ok := o.Get(f.name); !ok && i < 9 {
			return nil, spec.Errorf(spec.Join(path, f.name), "missing")
		}
		n, err := form.Uint(o, path, f.name, f.max, 0)
		if err != nil {
			return nil, err
		}
		v[i] = int(n)
	}
	if err := o.Only(path, names...); err != nil {
		return nil, err
	}
	if v[0] == 0 || v[0]%10 != 0 {
		return nil, spec.Errorf(path+".clock_khz", "want a multiple of 10 that isn't 0")
	}
	d := binary.LittleEndian.AppendUint16(nil, uint16(v[0]/10))
	pair := func(a, b int) { d = append(d, byte(a), byte(b), byte(a>>8<<4|b>>8)) }
	pair(v[1], v[2])
	pair(v[5], v[6])
	d = append(d, byte(v[3]), byte(v[4]), byte(v[7]&15<<4|v[8]&15),
		byte(v[3]>>8<<6|v[4]>>8<<4|v[7]>>4<<2|v[8]>>4))
	pair(v[9], v[10])
	return append(d, byte(v[11]), byte(v[12]), byte(v[13])), nil
}

func timing(d []byte) spec.Object {
	hi := func(lo, hi byte, shift int) int { return int(lo) | int(hi>>shift&15)<<8 }
	v := []int{
		int(binary.LittleEndian.Uint16(d)) * 10,
		hi(d[2], d[4], 4), hi(d[3], d[4], 0), int(d[8]) | int(d[11]>>6)<<8, int(d[9]) | int(d[11]>>4&3)<<8,
		hi(d[5], d[7], 4), hi(d[6], d[7], 0), int(d[10]>>4) | int(d[11]>>2&3)<<4, int(d[10]&15) | int(d[11]&3)<<4,
		hi(d[12], d[14], 4), hi(d[13], d[14], 0), int(d[15]), int(d[16]),
	}
	var o spec.Object
	for i, n := range v {
		o.Add(timingFields[i].name, n)
	}
	o.Add("flags", spec.Byte(d[17]))
	return o
}

func textOf(d []byte) string {
	s, _, _ := bytes.Cut(d[5:], []byte{'\n'})
	return string(s)
}

// descriptor is a descriptor's text form, and the same bytes come of it.
func descriptor(d []byte) spec.Object {
	var o spec.Object
	switch {
	case isTiming(d):
		o.Add("timing", timing(d))
	case d[3] == tagName:
		o.Add("name", textOf(d))
	case d[3] == tagSerial:
		o.Add("serial", textOf(d))
	case d[3] == tagText:
		o.Add("text", textOf(d))
	case d[3] == tagDummy:
		o.Add("dummy", true)
	case d[3] == tagRange:
		var r spec.Object
		for i, name := range []string{"v_min_hz", "v_max_hz", "h_min_khz", "h_max_khz"} {
			r.Add(name, d[5+i])
		}
		r.Add("clock_max_mhz", int(d[9])*10)
		r.Add("more", form.Hex(d[10:]))
		o.Add("range_limits", r)
	}
	if raw, err := o.MarshalJSON(); err == nil {
		if b, err := buildDescriptor("", raw); err == nil && bytes.Equal(b, d) {
			return o
		}
	}
	o = nil
	h := form.Hex(d)
	o.Add("type", h.Type)
	o.Add("data", h.Data)
	return o
}

// descriptorBrief shows a descriptor to people.
func descriptorBrief(d []byte) string {
	switch {
	case isTiming(d):
		return fmt.Sprintf("%dx%d, %d kHz", int(d[2])|int(d[4]>>4)<<8, int(d[5])|int(d[7]>>4)<<8, int(binary.LittleEndian.Uint16(d))*10)
	case d[3] == tagDummy:
		return "dummy"
	case d[3] == tagRange:
		return fmt.Sprintf("%d to %d Hz, %d to %d kHz, up to %d MHz", d[5], d[6], d[7], d[8], int(d[9])*10)
	case d[3] >= tagName && spec.IsText([]byte(textOf(d))):
		return textOf(d)
	}
	return spec.Brief(d)
}
