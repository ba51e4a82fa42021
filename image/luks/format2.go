package luks

import (
	"crypto/rand"
	"encoding/json"
	"math"
	"strconv"
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
	p := (&Budget{Rounds: math.MaxUint64}).open()
	p.work, p.memoryKiB = math.MaxUint64, math.MaxUint32
	newHash := hashes[f.Hash]
	random := func(n int) []byte {
		b := make([]byte, n)
		_, _ = rand.Read(b) // never fails
		return b
	}
	k := jsonKDF{Type: "argon2id", Time: f.Argon2id.Time, Memory: f.Argon2id.MemoryKiB, Cpus: f.Argon2id.Parallelism, Salt: random(32)}
	if f.PBKDF2 {
		k = jsonKDF{Type: "pbkdf2", Hash: f.Hash, Iterations: f.Iterations, Salt: k.Salt}
	}
	slot := v2Slot{
		kdf: k.Type, newHash: newHash, time: uint64(k.Time) + uint64(k.Iterations),
		memory: k.Memory, cpus: k.Cpus, salt: k.Salt, areaKey: f.KeySize,
	}
	derived, err := slot.derive(f.Passphrase, p)
	if err != nil {
		return err
	}
	defer clear(derived)
	area := jsonArea{"raw", 2 * v2HeaderSize, (afSize(f.KeySize) + 4095) / 4096 * 4096, f.Encryption, f.KeySize}
	if err := f.writeArea(area.Offset, derived); err != nil {
		return err
	}
	g := jsonDigest{
		Type: "pbkdf2", Keyslots: []string{"0"}, Segments: []string{"0"}, Hash: f.Hash,
		Iterations: f.digestIterations(), Salt: random(32),
	}
	if g.Digest, err = p.pbkdf2(newHash, f.key, g.Salt, uint64(g.Iterations), newHash().Size()); err != nil {
		return err
	}
	text, err := json.Marshal(jsonRoot{
		Keyslots: map[string]jsonKeyslot{"0": {"luks2", f.KeySize, jsonAF{"luks1", stripes, f.Hash}, area, k}},
		Segments: map[string]jsonSegment{"0": {"crypt", f.offset, "dynamic", "0", f.Encryption, f.SectorSize}},
		Digests:  map[string]jsonDigest{"0": g},
		Config:   jsonConfig{strconv.Itoa(v2HeaderSize - v2BinSize), strconv.Itoa(v2DataOffset - 2*v2HeaderSize)},
	})
	if err != nil {
		return err
	}
	return f.writeHeaders(text)
}

// writeHeaders writes the second header before the first, which is what says
// that this is LUKS2.
func (f *formatter) writeHeaders(text []byte) error {
	if err := f.to.Sync(); err != nil {
		return err
	}
	for _, at := range []int64{v2HeaderSize, 0} {
		b := &v2Bin{second: at != 0, size: v2HeaderSize, seq: 1, offset: at}
		copy(b.csumAlg[:], "sha256")
		copy(b.uuid[:39], f.UUID)
		_, _ = rand.Read(b.salt[:]) // never fails
		whole := make([]byte, v2HeaderSize)
		copy(whole, b.encode())
		copy(whole[v2BinSize:], text)
		sum, err := b.sum(whole)
		if err != nil {
			return err
		}
		copy(whole[v2Checksum:], sum[:])
		if _, err := f.to.WriteAt(whole, at); err != nil {
			return err
		}
		if err := f.to.Sync(); err != nil {
			return err
		}
	}
	return nil
}
