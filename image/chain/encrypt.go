package chain

import (
	"fmt"

	"nvstore.dev/image"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/qcow2"
)

// The encryptions that a qcow2 may have by itself.
const (
	encryptLUKS = "luks" // crypt_method 2
	encryptAES  = "aes"  // crypt_method 1
)

// takeEncrypt reads a qcow2 driver's options about encryption.
func (n *node) takeEncrypt(location, prefix string, own map[string]string) (err error) {
	if n.encrypt, err = take(location, prefix, own, "encrypt.format", false); err != nil {
		return err
	}
	if n.secret, err = take(location, prefix, own, "encrypt.key-secret", false); err != nil {
		return err
	}
	switch {
	case n.encrypt == "" && n.secret != "":
		return badLocation(location, prefix+"encrypt.format", nil, "luks, as there is an encrypt.key-secret")
	case n.encrypt != "" && n.encrypt != encryptLUKS && n.encrypt != encryptAES:
		return badLocation(location, prefix+"encrypt.format", n.encrypt, "luks or aes")
	}
	return nil
}

type unlocker = func(header image.Device, method int) (image.SectorCipher, error)

// unlock makes what opens an encrypted qcow2, and nil for one that isn't. In a
// stack, the location says what it is, so that nobody can put a plain image in
// an encrypted one's place; of a PATH, the header does.
func (n *node) unlock(file image.Device, o *Options) (unlocker, error) {
	info, err := qcow2.Inspect(file, n.child.path)
	if err != nil {
		return nil, err
	}
	if want := n.encrypt; n.path == "" && info.Encryption != want {
		e := &image.FormatError{Path: n.name(), Off: 32, Struct: "qcow2 header", Field: "crypt_method", Got: info.Encryption,
			Want: fmt.Sprintf("%q, as encrypt.format in the location says", want), Kind: ErrLocation}
		if info.Encryption == "" {
			e.Kind = ErrPlain
		}
		return nil, e
	}
	switch {
	case info.Encryption == "":
		return nil, nil
	case info.Encryption == encryptLUKS && drafted(info):
		return nil, &image.FormatError{Path: n.name(), Off: -1, Struct: "qcow2 header", Field: "extensions", Want: noteDraft, Kind: image.ErrUnsupported}
	case info.Encryption == encryptAES && (o.LegacyAES == nil || !o.ReadOnly):
		return nil, &image.FormatError{Path: n.name(), Off: 32, Struct: "qcow2 header", Field: "crypt_method", Got: 1,
			Want: "another: the legacy AES encryption is only read in order to convert it", Kind: image.ErrUnsupported}
	}
	if info.Encryption == encryptAES {
		if err := o.LegacyAES(n.name()); err != nil {
			return nil, err
		}
	}
	return func(header image.Device, method int) (image.SectorCipher, error) {
		pass, err := o.secret(n.secret, n.name())
		if err != nil {
			return nil, err
		}
		defer clear(pass)
		var c *luks.Cipher
		if method == 1 {
			c, err = luks.LegacyAES(pass)
		} else {
			c, err = luks.OpenCipher(header, &luks.Options{Passphrase: pass, Budget: o.Budget, Path: n.child.path})
		}
		if err != nil {
			return nil, &layerError{n.name(), err}
		}
		return c, nil
	}, nil
}

// encrypted makes a new qcow2 one that is encrypted with LUKS.
func encrypted(f *luks.FormatOptions) (*qcow2.Crypt, error) {
	size, err := luks.HeaderSize(f)
	if err != nil {
		return nil, err
	}
	return &qcow2.Crypt{HeaderSize: size, Format: func(header image.Device) (image.SectorCipher, error) {
		c, err := luks.FormatCipher(header, f)
		if err != nil {
			return nil, err
		}
		return c, nil
	}}, nil
}
