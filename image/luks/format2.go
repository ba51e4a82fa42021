package luks

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"strconv"

	"nvstore.dev/image"
)

// The JSON of a new LUKS2 header, in the order in which cryptsetup writes it.
type (
	jsonRoot struct {
		Keyslots map[string]jsonKeyslot `json:"keyslots"`
		Tokens   struct{}               `json:"tokens"`
		Segments map[string]jsonSegment `json:"segments"`
		Digests  map[string]jsonDigest  `json:"digests"`
		Config   jsonConfig             `json:"config"`
	}
	jsonKeyslot struct {
		Type    string   `json:"type"`
		KeySize int      `json:"key_size"`
		AF      jsonAF   `json:"af"`
		Area    jsonArea `json:"area"`
		KDF     jsonKDF  `json:"kdf"`
	}
	jsonAF struct {
		Type    string `json:"type"`
		Stripes int    `json:"stripes"`
		Hash    string `json:"hash"`
	}
	jsonArea struct {
		Type       string `json:"type"`
		Offset     int64  `json:"offset,string"`
		Size       int64  `json:"size,string"`
		Encryption string `json:"encryption"`
		KeySize    int    `json:"key_size"`
	}
	jsonKDF struct {
		Type       string `json:"type"`
		Time       uint32 `json:"time,omitempty"`
		Memory     uint32 `json:"memory,omitempty"`
		Cpus       uint8  `json:"cpus,omitempty"`
		Hash       string `json:"hash,omitempty"`
		Iterations uint32 `json:"iterations,omitempty"`
		Salt       []byte `json:"salt"`
	}
	jsonSegment struct {
		Type       string `json:"type"`
		Offset     int64  `json:"offset,string"`
		Size       string `json:"size"`
		IVTweak    string `json:"iv_tweak"`
		Encryption string `json:"encryption"`
		SectorSize int    `json:"sector_size"`
	}
	jsonDigest struct {
		Type       string   `json:"type"`
		Keyslots   []string `json:"keyslots"`
		Segments   []string `json:"segments"`
		Hash       string   `json:"hash"`
		Iterations uint32   `json:"iterations"`
		Salt       []byte   `json:"salt"`
		Digest     []byte   `json:"digest"`
	}
	jsonConfig struct {
		JSONSize     string `json:"json_size"`
		KeyslotsSize string `json:"keyslots_size"`
	}
)

// writeV2 writes a key area, and, when that is durable, both headers.
func writeV2(f *formatter) error {
	newHash := hashes[f.Hash]
	o := &KeyOptions{NewPassphrase: f.Passphrase, PBKDF2: f.PBKDF2, Iterations: f.Iterations, Argon2id: f.Argon2id}
	k, err := fillV2(f.to, 2*v2HeaderSize, f.spec, f.Encryption, f.Hash, f.key, o)
	if err != nil {
		return err
	}
	g := jsonDigest{
		Type: "pbkdf2", Keyslots: []string{"0"}, Segments: []string{"0"}, Hash: f.Hash,
		Iterations: f.digestIterations(), Salt: randomBytes(32),
	}
	if g.Digest, err = unbounded().pbkdf2(newHash, f.key, g.Salt, uint64(g.Iterations), newHash().Size()); err != nil {
		return err
	}
	text, err := json.Marshal(jsonRoot{
		Keyslots: map[string]jsonKeyslot{"0": *k},
		Segments: map[string]jsonSegment{"0": {"crypt", f.offset, "dynamic", "0", f.Encryption, f.SectorSize}},
		Digests:  map[string]jsonDigest{"0": g},
		Config:   jsonConfig{strconv.Itoa(v2HeaderSize - v2BinSize), strconv.Itoa(v2DataOffset - 2*v2HeaderSize)},
	})
	if err != nil {
		return err
	}
	b := v2Bin{size: v2HeaderSize}
	copy(b.csumAlg[:], "sha256")
	copy(b.uuid[:39], f.UUID)
	return writeCopies(f.to, b, text)
}

// fillV2 makes a key area at off and returns its key slot.
func fillV2(d image.Device, off int64, s spec, encryption, hash string, key []byte, o *KeyOptions) (*jsonKeyslot, error) {
	k := jsonKDF{Type: "argon2id", Time: o.Argon2id.Time, Memory: o.Argon2id.MemoryKiB, Cpus: o.Argon2id.Parallelism, Salt: randomBytes(32)}
	if o.PBKDF2 {
		k = jsonKDF{Type: "pbkdf2", Hash: hash, Iterations: o.Iterations, Salt: k.Salt}
	}
	slot := v2Slot{
		kdf: k.Type, newHash: hashes[hash], time: uint64(k.Time) + uint64(k.Iterations),
		memory: k.Memory, cpus: k.Cpus, salt: k.Salt, areaKey: len(key),
	}
	derived, err := slot.derive(o.NewPassphrase, unbounded())
	if err != nil {
		return nil, err
	}
	defer clear(derived)
	if err := writeArea(d, off, s, hashes[hash], key, derived); err != nil {
		return nil, err
	}
	area := jsonArea{"raw", off, v2AreaSize(len(key)), encryption, len(key)}
	return &jsonKeyslot{"luks2", len(key), jsonAF{"luks1", stripes, hash}, area, k}, nil
}

func v2AreaSize(keySize int) int64 { return (afSize(keySize) + 4095) / 4096 * 4096 }

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// writeCopies writes both headers, with the sequence number after b's. b is the
// one that is known to be sound; it is written last, so that one always is.
func writeCopies(d image.Device, b v2Bin, text []byte) error {
	if int64(len(text)) >= b.size-v2BinSize {
		return fmt.Errorf("metadata of %d bytes in %d: %w", len(text), b.size-v2BinSize-1, image.ErrNoSpace)
	}
	b.seq++
	last := b.second
	for _, b.second = range []bool{!last, last} {
		b.offset = 0
		if b.second {
			b.offset = b.size
		}
		copy(b.salt[:], randomBytes(len(b.salt)))
		b.checksum = [64]byte{}
		whole := make([]byte, b.size)
		copy(whole, b.encode())
		copy(whole[v2BinSize:], text)
		sum, err := b.sum(whole)
		if err != nil {
			return err
		}
		copy(whole[v2Checksum:], sum[:])
		if _, err := d.WriteAt(whole, b.offset); err != nil {
			return err
		}
		if err := d.Sync(); err != nil {
			return err
		}
	}
	return nil
}
