package blobdir

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"nvstore.dev/image"
)

// maxWrite bounds the buffer that joins neighbouring extents to one write.
const maxWrite = 1 << 20

// An output collects what a transaction writes, and remembers a checksum of
// each write, so that the commit can tell that all of it is still there.
type output struct {
	buf     []byte
	off     int64 // where buf goes
	written []reference
}

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
	d.writer.Lock()
	defer d.writer.Unlock()
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
	defer func() { d.outbuf = tx.out.buf[:0] }()
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
		now: time.Now().UTC().Truncate(time.Second)}
	tx.out.buf = d.outbuf
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
	if len(o.buf) > 0 && (off != o.off+int64(len(o.buf)) || len(o.buf)+padded > maxWrite) {
		if err := tx.flush(); err != nil {
			return nil, err
		}
	}
	if len(o.buf) == 0 {
		o.off = off
	}
	start := len(o.buf)
	o.buf = slices.Grow(o.buf, padded+extra)[:start+padded]
	clear(o.buf[start+n:])
	return o.buf[start : start+n : cap(o.buf)][:n+extra], nil
}

var zeroBlock [BlockSize]byte

// flush writes what is queued.
func (tx *Tx) flush() error {
	o := &tx.out
	if len(o.buf) == 0 {
		return nil
	}
	if reserved(o.off, int64(len(o.buf))) {
		panic("internal error: a write to a reserved block")
	}
	if err := tx.start(); err != nil {
		return err
	}
	if _, err := tx.d.dev.WriteAt(o.buf, o.off); err != nil {
		return tx.d.poison(err)
	}
	o.written = append(o.written, reference{off: o.off, length: int64(len(o.buf)), crc: checksum(o.buf)})
	o.buf = o.buf[:0]
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
//  3. one Sync;
//  4. the roots, and all that was written, are as they must be, else nothing
//     is acknowledged.
func (tx *Tx) commit() error {
	changed, err := tx.fold()
	if err != nil || !changed {
		return err
	}
	r, err := tx.newRoot()
	if err != nil {
		return err
	}
	if err := tx.flush(); err != nil {
		return err
	}
	if err := tx.start(); err != nil {
		return err
	}
	slot := make([]byte, maxRoot)
	copy(slot, r.encode(tx.prof.keys.sum()))
	d := tx.d
	if _, err := d.dev.WriteAt(slot, rootSlots[r.slot]); err != nil {
		return d.poison(err)
	}
	if err := d.dev.Sync(); err != nil {
		return d.poison(err)
	}
	expect := tx.st.slots
	expect[r.slot] = slotRead{raw: slot, root: r, read: true}
	if err := tx.confirm(expect); err != nil {
		return err
	}
	st := &state{root: r, slots: expect, prof: tx.wprof, highest: r.gen, epoch: tx.st.epoch, status: tx.st.status}
	free := tx.space.node
	st.free = &free
	d.st.Store(st)
	return nil
}

// confirm reads back the roots and everything else that was written. A revert
// to a snapshot with these very roots, between two of our writes, shows only
// in the extents. Reading comes from the page cache, and costs little.
func (tx *Tx) confirm(expect [2]slotRead) error {
	same, err := sameSlots(tx.d.dev, expect)
	if err != nil {
		return tx.d.poison(err)
	}
	if !same {
		return tx.d.reverted("during the commit, which doesn't count")
	}
	for _, w := range tx.out.written {
		crc, err := tx.d.sumOf(w.off, w.length)
		if err != nil {
			return tx.d.poison(err)
		}
		if crc != w.crc {
			return tx.d.reverted("during the commit, which doesn't count")
		}
	}
	return nil
}

// sumOf reads a run of bytes and returns its checksum.
func (d *Dir) sumOf(off, n int64) (crc uint32, err error) {
	if d.scratch == nil {
		d.scratch = make([]byte, 64<<10)
	}
	for n > 0 {
		p := d.scratch[:min(n, int64(len(d.scratch)))]
		if err := image.ReadFull(d.dev, p, off); err != nil {
			return 0, err
		}
		crc = crc32.Update(crc, castagnoli, p)
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return crc, nil
}

// newRoot writes the directory and the free space, and returns the root.
func (tx *Tx) newRoot() (*root, error) {
	old := tx.st.root
	r := &root{store: old.store, slot: 1 - old.slot, gen: tx.gen, parent: old.digest(), parentGen: old.gen, time: tx.now,
		sealNames: old.sealNames, maxSize: old.maxSize, blobs: tx.blobs, keySlots: old.keySlots, snapshots: old.snapshots, extra: old.extra}
	if tx.maxSize != nil {
		r.maxSize = *tx.maxSize
	}
	if err := random(r.commit[:]); err != nil {
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
	d.writer.Lock()
	defer d.writer.Unlock()
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
