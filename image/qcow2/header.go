package qcow2

import (
	"encoding/binary"
	"fmt"

	"nvstore.dev/image"
)

// Limits of the format and of QEMU's implementation of it; an image past them
// can't be used by QEMU either.
const (
	minClusterBits   = 9
	maxClusterBits   = 21
	maxL1Bytes       = 32 << 20
	maxReftableBytes = 8 << 20
	maxSnapshots     = 65536
	maxSnapTable     = 64 << 20
	maxSnapExtra     = 1024
	maxBackingName   = 1023
	maxBackingFormat = 15
	maxHostOffset    = 1 << 56
	maxNameLen       = 255
)

const (
	magic        = 0x514649fb
	headerLenV2  = 72
	headerLenV3  = 104
	headerLenNew = 112 // with compression_type and its padding
	sector       = 512
)

// Feature bits (docs/interop/qcow2.txt, "Header").
const (
	incompatDirty       = 1 << 0
	incompatCorrupt     = 1 << 1
	incompatDataFile    = 1 << 2
	incompatCompression = 1 << 3
	incompatExtendedL2  = 1 << 4
	incompatKnown       = incompatDirty | incompatCorrupt | incompatDataFile |
		incompatCompression | incompatExtendedL2

	compatLazyRefcounts = 1 << 0

	autoclearBitmaps = 1 << 0
	autoclearRawData = 1 << 1
)

// Encryption methods.
const (
	cryptAES  = 1
	cryptLUKS = 2
)

// A header is the fixed part of cluster 0 and what follows it there.
type header struct {
	version          uint32
	backingOff       uint64
	backingSize      uint32
	clusterBits      uint32
	size             uint64
	crypt            uint32
	l1Size           uint32 // entries
	l1Off            uint64
	reftableOff      uint64
	reftableClusters uint32
	nbSnaps          uint32
	snapsOff         uint64
	incompat         uint64
	compat           uint64
	autoclear        uint64
	refOrder         uint32
	headerLen        uint32
	compression      uint8
	tail             []byte // header bytes after compression_type, unknown to us
	exts             []Extension
	backing          string

	// moved: extensions, the backing file name or the header's length
	// aren't what the file has.
	moved bool

	// defects are faults that QEMU lives with. They don't hinder
	// reading, but what they mean isn't known, so writing is refused.
	defects []*image.FormatError

	// With lenient, a refcount table that can't be one, and snapshots beyond
	// the most that there may be, are lost instead of an error.
	lenient bool
	lost    []*image.FormatError
}

// A fieldError builds FormatErrors of one structure.
type fieldError struct {
	path, name string
}

func (f fieldError) at(off int64, field string, got any, want string, kind error) *image.FormatError {
	return &image.FormatError{Path: f.path, Off: off, Struct: f.name, Field: field,
		Got: got, Want: want, Kind: kind}
}

// parseHeader decodes the header and its extensions from b, the first cluster
// of the image (zero-filled where the file is shorter).
func parseHeader(b []byte, path string) (*header, error) {
	return new(header).parse(b, path)
}

func (h *header) parse(b []byte, path string) (*header, error) {
	f := fieldError{path, "qcow2 header"}
	if err := h.parseFixed(b, f); err != nil {
		return nil, err
	}
	if uint64(len(b)) < h.clusterSize() {
		return nil, f.at(0, "", len(b), "a whole cluster", image.ErrFormat)
	}
	b = b[:h.clusterSize()]
	for _, check := range []func([]byte, fieldError) error{
		h.parseV3, h.checkTables, h.parseBacking, h.parseExtensions,
	} {
		if err := check(b, f); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func (h *header) clusterSize() uint64 { return 1 << h.clusterBits }

// parseFixed reads the 72 bytes that all versions share.
func (h *header) parseFixed(b []byte, f fieldError) error {
	be := binary.BigEndian
	if len(b) < headerLenV2 {
		return f.at(0, "", len(b), "at least 72 bytes", image.ErrFormat)
	}
	if got := be.Uint32(b); got != magic {
		return f.at(0, "magic", got, "0x514649fb", image.ErrFormat)
	}
	h.version = be.Uint32(b[4:])
	if h.version != 2 && h.version != 3 {
		return f.at(4, "version", h.version, "2 or 3", image.ErrUnsupported)
	}
	h.backingOff = be.Uint64(b[8:])
	h.backingSize = be.Uint32(b[16:])
	h.clusterBits = be.Uint32(b[20:])
	if h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
		return f.at(20, "cluster_bits", h.clusterBits, "9 to 21", image.ErrFormat)
	}
	h.size = be.Uint64(b[24:])
	h.crypt = be.Uint32(b[32:])
	h.l1Size = be.Uint32(b[36:])
	h.l1Off = be.Uint64(b[40:])
	h.reftableOff = be.Uint64(b[48:])
	h.reftableClusters = be.Uint32(b[56:])
	h.nbSnaps = be.Uint32(b[60:])
	h.snapsOff = be.Uint64(b[64:])
	if h.crypt > 2 {
		return f.at(32, "crypt_method", h.crypt, "0, 1 or 2", image.ErrFormat)
	}
	return nil
}

// parseV3 reads what version 3 added.
func (h *header) parseV3(b []byte, f fieldError) error {
	h.refOrder, h.headerLen = 4, headerLenV2
	if h.version == 2 {
		return nil
	}
	be := binary.BigEndian
	h.incompat = be.Uint64(b[72:])
	h.compat = be.Uint64(b[80:])
	h.autoclear = be.Uint64(b[88:])
	h.refOrder = be.Uint32(b[96:])
	h.headerLen = be.Uint32(b[100:])
	if h.refOrder > 6 {
		return f.at(96, "refcount_order", h.refOrder, "0 to 6", image.ErrFormat)
	}
	if h.headerLen < headerLenV3 || uint64(h.headerLen) > h.clusterSize() {
		return f.at(100, "header_length", h.headerLen, "104 to the cluster size", image.ErrFormat)
	}
	if h.incompat&incompatExtendedL2 != 0 && h.clusterBits < extendedMinBits {
		return f.at(20, "cluster_bits", h.clusterBits, "14 to 21 with extended L2 entries", image.ErrFormat)
	}
	if h.headerLen%8 != 0 {
		h.defects = append(h.defects, f.at(100, "header_length", h.headerLen,
			"a multiple of 8", image.ErrCorrupt))
	}
	if h.headerLen > headerLenV3 {
		h.compression = b[headerLenV3]
		h.tail = append([]byte(nil), b[headerLenV3+1:h.headerLen]...)
	}
	if (h.incompat&incompatCompression != 0) != (h.compression != 0) {
		return f.at(104, "compression_type", h.compression,
			"non-zero exactly if the compression type bit is set", image.ErrFormat)
	}
	if h.compression > 1 {
		return f.at(104, "compression_type", h.compression, "0 or 1", image.ErrUnsupported)
	}
	return nil
}

// checkTables validates where the tables are said to lie, in 64 bits, before
// anything is allocated for them.
func (h *header) checkTables(_ []byte, f fieldError) error {
	g := newGeometry(h)
	if h.size > 1<<63-1 {
		return f.at(24, "size", h.size, "less than 2^63", image.ErrFormat)
	}
	if h.size%sector != 0 {
		h.defects = append(h.defects, f.at(24, "size", h.size, "a multiple of 512", image.ErrCorrupt))
	}
	if uint64(h.l1Size)*8 > maxL1Bytes {
		return f.at(36, "l1_size", h.l1Size, "at most 4194304", image.ErrFormat)
	}
	if need := g.l1Entries(h.size); uint64(h.l1Size) < need {
		return f.at(36, "l1_size", h.l1Size, fmt.Sprintf("at least %d for this size", need), image.ErrCorrupt)
	}
	if err := g.checkTable(h.l1Off, uint64(h.l1Size)*8); err != "" {
		return f.at(40, "l1_table_offset", h.l1Off, err, image.ErrCorrupt)
	}
	if bad := h.checkReftable(&g, f); bad != nil {
		if !h.lenient {
			return bad
		}
		h.loseReftable(bad)
	}
	if h.nbSnaps > maxSnapshots {
		bad := f.at(60, "nb_snapshots", h.nbSnaps, "at most 65536", image.ErrFormat)
		if !h.lenient {
			return bad
		}
		h.lost, h.nbSnaps = append(h.lost, bad), maxSnapshots
	}
	if err := g.checkTable(h.snapsOff, uint64(h.nbSnaps)); err != "" {
		return f.at(64, "snapshots_offset", h.snapsOff, err, image.ErrCorrupt)
	}
	return nil
}

func (h *header) checkReftable(g *geometry, f fieldError) *image.FormatError {
	n := uint64(h.reftableClusters) << h.clusterBits
	if n == 0 || n > maxReftableBytes {
		return f.at(56, "refcount_table_clusters", h.reftableClusters, "1 cluster to 8 MiB", image.ErrFormat)
	}
	if want := g.checkTable(h.reftableOff, n); want != "" {
		return f.at(48, "refcount_table_offset", h.reftableOff, want, image.ErrCorrupt)
	}
	return nil
}

// loseReftable leaves the image without refcounts.
func (h *header) loseReftable(bad *image.FormatError) {
	h.lost = append(h.lost, bad)
	h.reftableOff, h.reftableClusters = 0, 0
}

func (h *header) parseBacking(b []byte, f fieldError) error {
	if h.backingOff == 0 {
		return nil
	}
	if h.backingOff < uint64(h.headerLen) || h.backingOff > h.clusterSize() {
		return f.at(8, "backing_file_offset", h.backingOff, "inside the header cluster", image.ErrFormat)
	}
	if h.backingSize > maxBackingName || uint64(h.backingSize) > h.clusterSize()-h.backingOff {
		return f.at(16, "backing_file_size", h.backingSize, "at most 1023 and inside the header cluster", image.ErrFormat)
	}
	h.backing = string(b[h.backingOff:][:h.backingSize])
	return nil
}

// encodeFixed writes header fields 0 to header_length into b, which is at
// least that long. Extensions and the backing file name aren't touched.
func (h *header) encodeFixed(b []byte) {
	be := binary.BigEndian
	be.PutUint32(b, magic)
	be.PutUint32(b[4:], h.version)
	be.PutUint64(b[8:], h.backingOff)
	be.PutUint32(b[16:], h.backingSize)
	be.PutUint32(b[20:], h.clusterBits)
	be.PutUint64(b[24:], h.size)
	be.PutUint32(b[32:], h.crypt)
	be.PutUint32(b[36:], h.l1Size)
	be.PutUint64(b[40:], h.l1Off)
	be.PutUint64(b[48:], h.reftableOff)
	be.PutUint32(b[56:], h.reftableClusters)
	be.PutUint32(b[60:], h.nbSnaps)
	be.PutUint64(b[64:], h.snapsOff)
	if h.version == 2 {
		return
	}
	be.PutUint64(b[72:], h.incompat)
	be.PutUint64(b[80:], h.compat)
	be.PutUint64(b[88:], h.autoclear)
	be.PutUint32(b[96:], h.refOrder)
	be.PutUint32(b[100:], h.headerLen)
	if h.headerLen > headerLenV3 {
		b[headerLenV3] = h.compression
		copy(b[headerLenV3+1:h.headerLen], h.tail)
	}
}

// encode returns the header with its extensions and backing file name, which
// must fit in one cluster.
func (h *header) encode() ([]byte, error) {
	b := make([]byte, h.headerLen)
	h.encodeFixed(b)
	b = appendExtensions(b, h.exts)
	if h.backing != "" && uint64(len(b)) <= h.backingOff && h.backingOff <= h.clusterSize() {
		b = append(b, make([]byte, h.backingOff-uint64(len(b)))...)
		b = append(b, h.backing...)
	}
	if uint64(len(b)) > h.clusterSize() {
		return nil, fieldError{"", "qcow2 header"}.at(0, "extensions", len(b),
			"at most one cluster", image.ErrOutOfRange)
	}
	return b, nil
}

// knownFeature names a feature bit (typ 0 is incompatible, 1 compatible, 2
// autoclear) by our own table, and then by the image's.
func (h *header) knownFeature(typ, bit uint8) string {
	for _, table := range append([]Extension{featureTable()}, h.exts...) {
		if table.Type != extFeatureNames {
			continue
		}
		for d := table.Data; len(d) >= featureEntry; d = d[featureEntry:] {
			if d[0] == typ && d[1] == bit {
				return cString(d[2:featureEntry])
			}
		}
	}
	return ""
}

// supported refuses features that this driver doesn't know.
func (h *header) supported(path string) error {
	f := fieldError{path, "qcow2 header"}
	for bit := uint8(0); bit < 64; bit++ {
		if m := uint64(1) << bit; h.incompat&m != 0 && incompatKnown&m == 0 {
			return f.at(72, "incompatible_features", h.incompat,
				fmt.Sprintf("no unknown feature: bit %d %q", bit, h.knownFeature(0, bit)), image.ErrUnsupported)
		}
	}
	return nil
}

// accessible refuses an image of which not all was given that it consists of.
func (h *header) accessible(path string, o *OpenOptions) error {
	f := fieldError{path, "qcow2 header"}
	external := h.incompat&incompatDataFile != 0
	switch {
	case external && o.DataFile == nil:
		return f.at(72, "incompatible_features", h.incompat, "no external data file, as none was given", image.ErrUnsupported)
	case !external && o.DataFile != nil:
		return f.at(72, "incompatible_features", h.incompat, "the external data file bit, as one was given", image.ErrUnsupported)
	case h.crypt != 0 && o.Unlock == nil:
		return f.at(32, "crypt_method", h.crypt, "0, as there is no key for an encrypted image", image.ErrUnsupported)
	case h.crypt == 0 && o.Unlock != nil:
		return f.at(32, "crypt_method", h.crypt, "an encrypted image, as a key was given", image.ErrUnsupported)
	case h.backingOff != 0 && o.Backing == nil && !o.NoBacking:
		return f.at(8, "backing_file_offset", h.backing, "no backing file, as none was given", image.ErrUnsupported)
	case h.backingOff == 0 && o.Backing != nil:
		return f.at(8, "backing_file_offset", nil, "the name of a backing file, as one was given", image.ErrUnsupported)
	}
	return nil
}

// maintained are the autoclear features that stay true when this driver writes.
func (h *header) maintained() uint64 {
	if h.incompat&incompatDataFile != 0 {
		return autoclearBitmaps | autoclearRawData
	}
	return autoclearBitmaps
}

// rawData tells that the data file must read as the disk does.
func (h *header) rawData() bool {
	return h.incompat&incompatDataFile != 0 && h.autoclear&autoclearRawData != 0
}

// writable refuses what this driver can read but must not write.
func (h *header) writable(path string) error {
	f := fieldError{path, "qcow2 header"}
	switch {
	case h.incompat&incompatCorrupt != 0:
		return f.at(72, "incompatible_features", h.incompat,
			"the corrupt bit clear (see Repair)", image.ErrCorrupt)
	case h.incompat&incompatDirty != 0:
		return f.at(72, "incompatible_features", h.incompat,
			"the dirty bit clear (see Repair)", image.ErrUnsupported)
	case len(h.defects) > 0:
		return h.defects[0]
	case h.crypt == cryptAES:
		return f.at(32, "crypt_method", h.crypt,
			"no legacy AES encryption, which is read only", image.ErrUnsupported)
	case h.rawData() && h.backingOff != 0:
		return f.at(88, "autoclear_features", h.autoclear,
			"no raw data file beside a backing file", image.ErrUnsupported)
	}
	if _, ok := findExtension(h.exts, extBitmaps); !ok && h.autoclear&autoclearBitmaps != 0 {
		return f.at(88, "autoclear_features", h.autoclear,
			"a bitmaps extension, or the bitmaps bit clear", image.ErrCorrupt)
	}
	return nil
}
