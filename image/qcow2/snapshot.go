package qcow2

import (
	"fmt"
	"slices"
	"strconv"

	"nvstore.dev/image"
)

// Snapshots returns the image's internal snapshots. Changing them reads all
// mapping tables and rewrites those that change. Requests that read go on
// meanwhile; others wait.
func (im *Image) Snapshots() image.SnapshotSet { return snapshotSet{im} }

type snapshotSet struct{ im *Image }

// List returns the snapshots in the order of the table.
func (s snapshotSet) List() ([]image.Snapshot, error) {
	s.im.mu.RLock()
	defer s.im.mu.RUnlock()
	if err := s.im.usable(false); err != nil {
		return nil, err
	}
	return s.im.listSnapshots(), nil
}

func (im *Image) listSnapshots() []image.Snapshot {
	out := make([]image.Snapshot, 0, len(im.snaps))
	for _, s := range im.snaps {
		out = append(out, image.Snapshot{
			ID: s.id, Name: s.name, Seconds: int64(s.sec), Nanoseconds: int64(s.nsec),
			VMStateSize: int64(s.vmState()), VMClock: int64(s.clock),
			DiskSize: int64(s.diskSize(im.hdr.size)), ICount: s.iCount(),
		})
	}
	return out
}

// Create takes a snapshot of the disk, without a VM's state. The name, 1 to
// 255 bytes, must be no ID or name of another.
func (s snapshotSet) Create(name string) error {
	return s.im.TakeSnapshot(&SnapshotSpec{Name: name})
}

// Revert makes the disk what it was when the snapshot was taken, its size
// included. What was written since, and is in no snapshot, is lost. Bitmaps that
// record writes take all of the disk for dirty then.
func (s snapshotSet) Revert(tag string) error {
	im := s.im
	return im.changeSnapshot(tag, im.revertSnapshot, func() {
		im.size.Store(int64(im.hdr.size &^ (sector - 1)))
	})
}

// Delete removes a snapshot.
func (s snapshotSet) Delete(tag string) error {
	return s.im.changeSnapshot(tag, s.im.deleteSnapshot, nil)
}

// changeSnapshot calls done when change is durable.
func (im *Image) changeSnapshot(tag string, change func(i int) error, done func()) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.usable(true); err != nil {
		return err
	}
	i := im.findSnapshot(tag)
	if i < 0 {
		return fmt.Errorf("qcow2: snapshot %q: %w", tag, image.ErrNotFound)
	}
	return im.restructureAside(func() error { return change(i) }, func() {
		im.unpacked.reset()
		if done != nil {
			done()
		}
	})
}

// findSnapshot looks for an ID first, then for a name.
func (im *Image) findSnapshot(tag string) int {
	if i := slices.IndexFunc(im.snaps, func(s *snapshot) bool { return s.id == tag }); i >= 0 {
		return i
	}
	return slices.IndexFunc(im.snaps, func(s *snapshot) bool { return s.name == tag })
}

// nextID is one more than the largest number among the IDs, as QEMU has it.
func (im *Image) nextID() string {
	var top uint64
	for _, s := range im.snaps {
		digits := s.id
		for i, c := range digits {
			if c < '0' || c > '9' {
				digits = digits[:i]
				break
			}
		}
		if v, err := strconv.ParseUint(digits, 10, 64); err == nil && v < 1<<63 {
			top = max(top, v)
		}
	}
	return strconv.FormatUint(top+1, 10)
}

// createSnapshot gives the active L1 table and the L2 tables to the new
// snapshot, and copies to the active state, apart from a VM's state.
func (im *Image) createSnapshot(s *snapshot) error {
	l1, err := im.shareTables(im.l1[:im.geo.l1Entries(im.hdr.size)])
	if err != nil {
		return err
	}
	if err := im.newL1(l1); err != nil {
		return err
	}
	return im.newSnapshots(append(slices.Clone(im.snaps), s))
}

// revertSnapshot makes the active state one that shares everything with
// snapshot i. VM state stays with the snapshot only: QEMU doesn't look for it
// elsewhere.
func (im *Image) revertSnapshot(i int) error {
	h, s := im.hdr, im.snaps[i]
	size := s.diskSize(h.size)
	n := im.geo.l1Entries(size)
	f := fieldError{im.path, "qcow2 snapshot table"}
	if size%sector != 0 || size > 1<<63-1 || n > uint64(s.l1Size) {
		return f.at(s.at, "disk_size", size, "a multiple of 512 that the L1 table covers", image.ErrCorrupt)
	}
	saved, err := im.readEntries(s.l1Off, n)
	if err != nil {
		return err
	}
	l1, err := im.shareTables(saved)
	if err != nil {
		return err
	}
	oldL1, oldOff, oldSize := im.l1, h.l1Off, h.size
	if err := im.newL1(l1); err != nil {
		return err
	}
	h.size = size
	if err := im.dropTables(oldL1); err != nil {
		return err
	}
	if err := im.releaseL1(oldOff, uint64(len(oldL1))); err != nil {
		return err
	}
	return im.revertBitmaps(oldSize)
}

// deleteSnapshot drops snapshot i, and gives the active state what only the
// two had shared.
func (im *Image) deleteSnapshot(i int) error {
	s := im.snaps[i]
	l1, err := im.readEntries(s.l1Off, uint64(s.l1Size))
	if err != nil {
		return err
	}
	if err := im.dropTables(l1); err != nil {
		return err
	}
	if err := im.releaseL1(s.l1Off, uint64(s.l1Size)); err != nil {
		return err
	}
	if err := im.newSnapshots(slices.Delete(slices.Clone(im.snaps), i, i+1)); err != nil {
		return err
	}
	return im.ownTables()
}

// newSnapshots writes a new snapshot table and gives up the old one.
func (im *Image) newSnapshots(snaps []*snapshot) error {
	h, old := im.hdr, snapTableSize(im.snaps)
	if err := im.releaseL1(h.snapsOff, (old+7)/8); err != nil {
		return err
	}
	h.nbSnaps, h.snapsOff = uint32(len(snaps)), 0
	if snapTableSize(snaps) > maxSnapTable {
		return fmt.Errorf("qcow2: a snapshot table above 64 MiB: %w", image.ErrNoSpace)
	}
	im.snaps = snaps
	if len(snaps) == 0 {
		return nil
	}
	off, err := im.newTable(encodeSnapshots(snaps), metaSnapshots)
	h.snapsOff = off
	return err
}

// shareTables returns an L1 table that maps what l1 maps, and counts the new
// references. An L2 table whose clusters may be written in place is copied
// without the flags that say so; one without such clusters is shared.
func (im *Image) shareTables(l1 []uint64) ([]uint64, error) {
	out := make([]uint64, len(l1))
	err := im.eachTable(l1, func(i int, off uint64, t []byte) error {
		if err := im.addData(t, off, 1); err != nil {
			return err
		}
		copied := false
		for e := 0; e < len(t); e += int(im.geo.entrySize()) {
			if t[e]&0xc0 == 0x80 { // the copied flag
				t[e] &= 0x7f
				copied = true
			}
		}
		if !copied {
			out[i] = off
			return im.addRefcount(off>>im.geo.bits, 1)
		}
		n, err := im.newTable(t, metaL2)
		out[i] = n | flagCopied
		return err
	})
	return out, err
}

// dropTables gives up the references of an L1 table.
func (im *Image) dropTables(l1 []uint64) error {
	return im.eachTable(l1, func(_ int, off uint64, t []byte) error {
		if err := im.addData(t, off, -1); err != nil {
			return err
		}
		return im.release(off >> im.geo.bits)
	})
}

// ownTables sets the copied flags of the active tables, which changed where
// clusters are no longer shared. Tables that change are copies then.
func (im *Image) ownTables() error {
	l1 := slices.Clone(im.l1)
	err := im.eachTable(im.l1, func(i int, off uint64, t []byte) error {
		rc, err := im.refcount(off >> im.geo.bits)
		l1[i] = off
		if err != nil || rc != 1 {
			return err
		}
		l1[i] |= flagCopied
		changed, err := im.ownEntries(t)
		if err != nil || !changed {
			return err
		}
		n, err := im.newTable(t, metaL2)
		if err != nil {
			return err
		}
		l1[i] = n | flagCopied
		return im.release(off >> im.geo.bits)
	})
	if err != nil || slices.Equal(l1, im.l1) {
		return err
	}
	off, n := im.hdr.l1Off, uint64(im.hdr.l1Size)
	if err := im.newL1(l1); err != nil {
		return err
	}
	return im.releaseL1(off, n)
}

// ownEntries sets the copied flags in t.
func (im *Image) ownEntries(t []byte) (changed bool, err error) {
	for i := range im.geo.l2Entries() {
		v := im.geo.get(t, i)
		e, _ := im.geo.decode(v)
		if e.kind == compressed || !e.placed {
			continue
		}
		rc, err := im.refcount(e.host >> im.geo.bits)
		if err != nil {
			return false, err
		}
		if rc == 0 {
			// It was counted less often than it was shared.
			return false, im.badRefcount(e.host>>im.geo.bits, "a refcount above 0, as the disk uses the cluster")
		}
		want := v
		want.word &^= flagCopied
		if rc == 1 {
			want.word |= flagCopied
		}
		if want != v {
			im.geo.put(t, i, want)
			changed = true
		}
	}
	return changed, nil
}

// eachTable calls do with each L2 table of an L1 table. The bytes are do's to
// change.
func (im *Image) eachTable(l1 []uint64, do func(i int, off uint64, t []byte) error) error {
	t := make([]byte, im.geo.cs)
	for i, v := range l1 {
		off, bad := im.geo.decodeL1(v)
		if bad != nil {
			return fieldError{im.path, "qcow2 L1 table"}.at(-1, "", v, bad.want, image.ErrCorrupt)
		}
		if off == 0 {
			continue
		}
		if err := im.inUse(off >> im.geo.bits); err != nil {
			return err
		}
		if err := readFile(im.file, t, off); err != nil {
			return err
		}
		if err := do(i, off, t); err != nil {
			return err
		}
	}
	return nil
}

// addData changes the refcounts of the clusters that the L2 table at off
// refers to.
func (im *Image) addData(t []byte, off uint64, delta int) error {
	for i := range uint64(len(t)) / im.geo.entrySize() {
		v := im.geo.get(t, i)
		if v == (l2Entry{}) {
			continue
		}
		e, bad := im.geo.decode(v)
		if bad != nil {
			return im.badEntry("L2 table", off+i*im.geo.entrySize(), v.word, bad.want)
		}
		c, n := e.clusters(&im.geo)
		if n > 0 {
			// Nothing that the disk refers to by mistake is given up.
			if err := im.guard(c<<im.geo.bits, n<<im.geo.bits, metaNone); err != nil {
				return err
			}
		}
		for ; n > 0; c, n = c+1, n-1 {
			var err error
			if delta < 0 {
				err = im.release(c)
			} else {
				err = im.addRefcount(c, delta)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}
