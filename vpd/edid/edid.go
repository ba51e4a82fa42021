// Package edid packs and parses what displays say of themselves: VESA Enhanced
// Extended Display Identification Data Standard, release A, revisions 1 (EDID
// 1.3) and 2 (EDID 1.4).
//
// An image is blocks of 128 bytes: the base block, and as many extensions as
// its byte 126 says. The last byte of each makes the block's sum zero.
//
// The spec:
//
//	{
//	  "format": "edid",
//	  "manufacturer": "NVS", "product": "0x1234", "serial": 42,
//	  "week": 10, "year": 2024, "version": "1.4",
//	  "video_input": "0xa5", "width_cm": 53, "height_cm": 30, "gamma": "0x78", "features": "0x06",
//	  "chromaticity": {"type": "hex", "data": "..."},          // 10 bytes
//	  "established_timings": {"type": "hex", "data": "..."},   // 3 bytes
//	  "standard_timings": ["1280x1024@60", "1680x1050@60"],    // up to 8
//	  "descriptors": [                                         // up to 4
//	    {"timing": {"clock_khz": 148500, "h_active": 1920, "h_blank": 280, "h_sync_offset": 88, "h_sync_width": 44,
//	                "v_active": 1080, "v_blank": 45, "v_sync_offset": 4, "v_sync_width": 5,
//	                "width_mm": 527, "height_mm": 296, "h_border": 0, "v_border": 0, "flags": "0x1e"}},
//	    {"range_limits": {"v_min_hz": 50, "v_max_hz": 75, "h_min_khz": 30, "h_max_khz": 83, "clock_max_mhz": 150,
//	                      "more": {"type": "hex", "data": "000a202020202020"}}},
//	    {"name": "..."}, {"serial": "..."}, {"text": "..."}, {"dummy": true}
//	  ],
//	  "extensions": [{"tag": "0x02", "data": {"type": "hex", "data": "..."}}]
//	}
//
// Bytes that are missing at the end of an extension are zero, and descriptors
// that are missing are dummies.
//
// What is irregular is spelt out: a descriptor as {"type": "hex", "data": ...}
// of 18 bytes, a standard timing of 2, "manufacturer" of 2, "checksum" of the
// base block or of an extension, "extension_count" if it isn't the number of
// blocks that follow, and "trailing" for bytes behind the blocks that aren't
// fill.
package edid

import (
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "edid"

// MaxSize is the most bytes an image may have: twice what 255 extensions take.
const MaxSize = 64 << 10

const (
	magic     = "\x00\xff\xff\xff\xff\xff\xff\x00"
	blockSize = 128

	offManufacturer = 8
	offProduct      = 10
	offSerial       = 12
	offWeek         = 16
	offYear         = 17
	offVersion      = 18
	offVideo        = 20
	offChroma       = 25
	offEstablished  = 35
	offStandard     = 38
	offDescriptors  = 54
	offExtensions   = 126
	offChecksum     = 127

	descriptors    = 4
	descriptorSize = 18
	standards      = 8
	firstYear      = 1990
)

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants the header of eight bytes, and version 1.
func (format) Detect(image []byte) bool {
	_, err := scan(image)
	return err == nil && image[offVersion] == 1
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image []byte
	base  []byte
	exts  [][]byte
	rest  []byte
}

func (l *layout) blocks() [][]byte { return append([][]byte{l.base}, l.exts...) }

func blockName(i int) string {
	if i == 0 {
		return "base"
	}
	return fmt.Sprintf("extensions[%d]", i-1)
}

// scan cuts an image. It fails only if there is no base block.
func scan(image []byte) (*layout, error) {
	fail := func(format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Msg: fmt.Sprintf(format, args...)}
	}
	switch {
	case len(image) > MaxSize:
		return fail("%d bytes, want at most %d", len(image), MaxSize)
	case len(image) < blockSize:
		return fail("%d bytes, and the base block alone has %d", len(image), blockSize)
	case string(image[:len(magic)]) != magic:
		return fail("does not begin with 00 ff ff ff ff ff ff 00")
	}
	l := &layout{image: image, base: image[:blockSize], rest: image[blockSize:]}
	for range image[offExtensions] {
		if len(l.rest) < blockSize {
			break
		}
		l.exts = append(l.exts, l.rest[:blockSize])
		l.rest = l.rest[blockSize:]
	}
	return l, nil
}

// checksum is what belongs into a block's last byte.
func checksum(block []byte) (c byte) {
	for _, b := range block[:offChecksum] {
		c -= b
	}
	return c
}

// Fix sets the last byte of each block.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	var changes []vpd.Change
	for i, b := range l.blocks() {
		if got, want := b[offChecksum], checksum(b); got != want {
			off := i*blockSize + offChecksum
			fixed[off] = want
			changes = append(changes, vpd.Change{Area: blockName(i), Off: int64(off), Msg: "checksum",
				Old: spec.Byte(got), New: spec.Byte(want)})
		}
	}
	return fixed, changes, nil
}

// Fields cuts the image without a gap.
func (format) Fields(image []byte) ([]vpd.Field, error) {
	l, err := scan(image)
	if err != nil {
		return nil, err
	}
	var list []vpd.Field
	off := 0
	check := "checksum"
	add := func(n int, name, value string) {
		if value == "" {
			value = spec.Brief(image[off : off+n])
		}
		list = append(list, vpd.Field{Off: int64(off), Len: int64(n), Name: name, Value: value, CoveredBy: check})
		off += n
	}
	b := l.base
	add(len(magic), "header", "")
	add(2, "manufacturer", fmt.Sprint(manufacturer(b)))
	add(2, "product", fmt.Sprintf("0x%04x", product(b)))
	add(4, "serial", fmt.Sprint(serial(b)))
	add(1, "week", fmt.Sprint(b[offWeek]))
	add(1, "year", fmt.Sprint(firstYear+int(b[offYear])))
	add(2, "version", version(b))
	for _, name := range []string{"video_input", "width_cm", "height_cm", "gamma", "features"} {
		add(1, name, spec.Byte(b[off]))
	}
	add(offEstablished-offChroma, "chromaticity", "")
	add(offStandard-offEstablished, "established_timings", "")
	for i := range standards {
		add(2, fmt.Sprintf("standard_timings[%d]", i), standardBrief(b[off:off+2]))
	}
	for i := range descriptors {
		add(descriptorSize, fmt.Sprintf("descriptors[%d]", i), descriptorBrief(b[off:off+descriptorSize]))
	}
	add(1, "extension_count", fmt.Sprint(b[offExtensions]))
	add(1, check, "")
	for i, b := range l.exts {
		name := blockName(i + 1)
		check = name + ".checksum"
		add(1, name+".tag", spec.Byte(b[0])+" "+extensionNames[b[0]])
		add(blockSize-2, name+".data", "")
		add(1, check, "")
	}
	if check = ""; len(l.rest) > 0 {
		add(len(l.rest), "trailing", "")
	}
	return list, nil
}

// extensionNames: tags of extension blocks.
var extensionNames = map[byte]string{
	0x02: "CTA-861", 0x10: "VTB-EXT", 0x40: "DI-EXT", 0x50: "LS-EXT", 0x60: "DPVL-EXT", 0x70: "DisplayID", 0xf0: "block map", 0xff: "the manufacturer's",
}
