package nvstore

import (
	"errors"
	"fmt"
	"io"

	"nvstore.dev/image"
)

// Device returns the blob as a block device of the size that the blob has now.
// It is not extended by writes. Closing it closes the Blob.
func (b *Blob) Device() image.Device { return &blobDevice{b, b.Size()} }

type blobDevice struct {
	b    *Blob
	size int64
}

func (d *blobDevice) Size() int64 { return d.size }

func (d *blobDevice) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, image.ErrOutOfRange
	}
	want := int(max(0, min(int64(len(p)), d.size-off)))
	n, err := d.b.ReadAt(p[:want], off)
	switch {
	case err != nil && err != io.EOF:
		return 0, withKind(err)
	case n < want: // it was cut, as by a revert
		return n, io.ErrUnexpectedEOF
	case want < len(p):
		return n, io.EOF
	}
	return n, nil
}

func (d *blobDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := image.CheckRange(off, int64(len(p)), d.size); err != nil {
		return 0, err
	}
	n, err := d.b.WriteAt(p, off)
	return n, withKind(err)
}

func (d *blobDevice) Sync() error  { return withKind(d.b.Sync()) }
func (d *blobDevice) Close() error { return withKind(d.b.Close()) }

// withKind adds the kind that package image has for an error.
func withKind(err error) error {
	if err == nil {
		return nil
	}
	for _, k := range [][2]error{
		{ErrClosed, image.ErrClosed}, {ErrReadOnly, image.ErrReadOnly}, {ErrNoSpace, image.ErrNoSpace},
		{ErrPoisoned, image.ErrPoisoned}, {ErrCorrupt, image.ErrCorrupt},
	} {
		if errors.Is(err, k[0]) && !errors.Is(err, k[1]) {
			return fmt.Errorf("%w: %w", k[1], err)
		}
	}
	return err
}
