//go:build !linux

package secret

import (
	"errors"
	"os"
)

// Harden does nothing on this system.
func Harden() error { return nil }

func dup(int) (*os.File, error) {
	return nil, errors.ErrUnsupported
}
