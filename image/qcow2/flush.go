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
	im.mu.RLock()
	defer im.mu.RUnlock()
	if im.ro {
		return im.usable(false)
	}
	if err := im.usable(true); err != nil {
		return err
	}
	im.change.Lock()
	if !im.metaDirty() {
		im.change.Unlock()
		return im.syncAll()
	}
	defer im.change.Unlock()
	return im.flushShared()
}

// syncAll makes what is in the files durable.
func (im *Image) syncAll() error {
	if err := im.syncData(); err != nil {
		return err
	}
	return im.syncFile()
}

// flush makes data and mappings durable, in the order that the package comment
// gives, and then applies the frees.
func (im *Image) flush() error {
	if err := im.flushTables(); err != nil {
		return err
	}
	return im.applyFrees()
}

// flushShared is flush for who holds change alone: all but allocating writes
// and the like go on meanwhile.
func (im *Image) flushShared() error {
	if err := im.flushTables(); err != nil {
		return err
	}
	im.tab.Lock()
	defer im.tab.Unlock()
	return im.applyFrees()
}

// flushTables only reads the tables, apart from their marks that it guards.
func (im *Image) flushTables() error {
	if !im.metaDirty() {
		return im.syncAll()
	}
	if err := im.syncData(); err != nil {
		return err
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
	// From here on, L1 entries may be durable even of tables that are still
	// as empty as their place in the file.
	for _, t := range im.newL2s {
		t.fresh = false
	}
	im.newL2s = nil
	if err := im.writeL1Sectors(); err != nil {
		return err
	}
	return im.syncFile()
}

// flushNew makes durable what nothing refers to yet: data, which is in the file
// already, refcounts, new L2 tables.
func (im *Image) flushNew() error {
	var err error
	if im.lazy() {
		err = im.markDirty()
	} else {
		err = im.writeTables(im.rbc, metaRefblock)
	}
	if err != nil {
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
	} else if err := im.applyFrees(); err != nil {
		return err // what requests that are over kept from it
	}
	if err := im.releaseSpare(); err != nil {
		return err
	}
	return im.writeTables(im.rbc, metaRefblock)
}

// flushAside is flushAll for who holds mu for writing and not reads. Requests
// that read wait only until those are over that are under way: then nothing
// keeps a freed cluster any more.
func (im *Image) flushAside() error {
	if im.metaDirty() {
		if err := im.flushTables(); err != nil {
			return err
		}
	}
	im.reads.Lock()
	err := im.applyFrees()
	im.reads.Unlock()
	if err != nil {
		return err
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
	return im.firstError(r)
}

// firstError makes an error of the first error that Check found.
func (im *Image) firstError(r *CheckResult) error {
	for _, f := range r.Findings {
		if f.Error {
			return fieldError{im.path, "qcow2 image"}.at(f.Where, f.Code, nil, f.Message, image.ErrCorrupt)
		}
	}
	return nil
}
