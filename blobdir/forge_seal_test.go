package blobdir_test

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// Section 10 of FORMAT.md, once more.

func macWith(key []byte, label string, uuid, p []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(label))
	h.Write(uuid)
	h.Write(p)
	return h.Sum(nil)
}

func (f *forgery) derive(t testing.TB, label string) []byte {
	k, err := hkdf.Key(sha256.New, f.master, nil, label+"\x00"+string(f.uuid), 32)
	require.NoError(t, err)
	return k
}

// openBox opens a sealed box as section 10 says.
func openBox(t testing.TB, key []byte, box *el, ct, context []byte) ([]byte, error) {
	info := "nvstore.dev/seal@v1+AEAD_AES_256_GCM\x00" + string(box.at("salt").val) + string(context)
	out, err := hkdf.Expand(sha256.New, key, info, 32+12+32)
	require.NoError(t, err)
	if !hmac.Equal(out[44:], box.at("commitment").val) {
		return nil, fmt.Errorf("commitment")
	}
	b, err := aes.NewCipher(out[:32])
	require.NoError(t, err)
	g, err := cipher.NewGCM(b)
	require.NoError(t, err)
	return g.Open(nil, out[32:44], append(slices.Clone(ct), box.at("tag").val...), nil)
}

// unlock opens slot 0, which has a raw key.
func (f *forgery) unlock(t testing.TB, raw []byte) []byte {
	f.slots.el.named("type", "slots")
	s := f.slots.el.at("slots.0").named("id", "label", "kdf", "wrap", "extensions=0xa0")
	w := s.at("wrap").named("algorithm", "salt", "commitment", "tag", "wrapped")
	kek, err := hkdf.Key(sha256.New, raw, nil, "nvstore.dev/keyslot@v1 raw key\x00", 32)
	require.NoError(t, err)
	context := derSeq(0x30, derInt(1), derBytes(4, f.uuid), s.at("id"), s.at("label"), s.at("kdf"), w.at("algorithm"))
	master, err := openBox(t, kek, w, w.at("wrapped").val, context.encode())
	require.NoError(t, err)
	return master
}

// chunkText opens a sealed chunk as section 10 says.
func (f *forgery) chunkText(t testing.TB, entry *el, typ string, c *el) ([]byte, error) {
	context := derSeq(0x30, derInt(1), derBytes(4, f.uuid), entry.at("id"), derBytes(0x0c, []byte(typ)),
		c.at("generation"), c.at("index"), c.at("length"))
	return openBox(t, f.derive(t, "nvstore v1 chunk key"), c.at("seal"), c.to.raw, context.encode())
}

// metadata opens an entry's sealed metadata.
func (f *forgery) metadata(t testing.TB, entry *el) ([]byte, error) {
	context := derSeq(0x30, derInt(1), derBytes(4, f.uuid), entry.at("id"), entry.at("generation"))
	s := entry.at("sealed")
	return openBox(t, f.derive(t, "nvstore v1 metadata key"), s, s.at("ciphertext").val, context.encode())
}

func sha(p []byte) []byte {
	d := sha256.Sum256(p)
	return d[:]
}
