package uefi

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"strings"
)

const (
	volumeHeaderSize = 0x48 // with one entry in its block map, and the end
	storeHeaderSize  = 28
	volumeChecksum   = 0x32
	volumeAttributes = 0x0004feff
	maxHeader        = 4096

	storeFormatted = 0x5a
	storeHealthy   = 0xfe
)

// A GUID has its first three parts little-endian.
type guid [16]byte

var (
	volumeGUID = mustGUID("fff12b8d-7696-4c8b-a985-2747075b4f50") // EFI_SYSTEM_NV_DATA_FV_GUID
	authGUID   = mustGUID("aaf32c78-947b-439a-a180-2e144ec37792") // EFI_AUTHENTICATED_VARIABLE_GUID
	plainGUID  = mustGUID("ddcf3616-3275-4164-98b6-fe85707ffe7d") // EFI_VARIABLE_GUID
)

func parseGUID(s string) (g guid, ok bool) {
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(b) != 16 || !strings.EqualFold(swapped(b).String(), s) {
		return g, false
	}
	return swapped(b), true
}

func mustGUID(s string) guid {
	g, ok := parseGUID(s)
	if !ok {
		panic("internal error: GUID " + s)
	}
	return g
}

func swapped(b []byte) (g guid) {
	copy(g[:], []byte{b[3], b[2], b[1], b[0], b[5], b[4], b[7], b[6]})
	copy(g[8:], b[8:])
	return g
}

func (g guid) String() string {
	b := swapped(g[:])
	h := hex.EncodeToString(b[:])
	return h[:8] + "-" + h[8:12] + "-" + h[12:16] + "-" + h[16:20] + "-" + h[20:]
}

// A geometry is the sizes and offsets of an image.
type geometry struct {
	header   int // of the volume, in bytes
	volume   int
	block    int
	blocks   int // as the block map says: some firmware counts the whole flash
	attr     uint32
	store    int // with its header
	work     int // offset of the FTW block; 0 if there is none
	workSize int
	auth     bool
}

// layouts are the geometries that have a name.
var layouts = []struct {
	name string
	geo  geometry
}{
	// OvmfPkg/VarStore.fdf.inc.
	{"ovmf-4m", geometry{volumeHeaderSize, 0x84000, 0x1000, 0x84, volumeAttributes, 0x40000 - volumeHeaderSize, 0x41000, 0x1000, true}},
	{"ovmf-2m", geometry{volumeHeaderSize, 0x20000, 0x1000, 0x20, volumeAttributes, 0xe000 - volumeHeaderSize, 0xf000, 0x1000, true}},
	// ArmVirtPkg/VarStore.fdf.inc.
	{"arm-virt", geometry{volumeHeaderSize, 0xc0000, 0x40000, 3, volumeAttributes, 0x40000 - volumeHeaderSize, 0x40000, 0x40000, true}},
}

// valid says what is impossible about a geometry that a spec or an image gives.
func (g *geometry) valid() string {
	base := g.header + g.store
	switch {
	case g.header != volumeHeaderSize:
		return "has a header of another size"
	case g.block < 1:
		return "block_size is 0"
	case g.volume > maxVolume:
		return "volume_size is more than 3 MiB"
	case g.volume%g.block != 0:
		return "volume_size is not a multiple of block_size"
	case g.store < storeHeaderSize+plainHeaderSize || base > g.volume:
		return "store_size leaves no room for variables, or is larger than the volume"
	case g.workSize == 0 && g.work == 0:
	case g.workSize < workHeaderSize+2*writeSize || g.work < base || g.work+g.workSize > g.volume || g.work%workAlign != 0:
		return "work_offset and work_size are not those of an FTW block behind the store"
	}
	return ""
}

// headers are the volume's and the store's as they should be.
func (g *geometry) headers() []byte {
	b := make([]byte, volumeHeaderSize+storeHeaderSize)
	le := binary.LittleEndian
	copy(b[0x10:], volumeGUID[:])
	le.PutUint64(b[0x20:], uint64(g.volume))
	copy(b[0x28:], "_FVH")
	le.PutUint32(b[0x2c:], g.attr)
	le.PutUint16(b[0x30:], volumeHeaderSize)
	b[0x37] = 2 // revision
	le.PutUint32(b[0x38:], uint32(g.blocks))
	le.PutUint32(b[0x3c:], uint32(g.block))
	le.PutUint16(b[volumeChecksum:], -sum16(b[:volumeHeaderSize]))
	s := b[volumeHeaderSize:]
	copy(s, plainGUID[:])
	if g.auth {
		copy(s, authGUID[:])
	}
	le.PutUint32(s[16:], uint32(g.store))
	s[20], s[21] = storeFormatted, storeHealthy
	return b
}

// areas is what lies behind the store in an image that no firmware has run on.
func (g *geometry) areas() []byte {
	base := g.header + g.store
	area := bytes.Repeat([]byte{0xff}, g.volume-base)
	if g.workSize > 0 {
		copy(area[g.work-base:], workHeader(g.workSize))
	}
	return area
}

func sum16(b []byte) (sum uint16) {
	for i := 0; i+1 < len(b); i += 2 {
		sum += binary.LittleEndian.Uint16(b[i:])
	}
	return sum
}

// readGeometry reads the headers; msg says why it can't, and where.
func readGeometry(image []byte) (g geometry, off int, msg string) {
	le := binary.LittleEndian
	switch {
	case len(image) < volumeHeaderSize+storeHeaderSize:
		return g, 0, "is shorter than the headers of a volume and a store"
	case string(image[0x28:0x2c]) != "_FVH":
		return g, 0x28, "no signature _FVH"
	case !bytes.Equal(image[0x10:0x20], volumeGUID[:]):
		return g, 0x10, "the volume's GUID isn't that of variables, " + volumeGUID.String()
	}
	g.header = int(le.Uint16(image[0x30:]))
	if g.header < volumeHeaderSize || g.header > maxHeader || g.header%4 != 0 || g.header > len(image)-storeHeaderSize {
		return g, 0x30, "the length of the volume's header is impossible"
	}
	s := image[g.header:]
	g.auth = bytes.Equal(s[:16], authGUID[:])
	if !g.auth && !bytes.Equal(s[:16], plainGUID[:]) {
		return g, g.header, "the store's signature is neither that of authenticated variables nor that of plain ones"
	}
	volume := le.Uint64(image[0x20:])
	if volume < uint64(g.header+storeHeaderSize) || volume > maxVolume {
		return g, 0x20, "the volume's length is impossible, or more than 3 MiB"
	}
	g.volume = int(volume)
	g.attr = le.Uint32(image[0x2c:])
	g.blocks, g.block = int(le.Uint32(image[0x38:])), int(le.Uint32(image[0x3c:]))
	// A store that claims more than its volume is a problem for Verify.
	store := le.Uint32(s[16:])
	if store < storeHeaderSize {
		return g, g.header + 16, "the store's size is less than its header's"
	}
	g.store = int(min(uint64(store), MaxSize))
	return g, 0, ""
}

// blockMapLength is what the volume's block map adds up to; ok is false if the
// map has no end.
func blockMapLength(header []byte) (n uint64, ok bool) {
	for b := header[0x38:]; len(b) >= 8; b = b[8:] {
		count, size := binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])
		if count == 0 && size == 0 {
			return n, true
		}
		n += uint64(count) * uint64(size)
	}
	return n, false
}
