package uefi

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// jsonVersion is that of the form virt-firmware and QEMU share.
const jsonVersion = 2

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	o.Add("format", Name)
	o.Add("version", jsonVersion)
	plain := l.addLayout(&o)
	list := []spec.Object{}
	digests, seen := l.digests(), map[string]bool{}
	for i := range l.vars {
		v := &l.vars[i]
		list = append(list, v.form(l.geo.auth, digests[v.id()], seen[v.id()]))
		seen[v.id()] = seen[v.id()] || v.state == stateAdded
	}
	o.Add("variables", list)
	if free := written(l.free()); len(free) > 0 {
		o.Add("free", form.Hex(free))
	}
	if !bytes.HasPrefix(plain, l.area) {
		o.Add("work", patches(l.area, l.limit))
	}
	if l.cut() > 0 {
		o.Add("cut", len(image))
	}
	form.AddRest(&o, l.rest, len(image))
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

// addLayout writes the layout, or the headers if they aren't those of one, and
// returns what lies behind the store if it is as new.
func (l *layout) addLayout(o *spec.Object) (area []byte) {
	head := l.image[:l.start]
	sum := head[volumeChecksum : volumeChecksum+2]
	fits := func(g *geometry) bool {
		want := g.headers()
		copy(want[volumeChecksum:], sum)
		return bytes.Equal(want, head)
	}
	var chosen *geometry
	for _, named := range layouts {
		if fits(&named.geo) {
			o.Add("layout", named.name)
			chosen = &named.geo
			break
		}
	}
	if chosen == nil && l.geo.valid() == "" && fits(&l.geo) {
		o.Add("layout", l.geo.form())
		chosen = &l.geo
	}
	if chosen == nil {
		o.Add("header", form.Hex(head))
		return bytes.Repeat([]byte{0xff}, len(l.area))
	}
	if !bytes.Equal(chosen.headers()[volumeChecksum:volumeChecksum+2], sum) {
		o.Add("volume_checksum", fmt.Sprintf("0x%04x", binary.LittleEndian.Uint16(sum)))
	}
	return chosen.areas()
}

func (g *geometry) form() spec.Object {
	var o spec.Object
	o.Add("volume_size", g.volume)
	o.Add("block_size", g.block)
	if g.blocks != g.volume/g.block {
		o.Add("blocks", g.blocks)
	}
	if g.attr != volumeAttributes {
		o.Add("attributes", fmt.Sprintf("0x%08x", g.attr))
	}
	o.Add("store_size", g.store)
	if g.workSize > 0 {
		o.Add("work_offset", g.work)
		o.Add("work_size", g.workSize)
	}
	o.Add("authenticated", g.auth)
	return o
}

// form is a variable's text form; again, if a live one of that name came
// before.
func (v *variable) form(auth bool, digest []byte, again bool) spec.Object {
	var o spec.Object
	if name, ok := v.text(); ok {
		o.Add("name", name)
	} else {
		o.Add("name", form.Hex(v.name))
	}
	o.Add("guid", v.guid.String())
	o.Add("attr", v.attr)
	o.Add("data", hex.EncodeToString(v.data))
	if auth && (v.time != [16]byte{} || v.attr&attrTimeAuth != 0) {
		o.Add("time", hex.EncodeToString(v.time[:]))
	}
	if digest != nil && v.live() && v.attr&attrTimeAuth != 0 {
		o.Add("digest", hex.EncodeToString(digest))
	}
	if v.count != 0 {
		o.Add("count", v.count)
	}
	if v.key != 0 {
		o.Add("key", v.key)
	}
	if v.state != stateAdded || again {
		o.Add("state", spec.Byte(v.state))
	}
	if v.reserved != 0 {
		o.Add("reserved", spec.Byte(v.reserved))
	}
	if n, d := v.sizes(); int(n) != int(v.nameSize) || int(d) != int(v.dataSize) {
		o.Add("sizes", []uint32{v.nameSize, v.dataSize})
	}
	if !erased(v.padding) || len(v.padding) != v.pad() {
		o.Add("padding", form.Hex(v.padding))
	}
	return o
}

// written is b without the erased bytes at its end.
func written(b []byte) []byte {
	n := len(b)
	for n > 0 && b[n-1] == 0xff {
		n--
	}
	return b[:n]
}

// patches writes what isn't 0xff, as offsets in the image.
func patches(area []byte, base int) []spec.Object {
	const gap = 32 // erased bytes that are worth a new patch
	list := []spec.Object{}
	for pos := 0; pos < len(area); {
		if area[pos] == 0xff {
			pos++
			continue
		}
		end := pos + 1
		for i := end; i < len(area) && i-end < gap; i++ {
			if area[i] != 0xff {
				end = i + 1
			}
		}
		var o spec.Object
		o.Add("offset", fmt.Sprintf("%#x", base+pos))
		o.Add("data", hex.EncodeToString(area[pos:end]))
		list = append(list, o)
		pos = end
	}
	return list
}

// Verify checks structure, checksums and variables.
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
	head, store := l.image[:l.geo.header], l.image[l.geo.header:]
	if sum := sum16(head); sum != 0 {
		got := binary.LittleEndian.Uint16(head[volumeChecksum:])
		list = append(list, vpd.Problem{Area: "volume", Off: volumeChecksum, Msg: "wrong checksum",
			Got: fmt.Sprintf("0x%04x", got), Want: fmt.Sprintf("0x%04x", got-sum), Fixable: true})
	}
	switch n, ok := blockMapLength(head); {
	case !ok:
		add("volume", 0x38, "its block map has no end")
	case n < uint64(l.geo.volume):
		add("volume", 0x38, "its block map adds up to %d bytes, and it has %d", n, l.geo.volume)
	}
	if head[0x37] != 1 && head[0x37] != 2 {
		add("volume", 0x37, "revision %d, want 2", head[0x37])
	}
	if l.cut() > 0 {
		add("volume", len(l.image), "%d bytes are missing at its end", l.cut())
	}
	if room := l.geo.volume - l.geo.header; l.geo.store > room {
		add("store", l.geo.header+16, "its size is %d, and the volume has room for %d", l.geo.store, room)
	}
	if store[20] != storeFormatted || store[21] != storeHealthy {
		add("store", l.geo.header+20, "is not formatted and healthy (%02x %02x, want 5a fe): the firmware erases it", store[20], store[21])
	}
	list = append(list, l.variableProblems()...)
	switch free := l.free(); {
	case l.stop != "":
		add("free", l.end, "the variables end here, and not in free space: %s", l.stop)
	case !erased(free):
		add("free", l.end, "bytes behind the variables are not erased")
	}
	return append(list, l.workProblems()...)
}

func (l *layout) variableProblems() []vpd.Problem {
	var list []vpd.Problem
	live := map[string]bool{}
	for i := range l.vars {
		v := &l.vars[i]
		add := func(format string, args ...any) {
			list = append(list, vpd.Problem{Area: l.name(i), Off: int64(v.off), Msg: fmt.Sprintf(format, args...)})
		}
		switch v.state {
		case stateErased, stateHeader, stateDeleted, stateDeletedOnly:
			continue
		case stateAdded, stateInTransition:
		default:
			add("unknown state %#02x", v.state)
			continue
		}
		if _, ok := v.text(); !ok {
			add("its name is not UTF-16 with a zero at the end")
		}
		switch {
		case v.attr&attrNonVolatile == 0:
			add("its attributes %#x say that it is volatile", v.attr)
		case v.attr&attrRuntime != 0 && v.attr&attrBoot == 0:
			add("its attributes %#x allow access at run time and not at boot", v.attr)
		case v.attr&^attrKnown != 0:
			add("its attributes %#x have unknown bits", v.attr)
		}
		if v.state == stateAdded && live[v.id()] {
			add("comes more than once")
		}
		live[v.id()] = live[v.id()] || v.state == stateAdded
	}
	return list
}

func (l *layout) workProblems() []vpd.Problem {
	if l.geo.workSize == 0 {
		return nil
	}
	var list []vpd.Problem
	got, want := l.workCRC()
	if got != want {
		list = append(list, vpd.Problem{Area: "work", Off: int64(l.geo.work) + 16, Msg: "wrong CRC-32 of the FTW block",
			Got: fmt.Sprintf("0x%08x", got), Want: fmt.Sprintf("0x%08x", want), Fixable: true})
	}
	if l.pending() {
		list = append(list, vpd.Problem{Area: "work", Off: int64(l.geo.work),
			Msg: "a write was interrupted; when the firmware starts, it copies the spare area over what it was to change"})
	}
	return list
}

func (l *layout) workCRC() (got, want uint32) {
	h := l.image[l.geo.work:]
	return binary.LittleEndian.Uint32(h[16:]), workCRC(h)
}

// Fix sets the checksums of the volume's header and of the FTW block.
func (format) Fix(image []byte) ([]byte, []vpd.Change, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	fixed := slices.Clone(image)
	var changes []vpd.Change
	if sum := sum16(fixed[:l.geo.header]); sum != 0 {
		old := binary.LittleEndian.Uint16(fixed[volumeChecksum:])
		binary.LittleEndian.PutUint16(fixed[volumeChecksum:], old-sum)
		changes = append(changes, vpd.Change{Area: "volume", Off: volumeChecksum, Msg: "checksum",
			Old: fmt.Sprintf("0x%04x", old), New: fmt.Sprintf("0x%04x", old-sum)})
	}
	if l.geo.workSize > 0 {
		if got, want := l.workCRC(); got != want {
			binary.LittleEndian.PutUint32(fixed[l.geo.work+16:], want)
			changes = append(changes, vpd.Change{Area: "work", Off: int64(l.geo.work) + 16, Msg: "CRC-32",
				Old: fmt.Sprintf("0x%08x", got), New: fmt.Sprintf("0x%08x", want)})
		}
	}
	return fixed, changes, nil
}

// name is the path of a variable in the spec, and what it is called.
func (l *layout) name(i int) string {
	s := l.vars[i].label()
	if len(s) > 40 {
		s = s[:40] + "..."
	}
	return fmt.Sprintf("variables[%d] %s", i, s)
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
	le := binary.LittleEndian
	const sum = "volume.checksum"
	add(0x10, "volume.zero", "", sum)
	add(0x10, "volume.guid", volumeGUID.String(), sum)
	add(8, "volume.length", fmt.Sprint(l.geo.volume), sum)
	add(4, "volume.signature", "_FVH", sum)
	add(4, "volume.attributes", fmt.Sprintf("0x%08x", le.Uint32(image[0x2c:])), sum)
	add(2, "volume.header_length", fmt.Sprint(l.geo.header), sum)
	add(2, sum, fmt.Sprintf("0x%04x", le.Uint16(image[volumeChecksum:])), sum)
	add(3, "volume.extended_header", "", sum)
	add(1, "volume.revision", fmt.Sprint(image[0x37]), sum)
	add(l.geo.header-0x38, "volume.block_map", fmt.Sprintf("%d blocks of %d bytes", le.Uint32(image[0x38:]), l.geo.block), sum)
	add(16, "store.signature", map[bool]string{true: "authenticated variables", false: "variables"}[l.geo.auth], "")
	add(4, "store.size", fmt.Sprint(l.geo.store), "")
	add(1, "store.format", spec.Byte(image[l.geo.header+20]), "")
	add(1, "store.state", spec.Byte(image[l.geo.header+21]), "")
	add(6, "store.reserved", "", "")
	for i := range l.vars {
		v := &l.vars[i]
		value := spec.Brief(v.data)
		if s := stateName(v.state); s != "" {
			value = "(" + s + ") " + value
		}
		add(headerSize(l.geo.auth)+len(v.name)+len(v.data)+len(v.padding), l.name(i), value, "")
	}
	add(l.limit-l.end, "free", fmt.Sprintf("%d bytes", l.limit-l.end), "")
	l.areaFields(add)
	add(len(l.rest), "trailing", spec.Brief(l.rest), "")
	return list, nil
}

func (l *layout) areaFields(add func(n int, name, value, covered string)) {
	if l.geo.workSize == 0 {
		add(len(l.area), "area", spec.Brief(l.area), "")
		return
	}
	at := l.geo.work - l.limit
	w := l.area[at:]
	const crc = "work.crc"
	add(at, "event_log", spec.Brief(l.area[:at]), "")
	add(16, "work.signature", workGUID.String(), crc)
	add(4, crc, fmt.Sprintf("0x%08x", binary.LittleEndian.Uint32(w[16:])), "")
	add(1, "work.state", spec.Byte(w[20]), "")
	add(3, "work.reserved", "", crc)
	add(8, "work.queue_size", fmt.Sprint(l.geo.workSize-workHeaderSize), crc)
	add(l.geo.workSize-workHeaderSize, "work.queue", spec.Brief(w[workHeaderSize:l.geo.workSize]), "")
	add(len(w)-l.geo.workSize, "spare", spec.Brief(w[l.geo.workSize:]), "")
}
