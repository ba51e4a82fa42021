package luks

import (
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"sync"
)

// maxBlock is the largest block of a cipher, in bytes.
const maxBlock = 16

// A work holds what goes through cipher.Block's methods, which makes it
// escape: it is pooled so that a sector costs no allocation.
type work struct {
	iv, a, b [maxBlock]byte
}

// An ivGen makes IVs of sector numbers.
type ivGen struct {
	short bool         // plain: the number's low 32 bits
	essiv cipher.Block // nil but for essiv
	pool  sync.Pool
}

func newIV(kind string, essiv cipher.Block) *ivGen {
	g := &ivGen{short: kind == "plain", essiv: essiv}
	g.pool.New = func() any { return new(work) }
	return g
}

func (g *ivGen) get() *work  { return g.pool.Get().(*work) }
func (g *ivGen) put(w *work) { g.pool.Put(w) }

// make puts a sector's IV into w.
func (g *ivGen) make(w *work, sector uint64) {
	if g.short {
		sector &= 1<<32 - 1
	}
	binary.LittleEndian.PutUint64(w.iv[:8], sector)
	clear(w.iv[8:])
	if g.essiv != nil {
		n := g.essiv.BlockSize()
		g.essiv.Encrypt(w.iv[:n], w.iv[:n])
	}
}

// A blockMode is cbc, ctr or ecb over sectors, with blocks of 8 or 16 bytes.
type blockMode struct {
	b     cipher.Block
	block int // its size
	mode  string
	iv    *ivGen
	size  int // of a sector
}

func (c *blockMode) encrypt(dst, src []byte, sector uint64) { c.run(dst, src, sector, false) }
func (c *blockMode) decrypt(dst, src []byte, sector uint64) { c.run(dst, src, sector, true) }

func (c *blockMode) run(dst, src []byte, sector uint64, decrypt bool) {
	w := c.iv.get()
	defer c.iv.put(w)
	for i := 0; i < len(src); i += c.size {
		c.iv.make(w, sector)
		d, s := dst[i:i+c.size], src[i:i+c.size]
		switch {
		case c.mode == "ctr":
			c.ctr(d, s, w)
		case c.mode == "ecb" && decrypt:
			for j := 0; j < len(s); j += c.block {
				c.b.Decrypt(d[j:j+c.block], s[j:j+c.block])
			}
		case c.mode == "ecb":
			for j := 0; j < len(s); j += c.block {
				c.b.Encrypt(d[j:j+c.block], s[j:j+c.block])
			}
		case decrypt:
			c.cbcDecrypt(d, s, w)
		default:
			c.cbcEncrypt(d, s, w)
		}
		sector += uint64(c.size / 512)
	}
}

func (c *blockMode) cbcEncrypt(dst, src []byte, w *work) {
	prev := w.iv[:c.block]
	for i := 0; i < len(src); i += c.block {
		d := dst[i : i+c.block]
		subtle.XORBytes(d, src[i:], prev)
		c.b.Encrypt(d, d)
		prev = d
	}
}

func (c *blockMode) cbcDecrypt(dst, src []byte, w *work) {
	prev, cur := w.iv[:c.block], w.a[:c.block]
	for i := 0; i < len(src); i += c.block {
		d := dst[i : i+c.block]
		copy(cur, src[i:]) // dst may be src
		c.b.Decrypt(d, cur)
		subtle.XORBytes(d, d, prev)
		prev, cur = cur, prev
	}
}

// ctr counts in the whole IV, as long as a block, big endian.
func (c *blockMode) ctr(dst, src []byte, w *work) {
	n := c.block
	var hi uint64
	lo := binary.BigEndian.Uint64(w.iv[n-8:])
	if n == maxBlock {
		hi = binary.BigEndian.Uint64(w.iv[:8])
	}
	for i := 0; i < len(src); i += n {
		if n == maxBlock {
			binary.BigEndian.PutUint64(w.a[:8], hi)
		}
		binary.BigEndian.PutUint64(w.a[n-8:], lo)
		c.b.Encrypt(w.b[:n], w.a[:n])
		subtle.XORBytes(dst[i:i+n], src[i:], w.b[:n])
		if lo++; lo == 0 {
			hi++
		}
	}
}
