package qcow2

import (
	"context"
	"encoding/binary"
	"maps"
	"slices"

	"nvstore.dev/image"
)

// metaDirty tells whether a mapping is in memory only. Refcounts that are in
// memory only are either those of new mappings, or leaks.
func (im *Image) metaDirty() bool {
	return len(im.l2c.dirty) > 0 || len(im.l1Dirty) > 0
}

// Sync makes everything written so far durable, with one Sync of the file, or
// two where new clusters or tables ask for it (see the package comment).
func (im *Image) Sync() error {
	if done, err := im.syncData(); done {
		return err
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.usable(true); err != nil {
		return err
	}
	return im.flush()
}

// syncData is the case without dirty metadata, in which readers and writers go
// on.
func (im *Image) syncData() (done bool, err error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if im.ro {
		return true, im.usable(false)
	}
	if err := im.usable(true); err != nil {
		return true, err
	}
	if im.metaDirty() {
		return false, nil
	}
	return true, im.syncFile()
}

// flush makes data and mappings durable, in the order that the package comment
// gives, and then applies the frees.
func (im *Image) flush() error {
	if !im.metaDirty() {
		return im.syncFile()
	}
	if im.ordered {
		if err := im.flushNew(); err != nil {
			return err
		}
	}
	// What refers to it, or to less than before.
	if err := im.writeTables(im.l2c, metaL2); err != nil {
		return err
	}
	if err := im.writeL1Sectors(); err != nil {
		return err
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	return im.applyFrees()
}

// flushNew makes durable what nothing refers to yet: data, which is in the file
// already, refcounts, new L2 tables.
func (im *Image) flushNew() error {
	if err := im.writeTables(im.rbc, metaRefblock); err != nil {
		return err
	}
	for _, t := range im.l2c.dirtyTables() {
		if !t.fresh {
			continue
		}
		if err := im.writeTable(im.l2c, t, metaL2); err != nil {
			return err
		}
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	im.ordered = false
	im.settleSpare()
	return nil
}

// flushAll also writes the refcounts of what was freed, without a Sync: at
// worst they are leaks after a crash.
func (im *Image) flushAll() error {
	if im.metaDirty() {
		if err := im.flush(); err != nil {
			return err
		}
	}
	if err := im.releaseSpare(); err != nil {
		return err
	}
	return im.writeTables(im.rbc, metaRefblock)
}

// writeTable writes the dirty part of one table.
func (im *Image) writeTable(c *cache, t *table, k metaKind) error {
	if err := im.guard(t.off, uint64(len(t.buf)), k); err != nil {
		return im.poison(err)
	}
	if err := im.writeFile(t.buf[t.lo:t.hi], t.off+uint64(t.lo)); err != nil {
		return err
	}
	c.clean(t)
	t.fresh = false
	return nil
}

func (im *Image) writeTables(c *cache, k metaKind) error {
	for _, t := range c.dirtyTables() {
		if err := im.writeTable(c, t, k); err != nil {
			return err
		}
	}
	return nil
}

// touchL1 sets an L1 entry in memory.
func (im *Image) touchL1(i, e uint64) {
	im.l1[i] = e
	im.l1Dirty[int(i*8/sector)] = struct{}{}
}

// writeL1Sectors writes the changed sectors of the active L1 table in place.
func (im *Image) writeL1Sectors() error {
	for _, s := range slices.Sorted(maps.Keys(im.l1Dirty)) {
		if err := im.writeEntries(im.l1, im.hdr.l1Off, uint64(s), metaL1); err != nil {
			return err
		}
	}
	clear(im.l1Dirty)
	return nil
}

// writeEntries writes sector s of a table at off: a whole one, which can't be
// torn. What follows the table in its last sector is unused.
func (im *Image) writeEntries(t []uint64, off, s uint64, k metaKind) error {
	var b [sector]byte
	first := s * (sector / 8)
	copy(b[:], encodeEntries(t[first:min(first+sector/8, uint64(len(t)))]))
	off += s * sector
	if err := im.guard(off, sector, k); err != nil {
		return im.poison(err)
	}
	return im.writeFile(b[:], off)
}

func encodeEntries(t []uint64) []byte {
	b := make([]byte, 0, len(t)*8)
	for _, e := range t {
		b = binary.BigEndian.AppendUint64(b, e)
	}
	return b
}

// makeRoom makes sure that the next table fits in c.
func (im *Image) makeRoom(c *cache) error {
	t := c.oldest()
	if t == nil {
		return nil
	}
	if t.dirty() {
		var err error
		switch {
		case c == im.rbc:
			// Refcounts may be written at any time: raised ones
			// before they are needed, lowered ones after.
			err = im.writeTable(c, t, metaRefblock)
		case t.fresh:
			err = im.writeTable(c, t, metaL2)
		default:
			err = im.flush()
		}
		if err != nil {
			return err
		}
	}
	c.drop(t.off)
	return nil
}

// verify is Check with errors as a reason not to write.
func (im *Image) verify() error {
	r, err := im.check(context.Background(), nil)
	if err != nil {
		return err
	}
	for _, f := range r.Findings {
		if f.Error {
			return fieldError{im.path, "qcow2 image"}.at(f.Where, f.Code, nil, f.Message, image.ErrCorrupt)
		}
	}
	return nil
}
