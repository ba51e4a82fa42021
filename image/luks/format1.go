package luks

import (
	"crypto/rand"
	"math"
	"strings"
)

// v1AreaAt is where the key area of a slot begins: from byte 4096, each
// aligned to that.
func v1AreaAt(slot, keySize int) int64 {
	return 4096 + int64(slot)*((afSize(keySize)+4095)/4096*4096)
}

// writeV1 writes a key area, and, when that is durable, the header.
func writeV1(f *formatter) error {
	p := (&Budget{Rounds: math.MaxUint64}).open()
	newHash := hashes[f.Hash]
	h := &v1Header{payload: uint32(f.offset / 512), keyBytes: uint32(f.KeySize), iterations: f.digestIterations()}
	name, rest, _ := strings.Cut(f.Encryption, "-")
	copy(h.text[0][:], name)
	copy(h.text[1][:31], rest)
	copy(h.text[2][:31], f.Hash)
	copy(h.uuid[:], f.UUID)
	_, _ = rand.Read(h.salt[:]) // never fails
	for i := range h.slot {
		h.slot[i] = v1Slot{state: v1Inactive, offset: uint32(v1AreaAt(i, f.KeySize) / 512), stripes: stripes}
	}
	sum, err := p.pbkdf2(newHash, f.key, h.salt[:], uint64(h.iterations), v1Digest)
	if err != nil {
		return err
	}
	copy(h.digest[:], sum)

	s := &h.slot[0]
	s.state, s.iterations = v1Active, f.Iterations
	_, _ = rand.Read(s.salt[:]) // never fails
	derived, err := p.pbkdf2(newHash, f.Passphrase, s.salt[:], uint64(s.iterations), f.KeySize)
	if err != nil {
		return err
	}
	defer clear(derived)
	if err := f.writeArea(s.start(), derived); err != nil {
		return err
	}
	if err := f.to.Sync(); err != nil {
		return err
	}
	_, err = f.to.WriteAt(h.encode(), 0)
	return err
}
