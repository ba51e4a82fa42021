package luks

import (
	"crypto/subtle"
	"fmt"
	"hash"
	"math"
	"slices"
	"strings"

	"nvstore.dev/image"
)

// A metadata is what the JSON of a LUKS2 header says (LUKS2 specification,
// section 3), as far as one crypt segment needs it.
type metadata struct {
	layout
	encryption string
	areas      int64    // bytes for key areas, behind both headers
	slots      []v2Slot // by number
	digest     v2Digest
	tokens     map[string]string
}

// A v2Digest tells whether a volume key is right.
type v2Digest struct {
	name         string // its number
	hash         string
	newHash      func() hash.Hash
	iterations   uint64
	salt, digest []byte
	slots        []string
}

func readMetadata(o object, headerSize int64) (*metadata, error) {
	areas, err := readConfig(o, headerSize)
	if err != nil {
		return nil, err
	}
	m := &metadata{areas: areas}
	if err := m.readSegments(o, 2*headerSize+areas); err != nil {
		return nil, err
	}
	if err := m.readDigests(o); err != nil {
		return nil, err
	}
	if err := m.readSlots(o, 2*headerSize, areas); err != nil {
		return nil, err
	}
	return m, m.readTokens(o)
}

// readConfig returns the size of the area of key slots.
func readConfig(o object, headerSize int64) (int64, error) {
	c, err := o.object("config")
	if err != nil {
		return 0, err
	}
	n, err := c.bigNumber("json_size", math.MaxInt64)
	if err != nil {
		return 0, err
	}
	if int64(n) != headerSize-v2BinSize {
		return 0, badJSON(c.at("json_size"), n, fmt.Sprintf("%d, the header's", headerSize-v2BinSize))
	}
	n, err = c.bigNumber("keyslots_size", 128<<20)
	if err != nil {
		return 0, err
	}
	if n%4096 != 0 {
		return 0, badJSON(c.at("keyslots_size"), n, "a multiple of 4096")
	}
	if _, ok := c.m["requirements"]; ok {
		r, err := c.object("requirements")
		if err != nil {
			return 0, err
		}
		if _, ok := r.m["mandatory"]; ok {
			list, err := r.strings("mandatory")
			if err != nil {
				return 0, err
			}
			if len(list) > 0 {
				return 0, requirement(r.at("mandatory"), list)
			}
		}
	}
	return int64(n), nil
}

func requirement(path string, list []string) error {
	want := "no requirement, as none is known here"
	for _, s := range list {
		if strings.Contains(s, "reencrypt") {
			want = "an image that isn't being reencrypted; finish or undo that with cryptsetup first"
		}
	}
	return with(image.ErrUnsupported, badJSON(path, strings.Join(list, ", "), want))
}

func (m *metadata) readSegments(o object, dataFrom int64) error {
	all, err := o.object("segments")
	if err != nil {
		return err
	}
	for name := range all.m {
		if _, err := slotNumber(all.path, name); err != nil {
			return err
		}
	}
	if len(all.m) != 1 || all.m["0"] == nil {
		return with(image.ErrUnsupported, badJSON(all.path, len(all.m), "one segment, number 0"))
	}
	s, err := all.object("0")
	if err != nil {
		return err
	}
	return m.readSegment(s, dataFrom)
}

func (m *metadata) readSegment(s object, dataFrom int64) error {
	kind, err := s.string("type")
	if err != nil {
		return err
	}
	if kind != "crypt" {
		return with(image.ErrUnsupported, badJSON(s.at("type"), kind, "crypt"))
	}
	for _, name := range []string{"integrity", "flags"} {
		if s.m[name] != nil {
			return with(image.ErrUnsupported, badJSON(s.at(name), nil, "a segment without"))
		}
	}
	if m.encryption, err = s.string("encryption"); err != nil {
		return err
	}
	if m.spec, err = readSpec(s); err != nil {
		return err
	}
	n, err := s.number("sector_size", 512, 4096)
	if err != nil {
		return err
	}
	if n&(n-1) != 0 {
		return badJSON(s.at("sector_size"), n, "512, 1024, 2048 or 4096")
	}
	m.sectorSize = int(n)
	if m.ivTweak, err = s.bigNumber("iv_tweak", math.MaxUint64); err != nil {
		return err
	}
	off, err := s.bigNumber("offset", math.MaxInt64)
	if err != nil {
		return err
	}
	m.offset, m.size = int64(off), -1
	if m.offset%512 != 0 {
		return badJSON(s.at("offset"), off, "a multiple of 512")
	}
	if m.offset != 0 && m.offset < dataFrom {
		return badJSON(s.at("offset"), off, fmt.Sprintf("%d or more, past the key slots", dataFrom))
	}
	if size, err := s.string("size"); err != nil || size == "dynamic" {
		return err
	}
	size, err := s.bigNumber("size", uint64(math.MaxInt64-m.offset))
	if err != nil {
		return err
	}
	if size == 0 || size%uint64(m.sectorSize) != 0 {
		return badJSON(s.at("size"), size, "a positive multiple of the sector size")
	}
	m.size = int64(size)
	return nil
}

// readSpec reads an object's "encryption".
func readSpec(o object) (spec, error) {
	text, err := o.string("encryption")
	if err != nil {
		return spec{}, err
	}
	s, err := parseSpec(text, jsonStruct, -1, o.at("encryption"))
	if err != nil {
		return spec{}, err
	}
	if !s.essivWorks() {
		return spec{}, with(image.ErrUnsupported, badJSON(o.at("encryption"), text,
			"a hash for essiv as long as a key of the cipher"))
	}
	return s, nil
}

// readDigests finds the digest of segment 0.
func (m *metadata) readDigests(o object) error {
	all, err := o.object("digests")
	if err != nil {
		return err
	}
	found := false
	for name := range all.m {
		if _, err := slotNumber(all.path, name); err != nil {
			return err
		}
		d, err := all.object(name)
		if err != nil {
			return err
		}
		segments, err := d.strings("segments")
		if err != nil {
			return err
		}
		if !slices.Contains(segments, "0") {
			continue
		}
		if found {
			return badJSON(d.at("segments"), nil, "one digest for segment 0")
		}
		found = true
		m.digest.name = name
		if err := m.digest.read(d); err != nil {
			return err
		}
	}
	if !found {
		return badJSON(all.path, nil, "a digest for segment 0")
	}
	return nil
}

func (g *v2Digest) read(d object) (err error) {
	kind, err := d.string("type")
	if err != nil {
		return err
	}
	if kind != "pbkdf2" {
		return with(image.ErrUnsupported, badJSON(d.at("type"), kind, "pbkdf2"))
	}
	if g.slots, err = d.strings("keyslots"); err != nil {
		return err
	}
	if g.hash, err = d.string("hash"); err != nil {
		return err
	}
	if g.newHash, err = findHash(g.hash, jsonStruct, -1, d.at("hash")); err != nil {
		return err
	}
	n, err := d.number("iterations", 1, math.MaxUint32)
	if err != nil {
		return err
	}
	g.iterations = uint64(n)
	if g.salt, err = d.bytes("salt", 1, 1024); err != nil {
		return err
	}
	// Fewer bytes would let a wrong key pass.
	g.digest, err = d.bytes("digest", 16, 64)
	return err
}

func (g *v2Digest) matches(key []byte, p *purse) error {
	sum, err := p.pbkdf2(g.newHash, key, g.salt, g.iterations, len(g.digest))
	if err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(sum, g.digest) != 1 {
		return ErrPassphrase
	}
	return nil
}

func (m *metadata) readTokens(o object) error {
	all, err := o.object("tokens")
	if err != nil {
		return err
	}
	for name := range all.m {
		if _, err := slotNumber(all.path, name); err != nil {
			return err
		}
		t, err := all.object(name)
		if err != nil {
			return err
		}
		kind, err := t.string("type")
		if err != nil {
			return err
		}
		if m.tokens == nil {
			m.tokens = map[string]string{}
		}
		m.tokens[name] = kind
	}
	return nil
}
