package qcow2

import (
	"encoding/binary"
	"fmt"

	"nvstore.dev/image"
)

// getRefcount reads entry i of a refcount block of 1<<order bits an entry.
// Widths below a byte fill it from the least significant bit up.
func getRefcount(b []byte, order uint32, i uint64) uint64 {
	be := binary.BigEndian
	switch order {
	case 3:
		return uint64(b[i])
	case 4:
		return uint64(be.Uint16(b[i*2:]))
	case 5:
		return uint64(be.Uint32(b[i*4:]))
	case 6:
		return be.Uint64(b[i*8:])
	}
	per := uint64(8) >> order
	return uint64(b[i/per]) >> (i % per << order) & (1<<(1<<order) - 1)
}

func putRefcount(b []byte, order uint32, i, v uint64) {
	be := binary.BigEndian
	switch order {
	case 3:
		b[i] = byte(v)
	case 4:
		be.PutUint16(b[i*2:], uint16(v))
	case 5:
		be.PutUint32(b[i*4:], uint32(v))
	case 6:
		be.PutUint64(b[i*8:], v)
	default:
		per := uint64(8) >> order
		shift := i % per << order
		mask := byte(1<<(1<<order)-1) << shift
		b[i/per] = b[i/per]&^mask | byte(v)<<shift
	}
}

// maxRefcount is the largest count that fits.
func (g *geometry) maxRefcount() uint64 { return 1<<(1<<g.refOrder) - 1 }

// refcountBytes is which bytes of a block hold entry i.
func (g *geometry) refcountBytes(i uint64) (lo, hi int) {
	lo = int(i << g.refOrder >> 3)
	return lo, lo + max(1, 1<<g.refOrder>>3)
}

// refblock returns refcount block i, or nil if there is none.
func (im *Image) refblock(i uint64) (*table, error) {
	if i >= uint64(len(im.reftable)) || im.reftable[i] == 0 {
		return nil, nil
	}
	return im.rbc.get(im.reftable[i], im.loadTable)
}

// refcount returns the refcount of cluster c.
func (im *Image) refcount(c uint64) (uint64, error) {
	t, err := im.refblock(c >> im.geo.rbBits)
	if t == nil || err != nil {
		return 0, err
	}
	return getRefcount(t.buf, im.geo.refOrder, c&(1<<im.geo.rbBits-1)), nil
}

// setRefcount changes the refcount of cluster c, whose block must exist.
func (im *Image) setRefcount(c, v uint64) error {
	bi, i := c>>im.geo.rbBits, c&(1<<im.geo.rbBits-1)
	if im.shadow != nil {
		if err := im.ownRefblock(bi); err != nil {
			return err
		}
	}
	if err := im.makeRoom(im.rbc); err != nil {
		return err
	}
	t, err := im.refblock(bi)
	if err != nil {
		return err
	}
	if t == nil {
		return im.badRefcount(c, "a refcount block")
	}
	putRefcount(t.buf, im.geo.refOrder, i, v)
	lo, hi := im.geo.refcountBytes(i)
	im.rbc.touch(t, lo, hi)
	if v == 0 {
		im.full[bi] = false
		im.alloc.freed(c)
		if im.packAt>>im.geo.bits == c {
			im.packAt = 0
		}
	}
	return nil
}

// addRefcount changes the refcount of cluster c by delta.
func (im *Image) addRefcount(c uint64, delta int) error {
	v, err := im.refcount(c)
	if err != nil {
		return err
	}
	switch {
	case v == 0:
		return im.badRefcount(c, "a refcount above 0, as the cluster is in use")
	case delta > 0 && v > im.geo.maxRefcount()-uint64(delta):
		return fmt.Errorf("qcow2: cluster %#x is shared too often for refcounts of %d bits: %w",
			c<<im.geo.bits, 1<<im.geo.refOrder, image.ErrUnsupported)
	case delta < 0 && v < uint64(-delta):
		return im.badRefcount(c, fmt.Sprintf("a refcount of at least %d", -delta))
	}
	return im.setRefcount(c, v+uint64(delta))
}

func (im *Image) badRefcount(c uint64, want string) error {
	return fieldError{im.path, "qcow2 cluster"}.at(int64(c<<im.geo.bits), "refcount", nil, want, image.ErrCorrupt)
}

// ensureRefblock makes refcount block bi exist.
func (im *Image) ensureRefblock(bi uint64) error {
	for {
		if bi >= uint64(len(im.reftable)) {
			if err := im.extendReftable(bi + 1); err != nil {
				return err
			}
			continue
		}
		if im.reftable[bi] != 0 {
			return nil
		}
		// A block usually counts itself. Where the clusters that it
		// counts are spoken for, it lies elsewhere.
		x, err := im.findFree(1)
		if err != nil {
			return err
		}
		if xb := x >> im.geo.rbBits; xb != bi {
			if xb >= uint64(len(im.reftable)) || im.reftable[xb] == 0 {
				if err := im.ensureRefblock(xb); err != nil {
					return err
				}
				continue
			}
		}
		return im.addRefblock(bi, x)
	}
}

// addRefblock makes cluster x refcount block bi. The block is durable before
// the refcount table refers to it. That entry is durable before anything that
// relies on it, as every such write follows another Sync.
func (im *Image) addRefblock(bi, x uint64) error {
	if err := im.growFile((x + 1) << im.geo.bits); err != nil {
		return err
	}
	if err := im.makeRoom(im.rbc); err != nil {
		return err
	}
	defer im.reserve(x, 1)()
	im.alloc.virgin = max(im.alloc.virgin, x+1)
	im.meta.set(x, metaRefblock)
	t := &table{off: x << im.geo.bits, buf: make([]byte, im.geo.cs), fresh: true}
	im.rbc.put(t)
	im.rbc.touch(t, 0, len(t.buf))
	if im.shadow != nil {
		im.reftable[bi] = t.off
		im.shadow.fresh[bi] = true
		return im.setRefcount(x, 1)
	}
	if err := im.linkRefblock(bi, x, t); err != nil {
		return im.poison(err)
	}
	return nil
}

func (im *Image) linkRefblock(bi, x uint64, t *table) error {
	if x>>im.geo.rbBits == bi {
		putRefcount(t.buf, im.geo.refOrder, x&(1<<im.geo.rbBits-1), 1)
	} else if err := im.setRefcount(x, 1); err != nil {
		return err
	}
	if err := im.writeTables(im.rbc, metaRefblock); err != nil {
		return err
	}
	if err := im.syncFile(); err != nil {
		return err
	}
	im.reftable[bi] = t.off
	return im.writeEntries(im.reftable, im.hdr.reftableOff, bi*8/sector, metaReftable)
}

// extendReftable makes the refcount table hold at least n entries.
func (im *Image) extendReftable(n uint64) error {
	per := im.geo.cs / 8
	if n > maxReftableBytes/8 {
		return fmt.Errorf("qcow2: refcount table is full: %w", image.ErrNoSpace)
	}
	if im.shadow == nil {
		// Growing by half makes the cost of all growing linear.
		n = min(max(n, uint64(len(im.reftable))*3/2), maxReftableBytes/8)
		return im.restructure(func() error { return im.extendReftable(n) })
	}
	for uint64(len(im.reftable)) < n {
		im.reftable = append(im.reftable, make([]uint64, per)...)
		im.full = append(im.full, make([]bool, per)...)
		im.shadow.fresh = append(im.shadow.fresh, make([]bool, per)...)
	}
	return nil
}
