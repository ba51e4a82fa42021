package qcow2

import "encoding/binary"

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

// countBitmaps counts the clusters of persistent bitmaps, if they are valid.
// Otherwise they are leaks, as for QEMU.
func (c *checker) countBitmaps() error {
	x, ok := findExtension(c.hdr.exts, extBitmaps)
	if !ok || c.hdr.autoclear&autoclearBitmaps == 0 {
		return nil
	}
	dir := parseBitmapsExt(x.Data)
	size := c.inUse << c.geo.bits
	report := func(format string, args ...any) {
		if c.first {
			c.bad("bitmaps", dir.off, format, args...)
		}
	}
	if dir.size > maxBitmapDir || dir.size > size || c.geo.checkTable(dir.off, dir.size) != "" || dir.off+dir.size > size {
		report("directory of %d bytes at %#x", dir.size, dir.off)
		return nil
	}
	c.refRange(dir.off, dir.size)
	b := make([]byte, dir.size)
	if err := readFile(c.file, b, dir.off); err != nil {
		return err
	}
	total, n := uint64(0), uint32(0)
	for ; len(b) >= bitmapHead; n++ {
		m := parseBitmap(b)
		if total += m.entries * 8; m.length > uint64(len(b)) || total > size ||
			c.geo.checkTable(m.off, m.entries*8) != "" || m.off+m.entries*8 > size {
			report("entry %d: table of %d entries at %#x", n, m.entries, m.off)
			return nil
		}
		if err := c.countBitmap(m, report); err != nil {
			return err
		}
		b = b[m.length:]
	}
	if n != dir.count || len(b) > 0 {
		report("directory of %d entries, want %d", n, dir.count)
	}
	return nil
}

func (c *checker) countBitmap(m bitmapEntry, report func(string, ...any)) error {
	c.refRange(m.off, m.entries*8)
	const step = 8192
	for i := uint64(0); i < m.entries; i += step {
		entries, err := c.readEntries(m.off+i*8, min(step, m.entries-i))
		if err != nil {
			return err
		}
		for _, e := range entries {
			off := e & entryOffset
			switch {
			case e&^entryOffset&^1 != 0, off != 0 && e&1 != 0, off&(c.geo.cs-1) != 0, off>>c.geo.bits >= c.inUse:
				report("table entry %#x", e)
			case off != 0:
				c.ref(off>>c.geo.bits, refStructure, 1)
			}
		}
		if err := c.ctx.Err(); err != nil {
			return err
		}
	}
	return nil
}

// maxBitmapDir and what follows are QEMU's limits (block/qcow2-bitmap.c).
const (
	maxBitmapDir = 65535 * 1024
	bitmapHead   = 24
)

// A bitmapEntry is an entry of the bitmap directory.
type bitmapEntry struct {
	off, entries uint64 // of the bitmap table
	length       uint64 // of this entry, with padding
}

func parseBitmap(b []byte) bitmapEntry {
	be := binary.BigEndian
	n := bitmapHead + uint64(be.Uint32(b[20:])) + uint64(be.Uint16(b[18:]))
	return bitmapEntry{be.Uint64(b), uint64(be.Uint32(b[8:])), (n + 7) &^ 7}
}
