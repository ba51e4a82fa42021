package luks

import (
	"bytes"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"hash"

	"nvstore.dev/image"
)

// The LUKS1 header, big endian (LUKS1 specification, figures 2 to 4).
const (
	v1HeaderSize = 592
	v1Slots      = 8
	v1SlotAt     = 208
	v1SlotSize   = 48
	v1Digest     = 20
	v1Salt       = 32
	v1Active     = 0x00AC71F3
	v1Inactive   = 0x0000DEAD
	v1Struct     = "LUKS1 header"
	maxKeySize   = 512
)

// v1Text names the strings in v1Header.text.
var v1Text = [3]string{"cipher_name", "cipher_mode", "hash_spec"}

// A v1Slot is a key slot's entry.
type v1Slot struct {
	state      uint32
	iterations uint32
	salt       [v1Salt]byte
	offset     uint32 // sectors of 512 bytes
	stripes    uint32
}

// A v1Header is a LUKS1 header as stored.
type v1Header struct {
	text       [3][32]byte // cipher_name, cipher_mode, hash_spec
	payload    uint32      // sectors of 512 bytes
	keyBytes   uint32
	digest     [v1Digest]byte
	salt       [v1Salt]byte
	iterations uint32
	uuid       [40]byte
	slot       [v1Slots]v1Slot
}

// A v1 is a checked header and the image that it is in.
type v1 struct {
	v1Header
	d       image.Device
	spec    spec
	newHash func() hash.Hash
}

func readV1(d image.Device) (*v1, error) {
	if d.Size() < v1HeaderSize {
		return nil, fmt.Errorf("%w: %d bytes, a LUKS1 header has %d", ErrTruncated, d.Size(), v1HeaderSize)
	}
	p := make([]byte, v1HeaderSize)
	if err := image.ReadFull(d, p, 0); err != nil {
		return nil, err
	}
	h, err := decodeV1(p)
	if err != nil {
		return nil, err
	}
	v := &v1{v1Header: *h, d: d}
	if v.spec, v.newHash, err = h.check(); err != nil {
		return nil, err
	}
	return v, nil
}

// decodeV1 takes a header apart. It checks what encode can't give back: magic,
// version and the strings.
func decodeV1(p []byte) (*v1Header, error) {
	be := binary.BigEndian
	if string(p[:6]) != magic {
		return nil, with(image.ErrFormat, bad(v1Struct, 0, "magic", string(p[:6]), "LUKS\\xba\\xbe"))
	}
	if v := be.Uint16(p[6:]); v != 1 {
		return nil, with(image.ErrUnsupported, bad(v1Struct, 6, "version", v, "1"))
	}
	h := &v1Header{
		payload: be.Uint32(p[104:]), keyBytes: be.Uint32(p[108:]), iterations: be.Uint32(p[164:]),
		digest: [v1Digest]byte(p[112:]), salt: [v1Salt]byte(p[132:]), uuid: [40]byte(p[168:]),
	}
	for i := range h.text {
		at := 8 + 32*i
		h.text[i] = [32]byte(p[at:])
		if cString(h.text[i][:]) == "" || !bytes.Contains(h.text[i][:], []byte{0}) {
			return nil, bad(v1Struct, int64(at), v1Text[i], string(h.text[i][:]), "a string that ends in a zero byte")
		}
	}
	for i := range h.slot {
		s, b := &h.slot[i], p[v1SlotAt+i*v1SlotSize:]
		s.state, s.iterations = be.Uint32(b), be.Uint32(b[4:])
		s.salt = [v1Salt]byte(b[8:])
		s.offset, s.stripes = be.Uint32(b[40:]), be.Uint32(b[44:])
	}
	return h, nil
}

// encode is decodeV1's inverse.
func (h *v1Header) encode() []byte {
	be := binary.BigEndian
	p := make([]byte, v1HeaderSize)
	copy(p, magic)
	be.PutUint16(p[6:], 1)
	for i := range h.text {
		copy(p[8+32*i:], h.text[i][:])
	}
	be.PutUint32(p[104:], h.payload)
	be.PutUint32(p[108:], h.keyBytes)
	copy(p[112:], h.digest[:])
	copy(p[132:], h.salt[:])
	be.PutUint32(p[164:], h.iterations)
	copy(p[168:], h.uuid[:])
	for i := range h.slot {
		s, b := &h.slot[i], p[v1SlotAt+i*v1SlotSize:]
		be.PutUint32(b, s.state)
		be.PutUint32(b[4:], s.iterations)
		copy(b[8:40], s.salt[:])
		be.PutUint32(b[40:], s.offset)
		be.PutUint32(b[44:], s.stripes)
	}
	return p
}

// check holds the fields against each other, as QEMU does, but in 64 bits.
func (h *v1Header) check() (spec, func() hash.Hash, error) {
	s, err := parseSpec(h.encryption(), v1Struct, 8, "cipher_name")
	if err != nil {
		return spec{}, nil, err
	}
	if !s.essivWorks() {
		return spec{}, nil, with(image.ErrUnsupported, bad(v1Struct, 40, "cipher_mode", cString(h.text[1][:]),
			"a hash for essiv as long as a key of the cipher"))
	}
	newHash, err := findHash(h.hash(), v1Struct, 72, "hash_spec")
	if err != nil {
		return spec{}, nil, err
	}
	if h.keyBytes == 0 || h.keyBytes > maxKeySize {
		return spec{}, nil, bad(v1Struct, 108, "key_bytes", h.keyBytes, "1 to 512")
	}
	if err := s.checkKeySize(int(h.keyBytes), v1Struct, 108, "key_bytes"); err != nil {
		return spec{}, nil, err
	}
	if h.payload != 0 && h.payload < 8 {
		return spec{}, nil, bad(v1Struct, 104, "payload_offset", h.payload, "0, or 8 or more, past the header")
	}
	if h.iterations == 0 {
		return spec{}, nil, bad(v1Struct, 164, "mk_digest_iter", h.iterations, "1 or more")
	}
	return s, newHash, h.checkSlots()
}

func (h *v1Header) checkSlots() error {
	size := h.areaSize()
	for i := range h.slot {
		s := &h.slot[i]
		at := int64(v1SlotAt + i*v1SlotSize)
		name := func(field string) string { return fmt.Sprintf("slot[%d].%s", i, field) }
		switch {
		case s.state != v1Active && s.state != v1Inactive:
			return bad(v1Struct, at, name("active"), s.state, "0xac71f3 or 0xdead")
		case s.state == v1Active && s.iterations == 0:
			return bad(v1Struct, at+4, name("iterations"), s.iterations, "1 or more")
		case s.stripes != stripes:
			return bad(v1Struct, at+44, name("stripes"), s.stripes, "4000")
		case int64(s.offset)*512 < v1HeaderSize:
			return bad(v1Struct, at+40, name("key_material_offset"), s.offset, "a sector past the header")
		case h.payload != 0 && s.start()+size > int64(h.payload)*512:
			return bad(v1Struct, at+40, name("key_material_offset"), s.offset, "an area that ends before the payload")
		}
		for j := range i {
			if overlap(s.start(), size, h.slot[j].start(), size) {
				return bad(v1Struct, at+40, name("key_material_offset"), s.offset,
					fmt.Sprintf("an area outside that of slot %d", j))
			}
		}
	}
	return nil
}

func (h *v1Header) encryption() string { return cString(h.text[0][:]) + "-" + cString(h.text[1][:]) }
func (h *v1Header) hash() string       { return cString(h.text[2][:]) }

func (s *v1Slot) start() int64 { return int64(s.offset) * 512 }

// areaSize is that of a key area in bytes, whole sectors.
func (h *v1Header) areaSize() int64 { return (afSize(int(h.keyBytes)) + 511) / 512 * 512 }

func (v *v1) layout() layout {
	return layout{v.spec, int(v.keyBytes), int64(v.payload) * 512, -1, 512, 0}
}

func (v *v1) extent() (head, areas, end int64) {
	areas = v.slot[0].start()
	for i := range v.slot {
		areas = min(areas, v.slot[i].start())
		end = max(end, v.slot[i].start()+v.areaSize())
	}
	end = (end + 4095) / 4096 * 4096
	if v.payload != 0 {
		end = min(end, int64(v.payload)*512)
	}
	return v1HeaderSize, areas, end
}

func (v *v1) slots() []slot {
	var list []slot
	for i := range v.slot {
		if v.slot[i].state == v1Active {
			list = append(list, slot{i, false, func(pass []byte, p *purse) ([]byte, error) {
				return v.try(&v.slot[i], pass, p)
			}})
		}
	}
	return list
}

func (v *v1) try(s *v1Slot, pass []byte, p *purse) ([]byte, error) {
	n := int(v.keyBytes)
	area := afSize(n)
	// Before the work, so that a short image is never a wrong passphrase.
	if s.start() > v.d.Size()-area {
		return nil, fmt.Errorf("%w: %d bytes, the key area is at [%d, %d)",
			ErrTruncated, v.d.Size(), s.start(), s.start()+area)
	}
	derived, err := p.pbkdf2(v.newHash, pass, s.salt[:], uint64(s.iterations), n)
	if err != nil {
		return nil, err
	}
	defer clear(derived)
	split, err := readKeyArea(v.d, s.start(), area, v.spec, derived)
	if err != nil {
		return nil, err
	}
	defer clear(split)
	key := afMerge(v.newHash, split, stripes)
	sum, err := p.pbkdf2(v.newHash, key, v.salt[:], uint64(v.iterations), v1Digest)
	if err != nil {
		return nil, err
	}
	if subtle.ConstantTimeCompare(sum, v.digest[:]) != 1 {
		clear(key)
		return nil, ErrPassphrase
	}
	return key, nil
}

func (v *v1) info() *Info {
	i := &Info{
		Version: 1, UUID: cString(v.uuid[:]), Encryption: v.encryption(), Hash: v.hash(),
		KeySize: int(v.keyBytes), SectorSize: 512, Digest: uint64(v.iterations), PayloadOffset: int64(v.payload) * 512, PayloadSize: -1,
	}
	for n := range v.slot {
		if s := &v.slot[n]; s.state == v1Active {
			i.Slots = append(i.Slots, SlotInfo{
				Number: n, KDF: "pbkdf2", Iterations: uint64(s.iterations),
				AreaOffset: s.start(), AreaSize: v.areaSize(),
				Truncated: s.start() > v.d.Size()-afSize(int(v.keyBytes)),
			})
		}
	}
	return i
}

// cString is p up to its first zero byte.
func cString(p []byte) string {
	b, _, _ := bytes.Cut(p, []byte{0})
	return string(b)
}
