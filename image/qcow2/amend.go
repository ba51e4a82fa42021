package qcow2

import (
	"context"
	"slices"

	"nvstore.dev/image"
)

// AmendOptions are what Amend changes. Nil, or a zero field, leaves things as
// they are.
type AmendOptions struct {
	// Version is 2 or 3 (compat=0.10 and 1.1). Version 2 has no refcounts
	// but those of 16 bits, no data file, no extended L2 entries, no zstd
	// clusters, no lazy refcounts and no bitmaps; its snapshots have the
	// disk's size and at most 4 GiB of a VM's state. Clusters that read as
	// zeros are deallocated or, above a backing file, allocated for it.
	Version int

	// RefcountBits is the width of a reference count, as in CreateOptions.
	RefcountBits int

	// LazyRefcounts lets refcounts be written late (see the package
	// comment). It needs version 3.
	LazyRefcounts *bool

	// Size is the new size of the disk in bytes, as for Resize.
	Size int64

	// DataFile is the new name of the external data file, in an image that
	// has one. It isn't looked for.
	DataFile string

	// RawDataFile, if false, says that the data file needn't read as the
	// disk does any more. It can't be made true.
	RawDataFile *bool
}

// Amend changes properties of the image. Each is changed by one write of the
// header, so a crash leaves it old or new, at worst with leaks; if one can't be
// changed, those before it are, in the order version 3, refcount width, data
// file, lazy refcounts, size, version 2. An image that Check finds errors in is
// left as it is where refcounts or zero clusters are to be changed
// (image.ErrCorrupt). What the image can't be is an image.ErrUnsupported.
func (im *Image) Amend(ctx context.Context, o *AmendOptions) error {
	if o == nil {
		o = &AmendOptions{}
	}
	im.lockAll()
	defer im.unlockAll()
	if err := im.usable(true); err != nil {
		return err
	}
	if err := im.canAmend(o); err != nil {
		return err
	}
	if o.Version == 3 && im.hdr.version == 2 {
		if err := im.restructure(im.upgrade); err != nil {
			return err
		}
	}
	if o.RefcountBits != 0 && o.RefcountBits != 1<<im.hdr.refOrder {
		if err := im.amendRefcounts(ctx, log2(o.RefcountBits)); err != nil {
			return err
		}
	}
	if err := im.amendHeader(o); err != nil {
		return err
	}
	if o.Size != 0 {
		if err := im.resize(o.Size); err != nil {
			return err
		}
	}
	if o.Version == 2 && im.hdr.version == 3 {
		return im.amendDown(ctx)
	}
	return nil
}

func (im *Image) canAmend(o *AmendOptions) error {
	bad := func(field string, got any, want string) error {
		return fieldError{im.path, "qcow2 amend options"}.at(-1, field, got, want, image.ErrUnsupported)
	}
	h := im.hdr
	version := int(h.version)
	if o.Version != 0 {
		if version = o.Version; version != 2 && version != 3 {
			return bad("Version", o.Version, "2 or 3")
		}
	}
	bits := 1 << h.refOrder
	if o.RefcountBits != 0 {
		if bits = o.RefcountBits; log2(bits) > 6 {
			return bad("RefcountBits", bits, "a power of two up to 64")
		}
	}
	external := h.incompat&incompatDataFile != 0
	switch {
	case version == 2 && bits != 16:
		return bad("RefcountBits", bits, "16 in version 2")
	case version == 2 && o.LazyRefcounts != nil && *o.LazyRefcounts:
		return bad("LazyRefcounts", "true", "version 3")
	case o.DataFile != "" && !external:
		return bad("DataFile", o.DataFile, "an image with a data file")
	case o.RawDataFile != nil && *o.RawDataFile && h.autoclear&autoclearRawData == 0:
		return bad("RawDataFile", "true", "false, unless it is so already")
	case version == 2 && external:
		return bad("Version", 2, "3 for an image with a data file")
	}
	return nil
}

// upgrade makes the image one of version 3.
func (im *Image) upgrade() error {
	h := im.hdr
	h.version, h.headerLen, h.tail = 3, headerLenNew, make([]byte, headerLenNew-headerLenV3-1)
	h.incompat, h.compat, h.autoclear, h.compression = 0, 0, 0, 0
	h.moved = true
	if _, ok := findExtension(h.exts, extFeatureNames); !ok && h.clusterSize() > 4096 {
		h.exts = append(slices.Clone(h.exts), featureTable())
	}
	im.geo.version = 3
	if len(im.snaps) == 0 {
		return nil
	}
	snaps := make([]*snapshot, len(im.snaps))
	for i, s := range im.snaps {
		c := *s
		if len(c.extra) < 16 {
			c.complete(h.size)
		}
		snaps[i] = &c
	}
	return im.newSnapshots(snaps)
}

// amendRefcounts makes refcounts anew, with another width.
func (im *Image) amendRefcounts(ctx context.Context, order uint32) error {
	if err := im.flushAll(); err != nil {
		return err
	}
	if err := im.trim(); err != nil {
		return err
	}
	c, err := im.cleanCheck(ctx)
	if err != nil {
		return err
	}
	b, err := c.newRebuild(order, false, func(_, refs uint64) uint64 { return refs })
	if err != nil {
		return err
	}
	if err := b.write(); err != nil {
		return err
	}
	if err := b.commit(); err != nil {
		return im.poison(err)
	}
	im.alloc = allocator{virgin: im.geo.clusters(uint64(im.file.Size())), grew: im.alloc.grew}
	if err := im.buildMeta(); err != nil {
		return im.poison(err)
	}
	return nil
}

// cleanCheck refuses an image with errors.
func (im *Image) cleanCheck(ctx context.Context) (*checker, error) {
	c, err := im.runCheck(ctx, nil)
	if err != nil {
		return nil, err
	}
	return c, im.firstError(c.res)
}

// amendHeader changes what is in the header only.
func (im *Image) amendHeader(o *AmendOptions) error {
	h := im.hdr
	old := *h
	if o.DataFile != "" {
		exts := slices.Clone(h.exts)
		exts = slices.DeleteFunc(exts, func(x Extension) bool { return x.Type == extDataFile })
		h.exts = append(exts, Extension{extDataFile, []byte(o.DataFile)})
		h.moved = true
	}
	if o.RawDataFile != nil && !*o.RawDataFile {
		h.autoclear &^= autoclearRawData
	}
	if o.LazyRefcounts != nil {
		h.compat &^= compatLazyRefcounts
		if *o.LazyRefcounts {
			h.compat |= compatLazyRefcounts
		}
	}
	if !h.moved && h.autoclear == old.autoclear && h.compat == old.compat {
		return nil
	}
	err := im.flushAll()
	if err == nil {
		err = im.markClean()
	}
	if err == nil {
		err = im.writeHeader()
	}
	if err != nil && im.fail.Load() == nil {
		*h = old
	}
	return err
}

// amendDown makes the image one of version 2.
func (im *Image) amendDown(ctx context.Context) error {
	if err := im.flushAll(); err != nil {
		return err
	}
	if err := im.markClean(); err != nil {
		return err
	}
	c, err := im.cleanCheck(ctx)
	if err != nil {
		return err
	}
	if err := im.canDowngrade(c); err != nil {
		return err
	}
	return im.restructure(im.downgrade)
}

// canDowngrade says what version 2 hasn't got.
func (im *Image) canDowngrade(c *checker) error {
	h := im.hdr
	f := fieldError{im.path, "qcow2 header"}
	if left := h.incompat &^ (incompatDirty | incompatCompression); left != 0 {
		return f.at(72, "incompatible_features", left, "none in version 2", image.ErrUnsupported)
	}
	if h.incompat&incompatCompression != 0 && c.packed {
		return f.at(104, "compression_type", h.compression, "no zstd clusters in version 2", image.ErrUnsupported)
	}
	if h.autoclear&autoclearBitmaps != 0 {
		return f.at(88, "autoclear_features", h.autoclear, "no bitmaps in version 2", image.ErrUnsupported)
	}
	for _, s := range im.snaps {
		if size := s.diskSize(h.size); size != h.size {
			return fieldError{im.path, "qcow2 snapshot table"}.at(s.at, "disk_size", size,
				"the disk's size in version 2", image.ErrUnsupported)
		}
		if n := s.vmState(); n > 1<<32-1 {
			return fieldError{im.path, "qcow2 snapshot table"}.at(s.at, "vm_state_size", n,
				"less than 4 GiB in version 2", image.ErrUnsupported)
		}
	}
	return nil
}

// downgrade expands zero clusters, which version 2 can't express.
func (im *Image) downgrade() error {
	h := im.hdr
	l1, changed, err := im.expandTables(im.l1, true)
	if err != nil {
		return err
	}
	if changed {
		off, n := h.l1Off, uint64(h.l1Size)
		if err := im.newL1(l1); err != nil {
			return err
		}
		if err := im.releaseL1(off, n); err != nil {
			return err
		}
	}
	if err := im.expandSnapshots(); err != nil {
		return err
	}
	h.version, h.headerLen, h.tail = 2, headerLenV2, nil
	h.incompat, h.compat, h.autoclear, h.compression = 0, 0, 0, 0
	h.exts = slices.DeleteFunc(slices.Clone(h.exts), func(x Extension) bool {
		return x.Type == extFeatureNames || x.Type == extBitmaps
	})
	h.moved = true
	im.geo.version = 2
	return nil
}

func (im *Image) expandSnapshots() error {
	snaps, any := slices.Clone(im.snaps), false
	for i, s := range snaps {
		old, err := im.readEntries(s.l1Off, uint64(s.l1Size))
		if err != nil {
			return err
		}
		l1, changed, err := im.expandTables(old, false)
		if err != nil {
			return err
		}
		if !changed {
			continue
		}
		c := *s
		if c.l1Off, err = im.newTable(encodeEntries(l1), metaSnapshotL1); err != nil {
			return err
		}
		if err := im.releaseL1(s.l1Off, uint64(s.l1Size)); err != nil {
			return err
		}
		snaps[i], any = &c, true
	}
	if !any {
		return nil
	}
	return im.newSnapshots(snaps)
}

// expandTables returns an L1 table with copies of the L2 tables that have zero
// clusters.
func (im *Image) expandTables(l1 []uint64, active bool) (out []uint64, changed bool, err error) {
	out = slices.Clone(l1)
	err = im.eachTable(l1, func(i int, off uint64, t []byte) error {
		did, err := im.expandTable(t, active)
		if err != nil || !did {
			return err
		}
		changed = true
		if out[i], err = im.newTable(t, metaL2); err != nil {
			return err
		}
		if active {
			out[i] |= flagCopied
		}
		return im.release(off >> im.geo.bits)
	})
	return out, changed, err
}

// expandTable replaces the zero clusters in t.
func (im *Image) expandTable(t []byte, active bool) (changed bool, err error) {
	g := &im.geo
	for i := range g.l2Entries() {
		e, _ := g.decode(g.get(t, i))
		if e.kind != zeroPlain && e.kind != zeroAlloc {
			continue
		}
		changed = true
		if c, n := e.clusters(g); n > 0 {
			if err := im.release(c); err != nil {
				return false, err
			}
		}
		var v l2Entry
		if im.hdr.backingOff != 0 {
			if v.word, err = im.zeroCluster(); err != nil {
				return false, err
			}
			if active {
				v.word |= flagCopied
			}
		}
		g.put(t, i, v)
	}
	return changed, nil
}

// zeroCluster takes a cluster of zeros.
func (im *Image) zeroCluster() (uint64, error) {
	off, zeroed, err := im.take(1, metaNone)
	if err != nil || zeroed && im.cipher == nil {
		return off, err
	}
	return off, im.zeroData(off, im.geo.cs)
}
