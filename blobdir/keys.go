package blobdir

import (
	"fmt"

	"nvstore.dev/crypto/keyslot"
)

// AddKey adds a key slot, and returns its number. The store must be open with
// its key.
func (d *Dir) AddKey(cred *keyslot.Credential, o *keyslot.Options) (id int, err error) {
	err = d.changeKeys(func(s *keyslot.Slots) error {
		id, err = s.Add(d.keys.store, d.keys.master, cred, o)
		return err
	})
	return id, err
}

// RemoveKey removes a key slot; the last one stays. Whoever had its key may
// have kept the master key, and older copies, snapshots and freed blocks of
// the image still have the slot.
func (d *Dir) RemoveKey(id int) error {
	return d.changeKeys(func(s *keyslot.Slots) error { return s.Remove(id) })
}

// changeKeys writes changed key slots elsewhere: a crash leaves the old ones
// or the new.
func (d *Dir) changeKeys(change func(*keyslot.Slots) error) error {
	return d.Update(func(tx *Tx) error {
		if d.keys == nil {
			return fmt.Errorf("%w: a plain store has no key slots", ErrPlain)
		}
		slots, err := d.readKeySlots(tx.st.root)
		if err != nil {
			return err
		}
		if err := change(slots); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
		der, err := slots.Encode()
		if err != nil {
			return err
		}
		if len(der) > maxKeySlots {
			return fmt.Errorf("%w: the key slots have %d bytes, and %d are the most", ErrInvalid, len(der), maxKeySlots)
		}
		tx.keySlots = der
		return nil
	}, nil)
}
