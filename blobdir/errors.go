package blobdir

import (
	"errors"
	"fmt"
	"strings"

	"nvstore.dev/image"
)

// Kinds of errors, for errors.Is.
//
// On opening:
var (
	// ErrFormat: there is no store on this device.
	ErrFormat = errors.New("no store here")
	// ErrCorrupt: bytes that were durable are damaged, or contradict
	// each other.
	ErrCorrupt = errors.New("store is damaged")
	// ErrTampered: the checksum is right and the MAC is not: somebody
	// without the key wrote here.
	ErrTampered = errors.New("store was modified without its key")
	// ErrStraddled: the two roots are neither parent and child: the image
	// was reverted between the writes of a commit. Revert once more.
	ErrStraddled = errors.New("a revert cut through a commit")
	// ErrKey: the store needs a key, or the key given opens no slot.
	ErrKey = errors.New("no key slot opens with this key")
	// ErrPlain: a key was given, and the store isn't sealed.
	ErrPlain = errors.New("store is not sealed, but a key was given")
	// ErrUnsupported: the store needs what this version lacks.
	ErrUnsupported = errors.New("not supported by this version")
)

// On use:
var (
	// ErrNotFound: no blob of that name.
	ErrNotFound = errors.New("no such blob")
	// ErrExist: a blob of that name, or a store or other content on the
	// device, is there already.
	ErrExist = errors.New("exists already")
	// ErrInvalid: a name, attribute or size outside the limits.
	ErrInvalid = errors.New("invalid argument")
	// ErrAttached: the blob is a live extent that an emulator may have
	// open: its content isn't to be read, changed or removed before Detach.
	ErrAttached = errors.New("is attached: an emulator may have it open")
	// ErrReverted: the image isn't as this handle last left it: a snapshot
	// was loaded underneath, or another writer came. Nothing of the
	// transaction counts; the store was read anew.
	ErrReverted = errors.New("store was changed underneath")
	// ErrPoisoned: a write or Sync failed, so what the medium holds is
	// unknown. Reopen the store.
	ErrPoisoned = errors.New("an earlier write failed; reopen the store")
	// ErrReadOnly: an update on a store that was opened for reading.
	ErrReadOnly = errors.New("store is read-only")
	// ErrNoSpace: the image is full and can't grow.
	ErrNoSpace = errors.New("no space left in the image")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("store is closed")
)

// An Error says which field of which structure is wrong, and where.
type Error struct {
	Off    int64  // byte offset on the device; negative if there is none
	Struct string // e.g. "root"
	Field  string
	Blob   string // the blob's name, if one is concerned
	Got    any
	Want   string
	Rule   string // reject rule of FORMAT.md, e.g. "R12"
	Kind   error  // one of the sentinels above
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.Blob != "" {
		fmt.Fprintf(&b, "blob %q: ", e.Blob)
	}
	b.WriteString(e.Struct)
	if e.Field != "" {
		b.WriteString("." + e.Field)
	}
	if e.Off >= 0 {
		fmt.Fprintf(&b, " at byte %#x", e.Off)
	}
	b.WriteString(": ")
	if e.Got != nil {
		fmt.Fprintf(&b, "got %v, ", e.Got)
	}
	if e.Want != "" {
		fmt.Fprintf(&b, "want %s: ", e.Want)
	}
	b.WriteString(e.Kind.Error())
	if e.Rule != "" {
		b.WriteString(" (" + e.Rule + ")")
	}
	return b.String()
}

// Unwrap returns the kind.
func (e *Error) Unwrap() error { return e.Kind }

// A SpaceError says how much is missing.
type SpaceError struct {
	Missing int64 // bytes by which the image is too small
	Size    int64 // bytes it has
	Cause   error // why it can't grow; nil if its size is fixed
}

func (e *SpaceError) Error() string {
	s := fmt.Sprintf("%v: %d bytes more are needed than the %d there are", ErrNoSpace, e.Missing, e.Size)
	if e.Cause != nil {
		s += ": " + e.Cause.Error()
	}
	return s
}

// Is makes a SpaceError an ErrNoSpace of this package and of package image.
func (e *SpaceError) Is(target error) bool { return target == ErrNoSpace || target == image.ErrNoSpace }

// corrupt makes an ErrCorrupt at an offset.
func corrupt(off int64, rule, structure, field string, got any, want string) *Error {
	return &Error{Off: off, Struct: structure, Field: field, Got: got, Want: want, Rule: rule, Kind: ErrCorrupt}
}

// damaged tells whether err means that stored bytes are not what a reference
// says, as after a torn commit.
func damaged(err error) bool {
	return errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrTampered)
}
