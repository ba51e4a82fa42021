// Package xts encrypts sectors with AES-XTS (IEEE Std 1619-2018, NIST SP
// 800-38E), as dm-crypt, LUKS and QEMU do: the tweak is a sector number as 128
// bits, little endian. Other ciphers of 16-byte blocks are possible too.
//
// One call takes any number of sectors. On amd64 and arm64 the work is done by
// AES instructions, eight blocks at a time; elsewhere, and with the build tag
// purego, by crypto/aes a block at a time. Other ciphers are always slow.
//
// XTS keeps data secret, block by block. It doesn't authenticate: whoever can
// write to the medium can change plaintext at random, 16 bytes at a time, or
// put an older version of a block back. Use it where a format demands it.
package xts

import (
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"unsafe"
)

// BlockSize is the size of an AES block in bytes. Sectors are multiples of it.
const BlockSize = 16

// A KeySizeError is the length in bytes of a key that New refuses.
type KeySizeError int

func (k KeySizeError) Error() string {
	return fmt.Sprintf("xts: key of %d bytes, want 32, 48 or 64", int(k))
}

// A Cipher is XTS, of AES unless it is from NewBlocks, under one key. It is safe for concurrent use.
type Cipher struct {
	asm     schedule // used if accelerated
	generic *generic // used otherwise, and for other ciphers
}

// New returns the Cipher of a key of 32 bytes (AES-128), 48 (AES-192) or 64
// (AES-256): the first half encrypts data, the second half tweaks. It takes
// equal halves, as dm-crypt does, though FIPS 140 forbids them.
func New(key []byte) (*Cipher, error) {
	switch len(key) {
	case 32, 48, 64:
	default:
		return nil, KeySizeError(len(key))
	}
	c := new(Cipher)
	if accelerated {
		c.asm.expand(key)
		return c, nil
	}
	g, err := newGeneric(key)
	if err != nil {
		return nil, err
	}
	c.generic = g
	return c, nil
}

// NewBlocks returns the Cipher of any two block ciphers of 16-byte blocks, one
// for data and one for tweaks. Both must be safe for concurrent use.
func NewBlocks(data, tweak cipher.Block) (*Cipher, error) {
	for _, b := range []cipher.Block{data, tweak} {
		if b.BlockSize() != BlockSize {
			return nil, fmt.Errorf("xts: block size of %d bytes, want %d", b.BlockSize(), BlockSize)
		}
	}
	return &Cipher{generic: &generic{data, tweak}}, nil
}

// EncryptSectors encrypts len(src)/sectorSize sectors of sectorSize bytes from
// src to dst. The first has the given number, each other the next. sectorSize
// is a positive multiple of BlockSize, and len(src) one of sectorSize. dst is
// as long as src or longer, and is src or doesn't overlap it. Anything else is
// the caller's mistake and panics, as in crypto/cipher.
func (c *Cipher) EncryptSectors(dst, src []byte, sector uint64, sectorSize int) {
	c.EncryptSectorsStep(dst, src, sector, sectorSize, 1)
}

// DecryptSectors undoes EncryptSectors.
func (c *Cipher) DecryptSectors(dst, src []byte, sector uint64, sectorSize int) {
	c.DecryptSectorsStep(dst, src, sector, sectorSize, 1)
}

// EncryptSectorsStep is EncryptSectors where each sector's number is the one
// before plus step, modulo 2^64. LUKS2 counts in units of 512 bytes whatever
// the sector size, so its step is sectorSize/512.
func (c *Cipher) EncryptSectorsStep(dst, src []byte, sector uint64, sectorSize int, step uint64) {
	check(dst, src, sectorSize)
	if c.generic == nil {
		c.asm.crypt(dst, src, sector, sectorSize, step, false)
	} else {
		c.generic.crypt(dst, src, sector, sectorSize, step, false)
	}
}

// DecryptSectorsStep undoes EncryptSectorsStep.
func (c *Cipher) DecryptSectorsStep(dst, src []byte, sector uint64, sectorSize int, step uint64) {
	check(dst, src, sectorSize)
	if c.generic == nil {
		c.asm.crypt(dst, src, sector, sectorSize, step, true)
	} else {
		c.generic.crypt(dst, src, sector, sectorSize, step, true)
	}
}

// EncryptUnit encrypts src, of a positive multiple of BlockSize bytes, as one
// data unit whose tweak isn't a number, but any 16 bytes. dst is as for
// EncryptSectors.
func (c *Cipher) EncryptUnit(dst, src []byte, tweak *[BlockSize]byte) {
	check(dst, src, len(src))
	if c.generic == nil {
		c.asm.unit(dst, src, tweak, false)
	} else {
		c.generic.unit(dst, src, tweak, false)
	}
}

// DecryptUnit undoes EncryptUnit.
func (c *Cipher) DecryptUnit(dst, src []byte, tweak *[BlockSize]byte) {
	check(dst, src, len(src))
	if c.generic == nil {
		c.asm.unit(dst, src, tweak, true)
	} else {
		c.generic.unit(dst, src, tweak, true)
	}
}

func check(dst, src []byte, sectorSize int) {
	switch {
	case sectorSize <= 0 || sectorSize%BlockSize != 0:
		panic("internal error: xts: sector size is not a positive multiple of the block size")
	case len(src)%sectorSize != 0:
		panic("internal error: xts: input is not whole sectors")
	case len(dst) < len(src):
		panic("internal error: xts: output smaller than input")
	case inexactOverlap(dst[:len(src)], src):
		panic("internal error: xts: invalid buffer overlap")
	}
}

// inexactOverlap tells whether a and b, of one length, share memory without
// being the same.
func inexactOverlap(a, b []byte) bool {
	if len(a) == 0 {
		return false
	}
	x, y := uintptr(unsafe.Pointer(&a[0])), uintptr(unsafe.Pointer(&b[0]))
	n := uintptr(len(a))
	return x != y && x < y+n && y < x+n
}

// double multiplies a tweak by x in GF(2^128), IEEE Std 1619-2018 section
// 5.2.
func double(t *[BlockSize]byte) {
	lo, hi := binary.LittleEndian.Uint64(t[:8]), binary.LittleEndian.Uint64(t[8:])
	carry := -(hi >> 63) & 0x87
	hi = hi<<1 | lo>>63
	lo = lo<<1 ^ carry
	binary.LittleEndian.PutUint64(t[:8], lo)
	binary.LittleEndian.PutUint64(t[8:], hi)
}
