package edid

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

func product(b []byte) uint16 { return binary.LittleEndian.Uint16(b[offProduct:]) }
func serial(b []byte) uint32  { return binary.LittleEndian.Uint32(b[offSerial:]) }
func version(b []byte) string { return fmt.Sprintf("%d.%d", b[offVersion], b[offVersion+1]) }

// manufacturer is three letters, or bytes if they are none.
func manufacturer(b []byte) any {
	n := binary.BigEndian.Uint16(b[offManufacturer:])
	s := []byte{byte(n >> 10 & 31), byte(n >> 5 & 31), byte(n & 31)}
	for i, c := range s {
		if c < 1 || c > 26 || n > 0x7fff {
			return form.Hex(b[offManufacturer:offProduct])
		}
		s[i] = 'A' + c - 1
	}
	return string(s)
}

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	b := l.base
	var o spec.Object
	o.Add("format", Name)
	o.Add("manufacturer", manufacturer(b))
	o.Add("product", fmt.Sprintf("0x%04x", product(b)))
	o.Add("serial", serial(b))
	o.Add("week", b[offWeek])
	o.Add("year", firstYear+int(b[offYear]))
	o.Add("version", version(b))
	o.Add("video_input", spec.Byte(b[offVideo]))
	o.Add("width_cm", b[offVideo+1])
	o.Add("height_cm", b[offVideo+2])
	o.Add("gamma", spec.Byte(b[offVideo+3]))
	o.Add("features", spec.Byte(b[offVideo+4]))
	o.Add("chromaticity", form.Hex(b[offChroma:offEstablished]))
	o.Add("established_timings", form.Hex(b[offEstablished:offStandard]))
	o.Add("standard_timings", standardTimings(b[offStandard:offDescriptors]))
	list := []spec.Object{}
	for i := range descriptors {
		list = append(list, descriptor(b[offDescriptors+i*descriptorSize:][:descriptorSize]))
	}
	o.Add("descriptors", list)
	if int(b[offExtensions]) != len(l.exts) {
		o.Add("extension_count", b[offExtensions])
	}
	addChecksum(&o, b)
	if len(l.exts) > 0 {
		o.Add("extensions", l.extensions())
	}
	form.AddRest(&o, l.rest, len(image))
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

func addChecksum(o *spec.Object, block []byte) {
	if c := block[offChecksum]; c != checksum(block) {
		o.Add("checksum", spec.Byte(c))
	}
}

// standardTimings leaves out what is unused at the end.
func standardTimings(part []byte) []any {
	list := []any{}
	for part = bytes.TrimRight(part, "\x01"); len(part) > 0; part = part[min(2, len(part)):] {
		pair := []byte{part[0], 1}
		if len(part) > 1 {
			pair[1] = part[1]
		}
		list = append(list, standard(pair))
	}
	return list
}

func standard(pair []byte) any {
	if s, ok := standardText(pair); ok {
		return s
	}
	return form.Hex(pair)
}

func standardText(pair []byte) (string, bool) {
	w, a := (int(pair[0])+31)*8, aspects[pair[1]>>6]
	s := fmt.Sprintf("%dx%d@%d", w, w*a[1]/a[0], int(pair[1]&63)+60)
	b, err := buildStandard("", []byte(`"`+s+`"`))
	return s, err == nil && bytes.Equal(b, pair) && !bytes.Equal(pair, []byte{1, 1})
}

func standardBrief(pair []byte) string {
	if s, ok := standardText(pair); ok {
		return s
	}
	if bytes.Equal(pair, []byte{1, 1}) {
		return "unused"
	}
	return spec.Brief(pair)
}

func (l *layout) extensions() []spec.Object {
	var list []spec.Object
	for _, b := range l.exts {
		var o spec.Object
		o.Add("tag", spec.Byte(b[0]))
		o.Add("data", form.Hex(bytes.TrimRight(b[1:offChecksum], "\x00")))
		addChecksum(&o, b)
		list = append(list, o)
	}
	return list
}

// Verify checks structure and checksums.
func (format) Verify(image []byte) []vpd.Problem {
	l, err := scan(image)
	if err != nil {
		return []vpd.Problem{{Area: "image", Off: 0, Msg: err.Error()}}
	}
	return l.problems()
}

func (l *layout) problems() []vpd.Problem {
	var list []vpd.Problem
	add := func(area string, off int, format string, args ...any) {
		list = append(list, vpd.Problem{Area: area, Off: int64(off), Msg: fmt.Sprintf(format, args...)})
	}
	for i, b := range l.blocks() {
		if got, want := b[offChecksum], checksum(b); got != want {
			list = append(list, vpd.Problem{Area: blockName(i), Off: int64(i*blockSize + offChecksum), Msg: "wrong checksum",
				Got: spec.Byte(got), Want: spec.Byte(want), Fixable: true})
		}
	}
	b := l.base
	if _, ok := manufacturer(b).(string); !ok {
		add("manufacturer", offManufacturer, "is not three letters")
	}
	if w := b[offWeek]; w > 54 && w != 0xff {
		add("week", offWeek, "is %d, want 0 to 54, or 255 for a model year", w)
	}
	if b[offVersion] != 1 || b[offVersion+1] > 4 {
		add("version", offVersion, "is %s, want 1.0 to 1.4", version(b))
	} else if b[offVersion+1] >= 3 && !isTiming(b[offDescriptors:]) {
		add("descriptors[0]", offDescriptors, "is no detailed timing, and the first is that of the preferred mode")
	}
	for i := range descriptors {
		off := offDescriptors + i*descriptorSize
		if msg := descriptorFault(b[off : off+descriptorSize]); msg != "" {
			add(fmt.Sprintf("descriptors[%d]", i), off, "%s", msg)
		}
	}
	if n := int(b[offExtensions]); n != len(l.exts) {
		add("extension_count", offExtensions, "is %d, and %d whole blocks follow", n, len(l.exts))
	}
	return list
}

// descriptorFault is what is wrong with a descriptor.
func descriptorFault(d []byte) string {
	if isTiming(d) {
		return ""
	}
	_, isHex := descriptor(d).Get("type")
	switch tag := d[3]; {
	case d[2] != 0:
		return "is a display descriptor, whose third byte is 0"
	case tag == tagName || tag == tagText || tag == tagSerial:
		if isHex {
			return "is not text, a newline and spaces"
		}
	case tag == tagRange:
		if d[5] > d[6] && d[4]&3 == 0 || d[7] > d[8] && d[4]&12 == 0 {
			return "has a lower limit above the upper"
		}
	case tag >= 0x11 && tag <= 0xf6:
		return fmt.Sprintf("has the reserved tag %#02x", tag)
	}
	return ""
}
