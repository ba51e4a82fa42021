package qcow2

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// Resize makes the disk larger, with new bytes that read as zeros, or smaller:
// what is cut off is lost, except in snapshots. The change is durable when it
// returns, and a crash leaves the old size or the new one. A version 2 image
// with snapshots (which don't record the disk's size), and a size that isn't a
// multiple of 512 are image.ErrUnsupported.
func (im *Image) Resize(size int64) error {
	im.lockAll()
	defer im.unlockAll()
	if err := im.usable(true); err != nil {
		return err
	}
	return im.resize(size)
}

func (im *Image) resize(size int64) error {
	old := im.Size()
	switch {
	case size < 0:
		return image.ErrOutOfRange
	case size == old:
		return nil
	case size%sector != 0:
		return fmt.Errorf("qcow2: a size that isn't a multiple of 512: %w", image.ErrUnsupported)
	case im.geo.version == 2 && len(im.snaps) > 0:
		return fmt.Errorf("qcow2: resizing a version 2 image with snapshots: %w", image.ErrUnsupported)
	}
	if size < old {
		change := func() error {
			if err := im.shrink(uint64(size)); err != nil {
				return err
			}
			return im.resizeBitmaps(uint64(old))
		}
		if err := im.restructure(change); err != nil {
			return err
		}
		im.size.Store(size)
		im.unpacked.reset()
		im.alloc.grew = true // the end of the file may be free
		return im.cutDataFile(size)
	}
	// Data behind the end is written like other data.
	im.size.Store(size)
	err := im.grow(old, size)
	if err != nil {
		im.size.Store(old)
	}
	return err
}

// grow is resize to a larger size.
func (im *Image) grow(old, size int64) error {
	need := im.geo.l1Entries(uint64(size))
	if need > maxL1Bytes/8 {
		return fmt.Errorf("qcow2: %d bytes need an L1 table above 32 MiB: %w", size, image.ErrNoSpace)
	}
	if im.below() && need > uint64(len(im.l1)) && !im.zeroBelow(uint64(old), uint64(size-old)) {
		// What the backing file has there is hidden by entries, which
		// must be there before the disk gets its size.
		if err := im.restructure(func() error { return im.growL1(need, uint64(old)) }); err != nil {
			return err
		}
	}
	if err := im.clearBeyond(old, size); err != nil {
		return err
	}
	if need <= uint64(len(im.l1)) && len(im.bitmaps) == 0 {
		if err := im.flush(); err != nil {
			return err
		}
		im.hdr.size = uint64(size)
		if err := im.writeHeader(); err != nil {
			return err
		}
	} else {
		change := func() error {
			if err := im.growL1(max(need, uint64(len(im.l1))), uint64(size)); err != nil {
				return err
			}
			return im.resizeBitmaps(uint64(old))
		}
		if err := im.restructure(change); err != nil {
			return err
		}
	}
	if im.hdr.rawData() {
		return im.preallocate(old, size-old, PreallocMetadata)
	}
	return nil
}

func (im *Image) growL1(entries, size uint64) error {
	off, n := im.hdr.l1Off, uint64(im.hdr.l1Size)
	l1 := make([]uint64, entries)
	copy(l1, im.l1)
	if err := im.newL1(l1); err != nil {
		return err
	}
	im.hdr.size = size
	return im.releaseL1(off, n)
}

// clearBeyond makes [old, size) read as zeros as far as it is mapped: behind
// the end of the disk there may be a VM's state, or, in the last cluster,
// anything, and the backing file may be longer.
func (im *Image) clearBeyond(old, size int64) error {
	g := &im.geo
	_, _, in := g.split(old)
	n := min(int64(-in&(g.cs-1)), size-old)
	if g.external {
		if err := im.clearDataFile(old, n, size); err != nil {
			return err
		}
	}
	switch {
	case n > 0 && im.below():
		if err := im.writeZeros(old, old+n); err != nil {
			return err
		}
	case n > 0 && !g.external:
		if err := im.zeroTail(old, n); err != nil {
			return err
		}
	}
	old += n
	end := min(uint64(size), uint64(len(im.l1))<<(g.bits+g.l2Bits))
	if g.version < 3 && im.below() {
		// There is no flag that hides what is below.
		rest, err := im.hideBelow(old, int64(end))
		if err != nil {
			return err
		}
		old = rest
	}
	if uint64(old) >= end {
		return nil
	}
	return im.unmap(old, int64(end), true)
}

// hideBelow writes zeros from off, a cluster's start, as far as the backing file
// reaches, and returns where the first cluster is behind that.
func (im *Image) hideBelow(off, end int64) (int64, error) {
	if im.backing == nil {
		return end, im.writeZeros(off, end)
	}
	size := min((im.backing.Size()+int64(im.geo.cs)-1)&^int64(im.geo.cs-1), end)
	if size <= off {
		return off, nil
	}
	return size, im.writeZeros(off, size)
}

// clearDataFile makes what a data file has behind the end of the disk zeros: n
// bytes of the last cluster, or, if it must read as the disk does, up to size.
func (im *Image) clearDataFile(old, n, size int64) error {
	end := old + n
	if im.hdr.rawData() {
		end = size
	}
	if end = min(end, im.data.Size()); old >= end {
		return nil
	}
	return im.zeroData(uint64(old), uint64(end-old))
}

// zeroTail writes zeros over the rest of a cluster, unless they are there.
func (im *Image) zeroTail(off, n int64) error {
	if i, _, _ := im.geo.split(off); i >= uint64(len(im.l1)) {
		return nil
	}
	b := make([]byte, n)
	if _, err := im.read(b, off); err != nil {
		return err
	}
	for _, v := range b {
		if v != 0 {
			clear(b)
			_, err := im.write(b, off)
			return err
		}
	}
	return nil
}

// cutDataFile makes the data file no longer than the disk, if that can be.
func (im *Image) cutDataFile(size int64) error {
	r, ok := image.As[image.Resizer](im.data)
	if !im.geo.external || !ok || im.data.Size() <= size {
		return nil
	}
	err := r.Resize(size)
	if errors.Is(err, image.ErrUnsupported) || errors.Is(err, image.ErrNoSpace) {
		return nil
	}
	return err
}
