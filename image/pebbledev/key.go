package pebbledev

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/cockroachdb/pebble/v2"

	"nvstore.dev/image"
)

// A UUID names a machine.
type UUID [16]byte

// String returns the form of RFC 9562 section 4, in lower case.
func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// ParseUUID reads the 36 characters of RFC 9562 section 4, in either case.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	for i := range len(s) {
		dash := i == 8 || i == 13 || i == 18 || i == 23
		if dash != (s[i] == '-') {
			return UUID{}, fmt.Errorf("%q isn't a UUID", s)
		}
	}
	b, err := hex.DecodeString(strings.ReplaceAll(s, "-", ""))
	if err != nil || len(s) != 36 {
		return UUID{}, fmt.Errorf("%q isn't a UUID", s)
	}
	copy(u[:], b)
	return u, nil
}

// The keys; see the package comment.

func machineKey(m UUID, rest string) []byte {
	return append(append([]byte("m/"), m[:]...), rest...)
}

func machineStart(m UUID) []byte { return machineKey(m, "/") }
func machineEnd(m UUID) []byte   { return machineKey(m, "0") } // '/' + 1
func sizeKey(m UUID) []byte      { return machineKey(m, "/size") }
func blockEnd(m UUID) []byte     { return machineKey(m, "/b0") }

func blockKey(m UUID, block int64) []byte {
	return binary.BigEndian.AppendUint64(machineKey(m, "/b/"), uint64(block))
}

// machineOf returns the machine that a key belongs to.
func machineOf(key []byte) (UUID, bool) {
	if len(key) < 2+16+1 || !bytes.HasPrefix(key, []byte("m/")) || key[18] != '/' {
		return UUID{}, false
	}
	return UUID(key[2:18]), true
}

const blockKeyLen = 2 + 16 + 3 + 8

// blockOf returns the number in a key that is known to lie between two block
// keys of one machine.
func blockOf(key []byte) (int64, bool) {
	if len(key) != blockKeyLen {
		return 0, false
	}
	n := binary.BigEndian.Uint64(key[blockKeyLen-8:])
	return int64(n), n <= MaxSize/BlockSize
}

// size reads the size of a machine's device, and checks that no block lies
// past it.
func (h *home) size(m UUID) (int64, error) {
	var size int64
	err := h.get(sizeKey(m), func(val []byte) error {
		if len(val) != 8 {
			return h.corrupt("size", "length", -1, len(val), "8")
		}
		n := binary.BigEndian.Uint64(val)
		if n > MaxSize {
			return h.corrupt("size", "value", -1, n, fmt.Sprintf("at most %#x", int64(MaxSize)))
		}
		size = int64(n)
		return nil
	})
	if errors.Is(err, image.ErrNotFound) {
		return 0, fmt.Errorf("machine %s: %w", m, err)
	}
	if err != nil {
		return 0, err
	}
	err = h.iterate(blockKey(m, blocks(size)), blockEnd(m), func(it *pebble.Iterator) error {
		if it.First() {
			return h.corrupt("block", "number", -1, fmt.Sprintf("%x", it.Key()), "a block below the size")
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	return size, nil
}

// get passes the value of key to f, which must not keep it, or returns
// image.ErrNotFound.
func (h *home) get(key []byte, f func(val []byte) error) error {
	err := guard(func() error {
		val, closer, err := h.db.Get(key)
		if errors.Is(err, pebble.ErrNotFound) {
			return image.ErrNotFound
		}
		if err != nil {
			return mapError(h.dir, err)
		}
		return errors.Join(f(val), closer.Close())
	})
	return err
}

// iterate runs f over the keys in [lower, upper).
func (h *home) iterate(lower, upper []byte, f func(it *pebble.Iterator) error) error {
	return guard(func() error {
		it, err := h.db.NewIter(&pebble.IterOptions{LowerBound: lower, UpperBound: upper})
		if err != nil {
			return mapError(h.dir, err)
		}
		err = f(it)
		if err == nil {
			err = mapError(h.dir, it.Error())
		}
		if cerr := it.Close(); err == nil {
			err = mapError(h.dir, cerr)
		}
		return err
	})
}

func (h *home) corrupt(what, field string, off int64, got any, want string) error {
	return &image.FormatError{Path: h.dir, Off: off, Struct: "pebble device " + what, Field: field,
		Got: got, Want: want, Kind: image.ErrCorrupt}
}

func (h *home) corruptKey(key []byte) error {
	return h.corrupt("key", "", -1, fmt.Sprintf("%x", key), "a key of a machine")
}
