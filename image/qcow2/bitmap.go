package qcow2

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"nvstore.dev/image"
)

// A Bitmap describes a persistent dirty bitmap. The JSON keys are those of
// qemu-img info.
type Bitmap struct {
	Name        string `json:"name"`
	Granularity int64  `json:"granularity"` // bytes that a bit stands for

	// Flags are "in-use", of a bitmap that wasn't saved and so may be
	// wrong, and "auto", of one that writes are recorded in.
	Flags []string `json:"flags"`
}

// BitmapOptions are the options of AddBitmap. Nil means the zero value.
type BitmapOptions struct {
	// Granularity is how many bytes a bit stands for, a power of two from
	// 512 to 2 GiB; 0 means the cluster size, but 4 to 64 KiB.
	Granularity int64

	// Disabled makes a bitmap that writes aren't recorded in.
	Disabled bool
}

// Bitmaps returns the persistent bitmaps.
func (im *Image) Bitmaps() ([]Bitmap, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.usable(false); err != nil {
		return nil, err
	}
	if im.bitmapsErr != nil {
		return nil, im.bitmapsErr
	}
	out := make([]Bitmap, 0, len(im.bitmaps))
	for _, m := range im.bitmaps {
		b := Bitmap{Name: m.name, Granularity: 1 << m.bits, Flags: []string{}}
		if m.inconsistent() {
			b.Flags = append(b.Flags, "in-use")
		}
		if m.flags&bitmapAuto != 0 {
			b.Flags = append(b.Flags, "auto")
		}
		out = append(out, b)
	}
	return out, nil
}

// AddBitmap makes a bitmap in which nothing is dirty. The name is 1 to 1023
// bytes, and no other bitmap's. All changes to bitmaps are durable when they
// return, and a crash leaves the old state or the new one. They wait for writes
// that are under way.
func (im *Image) AddBitmap(name string, o *BitmapOptions) error {
	if o == nil {
		o = &BitmapOptions{}
	}
	return im.changeBitmaps(func(list []*bitmap) ([]*bitmap, error) {
		m := &bitmap{name: name, flags: bitmapAuto}
		if o.Disabled {
			m.flags = 0
		}
		size := o.Granularity
		if size == 0 {
			size = min(max(int64(im.geo.cs), 4096), 65536)
		}
		for m.bits = minBitmapBits; m.bits < maxBitmapBits && 1<<m.bits < size; m.bits++ {
		}
		m.entries = im.bitmapTable(m.bits, im.hdr.size)
		switch {
		case 1<<m.bits != size:
			return nil, fmt.Errorf("qcow2: a granularity of %d: %w", size, image.ErrUnsupported)
		case name == "" || len(name) > maxBitmapName:
			return nil, fmt.Errorf("qcow2: a bitmap name of %d bytes: %w", len(name), image.ErrUnsupported)
		case im.hdr.version < 3:
			return nil, fmt.Errorf("qcow2: bitmaps in a version 2 image: %w", image.ErrUnsupported)
		case slices.ContainsFunc(list, func(m *bitmap) bool { return m.name == name }):
			return nil, fmt.Errorf("qcow2: bitmap %q: %w", name, image.ErrExist)
		case len(list) >= maxBitmaps || m.entries > maxBitmapTable || m.entries > maxBitmapBytes>>im.geo.bits:
			return nil, fmt.Errorf("qcow2: another bitmap, of %d clusters: %w", m.entries, image.ErrNoSpace)
		}
		return append(list, m), nil
	})
}

// RemoveBitmap removes a bitmap, also one that is in use.
func (im *Image) RemoveBitmap(name string) error {
	return im.changeBitmaps(func(list []*bitmap) ([]*bitmap, error) {
		i, err := im.findBitmap(list, name)
		if err != nil {
			return nil, err
		}
		return slices.Delete(list, i, i+1), nil
	})
}

// EnableBitmap says whether writes are recorded in a bitmap.
func (im *Image) EnableBitmap(name string, on bool) error {
	return im.changeBitmap(name, func(m *bitmap) error {
		m.flags &^= bitmapAuto
		if on {
			m.flags |= bitmapAuto
		}
		return nil
	})
}

// ClearBitmap makes nothing dirty in a bitmap.
func (im *Image) ClearBitmap(name string) error {
	return im.changeBitmap(name, func(m *bitmap) error {
		m.changed = make(map[uint64][]byte)
		for i, e := range m.table {
			if e != 0 {
				m.changed[uint64(i)] = make([]byte, im.geo.cs)
			}
		}
		return nil
	})
}

// MergeBitmap makes dirty in a bitmap what is dirty in another, src of from,
// which may be the same image. Granularities may differ.
func (im *Image) MergeBitmap(name string, from *Image, src string) error {
	type dirty struct{ off, n int64 }
	var list []dirty
	for off := int64(0); off < from.Size(); {
		set, n, err := from.BitmapStatus(src, off, from.Size()-off)
		if err != nil {
			return err
		}
		if set {
			list = append(list, dirty{off, n})
		}
		off += n
	}
	return im.changeBitmap(name, func(m *bitmap) error {
		for _, d := range list {
			if n := min(d.n, im.Size()-d.off); n > 0 {
				if err := im.setDirty(m, uint64(d.off), uint64(n)); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// BitmapStatus tells whether the bytes from off are dirty in a bitmap, and how
// many of them, at most n, are alike. A bitmap that is in use is an
// image.ErrCorrupt.
func (im *Image) BitmapStatus(name string, off, n int64) (dirty bool, length int64, err error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.usable(false); err != nil {
		return false, 0, err
	}
	if err := image.CheckRange(off, n, im.Size()); err != nil || n == 0 {
		return false, 0, image.ErrOutOfRange
	}
	if im.bitmapsErr != nil {
		return false, 0, im.bitmapsErr
	}
	im.bmu.Lock()
	defer im.bmu.Unlock()
	i, err := im.findBitmap(im.bitmaps, name)
	if err != nil {
		return false, 0, err
	}
	m := im.bitmaps[i]
	if err := im.consistent(m); err != nil {
		return false, 0, err
	}
	return im.bitmapRun(m, off, n)
}

func (im *Image) bitmapRun(m *bitmap, off, n int64) (dirty bool, length int64, err error) {
	per := im.geo.cs * 8
	end := off + n
	for at := off; at < end; {
		g := uint64(at) >> m.bits
		b, err := im.bitmapCluster(m, g/per)
		if err != nil {
			return false, 0, err
		}
		// A whole cluster of zeros or ones is one step.
		stop := g + 1
		bit := b[g%per/8]>>(g%8)&1 != 0
		for stop%8 != 0 && stop/per == g/per && b[stop%per/8]>>(stop%8)&1 != 0 == bit {
			stop++
		}
		full := byte(0)
		if bit {
			full = 0xff
		}
		for stop%8 == 0 && stop/per == g/per && b[stop%per/8] == full {
			stop += 8
		}
		if at > off && bit != dirty {
			return dirty, at - off, nil
		}
		dirty = bit
		at = int64(min(stop<<m.bits, uint64(end)))
	}
	return dirty, n, nil
}

func (im *Image) findBitmap(list []*bitmap, name string) (int, error) {
	i := slices.IndexFunc(list, func(m *bitmap) bool { return m.name == name })
	if i < 0 {
		return 0, fmt.Errorf("qcow2: bitmap %q: %w", name, image.ErrNotFound)
	}
	return i, nil
}

// consistent refuses a bitmap that wasn't saved.
func (im *Image) consistent(m *bitmap) error {
	if m.inconsistent() {
		return fieldError{im.path, "qcow2 bitmap directory"}.at(m.at+12, "flags", m.flags,
			fmt.Sprintf("bitmap %q saved: it is in use, or was when its user crashed, and can only be removed", m.name), image.ErrCorrupt)
	}
	return nil
}

// bitmapCluster returns a cluster of the bitmap, which isn't to be changed.
func (im *Image) bitmapCluster(m *bitmap, i uint64) ([]byte, error) {
	if b, ok := m.changed[i]; ok {
		return b, nil
	}
	b := make([]byte, im.geo.cs)
	if i >= uint64(len(m.table)) {
		return b, nil
	}
	switch e := m.table[i]; {
	case e == bitmapEntryOnes:
		for k := range b {
			b[k] = 0xff
		}
	case e != 0:
		return b, readFile(im.file, b, e)
	}
	return b, nil
}

// setDirty sets the bits for bytes of the disk.
func (im *Image) setDirty(m *bitmap, off, n uint64) error {
	per := im.geo.cs * 8
	g, last := off>>m.bits, (off+n-1)>>m.bits
	for g <= last {
		c := g / per
		end := min(last, c*per+per-1)
		b, ok := m.changed[c]
		if !ok {
			if c < uint64(len(m.table)) && m.table[c] == bitmapEntryOnes {
				g = end + 1
				continue
			}
			var err error
			if b, err = im.bitmapCluster(m, c); err != nil {
				return err
			}
			if m.changed == nil {
				m.changed = make(map[uint64][]byte)
			}
			m.changed[c] = b
		}
		setBits(b, g%per, end%per)
		g = end + 1
	}
	return nil
}

// setBits sets bits first to last.
func setBits(b []byte, first, last uint64) {
	for first <= last {
		if first%8 == 0 && last-first >= 7 {
			b[first/8] = 0xff
			first += 8
			continue
		}
		b[first/8] |= 1 << (first % 8)
		first++
	}
}

// record makes bytes dirty that are about to be written. The bitmaps that record
// them are marked as in use before, durably.
func (im *Image) record(off, n int64) error {
	if len(im.bitmaps) == 0 || n == 0 {
		return nil
	}
	im.bmu.Lock()
	defer im.bmu.Unlock()
	if !im.recording {
		if err := im.markInUse(); err != nil {
			return err
		}
		im.recording = true
	}
	for _, m := range im.bitmaps {
		if m.records() {
			if err := im.setDirty(m, uint64(off), uint64(n)); err != nil {
				return err
			}
		}
	}
	return nil
}

// markInUse sets the flags in the directory, each of which is in one sector. In
// memory they stay as they are: they say what will be stored.
func (im *Image) markInUse() error {
	any := false
	for _, m := range im.bitmaps {
		if !m.records() {
			continue
		}
		any = true
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], m.flags|bitmapInUse)
		im.tab.RLock()
		err := im.guard(uint64(m.at+12), 4, metaBitmap)
		im.tab.RUnlock()
		if err != nil {
			return im.poison(err)
		}
		if _, err := im.file.WriteAt(b[:], m.at+12); err != nil {
			return im.poison(err)
		}
	}
	if !any {
		return nil
	}
	return im.syncFile()
}

// changeBitmap changes one bitmap that is consistent.
func (im *Image) changeBitmap(name string, change func(m *bitmap) error) error {
	return im.changeBitmaps(func(list []*bitmap) ([]*bitmap, error) {
		i, err := im.findBitmap(list, name)
		if err != nil {
			return nil, err
		}
		m := list[i].clone()
		if err := im.consistent(m); err != nil {
			return nil, err
		}
		list[i] = m
		return list, change(m)
	})
}

func (m *bitmap) clone() *bitmap {
	c := *m
	c.changed = make(map[uint64][]byte, len(m.changed))
	for i, b := range m.changed {
		c.changed[i] = bytes.Clone(b)
	}
	return &c
}

// changeBitmaps changes the list of bitmaps and stores it.
func (im *Image) changeBitmaps(change func([]*bitmap) ([]*bitmap, error)) error {
	im.lockAll()
	defer im.unlockAll()
	if err := im.usable(true); err != nil {
		return err
	}
	if im.bitmapsErr != nil {
		return im.bitmapsErr
	}
	list, err := change(slices.Clone(im.bitmaps))
	if err != nil {
		return err
	}
	return im.restructure(func() error { return im.storeBitmaps(list) })
}

// storeBitmaps writes bitmaps anew, as far as they changed, with a new
// directory. It is part of a change of structure.
func (im *Image) storeBitmaps(list []*bitmap) error {
	if x, ok := findExtension(im.hdr.exts, extBitmaps); ok && im.hdr.autoclear&autoclearBitmaps != 0 {
		old := parseBitmapsExt(x.Data)
		if err := im.releaseL1(old.off, (old.size+7)/8); err != nil {
			return err
		}
	}
	for _, m := range im.bitmaps {
		if !slices.ContainsFunc(list, func(n *bitmap) bool { return n.name == m.name }) {
			if err := im.dropBitmap(m); err != nil {
				return err
			}
		}
	}
	stored := make([]*bitmap, len(list))
	for i, m := range list {
		var err error
		if stored[i], err = im.storeBitmap(m); err != nil {
			return err
		}
	}
	im.bitmaps = stored
	im.recording = false
	if len(stored) == 0 {
		im.hdr.setBitmapsExt(bitmapsExt{})
		return nil
	}
	var dir []byte
	for _, m := range stored {
		m.at = int64(len(dir))
		dir = m.append(dir)
	}
	off, err := im.newTable(dir, metaBitmap)
	for _, m := range stored {
		m.at += int64(off)
	}
	im.hdr.setBitmapsExt(bitmapsExt{uint32(len(stored)), uint64(len(dir)), off})
	return err
}

// dropBitmap gives up the clusters of a bitmap.
func (im *Image) dropBitmap(m *bitmap) error {
	for _, e := range m.table {
		if off := e & entryOffset; off != 0 {
			if err := im.release(off >> im.geo.bits); err != nil {
				return err
			}
		}
	}
	if m.off == 0 {
		return nil
	}
	return im.releaseL1(m.off, m.entries)
}

// storeBitmap returns m with what changed stored, for the disk's size as it is.
func (im *Image) storeBitmap(m *bitmap) (*bitmap, error) {
	c := *m
	n := im.bitmapTable(m.bits, im.hdr.size)
	if m.inconsistent() || m.off != 0 && len(m.changed) == 0 && n == m.entries {
		return &c, nil
	}
	table := make([]uint64, max(n, uint64(len(m.table))))
	copy(table, m.table)
	for i := range table {
		b, ok := m.changed[uint64(i)]
		if !ok && uint64(i) < n {
			continue
		}
		if off := table[i] & entryOffset; off != 0 {
			if err := im.release(off >> im.geo.bits); err != nil {
				return nil, err
			}
		}
		table[i] = 0
		if uint64(i) >= n || len(bytes.Trim(b, "\x00")) == 0 {
			continue
		}
		off, err := im.newTable(b, metaBitmap)
		if err != nil {
			return nil, err
		}
		table[i] = off
	}
	if m.off != 0 {
		if err := im.releaseL1(m.off, m.entries); err != nil {
			return nil, err
		}
	}
	c.table, c.entries, c.changed = table[:n], n, nil
	var err error
	c.off, err = im.newTable(encodeEntries(c.table), metaBitmap)
	return &c, err
}

// resizeBitmaps stores the bitmaps for the disk's new size. What is new isn't
// dirty.
func (im *Image) resizeBitmaps(old uint64) error {
	list, err := im.resizedBitmaps(old)
	if err != nil || len(list) == 0 {
		return err
	}
	return im.storeBitmaps(list)
}

func (im *Image) resizedBitmaps(old uint64) ([]*bitmap, error) {
	list := make([]*bitmap, len(im.bitmaps))
	for i, m := range im.bitmaps {
		c := m.clone()
		list[i] = c
		if m.inconsistent() {
			continue
		}
		if err := im.cutBitmap(c, min(old, im.hdr.size)); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// cutBitmap clears the bits behind a disk of size bytes, in the cluster of the
// last one.
func (im *Image) cutBitmap(m *bitmap, size uint64) error {
	per := im.geo.cs * 8
	granules := (size + 1<<m.bits - 1) >> m.bits
	i := granules / per
	if i >= max(uint64(len(m.table)), 1) || granules%per == 0 && i > 0 {
		return nil
	}
	b, err := im.bitmapCluster(m, i)
	if err != nil {
		return err
	}
	b = bytes.Clone(b)
	for g := granules % per; g < per; g++ {
		b[g/8] &^= 1 << (g % 8)
	}
	m.changed[i] = b
	return nil
}

// revertBitmaps makes all of the disk dirty wherever writes are recorded: what a
// revert changes isn't known.
func (im *Image) revertBitmaps(old uint64) error {
	list, err := im.resizedBitmaps(old)
	if err != nil || len(list) == 0 {
		return err
	}
	for _, m := range list {
		if !m.records() || im.hdr.size == 0 {
			continue
		}
		if err := im.setDirty(m, 0, im.hdr.size); err != nil {
			return err
		}
	}
	return im.storeBitmaps(list)
}
