package xts

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/subtle"
	"encoding/binary"
	"sync"
)

// generic is XTS over two block ciphers.
type generic struct {
	data, tweak cipher.Block
}

func newGeneric(key []byte) (*generic, error) {
	half := len(key) / 2
	data, err := aes.NewCipher(key[:half])
	if err != nil {
		return nil, err
	}
	tweak, err := aes.NewCipher(key[half:])
	if err != nil {
		return nil, err
	}
	return &generic{data, tweak}, nil
}

// tweaks keeps the allocation of a tweak, which escapes into an interface's
// method, out of the calls.
var tweaks = sync.Pool{New: func() any { return new([BlockSize]byte) }}

func (g *generic) crypt(dst, src []byte, sector uint64, sectorSize int, step uint64, decrypt bool) {
	t := tweaks.Get().(*[BlockSize]byte)
	defer tweaks.Put(t)
	for len(src) > 0 {
		binary.LittleEndian.PutUint64(t[:8], sector)
		clear(t[8:])
		g.sector(dst[:sectorSize], src[:sectorSize], t, decrypt)
		dst, src = dst[sectorSize:], src[sectorSize:]
		sector += step
	}
}

func (g *generic) unit(dst, src []byte, tweak *[BlockSize]byte, decrypt bool) {
	t := tweaks.Get().(*[BlockSize]byte)
	defer tweaks.Put(t)
	*t = *tweak
	g.sector(dst[:len(src)], src, t, decrypt)
}

// sector overwrites t.
func (g *generic) sector(dst, src []byte, t *[BlockSize]byte, decrypt bool) {
	g.tweak.Encrypt(t[:], t[:])
	for i := 0; i < len(src); i += BlockSize {
		d, s := dst[i:i+BlockSize], src[i:i+BlockSize]
		subtle.XORBytes(d, s, t[:])
		if decrypt {
			g.data.Decrypt(d, d)
		} else {
			g.data.Encrypt(d, d)
		}
		subtle.XORBytes(d, d, t[:])
		double(t)
	}
}
