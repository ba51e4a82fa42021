package luks

import (
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"hash"

	"golang.org/x/crypto/ripemd160"

	"nvstore.dev/image"
)

// hashes are those of QEMU's LUKS driver.
var hashes = map[string]func() hash.Hash{
	"md5":       md5.New,
	"sha1":      sha1.New,
	"sha224":    sha256.New224,
	"sha256":    sha256.New,
	"sha384":    sha512.New384,
	"sha512":    sha512.New,
	"ripemd160": ripemd160.New,
}

func findHash(name, structure string, off int64, field string) (func() hash.Hash, error) {
	h, ok := hashes[name]
	if !ok {
		return nil, with(image.ErrUnsupported, bad(structure, off, field, name,
			"md5, sha1, sha224, sha256, sha384, sha512 or ripemd160"))
	}
	return h, nil
}
