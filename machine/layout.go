package machine

import (
	"crypto/rand"
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// Kinds of errors, for errors.Is. A damaged record is an image.ErrCorrupt, one
// of a version to come an image.ErrUnsupported.
var (
	// ErrNoLayout: the image has no layout record: it isn't a machine's
	// disk, or its size was changed. It is an image.ErrFormat.
	ErrNoLayout = fmt.Errorf("no layout record at the end of the image: %w", image.ErrFormat)

	// ErrInvalid: sizes that make no sense.
	ErrInvalid = errors.New("invalid layout")

	// ErrShrink: the disk would get smaller, and nobody has said that it may.
	ErrShrink = errors.New("what lies beyond the disk's new end would be lost")
)

// Limits and places (FORMAT.md, section 18).
const (
	BlockSize = 4096

	// MinState is the least size of a state window in bytes.
	MinState = 256 << 10

	// Reserved is how many bytes at the image's end the record takes.
	Reserved = 128 << 10

	slotDistance = 64 << 10
	maxRecord    = 512
	maxSize      = 1 << 62
	align        = 2 << 20 // no cluster has a part of the disk and a part of the window
	sector       = 512
)

// A Layout says what lies where in a machine's image. All sizes and offsets
// are in bytes.
type Layout struct {
	// Machine is a random ID of the machine, as a UUID. Copies of the image
	// have the same.
	Machine [16]byte

	// Sequence counts the layout's changes.
	Sequence int64

	ImageSize   int64 // of the whole: the image's virtual size
	DiskSize    int64 // of the guest's disk, a multiple of 512
	StateOffset int64 // of the state window, a multiple of 4096
	StateSize   int64 // likewise
}

// MaxDisk is the size in bytes that the guest's disk can have at most.
func (l *Layout) MaxDisk() int64 { return l.StateOffset }

// Options say how a machine's image is divided.
type Options struct {
	// Disk is the size of the guest's disk in bytes, a multiple of 512.
	Disk int64

	// MaxDisk is how large it can get; less than Disk is Disk. It is
	// rounded up to 2 MiB.
	MaxDisk int64

	// ImageSize, unless it is 0, is that of an image whose size can't be
	// chosen. MaxDisk is what is left of it then.
	ImageSize int64

	// State is the size of the state window in bytes, a multiple of 4096;
	// 0 is 64 MiB.
	State int64

	// Machine is the machine's ID; zero is random.
	Machine [16]byte
}

const defaultState = 64 << 20

// Plan lays an image out. Its ImageSize is the virtual size that the image
// must have.
func Plan(o *Options) (*Layout, error) {
	l := &Layout{Machine: o.Machine, Sequence: 1, DiskSize: o.Disk, StateSize: o.State}
	if l.StateSize == 0 {
		l.StateSize = defaultState
	}
	limit := max(o.MaxDisk, o.Disk)
	switch {
	case o.Disk < 0 || o.Disk%sector != 0:
		return nil, fmt.Errorf("%w: a disk of %d bytes; a multiple of 512 is wanted", ErrInvalid, o.Disk)
	case o.MaxDisk < 0 || limit > maxSize/2:
		return nil, fmt.Errorf("%w: a disk that grows to %d bytes; at most %d", ErrInvalid, limit, int64(maxSize/2))
	case l.StateSize < MinState || l.StateSize%BlockSize != 0 || l.StateSize > maxSize/4:
		return nil, fmt.Errorf("%w: a state window of %d bytes; a multiple of 4096 from %d on is wanted", ErrInvalid, l.StateSize, MinState)
	}
	l.StateOffset = (limit + align - 1) / align * align
	l.ImageSize = l.StateOffset + l.StateSize + Reserved
	if o.ImageSize != 0 {
		l.ImageSize = o.ImageSize
		l.StateOffset = (l.ImageSize - Reserved - l.StateSize) / align * align
		if l.StateOffset < limit {
			return nil, fmt.Errorf("%w: a disk of %d bytes and a state window of %d don't fit an image of %d",
				ErrInvalid, limit, l.StateSize, l.ImageSize)
		}
	}
	if l.Machine == ([16]byte{}) {
		_, _ = rand.Read(l.Machine[:])          // never fails
		l.Machine[6] = l.Machine[6]&0x0f | 0x40 // RFC 9562, version 4
		l.Machine[8] = l.Machine[8]&0x3f | 0x80
	}
	return l, nil
}

// check returns the first rule that the layout breaks, the field and what it
// must be.
func (l *Layout) check() (rule, field string, got any, want string) {
	end := l.ImageSize - Reserved
	switch {
	case l.DiskSize%sector != 0 || l.DiskSize > l.StateOffset:
		return "L7", "diskSize", l.DiskSize, "a multiple of 512 that ends before the state window"
	case l.StateOffset%BlockSize != 0 || l.StateOffset > end:
		return "L8", "stateOffset", l.StateOffset, "a multiple of 4096 before the record"
	case l.StateSize%BlockSize != 0 || l.StateSize < MinState || l.StateSize > end-l.StateOffset:
		return "L8", "stateSize", l.StateSize, fmt.Sprintf("a multiple of 4096 from %d on that ends before the record", MinState)
	}
	return "", "", nil, ""
}
