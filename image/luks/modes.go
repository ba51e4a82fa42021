package luks

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"sync"
)

// A work holds what goes through cipher.Block's methods, which makes it
// escape: it is pooled so that a sector costs no allocation.
type work struct {
	iv, a, b [aes.BlockSize]byte
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
		g.essiv.Encrypt(w.iv[:], w.iv[:])
	}
}

// A blockMode is cbc, ctr or ecb over sectors.
type blockMode struct {
	b    cipher.Block
	mode string
	iv   *ivGen
	size int
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
			for j := 0; j < len(s); j += aes.BlockSize {
				c.b.Decrypt(d[j:], s[j:])
			}
		case c.mode == "ecb":
			for j := 0; j < len(s); j += aes.BlockSize {
				c.b.Encrypt(d[j:], s[j:])
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
	prev := w.iv[:]
	for i := 0; i < len(src); i += aes.BlockSize {
		d := dst[i : i+aes.BlockSize]
		subtle.XORBytes(d, src[i:], prev)
		c.b.Encrypt(d, d)
		prev = d
	}
}

func (c *blockMode) cbcDecrypt(dst, src []byte, w *work) {
	prev, cur := &w.iv, &w.a
	for i := 0; i < len(src); i += aes.BlockSize {
		d := dst[i : i+aes.BlockSize]
		copy(cur[:], src[i:]) // dst may be src
		c.b.Decrypt(d, cur[:])
		subtle.XORBytes(d, d, prev[:])
		prev, cur = cur, prev
	}
}

// ctr counts in the whole IV, big endian.
func (c *blockMode) ctr(dst, src []byte, w *work) {
	hi, lo := binary.BigEndian.Uint64(w.iv[:8]), binary.BigEndian.Uint64(w.iv[8:])
	for i := 0; i < len(src); i += aes.BlockSize {
		binary.BigEndian.PutUint64(w.a[:8], hi)
		binary.BigEndian.PutUint64(w.a[8:], lo)
		c.b.Encrypt(w.b[:], w.a[:])
		subtle.XORBytes(dst[i:i+aes.BlockSize], src[i:], w.b[:])
		if lo++; lo == 0 {
			hi++
		}
	}
}
