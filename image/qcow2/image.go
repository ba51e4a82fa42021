package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"nvstore.dev/image"
)

// defaultCache is the memory for L2 tables and refcount blocks together, and
// memoryGoal what an open image is to take at most, unless a caller asks for
// more.
const (
	defaultCache = 8 << 20
	memoryGoal   = 60 << 20
)

// room is how much of want bytes there is besides the tables that are always in
// memory: the L1 table, the refcount table, and for writing the places of
// what these refer to. It is 3 MiB at least.
func (im *Image) room(want int64) int64 {
	n := int64(im.hdr.l1Size) + int64(im.hdr.reftableClusters)<<im.geo.bits/8
	used := n * 8
	if !im.ro {
		used += n * 4
	}
	return min(want, max(memoryGoal-used, 3<<20))
}

// OpenOptions are the options of Open. Nil means the zero value: read-write,
// and nothing but the image itself is trusted or opened.
type OpenOptions struct {
	// ReadOnly opens for reading. Nothing is ever written then.
	ReadOnly bool

	// Path is the file's name for error messages. It is never opened.
	Path string

	// CacheSize is the memory for L2 tables and refcount blocks, in bytes;
	// 0 means 8 MiB, or 3 where the L1 table is that large. At least two of
	// each are kept.
	CacheSize int64

	// InvalidateBitmaps allows writing to an image with persistent dirty
	// bitmaps that can't be kept true: they are damaged, or of a kind that
	// isn't known. The bitmaps autoclear bit is cleared first, as the
	// specification asks: QEMU then drops the bitmaps, and the next
	// incremental backup has to be a full one. Their clusters are leaks
	// from then on. Without the option, such an image opens for reading
	// only.
	InvalidateBitmaps bool

	// Backing is the device that the backing file holds, whatever the
	// header calls it: its format is the caller's business. It is read
	// where this image has nothing, never written, and closed with the
	// image. It may be of any size. Without it, an image that names a
	// backing file isn't opened, unless NoBacking says so: reading what
	// only the backing file has, or writing to a part of such a cluster, is
	// an image.ErrUnsupported then.
	Backing   image.Device
	NoBacking bool

	// DataFile is the external data file of an image that has one. It is
	// closed with the image.
	DataFile image.Device

	// Unlock returns the cipher of an encrypted image, which isn't opened
	// without. Method is 1 for the legacy AES, which can be read only, or 2
	// for LUKS; with LUKS, header is a window on the encryption header,
	// otherwise it is nil. It is no longer used after Close.
	Unlock func(header image.Device, method int) (image.SectorCipher, error)

	// Snapshot shows the disk as it was at this snapshot, an ID or a name.
	// ReadOnly must be set.
	Snapshot string

	// Verify runs Check before an image is opened for writing, and
	// refuses one with errors (leaks are no errors). It finds what the
	// checks on each write can't, at the cost of reading all metadata.
	Verify bool
}

// An Image is an open qcow2 image: a Device whose content lies in clusters of
// another Device, the file. It owns the file and closes it.
//
// It is safe for concurrent use. Requests for data run side by side; only for
// as long as tables in memory are looked at or changed do they wait for each
// other. Writes that allocate also wait for a Sync that has new mappings to
// write.
type Image struct {
	path string
	ro   bool
	opts OpenOptions
	file image.Device
	geo  geometry
	size atomic.Int64
	fail atomic.Pointer[error] // the first failed write or Sync

	noData   bool               // only metadata is looked at
	backing  image.Device       // what the backing file holds, or nil
	data     image.Device       // where data is: file, or the external data file
	cipher   image.SectorCipher // of data, or nil
	merging  mergeLocks
	unpacked *unpacker

	// mu is held for reading by every request but those that only read the
	// disk, and for writing by what changes the structure of the image or
	// looks at all of it. Requests that read hold reads, which is held for
	// writing for as long as what they see changes. The order is mu, reads.
	// The two guard these.
	mu      sync.RWMutex
	reads   sync.RWMutex
	closed  bool
	hdr     *header
	sector0 [sector]byte // the file's first sector
	snaps   []*snapshot
	shadow  *shadow

	// tab guards what requests for data look at and change, which is the
	// rest. Nobody holds it while reading or writing data. To change
	// anything takes change as well, which a flush holds alone: it only
	// reads the tables, and so do others meanwhile. Who holds mu for writing
	// needs neither, but must leave alone what those who read look at, which
	// is seen and l2c, unless it holds reads, too. The order is mu, reads,
	// change, tab.
	change   sync.Mutex
	tab      sync.RWMutex
	seen     activeL1
	l1       []uint64
	l1Dirty  map[int]struct{} // sectors of the L1 table
	ordered  bool             // a dirty entry refers to what may not be durable
	reftable []uint64
	full     []bool // refcount blocks without a free cluster
	l2c, rbc *cache
	meta     metaSet
	alloc    allocator
	spare    spare
	marked   bool   // the dirty bit was set by this handle
	packAt   uint64 // where the next compressed data may go, or 0
	pins     pins
	inflight []*busy
	newL2s   []*table  // to which no L1 entry was written yet
	frees    []freeRun // referred to by what is durable
	leaving  []freeRun // not any more, but there may be requests under way
	dying    []freeRun // not if all pins of the last epoch are gone

	// Persistent bitmaps: the list changes with mu held for writing, the
	// bits with bmu.
	bmu        sync.Mutex
	bitmaps    []*bitmap
	bitmapsErr error // why they can't be read
	recording  bool  // those that record writes are marked as in use

	repairing    bool // the snapshot table is read leniently
	snapsChanged bool // by that
}

// An activeL1 is an active L1 table, and where it is. While a structure is made
// that is to take its place, requests that read still see the old one.
type activeL1 struct {
	table []uint64
	off   uint64
}

// lockAll waits until no request is under way.
func (im *Image) lockAll() {
	im.mu.Lock()
	im.reads.Lock()
}

func (im *Image) unlockAll() {
	im.reads.Unlock()
	im.mu.Unlock()
}

// lockTables gets the right to change the tables.
func (im *Image) lockTables() {
	im.change.Lock()
	im.tab.Lock()
}

func (im *Image) unlockTables() {
	im.tab.Unlock()
	im.change.Unlock()
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
// An image fails with image.ErrUnsupported if it has unknown incompatible
// features, or a backing file, a data file or encryption for which the options
// have nothing; no other file is ever opened. For writing, so does an image that
// has bitmaps of an unknown kind (see OpenOptions); one that is marked corrupt or
// contradicts itself fails with image.ErrCorrupt. All of these are
// image.FormatErrors. Unknown autoclear features are switched off by the first
// opening for writing. An image whose dirty bit is set is repaired first (see
// Repair).
func Open(file image.Device, opts *OpenOptions) (*Image, error) {
	if opts == nil {
		opts = &OpenOptions{}
	}
	im := &Image{path: opts.Path, ro: opts.ReadOnly, file: file, opts: *opts, backing: opts.Backing, data: file}
	if err := im.load(opts.CacheSize); err != nil {
		return nil, err
	}
	if im.ro {
		return im, nil
	}
	if im.hdr.incompat&(incompatDirty|incompatCorrupt) == incompatDirty {
		if err := im.repairDirty(opts.CacheSize); err != nil {
			return nil, err
		}
	}
	if err := im.hdr.writable(im.path); err != nil {
		return nil, err
	}
	keep := im.hdr.maintained()
	if im.bitmapsErr != nil {
		if !opts.InvalidateBitmaps {
			return nil, im.bitmapsErr
		}
		im.bitmapsErr = nil
		keep &^= autoclearBitmaps
	}
	if err := im.buildMeta(); err != nil {
		return nil, err
	}
	if opts.Verify {
		if err := im.verify(); err != nil {
			return nil, err
		}
	}
	if keep &= im.hdr.autoclear; keep != im.hdr.autoclear {
		im.hdr.autoclear = keep
		if err := im.writeHeader(); err != nil {
			return nil, err
		}
	}
	return im, nil
}

// load reads the header and the tables that are kept in memory.
func (im *Image) load(cacheSize int64) error {
	h, err := readHeader(im.file, im.path, im.repairing)
	if err != nil {
		return err
	}
	if err := h.supported(im.path); err != nil {
		return err
	}
	if !im.noData {
		if err := h.accessible(im.path, &im.opts); err != nil {
			return err
		}
	}
	if im.opts.DataFile != nil {
		im.data = im.opts.DataFile
	}
	if err := readFile(im.file, im.sector0[:], 0); err != nil {
		return err
	}
	im.hdr, im.geo = h, newGeometry(h)
	im.size.Store(int64(h.size &^ (sector - 1)))
	if cacheSize <= 0 {
		cacheSize = im.room(defaultCache)
	}
	im.l2c = newCache(cacheSize/2, im.geo.cs)
	im.rbc = newCache(cacheSize/2, im.geo.cs)
	im.l1Dirty = make(map[int]struct{})
	im.unpacked = newUnpacker(h.compression, im.geo.cs)
	f := fieldError{im.path, "qcow2 header"}
	if h.l1Off+uint64(h.l1Size)*8 > im.fileEnd() {
		return f.at(40, "l1_table_offset", h.l1Off, "a table inside the file", image.ErrCorrupt)
	}
	if h.reftableOff+uint64(h.reftableClusters)<<h.clusterBits > im.fileEnd() {
		bad := f.at(48, "refcount_table_offset", h.reftableOff, "a table inside the file", image.ErrCorrupt)
		if !h.lenient {
			return bad
		}
		h.loseReftable(bad)
	}
	n := uint64(h.reftableClusters) << h.clusterBits / 8
	if im.l1, err = im.readEntries(h.l1Off, uint64(h.l1Size)); err != nil {
		return err
	}
	if im.reftable, err = im.readEntries(h.reftableOff, n); err != nil {
		return err
	}
	im.full = make([]bool, n)
	im.alloc = allocator{virgin: im.geo.clusters(uint64(im.file.Size()))}
	if im.snaps, err = im.readSnapshots(h); err != nil {
		return err
	}
	if im.bitmapsErr = im.loadBitmaps(); im.bitmapsErr != nil && !errors.As(im.bitmapsErr, new(*image.FormatError)) {
		return im.bitmapsErr
	}
	if h.crypt != 0 && im.cipher == nil && !im.noData {
		if im.cipher, err = im.unlock(im.opts.Unlock); err != nil {
			return err
		}
	}
	im.show()
	if im.opts.Snapshot != "" {
		return im.showSnapshot()
	}
	return nil
}

// show lets requests that read see the active tables.
func (im *Image) show() { im.seen = activeL1{im.l1, im.hdr.l1Off} }

// readHeader reads and parses cluster 0.
func readHeader(file image.Device, path string, lenient bool) (*header, error) {
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
	h = &header{lenient: lenient}
	return h.parse(b, path)
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
	if im.marked {
		im.hdr.incompat |= incompatDirty
	}
	if im.hdr.moved {
		return im.rewriteHeader()
	}
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
	im.lockAll()
	defer im.unlockAll()
	if im.closed {
		return image.ErrClosed
	}
	var err error
	if !im.ro && im.fail.Load() == nil {
		if im.recording {
			err = im.restructure(func() error { return im.storeBitmaps(im.bitmaps) })
		} else {
			err = im.flushAll()
		}
		if err == nil {
			err = im.markClean()
		}
		if err == nil {
			err = im.trim()
		}
	}
	im.closed = true
	err = errors.Join(err, im.file.Close())
	if im.geo.external {
		err = errors.Join(err, im.data.Close())
	}
	if im.backing != nil {
		err = errors.Join(err, im.backing.Close())
	}
	return err
}

// DropCache forgets all metadata that was read, so that later reads come from
// the medium. If the image failed earlier, metadata that wasn't written is
// forgotten too and the header is read again: what is seen then is what the
// medium got. The image stays unusable for writing.
func (im *Image) DropCache() error {
	im.lockAll()
	defer im.unlockAll()
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
	im.frees, im.leaving, im.dying, im.newL2s, im.shadow, im.spare = nil, nil, nil, nil, nil, spare{}
	return im.load(int64(im.l2c.max+im.rbc.max) * int64(im.geo.cs+tableOverhead))
}
