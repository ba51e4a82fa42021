package eeprom

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"

	"nvstore.dev/blobdir"
	"nvstore.dev/nvstore"
)

// Memory is the array of a chip, and what keeps it. A Blob is one.
type Memory interface {
	io.ReaderAt

	// Size returns the length in bytes.
	Size() int64

	// Epoch tells how often the memory went back in time, as by loading a
	// snapshot. Memory that never does returns 0.
	Epoch() int64

	// Commit writes p at off. When it returns nil, p is durable; if power
	// fails before, all of p is there or nothing. If the memory isn't of
	// that epoch any more, nothing is written, and the error is ErrReverted.
	Commit(p []byte, off, epoch int64) error
}

type attribute = blobdir.Attribute

// statusKey is the attribute that has the non-volatile bits of a chip's status
// register, as two hexadecimal digits.
const statusKey = "eeprom.status"

// A Blob is the memory of a chip as a blob of a store. The non-volatile bits of
// a status register are an attribute of the blob, "eeprom.status".
type Blob struct {
	s    *nvstore.Store
	name string
	size int64
}

var _ Memory = (*Blob)(nil)

// Open opens the memory of a chip, of size bytes. A blob that isn't there is
// made, erased: all bytes are 0xFF. One of another size is an ErrSize. Of meta,
// which may be nil, a blob that is there already takes no notice.
func Open(s *nvstore.Store, name string, size int64, meta *nvstore.Meta) (*Blob, error) {
	if size < 1 || size > MaxSize {
		return nil, fmt.Errorf("%w: %q of %d bytes; 1 to %d", ErrInvalid, name, size, MaxSize)
	}
	m := nvstore.Meta{Type: "eeprom"}
	if meta != nil {
		m = *meta
	}
	e, err := s.Stat(name)
	if errors.Is(err, nvstore.ErrNotFound) {
		err = s.Update(func(tx *nvstore.Tx) (err error) {
			// Another one may have been faster.
			if e, err = tx.Stat(name); errors.Is(err, nvstore.ErrNotFound) {
				e.Size = size
				err = tx.Put(name, bytes.Repeat([]byte{0xff}, int(size)), &m)
			}
			return err
		})
	}
	if err != nil {
		return nil, err
	}
	if e.Size != size {
		return nil, &SizeError{fmt.Sprintf("%q", name), e.Size, size}
	}
	return &Blob{s, name, size}, nil
}

// MaxSize is the size of the largest chip, in bytes.
const MaxSize = 256 << 10

// Name returns the blob's name.
func (b *Blob) Name() string { return b.name }

// Size returns the length in bytes.
func (b *Blob) Size() int64 { return b.size }

// ReadAt reads what is committed.
func (b *Blob) ReadAt(p []byte, off int64) (n int, err error) {
	err = b.view(func(tx *nvstore.Tx) error {
		n, err = tx.ReadAt(b.name, p, off)
		return err
	})
	return n, err
}

// Epoch tells how often the store went back in time under this handle; -1 if
// the store says nothing any more.
func (b *Blob) Epoch() int64 {
	epoch := int64(-1)
	_ = b.view(func(tx *nvstore.Tx) error { epoch = tx.Epoch(); return nil })
	return epoch
}

// view runs fn once more where a revert was noticed just then.
func (b *Blob) view(fn func(*nvstore.Tx) error) error {
	err := b.s.View(fn)
	if errors.Is(err, ErrReverted) {
		err = b.s.View(fn)
	}
	return err
}

// Commit writes p at off, as one commit of the store.
func (b *Blob) Commit(p []byte, off, epoch int64) error {
	return b.update(epoch, func(tx *nvstore.Tx) error {
		if off < 0 || off > b.size-int64(len(p)) {
			return fmt.Errorf("%w: %d bytes at %d of %q", ErrInvalid, len(p), off, b.name)
		}
		_, err := tx.WriteAt(b.name, p, off)
		return err
	})
}

func (b *Blob) update(epoch int64, fn func(*nvstore.Tx) error) error {
	return b.s.Update(func(tx *nvstore.Tx) error {
		if tx.Epoch() != epoch {
			return fmt.Errorf("%w: EEPROM %q", ErrReverted, b.name)
		}
		e, err := tx.Stat(b.name)
		if err == nil && e.Size != b.size {
			err = &SizeError{fmt.Sprintf("%q", b.name), e.Size, b.size}
		}
		if err != nil {
			return err
		}
		return fn(tx)
	})
}

// Status returns the non-volatile bits of the chip's status register; 0 if they
// were never set.
func (b *Blob) Status() (status byte, err error) {
	err = b.view(func(tx *nvstore.Tx) error {
		e, err := tx.Stat(b.name)
		if err != nil {
			return err
		}
		status, err = parseStatus(b.name, e.Attributes)
		return err
	})
	return status, err
}

func parseStatus(name string, attrs []attribute) (byte, error) {
	for _, a := range attrs {
		if a.Key == statusKey {
			v, err := strconv.ParseUint(a.Value, 16, 8)
			if err != nil || len(a.Value) != 2 {
				return 0, fmt.Errorf("%w: %s=%q of blob %q", ErrStatus, statusKey, a.Value, name)
			}
			return byte(v), nil
		}
	}
	return 0, nil
}

// SetStatus commits the non-volatile bits of the chip's status register, under
// the rules of Memory.Commit.
func (b *Blob) SetStatus(status byte, epoch int64) error {
	return b.update(epoch, func(tx *nvstore.Tx) error {
		e, err := tx.Stat(b.name)
		if err != nil {
			return err
		}
		return tx.SetMeta(b.name, withStatus(e.Meta, fmt.Sprintf("%02x", status)))
	})
}

func withStatus(m nvstore.Meta, value string) *nvstore.Meta {
	attrs := make([]attribute, 0, len(m.Attributes)+1)
	for _, a := range m.Attributes {
		if a.Key != statusKey {
			attrs = append(attrs, a)
		}
	}
	m.Attributes = append(attrs, attribute{Key: statusKey, Value: value})
	return &m
}
