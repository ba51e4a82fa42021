package blobdir

import (
	"errors"
	"fmt"
	"io"
	"math"
	"sync"
	"sync/atomic"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
)

// Options say how a store is opened. The zero value opens for reading and
// writing, without a key.
type Options struct {
	ReadOnly bool

	// Key opens a sealed store; a plain one is then refused with
	// ErrPlain. Budget bounds what its derivation may cost.
	Key    *keyslot.Credential
	Budget *kdf.Budget

	// Keyless opens a sealed store without its key, for reading names and
	// checking checksums only: content gives ErrKey.
	Keyless bool

	// Previous opens the generation before the newest, read-only, for
	// rescue.
	Previous bool

	// NoGrow keeps the image at its size.
	NoGrow bool

	// Gate, if not nil, is passed before anything is written, and left
	// when all of it is: a commit, a settled record, what reading anew
	// after a revert writes. Who takes or loads a snapshot of the image
	// closes it meanwhile, so that no snapshot cuts through a commit.
	// Nothing depends on it.
	Gate func() (leave func())
}

// A Dir is an open store. It may be used by many goroutines: any number of
// View transactions beside one Update.
type Dir struct {
	dev  image.Device
	opts Options
	keys *keys // set once by the first load

	seeded *seeded // nil unless the bytes are to be the same each time

	writer  sync.Mutex // serialises updates, settling and reloading; guards the next four
	out     output     // the next transaction's, empty
	nodebuf [maxNode]byte
	scratch []byte
	prints  map[int64]fingerprint

	st    atomic.Pointer[state]
	cache nodeCache

	mu      sync.Mutex
	readers map[int64]int // generation → open View transactions
	failed  error         // what poisoned the handle
	closed  bool
}

// A state is one generation as this handle knows it. It is never changed.
type state struct {
	root    *root
	slots   [2]slotRead // as last seen
	prof    profile
	free    *freeNode // nil when read-only
	settled bool
	highest int64 // the highest generation ever seen in a slot
	epoch   int64 // how often the store was read anew, so that a reader knows a revert from damage
	status  Status
}

// Status tells what opening found.
type Status struct {
	// Recovered is set when the newest root was of a torn commit and the
	// one before it counts, or when there may have been such a root.
	Recovered string
	// FreeRebuilt is set when the free node was damaged or contradicted
	// what the directory reaches, and was made anew.
	FreeRebuilt string
	// HeaderDamaged is set when the header can't be read. Opening doesn't
	// depend on it.
	HeaderDamaged string
	// SettledDamaged is set when the settled record can't be read.
	SettledDamaged string
}

// Info are facts about an open store.
type Info struct {
	UUID       [16]byte
	Generation int64
	Sealed     bool
	SealNames  bool
	KeySlots   []keyslot.Info
	Blobs      int64
	Used       int64 // bytes in use by live structures and blobs
	Free       int64 // bytes inside the image that can be used, now or after the quarantine
	Size       int64 // bytes of the device
	MaxSize    int64 // bytes it may grow to; 0 is no limit
	Settled    bool
	Status     Status
}

// enter takes the writer's lock, and passes the gate.
func (d *Dir) enter() (leave func()) {
	d.writer.Lock()
	outside := d.gate()
	return func() {
		outside()
		d.writer.Unlock()
	}
}

func (d *Dir) gate() (leave func()) {
	if d.opts.Gate == nil || d.opts.ReadOnly {
		return func() {}
	}
	return d.opts.Gate()
}

// fail returns why the handle can't be used, or nil.
func (d *Dir) fail() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return ErrClosed
	}
	return d.failed
}

// poison makes the handle unusable after a failed write or Sync: what the
// medium holds is unknown, and asking again proves nothing.
func (d *Dir) poison(cause error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.failed == nil {
		d.failed = fmt.Errorf("%w: %w", ErrPoisoned, cause)
	}
	return d.failed
}

// View runs fn on the newest generation. What fn reads doesn't change while
// it runs. fn must not call Update on the same Dir.
func (d *Dir) View(fn func(*Tx) error) error {
	if err := d.fail(); err != nil {
		return err
	}
	st := d.pin()
	defer d.unpin(st)
	tx := &Tx{d: d, st: st, prof: &st.prof}
	tx.dir = tree{kind: directoryTree, pg: tx, root: kid{ref: st.root.dir}}
	err := fn(tx)
	tx.done = true
	if damaged(err) && d.wasReverted(st) {
		return fmt.Errorf("%w while it was read", ErrReverted)
	}
	return err
}

// wasReverted tells damage from another generation: the image was reverted,
// or written by somebody else, since st was the newest.
func (d *Dir) wasReverted(st *state) bool {
	alone := d.writer.TryLock() // the caller may be inside an update
	if alone {
		defer d.writer.Unlock()
	}
	now := d.st.Load()
	if now.epoch != st.epoch {
		return true
	}
	// st itself may have been followed by generations of this handle.
	same, err := sameSlots(d.dev, now.slots)
	if same || err != nil {
		return d.st.Load().epoch != st.epoch
	}
	if alone {
		defer d.gate()()
		_ = d.reverted("while it was read")
	}
	return true
}

// pin holds a generation's blocks back from reuse.
func (d *Dir) pin() *state {
	d.mu.Lock()
	defer d.mu.Unlock()
	st := d.st.Load()
	d.readers[st.root.gen]++
	return st
}

func (d *Dir) unpin(st *state) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.readers[st.root.gen]--; d.readers[st.root.gen] == 0 {
		delete(d.readers, st.root.gen)
	}
}

// oldestReader is the oldest generation that a View still reads.
func (d *Dir) oldestReader() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	oldest := int64(math.MaxInt64)
	for gen := range d.readers {
		oldest = min(oldest, gen)
	}
	return oldest
}

// Close writes the settled record if there is something to settle, and
// closes the device. The store is intact without it.
func (d *Dir) Close() error {
	defer d.enter()()
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return ErrClosed
	}
	failed := d.failed
	d.mu.Unlock()
	var err error
	if failed == nil && !d.opts.ReadOnly {
		if err = d.settle(); err == nil {
			err = d.trim()
		}
	}
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	return errors.Join(err, d.dev.Close())
}

// Device returns what the store lies on.
func (d *Dir) Device() image.Device { return d.dev }

// UUID returns the store's.
func (d *Dir) UUID() [16]byte { return d.st.Load().root.store }

// Info returns facts about the newest generation.
func (d *Dir) Info() (*Info, error) {
	if err := d.fail(); err != nil {
		return nil, err
	}
	st := d.pin()
	defer d.unpin(st)
	r := st.root
	in := &Info{UUID: r.store, Generation: r.gen, Sealed: r.sealed(), SealNames: r.sealNames, Blobs: r.blobs,
		Size: d.dev.Size(), MaxSize: r.maxSize, Settled: st.settled, Status: st.status}
	if r.sealed() {
		slots, err := d.readKeySlots(r)
		if err != nil {
			return nil, err
		}
		in.KeySlots = slots.List()
	}
	free, err := d.freeBytes(st)
	if err != nil {
		return nil, err
	}
	in.Free = free
	in.Used = max(in.Size-free, 0)
	return in, nil
}

// freeBytes adds up the free node, its tree and what was never used.
func (d *Dir) freeBytes(st *state) (int64, error) {
	free := st.free
	if free == nil {
		var err error
		if free, err = d.readFree(st.root, &st.prof); err != nil {
			return 0, err
		}
	}
	total := max(d.dev.Size()-free.end, 0)
	for _, e := range free.extents {
		total += e.length
	}
	if free.tree != nil {
		t := tree{kind: freeTree, pg: &reader{d, &st.prof}, root: kid{ref: *free.tree}}
		err := t.ascend(intKey(0), func(_, item []byte) (bool, error) {
			e, err := parseFreeItem(item)
			total += e.length
			return true, err
		})
		if err != nil {
			return 0, err
		}
	}
	return total, nil
}

// A reader loads nodes for those who change nothing.
type reader struct {
	d *Dir
	p *profile
}

func (r *reader) load(k *treeKind, ref reference, level int) (*node, error) {
	return r.d.load(k, ref, level, r.p)
}
func (*reader) release(int64, int64) {}

// readExtent reads what ref names, and demands its checksum.
func (d *Dir) readExtent(ref reference, what string) ([]byte, error) {
	if ref.off > d.dev.Size()-ref.length {
		return nil, corrupt(ref.off, "R21", what, "offset", ref.off, "an extent inside the image")
	}
	p := make([]byte, ref.length)
	if err := image.ReadFull(d.dev, p, ref.off); err != nil {
		if err == io.ErrUnexpectedEOF {
			return nil, corrupt(ref.off, "R21", what, "offset", ref.off, "an extent inside the image")
		}
		return nil, fmt.Errorf("%s at byte %#x: %w", what, ref.off, err)
	}
	if got := checksum(p); got != ref.crc {
		return nil, corrupt(ref.off, "R23", what, "crc32c", hex32(got), hex32(ref.crc))
	}
	return p, nil
}

func hex32(v uint32) string { return fmt.Sprintf("%#08x", v) }

// readNode reads an extent and, in a sealed store, demands its MAC. The
// checksum comes first: what fails there is damage, what fails here is an
// enemy.
func (d *Dir) readNode(ref reference, what string, p *profile) ([]byte, error) {
	raw, err := d.readExtent(ref, what)
	if err != nil {
		return nil, err
	}
	if p.keys != nil && !p.keys.verifies(ref.mac, raw) {
		return nil, &Error{Off: ref.off, Struct: what, Field: "mac", Want: "a MAC of this store's key", Rule: "R24", Kind: ErrTampered}
	}
	return raw, nil
}

// load returns a tree's node, from the cache if it is there.
func (d *Dir) load(k *treeKind, ref reference, level int, p *profile) (*node, error) {
	if n := d.cache.get(ref); n != nil && n.kind == k && (level < 0 || n.level == level) {
		return n, nil
	}
	raw, err := d.readNode(ref, k.name, p)
	if err != nil {
		return nil, err
	}
	n, err := parseNode(raw, ref, k, p, level)
	if err != nil {
		return nil, err
	}
	d.cache.put(n)
	return n, nil
}

func (d *Dir) readFree(r *root, p *profile) (*freeNode, error) {
	raw, err := d.readNode(r.free, "free node", p)
	if err != nil {
		return nil, err
	}
	f, err := parseFreeNode(raw, r.free, p)
	if err == nil && f.end > d.dev.Size() {
		return nil, corrupt(r.free.off, "R54", "free node", "end", f.end, "at most the size of the image")
	}
	return f, err
}

// readKeySlots reads a root's key slots. As long as there is no key, and only
// then, their checksum has to do.
func (d *Dir) readKeySlots(r *root) (*keyslot.Slots, error) {
	raw, err := d.readNode(*r.keySlots, "key slots", &profile{keys: d.keys})
	if err != nil {
		return nil, err
	}
	slots, err := keyslot.Parse(raw)
	if err != nil {
		return nil, &Error{Off: r.keySlots.off, Struct: "key slots", Want: err.Error(), Rule: "R60", Kind: ErrCorrupt}
	}
	return slots, nil
}

// cacheNodes bounds the cache: this many nodes of 4 KiB, twice.
const cacheNodes = 512

// A nodeCache keeps the nodes used last. When the young half is full it
// becomes the old half, and what was in that is forgotten.
type nodeCache struct {
	mu         sync.Mutex
	young, old map[int64]*node
}

func (c *nodeCache) get(ref reference) *node {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := c.young[ref.off]
	if n == nil {
		if n = c.old[ref.off]; n == nil {
			return nil
		}
	}
	if n.ref.gen != ref.gen || n.ref.crc != ref.crc || n.ref.length != ref.length || string(n.ref.mac) != string(ref.mac) {
		return nil
	}
	c.add(n)
	return n
}

func (c *nodeCache) put(n *node) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(n)
}

func (c *nodeCache) add(n *node) {
	if c.young == nil || len(c.young) >= cacheNodes {
		c.old, c.young = c.young, make(map[int64]*node)
	}
	c.young[n.ref.off] = n
}

func (c *nodeCache) clear() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.young, c.old = nil, nil
}
