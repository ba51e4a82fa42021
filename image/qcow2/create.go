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

	// Extensions are header extensions to add behind QEMU's own.
	Extensions []Extension

	// Path is the file's name for error messages. It is never opened.
	Path string
}

// Create makes a new image in file, whose old content is lost, and opens it
// for writing. The layout is QEMU's: header, refcount table, refcount blocks,
// L1 table. The header is written last, so that a crash leaves no image that
// is whole in appearance only. On error the caller keeps file.
func Create(file image.Device, opts *CreateOptions) (*Image, error) {
	if opts == nil {
		opts = &CreateOptions{}
	}
	h, err := opts.header()
	if err != nil {
		return nil, err
	}
	l := newLayout(h)
	if err := l.prepare(file); err != nil {
		return nil, err
	}
	if err := l.write(file); err != nil {
		return nil, err
	}
	return Open(file, &OpenOptions{Path: opts.Path})
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
	if o.Size < 0 || o.Size%sector != 0 {
		return nil, bad("Size", o.Size, "a multiple of 512")
	}
	h.size = uint64(o.Size)
	g := newGeometry(h)
	if n := g.l1Entries(h.size); n > maxL1Bytes/8 {
		return nil, bad("Size", o.Size, "an L1 table of at most 32 MiB; use larger clusters")
	} else {
		h.l1Size = uint32(n)
	}
	if h.version == 3 && h.clusterSize() > 4096 {
		h.exts = append(h.exts, featureTable())
	}
	for _, x := range o.Extensions {
		if x.Type == extEnd || knownExtension(x.Type) {
			return nil, bad("Extensions", x.Type, "a type of the caller's own")
		}
		h.exts = append(h.exts, x)
	}
	if _, err := h.encode(); err != nil {
		return nil, bad("Extensions", nil, "room in the header cluster")
	}
	return h, nil
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

func newLayout(h *header) *layout {
	l := &layout{h: h, g: newGeometry(h)}
	nl1 := l.g.clusters(uint64(h.l1Size) * 8)
	perTable, perBlock := l.g.cs/8, uint64(1)<<l.g.rbBits
	tables, blocks := uint64(1), uint64(1)
	for {
		end := 1 + tables + blocks + nl1
		b := (end + perBlock - 1) / perBlock
		t := (b + perTable - 1) / perTable
		if b <= blocks && t <= tables {
			break
		}
		tables, blocks = max(t, tables), max(b, blocks)
	}
	l.reftable, l.blocks = 1, 1+tables
	l.l1 = l.blocks + blocks
	l.end = l.l1 + nl1
	h.reftableOff, h.reftableClusters = l.reftable<<l.g.bits, uint32(tables)
	if nl1 > 0 {
		h.l1Off = l.l1 << l.g.bits
	}
	return l
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
