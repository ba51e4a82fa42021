package smbios

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

const (
	anchor32 = "_SM_"
	anchor64 = "_SM3_"
	dmi      = "_DMI_"

	size32      = 31
	size64      = 24
	tableOffset = 0x20 // in dmidecode's dumps
)

// An entry is an entry point: section 5.2.
type entry struct {
	raw []byte // of its bytes, 31 or 24
	is3 bool
}

// readEntry finds the entry point at an image's start.
func readEntry(image []byte) *entry {
	switch {
	case len(image) >= size64 && bytes.HasPrefix(image, []byte(anchor64)):
		return &entry{image[:size64], true}
	case len(image) >= size32 && bytes.HasPrefix(image, []byte(anchor32)) && string(image[0x10:0x15]) == dmi:
		return &entry{image[:size32], false}
	}
	return nil
}

func (e *entry) bits() int {
	if e.is3 {
		return 64
	}
	return 32
}

func (e *entry) version() int {
	if e.is3 {
		return int(e.raw[7])<<8 | int(e.raw[8])
	}
	return int(e.raw[6])<<8 | int(e.raw[7])
}

func (e *entry) tableSize() uint32 {
	if e.is3 {
		return binary.LittleEndian.Uint32(e.raw[0x0c:])
	}
	return uint32(binary.LittleEndian.Uint16(e.raw[0x16:]))
}

func (e *entry) address() uint64 {
	if e.is3 {
		return binary.LittleEndian.Uint64(e.raw[0x10:])
	}
	return uint64(binary.LittleEndian.Uint32(e.raw[0x18:]))
}

// table is where the table lies in an image of a length: where the address
// says, as in a dump, or where a dump has it; -1 if that isn't in the image.
func (e *entry) table(length int) int {
	if a := e.address(); a >= uint64(len(e.raw)) && a < uint64(length) {
		return int(a)
	}
	if length <= tableOffset {
		return -1
	}
	return tableOffset
}

// A member of the entry point in a spec: how Pack computes it, if it does.
type member struct {
	name    string
	off     int
	size    int
	hex     bool
	compute func(l *layout) uint64
}

func zero(*layout) uint64 { return 0 }

func fixed(n uint64) func(*layout) uint64 { return func(*layout) uint64 { return n } }

func tableLen(l *layout) uint64 { return uint64(l.end() - l.table) }

func countOf(l *layout) uint64 { return uint64(len(l.structs)) }

func offsetOf(l *layout) uint64 { return uint64(l.table) }

func largest(l *layout) uint64 {
	n := 0
	for i := range l.structs {
		n = max(n, l.structs[i].size())
	}
	return uint64(n)
}

// packedRevision is the version as two digits of BCD.
func packedRevision(l *layout) uint64 {
	v := l.entry.version()
	return uint64(v>>8&15<<4 | min(v&0xff, 9))
}

// Checksums come last: they cover the others.
var members32 = []member{
	{"length", 5, 1, false, fixed(size32)}, {"largest", 8, 2, false, largest}, {"revision", 0x0a, 1, false, zero},
	{"table_size", 0x16, 2, false, tableLen}, {"address", 0x18, 4, true, offsetOf}, {"count", 0x1c, 2, false, countOf},
	{"bcd_revision", 0x1e, 1, true, packedRevision},
	{"intermediate_checksum", 0x15, 1, true, func(l *layout) uint64 { return uint64(l.entry.raw[0x15] - sum8(l.entry.raw[0x10:])) }},
	{"checksum", 4, 1, true, func(l *layout) uint64 { return uint64(l.entry.raw[4] - sum8(l.entry.raw)) }},
}

var members64 = []member{
	{"length", 6, 1, false, fixed(size64)}, {"docrev", 9, 1, false, zero}, {"revision", 0x0a, 1, false, fixed(1)},
	{"reserved", 0x0b, 1, false, zero}, {"table_size", 0x0c, 4, false, tableLen}, {"address", 0x10, 8, true, offsetOf},
	{"checksum", 5, 1, true, func(l *layout) uint64 { return uint64(l.entry.raw[5] - sum8(l.entry.raw)) }},
}

func (e *entry) members() []member {
	if e.is3 {
		return members64
	}
	return members32
}

func sum8(b []byte) (sum byte) {
	for _, c := range b {
		sum += c
	}
	return sum
}

func (m *member) get(raw []byte) uint64 {
	var b [8]byte
	copy(b[:], raw[m.off:m.off+m.size])
	return binary.LittleEndian.Uint64(b[:])
}

func (m *member) put(raw []byte, n uint64) {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], n)
	copy(raw[m.off:m.off+m.size], b[:])
}

// isSum tells checksums, which Fix sets, from the rest.
func (m *member) isSum() bool { return m.name == "checksum" || m.name == "intermediate_checksum" }

// sums lists the checksums that are wrong, the inner one first; each as it
// should be once those in front of it are right.
func (e *entry) sums() []vpd.Change {
	l := &layout{entry: &entry{bytes.Clone(e.raw), e.is3}}
	var list []vpd.Change
	for _, m := range e.members() {
		if !m.isSum() {
			continue
		}
		got, want := m.get(l.entry.raw), m.compute(l)
		if got != want {
			m.put(l.entry.raw, want)
			list = append(list, vpd.Change{Area: "entry_point", Off: int64(m.off), Msg: m.name, Old: spec.Byte(byte(got)), New: spec.Byte(byte(want))})
		}
	}
	return list
}

// formatted5 is the "formatted area" of 32-bit entry points, which is zero.
func (e *entry) formatted5() []byte { return e.raw[0x0b:0x10] }

// form is the entry point's text form.
func (l *layout) entryForm() spec.Object {
	e := l.entry
	var o spec.Object
	o.Add("bits", e.bits())
	o.Add("version", fmt.Sprintf("%d.%d", e.version()>>8, e.version()&0xff))
	for _, m := range e.members() {
		if got := m.get(e.raw); got != m.compute(l) {
			if m.hex {
				o.Add(m.name, fmt.Sprintf("0x%0*x", 2*m.size, got))
			} else {
				o.Add(m.name, got)
			}
		}
	}
	if !e.is3 && len(bytes.Trim(e.formatted5(), "\x00")) > 0 {
		o.Add("formatted_area", form.Hex(e.formatted5()))
	}
	if len(l.padding) != max(0, tableOffset-len(e.raw)) || len(bytes.Trim(l.padding, "\x00")) > 0 {
		o.Add("padding", form.Hex(l.padding))
	}
	return o
}

// packEntry makes an entry point and what lies in front of the table, without
// what is computed; set does that.
func packEntry(o spec.Object) (e *entry, padding []byte, err error) {
	const path = "entry_point"
	names := []string{"bits", "version", "formatted_area", "padding"}
	bits, err := form.Uint(o, path, "bits", 64, 64)
	if err != nil {
		return nil, nil, err
	}
	switch bits {
	case 64:
		e = &entry{append([]byte(anchor64), make([]byte, size64-len(anchor64))...), true}
	case 32:
		e = &entry{append([]byte(anchor32), make([]byte, size32-len(anchor32))...), false}
		copy(e.raw[0x10:], dmi)
	default:
		return nil, nil, spec.Errorf(path+".bits", "%d, want 32 or 64", bits)
	}
	for _, m := range e.members() {
		names = append(names, m.name)
	}
	if err := o.Only(path, names...); err != nil {
		return nil, nil, err
	}
	if err := e.packVersion(o, path); err != nil {
		return nil, nil, err
	}
	if _, ok := o.Get("formatted_area"); ok {
		if e.is3 {
			return nil, nil, spec.Errorf(path+".formatted_area", "an entry point of 64 bits has none")
		}
		b, err := form.Bytes(o, path, "formatted_area", 5)
		if err != nil {
			return nil, nil, err
		}
		copy(e.formatted5(), b)
	}
	padding = make([]byte, tableOffset-len(e.raw))
	if _, ok := o.Get("padding"); ok {
		padding, err = form.Bytes(o, path, "padding", MaxSize)
	}
	return e, padding, err
}

func (e *entry) packVersion(o spec.Object, path string) error {
	path = spec.Join(path, "version")
	v, ok := o.Get("version")
	if !ok {
		return spec.Errorf(path, "missing")
	}
	s, err := spec.String(path, v)
	if err != nil {
		return err
	}
	var major, minor byte
	var end string
	if n, _ := fmt.Sscanf(s, "%d.%d%s", &major, &minor, &end); n != 2 || fmt.Sprintf("%d.%d", major, minor) != s {
		return spec.Errorf(path, "want one such as 3.3")
	}
	at := 6
	if e.is3 {
		at = 7
	}
	e.raw[at], e.raw[at+1] = major, minor
	return nil
}

// set writes what is computed, and what the spec says instead.
func (l *layout) set(o spec.Object) error {
	for _, m := range l.entry.members() {
		n, err := form.Uint(o, "entry_point", m.name, 1<<(8*m.size-1)-1+1<<(8*m.size-1), m.compute(l))
		if err != nil {
			return err
		}
		if m.size < 8 && n >= 1<<(8*m.size) {
			return spec.Errorf("entry_point."+m.name, "would be %d, which an entry point of %d bits can't say", n, l.entry.bits())
		}
		m.put(l.entry.raw, n)
	}
	return nil
}
