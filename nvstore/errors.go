package nvstore

import (
	"nvstore.dev/blobdir"
	"nvstore.dev/image"
)

// Kinds of errors, for errors.Is: package blobdir's, and package image's for
// what the block layer says.
var (
	ErrNotFound  = blobdir.ErrNotFound  // no blob of that name
	ErrExist     = blobdir.ErrExist     // a blob of that name, or a store, is there already
	ErrInvalid   = blobdir.ErrInvalid   // a name, attribute or size outside the limits
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
)
