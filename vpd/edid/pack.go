package edid

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "manufacturer", "product", "serial", "week", "year", "version",
		"video_input", "width_cm", "height_cm", "gamma", "features", "chromaticity", "established_timings",
		"standard_timings", "descriptors", "extension_count", "checksum", "extensions", "trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	b := append([]byte(magic), make([]byte, blockSize-len(magic))...)
	for _, set := range []func(spec.Object, []byte) error{putIdentity, putBytes, putStandard, putDescriptors} {
		if err := set(o, b); err != nil {
			return nil, nil, err
		}
	}
	exts, err := buildExtensions(o)
	if err != nil {
		return nil, nil, err
	}
	n, err := form.Uint(o, "", "extension_count", 0xff, uint64(len(exts)/blockSize))
	if err != nil {
		return nil, nil, err
	}
	b[offExtensions] = byte(n)
	if err := putChecksum("", o, b); err != nil {
		return nil, nil, err
	}
	out, err := form.Pad(o, append(b, exts...), MaxSize)
	if err != nil {
		return nil, nil, err
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be EDID: %v", err)
	}
	return out, form.Warnings(l.problems()), nil
}

func putChecksum(path string, o spec.Object, block []byte) error {
	n, err := form.Uint(o, path, "checksum", 0xff, uint64(checksum(block)))
	block[offChecksum] = byte(n)
	return err
}

// putIdentity sets the vendor, the product and the version.
func putIdentity(o spec.Object, b []byte) error {
	raw, ok := o.Get("manufacturer")
	if !ok {
		return spec.Errorf("manufacturer", "missing")
	}
	id, err := buildManufacturer(raw)
	if err != nil {
		return err
	}
	copy(b[offManufacturer:], id)
	product, err := form.Uint(o, "", "product", 0xffff, 0)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint16(b[offProduct:], uint16(product))
	serial, err := form.Uint(o, "", "serial", 1<<32-1, 0)
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(b[offSerial:], uint32(serial))
	week, err := form.Uint(o, "", "week", 0xff, 0)
	if err != nil {
		return err
	}
	year, err := form.Uint(o, "", "year", firstYear+0xff, firstYear)
	if err != nil {
		return err
	}
	if year < firstYear {
		return spec.Errorf("year", "want %d to %d", firstYear, firstYear+0xff)
	}
	b[offWeek], b[offYear] = byte(week), byte(year-firstYear)
	return putVersion(o, b)
}

// buildManufacturer packs three letters of five bits, big-endian (EDID 1.4,
// section 3.4.1).
func buildManufacturer(raw json.RawMessage) ([]byte, error) {
	if len(raw) > 0 && raw[0] == '{' {
		return sized("manufacturer", raw, 2)
	}
	s, err := spec.String("manufacturer", raw)
	if err != nil {
		return nil, err
	}
	var n uint16
	for _, c := range []byte(s) {
		if c < 'A' || c > 'Z' || len(s) != 3 {
			return nil, spec.Errorf("manufacturer", "want three capital letters")
		}
		n = n<<5 | uint16(c-'A'+1)
	}
	if len(s) == 0 {
		return nil, spec.Errorf("manufacturer", "want three capital letters")
	}
	return binary.BigEndian.AppendUint16(nil, n), nil
}

func putVersion(o spec.Object, b []byte) error {
	s := "1.4"
	if raw, ok := o.Get("version"); ok {
		var err error
		if s, err = spec.String("version", raw); err != nil {
			return err
		}
	}
	major, minor, _ := strings.Cut(s, ".")
	x, err1 := strconv.ParseUint(major, 10, 8)
	y, err2 := strconv.ParseUint(minor, 10, 8)
	if err1 != nil || err2 != nil {
		return spec.Errorf("version", "want a version such as 1.4")
	}
	b[offVersion], b[offVersion+1] = byte(x), byte(y)
	return nil
}

// putBytes sets what has no form but numbers and bytes.
func putBytes(o spec.Object, b []byte) error {
	for i, name := range []string{"video_input", "width_cm", "height_cm", "gamma", "features"} {
		n, err := form.Uint(o, "", name, 0xff, 0)
		if err != nil {
			return err
		}
		b[offVideo+i] = byte(n)
	}
	for name, part := range map[string][]byte{"chromaticity": b[offChroma:offEstablished], "established_timings": b[offEstablished:offStandard]} {
		raw, ok := o.Get(name)
		if !ok {
			continue
		}
		v, err := sized(name, raw, len(part))
		if err != nil {
			return err
		}
		copy(part, v)
	}
	return nil
}

// aspects by the code in bits 7:6 of a standard timing, since EDID 1.3.
var aspects = [][2]int{{16, 10}, {4, 3}, {5, 4}, {16, 9}}

// putStandard sets the standard timings; those that are missing are marked
// unused.
func putStandard(o spec.Object, b []byte) error {
	part := b[offStandard:offDescriptors]
	copy(part, bytes.Repeat([]byte{1}, len(part)))
	list, err := form.List(o, "", "standard_timings", standards)
	if err != nil {
		return err
	}
	for i, raw := range list {
		v, err := buildStandard(fmt.Sprintf("standard_timings[%d]", i), raw)
		if err != nil {
			return err
		}
		copy(part[2*i:], v)
	}
	return nil
}

func buildStandard(path string, raw json.RawMessage) ([]byte, error) {
	if len(raw) > 0 && raw[0] == '{' {
		return sized(path, raw, 2)
	}
	s, err := spec.String(path, raw)
	if err != nil {
		return nil, err
	}
	var w, h, hz int
	if n, err := fmt.Sscanf(s, "%dx%d@%d", &w, &h, &hz); err == nil && n == 3 && fmt.Sprintf("%dx%d@%d", w, h, hz) == s &&
		w >= 256 && w <= 2288 && w%8 == 0 && hz >= 60 && hz <= 123 {
		for code, a := range aspects {
			if w*a[1]/a[0] == h {
				return []byte{byte(w/8 - 31), byte(code<<6 | hz - 60)}, nil
			}
		}
	}
	return nil, spec.Errorf(path, "want a timing such as 1280x1024@60: width 256 to 2288 in steps of 8, aspect 16:10, 4:3, 5:4 or 16:9, 60 to 123 Hz")
}

func putDescriptors(o spec.Object, b []byte) error {
	list, err := form.List(o, "", "descriptors", descriptors)
	if err != nil {
		return err
	}
	for i := range descriptors {
		d := dummy()
		if i < len(list) {
			if d, err = buildDescriptor(fmt.Sprintf("descriptors[%d]", i), list[i]); err != nil {
				return err
			}
		}
		copy(b[offDescriptors+i*descriptorSize:], d)
	}
	return nil
}

func buildExtensions(o spec.Object) ([]byte, error) {
	list, err := form.List(o, "", "extensions", 0xff)
	if err != nil {
		return nil, err
	}
	var out []byte
	for i, raw := range list {
		path := blockName(i + 1)
		o, err := spec.ParseObject(path, raw)
		if err != nil {
			return nil, err
		}
		if err := o.Only(path, "tag", "data", "checksum"); err != nil {
			return nil, err
		}
		tag, ok := o.Get("tag")
		if !ok {
			return nil, spec.Errorf(path+".tag", "missing")
		}
		n, err := spec.Uint(path+".tag", tag, 0xff)
		if err != nil {
			return nil, err
		}
		data, err := form.Bytes(o, path, "data", blockSize-2)
		if err != nil {
			return nil, err
		}
		block := make([]byte, blockSize)
		block[0] = byte(n)
		copy(block[1:], data)
		if err := putChecksum(path, o, block); err != nil {
			return nil, err
		}
		out = append(out, block...)
	}
	return out, nil
}
