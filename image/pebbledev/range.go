package pebbledev

import (
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"nvstore.dev/image"
)

// Discard drops the whole blocks in a range. They read as zeros afterwards;
// the bytes of the blocks that the range only touches keep their values.
func (d *Device) Discard(off, n int64) error {
	return d.drop(off, n, false)
}

// WriteZeroes drops the whole blocks in a range, and writes zeros over the
// rest of it.
func (d *Device) WriteZeroes(off, n int64) error {
	return d.drop(off, n, true)
}

func (d *Device) drop(off, n int64, edges bool) error {
	// Held so that no older content of these blocks is on its way.
	d.commit.Lock()
	defer d.commit.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.check(true); err != nil {
		return err
	}
	if err := image.CheckRange(off, n, d.size); err != nil {
		return err
	}
	first, end := blocks(off), (off+n)/BlockSize
	if off+n == d.size {
		end = blocks(d.size)
	}
	if edges {
		if err := d.zeroEdges(off, off+n, first, end); err != nil {
			return err
		}
	}
	if first >= end {
		return nil
	}
	if end-first <= int64(maxPendingBlocks-len(d.pending)) {
		for b := first; b < end; b++ {
			d.pending[b] = nil
		}
		return nil
	}
	return d.dropStored(first, end, nil)
}

// zeroEdges zeroes the parts of [off, end) that lie before block b0 and from
// block b1 on. mu is held.
func (d *Device) zeroEdges(off, end, b0, b1 int64) error {
	if b0 > b1 { // inside one block
		return d.put(make([]byte, end-off), off)
	}
	if err := d.put(make([]byte, b0*BlockSize-off), off); err != nil {
		return err
	}
	if tail := b1 * BlockSize; tail < end {
		return d.put(make([]byte, end-tail), tail)
	}
	return nil
}

// dropStored drops the blocks [first, end) in Pebble at once, together with
// the layer l. commit and mu are held, and nothing is being handed over.
func (d *Device) dropStored(first, end int64, l layer) error {
	for b := range d.pending {
		if first <= b && b < end {
			delete(d.pending, b)
		}
	}
	b := d.h.db.NewBatch()
	defer b.Close()
	if first < end {
		_ = b.DeleteRange(blockKey(d.machine, first), blockKey(d.machine, end), nil)
	}
	d.fill(b, l)
	d.newSize, d.unsynced = false, true
	return d.h.apply(b, pebble.NoSync)
}

// Resize changes the size to at most MaxSize bytes. Shrinking drops the blocks
// past it.
func (d *Device) Resize(size int64) error {
	d.commit.Lock()
	defer d.commit.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.check(true); err != nil {
		return err
	}
	if size < 0 || size > MaxSize {
		return image.ErrOutOfRange
	}
	if size == d.size {
		return nil
	}
	if size > d.size {
		d.size, d.newSize = size, true
		return nil
	}
	return d.shrink(size)
}

// shrink drops the blocks and clears the bytes past size in the same batch as
// it stores the size, so that a later growth finds zeros there, crash or not.
func (d *Device) shrink(size int64) error {
	l := layer{}
	last, end := size/BlockSize, blocks(d.size)
	if at := size % BlockSize; at != 0 {
		data, err := d.edit(last, false)
		if err != nil {
			return err
		}
		clear(data[at:])
		l[last] = data
		last++
	}
	d.size, d.newSize = size, true
	return d.dropStored(last, end, l)
}

// BlockStatus implements image.BlockStatuser. A block is allocated if it is
// stored or about to be.
func (d *Device) BlockStatus(off, n int64) (image.Extent, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.check(false); err != nil {
		return image.Extent{}, err
	}
	if err := image.CheckRange(off, n, d.size); err != nil || n == 0 {
		return image.Extent{}, image.ErrOutOfRange
	}
	first, end := off/BlockSize, blocks(off+n)
	allocated, next, err := d.run(first, end)
	if err != nil {
		return image.Extent{}, err
	}
	stop := min(next*BlockSize, off+n)
	return image.Extent{Start: off, Length: stop - off, Allocated: allocated, Zero: !allocated, Offset: -1}, nil
}

// run tells whether block first is allocated, and where in [first, end) the
// first block that differs lies. mu is held.
func (d *Device) run(first, end int64) (allocated bool, next int64, err error) {
	changed := d.changed(first, end)
	next = first
	err = d.stored(first, end, func(it *pebble.Iterator) error {
		ok := it.First()
		for next < end {
			var s int64 = end // the next stored block
			if ok {
				if s, err = d.blockAt(it); err != nil {
					return err
				}
			}
			c := end // the next changed one
			if len(changed) > 0 {
				c = changed[0]
			}
			// All of [next, to) has the status is.
			to, is := min(s, c), false
			if to == next {
				to, is = next+1, s == next
				if c == next {
					data, _ := d.cached(c)
					is, changed = data != nil, changed[1:]
				}
				if s == next {
					ok = it.Next()
				}
			}
			if next == first {
				allocated = is
			} else if is != allocated {
				return nil
			}
			next = to
		}
		return nil
	})
	return allocated, next, err
}

// changed lists in order the blocks in [first, end) that aren't in Pebble yet.
func (d *Device) changed(first, end int64) []int64 {
	var list []int64
	for _, l := range []layer{d.pending, d.flushing} {
		for b := range l {
			if first <= b && b < end {
				list = append(list, b)
			}
		}
	}
	slices.Sort(list)
	return slices.Compact(list)
}
