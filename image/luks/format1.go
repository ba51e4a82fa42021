package luks

import (
	"crypto/rand"
	"fmt"
	"strings"

	"nvstore.dev/image"
)

// v1AreaAt is where the key area of a slot begins: from byte 4096, each
// aligned to that.
func v1AreaAt(slot, keySize int) int64 {
	return 4096 + int64(slot)*((afSize(keySize)+4095)/4096*4096)
}

// writeV1 writes a key area, and, when that is durable, the header.
func writeV1(f *formatter) error {
	p := unbounded()
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

	v := &v1{v1Header: *h, d: f.to, spec: f.spec, newHash: newHash}
	return v.fill(0, f.key, f.Passphrase, f.Iterations)
}

// fill makes a slot that isn't in use open with a passphrase: first the key
// area, and when that is durable, the header. Torn between two sectors, the
// header has a slot that doesn't open, and the others as they were.
func (v *v1) fill(n int, key, pass []byte, iterations uint32) error {
	s := &v.slot[n]
	if s.start() > v.d.Size()-v.areaSize() {
		return fmt.Errorf("key slot %d: %w", n, ErrTruncated)
	}
	s.state, s.iterations = v1Active, iterations
	_, _ = rand.Read(s.salt[:]) // never fails
	derived, err := unbounded().pbkdf2(v.newHash, pass, s.salt[:], uint64(iterations), len(key))
	if err != nil {
		return err
	}
	defer clear(derived)
	if err := writeArea(v.d, s.start(), v.spec, v.newHash, key, derived); err != nil {
		return err
	}
	return v.store()
}

// store writes the header.
func (v *v1) store() error {
	if _, err := v.d.WriteAt(v.encode(), 0); err != nil {
		return err
	}
	return v.d.Sync()
}

func (v *v1) add(key []byte, o *KeyOptions) (int, error) {
	for n := range v.slot {
		if v.slot[n].state == v1Inactive {
			return n, v.fill(n, key, o.NewPassphrase, o.Iterations)
		}
	}
	return 0, fmt.Errorf("all %d key slots are in use: %w", v1Slots, image.ErrNoSpace)
}

func (v *v1) remove(n int) error {
	if n < 0 || n >= v1Slots || v.slot[n].state != v1Active {
		return fmt.Errorf("key slot %d: %w", n, image.ErrNotFound)
	}
	if len(v.slots()) == 1 {
		return fmt.Errorf("key slot %d: %w", n, ErrLastSlot)
	}
	s := &v.slot[n]
	s.state, s.iterations, s.salt = v1Inactive, 0, [v1Salt]byte{}
	if err := v.store(); err != nil {
		return err
	}
	return scrub(v.d, s.start(), v.areaSize())
}
