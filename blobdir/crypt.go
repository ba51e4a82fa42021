package blobdir

import (
	"crypto/rand"
	"crypto/subtle"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/seal"
)

// Labels separate what one key is used for (FORMAT.md, section 10).
const (
	labelMACKey   = "nvstore v1 mac key"
	labelChunkKey = "nvstore v1 chunk key"
	labelMetaKey  = "nvstore v1 metadata key"
	labelNameKey  = "nvstore v1 name key"

	labelRoot    = "nvstore v1 root"
	labelSettled = "nvstore v1 settled"
	labelNode    = "nvstore v1 node"
	labelLive    = "nvstore v1 live"
	labelName    = "nvstore v1 name"
)

// A macFunc returns the MAC of parts under a label.
type macFunc func(label string, parts ...[]byte) []byte

// A sealBox is what a reference holds of a sealed chunk, or an entry of its
// sealed metadata; the ciphertext lies beside it.
type sealBox struct{ seal.Box }

func (s *sealBox) append(dst []byte, tag byte, ciphertext []byte) []byte {
	return appendTLV(dst, tag, func(b []byte) []byte {
		b = appendOctets(b, s.Salt[:])
		b = appendOctets(b, s.Commitment[:])
		b = appendOctets(b, s.Tag[:])
		if ciphertext != nil {
			b = appendOctets(b, ciphertext)
		}
		return b
	})
}

// sealBox reads a box, and the ciphertext of at most max bytes unless limit
// is negative.
func (d *decoder) sealBox(s *cryptobyte.String, tag byte, field string, limit int) (*sealBox, []byte) {
	in := d.seq(s, tag, field)
	b := new(sealBox)
	d.array(&in, byte(cbasn1.OCTET_STRING), field+".salt", b.Salt[:])
	d.array(&in, byte(cbasn1.OCTET_STRING), field+".commitment", b.Commitment[:])
	d.array(&in, byte(cbasn1.OCTET_STRING), field+".tag", b.Tag[:])
	var ct []byte
	if limit >= 0 {
		ct = d.octets(&in, byte(cbasn1.OCTET_STRING), field+".ciphertext", 1, limit)
	}
	d.end(in, field)
	return b, ct
}

// keys are derived from the master key, each for one use. A nil *keys is a
// plain store.
type keys struct {
	store  [16]byte
	mac    *seal.MAC
	name   *seal.MAC
	chunk  *seal.Key
	meta   *seal.Key
	master []byte
}

func newKeys(master []byte, store [16]byte) (*keys, error) {
	derive := func(label string) ([]byte, error) { return kdf.Derive(master, label, store[:], 32) }
	k := &keys{store: store, master: master}
	macKey, err := derive(labelMACKey)
	if err != nil {
		return nil, err
	}
	nameKey, err := derive(labelNameKey)
	if err != nil {
		return nil, err
	}
	chunkKey, err := derive(labelChunkKey)
	if err != nil {
		return nil, err
	}
	metaKey, err := derive(labelMetaKey)
	if err != nil {
		return nil, err
	}
	if k.mac, err = seal.NewMAC(macKey); err != nil {
		return nil, err
	}
	if k.name, err = seal.NewMAC(nameKey); err != nil {
		return nil, err
	}
	if k.chunk, err = seal.NewKey(chunkKey); err != nil {
		return nil, err
	}
	k.meta, err = seal.NewKey(metaKey)
	return k, err
}

// sum is the macFunc of roots, records and nodes: HMAC-SHA256 over label,
// store UUID and structure. nil where there is no key.
func (k *keys) sum() macFunc {
	if k == nil {
		return nil
	}
	return func(label string, parts ...[]byte) []byte {
		return k.mac.Sum(nil, append([][]byte{[]byte(label), k.store[:]}, parts...)...)
	}
}

// verifies tells whether a node's MAC is right.
func (k *keys) verifies(mac, node []byte) bool {
	return subtle.ConstantTimeCompare(mac, k.sum()(labelNode, node)) == 1
}

// nameKey is the directory key of a sealed name.
func (k *keys) nameKey(name string) []byte {
	return k.name.Sum(nil, []byte(labelName), k.store[:], []byte(name))
}

// chunkContext binds a chunk to its place: a chunk of another store, blob,
// type, time, position or length doesn't open as this one.
func chunkContext(store, blob [16]byte, typ string, gen, index, length int64) []byte {
	return appendSequence(make([]byte, 0, 160), func(b []byte) []byte {
		b = appendInt(b, 1)
		b = appendOctets(b, store[:])
		b = appendOctets(b, blob[:])
		b = appendUTF8(b, typ)
		b = appendInt(b, gen)
		b = appendInt(b, index)
		return appendInt(b, length)
	})
}

func metaContext(store, blob [16]byte, gen int64) []byte {
	return appendSequence(make([]byte, 0, 64), func(b []byte) []byte {
		b = appendInt(b, 1)
		b = appendOctets(b, store[:])
		b = appendOctets(b, blob[:])
		return appendInt(b, gen)
	})
}

func random(p []byte) error {
	if _, err := rand.Read(p); err != nil {
		return fmt.Errorf("random bytes: %w", err)
	}
	return nil
}
