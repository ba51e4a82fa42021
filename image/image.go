// Package image is the block layer's contract: what a Device is, which
// optional capabilities it may have, and which errors it reports. It imports
// no format; each format is a driver package below it, and only package
// image/chain imports them all.
//
// # Durability
//
// WriteAt may leave the bytes in a volatile cache. After Sync returns nil,
// everything written before Sync was called survives a power cut. Between two
// Syncs, writes may reach the medium in any order, in part, and torn at 512
// bytes. After a failed Sync nothing is known about the writes since the last
// good one, and a second Sync proves nothing: callers must give the handle up.
//
// # Concurrency
//
// Every Device is safe for concurrent use. Requests that overlap in range and
// time have no order among themselves.
package image

import "io"

// A Device is a linear array of bytes that may be read and written at any
// offset.
//
// ReadAt follows io.ReaderAt: it returns io.EOF when the range reaches past
// Size. WriteAt refuses a range that reaches past Size with ErrOutOfRange and
// writes nothing of it; use a Resizer to grow first. Both refuse negative
// offsets with ErrOutOfRange.
type Device interface {
	io.ReaderAt
	io.WriterAt

	// Size returns the length in bytes.
	Size() int64

	// Sync makes all completed writes durable.
	Sync() error

	// Close releases the device without an implied Sync. Every later
	// call fails with ErrClosed.
	Close() error
}

// A Wrapper is a Device that passes addresses through unchanged, so that the
// capabilities of what it wraps are its own. A Device that moves addresses (a
// window) must not be one: it offers capabilities itself.
type Wrapper interface{ Unwrap() Device }

// As finds the first capability T in d or in what d wraps.
func As[T any](d Device) (T, bool) {
	for d != nil {
		if t, ok := d.(T); ok {
			return t, true
		}
		w, ok := d.(Wrapper)
		if !ok {
			break
		}
		d = w.Unwrap()
	}
	var zero T
	return zero, false
}

// A Resizer changes the size. New bytes read as zeros. A Device that can't
// returns ErrUnsupported, or ErrNoSpace where space is what is missing.
type Resizer interface{ Resize(size int64) error }

// A Discarder is told that a range is no longer needed. What the range reads
// as afterwards is undefined, and space is given back where the medium can.
type Discarder interface{ Discard(off, n int64) error }

// A ZeroWriter makes a range read as zeros, without moving n bytes where the
// medium can.
type ZeroWriter interface{ WriteZeroes(off, n int64) error }

// An Allocator has the medium allocate space for a range, which reads as before.
// A Device that can't, or whose medium can't, returns ErrUnsupported.
type Allocator interface{ Allocate(off, n int64) error }

// A CacheDropper makes later reads come from the medium instead of any cache
// between it and the caller. Dirty data isn't dropped. After a failed Sync,
// this is how to learn what the medium really got.
type CacheDropper interface{ DropCache() error }

// A Snapshotter keeps internal snapshots of its whole content.
type Snapshotter interface{ Snapshots() SnapshotSet }

// A SnapshotSet manages a Device's internal snapshots. Tags match ID first,
// then name, as QEMU's do. Every change is durable when the call returns, and
// a crash in the middle leaves either the old or the new set.
type SnapshotSet interface {
	List() ([]Snapshot, error)
	Create(tag string) error
	Revert(tag string) error
	Delete(tag string) error
}

// A Snapshot describes one internal snapshot.
type Snapshot struct {
	ID          string `json:"id"`
	Name        string `json:"name"`
	Seconds     int64  `json:"date_sec"`      // UTC, since the epoch
	Nanoseconds int64  `json:"date_nsec"`     // 0 to 999999999
	VMStateSize int64  `json:"vm_state_size"` // bytes
	VMClock     int64  `json:"vm_clock_nsec"` // nanoseconds of guest time
	DiskSize    int64  `json:"disk_size"`     // virtual size in bytes when it was taken

	// ICount is the guest's instruction count, if it was recorded.
	ICount *int64 `json:"icount,omitempty"`
}

// A BlockStatuser tells how a range is stored.
type BlockStatuser interface {
	// BlockStatus describes the longest run from off, at most n bytes
	// and at least one, whose bytes share a status.
	BlockStatus(off, n int64) (Extent, error)
}

// An Extent is a run of bytes with one status.
type Extent struct {
	Start, Length int64
	Allocated     bool // stored in this image, not below it
	Zero          bool // reads as zeros
	Compressed    bool
	Depth         int   // 0 is the top image of a backing chain
	Offset        int64 // where the bytes, or the space kept for them, lie in the file below; -1 if nowhere
}

// ReadFull reads exactly len(p) bytes at off, and turns a short read into
// io.ErrUnexpectedEOF.
func ReadFull(d io.ReaderAt, p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return err
	}
	if n < len(p) {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// CheckRange returns ErrOutOfRange unless [off, off+n) lies in [0, size).
func CheckRange(off, n, size int64) error {
	if off < 0 || n < 0 || off > size || n > size-off {
		return ErrOutOfRange
	}
	return nil
}
