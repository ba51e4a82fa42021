// Package seal encrypts blobs of bytes so that ciphertext keeps the
// plaintext's length: salt, key commitment and authentication tag go into a
// Box that the caller keeps elsewhere.
//
// It follows the key derivation of C2SP chunked-encryption
// (c2sp.org/chunked-encryption, version of 2026), with AES-256-GCM and one
// message a key:
//
//	key (32) || nonce (12) || commitment (32) =
//	    HKDF-Expand-SHA256(sealing key, Label || 0x00 || salt (24) || context)
//
// Every Seal draws a fresh random salt, and so a fresh key: there is no nonce
// state that could repeat after a machine was reverted. With 192 random bits,
// 2^80 messages meet a collision with probability 2^-32. Context binds the
// ciphertext to its place; the AEAD's own additional data is empty. The
// commitment is checked, in constant time, before anything is decrypted, so
// that no ciphertext opens under two keys.
package seal

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Sizes in bytes.
const (
	KeySize        = 32
	SaltSize       = 24
	CommitmentSize = 32
	TagSize        = 16

	nonceSize = 12
	// MaxSize is the longest plaintext: GCM's limit for one message (NIST
	// SP 800-38D section 5.2.1.1).
	MaxSize = 1<<36 - 32
)

// Label starts the derivation's info. It is part of the format: the bytes may
// never change. The second half is the AEAD's name in the IANA registry.
const Label = "nvstore.dev/seal@v1+AEAD_AES_256_GCM"

var (
	// ErrAuth: the ciphertext, its Box, its context and the key don't
	// belong together. There is never a cause.
	ErrAuth = errors.New("seal: authentication failed")
	// ErrKeySize: a key isn't 32 bytes long.
	ErrKeySize = errors.New("seal: key is not 32 bytes long")
	// ErrTooLong: the plaintext is longer than MaxSize, or there is no
	// room for the tag.
	ErrTooLong = errors.New("seal: length not possible")
)

// randReader is replaced in tests.
var randReader io.Reader = rand.Reader

// A Key seals and opens. It is safe for concurrent use.
type Key struct {
	prk *MAC // HKDF-Expand is HMAC with the key as PRK
}

// NewKey takes a uniformly random key of 32 bytes that is used for nothing
// else. The caller may wipe it afterwards.
func NewKey(key []byte) (*Key, error) {
	m, err := NewMAC(key)
	if err != nil {
		return nil, err
	}
	return &Key{prk: m}, nil
}

// Format prints no part of the key, whatever the verb.
func (k *Key) Format(s fmt.State, _ rune) { io.WriteString(s, "seal.Key(redacted)") }

// A Box is what opening a ciphertext takes besides the key and the context.
// It needs no secrecy and, with one trusted commitment or tag, no integrity
// of its own.
type Box struct {
	Salt       [SaltSize]byte
	Commitment [CommitmentSize]byte
	Tag        [TagSize]byte
}

// derived is the output of one derivation. Pooled with the HMAC state, since
// what passes through an interface would otherwise be allocated every time.
type derived struct {
	out  [3 * sha256.Size]byte // key, nonce, commitment, 20 bytes unused
	info [len(Label) + 1 + SaltSize]byte
}

func (d *derived) key() []byte   { return d.out[:KeySize] }
func (d *derived) nonce() []byte { return d.out[KeySize : KeySize+nonceSize] }
func (d *derived) commitment() []byte {
	return d.out[KeySize+nonceSize : KeySize+nonceSize+CommitmentSize]
}

var derivedPool = sync.Pool{New: func() any { return new(derived) }}

func (d *derived) free() {
	clear(d.out[:])
	derivedPool.Put(d)
}

// derive is HKDF-Expand (RFC 5869 section 2.3) on the cached HMAC state.
func (k *Key) derive(salt *[SaltSize]byte, context []byte) *derived {
	d := derivedPool.Get().(*derived)
	n := copy(d.info[:], Label)
	d.info[n] = 0
	copy(d.info[n+1:], salt[:])

	s := k.prk.get()
	for i := range 3 {
		if i > 0 {
			s.h.Reset()
			s.h.Write(d.out[(i-1)*sha256.Size : i*sha256.Size])
		}
		s.h.Write(d.info[:])
		s.h.Write(context)
		s.b[0] = byte(i + 1)
		s.h.Write(s.b[:1])
		s.h.Sum(d.out[:i*sha256.Size])
	}
	k.prk.put(s)
	return d
}

func (d *derived) aead() (cipher.AEAD, error) {
	b, err := aes.NewCipher(d.key())
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

// Seal encrypts plaintext and appends the ciphertext, of the same length, to
// dst. To encrypt in place, pass plaintext[:0] as dst; apart from that they
// must not overlap. Nothing past the result is written, even within dst's
// capacity. It fails with ErrTooLong, or if no random bytes are to be had.
func (k *Key) Seal(dst, plaintext, context []byte) ([]byte, Box, error) {
	if uint64(len(plaintext)) > MaxSize {
		return nil, Box{}, ErrTooLong
	}
	n := len(plaintext)
	head, room, scratch := grow(dst, n)
	defer putScratch(scratch)
	copy(room, plaintext)
	box, err := k.SealInPlace(room, context)
	if err != nil {
		clear(room)
		return nil, Box{}, err
	}
	if scratch != nil {
		copy(head[len(dst):], room)
	}
	return head, box, nil
}

// SealInPlace encrypts without copying: buf is the plaintext followed by
// TagSize bytes of room. Afterwards the ciphertext is buf[:len(buf)-TagSize],
// and the room holds a copy of the tag.
func (k *Key) SealInPlace(buf, context []byte) (Box, error) {
	n := len(buf) - TagSize
	if n < 0 || uint64(n) > MaxSize {
		return Box{}, ErrTooLong
	}
	var box Box
	if err := fill(&box.Salt); err != nil {
		return Box{}, err
	}
	d := k.derive(&box.Salt, context)
	defer d.free()
	aead, err := d.aead()
	if err != nil {
		return Box{}, err
	}
	aead.Seal(buf[:0], d.nonce(), buf[:n], nil)
	copy(box.Commitment[:], d.commitment())
	copy(box.Tag[:], buf[n:])
	return box, nil
}

// Open decrypts ciphertext and appends the plaintext, of the same length, to
// dst, or returns nil and ErrAuth. To decrypt in place, pass ciphertext[:0]
// as dst; apart from that they must not overlap. After a failure, dst's
// capacity holds nothing of the plaintext.
func (k *Key) Open(dst, ciphertext []byte, b *Box, context []byte) ([]byte, error) {
	if uint64(len(ciphertext)) > MaxSize {
		return nil, ErrAuth
	}
	n := len(ciphertext)
	head, room, scratch := grow(dst, n)
	defer putScratch(scratch)
	copy(room, ciphertext)
	plain, err := k.OpenInPlace(room, b, context)
	if err != nil {
		return nil, err
	}
	if scratch != nil {
		copy(head[len(dst):], plain)
		clear(plain) // the pool must not keep plaintext
	}
	return head, nil
}

// OpenInPlace decrypts without copying: buf is the ciphertext followed by
// TagSize bytes of room. It returns buf[:len(buf)-TagSize], or nil and
// ErrAuth, after which buf's content is undefined but no plaintext.
func (k *Key) OpenInPlace(buf []byte, b *Box, context []byte) ([]byte, error) {
	n := len(buf) - TagSize
	if n < 0 || uint64(n) > MaxSize || b == nil {
		return nil, ErrAuth
	}
	d := k.derive(&b.Salt, context)
	defer d.free()
	if subtle.ConstantTimeCompare(d.commitment(), b.Commitment[:]) != 1 {
		return nil, ErrAuth
	}
	aead, err := d.aead()
	if err != nil {
		return nil, ErrAuth
	}
	copy(buf[n:], b.Tag[:])
	plain, err := aead.Open(buf[:0], d.nonce(), buf, nil)
	if err != nil {
		return nil, ErrAuth
	}
	return plain, nil
}
