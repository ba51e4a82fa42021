package luks

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"nvstore.dev/image"
)

// The LUKS2 binary header, big endian (LUKS2 specification, section 2.1).
const (
	v2BinSize   = 4096
	v2Magic2    = "SKUL\xba\xbe"
	v2Struct    = "LUKS2 header"
	v2Checksum  = 448
	v2Structure = 512 // bytes in use
)

// v2Sizes are the sizes of a binary header and its JSON, and so the places
// where a second header may be (section 2.2).
var v2Sizes = []int64{16 << 10, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, 4 << 20}

// A v2Bin is a binary header.
type v2Bin struct {
	second   bool
	size     int64 // with the JSON area
	seq      uint64
	label    [48]byte
	csumAlg  [32]byte
	salt     [64]byte
	uuid     [40]byte
	sub      [48]byte
	offset   int64
	checksum [64]byte
}

// decodeBin reads the binary header that begins p and should lie at off.
func decodeBin(p []byte, off int64) (*v2Bin, error) {
	be := binary.BigEndian
	b := &v2Bin{
		second: off != 0, seq: be.Uint64(p[16:]), label: [48]byte(p[24:]), csumAlg: [32]byte(p[72:]),
		salt: [64]byte(p[104:]), uuid: [40]byte(p[168:]), sub: [48]byte(p[208:]), checksum: [64]byte(p[v2Checksum:]),
	}
	if want := b.magic(); string(p[:6]) != want {
		return nil, with(image.ErrFormat, bad(v2Struct, off, "magic", string(p[:6]), fmt.Sprintf("%q", want)))
	}
	if v := be.Uint16(p[6:]); v != 2 {
		return nil, bad(v2Struct, off+6, "version", v, "2")
	}
	size := be.Uint64(p[8:])
	if size > 4<<20 || !slices.Contains(v2Sizes, int64(size)) {
		return nil, bad(v2Struct, off+8, "hdr_size", size, "16 KiB to 4 MiB, a power of two")
	}
	b.size = int64(size)
	if at := be.Uint64(p[256:]); at != uint64(off) {
		return nil, bad(v2Struct, off+256, "hdr_offset", at, fmt.Sprintf("%#x, where it is", off))
	}
	b.offset = off
	for _, f := range []struct {
		text []byte
		at   int64
		name string
	}{
		{b.label[:], 24, "label"}, {b.csumAlg[:], 72, "csum_alg"},
		{b.uuid[:], 168, "uuid"}, {b.sub[:], 208, "subsystem"},
	} {
		if !bytes.Contains(f.text, []byte{0}) {
			return nil, bad(v2Struct, off+f.at, f.name, string(f.text), "a string that ends in a zero byte")
		}
	}
	return b, nil
}

func (b *v2Bin) magic() string {
	if b.second {
		return v2Magic2
	}
	return magic
}

// encode is decodeBin's inverse: v2BinSize bytes.
func (b *v2Bin) encode() []byte {
	be := binary.BigEndian
	p := make([]byte, v2BinSize)
	copy(p, b.magic())
	be.PutUint16(p[6:], 2)
	be.PutUint64(p[8:], uint64(b.size))
	be.PutUint64(p[16:], b.seq)
	copy(p[24:], b.label[:])
	copy(p[72:], b.csumAlg[:])
	copy(p[104:], b.salt[:])
	copy(p[168:], b.uuid[:])
	copy(p[208:], b.sub[:])
	be.PutUint64(p[256:], uint64(b.offset))
	copy(p[v2Checksum:], b.checksum[:])
	return p
}

// sum is the checksum of a header with its JSON area, over which its own place
// counts as zeros.
func (b *v2Bin) sum(whole []byte) ([64]byte, error) {
	var out [64]byte
	newHash, err := findHash(cString(b.csumAlg[:]), v2Struct, b.offset+72, "csum_alg")
	if err != nil {
		return out, bad(v2Struct, b.offset+72, "csum_alg", cString(b.csumAlg[:]), "a known hash")
	}
	h := newHash()
	h.Write(whole[:v2Checksum])
	h.Write(out[:])
	h.Write(whole[v2Structure:])
	copy(out[:], h.Sum(nil))
	return out, nil
}

// readCopy reads and checks one of the two headers, all but the meaning of its
// JSON, which it returns.
func readCopy(d image.Device, off int64) (*v2Bin, []byte, error) {
	p := make([]byte, v2BinSize)
	if n, err := d.ReadAt(p, off); err != nil && err != io.EOF {
		return nil, nil, err
	} else if n < len(p) {
		return nil, nil, fmt.Errorf("%w: it ends inside the LUKS2 header at %#x", ErrTruncated, off)
	}
	b, err := decodeBin(p, off)
	if err != nil {
		return nil, nil, err
	}
	if d.Size()-off < b.size {
		return nil, nil, fmt.Errorf("%w: it ends inside the LUKS2 metadata at %#x", ErrTruncated, off)
	}
	p = append(p, make([]byte, b.size-v2BinSize)...)
	if err := image.ReadFull(d, p[v2BinSize:], off+v2BinSize); err != nil {
		return nil, nil, err
	}
	sum, err := b.sum(p)
	if err != nil {
		return nil, nil, err
	}
	if sum != b.checksum {
		return nil, nil, bad(v2Struct, off+v2Checksum, "csum", nil, "the checksum of header and metadata")
	}
	text, err := jsonText(p[v2BinSize:])
	return b, text, err
}

// A v2 is a checked LUKS2 header and the image that it is in.
type v2 struct {
	bin     *v2Bin
	meta    *metadata
	root    object // the JSON, with all that this package doesn't know
	text    []byte // as it is stored
	d       image.Device
	damaged error // of the other header
}

// readV2 takes the newer of two sound headers, or the one that is sound and can
// be read.
func readV2(d image.Device) (*v2, error) {
	first, err1 := readWhole(d, 0)
	if errors.Is(err1, image.ErrUnsupported) {
		return nil, err1 // sound, but a second opinion wouldn't help
	}
	places := v2Sizes
	if first != nil {
		places = []int64{first.bin.size}
	}
	second, err2 := findSecond(d, places)
	switch {
	case first == nil && second == nil:
		if errors.Is(err1, image.ErrFormat) && !errors.Is(err2, image.ErrFormat) && !errors.Is(err2, ErrTruncated) {
			return nil, fmt.Errorf("second header: %w", err2) // there is one, so this is LUKS2
		}
		return nil, err1
	case first == nil:
		second.damaged = fmt.Errorf("first header: %w", err1)
		return second, nil
	case second == nil:
		first.damaged = fmt.Errorf("second header: %w", err2)
	case second.bin.seq > first.bin.seq:
		second.damaged = stale(first.bin, second.bin)
		return second, nil
	case second.bin.seq < first.bin.seq:
		first.damaged = stale(second.bin, first.bin)
	}
	return first, nil
}

func stale(old, fresh *v2Bin) error {
	return bad(v2Struct, old.offset+16, "seqid", old.seq, fmt.Sprintf("%d, the other header's", fresh.seq))
}

// findSecond returns the first sound second header at one of the places, or
// else what says most about why there is none.
func findSecond(d image.Device, places []int64) (*v2, error) {
	var why error
	for _, at := range places {
		v, err := readWhole(d, at)
		if err == nil && v.bin.size == at {
			return v, nil
		}
		if err == nil {
			err = bad(v2Struct, at+8, "hdr_size", v.bin.size, "its own place")
		}
		if why == nil || errors.Is(why, image.ErrFormat) && !errors.Is(err, ErrTruncated) {
			why = err
		}
	}
	return nil, why
}

func readWhole(d image.Device, off int64) (*v2, error) {
	b, text, err := readCopy(d, off)
	if err != nil {
		return nil, err
	}
	o, err := parseJSON(text)
	if err != nil {
		return nil, err
	}
	m, err := readMetadata(o, b.size)
	if err != nil {
		return nil, err
	}
	return &v2{bin: b, meta: m, root: o, text: text, d: d}, nil
}

func (v *v2) layout() layout { return v.meta.layout }

func (v *v2) extent() (head, areas, end int64) {
	head = 2 * v.bin.size
	return head, head, head + v.meta.areas
}

func (v *v2) slots() []slot {
	var list []slot
	for _, priority := range []int{2, 1, 0} {
		for i := range v.meta.slots {
			if s := &v.meta.slots[i]; s.priority == priority && s.usable {
				list = append(list, slot{s.n, priority == 0, func(pass []byte, p *purse) ([]byte, error) {
					return s.try(v.d, v.meta, pass, p)
				}})
			}
		}
	}
	return list
}

func (v *v2) info() *Info {
	m := v.meta
	i := &Info{
		Version: 2, UUID: cString(v.bin.uuid[:]), Label: cString(v.bin.label[:]), Encryption: m.encryption,
		Hash: m.digest.hash, KeySize: m.keySize, SectorSize: m.sectorSize, Digest: m.digest.iterations,
		PayloadOffset: m.offset, PayloadSize: m.size, Seq: v.bin.seq, Damaged: v.damaged, Tokens: m.tokens,
	}
	for n := range m.slots {
		s := &m.slots[n]
		i.Slots = append(i.Slots, SlotInfo{
			Number: s.n, KDF: s.kdf, Iterations: s.time, MemoryKiB: s.memory, Cpus: int(s.cpus),
			AreaOffset: s.offset, AreaSize: s.size, Truncated: s.truncated(v.d.Size()),
		})
	}
	return i
}
