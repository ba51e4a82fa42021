package luks

import (
	"errors"

	"nvstore.dev/image"
)

var (
	// ErrPassphrase: all key slots were tried, and none opens with this
	// passphrase.
	ErrPassphrase = errors.New("luks: no key slot opens with this passphrase")
	// ErrBudget: a key slot that might have opened asks for more time or
	// memory than the caller allows.
	ErrBudget = errors.New("luks: key slot exceeds the caller's budget")
	// ErrTruncated: the image ends inside the header, a key slot's area or
	// before the payload.
	ErrTruncated = errors.New("luks: image is truncated")
	// ErrNoSlot: no key slot is in use, so that nothing can open the image.
	ErrNoSlot = errors.New("luks: no key slot is in use")
	// ErrOther: a header was to be restored over one that may be another
	// image's.
	ErrOther = errors.New("luks: the backup may be of another image")
	// ErrLastSlot: without this key slot, nothing could open the image.
	ErrLastSlot = errors.New("luks: the only key slot in use")
)

// bad is a FormatError, of kind image.ErrCorrupt unless with says otherwise.
func bad(structure string, off int64, field string, got any, want string) *image.FormatError {
	return &image.FormatError{
		Off: off, Struct: structure, Field: field, Got: got, Want: want, Kind: image.ErrCorrupt,
	}
}

func with(kind error, e *image.FormatError) *image.FormatError {
	e.Kind = kind
	return e
}

// named adds the image's name to a FormatError inside err.
func named(path string, err error) error {
	var f *image.FormatError
	if errors.As(err, &f) && f.Path == "" {
		f.Path = path
	}
	return err
}
