package tlspsk

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"

	"golang.org/x/crypto/chacha20poly1305"
)

// Types of records (RFC 8446, section 5.1).
const (
	typeChangeCipherSpec = 20
	typeAlert            = 21
	typeHandshake        = 22
	typeData             = 23
)

// Sizes of records, bytes (sections 5.1 and 5.2).
const (
	headerLen = 5
	tagLen    = 16
	maxPlain  = 1 << 14
	maxCipher = maxPlain + 256
	// sealedLen is what the longest record takes that we send.
	sealedLen = headerLen + maxPlain + 1 + tagLen
)

// rekeyAfter is how many records go out under one key. Section 5.5 allows
// AES-GCM 2^24.5.
const rekeyAfter = 1 << 24

// A suite is a cipher suite (appendix B.4). Both have SHA-256, nonces of 12
// bytes and tags of 16.
type suite struct {
	id     uint16
	keyLen int
	aead   func(key []byte) (cipher.AEAD, error)
}

// suites are those that we know, in the order that a server prefers.
var suites = []suite{
	{0x1301, 16, newGCM}, // TLS_AES_128_GCM_SHA256
	{0x1303, chacha20poly1305.KeySize, chacha20poly1305.New}, // TLS_CHACHA20_POLY1305_SHA256
}

func newGCM(key []byte) (cipher.AEAD, error) {
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(b)
}

func findSuite(id uint16) (suite, bool) {
	for _, s := range suites {
		if s.id == id {
			return s, true
		}
	}
	return suite{}, false
}

// A half protects one direction. The zero half is plain.
type half struct {
	suite  suite
	secret []byte
	aead   cipher.AEAD
	iv     [12]byte
	nonce  [12]byte
	seq    uint64
}

// use begins to protect by keys from a traffic secret (section 7.3).
func (h *half) use(s suite, secret []byte) {
	aead, err := s.aead(expandLabel(secret, "key", nil, s.keyLen))
	if err != nil {
		panic("internal error: " + err.Error())
	}
	h.suite, h.secret, h.aead, h.seq = s, secret, aead, 0
	copy(h.iv[:], expandLabel(secret, "iv", nil, len(h.iv)))
}

// update goes on to the next generation of keys (section 7.2).
func (h *half) update() { h.use(h.suite, expandLabel(h.secret, "traffic upd", nil, hashLen)) }

// next returns the nonce of one more record (section 5.3).
func (h *half) next() []byte {
	h.nonce = h.iv
	low := h.nonce[len(h.nonce)-8:]
	binary.BigEndian.PutUint64(low, binary.BigEndian.Uint64(low)^h.seq)
	h.seq++
	return h.nonce[:]
}

// seal appends a record to out. data has at most maxPlain bytes.
func (h *half) seal(out []byte, typ byte, data []byte) []byte {
	begin := len(out)
	if h.aead == nil {
		out = append(out, typ, 3, 3, byte(len(data)>>8), byte(len(data)))
		return append(out, data...)
	}
	n := len(data) + 1 + tagLen
	out = append(out, typeData, 3, 3, byte(n>>8), byte(n))
	body := len(out)
	out = append(out, data...)
	out = append(out, typ)
	return h.aead.Seal(out[:body], h.next(), out[body:], out[begin:body])
}

// open takes a record's protection off, in place, and its padding (section
// 5.4).
func (h *half) open(header, body []byte) (typ byte, data []byte, err error) {
	data, err = h.aead.Open(body[:0], h.next(), body, header)
	if err != nil {
		return 0, nil, fault(badRecordMAC, "a record that isn't the peer's, or was changed")
	}
	if len(data) > maxPlain+1 {
		return 0, nil, fault(recordOverflow, "a record of more than 2^14 bytes")
	}
	for n := len(data) - 1; n >= 0; n-- {
		if data[n] != 0 {
			return data[n], data[:n], nil
		}
	}
	return 0, nil, fault(unexpectedMessage, "a record of nothing but padding")
}
