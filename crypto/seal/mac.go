package seal

import (
	"crypto/hmac"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"sync"
)

// MACSize is the length in bytes of a MAC's sum.
const MACSize = sha256.Size

// A MAC is HMAC-SHA256 (RFC 2104) with one key, whose padded states are
// computed once. It is safe for concurrent use.
type MAC struct {
	pool sync.Pool
}

// A macState is one HMAC with the key, and room for a sum, so that verifying
// allocates nothing.
type macState struct {
	h hash.Hash
	b [sha256.Size]byte
}

// NewMAC takes a uniformly random key of 32 bytes. The caller may wipe it
// afterwards.
func NewMAC(key []byte) (*MAC, error) {
	if len(key) != KeySize {
		return nil, ErrKeySize
	}
	own := append([]byte(nil), key...)
	m := &MAC{}
	m.pool.New = func() any { return &macState{h: hmac.New(sha256.New, own)} }
	return m, nil
}

// Format prints no part of the key, whatever the verb.
func (m *MAC) Format(s fmt.State, _ rune) { io.WriteString(s, "seal.MAC(redacted)") }

func (m *MAC) get() *macState {
	s := m.pool.Get().(*macState)
	s.h.Reset() // from the second time on, this restores the padded state
	return s
}

func (m *MAC) put(s *macState) { m.pool.Put(s) }

// Sum appends the 32-byte MAC of the parts, one after the other, to dst. The
// boundaries between the parts aren't covered: the caller's encoding must
// give them away.
func (m *MAC) Sum(dst []byte, parts ...[]byte) []byte {
	s := m.get()
	for _, p := range parts {
		s.h.Write(p)
	}
	dst = s.h.Sum(dst)
	m.put(s)
	return dst
}

// Verify tells in constant time whether sum is the MAC of the parts.
func (m *MAC) Verify(sum []byte, parts ...[]byte) bool {
	s := m.get()
	for _, p := range parts {
		s.h.Write(p)
	}
	ok := hmac.Equal(s.h.Sum(s.b[:0]), sum)
	m.put(s)
	return ok
}
