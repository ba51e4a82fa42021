package tpmstate

import (
	"errors"
	"fmt"

	"nvstore.dev/nvstore"
)

// Kinds of errors, for errors.Is. What the store below says (damage, a wrong
// key, no space, a revert) comes as package nvstore's kinds.
var (
	// ErrNotFound: there is no such state. A TPM that has no permanent
	// state is manufactured by its first start.
	ErrNotFound = errors.New("no such TPM state")
	// ErrTooLarge: the state is larger than MaxState.
	ErrTooLarge = errors.New("TPM state is too large")
	// ErrVersion: the state is that of the other version of TPM.
	ErrVersion = errors.New("state of another version of TPM")
	// ErrReverted: the state was changed underneath, so that what is to be
	// stored belongs to a state that was given up. Nothing was stored; the
	// TPM must be started anew from what Load returns.
	ErrReverted = nvstore.ErrReverted
)

// MaxState is the largest blob, in bytes: swtpm's limit on one that it is
// handed (CMD_SET_STATEBLOB). The largest permanent state of libtpms 0.9, all
// of its NV memory in use, is 176 KiB.
const MaxState = 512 << 10

// A Kind is one of a TPM's blobs.
type Kind uint8

const (
	Permanent Kind = iota
	Volatile
	Savestate

	kinds = 3
)

var (
	kindNames = [kinds]string{"permanent", "volatile", "savestate"}
	blobNames = [kinds]string{nvstore.TPMPermanent, nvstore.TPMVolatile, nvstore.TPMSavestate}
	libNames  = [kinds]string{"permall", "volatilestate", "savestate"}
)

// String returns "permanent", "volatile" or "savestate".
func (k Kind) String() string {
	if k >= kinds {
		return fmt.Sprintf("kind %d", uint8(k))
	}
	return kindNames[k]
}

// BlobName is the conventional name in a store, such as "tpm/permanent".
func (k Kind) BlobName() string { return blobNames[k] }

// LibraryName is what libtpms calls it: "permall", "volatilestate" or
// "savestate" (libtpms/tpm_nvfilename.h).
func (k Kind) LibraryName() string { return libNames[k] }

// ByLibraryName finds the kind that libtpms calls name.
func ByLibraryName(name string) (Kind, bool) {
	for k, n := range libNames {
		if n == name {
			return Kind(k), true
		}
	}
	return 0, false
}

// A Version is that of the TPM: its number times ten.
type Version int

const (
	TPM12 Version = 12
	TPM20 Version = 20
)

// String returns "1.2" or "2.0".
func (v Version) String() string { return fmt.Sprintf("%d.%d", v/10, v%10) }

// blobType is the type that a blob in a store has, such as "tpm2-permanent".
func (v Version) blobType(k Kind) string {
	if v == TPM12 {
		return "tpm12-" + k.String()
	}
	return "tpm2-" + k.String()
}

// State is the whole of a TPM's state. A nil blob is one that isn't there.
type State [kinds][]byte

// A Home is where a TPM's state lies. It is for one TPM at a time, and keeps
// others out as well as it can. Methods may be called from any goroutine.
type Home interface {
	// Load returns a blob, or ErrNotFound.
	Load(k Kind) ([]byte, error)

	// Store replaces a blob. When it returns nil, the blob is durable; a
	// crash before leaves the old one or the new one. An error means that
	// nothing was stored. Bytes that are stored already cost nothing.
	Store(k Kind, blob []byte) error

	// Delete removes a blob, durably. One that isn't there is no error.
	Delete(k Kind) error

	// Replace makes s the whole state, as Store does.
	Replace(s State) error

	// Close lets go of the home.
	Close() error
}

// LoadAll returns the whole state of a home.
func LoadAll(h Home) (State, error) {
	var s State
	for k := range s {
		p, err := h.Load(Kind(k))
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return State{}, err
		}
		s[k] = p
	}
	return s, nil
}

// CheckSize refuses a blob that is larger than MaxState, or empty: no TPM has
// an empty state, and swtpm fails on one (a file of 0 bytes).
func CheckSize(k Kind, n int) error {
	if n > MaxState {
		return fmt.Errorf("%s: %d bytes, and %d are possible: %w", k, n, MaxState, ErrTooLarge)
	}
	if n == 0 {
		return fmt.Errorf("%s: empty: %w", k, ErrNotFound)
	}
	return nil
}
