package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"nvstore.dev/image"
)

// defaultCache is the memory for L2 tables and refcount blocks together.
const defaultCache = 8 << 20

// OpenOptions are the options of Open. Nil means the zero value: read-write,
// and nothing but the image itself is trusted or opened.
type OpenOptions struct {
	// ReadOnly opens for reading. Nothing is ever written then.
	ReadOnly bool

	// Path is the file's name for error messages. It is never opened.
	Path string

	// CacheSize is the memory for L2 tables and refcount blocks, in bytes;
	// 0 means 8 MiB. At least two of each are kept.
	CacheSize int64

	// InvalidateBitmaps allows writing to an image with persistent dirty
	// bitmaps. This driver doesn't maintain them, so it clears the
	// bitmaps autoclear bit first, as the specification asks of such a
	// driver: QEMU then drops the bitmaps, and the next incremental
	// backup has to be a full one. Their clusters are leaks from then on.
	// Without the option, such an image opens for reading only.
	InvalidateBitmaps bool

	// Verify runs Check before an image is opened for writing, and
	// refuses one with errors (leaks are no errors). It finds what the
	// checks on each write can't, at the cost of reading all metadata.
	Verify bool
}

// An Image is an open qcow2 image: a Device whose content lies in clusters of
// another Device, the file. It owns the file and closes it.
//
// It is safe for concurrent use. Reads, and writes to clusters that are
// allocated already, run side by side.
type Image struct {
	path string
	ro   bool
	file image.Device
	geo  geometry
	size atomic.Int64
	fail atomic.Pointer[error] // the first failed write or Sync

	// mu guards what follows. The read lock is enough to read through it
	// and to write into clusters that need no change of metadata.
	mu       sync.RWMutex
	closed   bool
	hdr      *header
	sector0  [sector]byte // the file's first sector
	l1       []uint64
	l1Dirty  map[int]struct{} // sectors of the L1 table
	ordered  bool             // a dirty entry refers to what may not be durable
	reftable []uint64
	full     []bool // refcount blocks without a free cluster
	l2c, rbc *cache
	snaps    []*snapshot
	meta     metaSet
	alloc    allocator
	spare    spare
	frees    []freeRun
	shadow   *shadow
	unpacked *unpacker
}

var (
	_ image.Device        = (*Image)(nil)
	_ image.Resizer       = (*Image)(nil)
	_ image.Discarder     = (*Image)(nil)
	_ image.ZeroWriter    = (*Image)(nil)
	_ image.CacheDropper  = (*Image)(nil)
	_ image.Snapshotter   = (*Image)(nil)
	_ image.BlockStatuser = (*Image)(nil)
)

// Open opens the image in file. On error the caller keeps file; it is closed
// by Image.Close otherwise.
//
// An image with a backing file, an external data file, extended L2 entries,
// encryption or unknown incompatible features fails with image.ErrUnsupported;
// no other file is ever opened. For writing, so does an image that is marked
// dirty, or has persistent bitmaps (see OpenOptions); one that is marked
// corrupt or contradicts itself fails with image.ErrCorrupt. All of these are
// image.FormatErrors. Unknown autoclear features are switched off by the first
// opening for writing.
func Open(file image.Device, opts *OpenOptions) (*Image, error) {
	if opts == nil {
		opts = &OpenOptions{}
	}
	im := &Image{path: opts.Path, ro: opts.ReadOnly, file: file}
	if err := im.load(opts.CacheSize); err != nil {
		return nil, err
	}
	if im.ro {
		return im, nil
	}
	if err := im.hdr.writable(im.path, opts.InvalidateBitmaps); err != nil {
		return nil, err
	}
	if err := im.buildMeta(); err != nil {
		return nil, err
	}
	if opts.Verify {
		if err := im.verify(); err != nil {
			return nil, err
		}
	}
	if im.hdr.autoclear != 0 {
		im.hdr.autoclear = 0
		if err := im.writeHeader(); err != nil {
			return nil, err
		}
	}
	return im, nil
}

// load reads the header and the tables that are kept in memory.
func (im *Image) load(cacheSize int64) error {
	h, err := readHeader(im.file, im.path)
	if err != nil {
		return err
	}
	if err := h.supported(im.path); err != nil {
		return err
	}
	if err := readFile(im.file, im.sector0[:], 0); err != nil {
		return err
	}
	im.hdr, im.geo = h, newGeometry(h)
	im.size.Store(int64(h.size &^ (sector - 1)))
	if cacheSize <= 0 {
		cacheSize = defaultCache
	}
	im.l2c = newCache(cacheSize/2, im.geo.cs)
	im.rbc = newCache(cacheSize/2, im.geo.cs)
	im.l1Dirty = make(map[int]struct{})
	im.unpacked = newUnpacker(h.compression, im.geo.cs)
	n := uint64(h.reftableClusters) << h.clusterBits / 8
	f := fieldError{im.path, "qcow2 header"}
	if h.l1Off+uint64(h.l1Size)*8 > im.fileEnd() {
		return f.at(40, "l1_table_offset", h.l1Off, "a table inside the file", image.ErrCorrupt)
	}
	if h.reftableOff+n*8 > im.fileEnd() {
		return f.at(48, "refcount_table_offset", h.reftableOff, "a table inside the file", image.ErrCorrupt)
	}
	if im.l1, err = im.readEntries(h.l1Off, uint64(h.l1Size)); err != nil {
		return err
	}
	if im.reftable, err = im.readEntries(h.reftableOff, n); err != nil {
		return err
	}
	im.full = make([]bool, n)
	im.alloc = allocator{virgin: im.geo.clusters(uint64(im.file.Size()))}
	im.snaps, err = im.readSnapshots(h)
	return err
}

// readHeader reads and parses cluster 0.
func readHeader(file image.Device, path string) (*header, error) {
	b := make([]byte, sector)
	if file.Size() < headerLenV2 {
		return nil, fieldError{path, "qcow2 header"}.at(0, "", file.Size(), "at least 72 bytes", image.ErrFormat)
	}
	if err := readFile(file, b, 0); err != nil {
		return nil, err
	}
	h := &header{}
	if err := h.parseFixed(b, fieldError{path, "qcow2 header"}); err != nil {
		return nil, err
	}
	b = make([]byte, h.clusterSize())
	if err := readFile(file, b, 0); err != nil {
		return nil, err
	}
	return parseHeader(b, path)
}

// readEntries reads a table of n 64-bit entries.
func (im *Image) readEntries(off, n uint64) ([]uint64, error) {
	t := make([]uint64, n)
	buf := make([]byte, min(n*8, 64<<10))
	for i := uint64(0); i < n; {
		b := buf[:min(uint64(len(buf)), (n-i)*8)]
		if err := readFile(im.file, b, off+i*8); err != nil {
			return nil, err
		}
		for ; len(b) > 0; b = b[8:] {
			t[i] = binary.BigEndian.Uint64(b)
			i++
		}
	}
	return t, nil
}

// readFile reads p at off. Past the end of the file there are zeros: QEMU
// leaves the last cluster incomplete.
func readFile(file image.Device, p []byte, off uint64) error {
	size := uint64(file.Size())
	if off >= size {
		clear(p)
		return nil
	}
	n := min(uint64(len(p)), size-off)
	if err := image.ReadFull(file, p[:n], int64(off)); err != nil {
		return err
	}
	clear(p[n:])
	return nil
}

// loadTable reads one cluster of metadata.
func (im *Image) loadTable(off uint64) ([]byte, error) {
	b := make([]byte, im.geo.cs)
	return b, readFile(im.file, b, off)
}

// writeFile writes to the file. A failure is final.
func (im *Image) writeFile(p []byte, off uint64) error {
	if err := im.growFile(off + uint64(len(p))); err != nil {
		return im.poison(err)
	}
	if _, err := im.file.WriteAt(p, int64(off)); err != nil {
		return im.poison(err)
	}
	return nil
}

// syncFile makes the file durable. A failure is final.
func (im *Image) syncFile() error {
	if err := im.file.Sync(); err != nil {
		return im.poison(err)
	}
	return nil
}

// poison makes every later write fail: what the medium holds isn't known any
// more.
func (im *Image) poison(err error) error {
	im.fail.CompareAndSwap(nil, &err)
	return err
}

// writeHeader writes the file's first sector from the header, with one write
// that can't be torn, and makes it durable.
func (im *Image) writeHeader() error {
	var b [headerLenV3]byte
	h := *im.hdr
	h.headerLen, h.tail = min(h.headerLen, headerLenV3), nil
	h.encodeFixed(b[:h.headerLen])
	// header_length itself stays, and so does all behind it.
	keep := [4]byte(im.sector0[100:104])
	copy(im.sector0[:], b[:h.headerLen])
	copy(im.sector0[100:], keep[:])
	if err := im.writeFile(im.sector0[:], 0); err != nil {
		return err
	}
	return im.syncFile()
}

// Size returns the virtual size in bytes.
func (im *Image) Size() int64 { return im.size.Load() }

// usable fails on a closed image, and for writing on one that can't be
// written.
func (im *Image) usable(write bool) error {
	switch {
	case im.closed:
		return image.ErrClosed
	case !write:
		return nil
	case im.ro:
		return image.ErrReadOnly
	}
	if cause := im.fail.Load(); cause != nil {
		return fmt.Errorf("%w: %w", image.ErrPoisoned, *cause)
	}
	return nil
}

// Close writes what metadata is still in memory, gives unused space at the end
// of the file back, and closes the file. It Syncs only where the order of
// metadata asks for it. An image that failed earlier is left as it is.
func (im *Image) Close() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.closed {
		return image.ErrClosed
	}
	var err error
	if !im.ro && im.fail.Load() == nil {
		if err = im.flushAll(); err == nil {
			err = im.trim()
		}
	}
	im.closed = true
	return errors.Join(err, im.file.Close())
}

// DropCache forgets all metadata that was read, so that later reads come from
// the medium. If the image failed earlier, metadata that wasn't written is
// forgotten too and the header is read again: what is seen then is what the
// medium got. The image stays unusable for writing.
func (im *Image) DropCache() error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.closed {
		return image.ErrClosed
	}
	if d, ok := image.As[image.CacheDropper](im.file); ok {
		if err := d.DropCache(); err != nil {
			return err
		}
	}
	im.l2c.dropClean()
	im.rbc.dropClean()
	im.unpacked.reset()
	if im.fail.Load() == nil {
		return nil
	}
	im.frees, im.shadow, im.spare = nil, nil, spare{}
	return im.load(int64(im.l2c.max+im.rbc.max) * int64(im.geo.cs+tableOverhead))
}
