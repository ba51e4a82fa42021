package qcow2

import (
	"fmt"

	"nvstore.dev/image"
)

// Resize makes the disk larger; the new bytes read as zeros. The change is
// durable when it returns, and a crash leaves the old size or the new one. A
// smaller size, a version 2 image with snapshots (which don't record the
// disk's size), and a size that isn't a multiple of 512 are
// image.ErrUnsupported.
func (im *Image) Resize(size int64) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if err := im.usable(true); err != nil {
		return err
	}
	old := im.Size()
	switch {
	case size < 0:
		return image.ErrOutOfRange
	case size == old:
		return nil
	case size < old:
		return fmt.Errorf("qcow2: shrinking an image: %w", image.ErrUnsupported)
	case size%sector != 0:
		return fmt.Errorf("qcow2: a size that isn't a multiple of 512: %w", image.ErrUnsupported)
	case im.geo.version == 2 && len(im.snaps) > 0:
		return fmt.Errorf("qcow2: resizing a version 2 image with snapshots: %w", image.ErrUnsupported)
	}
	need := im.geo.l1Entries(uint64(size))
	if need > maxL1Bytes/8 {
		return fmt.Errorf("qcow2: %d bytes need an L1 table above 32 MiB: %w", size, image.ErrNoSpace)
	}
	if err := im.clearBeyond(old, size); err != nil {
		return err
	}
	if need <= uint64(len(im.l1)) {
		if err := im.flush(); err != nil {
			return err
		}
		im.hdr.size = uint64(size)
		if err := im.writeHeader(); err != nil {
			return err
		}
	} else if err := im.restructure(func() error { return im.growL1(need, uint64(size)) }); err != nil {
		return err
	}
	im.size.Store(size)
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
// anything.
func (im *Image) clearBeyond(old, size int64) error {
	g := &im.geo
	if _, _, in := g.split(old); in != 0 {
		n := min(int64(g.cs-in), size-old)
		m, err := im.mapRun(old, uint64(n), true)
		if err != nil {
			return err
		}
		if m.kind == normal || m.kind == compressed {
			if err := im.zeroTail(old, n); err != nil {
				return err
			}
		}
		old += n
	}
	end := min(uint64(size), uint64(len(im.l1))<<(g.bits+g.l2Bits))
	if uint64(old) >= end {
		return nil
	}
	return im.unmap(old, int64(end), true)
}

// zeroTail writes zeros over the rest of a cluster, unless they are there.
func (im *Image) zeroTail(off, n int64) error {
	b := make([]byte, n)
	if _, err := im.read(b, off); err != nil {
		return err
	}
	for _, v := range b {
		if v != 0 {
			clear(b)
			return im.writeBeyond(b, off)
		}
	}
	return nil
}

// writeBeyond writes part of one cluster, in place or not, whatever the size
// of the disk.
func (im *Image) writeBeyond(p []byte, off int64) error {
	t, err := im.l2ForWrite(off)
	if err != nil {
		return err
	}
	_, i, in := im.geo.split(off)
	e, err := im.entryAt(t, i, true)
	if err != nil {
		return err
	}
	if e.kind == normal && e.copied {
		if err := im.ownData(e.host, im.geo.cs); err != nil {
			return err
		}
		return im.writeFile(p, e.host+in)
	}
	w := batch{im: im, p: p}
	if _, err := w.cluster(t, i, in, 0, uint64(len(p))); err != nil {
		return err
	}
	if err := w.write(); err != nil {
		return err
	}
	return w.commit(t)
}
