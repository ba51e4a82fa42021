package blobdir

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"

	"nvstore.dev/image"
)

// maxWrite bounds what is queued to be written together.
const maxWrite = 1 << 20

// An output collects what a transaction writes, and remembers a checksum of
// each write, so that the commit can tell that all of it is still there.
type output struct {
	buf     []byte
	runs    []run // where buf goes
	batch   []image.Request
	written []reference
}

// A run is neighbouring extents: one write.
type run struct{ off, length int64 }

// TxOptions change how one update runs.
type TxOptions struct {
	// Rerun runs the function again, on the reverted content, when the
	// image turns out to have been changed underneath. Otherwise the
	// caller gets ErrReverted, because what it read may be gone.
	Rerun bool
}

// maxRerun bounds how often a transaction is run again.
const maxRerun = 8

// Update runs fn and commits what it did, all of it or nothing. When Update
// returns nil, the change is durable. When fn returns an error, nothing is
// changed, and Update returns that error. A transaction that changes nothing
// writes nothing.
func (d *Dir) Update(fn func(*Tx) error, opts *TxOptions) error {
	defer d.enter()()
	for run := 1; ; run++ {
		err := d.update(fn)
		if !errors.Is(err, ErrReverted) || opts == nil || !opts.Rerun || run == maxRerun || d.fail() != nil {
			return err
		}
	}
}

func (d *Dir) update(fn func(*Tx) error) error {
	if err := d.fail(); err != nil {
		return err
	}
	if d.opts.ReadOnly {
		return ErrReadOnly
	}
	tx := d.begin()
	defer func() { d.out = output{buf: tx.out.buf[:0], runs: tx.out.runs[:0], batch: tx.out.batch[:0]} }()
	err := fn(tx)
	if err == nil {
		err = tx.failed
	}
	if err == nil {
		err = tx.commit()
	}
	tx.done = true
	if err != nil && damaged(err) && !errors.Is(err, ErrReverted) {
		if rerr := tx.unchanged(); rerr != nil {
			return rerr
		}
	}
	return err
}

func (d *Dir) begin() *Tx {
	st := d.st.Load()
	tx := &Tx{d: d, st: st, gen: st.highest + 1, oldest: d.oldestReader(), overlay: make(map[string]*blob), blobs: st.root.blobs,
		now: d.now()}
	tx.out = d.out
	tx.wprof = st.prof
	tx.wprof.gen = tx.gen
	tx.prof = &tx.wprof
	tx.dir = tree{kind: directoryTree, pg: tx, root: kid{ref: st.root.dir}}
	s := &space{tx: tx, node: freeNode{end: st.free.end}, next: -1}
	s.node.extents = append(s.node.extents, st.free.extents...)
	s.tree = &tree{kind: freeTree, pg: tx}
	if st.free.tree != nil {
		s.tree.root.ref = *st.free.tree
	}
	s.join()
	tx.space = s
	return tx
}

// start runs before the first write of a transaction: the roots must be what
// this handle last saw.
func (tx *Tx) start() error {
	if tx.started {
		return nil
	}
	if err := tx.unchanged(); err != nil {
		return err
	}
	tx.started = true
	return nil
}

// unchanged returns an ErrReverted, and reads the store anew, if the roots
// aren't what this handle last saw.
func (tx *Tx) unchanged() error {
	same, err := sameSlots(tx.d.dev, tx.st.slots)
	if same || err != nil {
		return err
	}
	return tx.d.reverted("before the commit")
}

// reverted reloads after a change underneath. If that fails the handle can't
// go on.
func (d *Dir) reverted(when string) error {
	d.cache.clear()
	if err := d.reload(); err != nil {
		d.mu.Lock()
		d.failed = fmt.Errorf("%w %s; reading it anew: %w", ErrReverted, when, err)
		d.mu.Unlock()
		return d.failed
	}
	return fmt.Errorf("%w %s", ErrReverted, when)
}

// write queues an extent, padded to whole blocks.
func (tx *Tx) write(off int64, p []byte) error {
	room, err := tx.room(off, len(p), 0)
	copy(room, p)
	return err
}

// room queues an extent of n bytes for the caller to fill, padded to whole
// blocks. The slice has extra bytes more, which are lost afterwards.
func (tx *Tx) room(off int64, n, extra int) ([]byte, error) {
	o := &tx.out
	padded := int(roundUp(int64(n)))
	if len(o.buf) > 0 && len(o.buf)+padded > maxWrite {
		if err := tx.flush(); err != nil {
			return nil, err
		}
	}
	if last := len(o.runs) - 1; last >= 0 && o.runs[last].off+o.runs[last].length == off {
		o.runs[last].length += int64(padded)
	} else {
		o.runs = append(o.runs, run{off, int64(padded)})
	}
	start := len(o.buf)
	o.buf = slices.Grow(o.buf, padded+extra)[:start+padded]
	clear(o.buf[start+n:])
	return o.buf[start : start+n : cap(o.buf)][:n+extra], nil
}

var zeroBlock [BlockSize]byte

// flush writes what is queued, and then what else is to be written, which isn't
// an extent.
func (tx *Tx) flush(last ...image.Request) error {
	o := &tx.out
	if len(o.runs)+len(last) == 0 {
		return nil
	}
	if err := tx.start(); err != nil {
		return err
	}
	batch, p := o.batch[:0], o.buf
	for _, r := range o.runs {
		if reserved(r.off, r.length) {
			panic("internal error: a write to a reserved block")
		}
		batch = append(batch, image.Request{P: p[:r.length], Off: r.off})
		p = p[r.length:]
	}
	batch = append(batch, last...)
	if err := image.BatcherOf(tx.d.dev).WriteBatch(batch); err != nil {
		return tx.d.poison(err)
	}
	for i, r := range o.runs {
		o.written = append(o.written, reference{off: r.off, length: r.length, crc: checksum(batch[i].P)})
	}
	clear(batch)
	o.buf, o.runs, o.batch = o.buf[:0], o.runs[:0], batch
	return nil
}

// writeTree gives a tree's changed nodes their places, children first, and
// queues them.
func (tx *Tx) writeTree(t *tree) (reference, error) {
	left := t.countDirty()
	return tx.writeNode(t, &t.root, func() (int64, error) {
		left--
		return tx.space.alloc(BlockSize, left*BlockSize)
	})
}

func (tx *Tx) writeNode(t *tree, c *kid, place func() (int64, error)) (reference, error) {
	n := c.dirty
	if n == nil {
		return c.ref, nil
	}
	for i := range n.kids {
		if _, err := tx.writeNode(t, &n.kids[i], place); err != nil {
			return reference{}, err
		}
	}
	off, err := place()
	if err != nil {
		return reference{}, err
	}
	raw := n.encode(tx.d.nodebuf[:0], t.kind, tx.prof)
	n.ref = tx.referTo(off, raw)
	tx.d.cache.put(n)
	*c = kid{ref: n.ref}
	return n.ref, tx.write(off, raw)
}

// referTo makes the reference of a node.
func (tx *Tx) referTo(off int64, raw []byte) reference {
	if len(raw) > maxNode {
		panic(fmt.Sprintf("internal error: a node of %d bytes", len(raw)))
	}
	ref := reference{off: off, length: int64(len(raw)), crc: checksum(raw), gen: tx.gen}
	if sum := tx.prof.keys.sum(); sum != nil {
		ref.mac = sum(labelNode, raw)
	}
	return ref
}

// commit makes the transaction the newest generation (ARCHITECTURE.md, "The
// commit"):
//
//  1. the roots are what this handle last saw, else nothing is written;
//  2. content, nodes, and last the root are written, the root into the slot
//     that isn't live;
//  3. one Sync, and meanwhile
//  4. the roots, and all that was written, are read: they are as they must be,
//     else nothing is acknowledged.
func (tx *Tx) commit() error {
	changed, err := tx.fold()
	if err != nil || !changed {
		return err
	}
	r, err := tx.newRoot()
	if err != nil {
		return err
	}
	slot := make([]byte, maxRoot)
	copy(slot, r.encode(tx.prof.keys.sum()))
	if err := tx.flush(image.Request{P: slot, Off: rootSlots[r.slot]}); err != nil {
		return err
	}
	expect := tx.st.slots
	expect[r.slot] = slotRead{raw: slot, root: r, read: true}
	if err := tx.confirm(expect); err != nil {
		return err
	}
	st := &state{root: r, slots: expect, prof: tx.wprof, highest: r.gen, epoch: tx.st.epoch, status: tx.st.status}
	free := tx.space.node
	st.free = &free
	tx.d.st.Store(st)
	return nil
}

// readBack is how many bytes of what was written are read at once, and maxReads
// in how many pieces.
const (
	readBack = 256 << 10
	maxReads = 32
)

// confirm makes what was written durable, and reads back the roots and
// everything else of it. A revert to a snapshot with these very roots, between
// two of our writes, shows only in the extents. Reading comes from the page
// cache, and costs little.
//
// The first reads needn't wait for the Sync. They tell whether a revert came
// between two writes, and these are over. One that comes after the reads undoes
// the commit as a whole, whether the caller has been told of it yet or not.
func (tx *Tx) confirm(expect [2]slotRead) error {
	d, todo := tx.d, tx.out.written
	var at int64 // of todo[0], what was read
	var crc uint32
	reads, roots := d.addReads(slotReads(), todo, at), 2
	batcher := image.BatcherOf(d.dev)
	if err := batcher.SyncBatch(reads); err != nil {
		return d.poison(err)
	}
	for {
		if roots > 0 {
			same, err := holdSlots(reads, expect)
			if err != nil {
				return d.poison(err)
			}
			if !same {
				return d.reverted("during the commit, which doesn't count")
			}
		}
		for _, r := range reads[roots:] {
			if r.Err != nil {
				return d.poison(r.Err)
			}
			crc = crc32.Update(crc, castagnoli, r.P)
			if at += int64(len(r.P)); at < todo[0].length {
				continue
			}
			if crc != todo[0].crc {
				return d.reverted("during the commit, which doesn't count")
			}
			todo, at, crc = todo[1:], 0, 0
		}
		if reads, roots = d.addReads(reads[:0], todo, at), 0; len(reads) == 0 {
			return nil
		}
		_ = batcher.ReadBatch(reads) // the reads have the errors
	}
}

// addReads adds reads of what todo names, less the first at bytes of it, as far
// as there is room.
func (d *Dir) addReads(reads []image.Request, todo []reference, at int64) []image.Request {
	room := -at
	for i := 0; i < len(todo) && room < readBack; i++ {
		room += todo[i].length
	}
	room = min(room, readBack)
	if int64(len(d.scratch)) < room {
		d.scratch = make([]byte, max(room, 64<<10))
	}
	for used := int64(0); used < room && len(reads) < maxReads; {
		n := min(todo[0].length-at, room-used)
		reads = append(reads, image.Request{P: d.scratch[used : used+n], Off: todo[0].off + at})
		used += n
		if at += n; at == todo[0].length {
			todo, at = todo[1:], 0
		}
	}
	return reads
}

// newRoot writes the directory and the free space, and returns the root.
func (tx *Tx) newRoot() (*root, error) {
	old := tx.st.root
	r := &root{store: old.store, slot: 1 - old.slot, gen: tx.gen, parent: old.digest(), parentGen: old.gen, time: tx.now,
		sealNames: old.sealNames, maxSize: old.maxSize, blobs: tx.blobs, keySlots: old.keySlots, snapshots: old.snapshots, extra: old.extra}
	if tx.maxSize != nil {
		r.maxSize = *tx.maxSize
	}
	if err := tx.d.random(r.commit[:]); err != nil {
		return nil, err
	}
	if tx.keySlots != nil {
		ref, err := tx.writeKeySlots()
		if err != nil {
			return nil, err
		}
		r.keySlots = &ref
	}
	var err error
	if r.dir, err = tx.writeTree(&tx.dir); err != nil {
		return nil, err
	}
	r.free, err = tx.writeFree(old.free)
	return r, err
}

func (tx *Tx) writeKeySlots() (reference, error) {
	raw := tx.keySlots
	if old := tx.st.root.keySlots; old != nil {
		tx.space.release(old.off, old.blocks())
	}
	off, err := tx.space.alloc(roundUp(int64(len(raw))), 0)
	if err != nil {
		return reference{}, err
	}
	ref := reference{off: off, length: int64(len(raw)), crc: checksum(raw), gen: tx.gen, mac: tx.prof.keys.sum()(labelNode, raw)}
	return ref, tx.write(off, raw)
}

// writeFree writes what is free after everything else of the transaction has
// its place. Changing the tree frees its old nodes and finding places for the
// new ones takes from what is free, so the places are found first; a node is
// given up once at the most, which ends the loop. The free node, which has
// its block by then, comes last.
func (tx *Tx) writeFree(old reference) (reference, error) {
	s := tx.space
	if old.length > 0 {
		s.release(old.off, old.blocks())
	}
	own, err := s.alloc(BlockSize, 0)
	if err != nil {
		return reference{}, err
	}
	var places []int64
	for limit := freeHighWater; ; limit = freeFull {
		if err := s.spill(limit); err != nil {
			return reference{}, err
		}
		if int64(len(places)) >= s.tree.countDirty() {
			break
		}
		off, err := s.alloc(BlockSize, 0)
		if err != nil {
			return reference{}, err
		}
		places = append(places, off)
	}
	if s.tree.changed() {
		if _, err = tx.writeNode(s.tree, &s.tree.root, func() (int64, error) {
			off := places[0]
			places = places[1:]
			return off, nil
		}); err != nil {
			return reference{}, err
		}
	}
	for _, off := range places {
		s.freed = append(s.freed, freeExtent{off: off, length: BlockSize})
	}
	s.absorb()
	s.node.tree = nil
	if !s.tree.empty() {
		ref := s.tree.root.ref
		s.node.tree = &ref
	}
	raw := s.node.encode(tx.d.nodebuf[:0])
	ref := tx.referTo(own, raw)
	return ref, tx.write(own, raw)
}

// settle writes the record that says the newest root is durable, so that the
// next open needs no look at its extents. It obeys the same rules as a
// commit.
func (d *Dir) settle() error {
	st := d.st.Load()
	if st.settled {
		return nil
	}
	tx := &Tx{d: d, st: st}
	if err := tx.unchanged(); err != nil {
		return err
	}
	p := make([]byte, maxRoot)
	copy(p, settles(st.root).encode(d.keys.sum()))
	if _, err := d.dev.WriteAt(p, settledOffset); err != nil {
		return d.poison(err)
	}
	if err := d.dev.Sync(); err != nil {
		return d.poison(err)
	}
	if err := tx.unchanged(); err != nil {
		return err
	}
	got := make([]byte, maxRoot)
	if err := image.ReadFull(d.dev, got, settledOffset); err != nil || !bytes.Equal(got, p) {
		return d.reverted("while it was settled")
	}
	done := *st
	done.settled = true
	d.st.Store(&done)
	return nil
}

// Settle marks the newest generation as durable, and gives unneeded space
// back. Callers that keep a store open call it when nothing has happened for
// a while; Close does it too.
func (d *Dir) Settle() error {
	defer d.enter()()
	if err := d.fail(); err != nil {
		return err
	}
	if d.opts.ReadOnly {
		return nil
	}
	if err := d.settle(); err != nil {
		return err
	}
	return d.trim()
}
