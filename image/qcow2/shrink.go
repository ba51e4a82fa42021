package qcow2

// shrink makes the disk end at size: what lies behind it loses its references,
// a VM's state that isn't in a snapshot included. The rest of the last cluster
// stays, and reads as zeros should the disk grow again.
func (im *Image) shrink(size uint64) error {
	h, g := im.hdr, &im.geo
	old, off := im.l1, h.l1Off
	n := g.l1Entries(size)
	l1 := append([]uint64(nil), old[:n]...)
	if in := size & (1<<(g.bits+g.l2Bits) - 1); in != 0 {
		if err := im.cutTable(l1, n-1, g.clusters(in)); err != nil {
			return err
		}
	}
	if err := im.newL1(l1); err != nil {
		return err
	}
	h.size = size
	if err := im.dropTables(old[n:]); err != nil {
		return err
	}
	return im.releaseL1(off, uint64(len(old)))
}

// cutTable gives L1 entry i a copy of its L2 table without the entries from
// first on.
func (im *Image) cutTable(l1 []uint64, i, first uint64) error {
	g := &im.geo
	return im.eachTable(l1[i:i+1], func(_ int, off uint64, t []byte) error {
		rest := t[first*g.entrySize():]
		if err := im.addData(rest, off+first*g.entrySize(), -1); err != nil {
			return err
		}
		for _, b := range rest {
			if b != 0 {
				clear(rest)
				at, err := im.newTable(t, metaL2)
				if err != nil {
					return err
				}
				l1[i] = at | flagCopied
				return im.release(off >> g.bits)
			}
		}
		return nil
	})
}
