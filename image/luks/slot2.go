package luks

import (
	"fmt"
	"hash"
	"math"
	"slices"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/image"
)

// A v2Slot is a keyslot object of type luks2.
type v2Slot struct {
	n, priority  int
	usable       bool // bound to the volume key's digest
	keySize      int
	offset, size int64 // of the area
	spec         spec
	areaKey      int // size of the key that encrypts the area
	kdf          string
	newHash      func() hash.Hash // of pbkdf2
	time         uint64           // or iterations
	memory       uint32           // KiB
	cpus         uint8
	salt         []byte
	afHash       func() hash.Hash
}

func (m *metadata) readSlots(o object, from, areas int64) error {
	all, err := o.object("keyslots")
	if err != nil {
		return err
	}
	for name := range all.m {
		n, err := slotNumber(all.path, name)
		if err != nil {
			return err
		}
		k, err := all.object(name)
		if err != nil {
			return err
		}
		s := v2Slot{n: n, priority: 1, usable: slices.Contains(m.digest.slots, name)}
		if err := s.read(k, from, areas); err != nil {
			return err
		}
		m.slots = append(m.slots, s)
		if !s.usable {
			continue
		}
		// Keys for the same segment are as long as each other.
		if err := m.spec.checkKeySize(s.keySize, jsonStruct, -1, k.at("key_size")); err != nil {
			return err
		}
		m.keySize = s.keySize
	}
	slices.SortFunc(m.slots, func(a, b v2Slot) int { return a.n - b.n })
	for i := range m.slots {
		for j := range i {
			a, b := &m.slots[i], &m.slots[j]
			if overlap(a.offset, a.size, b.offset, b.size) {
				return badJSON(fmt.Sprintf("keyslots.%d.area.offset", a.n), a.offset,
					fmt.Sprintf("an area outside that of slot %d", b.n))
			}
		}
	}
	return nil
}

func (s *v2Slot) read(k object, from, areas int64) error {
	kind, err := k.string("type")
	if err != nil {
		return err
	}
	if kind != "luks2" {
		want := "luks2"
		if kind == "reencrypt" {
			want = "an image that isn't being reencrypted"
		}
		return with(image.ErrUnsupported, badJSON(k.at("type"), kind, want))
	}
	n, err := k.number("key_size", 1, maxKeySize)
	if err != nil {
		return err
	}
	s.keySize = int(n)
	if _, ok := k.m["priority"]; ok {
		if n, err = k.number("priority", 0, 2); err != nil {
			return err
		}
		s.priority = int(n)
	}
	if err := s.readAF(k); err != nil {
		return err
	}
	if err := s.readArea(k, from, areas); err != nil {
		return err
	}
	return s.readKDF(k)
}

func (s *v2Slot) readAF(k object) error {
	a, err := k.object("af")
	if err != nil {
		return err
	}
	kind, err := a.string("type")
	if err != nil {
		return err
	}
	if kind != "luks1" {
		return with(image.ErrUnsupported, badJSON(a.at("type"), kind, "luks1"))
	}
	if _, err := a.number("stripes", stripes, stripes); err != nil {
		return err
	}
	name, err := a.string("hash")
	if err != nil {
		return err
	}
	s.afHash, err = findHash(name, jsonStruct, -1, a.at("hash"))
	return err
}

func (s *v2Slot) readArea(k object, from, areas int64) error {
	a, err := k.object("area")
	if err != nil {
		return err
	}
	kind, err := a.string("type")
	if err != nil {
		return err
	}
	if kind != "raw" {
		return with(image.ErrUnsupported, badJSON(a.at("type"), kind, "raw"))
	}
	off, err := a.bigNumber("offset", math.MaxInt64)
	if err != nil {
		return err
	}
	size, err := a.bigNumber("size", math.MaxInt64)
	if err != nil {
		return err
	}
	s.offset, s.size = int64(off), int64(size)
	switch {
	case s.offset < from || s.offset > from+areas || s.offset%4096 != 0:
		return badJSON(a.at("offset"), off, fmt.Sprintf("a multiple of 4096 in [%d, %d]", from, from+areas))
	case s.size > from+areas-s.offset || s.size%4096 != 0:
		return badJSON(a.at("size"), size, fmt.Sprintf("a multiple of 4096, to end at %d", from+areas))
	case s.size < afSize(s.keySize):
		return badJSON(a.at("size"), size, fmt.Sprintf("%d or more", afSize(s.keySize)))
	}
	if s.spec, err = readSpec(a); err != nil {
		return err
	}
	n, err := a.number("key_size", 1, maxKeySize)
	if err != nil {
		return err
	}
	s.areaKey = int(n)
	return s.spec.checkKeySize(s.areaKey, jsonStruct, -1, a.at("key_size"))
}

func (s *v2Slot) readKDF(k object) error {
	d, err := k.object("kdf")
	if err != nil {
		return err
	}
	if s.kdf, err = d.string("type"); err != nil {
		return err
	}
	if s.salt, err = d.bytes("salt", 1, 1024); err != nil {
		return err
	}
	var n int64
	switch s.kdf {
	case "pbkdf2":
		name, err := d.string("hash")
		if err != nil {
			return err
		}
		if s.newHash, err = findHash(name, jsonStruct, -1, d.at("hash")); err != nil {
			return err
		}
		n, err = d.number("iterations", 1, math.MaxUint32)
		s.time = uint64(n)
		return err
	case "argon2i", "argon2id":
		if n, err = d.number("time", 1, math.MaxUint32); err != nil {
			return err
		}
		s.time = uint64(n)
		if n, err = d.number("memory", 8, math.MaxUint32); err != nil {
			return err
		}
		s.memory = uint32(n)
		if n, err = d.number("cpus", 1, kdf.MaxParallelism); err != nil {
			return err
		}
		s.cpus = uint8(n)
		return nil
	}
	return with(image.ErrUnsupported, badJSON(d.at("type"), s.kdf, "pbkdf2, argon2i or argon2id"))
}

func (s *v2Slot) truncated(size int64) bool { return s.offset > size-afSize(s.keySize) }

func (s *v2Slot) try(d image.Device, m *metadata, pass []byte, p *purse) ([]byte, error) {
	area := afSize(s.keySize)
	// Before the work, so that a short image is never a wrong passphrase.
	if s.truncated(d.Size()) {
		return nil, fmt.Errorf("%w: %d bytes, the key area is at [%d, %d)", ErrTruncated, d.Size(), s.offset, s.offset+area)
	}
	derived, err := s.derive(pass, p)
	if err != nil {
		return nil, err
	}
	defer clear(derived)
	split, err := readKeyArea(d, s.offset, area, s.spec, derived)
	if err != nil {
		return nil, err
	}
	defer clear(split)
	key := afMerge(s.afHash, split, stripes)
	if err := m.digest.matches(key, p); err != nil {
		clear(key)
		return nil, err
	}
	return key, nil
}

func (s *v2Slot) derive(pass []byte, p *purse) ([]byte, error) {
	if s.kdf == "pbkdf2" {
		return p.pbkdf2(s.newHash, pass, s.salt, s.time, s.areaKey)
	}
	return p.argon2(s.kdf, pass, s.salt, uint32(s.time), s.memory, s.cpus, s.areaKey)
}
