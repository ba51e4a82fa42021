package qcow2

import (
	"encoding/binary"
	"fmt"

	"nvstore.dev/image"
)

// CreateOptions are the options of Create. Nil means the zero value: an empty
// version 3 image of 64 KiB clusters.
type CreateOptions struct {
	// Size is the virtual size in bytes, a multiple of 512.
	Size int64

	// ClusterSize is a power of two from 512 to 2 MiB; 0 means 64 KiB.
	ClusterSize int

	// Version is 2 or 3; 0 means 3.
	Version int

	// RefcountBits is the width of a reference count: 1, 2, 4, 8, 16, 32
	// or 64; 0 means 16, which is all that version 2 has. It limits how
	// many snapshots may share a cluster.
	RefcountBits int

	// ExtendedL2 divides each cluster, which must be of 16 KiB or more, in
	// 32 subclusters. It needs version 3.
	ExtendedL2 bool

	// Compression is how WriteCompressed compresses: "deflate", which is
	// also what "" means, or "zstd", which needs version 3.
	Compression string

	// BackingFile and BackingFormat are names for the header. They are
	// never opened; what they refer to is Backing, which may be nil. Where
	// Size is 0, the size is Backing's, rounded up to 512.
	BackingFile, BackingFormat string
	Backing                    image.Device

	// DataFile is the name of an external data file, which needs version 3,
	// and Data the file itself. With DataFileRaw it reads as the disk does
	// at any time; what it holds already is kept then.
	DataFile    string
	Data        image.Device
	DataFileRaw bool

	// Crypt makes an image that is encrypted with LUKS.
	Crypt *Crypt

	// Preallocation is of the whole disk. A raw data file has its metadata
	// allocated at least.
	Preallocation Preallocation

	// Extensions are header extensions to add behind QEMU's own.
	Extensions []Extension

	// Path is the file's name for error messages. It is never opened.
	Path string
}

// Crypt tells how to make an encrypted image.
type Crypt struct {
	// HeaderSize is that of the encryption header, in bytes, at most 64 MiB.
	HeaderSize int64

	// Format writes it to header, a window of HeaderSize bytes that read as
	// zeros, and returns the cipher of the data.
	Format func(header image.Device) (image.SectorCipher, error)
}

// Create makes a new image in file, whose old content is lost, and opens it
// for writing. The layout is QEMU's: header, refcount table, refcount blocks,
// L1 table. The header is written last, so that a crash leaves no image that
// is whole in appearance only. On error the caller keeps file, backing file and
// data file.
func Create(file image.Device, opts *CreateOptions) (*Image, error) {
	var o CreateOptions
	if opts != nil {
		o = *opts
	}
	opts = &o
	h, err := opts.header()
	if err != nil {
		return nil, err
	}
	var crypt uint64
	if opts.Crypt != nil {
		crypt = uint64(opts.Crypt.HeaderSize)
	}
	l := newLayout(h, crypt)
	if err := l.prepare(file); err != nil {
		return nil, err
	}
	open := &OpenOptions{Path: opts.Path, DataFile: opts.Data,
		Backing: opts.Backing, NoBacking: opts.BackingFile != "" && opts.Backing == nil}
	if opts.Crypt != nil {
		cipher, err := l.formatCrypt(file, opts.Crypt)
		if err != nil {
			return nil, err
		}
		open.Unlock = func(image.Device, int) (image.SectorCipher, error) { return cipher, nil }
	}
	if err := l.write(file); err != nil {
		return nil, err
	}
	im, err := Open(file, open)
	if err != nil {
		return nil, err
	}
	if opts.DataFileRaw {
		opts.Preallocation = max(opts.Preallocation, PreallocMetadata)
	}
	if err := im.preallocate(0, im.Size(), opts.Preallocation); err != nil {
		return nil, err
	}
	return im, nil
}

// header turns the options into a header without offsets.
func (o *CreateOptions) header() (*header, error) {
	bad := func(field string, got any, want string) error {
		return fieldError{o.Path, "qcow2 create options"}.at(-1, field, got, want, image.ErrOutOfRange)
	}
	h := &header{version: 3, clusterBits: 16, refOrder: 4, headerLen: headerLenNew,
		tail: make([]byte, headerLenNew-headerLenV3-1)}
	if o.Version == 2 {
		h.version, h.headerLen, h.tail = 2, headerLenV2, nil
	} else if o.Version != 0 && o.Version != 3 {
		return nil, bad("Version", o.Version, "2 or 3")
	}
	if o.ClusterSize != 0 {
		if h.clusterBits = log2(o.ClusterSize); h.clusterBits < minClusterBits || h.clusterBits > maxClusterBits {
			return nil, bad("ClusterSize", o.ClusterSize, "a power of two from 512 to 2097152")
		}
	}
	if o.RefcountBits != 0 {
		if h.refOrder = log2(o.RefcountBits); h.refOrder > 6 || h.version == 2 && h.refOrder != 4 {
			return nil, bad("RefcountBits", o.RefcountBits, "a power of two up to 64, 16 in version 2")
		}
	}
	if err := o.features(h, bad); err != nil {
		return nil, err
	}
	if o.Size < 0 || o.Size%sector != 0 {
		return nil, bad("Size", o.Size, "a multiple of 512")
	}
	if h.size = uint64(o.Size); h.size == 0 && o.Backing != nil {
		h.size = (uint64(o.Backing.Size()) + sector - 1) &^ (sector - 1)
	}
	g := newGeometry(h)
	if n := g.l1Entries(h.size); n > maxL1Bytes/8 {
		return nil, bad("Size", o.Size, "an L1 table of at most 32 MiB; use larger clusters")
	} else {
		h.l1Size = uint32(n)
	}
	o.extensions(h)
	for _, x := range o.Extensions {
		if x.Type == extEnd || knownExtension(x.Type) {
			return nil, bad("Extensions", x.Type, "a type of the caller's own")
		}
		h.exts = append(h.exts, x)
	}
	b, err := h.encode()
	if err != nil {
		return nil, bad("Extensions", nil, "room in the header cluster")
	}
	if h.backing = o.BackingFile; h.backing != "" {
		h.backingOff, h.backingSize = uint64(len(b)), uint32(len(h.backing))
		if h.backingOff+uint64(h.backingSize) > h.clusterSize() {
			return nil, bad("BackingFile", len(h.backing), "room in the header cluster")
		}
	}
	return h, nil
}

// features sets what has a bit in the header.
func (o *CreateOptions) features(h *header, bad func(string, any, string) error) error {
	if h.version < 3 && (o.ExtendedL2 || o.Compression == "zstd" || o.DataFile != "") {
		return bad("Version", h.version, "3, for ExtendedL2, zstd and DataFile")
	}
	if o.ExtendedL2 {
		if h.clusterBits < extendedMinBits {
			return bad("ClusterSize", 1<<h.clusterBits, "at least 16384, with ExtendedL2")
		}
		h.incompat |= incompatExtendedL2
	}
	switch o.Compression {
	case "", "deflate":
	case "zstd":
		h.incompat |= incompatCompression
		h.compression = 1
	default:
		return bad("Compression", o.Compression, "deflate or zstd")
	}
	switch {
	case (o.DataFile != "") != (o.Data != nil):
		return bad("DataFile", o.DataFile, "a name together with Data")
	case o.DataFileRaw && o.DataFile == "":
		return bad("DataFileRaw", nil, "a DataFile")
	case o.DataFileRaw && o.Crypt != nil:
		return bad("DataFileRaw", nil, "no Crypt: what is raw reads as the disk does")
	case o.DataFileRaw && o.BackingFile != "":
		return bad("DataFileRaw", nil, "no BackingFile")
	case o.DataFile != "":
		h.incompat |= incompatDataFile
		if o.DataFileRaw {
			h.autoclear |= autoclearRawData
		}
	}
	switch {
	case o.Preallocation < PreallocOff || o.Preallocation > PreallocFull:
		return bad("Preallocation", int(o.Preallocation), "one of the constants")
	case o.Preallocation != PreallocOff && o.BackingFile != "" && !o.ExtendedL2:
		return bad("Preallocation", int(o.Preallocation), "ExtendedL2, with a BackingFile")
	case len(o.BackingFile) > maxBackingName:
		return bad("BackingFile", len(o.BackingFile), "at most 1023 bytes")
	case len(o.BackingFormat) > maxBackingFormat:
		return bad("BackingFormat", o.BackingFormat, "at most 15 bytes")
	case o.BackingFile == "" && (o.BackingFormat != "" || o.Backing != nil):
		return bad("BackingFile", nil, "a name for Backing and BackingFormat")
	}
	if c := o.Crypt; c != nil {
		if c.HeaderSize <= 0 || c.HeaderSize > maxCryptHeader {
			return bad("Crypt.HeaderSize", c.HeaderSize, "1 to 67108864")
		}
		h.crypt = cryptLUKS
	}
	return nil
}

// extensions adds QEMU's own, in its order.
func (o *CreateOptions) extensions(h *header) {
	if o.BackingFormat != "" {
		h.exts = append(h.exts, Extension{extBackingFormat, []byte(o.BackingFormat)})
	}
	if o.DataFile != "" {
		h.exts = append(h.exts, Extension{extDataFile, []byte(o.DataFile)})
	}
	if o.Crypt != nil {
		h.exts = append(h.exts, Extension{extEncryption, make([]byte, 16)})
	}
	if h.version == 3 && h.clusterSize() > 4096 {
		h.exts = append(h.exts, featureTable())
	}
}

// log2 returns the exponent of a power of two, or 99.
func log2(n int) uint32 {
	for i := uint32(0); i < 31; i++ {
		if n == 1<<i {
			return i
		}
	}
	return 99
}

// A layout is where the parts of a new image go, in clusters.
type layout struct {
	h                         *header
	g                         geometry
	reftable, blocks, l1, end uint64
}

func newLayout(h *header, crypt uint64) *layout {
	l := &layout{h: h, g: newGeometry(h)}
	nl1 := l.g.clusters(uint64(h.l1Size) * 8)
	ncrypt := l.g.clusters(crypt)
	perTable, perBlock := l.g.cs/8, uint64(1)<<l.g.rbBits
	tables, blocks := uint64(1), uint64(1)
	for {
		end := 1 + tables + blocks + nl1 + ncrypt
		b := (end + perBlock - 1) / perBlock
		t := (b + perTable - 1) / perTable
		if b <= blocks && t <= tables {
			break
		}
		tables, blocks = max(t, tables), max(b, blocks)
	}
	l.reftable, l.blocks = 1, 1+tables
	l.l1 = l.blocks + blocks
	l.end = l.l1 + nl1 + ncrypt
	h.reftableOff, h.reftableClusters = l.reftable<<l.g.bits, uint32(tables)
	if nl1 > 0 {
		h.l1Off = l.l1 << l.g.bits
	}
	for _, x := range h.exts {
		if x.Type == extEncryption {
			binary.BigEndian.PutUint64(x.Data, (l.l1+nl1)<<l.g.bits)
			binary.BigEndian.PutUint64(x.Data[8:], crypt)
		}
	}
	return l
}

// formatCrypt makes the encryption header.
func (l *layout) formatCrypt(file image.Device, c *Crypt) (image.SectorCipher, error) {
	off, n, err := l.h.cryptHeader("", uint64(file.Size()))
	if err != nil {
		return nil, err
	}
	w, err := image.Window(borrowed{file}, int64(off), int64(n))
	if err != nil {
		return nil, err
	}
	return c.Format(w)
}

// prepare empties the file and makes room, or zeroes what will be used where
// the file has a fixed size.
func (l *layout) prepare(file image.Device) error {
	size := int64(l.end << l.g.bits)
	r, ok := image.As[image.Resizer](file)
	if ok && r.Resize(0) == nil {
		return r.Resize(size)
	}
	if file.Size() < size {
		return fmt.Errorf("qcow2: creating an image: %d bytes are missing: %w", size-file.Size(), image.ErrNoSpace)
	}
	// The old header goes first and durably: it must not describe new
	// tables.
	zero := make([]byte, min(size, 1<<20))
	if _, err := file.WriteAt(zero[:sector], 0); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	for off := int64(0); off < size; off += int64(len(zero)) {
		if _, err := file.WriteAt(zero[:min(int64(len(zero)), size-off)], off); err != nil {
			return err
		}
	}
	return nil
}

func (l *layout) write(file image.Device) error {
	blocks := l.l1 - l.blocks
	table := make([]byte, blocks*8)
	block := make([]byte, l.g.cs)
	for i := uint64(0); i < blocks; i++ {
		off := (l.blocks + i) << l.g.bits
		binary.BigEndian.PutUint64(table[i*8:], off)
		clear(block)
		for c := uint64(0); c < 1<<l.g.rbBits && i<<l.g.rbBits+c < l.end; c++ {
			putRefcount(block, l.g.refOrder, c, 1)
		}
		if _, err := file.WriteAt(block, int64(off)); err != nil {
			return err
		}
	}
	if _, err := file.WriteAt(table, int64(l.h.reftableOff)); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	b, err := l.h.encode()
	if err != nil {
		return err
	}
	if _, err := file.WriteAt(b, 0); err != nil {
		return err
	}
	return file.Sync()
}
