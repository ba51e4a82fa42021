package qcow2

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
		c.badBitmaps = true
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
	list, err := c.parseBitmaps(b, dir)
	for _, m := range list {
		if err := c.countBitmap(m, report); err != nil {
			return err
		}
	}
	if err != nil {
		report("%v", err)
	}
	return nil
}

func (c *checker) countBitmap(m *bitmap, report func(string, ...any)) error {
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
