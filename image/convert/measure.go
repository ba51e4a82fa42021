package convert

import (
	"context"
	"fmt"
	"math/bits"

	"nvstore.dev/image"
)

// A Target is the image that Measure measures for. The zero value is a raw one.
type Target struct {
	QCOW2        bool
	ClusterSize  int64 // bytes; 0 is 64 KiB
	RefcountBits int   // 0 is 16
	ExtendedL2   bool

	// Header is what an encryption header takes, in bytes.
	Header int64

	// Bitmaps are the persistent dirty bitmaps to copy as well. Nil means
	// that source or target can't have any.
	Bitmaps []BitmapShape

	// Full: nothing is left out, because the image has a backing file or
	// its data is preallocated.
	Full bool
}

// A BitmapShape is what the size of a bitmap depends on.
type BitmapShape struct {
	Name        string
	Granularity int64 // bytes that a bit stands for
}

// A Size is how large the file of a new image gets, in bytes.
type Size struct {
	Required       int64 `json:"required"`        // to hold the data there is
	FullyAllocated int64 `json:"fully-allocated"` // once all of it is written

	// Bitmaps is what they take besides, if there can be any.
	Bitmaps *int64 `json:"bitmaps,omitempty"`
}

// Measure returns how large the file gets that holds a disk of size bytes,
// with src's data, which may be nil. Like qemu-img measure it counts metadata
// for the whole disk, and for the data whole clusters.
func Measure(ctx context.Context, size int64, src image.Device, t *Target) (Size, error) {
	if t == nil {
		t = &Target{}
	}
	if size < 0 || size > 1<<62 {
		return Size{}, fmt.Errorf("measure: a disk of %d bytes: %w", size, image.ErrOutOfRange)
	}
	if !t.QCOW2 {
		return Size{Required: size + t.Header, FullyAllocated: size + t.Header}, nil
	}
	m := *t
	if m.ClusterSize == 0 {
		m.ClusterSize = 64 << 10
	}
	if m.RefcountBits == 0 {
		m.RefcountBits = 16
	}
	if bits.OnesCount64(uint64(m.ClusterSize)) != 1 || m.ClusterSize < 512 || m.ClusterSize > 2<<20 ||
		bits.OnesCount(uint(m.RefcountBits)) != 1 || m.RefcountBits > 64 || m.RefcountBits < 1 {
		return Size{}, fmt.Errorf("measure: clusters of %d bytes, refcounts of %d bits: %w", m.ClusterSize, m.RefcountBits, image.ErrOutOfRange)
	}
	extra, err := m.bitmaps(size)
	if err != nil {
		return Size{}, err
	}
	size = roundUp(size, m.ClusterSize)
	full := m.metadata(size) + size + roundUp(m.Header, m.ClusterSize)
	if m.Full {
		return Size{full, full, extra}, nil
	}
	data, err := dataClusters(ctx, src, m.ClusterSize)
	if err != nil {
		return Size{}, err
	}
	return Size{full - size + data, full, extra}, nil
}

// bitmaps is what the bitmaps of a disk of size bytes take, with all of their bits
// stored: the data, a table for each, and the directory.
func (t *Target) bitmaps(size int64) (*int64, error) {
	if t.Bitmaps == nil {
		return nil, nil
	}
	const head = 24 // of a directory entry
	cs := t.ClusterSize
	var sum, directory int64
	for _, b := range t.Bitmaps {
		if b.Granularity < 512 || b.Granularity > 2<<30 {
			return nil, fmt.Errorf("measure: a bitmap's granularity of %d bytes: %w", b.Granularity, image.ErrOutOfRange)
		}
		bits := roundUp(size, b.Granularity) / b.Granularity
		clusters := roundUp(roundUp(bits, 8)/8, cs) / cs
		sum += clusters*cs + roundUp(clusters*8, cs)
		directory += roundUp(head+int64(len(b.Name)), 8)
	}
	sum += roundUp(directory, cs)
	return &sum, nil
}

// metadata is what a qcow2 of size bytes needs besides its data: header, L1
// and L2 tables, refcount table and blocks.
func (t *Target) metadata(size int64) int64 {
	entry := int64(8)
	if t.ExtendedL2 {
		entry = 16
	}
	cs := t.ClusterSize
	l2 := roundUp(size/cs*entry, cs)
	l1 := roundUp(l2/cs*8, cs)
	fixed := cs + l2 + l1
	// Refcount blocks count themselves and the table.
	perBlock := cs * 8 / int64(t.RefcountBits)
	clusters := (fixed + size) / cs
	blocks, tables := int64(0), int64(0)
	for {
		b := (clusters + blocks + tables + perBlock - 1) / perBlock
		n := (b*8 + cs - 1) / cs
		if b == blocks && n == tables {
			return fixed + (blocks+tables)*cs
		}
		blocks, tables = b, n
	}
}

// dataClusters is what src's data takes in whole clusters.
func dataClusters(ctx context.Context, src image.Device, cluster int64) (int64, error) {
	if src == nil {
		return 0, nil
	}
	blocks := newProber(src)
	var sum int64
	for off := int64(0); off < src.Size(); {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		e, err := blocks.status(off, src.Size()-off)
		if err != nil {
			return 0, err
		}
		end := e.Start + e.Length
		if !e.Zero {
			end = roundUp(end, cluster)
			sum += end - off/cluster*cluster
		}
		off = end
	}
	return sum, nil
}
