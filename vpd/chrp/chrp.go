// Package chrp packs and parses the NVRAM of CHRP and PAPR machines, which
// sPAPR machines of QEMU, PowerNV and Power Macs have: a chain of partitions
// (Common Hardware Reference Platform, section 8.3; LoPAPR, chapter 8).
//
//	+-----------+----------+-----------+------+------------------------+
//	| signature | checksum | length 16 | name | data                   |
//	| 1         | 1        | big-endian| 12   | length x 16 - 16 bytes |
//	+-----------+----------+-----------+------+------------------------+
//
// The length counts units of 16 bytes, with the header. The checksum is the sum
// of the header's other bytes, where a carry is added again. A system partition,
// of signature 0x70, holds the variables of Open Firmware: strings name=value,
// each with a zero behind it, and an empty one at the end.
//
// The spec:
//
//	{
//	  "format": "chrp",
//	  "partitions": [
//	    {"signature": "0x70", "name": "common", "size": 4096, "values": {"load-base": "4000", "auto-boot?": "true"}},
//	    {"signature": "0x51", "name": "ibm,CPU0log", "size": 8192, "data": {"type": "hex", "data": "0040"}},
//	    {"signature": "0x7f", "name": "free space"}
//	  ],
//	  "size": 65536
//	}
//
// A partition's size is in bytes, with its header of 16. One without a size
// takes what it needs; the last takes what is left of the image's "size". What
// data doesn't fill is zero. Partitions other than the system's have "data".
//
// What is irregular is spelt out: "checksum" that is wrong, a "name" in hex,
// "rest" for bytes behind a system partition's variables that aren't zero,
// "data" instead of "values" if that isn't a list of variables, and "trailing",
// "size" and "fill" for bytes behind the last partition.
package chrp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

// Name is the format's name in a spec.
const Name = "chrp"

// MaxSize is the most bytes an image may have, as in QEMU's spapr-nvram.
const MaxSize = 1 << 20

const (
	headerSize = 16
	unit       = 16
	nameSize   = 12
	maxUnits   = 0xffff

	sigSystem = 0x70
)

// signatures are those that somebody documents: LoPAPR, and Linux's
// arch/powerpc/include/uapi/asm/nvram.h.
var signatures = map[byte]string{
	0x02: "support processor", 0x50: "Open Firmware", 0x51: "firmware", 0x52: "hardware", 0x5a: "flip-flop header",
	0x5f: "Apple system", sigSystem: "system", 0x71: "configuration", 0x72: "error log", 0x7e: "vendor", 0x7f: "free space",
	0xa0: "operating system", 0xa1: "panic",
}

type format struct{}

// Format returns the format.
func Format() vpd.Format { return format{} }

func (format) Name() string { return Name }

// Detect wants partitions with right checksums up to the end.
func (format) Detect(image []byte) bool {
	l, err := scan(image)
	if err != nil || len(l.rest) > 0 {
		return false
	}
	for _, p := range l.parts {
		if p.sum() != p.checksum() || signatures[p.signature()] == "" {
			return false
		}
	}
	return true
}

// A layout is an image cut into its parts; the slices are the image's own.
type layout struct {
	image []byte
	parts []partition
	rest  []byte // that belongs to no partition
}

type partition struct {
	off int
	raw []byte
}

func (p *partition) signature() byte { return p.raw[0] }
func (p *partition) checksum() byte  { return p.raw[1] }
func (p *partition) name() []byte    { return p.raw[4:headerSize] }
func (p *partition) data() []byte    { return p.raw[headerSize:] }
func (p *partition) sum() byte       { return checksum(p.raw) }

// checksum is what belongs into the second byte of a header.
func checksum(header []byte) byte {
	sum := uint(header[0])
	for _, c := range header[2:headerSize] {
		sum += uint(c)
		sum = (sum + sum>>8) & 0xff
	}
	return byte(sum)
}

// text is the name, if it is one, with zeros behind it.
func (p *partition) text() (string, bool) {
	name := bytes.TrimRight(p.name(), "\x00")
	return string(name), spec.IsText(name)
}

// scan cuts an image. It fails if there is no partition at its beginning.
func scan(image []byte) (*layout, error) {
	fail := func(format string, args ...any) (*layout, error) {
		return nil, &vpd.ImageError{Format: Name, Msg: fmt.Sprintf(format, args...)}
	}
	if len(image) > MaxSize {
		return fail("%d bytes, want at most %d", len(image), MaxSize)
	}
	l := &layout{image: image, rest: image}
	for len(l.rest) >= headerSize {
		n := unit * int(binary.BigEndian.Uint16(l.rest[2:]))
		if n == 0 || n > len(l.rest) {
			break
		}
		l.parts = append(l.parts, partition{len(image) - len(l.rest), l.rest[:n]})
		l.rest = l.rest[n:]
	}
	if len(l.parts) == 0 {
		return fail("begins with no partition: its length is 0, or more than the image has")
	}
	if p := &l.parts[0]; signatures[p.signature()] == "" && p.sum() != p.checksum() {
		return fail("begins with no partition: its signature %#02x is unknown, and its checksum wrong", p.signature())
	}
	return l, nil
}

// path is that of a partition in the spec, and what it is called.
func (l *layout) path(i int) string {
	if name, ok := l.parts[i].text(); ok && name != "" {
		return fmt.Sprintf("partitions[%d] %s", i, name)
	}
	return fmt.Sprintf("partitions[%d]", i)
}

// Verify checks headers and variables.
func (format) Verify(image []byte) []vpd.Problem {
	l, err := scan(image)
	if err != nil {
		return []vpd.Problem{{Area: "image", Off: 0, Msg: err.Error()}}
	}
	return l.problems()
}

func (l *layout) problems() []vpd.Problem {
	var list []vpd.Problem
	for i := range l.parts {
		p := &l.parts[i]
		add := func(off int, format string, args ...any) {
			list = append(list, vpd.Problem{Area: l.path(i), Off: int64(p.off + off), Msg: fmt.Sprintf(format, args...)})
		}
		if got, want := p.checksum(), p.sum(); got != want {
			list = append(list, vpd.Problem{Area: l.path(i), Off: int64(p.off + 1), Msg: "wrong checksum",
				Got: spec.Byte(got), Want: spec.Byte(want), Fixable: true})
		}
		if _, ok := p.text(); !ok {
			add(4, "its name is not printable ASCII with zeros behind it")
		}
		if p.signature() != sigSystem {
			continue
		}
		v := readVariables(p.data())
		switch {
		case v.fault != "":
			add(headerSize+v.end, "%s", v.fault)
		case len(trimZeros(p.data()[v.end:])) > 0:
			add(headerSize+v.end, "bytes behind the variables are not zero")
		}
	}
	if len(l.rest) > 0 {
		list = append(list, vpd.Problem{Area: "trailing", Off: int64(len(l.image) - len(l.rest)),
			Msg: fmt.Sprintf("%d bytes belong to no partition", len(l.rest))})
	}
	return list
}

// Fix sets the checksums.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	var changes []vpd.Change
	for i := range l.parts {
		p := &l.parts[i]
		if got, want := p.checksum(), p.sum(); got != want {
			fixed[p.off+1] = want
			changes = append(changes, vpd.Change{Area: l.path(i), Off: int64(p.off + 1), Msg: "checksum",
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
	off := int64(0)
	add := func(n int, name, value, covered string) {
		if n > 0 {
			list = append(list, vpd.Field{Off: off, Len: int64(n), Name: name, Value: value, CoveredBy: covered})
			off += int64(n)
		}
	}
	for i := range l.parts {
		p, path := &l.parts[i], l.path(i)
		sum := path + ".checksum"
		what := spec.Byte(p.signature())
		if name := signatures[p.signature()]; name != "" {
			what += " " + name
		}
		add(1, path+".signature", what, sum)
		add(1, sum, spec.Byte(p.checksum()), sum)
		add(2, path+".length", fmt.Sprintf("%d bytes", len(p.raw)), sum)
		add(nameSize, path+".name", spec.Brief(bytes.TrimRight(p.name(), "\x00")), sum)
		if v := readVariables(p.data()); p.signature() == sigSystem && v.fault == "" {
			for _, e := range v.list {
				add(len(e.name)+len(e.value)+2, path+".values."+e.name, spec.Brief(e.value), "")
			}
			add(1, path+".end", "", "")
			add(len(p.data())-v.end, path+".unused", spec.Brief(trimZeros(p.data()[v.end:])), "")
			continue
		}
		add(len(p.data()), path+".data", spec.Brief(trimZeros(p.data())), "")
	}
	add(len(l.rest), "trailing", spec.Brief(l.rest), "")
	return list, nil
}
