package uefi

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"unicode/utf16"
)

const (
	startID = 0x55aa

	authHeaderSize  = 60
	plainHeaderSize = 32
	maxName         = 4096 // bytes that Pack lets a name have

	// States: bits are cleared as a variable goes through them.
	stateErased       = 0xff
	stateHeader       = 0x7f // the header is whole, the rest may not be
	stateAdded        = 0x3f
	stateInTransition = 0x3e // valid until its successor is
	stateDeleted      = 0x3c
	stateDeletedOnly  = 0x3d // without having been in transition

	// Attributes: UEFI specification, section 8.2.1.
	attrNonVolatile = 0x01
	attrBoot        = 0x02
	attrRuntime     = 0x04
	attrTimeAuth    = 0x20
	attrKnown       = 0xff
)

// A variable is one as it lies in a store.
type variable struct {
	off      int
	state    byte
	reserved byte
	attr     uint32
	count    uint64
	time     [16]byte
	key      uint32
	nameSize uint32
	dataSize uint32
	guid     guid
	name     []byte // UTF-16, with the zero
	data     []byte
	padding  []byte // to a multiple of 4
}

func headerSize(auth bool) int {
	if auth {
		return authHeaderSize
	}
	return plainHeaderSize
}

// readVariable reads the variable at off of a store that ends where b does, and
// returns the offset behind it: 0 if there is none, and why unless the space is
// free there.
func readVariable(b []byte, off int, auth bool) (v variable, next int, stop string) {
	size := headerSize(auth)
	if len(b)-off < 2 || b[off] == 0xff && b[off+1] == 0xff {
		return v, 0, ""
	}
	le := binary.LittleEndian
	switch h := b[off:]; {
	case le.Uint16(h) != startID:
		return v, 0, fmt.Sprintf("no variable begins with %#04x", le.Uint16(h))
	case len(h) < size:
		return v, 0, fmt.Sprintf("a variable's header has %d bytes, and %d are left", size, len(h))
	}
	h := b[off : off+size]
	v = variable{off: off, state: h[2], reserved: h[3], attr: le.Uint32(h[4:])}
	sizes := h[8:]
	if auth {
		v.count, v.key = le.Uint64(h[8:]), le.Uint32(h[32:])
		copy(v.time[:], h[16:])
		sizes = h[36:]
	}
	v.nameSize, v.dataSize = le.Uint32(sizes), le.Uint32(sizes[4:])
	copy(v.guid[:], sizes[8:])
	n, d := v.sizes()
	pos := off + size
	if n+d > uint64(len(b)-pos) {
		return v, 0, fmt.Sprintf("a variable's name and data have %d bytes, and %d are left", n+d, len(b)-pos)
	}
	v.name = b[pos : pos+int(n)]
	pos += int(n)
	v.data = b[pos : pos+int(d)]
	pos += int(d)
	next = min((pos+3)&^3, len(b))
	v.padding = b[pos:next]
	return v, next, ""
}

// sizes are those of name and data, as the firmware reads them: a header that
// was never finished has none.
func (v *variable) sizes() (name, data uint64) {
	if v.state == stateErased || v.attr == 1<<32-1 || v.nameSize == 1<<32-1 || v.dataSize == 1<<32-1 {
		return 0, 0
	}
	return uint64(v.nameSize), uint64(v.dataSize)
}

// encode is the variable's bytes.
func (v *variable) encode(auth bool) []byte {
	le := binary.LittleEndian
	b := le.AppendUint16(nil, startID)
	b = append(b, v.state, v.reserved)
	b = le.AppendUint32(b, v.attr)
	if auth {
		b = le.AppendUint64(b, v.count)
		b = append(b, v.time[:]...)
		b = le.AppendUint32(b, v.key)
	}
	b = le.AppendUint32(b, v.nameSize)
	b = le.AppendUint32(b, v.dataSize)
	b = append(b, v.guid[:]...)
	b = append(b, v.name...)
	b = append(b, v.data...)
	return append(b, v.padding...)
}

// pad is how many bytes lie between a variable and the next.
func (v *variable) pad() int { return -(len(v.name) + len(v.data)) & 3 }

// live: the firmware reads its value.
func (v *variable) live() bool { return v.state == stateAdded || v.state == stateInTransition }

func (v *variable) id() string { return string(v.guid[:]) + string(v.name) }

// text is the name, if it is one.
func (v *variable) text() (string, bool) {
	n := len(v.name)
	if n < 4 || n%2 != 0 {
		return "", false
	}
	units := make([]uint16, n/2)
	for i := range units {
		units[i] = binary.LittleEndian.Uint16(v.name[2*i:])
	}
	s := string(utf16.Decode(units[:len(units)-1]))
	return s, bytes.Equal(encodeName(s), v.name)
}

// encodeName writes a name in UTF-16 with a zero at its end; nil if it can't be
// one.
func encodeName(s string) []byte {
	if s == "" {
		return nil
	}
	var b []byte
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		if u == 0 && len(b) != 2*len(utf16.Encode([]rune(s))) || u == 0xfffd {
			return nil
		}
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// label names a variable for people.
func (v *variable) label() string {
	if s, ok := v.text(); ok {
		return s
	}
	return fmt.Sprintf("0x%x", v.name)
}

func stateName(state byte) string {
	switch state {
	case stateHeader:
		return "half written"
	case stateAdded:
		return ""
	case stateInTransition:
		return "being replaced"
	case stateDeleted, stateDeletedOnly:
		return "deleted"
	}
	return fmt.Sprintf("state %#02x", state)
}
