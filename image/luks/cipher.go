package luks

import (
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"slices"
	"strings"

	"github.com/aead/serpent"
	"golang.org/x/crypto/cast5"
	"golang.org/x/crypto/twofish"

	"nvstore.dev/crypto/xts"
	"nvstore.dev/image"
)

// An algorithm is a block cipher.
type algorithm struct {
	block int   // bytes
	keys  []int // bytes
	make  func(key []byte) (cipher.Block, error)
}

// algorithms are those of QEMU's LUKS driver, by dm-crypt's names.
var algorithms = map[string]algorithm{
	"aes":     {aes.BlockSize, []int{16, 24, 32}, aes.NewCipher},
	"serpent": {serpent.BlockSize, []int{16, 24, 32}, serpent.NewCipher},
	"twofish": {twofish.BlockSize, []int{16, 24, 32}, func(key []byte) (cipher.Block, error) {
		return twofish.NewCipher(key)
	}},
	"cast5": {cast5.BlockSize, []int{cast5.KeySize}, func(key []byte) (cipher.Block, error) {
		return cast5.NewCipher(key)
	}},
}

// A spec is a cipher with its chaining mode and its way to make an IV of a
// sector's number, as in dm-crypt's "aes-xts-plain64".
type spec struct {
	cipher string // of algorithms
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
	case algorithms[name].make == nil:
		return refuse("cipher aes, serpent, twofish or cast5")
	case mode == "ecb":
		return spec{cipher: name, mode: mode, iv: iv}, nil
	case mode != "xts" && mode != "cbc" && mode != "ctr":
		return refuse("mode xts, cbc, ctr or ecb")
	case mode == "xts" && algorithms[name].block != xts.BlockSize:
		return refuse("for xts a cipher with blocks of 16 bytes")
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

// keySizes are the lengths of key that the cipher takes, in bytes, in order.
func (s spec) keySizes() []int {
	sizes := slices.Clone(algorithms[s.cipher].keys)
	if s.mode == "xts" {
		for i := range sizes {
			sizes[i] *= 2
		}
	}
	return sizes
}

// checkKeySize tells whether the cipher takes a key of n bytes.
func (s spec) checkKeySize(n int, structure string, off int64, field string) error {
	sizes := s.keySizes()
	if slices.Contains(sizes, n) {
		return nil
	}
	list := strings.Trim(strings.ReplaceAll(fmt.Sprint(sizes), " ", ", "), "[]")
	return with(image.ErrUnsupported, bad(structure, off, field, n, list+" bytes for "+s.cipher+"-"+s.mode))
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
	a := algorithms[s.cipher]
	var essiv cipher.Block
	if s.iv == "essiv" {
		h := hashes[s.ivHash]()
		h.Write(key)
		var err error
		if essiv, err = a.make(h.Sum(nil)); err != nil {
			return nil, fmt.Errorf("essiv:%s gives a key that %s can't take (%v): %w", s.ivHash, s.cipher, err, image.ErrUnsupported)
		}
	}
	if s.mode == "xts" {
		x, err := s.newXTS(key)
		if err != nil {
			return nil, err
		}
		if essiv != nil || s.iv == "plain" {
			return &xtsUnits{x, newIV(s.iv, essiv), sectorSize}, nil
		}
		return &xtsSectors{x, sectorSize}, nil
	}
	b, err := a.make(key)
	if err != nil {
		return nil, err
	}
	return &blockMode{b, a.block, s.mode, newIV(s.iv, essiv), sectorSize}, nil
}

func (s spec) newXTS(key []byte) (*xts.Cipher, error) {
	if s.cipher == "aes" {
		return xts.New(key)
	}
	a := algorithms[s.cipher]
	data, err := a.make(key[:len(key)/2])
	if err != nil {
		return nil, err
	}
	tweak, err := a.make(key[len(key)/2:])
	if err != nil {
		return nil, err
	}
	return xts.NewBlocks(data, tweak)
}

// essivWorks tells whether the digest of the hash is as long as a key of the
// cipher.
func (s spec) essivWorks() bool {
	return s.iv != "essiv" || slices.Contains(algorithms[s.cipher].keys, hashes[s.ivHash]().Size())
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
