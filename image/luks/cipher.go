package luks

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"strings"

	"nvstore.dev/crypto/xts"
	"nvstore.dev/image"
)

// A spec is a cipher with its chaining mode and its way to make an IV of a
// sector's number, as in dm-crypt's "aes-xts-plain64".
type spec struct {
	cipher string // "aes"
	mode   string // "xts", "cbc", "ctr" or "ecb"
	iv     string // "plain", "plain64" or "essiv"; any for ecb
	ivHash string // of essiv
}

// parseSpec reads "cipher-mode-iv:hash". Its errors are of kind
// image.ErrUnsupported and name what isn't.
func parseSpec(s, structure string, off int64, field string) (spec, error) {
	refuse := func(want string) (spec, error) {
		return spec{}, with(image.ErrUnsupported, bad(structure, off, field, s, want))
	}
	name, rest, _ := strings.Cut(s, "-")
	mode, iv, _ := strings.Cut(rest, "-")
	iv, ivHash, _ := strings.Cut(iv, ":")
	switch {
	case name == "cipher_null" || name == "null" || strings.HasPrefix(s, "capi:"):
		// A forged header with the null cipher makes a reader take, and
		// write, plaintext (CVE-2025-59054).
		return refuse("a cipher that encrypts")
	case name != "aes":
		return refuse("cipher aes")
	case mode == "ecb":
		return spec{cipher: name, mode: mode, iv: iv}, nil
	case mode != "xts" && mode != "cbc" && mode != "ctr":
		return refuse("mode xts, cbc, ctr or ecb")
	case iv == "plain" || iv == "plain64":
		// QEMU ignores a hash here.
		return spec{cipher: name, mode: mode, iv: iv}, nil
	case iv != "essiv":
		return refuse("IV plain, plain64 or essiv")
	case hashes[ivHash] == nil:
		return refuse("a known hash for essiv")
	}
	return spec{name, mode, iv, ivHash}, nil
}

// checkKeySize tells whether the cipher takes a key of n bytes.
func (s spec) checkKeySize(n int, structure string, off int64, field string) error {
	if s.mode == "xts" {
		if n == 32 || n == 48 || n == 64 {
			return nil
		}
		return with(image.ErrUnsupported, bad(structure, off, field, n, "32, 48 or 64 bytes for aes-xts"))
	}
	if n == 16 || n == 24 || n == 32 {
		return nil
	}
	return with(image.ErrUnsupported, bad(structure, off, field, n, "16, 24 or 32 bytes for aes-"+s.mode))
}

// A crypter encrypts whole sectors of a fixed size. dst may be src. The number
// of a sector is in units of 512 bytes, and the next one's is higher by as many
// as a sector has. It is safe for concurrent use.
type crypter interface {
	encrypt(dst, src []byte, sector uint64)
	decrypt(dst, src []byte, sector uint64)
}

// newCrypter needs a key that checkKeySize has passed.
func (s spec) newCrypter(key []byte, sectorSize int) (crypter, error) {
	var essiv cipher.Block
	if s.iv == "essiv" {
		h := hashes[s.ivHash]()
		h.Write(key)
		var err error
		if essiv, err = aes.NewCipher(h.Sum(nil)); err != nil {
			return nil, fmt.Errorf("essiv:%s gives a key that aes can't take (%v): %w", s.ivHash, err, image.ErrUnsupported)
		}
	}
	if s.mode == "xts" {
		x, err := xts.New(key)
		if err != nil {
			return nil, err
		}
		if essiv != nil || s.iv == "plain" {
			return &xtsUnits{x, newIV(s.iv, essiv), sectorSize}, nil
		}
		return &xtsSectors{x, sectorSize}, nil
	}
	b, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return &blockMode{b, s.mode, newIV(s.iv, essiv), sectorSize}, nil
}

// essivWorks tells whether the digest of the hash is as long as an AES key.
func (s spec) essivWorks() bool {
	if s.iv != "essiv" {
		return true
	}
	switch hashes[s.ivHash]().Size() {
	case 16, 24, 32:
		return true
	}
	return false
}

// xtsSectors is xts-plain64.
type xtsSectors struct {
	x    *xts.Cipher
	size int
}

func (c *xtsSectors) encrypt(dst, src []byte, sector uint64) {
	c.x.EncryptSectorsStep(dst, src, sector, c.size, uint64(c.size/512))
}

func (c *xtsSectors) decrypt(dst, src []byte, sector uint64) {
	c.x.DecryptSectorsStep(dst, src, sector, c.size, uint64(c.size/512))
}

// xtsUnits is XTS with any other IV.
type xtsUnits struct {
	x    *xts.Cipher
	iv   *ivGen
	size int
}

func (c *xtsUnits) encrypt(dst, src []byte, sector uint64) {
	w := c.iv.get()
	defer c.iv.put(w)
	for i := 0; i < len(src); i += c.size {
		c.iv.make(w, sector)
		c.x.EncryptUnit(dst[i:i+c.size], src[i:i+c.size], &w.iv)
		sector += uint64(c.size / 512)
	}
}

func (c *xtsUnits) decrypt(dst, src []byte, sector uint64) {
	w := c.iv.get()
	defer c.iv.put(w)
	for i := 0; i < len(src); i += c.size {
		c.iv.make(w, sector)
		c.x.DecryptUnit(dst[i:i+c.size], src[i:i+c.size], &w.iv)
		sector += uint64(c.size / 512)
	}
}
