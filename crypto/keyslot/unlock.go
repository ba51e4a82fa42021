package keyslot

import (
	"fmt"
	"io"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/seal"
)

// rawKeyLabel separates the wrapping key from other uses of the same key file.
const rawKeyLabel = "nvstore.dev/keyslot@v1 raw key"

// A Credential is what opens a slot: a passphrase or a raw key.
type Credential struct {
	typ    Type
	secret []byte
}

// Passphrase makes a credential of 1 to 1024 bytes, which are copied. They are
// taken as they are, without Unicode normalization.
func Passphrase(p []byte) (*Credential, error) {
	if len(p) < 1 || len(p) > kdf.MaxPassphrase {
		return nil, fmt.Errorf("%w: passphrase of %d bytes, want 1 to %d", ErrArgument, len(p), kdf.MaxPassphrase)
	}
	return &Credential{TypePassphrase, append([]byte(nil), p...)}, nil
}

// RawKey makes a credential of 32 uniformly random bytes, which are copied.
func RawKey(k []byte) (*Credential, error) {
	if len(k) != seal.KeySize {
		return nil, fmt.Errorf("%w: raw key of %d bytes, want %d", ErrArgument, len(k), seal.KeySize)
	}
	return &Credential{TypeRawKey, append([]byte(nil), k...)}, nil
}

// Type says which slots the credential may open.
func (c *Credential) Type() Type { return c.typ }

// Wipe overwrites the credential, which opens nothing from then on.
func (c *Credential) Wipe() {
	clear(c.secret)
	c.secret = nil
}

// Format prints no part of the secret, whatever the verb.
func (c Credential) Format(f fmt.State, _ rune) { io.WriteString(f, "keyslot.Credential(redacted)") }

// Unlock tries the credential on the slots of its type, in ascending order,
// and returns the 32-byte master key and the number of the slot that opened.
//
// Slots come from an image, and are authenticated only by opening one, so the
// budget (nil for the defaults of package kdf) bounds the work of all slots
// together: a slot is tried only while its parameters fit what is left. If
// none opens the error is ErrBudget when one was left out for that, else
// ErrUnsupported when one was left out for an extension, else ErrUnlock.
func (s *Slots) Unlock(storeUUID [16]byte, cred *Credential, budget *kdf.Budget) (master []byte, id int, err error) {
	if cred == nil || cred.secret == nil {
		return nil, 0, fmt.Errorf("%w: no credential", ErrArgument)
	}
	left := budget.Resolved()
	err = ErrUnlock
	for i := range s.slots {
		sl := &s.slots[i]
		switch {
		case sl.typ != cred.typ:
			continue
		case sl.critical:
			if err == ErrUnlock {
				err = fmt.Errorf("key slot %d: %w", sl.id, ErrUnsupported)
			}
			continue
		case sl.typ == TypePassphrase:
			if bad := affordable(sl.argon, left); bad != nil {
				err = fmt.Errorf("key slot %d: %w: %w", sl.id, ErrBudget, bad)
				continue
			}
			left.Work -= sl.argon.Work()
		}
		if master, ok := sl.open(storeUUID, cred); ok {
			return master, sl.id, nil
		}
	}
	return nil, 0, err
}

// affordable is Validate against what is left, where a zero means nothing,
// not the default.
func affordable(a kdf.Argon2id, left kdf.Budget) error {
	if left.Work == 0 {
		return kdf.ErrBudget
	}
	return a.Validate(&left)
}

// kek derives the slot's key-encryption key.
func (sl *slot) kek(cred *Credential) (*seal.Key, error) {
	var raw []byte
	var err error
	if sl.typ == TypePassphrase {
		raw, err = sl.argon.Key(cred.secret, sl.salt[:])
	} else {
		raw, err = kdf.Derive(cred.secret, rawKeyLabel, nil, seal.KeySize)
	}
	if err != nil {
		return nil, err
	}
	defer clear(raw)
	return seal.NewKey(raw)
}

func (sl *slot) open(storeUUID [16]byte, cred *Credential) (master []byte, ok bool) {
	k, err := sl.kek(cred)
	if err != nil {
		return nil, false
	}
	master, err = k.Open(nil, sl.wrapped[:], &sl.box, sl.context(storeUUID))
	return master, err == nil
}

func (sl *slot) seal(storeUUID [16]byte, master []byte, cred *Credential) error {
	k, err := sl.kek(cred)
	if err != nil {
		return err
	}
	ct, box, err := k.Seal(nil, master, sl.context(storeUUID))
	if err != nil {
		return err
	}
	sl.box = box
	copy(sl.wrapped[:], ct)
	sl.wrap = encodeSealedBox(&sl.box, sl.wrapped[:])
	return nil
}
