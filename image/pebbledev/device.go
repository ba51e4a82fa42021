package pebbledev

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/cockroachdb/pebble/v2"

	"nvstore.dev/image"
)

const (
	// BlockSize is the length of a block in bytes.
	BlockSize = 4096

	// MaxSize is the largest size of a device: 1 PiB.
	MaxSize = 1 << 50

	// MaxPending is how many bytes a device collects before it hands them
	// to Pebble.
	MaxPending = 512 << 10

	maxPendingBlocks = MaxPending / BlockSize

	// fewBlocks is up to where single look-ups beat an iterator.
	fewBlocks = 4
)

// A Device is the content of one machine. It is an image.Device with the
// capabilities Resizer, Discarder, ZeroWriter and BlockStatuser.
//
// Resize is durable after the next Sync, like a write.
type Device struct {
	h       *home
	machine UUID

	// commit is held while blocks go to Pebble, so that they go there in
	// the order in which they were written. It is taken before mu.
	commit sync.Mutex

	mu       sync.RWMutex
	closed   bool
	size     int64
	newSize  bool  // size isn't in Pebble yet
	unsynced bool  // Pebble may hold changes that aren't durable
	pending  layer // written since the last hand-over
	flushing layer // being handed over; not changed any more
}

// A layer is the latest content of some blocks; nil means zeros.
type layer map[int64]*block

type block [BlockSize]byte

var (
	_ image.Device        = (*Device)(nil)
	_ image.Resizer       = (*Device)(nil)
	_ image.Discarder     = (*Device)(nil)
	_ image.ZeroWriter    = (*Device)(nil)
	_ image.BlockStatuser = (*Device)(nil)
)

func newDevice(h *home, machine UUID, size int64) *Device {
	// Whoever had the folder open last may have died before its Sync, so
	// what is read now counts as not durable.
	return &Device{h: h, machine: machine, size: size, unsynced: true, pending: layer{}}
}

// blocks returns how many blocks n bytes touch.
func blocks(n int64) int64 { return (n + BlockSize - 1) / BlockSize }

// Size returns the length in bytes.
func (d *Device) Size() int64 {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return d.size
}

// check refuses what a closed, failed or read-only device can't do. mu is held.
func (d *Device) check(change bool) error {
	if d.closed {
		return image.ErrClosed
	}
	if change && d.h.readOnly {
		return image.ErrReadOnly
	}
	return d.h.poisoned()
}

// ReadAt implements io.ReaderAt.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if err := d.check(false); err != nil {
		return 0, err
	}
	if off < 0 {
		return 0, image.ErrOutOfRange
	}
	n := max(0, min(int64(len(p)), d.size-off))
	if n > 0 {
		if err := d.read(p[:n], off); err != nil {
			return 0, err
		}
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// read fills p, which isn't empty. mu is held.
func (d *Device) read(p []byte, off int64) error {
	clear(p)
	first, end := off/BlockSize, blocks(off+int64(len(p)))
	var missing []int64
	for b := first; b < end && len(missing) <= fewBlocks; b++ {
		if _, ok := d.cached(b); !ok {
			missing = append(missing, b)
		}
	}
	if len(missing) > fewBlocks {
		if err := d.readRun(p, off, first, end); err != nil {
			return err
		}
	} else {
		for _, b := range missing {
			if err := d.readStored(b, func(val []byte) { overlap(p, off, b, val) }); err != nil {
				return err
			}
		}
	}
	for _, l := range []layer{d.flushing, d.pending} {
		for b := first; b < end && len(l) > 0; b++ {
			switch data, ok := l[b]; {
			case !ok:
			case data == nil:
				overlap(p, off, b, zeroBlock[:])
			default:
				overlap(p, off, b, data[:])
			}
		}
	}
	return nil
}

var zeroBlock block

// overlap copies what block b, with content data, has in common with p at off.
func overlap(p []byte, off, b int64, data []byte) {
	at := b*BlockSize - off
	if at < 0 {
		data, at = data[-at:], 0
	}
	copy(p[at:], data)
}

// cached finds a block that isn't in Pebble yet, or isn't known to be. mu is
// held.
func (d *Device) cached(b int64) (data *block, ok bool) {
	if data, ok = d.pending[b]; !ok {
		data, ok = d.flushing[b]
	}
	return data, ok
}

// readStored passes a block in Pebble to f; an absent one isn't passed.
func (d *Device) readStored(b int64, f func(val []byte)) error {
	err := d.h.get(blockKey(d.machine, b), func(val []byte) error {
		if err := d.checkBlock(b, val); err != nil {
			return err
		}
		f(val)
		return nil
	})
	if errors.Is(err, image.ErrNotFound) {
		return nil
	}
	return err
}

func (d *Device) checkBlock(b int64, val []byte) error {
	if len(val) != BlockSize {
		return d.h.corrupt("block", "length", b*BlockSize, len(val), fmt.Sprint(BlockSize))
	}
	return nil
}

// readRun copies the stored blocks [first, end) into p.
func (d *Device) readRun(p []byte, off, first, end int64) error {
	return d.stored(first, end, func(it *pebble.Iterator) error {
		for ok := it.First(); ok; ok = it.Next() {
			b, err := d.blockAt(it)
			if err != nil {
				return err
			}
			val, err := it.ValueAndErr()
			if err != nil {
				return mapError(d.h.dir, err)
			}
			if err := d.checkBlock(b, val); err != nil {
				return err
			}
			overlap(p, off, b, val)
		}
		return nil
	})
}

// stored runs f over Pebble's keys for the blocks [first, end).
func (d *Device) stored(first, end int64, f func(it *pebble.Iterator) error) error {
	return d.h.iterate(blockKey(d.machine, first), blockKey(d.machine, end), f)
}

func (d *Device) blockAt(it *pebble.Iterator) (int64, error) {
	b, ok := blockOf(it.Key())
	if !ok {
		return 0, d.h.corruptKey(it.Key())
	}
	return b, nil
}

// WriteAt implements io.WriterAt.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	return d.change(off, int64(len(p)), func(done, n int64) error {
		return d.put(p[done:done+n], off+done)
	})
}

// change checks the range and runs op over it in pieces, so that what is
// pending stays bounded. op is called with mu held.
func (d *Device) change(off, n int64, op func(done, n int64) error) (int, error) {
	var done int64
	for {
		piece := min(n-done, MaxPending/4)
		full, err := d.changePiece(off, n, func() error { return op(done, piece) })
		if err == nil && full {
			err = d.handOver(pebble.NoSync)
		}
		if err != nil {
			return int(done), err
		}
		done += piece
		if done == n {
			return int(done), nil
		}
	}
}

func (d *Device) changePiece(off, n int64, op func() error) (full bool, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.check(true); err != nil {
		return false, err
	}
	if err := image.CheckRange(off, n, d.size); err != nil {
		return false, err
	}
	err = op()
	return len(d.pending) >= maxPendingBlocks, err
}

// put makes p pending at off. mu is held.
func (d *Device) put(p []byte, off int64) error {
	for len(p) > 0 {
		b, at := off/BlockSize, off%BlockSize
		n := min(int64(len(p)), BlockSize-at)
		data, err := d.edit(b, n == BlockSize)
		if err != nil {
			return err
		}
		copy(data[at:], p[:n])
		p, off = p[n:], off+n
	}
	return nil
}

// edit returns the pending copy of a block, made from its present content
// unless it is going to be overwritten as a whole. mu is held.
func (d *Device) edit(b int64, whole bool) (*block, error) {
	if data := d.pending[b]; data != nil {
		return data, nil
	}
	data := new(block)
	if !whole {
		if err := d.read(data[:], b*BlockSize); err != nil {
			return nil, err
		}
	}
	d.pending[b] = data
	return data, nil
}

// Sync makes all completed writes durable: one commit and one sync of Pebble's
// log.
func (d *Device) Sync() error {
	d.mu.RLock()
	err := d.check(false)
	readOnly := d.h.readOnly
	d.mu.RUnlock()
	if err != nil || readOnly {
		return err
	}
	return d.handOver(pebble.Sync)
}

// handOver commits what is pending. Readers and writers go on meanwhile.
func (d *Device) handOver(opt *pebble.WriteOptions) error {
	d.commit.Lock()
	defer d.commit.Unlock()
	return d.handOverLocked(opt)
}

func (d *Device) handOverLocked(opt *pebble.WriteOptions) error {
	b, err := d.takePending(opt)
	if b == nil || err != nil {
		return err
	}
	err = errors.Join(d.h.apply(b, opt), b.Close())

	d.mu.Lock()
	defer d.mu.Unlock()
	d.flushing = nil
	if opt.Sync && err == nil {
		d.unsynced = false
	}
	return err
}

// takePending moves what is pending into a batch, or returns nil if there is
// nothing to do.
func (d *Device) takePending(opt *pebble.WriteOptions) (*pebble.Batch, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.check(true); err != nil {
		return nil, err
	}
	if len(d.pending) == 0 && !d.newSize && (!opt.Sync || !d.unsynced) {
		return nil, nil
	}
	b := d.h.db.NewBatch()
	d.flushing, d.pending = d.pending, layer{}
	d.fill(b, d.flushing)
	d.newSize, d.unsynced = false, true
	return b, nil
}

// fill puts a layer and a new size into a batch. A batch that is empty then
// gets a record that changes nothing, so that syncing it syncs the log. mu is
// held.
func (d *Device) fill(b *pebble.Batch, l layer) {
	// A batch in memory can't fail: the errors are of Pebble's common
	// interface of batch and database.
	for n, data := range l {
		if data == nil {
			_ = b.Delete(blockKey(d.machine, n), nil)
		} else {
			_ = b.Set(blockKey(d.machine, n), data[:], nil)
		}
	}
	if d.newSize {
		_ = b.Set(sizeKey(d.machine), binary.BigEndian.AppendUint64(nil, uint64(d.size)), nil)
	}
	if b.Empty() {
		_ = b.LogData(nil, nil)
	}
}

// Close releases the device. What was written since the last Sync is handed to
// Pebble, but may be lost in a power cut.
func (d *Device) Close() error {
	d.commit.Lock()
	defer d.commit.Unlock()
	var err error
	if !d.h.readOnly && d.h.fs.failure() == nil {
		err = d.handOverLocked(pebble.NoSync)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return image.ErrClosed
	}
	d.closed, d.pending = true, nil
	d.h.unclaim(d.machine)
	return errors.Join(err, d.h.release())
}
