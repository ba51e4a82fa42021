package image

import (
	"errors"
	"fmt"
	"strings"
)

// Kinds of errors, for errors.Is. Drivers wrap them in a FormatError where a
// position in the image is known.
var (
	// ErrFormat: the image isn't of the format it was opened as.
	ErrFormat = errors.New("not an image of this format")
	// ErrCorrupt: the image is of the format but contradicts itself.
	ErrCorrupt = errors.New("image is corrupt")
	// ErrUnsupported: the image or device needs what this driver lacks.
	ErrUnsupported = errors.New("not supported")
	// ErrOutOfRange: a request reaches outside the device.
	ErrOutOfRange = errors.New("request out of range")
	// ErrReadOnly: a write on a device that was opened for reading.
	ErrReadOnly = errors.New("device is read-only")
	// ErrNoSpace: the medium is full, or the device can't grow.
	ErrNoSpace = errors.New("no space left")
	// ErrLocked: another process holds the image.
	ErrLocked = errors.New("image is in use by another process")
	// ErrClosed: the device was closed.
	ErrClosed = errors.New("device is closed")
	// ErrPoisoned: a write or Sync failed earlier, so the state of the
	// medium is unknown; reopen the image.
	ErrPoisoned = errors.New("device failed earlier and must be reopened")
	// ErrExist: a snapshot of that name is there already.
	ErrExist = errors.New("already exists")
	// ErrNotFound: no snapshot of that name or ID.
	ErrNotFound = errors.New("not found")
)

// A FormatError says where in an image which field is wrong.
type FormatError struct {
	Path   string // file name, if known
	Off    int64  // byte offset in the image file; negative if there is none
	Struct string // e.g. "qcow2 header"
	Field  string // e.g. "l1_table_offset"
	Got    any    // nil if not meaningful
	Want   string // what the field must be
	Kind   error  // one of the sentinels above
}

func (e *FormatError) Error() string {
	var b strings.Builder
	if e.Path != "" {
		b.WriteString(e.Path + ": ")
	}
	b.WriteString(e.Struct)
	if e.Field != "" {
		b.WriteString("." + e.Field)
	}
	if e.Off >= 0 {
		fmt.Fprintf(&b, " at byte %#x", e.Off)
	}
	b.WriteString(": ")
	switch g := e.Got.(type) {
	case nil:
	case uint64, uint32, uint16, uint8, int64, int:
		fmt.Fprintf(&b, "got %#x, ", g)
	default:
		fmt.Fprintf(&b, "got %q, ", fmt.Sprint(g))
	}
	if e.Want != "" {
		b.WriteString("want " + e.Want + ": ")
	}
	b.WriteString(e.Kind.Error())
	return b.String()
}

// Unwrap returns the kind.
func (e *FormatError) Unwrap() error { return e.Kind }
