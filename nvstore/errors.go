package nvstore

import (
	"errors"
	"fmt"
	"io/fs"

	"nvstore.dev/blobdir"
	"nvstore.dev/image"
)

// Kinds of errors, for errors.Is: package blobdir's, and package image's for
// what the block layer says.
var (
	ErrFormat    = blobdir.ErrFormat    // there is no store
	ErrNotFound  = blobdir.ErrNotFound  // no blob of that name
	ErrExist     = blobdir.ErrExist     // a blob of that name, or a store, is there already
	ErrInvalid   = blobdir.ErrInvalid   // a name, attribute or size outside the limits
	ErrAttached  = blobdir.ErrAttached  // a live extent that an emulator may have open
	ErrReverted  = blobdir.ErrReverted  // the image was changed underneath; nothing was committed
	ErrPoisoned  = blobdir.ErrPoisoned  // an earlier write failed; open the store again
	ErrCorrupt   = blobdir.ErrCorrupt   // durable bytes are damaged
	ErrTampered  = blobdir.ErrTampered  // somebody without the key wrote here
	ErrStraddled = blobdir.ErrStraddled // a revert cut through a commit; revert once more
	ErrKey       = blobdir.ErrKey       // no key, or the wrong one
	ErrPlain     = blobdir.ErrPlain     // a key was given, and the store is plain
	ErrReadOnly  = blobdir.ErrReadOnly  // opened for reading
	ErrNoSpace   = blobdir.ErrNoSpace   // the image is full and can't grow
	ErrLocked    = image.ErrLocked      // another process holds the image
	ErrClosed    = blobdir.ErrClosed    // the store, blob or transaction was closed

	// ErrAmbiguous: an image has a layout record at its end and a store at
	// its start, and nothing tells which of them somebody made up.
	ErrAmbiguous = errors.New("the image has a store at its start and a layout record at its end")
	// ErrAdopting: an image's adoption was interrupted. It is an
	// image.ErrUnsupported.
	ErrAdopting = fmt.Errorf("the image was about to be made a machine's disk, and that was interrupted: %w", image.ErrUnsupported)
	// ErrSnapshots: a change of the image's size would leave snapshots that
	// a running QEMU can't load.
	ErrSnapshots = errors.New("the image has snapshots of another size")
)

// taken makes an ErrExist of what the block layer says when a new image's name
// isn't free.
func taken(err error) error {
	if errors.Is(err, fs.ErrExist) || errors.Is(err, image.ErrExist) {
		return takenError{err}
	}
	return err
}

type takenError struct{ error }

func (e takenError) Unwrap() error        { return e.error }
func (e takenError) Is(target error) bool { return target == ErrExist }
