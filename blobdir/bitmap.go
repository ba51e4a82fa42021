package blobdir

import "math/bits"

// A bitmap has a bit a block, in pages that appear as they are needed: 32 KiB
// of it stand for 1 GiB of image.
type bitmap struct {
	pages map[int64]*[512]uint64 // 32768 blocks each
	count int64
}

func newBitmap() *bitmap { return &bitmap{pages: make(map[int64]*[512]uint64)} }

// set marks the blocks of [off, off+n), and returns the first that was marked
// before, or -1.
func (b *bitmap) set(off, n int64) int64 {
	clash := int64(-1)
	for blk := off / BlockSize; blk < (off+n+BlockSize-1)/BlockSize; blk++ {
		p := b.pages[blk>>15]
		if p == nil {
			p = new([512]uint64)
			b.pages[blk>>15] = p
		}
		w, m := &p[blk>>6&511], uint64(1)<<(blk&63)
		if *w&m != 0 {
			if clash < 0 {
				clash = blk * BlockSize
			}
			continue
		}
		*w |= m
		b.count++
	}
	return clash
}

func (b *bitmap) has(blk int64) bool {
	p := b.pages[blk>>15]
	return p != nil && p[blk>>6&511]&(1<<(blk&63)) != 0
}

// gaps calls fn for each run of unmarked blocks in [from, to).
func (b *bitmap) gaps(from, to int64, fn func(off, n int64) error) error {
	start := int64(-1)
	end := to / BlockSize
	for blk := from / BlockSize; blk <= end; blk++ {
		if blk < end && blk&63 == 0 && start >= 0 { // skip whole words inside a gap
			if p := b.pages[blk>>15]; p == nil || bits.OnesCount64(p[blk>>6&511]) == 0 {
				if blk+64 <= end {
					blk += 63
					continue
				}
			}
		}
		free := blk < end && !b.has(blk)
		switch {
		case free && start < 0:
			start = blk
		case !free && start >= 0:
			if err := fn(start*BlockSize, (blk-start)*BlockSize); err != nil {
				return err
			}
			start = -1
		}
	}
	return nil
}
