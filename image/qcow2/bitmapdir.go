package qcow2

import (
	"encoding/binary"
	"slices"

	"nvstore.dev/image"
)

// Flags of a bitmap directory entry (docs/interop/qcow2.txt, "Bitmaps
// extension").
const (
	bitmapInUse = 1 << 0 // it wasn't saved: what it says may be wrong
	bitmapAuto  = 1 << 1 // writes are recorded in it
	bitmapKnown = bitmapInUse | bitmapAuto
)

// Limits of QEMU's implementation.
const (
	maxBitmaps      = 65535
	maxBitmapDir    = 65535 * 1024
	maxBitmapName   = 1023
	maxBitmapTable  = 0x8000000 // entries
	maxBitmapBytes  = 0x20000000
	bitmapHead      = 24
	bitmapType      = 1 // of dirty tracking bitmaps
	minBitmapBits   = 9 // of the granularity
	maxBitmapBits   = 31
	bitmapEntryOnes = 1 // a table entry: all ones, without a cluster
)

// A bitmapsExt is the bitmaps header extension.
type bitmapsExt struct {
	count     uint32
	size, off uint64 // of the directory
}

// parseBitmapsExt decodes the extension, whose length was checked.
func parseBitmapsExt(b []byte) bitmapsExt {
	be := binary.BigEndian
	return bitmapsExt{be.Uint32(b), be.Uint64(b[8:]), be.Uint64(b[16:])}
}

func (x bitmapsExt) encode() []byte {
	be := binary.BigEndian
	b := be.AppendUint32(nil, x.count)
	b = be.AppendUint32(b, 0)
	b = be.AppendUint64(b, x.size)
	return be.AppendUint64(b, x.off)
}

// A bitmap is an entry of the bitmap directory and, as far as it changed, the
// bitmap itself.
type bitmap struct {
	at           int64  // of the entry in the file
	off, entries uint64 // of the bitmap table
	flags        uint32
	bits         uint8 // of the granularity
	name         string

	table   []uint64          // as it is stored, once it was read
	changed map[uint64][]byte // clusters of the bitmap that changed since
}

func (m *bitmap) inconsistent() bool { return m.flags&bitmapInUse != 0 }

// records tells that writes are recorded in it.
func (m *bitmap) records() bool { return m.flags&bitmapKnown == bitmapAuto }

// parseBitmaps reads the directory. With an error it returns what comes before.
func (im *Image) parseBitmaps(b []byte, dir bitmapsExt) (list []*bitmap, err error) {
	f := fieldError{im.path, "qcow2 bitmap directory"}
	size, total := im.fileEnd(), uint64(0)
	names := make(map[string]bool)
	at := dir.off
	for len(b) > 0 {
		if len(b) < bitmapHead {
			return list, f.at(int64(at), "", len(b), "a whole entry", image.ErrCorrupt)
		}
		m, n, err := parseBitmap(b, int64(at), f)
		if err != nil {
			return list, err
		}
		total += m.entries * 8
		switch {
		case m.off == 0 || im.geo.checkTable(m.off, m.entries*8) != "" || m.off+m.entries*8 > size || total > size:
			return list, f.at(m.at, "bitmap_table_offset", m.off, "a table inside the file", image.ErrCorrupt)
		case !m.inconsistent() && m.entries < im.bitmapTable(m.bits, im.hdr.size):
			return list, f.at(m.at+8, "bitmap_table_size", m.entries, "a table for the whole disk", image.ErrCorrupt)
		case names[m.name]:
			return list, f.at(m.at+bitmapHead, "name", m.name, "no two bitmaps of one name", image.ErrCorrupt)
		}
		names[m.name] = true
		list = append(list, m)
		b, at = b[n:], at+n
	}
	if uint64(len(list)) != uint64(dir.count) {
		return list, f.at(int64(dir.off), "", len(list), "as many entries as the header says", image.ErrCorrupt)
	}
	return list, nil
}

// parseBitmap reads the entry that b begins with, and returns its length.
func parseBitmap(b []byte, at int64, f fieldError) (*bitmap, uint64, error) {
	be := binary.BigEndian
	name, extra := uint64(be.Uint16(b[18:])), uint64(be.Uint32(b[20:]))
	n := (bitmapHead + extra + name + 7) &^ 7
	m := &bitmap{at: at, off: be.Uint64(b), entries: uint64(be.Uint32(b[8:])),
		flags: be.Uint32(b[12:]), bits: b[17]}
	switch {
	case n > uint64(len(b)):
		return nil, 0, f.at(at, "", n, "an entry inside the directory", image.ErrCorrupt)
	case m.entries == 0 || m.entries > maxBitmapTable:
		return nil, 0, f.at(at+8, "bitmap_table_size", m.entries, "1 to 0x8000000", image.ErrCorrupt)
	case m.flags&^bitmapKnown != 0:
		return nil, 0, f.at(at+12, "flags", m.flags, "no flags but in_use and auto", image.ErrUnsupported)
	case b[16] != bitmapType:
		return nil, 0, f.at(at+16, "type", b[16], "1, a dirty tracking bitmap", image.ErrUnsupported)
	case m.bits < minBitmapBits || m.bits > maxBitmapBits:
		return nil, 0, f.at(at+17, "granularity_bits", m.bits, "9 to 31", image.ErrCorrupt)
	case name == 0 || name > maxBitmapName:
		return nil, 0, f.at(at+18, "name_size", name, "1 to 1023", image.ErrCorrupt)
	case extra != 0:
		return nil, 0, f.at(at+20, "extra_data_size", extra, "0", image.ErrUnsupported)
	}
	m.name = string(b[bitmapHead:][:name])
	return m, n, nil
}

func (m *bitmap) append(b []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint64(b, m.off)
	b = be.AppendUint32(b, uint32(m.entries))
	b = be.AppendUint32(b, m.flags)
	b = append(b, bitmapType, m.bits)
	b = be.AppendUint16(b, uint16(len(m.name)))
	b = be.AppendUint32(b, 0)
	b = append(b, m.name...)
	return append(b, make([]byte, -len(m.name)&7)...)
}

// bitmapTable returns how many clusters a bitmap of a disk of size bytes takes.
func (im *Image) bitmapTable(bits uint8, size uint64) uint64 {
	granules := size >> bits
	if size&(1<<bits-1) != 0 {
		granules++
	}
	return max(1, im.geo.clusters((granules+7)/8))
}

// loadBitmaps reads the directory, if there is one, and the tables.
func (im *Image) loadBitmaps() error {
	im.bitmaps = nil
	x, ok := findExtension(im.hdr.exts, extBitmaps)
	if !ok || im.hdr.autoclear&autoclearBitmaps == 0 {
		return nil
	}
	f := fieldError{im.path, "qcow2 bitmaps extension"}
	dir := parseBitmapsExt(x.Data)
	switch {
	case binary.BigEndian.Uint32(x.Data[4:]) != 0:
		return f.at(-1, "reserved", binary.BigEndian.Uint32(x.Data[4:]), "0", image.ErrCorrupt)
	case dir.count == 0 || dir.count > maxBitmaps:
		return f.at(-1, "nb_bitmaps", dir.count, "1 to 65535", image.ErrCorrupt)
	case dir.size > maxBitmapDir:
		return f.at(-1, "bitmap_directory_size", dir.size, "at most 1024 bytes a bitmap", image.ErrCorrupt)
	case dir.off == 0 || im.geo.checkTable(dir.off, dir.size) != "" || dir.off+dir.size > im.fileEnd():
		return f.at(-1, "bitmap_directory_offset", dir.off, "a directory inside the file", image.ErrCorrupt)
	}
	b := make([]byte, dir.size)
	if err := readFile(im.file, b, dir.off); err != nil {
		return err
	}
	list, err := im.parseBitmaps(b, dir)
	if err != nil {
		return err
	}
	for _, m := range list {
		if err := im.loadBitmap(m); err != nil {
			return err
		}
	}
	im.bitmaps = list
	return nil
}

// loadBitmap reads a bitmap table.
func (im *Image) loadBitmap(m *bitmap) (err error) {
	if m.table, err = im.readEntries(m.off, m.entries); err != nil {
		return err
	}
	for i, e := range m.table {
		if im.badBitmapEntry(e) {
			return fieldError{im.path, "qcow2 bitmap table"}.at(int64(m.off)+int64(i)*8, "", e,
				"a cluster of the file, all ones or all zeros", image.ErrCorrupt)
		}
	}
	return nil
}

func (im *Image) badBitmapEntry(e uint64) bool {
	off := e & entryOffset
	return e&^entryOffset&^bitmapEntryOnes != 0 || off != 0 && e&bitmapEntryOnes != 0 ||
		off&(im.geo.cs-1) != 0 || off >= im.fileEnd()
}

// addBitmapMeta enters what bitmaps take.
func (im *Image) addBitmapMeta(add metaAdder) error {
	if len(im.bitmaps) == 0 {
		return nil
	}
	f := fieldError{im.path, "qcow2 bitmap directory"}
	x, _ := findExtension(im.hdr.exts, extBitmaps)
	dir := parseBitmapsExt(x.Data)
	if err := add(dir.off, dir.size, metaBitmap, f, int64(dir.off), ""); err != nil {
		return err
	}
	for _, m := range im.bitmaps {
		if err := add(m.off, m.entries*8, metaBitmap, f, m.at, "bitmap_table_offset"); err != nil {
			return err
		}
		for i, e := range m.table {
			if off := e & entryOffset; off != 0 {
				at := int64(m.off) + int64(i)*8
				if err := add(off, im.geo.cs, metaBitmap, fieldError{im.path, "qcow2 bitmap table"}, at, ""); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// setBitmapsExt makes the header's extension x. It goes to the front, so that it
// lies in the first sector from then on.
func (h *header) setBitmapsExt(x bitmapsExt) {
	exts := slices.DeleteFunc(slices.Clone(h.exts), func(x Extension) bool { return x.Type == extBitmaps })
	h.autoclear &^= autoclearBitmaps
	if x.count > 0 {
		exts = append([]Extension{{extBitmaps, x.encode()}}, exts...)
		h.autoclear |= autoclearBitmaps
	}
	h.exts, h.moved = exts, true
}
