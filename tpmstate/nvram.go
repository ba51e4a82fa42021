package tpmstate

import (
	"errors"
	"fmt"

	"nvstore.dev/nvstore"
)

// Options say how a TPM's state is kept in a store. Nil is the zero value.
type Options struct {
	// Version of the TPM; 0 is TPM20. State of the other version is
	// refused.
	Version Version

	// Writer is recorded with each blob that is stored: the program and
	// version that produced the bytes, such as "nvtpm 1.0, libtpms 0.9.2".
	// Older versions of libtpms can't read what newer ones wrote.
	Writer string

	// CloseStore closes the store with the NVRAM.
	CloseStore bool
}

// NVRAM is a TPM's state in a store, under the conventional names.
type NVRAM struct {
	s *nvstore.Store
	o Options
}

var _ Home = (*NVRAM)(nil)

// New returns the state in a store. It fails with ErrVersion if the store has
// state of the other version of TPM.
func New(s *nvstore.Store, o *Options) (*NVRAM, error) {
	n := &NVRAM{s: s}
	if o != nil {
		n.o = *o
	}
	if n.o.Version == 0 {
		n.o.Version = TPM20
	}
	for k := range Kind(kinds) {
		e, err := s.Stat(k.BlobName())
		if errors.Is(err, nvstore.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := n.accept(k, e); err != nil {
			return nil, err
		}
	}
	return n, nil
}

// accept refuses a blob whose type says that it is of the other version. A
// type that says nothing of the kind is let pass: the TPM looks for itself.
func (n *NVRAM) accept(k Kind, e nvstore.Entry) error {
	other := TPM20
	if n.o.Version == TPM20 {
		other = TPM12
	}
	if e.Type == other.blobType(k) {
		return fmt.Errorf("%s has type %q, and the TPM is a %s: %w", k.BlobName(), e.Type, n.o.Version, ErrVersion)
	}
	return CheckSize(k, int(min(e.Size, MaxState+1)))
}

// Load returns a blob, or ErrNotFound.
func (n *NVRAM) Load(k Kind) ([]byte, error) {
	var p []byte
	err := n.s.View(func(tx *nvstore.Tx) error {
		e, err := tx.Stat(k.BlobName())
		if err != nil {
			return err
		}
		if err := n.accept(k, e); err != nil {
			return err
		}
		p, err = tx.Get(k.BlobName(), MaxState)
		return err
	})
	if errors.Is(err, nvstore.ErrNotFound) {
		return nil, fmt.Errorf("%s: %w", k, ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	return p, nil
}

// Store replaces a blob, in one commit. Where the store was reverted
// underneath, nothing is stored and the error is ErrReverted.
func (n *NVRAM) Store(k Kind, blob []byte) error {
	if err := CheckSize(k, len(blob)); err != nil {
		return err
	}
	return n.s.Update(func(tx *nvstore.Tx) error { return n.put(tx, k, blob) })
}

func (n *NVRAM) put(tx *nvstore.Tx, k Kind, blob []byte) error {
	meta := &nvstore.Meta{Type: n.o.Version.blobType(k), Writer: n.o.Writer}
	if e, err := tx.Stat(k.BlobName()); err == nil {
		if err := n.accept(k, e); err != nil && !errors.Is(err, ErrTooLarge) && !errors.Is(err, ErrNotFound) {
			return err
		}
		meta.Attributes = e.Attributes
	}
	return tx.Put(k.BlobName(), blob, meta)
}

// Delete removes a blob.
func (n *NVRAM) Delete(k Kind) error {
	return n.s.Update(func(tx *nvstore.Tx) error { return remove(tx, k) })
}

func remove(tx *nvstore.Tx, k Kind) error {
	if err := tx.Delete(k.BlobName()); !errors.Is(err, nvstore.ErrNotFound) {
		return err
	}
	return nil
}

// Replace makes s the whole state, in one commit, whatever the store had: it
// is what a machine that is migrated or reverted brings with it.
func (n *NVRAM) Replace(s State) error {
	for k, blob := range s {
		if blob == nil {
			continue
		}
		if err := CheckSize(Kind(k), len(blob)); err != nil {
			return err
		}
	}
	return n.s.UpdateAgain(func(tx *nvstore.Tx) error {
		for k, blob := range s {
			var err error
			if blob == nil {
				err = remove(tx, Kind(k))
			} else {
				err = n.put(tx, Kind(k), blob)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// Close closes the store if Options asked for it.
func (n *NVRAM) Close() error {
	if n.o.CloseStore {
		return n.s.Close()
	}
	return nil
}
