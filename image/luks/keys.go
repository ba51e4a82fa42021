package luks

import (
	"crypto/rand"
	"errors"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/image"
)

// KeyOptions are for AddKey and ChangeKey.
type KeyOptions struct {
	// Passphrase opens a key slot that is in use.
	Passphrase []byte

	// NewPassphrase is what is to open another. An empty one is refused.
	NewPassphrase []byte

	// PBKDF2, Iterations and Argon2id are as in FormatOptions.
	PBKDF2     bool
	Iterations uint32
	Argon2id   kdf.Argon2id

	// Budget is what may be spent on opening; nil means the default.
	Budget *Budget
}

// AddKey makes a free key slot of the header at the start of d open with
// another passphrase, and returns its number. A crash leaves the header as it
// was or as it shall be, but for a slot that doesn't open.
//
// A LUKS2 header is written in both places, which repairs one that was damaged.
func AddKey(d image.Device, o *KeyOptions) (number int, err error) {
	_, number, err = addKey(d, o)
	return number, err
}

// ChangeKey has NewPassphrase open the image, and no longer Passphrase. It
// fills a free key slot, and then removes the one that Passphrase opened: after
// a crash, one of the two opens the image, or both do. It returns the number of
// the new slot.
func ChangeKey(d image.Device, o *KeyOptions) (number int, err error) {
	old, number, err := addKey(d, o)
	if err != nil {
		return 0, err
	}
	return number, RemoveKey(d, old)
}

// TestKey returns the number of the key slot that the passphrase opens, as Open
// would. Of the options, those about the payload don't count.
func TestKey(d image.Device, o *Options) (number int, err error) {
	if o == nil {
		o = &Options{}
	}
	h, err := readHeader(d)
	if err != nil {
		return 0, named(o.Path, err)
	}
	key, number, err := unlock(h, o.Passphrase, o.Slots, o.Budget.open())
	if err != nil {
		return 0, named(o.Path, err)
	}
	clear(key)
	return number, nil
}

// RemoveKey removes a key slot and overwrites its key area, though a medium
// that copies on writing may keep what was there. It needs no passphrase. The
// last slot in use is refused with ErrLastSlot, one that isn't in use with
// image.ErrNotFound.
func RemoveKey(d image.Device, number int) error {
	h, err := readHeader(d)
	if err != nil {
		return err
	}
	return h.remove(number)
}

func addKey(d image.Device, o *KeyOptions) (old, number int, err error) {
	if o == nil || len(o.NewPassphrase) == 0 {
		return 0, 0, errors.New("luks: empty passphrase")
	}
	f := formatter{FormatOptions: FormatOptions{
		Passphrase: o.NewPassphrase, Iterations: o.Iterations, Argon2id: o.Argon2id,
	}}
	f.defaults()
	if err := f.check(); err != nil {
		return 0, 0, err
	}
	h, err := readHeader(d)
	if err != nil {
		return 0, 0, err
	}
	key, old, err := unlock(h, o.Passphrase, nil, o.Budget.open())
	if err != nil {
		return 0, 0, err
	}
	defer clear(key)
	full := *o
	full.Iterations, full.Argon2id = f.Iterations, f.Argon2id
	number, err = h.add(key, &full)
	if err != nil {
		return 0, 0, err
	}
	return old, number, nil
}

// scrub overwrites a key area.
func scrub(d image.Device, off, n int64) error {
	p := make([]byte, max(0, min(n, d.Size()-off)))
	_, _ = rand.Read(p) // never fails
	if _, err := d.WriteAt(p, off); err != nil {
		return err
	}
	return d.Sync()
}
