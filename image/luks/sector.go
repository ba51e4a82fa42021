package luks

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// A Cipher encrypts sectors of 512 bytes in place, for an image format that
// keeps a LUKS1 header of its own and decides where sectors lie and which
// numbers they have, as qcow2 does. It is an image.SectorCipher, and safe for
// concurrent use.
type Cipher struct {
	c    crypter
	info *Info
}

// OpenCipher opens the LUKS1 header that is all of d, with the options that
// matter for it. LUKS2 is refused: QEMU defines no such qcow2.
func OpenCipher(d image.Device, o *Options) (*Cipher, error) {
	if o == nil {
		o = &Options{}
	}
	c, err := openCipher(d, o)
	if err != nil {
		return nil, named(o.Path, err)
	}
	return c, nil
}

func openCipher(d image.Device, o *Options) (*Cipher, error) {
	h, err := readHeader(d)
	if err != nil {
		return nil, err
	}
	if _, ok := h.(*v1); !ok {
		return nil, with(image.ErrUnsupported, bad("LUKS header", 6, "version", 2, "1, as the format around it asks"))
	}
	key, _, err := unlock(h, o.Passphrase, o.Slots, o.Budget.open())
	if err != nil {
		return nil, err
	}
	defer clear(key)
	l := h.layout()
	c, err := l.spec.newCrypter(key, l.sectorSize)
	if err != nil {
		return nil, err
	}
	return &Cipher{c, h.info()}, nil
}

// HeaderSize returns how many bytes FormatCipher needs.
func HeaderSize(o *FormatOptions) (int64, error) {
	f, err := embedded(nil, o)
	if err != nil {
		return 0, err
	}
	return f.head, nil
}

// FormatCipher makes a LUKS1 header that fills d, but for what is beyond
// HeaderSize, and opens it. Of the options, Version is 1 or 0, and SectorSize,
// Size and Header aren't for it.
func FormatCipher(d image.Device, o *FormatOptions) (*Cipher, error) {
	f, err := embedded(d, o)
	if err != nil {
		return nil, err
	}
	defer clear(f.key)
	if d.Size() < f.head {
		return nil, fmt.Errorf("%d bytes, a LUKS header needs %d: %w", d.Size(), f.head, image.ErrNoSpace)
	}
	if err := erase(d, f.head); err != nil {
		return nil, err
	}
	if err := writeV1(f); err != nil {
		return nil, err
	}
	h, err := readV1(d)
	if err != nil {
		return nil, err
	}
	c, err := f.spec.newCrypter(f.key, 512)
	if err != nil {
		return nil, err
	}
	return &Cipher{c, h.info()}, nil
}

func embedded(d image.Device, o *FormatOptions) (*formatter, error) {
	var e FormatOptions
	if o != nil {
		e = *o
	}
	if e.Version == 0 {
		e.Version = 1
	}
	if e.Version != 1 || e.Header != nil || e.Size != 0 {
		return nil, with(image.ErrUnsupported, bad("LUKS options", -1, "Version", e.Version, "1, without Header and Size"))
	}
	f, err := newFormatter(d, &e)
	if err != nil {
		return nil, err
	}
	f.offset = f.head // what QEMU writes, and nobody reads
	return f, nil
}

// LegacyAES is the cipher of qcow and qcow2 images with crypt_method 1:
// AES-128-CBC under the passphrase's first 16 bytes, filled up with zeros, with
// the guest's sector number as IV. There is no key derivation and nothing that
// tells a wrong passphrase, and whoever can make the guest write learns of
// equal blocks: it is for reading old images alone.
func LegacyAES(pass []byte) (*Cipher, error) {
	if len(pass) == 0 {
		return nil, errors.New("luks: empty passphrase")
	}
	key := make([]byte, 16)
	defer clear(key)
	copy(key, pass)
	c, err := spec{cipher: "aes", mode: "cbc", iv: "plain64"}.newCrypter(key, 512)
	if err != nil {
		return nil, err
	}
	return &Cipher{c: c}, nil
}

// Info returns what the header said when it was opened, and nil if there is
// none.
func (c *Cipher) Info() *Info { return c.info }

// Encrypt encrypts p, whole sectors, of which the first has the given number.
func (c *Cipher) Encrypt(p []byte, sector uint64) error { return c.run(p, sector, c.c.encrypt) }

// Decrypt undoes Encrypt.
func (c *Cipher) Decrypt(p []byte, sector uint64) error { return c.run(p, sector, c.c.decrypt) }

func (c *Cipher) run(p []byte, sector uint64, do func(dst, src []byte, sector uint64)) error {
	if len(p)%512 != 0 {
		return fmt.Errorf("%d bytes are no whole sectors: %w", len(p), image.ErrOutOfRange)
	}
	if len(p) == 0 {
		return nil
	}
	_, err := eachPart(p, 0, func(p []byte, off int64) error {
		do(p, p, sector+uint64(off/512))
		return nil
	})
	return err
}
