package nbd

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"unicode/utf8"

	"nvstore.dev/image"
	"nvstore.dev/image/nbd/internal/tlspsk"
)

// Limits of keys, bytes.
const (
	maxIdentity = 128     // RFC 4279, section 5.3, and GnuTLS
	minKey      = 16      // of what must be random
	maxKey      = 64      // psktool makes 32
	maxKeyFile  = 1 << 20 // a few thousand keys
)

// A PSK is a pre-shared key of TLS 1.3 (RFC 8446, section 2.2) and the
// identity that it goes by. Nothing prints the key.
type PSK struct {
	identity string
	key      []byte
}

// NewPSK makes a key. The identity is 1 to 128 bytes of text, and isn't
// secret. The key is 16 to 64 random bytes: one that can be guessed is found
// out by whoever sees one handshake. Others fail with ErrKey.
func NewPSK(identity string, key []byte) (*PSK, error) {
	switch {
	case !validIdentity(identity):
		return nil, fmt.Errorf("%w: an identity has 1 to %d bytes of text", ErrKey, maxIdentity)
	case len(key) < minKey || len(key) > maxKey:
		return nil, fmt.Errorf("%w: %d bytes, where a key has %d to %d", ErrKey, len(key), minKey, maxKey)
	}
	return &PSK{identity, bytes.Clone(key)}, nil
}

func validIdentity(s string) bool {
	control := func(r rune) bool { return r < ' ' || r == 0x7f }
	return len(s) > 0 && len(s) <= maxIdentity && utf8.ValidString(s) && !strings.ContainsFunc(s, control)
}

// Identity is the name that the key goes by.
func (k PSK) Identity() string { return k.identity }

// Format prints the identity, whatever the verb.
func (k PSK) Format(f fmt.State, _ rune) { fmt.Fprintf(f, "PSK of %q", k.identity) }

// ReadPSKs reads a file of keys in the format of GnuTLS, as psktool makes it:
// lines IDENTITY:KEY, the key in hexadecimal. If a line begins with #, so is
// the identity behind it. What isn't so, or is there twice, fails with
// ErrKey.
func ReadPSKs(path string) ([]*PSK, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxKeyFile+1))
	defer clear(data)
	if err != nil {
		return nil, err
	}
	if len(data) > maxKeyFile {
		return nil, fmt.Errorf("%s: %w: a file of keys has at most 1 MiB", path, ErrKey)
	}
	var keys []*PSK
	seen := map[string]bool{}
	n := 0
	for line := range bytes.Lines(data) {
		n++
		if line = bytes.TrimRight(line, "\r\n"); len(line) == 0 {
			continue
		}
		k, err := parsePSK(line)
		if err == nil && seen[k.identity] {
			err = fmt.Errorf("%w: the identity is there twice", ErrKey)
		}
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w", path, n, err)
		}
		seen[k.identity] = true
		keys = append(keys, k)
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%s: %w: no key is there", path, ErrKey)
	}
	return keys, nil
}

func parsePSK(line []byte) (*PSK, error) {
	name, digits, ok := bytes.Cut(line, []byte(":"))
	identity, encoded := bytes.CutPrefix(name, []byte("#"))
	key := make([]byte, hex.DecodedLen(len(digits)))
	defer clear(key)
	_, err := hex.Decode(key, digits)
	if encoded && err == nil {
		identity, err = hex.DecodeString(string(identity))
	}
	if !ok || err != nil {
		// What hex says would show a digit of the key.
		return nil, fmt.Errorf("%w: IDENTITY:KEY is wanted, the key in hexadecimal", ErrKey)
	}
	return NewPSK(string(identity), key)
}

// findPSK reads the key that a target is for.
func (t *Target) findPSK() (*PSK, error) {
	keys, err := ReadPSKs(t.PSKFile)
	if err != nil {
		return nil, err
	}
	if t.Username == "" && len(keys) == 1 {
		return keys[0], nil
	}
	i := slices.IndexFunc(keys, func(k *PSK) bool { return k.identity == t.Username })
	switch {
	case i >= 0:
		return keys[i], nil
	case t.Username == "":
		return nil, fmt.Errorf("%w: %s has %d keys: say which, as in nbds://USER@HOST/", ErrURI, t.PSKFile, len(keys))
	}
	return nil, fmt.Errorf("nbd: a key for %q in %s: %w", t.Username, t.PSKFile, image.ErrNotFound)
}

// A tlsConn is one end of TLS, by certificates or by a key.
type tlsConn interface {
	net.Conn
	Handshake() error
}

// tlsFailed says why a client's handshake failed.
func tlsFailed(c tlsConn, err error) error {
	f := (*tlspsk.Error)(nil)
	_, byKey := c.(*tlspsk.Conn)
	switch gone := err == io.EOF || err == io.ErrUnexpectedEOF; {
	case gone && byKey: // nbdkit and QEMU send no alert
		return fmt.Errorf("%w: the server hung up in the TLS handshake: it may not know the identity, or have another key for it", ErrDisconnected)
	case gone:
		return fmt.Errorf("%w: the server hung up in the TLS handshake", ErrDisconnected)
	case errors.As(err, &f) && f.Remote:
		return fmt.Errorf("%w: TLS: %w", ErrRefused, err)
	case errors.As(err, &f):
		return fmt.Errorf("%w: TLS: %w", ErrProtocol, err)
	}
	return fmt.Errorf("nbd: TLS: %w", err)
}
