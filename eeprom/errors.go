package eeprom

import (
	"errors"
	"fmt"

	"nvstore.dev/nvstore"
)

// Kinds of errors, for errors.Is.
var (
	ErrInvalid  = errors.New("invalid EEPROM")           // no such part, or options that it doesn't have
	ErrSize     = errors.New("EEPROM of another size")   // memory that isn't as large as the part; a *SizeError
	ErrReverted = nvstore.ErrReverted                    // the memory went back in time; nothing was committed
	ErrStatus   = errors.New("invalid status of EEPROM") // the status kept with a blob is no number
)

// A SizeError says that memory isn't as large as the part that it is for.
type SizeError struct {
	Name      string // of the blob, or of the part
	Got, Want int64  // bytes
}

func (e *SizeError) Error() string {
	return fmt.Sprintf("%v: %s has %d bytes, not %d", ErrSize, e.Name, e.Got, e.Want)
}

// Is tells that it is an ErrSize.
func (e *SizeError) Is(target error) bool { return target == ErrSize }
