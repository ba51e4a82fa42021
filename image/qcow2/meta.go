package qcow2

import "nvstore.dev/image"

// buildMeta enters all metadata, and fails with image.ErrCorrupt where two
// structures overlap or an entry isn't as the specification wants it.
func (im *Image) buildMeta() error {
	var m metaSet
	h, g := im.hdr, &im.geo
	add := func(off, n uint64, k metaKind, f fieldError, at int64, field string) error {
		if old, ok := m.add(g, off, n, k); !ok {
			return f.at(at, field, off, "a place that isn't "+metaNames[old], image.ErrCorrupt)
		}
		return nil
	}
	fh := fieldError{im.path, "qcow2 header"}
	m.set(0, metaHeader)
	if err := add(h.reftableOff, uint64(h.reftableClusters)<<g.bits, metaReftable, fh, 48, "refcount_table_offset"); err != nil {
		return err
	}
	if err := add(h.l1Off, uint64(h.l1Size)*8, metaL1, fh, 40, "l1_table_offset"); err != nil {
		return err
	}
	if err := add(h.snapsOff, snapTableSize(im.snaps), metaSnapshots, fh, 64, "snapshots_offset"); err != nil {
		return err
	}
	if h.crypt == cryptLUKS {
		off, n, err := h.cryptHeader(im.path, uint64(im.file.Size()))
		if err != nil {
			return err
		}
		if err := add(off, n, metaCrypt, fieldError{im.path, "qcow2 encryption header pointer"}, -1, "offset"); err != nil {
			return err
		}
	}
	for _, s := range im.snaps {
		if err := im.addSnapshotMeta(s, add); err != nil {
			return err
		}
	}
	if err := im.addTableMeta(add); err != nil {
		return err
	}
	if err := im.addBitmapMeta(add); err != nil {
		return err
	}
	im.meta = m
	return nil
}

type metaAdder func(off, n uint64, k metaKind, f fieldError, at int64, field string) error

// addTableMeta enters refcount blocks and L2 tables.
func (im *Image) addTableMeta(add metaAdder) error {
	h, g, end := im.hdr, &im.geo, im.fileEnd()
	ft := fieldError{im.path, "qcow2 refcount table"}
	for i, e := range im.reftable {
		at := int64(h.reftableOff) + int64(i)*8
		if e&(sector-1) != 0 || e&(g.cs-1) != 0 || e >= maxHostOffset {
			return ft.at(at, "", e, "a cluster-aligned offset below 2^56", image.ErrCorrupt)
		}
		if e == 0 {
			continue
		}
		if e >= end {
			return ft.at(at, "", e, "a block inside the file", image.ErrCorrupt)
		}
		if err := add(e, g.cs, metaRefblock, ft, at, ""); err != nil {
			return err
		}
	}
	fl := fieldError{im.path, "qcow2 L1 table"}
	for i, e := range im.l1 {
		at := int64(h.l1Off) + int64(i)*8
		off, bad := g.decodeL1(e)
		if bad != nil {
			return fl.at(at, "", e, bad.want, image.ErrCorrupt)
		}
		if off == 0 {
			continue
		}
		if off >= end {
			return fl.at(at, "", e, "a table inside the file", image.ErrCorrupt)
		}
		if err := add(off, g.cs, metaL2, fl, at, ""); err != nil {
			return err
		}
	}
	return nil
}

func (im *Image) addSnapshotMeta(s *snapshot, add metaAdder) error {
	f := fieldError{im.path, "qcow2 snapshot table"}
	n := uint64(s.l1Size) * 8
	if n > maxL1Bytes {
		return f.at(s.at+8, "l1_size", s.l1Size, "at most 4194304", image.ErrCorrupt)
	}
	if bad := im.geo.checkTable(s.l1Off, n); bad != "" {
		return f.at(s.at, "l1_table_offset", s.l1Off, bad, image.ErrCorrupt)
	}
	// This bounds the set by the file's size.
	if n > 0 && s.l1Off+n > im.fileEnd() {
		return f.at(s.at, "l1_table_offset", s.l1Off, "a table inside the file", image.ErrCorrupt)
	}
	return add(s.l1Off, n, metaSnapshotL1, f, s.at, "l1_table_offset")
}

// guard refuses to write to [off, off+n) unless its clusters are of kind k.
func (im *Image) guard(off, n uint64, k metaKind) error {
	for c := off >> im.geo.bits; c <= (off+n-1)>>im.geo.bits; c++ {
		if got := im.meta.get(c); got != k {
			return fieldError{im.path, "qcow2 cluster"}.at(int64(c<<im.geo.bits), "", nil,
				"to write "+metaNames[k]+", which overlaps "+metaNames[got], image.ErrCorrupt)
		}
	}
	return nil
}
