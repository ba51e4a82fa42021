package imagetest

import (
	"encoding/binary"
	"math"
	"math/bits"
)

const (
	sectorSize     = 512
	sectorsPerPage = pageSize / sectorSize
)

// A Content is the whole of a device's bytes at one moment. It is cheap to
// keep and safe for concurrent use.
type Content struct{ content }

// Hash returns the 64-bit hash of size and bytes.
func (c *Content) Hash() uint64 { return c.hash() }

// content is a size and the bytes below it. Bytes of a page past the size are
// zeros, so that growing is free.
type content struct {
	tree pageTree
	size int64
	sum  uint64 // XOR of the hashes of all sectors that aren't all zeros
}

func newContent(size int64) content {
	return content{tree: pageTree{}.writable(), size: size}
}

func (c *content) frozen() content {
	return content{tree: c.tree.frozen(), size: c.size, sum: c.sum}
}

func (c content) writable() content {
	c.tree = c.tree.writable()
	return c
}

func (c *content) hash() uint64 {
	hi, lo := bits.Mul64(c.sum^0x9e3779b97f4a7c15, uint64(c.size)^0xd1b54a32d192ed03)
	return hi ^ lo ^ c.sum
}

// sectorHash depends on a sector's number and bytes; it is 0 for zeros.
func sectorHash(sector int64, b []byte) uint64 {
	if b == nil {
		return 0
	}
	const k1, k2 = 0xa0761d6478bd642f, 0xe7037ed1a0b428db
	h, any := uint64(sector)*0x9e3779b97f4a7c15, uint64(0)
	for i := 0; i < sectorSize; i += 16 {
		x := binary.LittleEndian.Uint64(b[i:])
		y := binary.LittleEndian.Uint64(b[i+8:])
		any |= x | y
		hi, lo := bits.Mul64(x^k1, y^h^k2)
		h = bits.RotateLeft64(h, 29) ^ hi ^ lo
	}
	if any == 0 {
		return 0
	}
	hi, lo := bits.Mul64(h^k1, k2)
	return hi ^ lo | 1
}

// sector returns a sector's 512 bytes, not to be changed; nil means zeros.
func (c *content) sector(i int64) []byte {
	pg := c.tree.get(i / sectorsPerPage)
	if pg == nil {
		return nil
	}
	at := i % sectorsPerPage * sectorSize
	return pg.data[at : at+sectorSize]
}

// setSector replaces a sector; b has 512 bytes, or is nil for zeros.
func (c *content) setSector(i int64, b []byte) {
	old := c.sector(i)
	if old == nil && b == nil {
		return
	}
	c.sum ^= sectorHash(i, old) ^ sectorHash(i, b)
	at := i % sectorsPerPage * sectorSize
	dst := c.tree.edit(i / sectorsPerPage).data[at : at+sectorSize]
	clear(dst)
	copy(dst, b)
}

func (c *content) readAt(p []byte, off int64) {
	for len(p) > 0 {
		at := off % pageSize
		n := min(int64(len(p)), pageSize-at)
		if pg := c.tree.get(off / pageSize); pg != nil {
			copy(p[:n], pg.data[at:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

func (c *content) writeAt(p []byte, off int64) {
	for len(p) > 0 {
		at := off % sectorSize
		n := min(int64(len(p)), sectorSize-at)
		s := off / sectorSize
		pg := c.tree.edit(s / sectorsPerPage)
		from := s % sectorsPerPage * sectorSize
		sec := pg.data[from : from+sectorSize]
		c.sum ^= sectorHash(s, sec)
		copy(sec[at:], p[:n])
		c.sum ^= sectorHash(s, sec)
		p, off = p[n:], off+n
	}
}

// zero costs by what is stored, not by n.
func (c *content) zero(off, n int64) {
	end := off + n
	for _, i := range c.tree.stored(off/pageSize, pages(end), math.MaxInt) {
		lo, hi := max(off, i*pageSize), min(end, (i+1)*pageSize)
		if hi-lo < pageSize {
			c.writeAt(make([]byte, hi-lo), lo)
			continue
		}
		for s := i * sectorsPerPage; s < (i+1)*sectorsPerPage; s++ {
			c.sum ^= sectorHash(s, c.sector(s))
		}
		c.tree.drop(i)
	}
}

func (c *content) resize(size int64) {
	if size < c.size {
		c.zero(size, c.size-size)
	}
	c.size = size
}

// used returns the sectors that touch [off, off+n) and aren't all zeros.
func (c *content) used(off, n int64) []int64 {
	if n <= 0 {
		return nil
	}
	var found []int64
	first, last := off/sectorSize, (off+n-1)/sectorSize
	for _, i := range c.tree.stored(off/pageSize, pages(off+n), math.MaxInt) {
		lo, hi := max(first, i*sectorsPerPage), min(last, (i+1)*sectorsPerPage-1)
		for s := lo; s <= hi; s++ {
			if sectorHash(s, c.sector(s)) != 0 {
				found = append(found, s)
			}
		}
	}
	return found
}

func pages(n int64) int64 { return n/pageSize + (n%pageSize+pageSize-1)/pageSize }
