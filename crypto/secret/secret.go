// Package secret is how secrets get in: from a file, from a file descriptor,
// or from a prompt on the terminal. Never from arguments or the environment,
// which other processes can read.
//
// Wiping is best effort: the garbage collector moves nothing today, but the
// runtime may have copied a stack, and the kernel may have swapped a page.
package secret

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
)

// Limits in bytes.
const (
	MaxSize = 1 << 10 // of a passphrase
	KeySize = 32      // of a raw key
)

var (
	// ErrEmpty: there is no secret in the source.
	ErrEmpty = errors.New("secret is empty")
	// ErrTooLong: the source holds more than MaxSize bytes, or MaxBlob.
	ErrTooLong = errors.New("secret is too long: a passphrase has at most 1024 bytes, a key file 8 MiB")
	// ErrKeyFile: a key file holds neither 32 bytes nor 64 hexadecimal
	// digits.
	ErrKeyFile = errors.New("key file must hold exactly 32 bytes, or 64 hexadecimal digits and a newline")
	// ErrMismatch: the two entries at a confirming prompt differ.
	ErrMismatch = errors.New("the two entries differ")
	// ErrNoPrint: something tried to serialise a Secret.
	ErrNoPrint = errors.New("secret: refusing to serialise a secret")
)

const redacted = "[secret]"

// A Secret holds bytes that no formatting verb prints and no encoder writes.
type Secret struct{ b []byte }

// New takes over b, and wipes it when the Secret is wiped.
func New(b []byte) *Secret { return &Secret{b: b} }

// Bytes returns the secret itself, not a copy. It is nil after Wipe.
func (s *Secret) Bytes() []byte { return s.b }

// Wipe overwrites the secret. It may be called more than once, and on nil.
func (s *Secret) Wipe() {
	if s != nil {
		Wipe(s.b)
		s.b = nil
	}
}

// String, GoString, Format, MarshalJSON and MarshalText keep the secret out of
// logs and output.
func (s Secret) String() string { return redacted }

// GoString is String for %#v.
func (s Secret) GoString() string { return redacted }

// Format is String for every verb.
func (s Secret) Format(f fmt.State, _ rune) { io.WriteString(f, redacted) }

// MarshalJSON always fails, with ErrNoPrint.
func (s Secret) MarshalJSON() ([]byte, error) { return nil, ErrNoPrint }

// MarshalText always fails, with ErrNoPrint.
func (s Secret) MarshalText() ([]byte, error) { return nil, ErrNoPrint }

// Wipe overwrites b with zeros.
func Wipe(b []byte) { clear(b) }

// ReadFile reads a passphrase of 1 to 1024 bytes. One newline at the end, \n
// or \r\n, is not part of it; any other byte is.
func ReadFile(path string) (*Secret, error) {
	return fromFile(path, passphrase)
}

// ReadFD reads a passphrase, as ReadFile does, from an open file descriptor to
// its end. The descriptor stays open.
func ReadFD(fd int) (*Secret, error) {
	return fromFD(fd, passphrase)
}

// MaxBlob is the most that ReadBlob takes, in bytes, as cryptsetup does.
const MaxBlob = 8 << 20

// ReadBlob reads a secret of any bytes, 1 to MaxBlob of them: a key file of
// cryptsetup's, or a file that QEMU takes as a secret. A newline is part of it.
func ReadBlob(path string) (*Secret, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, MaxBlob+1)
	defer Wipe(b)
	n, err := io.ReadFull(f, b)
	switch {
	case err == nil:
		err = ErrTooLong
	case err == io.EOF:
		err = ErrEmpty
	case err == io.ErrUnexpectedEOF:
		return New(append([]byte(nil), b[:n]...)), nil
	}
	return nil, fmt.Errorf("%s: %w", path, err)
}

// ReadKeyFile reads a raw key: a file of exactly 32 bytes, or of 64
// hexadecimal digits and at most one newline.
func ReadKeyFile(path string) (*Secret, error) {
	return fromFile(path, rawKey)
}

// ReadKeyFD reads a raw key, as ReadKeyFile does, from an open file descriptor
// to its end. The descriptor stays open.
func ReadKeyFD(fd int) (*Secret, error) {
	return fromFD(fd, rawKey)
}

// Exposed tells whether others than its owner may read the file, which is
// worth a warning. It is false for what has no permissions of its own, such
// as a pipe.
func Exposed(path string) (bool, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return false, err
	}
	return fi.Mode().IsRegular() && fi.Mode().Perm()&0o044 != 0, nil
}

func fromFile(path string, parse func([]byte) (*Secret, error)) (*Secret, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s, err := read(f, parse)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

func fromFD(fd int, parse func([]byte) (*Secret, error)) (*Secret, error) {
	f, err := dup(fd)
	if err != nil {
		return nil, fmt.Errorf("file descriptor %d: %w", fd, err)
	}
	defer f.Close()
	s, err := read(f, parse)
	if err != nil {
		return nil, fmt.Errorf("file descriptor %d: %w", fd, err)
	}
	return s, nil
}

// read takes no more than the longest secret, its newline and one byte that
// shows that there is more, so that /dev/zero is no trap.
func read(r io.Reader, parse func([]byte) (*Secret, error)) (*Secret, error) {
	buf := make([]byte, MaxSize+len("\r\n")+1)
	defer Wipe(buf)
	n, err := io.ReadFull(r, buf)
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, err
	}
	return parse(buf[:n])
}

// passphrase copies b without its newline.
func passphrase(b []byte) (*Secret, error) {
	b = trimNewline(b)
	switch {
	case len(b) == 0:
		return nil, ErrEmpty
	case len(b) > MaxSize:
		return nil, ErrTooLong
	}
	return New(append([]byte(nil), b...)), nil
}

// rawKey accepts 32 bytes as they are: trimming a newline could cut a key
// short.
func rawKey(b []byte) (*Secret, error) {
	if len(b) == KeySize {
		return New(append([]byte(nil), b...)), nil
	}
	if len(b) == 0 {
		return nil, ErrEmpty
	}
	b = trimNewline(b)
	if len(b) != 2*KeySize {
		return nil, ErrKeyFile
	}
	key := make([]byte, KeySize)
	if _, err := hex.Decode(key, b); err != nil {
		Wipe(key)
		return nil, ErrKeyFile // hex's own error quotes the byte
	}
	return New(key), nil
}

func trimNewline(b []byte) []byte {
	if n := len(b); n > 0 && b[n-1] == '\n' {
		b = b[:n-1]
		if n := len(b); n > 0 && b[n-1] == '\r' {
			b = b[:n-1]
		}
	}
	return b
}
