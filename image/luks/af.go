package luks

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"hash"
)

// stripes is the only number of them that either format allows.
const stripes = 4000

// afSize is the size in bytes of a split key of keySize bytes.
func afSize(keySize int) int64 { return int64(keySize) * stripes }

// afSplit spreads key over n stripes such that every one of their bits is
// needed to have it back (LUKS1 specification, section 2.4).
func afSplit(newHash func() hash.Hash, key []byte, n int) []byte {
	size := len(key)
	out := make([]byte, size*n)
	last := out[size*(n-1):]
	_, _ = rand.Read(out[:size*(n-1)]) // never fails
	d := newDiffuser(newHash, size)
	for i := range n - 1 {
		subtle.XORBytes(d.block, d.block, out[i*size:(i+1)*size])
		d.diffuse()
	}
	subtle.XORBytes(last, d.block, key)
	clear(d.block)
	return out
}

// afMerge undoes afSplit: split is n stripes of a key each.
func afMerge(newHash func() hash.Hash, split []byte, n int) []byte {
	size := len(split) / n
	d := newDiffuser(newHash, size)
	for i := range n - 1 {
		subtle.XORBytes(d.block, d.block, split[i*size:(i+1)*size])
		d.diffuse()
	}
	subtle.XORBytes(d.block, d.block, split[size*(n-1):size*n])
	return d.block
}

// A diffuser replaces each part of a block, as long as a digest, by the digest
// of its number and itself. The last part's digest is cut.
type diffuser struct {
	h     hash.Hash
	block []byte
	sum   []byte
}

func newDiffuser(newHash func() hash.Hash, size int) *diffuser {
	return &diffuser{newHash(), make([]byte, size), make([]byte, 0, 64)}
}

func (d *diffuser) diffuse() {
	var number [4]byte
	part := d.h.Size()
	for i := 0; i*part < len(d.block); i++ {
		p := d.block[i*part : min((i+1)*part, len(d.block))]
		binary.BigEndian.PutUint32(number[:], uint32(i))
		d.h.Reset()
		d.h.Write(number[:])
		d.h.Write(p)
		copy(p, d.h.Sum(d.sum))
	}
}
