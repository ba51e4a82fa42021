package imagetest

import (
	"fmt"
	"io"
	"slices"
	"sync"

	"nvstore.dev/image"
)

const maxSize = 1 << 60

// CrashOptions say how a CrashDevice behaves. Nil means the zero value: it
// grows without limit, and what was discarded reads as zeros.
type CrashOptions struct {
	// MaxSize is the most bytes that Resize grows to; above it, Resize
	// fails with image.ErrNoSpace. 0 means no limit.
	MaxSize int64

	// Fixed makes Resize fail with image.ErrNoSpace for any other size.
	Fixed bool

	// Discard says what the whole sectors in a discarded range read as.
	Discard DiscardMode
}

// A DiscardMode is what discarded sectors read as: a Device may give anything.
type DiscardMode int

const (
	DiscardZeros   DiscardMode = iota
	DiscardKeeps               // their old bytes
	DiscardGarbage             // bytes that were never written
)

// A CrashDevice is a sparse in-memory Device in two layers: a page cache, where
// writes go and which reads see, and a medium, which has for certain only what
// a successful Sync brought there. It logs every change, and CrashStates
// enumerates what a power cut at any point of the log could leave.
//
// The log keeps every byte written, so its memory grows until Settle.
type CrashDevice struct {
	m *medium

	mu     sync.Mutex // with m.mu held first
	closed bool
}

// medium is what outlives the process that had it open.
type medium struct {
	mu   sync.Mutex
	opts CrashOptions
	bare bool // no log, no crash states

	cache  content
	synced []checkpoint // the last is the present one
	log    []Op
	trace  Trace
}

// A checkpoint is what is durable for certain from log position at on.
type checkpoint struct {
	at   int
	base content // frozen
	// Resizes that were in flight when a Sync failed. The inode's size is
	// dirty still.
	pending []int64
}

// NewCrash returns a CrashDevice of size zero bytes, all of them durable.
func NewCrash(size int64, o *CrashOptions) *CrashDevice {
	if o == nil {
		o = &CrashOptions{}
	}
	return openContent(newContent(size), *o)
}

// NewMemory returns a Device in memory: a CrashDevice without the log, for when
// nothing is going to crash.
func NewMemory(size int64) image.Device {
	d := NewCrash(size, nil)
	d.m.bare = true
	return d
}

func openContent(c content, o CrashOptions) *CrashDevice {
	return &CrashDevice{m: &medium{
		opts:   o,
		synced: []checkpoint{{base: c.frozen()}},
		cache:  c,
	}}
}

// lock returns with the medium locked, or an error.
func (d *CrashDevice) lock() error {
	d.m.mu.Lock()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		d.m.mu.Unlock()
		return image.ErrClosed
	}
	return nil
}

// Size returns the length that the page cache sees.
func (d *CrashDevice) Size() int64 {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return d.m.cache.size
}

// ReadAt reads what the page cache has.
func (d *CrashDevice) ReadAt(p []byte, off int64) (int, error) {
	if err := d.lock(); err != nil {
		return 0, err
	}
	defer d.m.mu.Unlock()
	if off < 0 {
		return 0, image.ErrOutOfRange
	}
	d.m.trace.count(OpRead, int64(len(p)))
	if len(p) == 0 {
		return 0, nil
	}
	n := max(0, min(int64(len(p)), d.m.cache.size-off))
	d.m.cache.readAt(p[:n], off)
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return len(p), nil
}

// WriteAt writes to the page cache.
func (d *CrashDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := d.lockRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	defer d.m.mu.Unlock()
	m := d.m
	m.trace.count(OpWrite, int64(len(p)))
	if len(p) == 0 {
		return 0, nil
	}
	m.cache.writeAt(p, off)
	if m.bare {
		return len(p), nil
	}
	// One copy serves both the log and the whole sectors.
	first, last := off/sectorSize, (off+int64(len(p))-1)/sectorSize
	whole := make([]byte, (last-first+1)*sectorSize)
	m.cache.readAt(whole, first*sectorSize)
	op := Op{Kind: OpWrite, Off: off, Len: int64(len(p)), secs: make([]sectorWrite, last-first+1)}
	for i := range op.secs {
		at := i * sectorSize
		op.secs[i] = sectorWrite{first + int64(i), whole[at : at+sectorSize : at+sectorSize]}
	}
	at := off - first*sectorSize
	op.Data = whole[at : at+int64(len(p)) : at+int64(len(p))]
	m.log = append(m.log, op)
	return len(p), nil
}

// lockRange is lock with a check of the range.
func (d *CrashDevice) lockRange(off, n int64) error {
	if err := d.lock(); err != nil {
		return err
	}
	if err := image.CheckRange(off, n, d.m.cache.size); err != nil {
		d.m.mu.Unlock()
		return err
	}
	return nil
}

// Sync makes what is in the page cache durable, except for what a failed Sync
// lost.
func (d *CrashDevice) Sync() error {
	if err := d.lock(); err != nil {
		return err
	}
	defer d.m.mu.Unlock()
	m := d.m
	m.trace.count(OpSync, 0)
	if !m.bare {
		base := m.kept()
		m.log = append(m.log, Op{Kind: OpSync})
		m.synced = append(m.synced, checkpoint{at: len(m.log), base: base})
	}
	return nil
}

// kept returns, frozen, what the medium would have if all that is dirty got
// there.
func (m *medium) kept() content {
	all := m.plan(len(m.log)).choose(keepAll)
	if all.Hash == m.cache.hash() {
		return m.cache.frozen() // nothing was lost; share its pages
	}
	return all.content()
}

// Resize changes the size; new bytes are zeros.
func (d *CrashDevice) Resize(size int64) error {
	if err := d.lock(); err != nil {
		return err
	}
	defer d.m.mu.Unlock()
	m := d.m
	m.trace.count(OpResize, 0)
	switch {
	case size < 0:
		return image.ErrOutOfRange
	case size == m.cache.size:
		return nil
	case m.opts.Fixed || size > maxSize || m.opts.MaxSize > 0 && size > m.opts.MaxSize:
		return fmt.Errorf("resize from %d to %d bytes: %w", m.cache.size, size, image.ErrNoSpace)
	}
	m.cache.resize(size)
	m.record(Op{Kind: OpResize, Len: size})
	return nil
}

// WriteZeroes makes a range read as zeros, at a cost that depends on what is
// stored there.
func (d *CrashDevice) WriteZeroes(off, n int64) error {
	if err := d.lockRange(off, n); err != nil {
		return err
	}
	defer d.m.mu.Unlock()
	m := d.m
	m.trace.count(OpWriteZeroes, n)
	touched := m.used(off, n)
	m.cache.zero(off, n)
	m.record(Op{Kind: OpWriteZeroes, Off: off, Len: n, secs: m.seen(touched)})
	return nil
}

// Discard drops the whole sectors in the range.
func (d *CrashDevice) Discard(off, n int64) error {
	if err := d.lockRange(off, n); err != nil {
		return err
	}
	defer d.m.mu.Unlock()
	m := d.m
	m.trace.count(OpDiscard, n)
	first, end := (off+sectorSize-1)/sectorSize, (off+n)/sectorSize
	if off+n == m.cache.size {
		end = (off + n + sectorSize - 1) / sectorSize
	}
	var touched []int64
	if first < end && m.opts.Discard != DiscardKeeps {
		touched = m.used(first*sectorSize, (end-first)*sectorSize)
		for _, s := range touched {
			m.cache.setSector(s, m.discarded(s))
		}
	}
	m.record(Op{Kind: OpDiscard, Off: off, Len: n, secs: m.seen(touched)})
	return nil
}

func (m *medium) discarded(sector int64) []byte {
	if m.opts.Discard == DiscardZeros {
		return nil
	}
	b := make([]byte, sectorSize)
	for i := range min(sectorSize, m.cache.size-sector*sectorSize) {
		b[i] = byte(sector) ^ 0xA5 ^ byte(i)
	}
	return b
}

// used returns the sectors in a range that aren't zeros in the cache or on the
// medium. After a failed Sync these differ.
func (m *medium) used(off, n int64) []int64 {
	if m.bare {
		return m.cache.used(off, n)
	}
	s := append(m.cache.used(off, n), m.synced[len(m.synced)-1].base.used(off, n)...)
	slices.Sort(s)
	return slices.Compact(s)
}

// seen copies sectors from the cache.
func (m *medium) seen(sectors []int64) []sectorWrite {
	w := make([]sectorWrite, len(sectors))
	for i, s := range sectors {
		w[i] = sectorWrite{s, slices.Clone(m.cache.sector(s))}
	}
	return w
}

func (m *medium) record(op Op) {
	if !m.bare {
		m.log = append(m.log, op)
	}
}

// DropCache forgets what is clean in the page cache, so that reads see what the
// medium has.
func (d *CrashDevice) DropCache() error {
	if err := d.lock(); err != nil {
		return err
	}
	defer d.m.mu.Unlock()
	d.m.trace.count(OpDropCache, 0)
	if !d.m.bare {
		d.m.cache = d.m.kept().writable()
	}
	return nil
}

// BlockStatus tells which pages are stored.
func (d *CrashDevice) BlockStatus(off, n int64) (image.Extent, error) {
	if err := d.lockRange(off, n); err != nil {
		return image.Extent{}, err
	}
	defer d.m.mu.Unlock()
	if n == 0 {
		return image.Extent{}, image.ErrOutOfRange
	}
	tree := &d.m.cache.tree
	there := tree.get(off/pageSize) != nil
	end := off + n
	if !there {
		if next := tree.stored(off/pageSize, pages(end), 1); len(next) > 0 {
			end = min(end, next[0]*pageSize)
		}
	} else {
		i := off / pageSize
		for i*pageSize < end && tree.get(i) != nil {
			i++
		}
		end = min(end, i*pageSize)
	}
	e := image.Extent{Start: off, Length: end - off, Allocated: there, Zero: !there, Offset: -1}
	if there {
		e.Offset = off
	}
	return e, nil
}

// Close closes this handle; the page cache stays.
func (d *CrashDevice) Close() error {
	if err := d.lock(); err != nil {
		return err
	}
	defer d.m.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	return nil
}
