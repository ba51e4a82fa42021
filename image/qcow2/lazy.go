package qcow2

// lazy tells that refcounts may be written late: the dirty bit says so, and
// whoever opens the image after a crash makes them anew (see Repair).
func (im *Image) lazy() bool { return im.hdr.compat&compatLazyRefcounts != 0 }

// markDirty sets the dirty bit, durably, before the first mapping whose refcount
// may not be. The header in memory learns of it in writeHeader: requests for
// data, which get here, don't change it.
func (im *Image) markDirty() error {
	if im.marked {
		return nil
	}
	b := im.sector0
	b[79] |= incompatDirty
	if err := im.writeFile(b[:], 0); err != nil {
		return err
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	im.marked = true
	return nil
}

// markClean makes refcounts durable and takes the dirty bit back.
func (im *Image) markClean() error {
	if !im.marked {
		return nil
	}
	if err := im.syncAll(); err != nil {
		return err
	}
	im.marked = false
	im.hdr.incompat &^= incompatDirty
	return im.writeHeader()
}
