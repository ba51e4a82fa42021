package blobdir

import (
	"bytes"
	"crypto/subtle"
	"errors"
	"fmt"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
)

// crossCheckBlobs is how many blobs a store may have for its free space to be
// compared with what the directory reaches whenever it is opened for writing.
// Larger ones are compared by Check, and after a torn commit.
const crossCheckBlobs = 256

// Open opens the store on dev, which belongs to the Dir from then on if there
// is no error.
func Open(dev image.Device, opts *Options) (*Dir, error) {
	d := &Dir{dev: dev, readers: make(map[int64]int)}
	if opts != nil {
		d.opts = *opts
	}
	if d.opts.Previous || d.opts.Keyless {
		d.opts.ReadOnly = true
	}
	if err := d.reload(); err != nil {
		return nil, err
	}
	return d, nil
}

// Reload reads the store anew, as when the image was reverted underneath.
func (d *Dir) Reload() error {
	defer d.enter()()
	return d.reload()
}

// Refresh reads the store anew if its roots aren't what this handle last saw,
// and tells whether they were. A commit notices by itself that the image was
// reverted; who calls Refresh, as when a machine resumes, lets readers know at
// once. If what the roots lead to can't be read (ErrStraddled, ErrCorrupt), the
// handle fails until a later Refresh finds what can, as after reverting once
// more. After a failed write it fails for good, with ErrPoisoned.
func (d *Dir) Refresh() (changed bool, err error) {
	defer d.enter()()
	switch err := d.fail(); {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrPoisoned):
		return false, err
	case err == nil:
		same, err := sameSlots(d.dev, d.st.Load().slots)
		if same || err != nil {
			return false, err
		}
	}
	d.cache.clear()
	err = d.reload()
	d.mu.Lock()
	defer d.mu.Unlock()
	if err == nil {
		d.failed = nil
		return true, nil
	}
	if d.failed == nil || !errors.Is(d.failed, ErrPoisoned) {
		d.failed = fmt.Errorf("%w; reading it anew: %w", ErrReverted, err)
	}
	return true, d.failed
}

// reload finds the generation that counts. A writer makes an unsettled one
// durable first, and looks past the page cache, which may show what the
// medium never got.
func (d *Dir) reload() error {
	st, err := d.recover()
	if err != nil {
		return err
	}
	if !d.opts.ReadOnly && !st.settled {
		if st, err = d.makeDurable(); err != nil {
			return err
		}
	}
	if !d.opts.ReadOnly {
		if st.root.snapshots != nil {
			return &Error{Off: rootSlots[st.root.slot], Struct: "root", Field: "snapshots",
				Want: "none when writing: snapshots of the store's own are reserved", Rule: "R17", Kind: ErrUnsupported}
		}
		if err := d.loadFree(st); err != nil {
			return err
		}
	}
	if old := d.st.Load(); old != nil {
		st.epoch = old.epoch + 1
	}
	d.st.Store(st)
	return nil
}

// makeDurable runs before a writer builds on a root that isn't settled.
func (d *Dir) makeDurable() (*state, error) {
	if err := d.dev.Sync(); err != nil {
		return nil, d.poison(err)
	}
	rewrite := true
	if c, ok := image.As[image.CacheDropper](d.dev); ok {
		err := c.DropCache()
		if err != nil && !errors.Is(err, image.ErrUnsupported) {
			return nil, err
		}
		rewrite = err != nil
	}
	d.cache.clear()
	st, err := d.recover()
	if err != nil || !rewrite || st.settled {
		return st, err
	}
	return st, d.rewrite(st)
}

// rewrite writes the newest generation's blocks once more, for devices whose
// cache can't be passed by.
func (d *Dir) rewrite(st *state) error {
	w := &walker{d: d, prof: &st.prof, only: st.root.gen, visit: func(r region) error {
		if r.Kind == RegionFree || r.gen != st.root.gen {
			return nil
		}
		return d.writeAgain(r.Offset, min(roundUp(r.Length), d.dev.Size()-r.Offset))
	}}
	if err := w.root(st.root); err != nil {
		return err
	}
	if _, err := d.dev.WriteAt(st.slots[st.root.slot].raw, rootSlots[st.root.slot]); err != nil {
		return d.poison(err)
	}
	if err := d.dev.Sync(); err != nil {
		return d.poison(err)
	}
	return nil
}

// writeAgain writes what is there.
func (d *Dir) writeAgain(off, n int64) error {
	buf := make([]byte, min(n, maxChunkSize))
	for end := off + n; off < end; {
		p := buf[:min(int64(len(buf)), end-off)]
		if err := image.ReadFull(d.dev, p, off); err != nil {
			return err
		}
		if _, err := d.dev.WriteAt(p, off); err != nil {
			return d.poison(err)
		}
		off += int64(len(p))
	}
	return nil
}

// recover reads both roots and decides which counts (FORMAT.md, section 12).
// It writes nothing.
func (d *Dir) recover() (*state, error) {
	slots, err := readSlots(d.dev)
	if err != nil {
		return nil, err
	}
	newest, other, err := d.order(slots)
	if err != nil {
		return nil, err
	}
	if err := d.unlock(newest, other); err != nil {
		return nil, err
	}
	for _, r := range []*root{newest, other} {
		if err := d.authenticate(r); err != nil {
			return nil, err
		}
	}
	if other != nil && (newest.gen == other.gen || !bytes.Equal(newest.parent, other.digest())) {
		return nil, &Error{Off: rootSlots[newest.slot], Struct: "root", Field: "parent",
			Got:  fmt.Sprintf("generations %d and %d", newest.gen, other.gen),
			Want: "the other slot's root as parent or child; revert the image once more", Rule: "R14", Kind: ErrStraddled}
	}
	st := &state{slots: slots, highest: newest.gen}
	rec, err := d.settledRecord(st)
	if err != nil {
		return nil, err
	}
	if rec != nil && other == nil && rec.slot != newest.slot && rec.gen > newest.gen && rec.store == newest.store {
		st.highest = rec.gen
		if !d.opts.Previous {
			return nil, corrupt(rootSlots[rec.slot], "R71", "root", "", nil,
				fmt.Sprintf("the root of generation %d, which was durable", rec.gen))
		}
		return d.choose(st, newest), nil
	}
	if d.opts.Previous {
		if other == nil {
			return nil, corrupt(rootSlots[1-newest.slot], "R13", "root", "", nil, "a readable root of the generation before")
		}
		return d.choose(st, other), nil
	}
	d.choose(st, newest)
	if err := d.authenticateSlots(newest); err != nil {
		return nil, err
	}
	if other == nil {
		slot := 1 - newest.slot
		st.status.Recovered = fmt.Sprintf("the other root can't be read (%v): generation %d counts, and one after it may have been torn by a crash, or lost", slots[slot].err, newest.gen)
	}
	if st.settled = rec.names(newest); st.settled {
		return st, nil
	}
	return d.verified(st, newest, other)
}

// verified checks the extents that the newest commit wrote. Damage there
// means that the commit was torn, and its parent counts. The parent needs no
// check: its child was written only after it was durable.
func (d *Dir) verified(st *state, newest, other *root) (*state, error) {
	w := &walker{d: d, prof: &st.prof, only: newest.gen, content: true, visit: func(region) error { return nil }}
	err := w.root(newest)
	if err == nil || !torn(err) || other == nil {
		return st, err
	}
	d.choose(st, other)
	st.settled = true
	st.status.Recovered = fmt.Sprintf("generation %d was torn by a crash (%v); generation %d counts", newest.gen, err, other.gen)
	return st, nil
}

// torn tells whether bytes are missing, as after a crash. What has its checksum
// and is wrong all the same was written so.
func torn(err error) bool {
	for _, rule := range []string{"R21", "R23", "R54"} {
		if damagedRule(err, rule) {
			return true
		}
	}
	return false
}

// order tells the newer root from the older. other is nil if only one can be
// read.
func (d *Dir) order(slots [2]slotRead) (newest, other *root, err error) {
	a, b := slots[0].root, slots[1].root
	for _, s := range slots {
		if unsupported(s.err) {
			return nil, nil, s.err
		}
	}
	switch {
	case a == nil && b == nil:
		if _, ok := probe(d.dev); !ok && blank(slots[0].raw) && blank(slots[1].raw) {
			return nil, nil, &Error{Off: -1, Struct: "store", Want: "a header or a root", Rule: "R13", Kind: ErrFormat}
		}
		if d.dev.Size() < firstEnd {
			return nil, nil, corrupt(rootSlots[0], "R12", "root", "", nil, fmt.Sprintf("an image of at least %d bytes", int64(firstEnd)))
		}
		return nil, nil, &Error{Off: rootSlots[0], Struct: "root", Got: fmt.Sprintf("slot 0: %v; slot 1: %v", slots[0].err, slots[1].err),
			Want: "at least one readable root", Rule: "R13", Kind: ErrCorrupt}
	case b == nil:
		return a, nil, nil
	case a == nil:
		return b, nil, nil
	case b.gen > a.gen:
		a, b = b, a
	}
	if a.store != b.store {
		return nil, nil, &Error{Off: rootSlots[b.slot], Struct: "root", Field: "store", Want: "the UUID of the other root", Rule: "R14", Kind: ErrStraddled}
	}
	return a, b, nil
}

func blank(p []byte) bool { return len(bytes.Trim(p, "\x00")) == 0 }

// choose makes r the root of st.
func (d *Dir) choose(st *state, r *root) *state {
	st.root = r
	st.prof = profile{keys: d.keys, sealed: r.sealed(), sealNames: r.sealNames, store: r.store, gen: r.gen}
	st.settled = true
	if _, err := parseHeaderAt(d.dev); err != nil {
		st.status.HeaderDamaged = err.Error()
	}
	return st
}

func parseHeaderAt(dev image.Device) ([16]byte, error) {
	p := make([]byte, maxRoot)
	if err := image.ReadFull(dev, p, headerOffset); err != nil {
		return [16]byte{}, err
	}
	return parseHeader(p)
}

// unlock derives the keys, once for the life of the handle. All slots wrap
// one master key, so either root's will do.
func (d *Dir) unlock(newest, other *root) error {
	keyed := d.opts.Key != nil
	switch {
	case !newest.sealed() && keyed:
		return ErrPlain
	case !newest.sealed() || d.keys != nil || d.opts.Keyless:
		if d.keys != nil && (!newest.sealed() || newest.store != d.keys.store) {
			return ErrTampered
		}
		return nil
	case !keyed:
		return fmt.Errorf("%w: the store is sealed, and no key was given", ErrKey)
	}
	slots, err := d.readKeySlots(newest)
	if damaged(err) && other != nil && other.sealed() {
		slots, err = d.readKeySlots(other) // a torn commit may have had new ones
	}
	if err != nil {
		return err
	}
	master, _, err := slots.Unlock(newest.store, d.opts.Key, d.opts.Budget)
	if errors.Is(err, keyslot.ErrUnlock) {
		return ErrKey
	}
	if err != nil {
		return fmt.Errorf("key slots: %w", err)
	}
	d.keys, err = newKeys(master, newest.store)
	return err
}

// authenticate demands a root's MAC.
func (d *Dir) authenticate(r *root) error {
	if r == nil || d.keys == nil {
		return nil
	}
	body, mac := macOf(r.der)
	if mac == nil || subtle.ConstantTimeCompare(mac, d.keys.sum()(labelRoot, body)) != 1 {
		return &Error{Off: rootSlots[r.slot], Struct: "root", Field: "mac", Want: "a MAC of this store's key", Rule: "R18", Kind: ErrTampered}
	}
	return nil
}

// authenticateSlots demands the MAC of the key slots, which could only be read
// by checksum before one of them opened: a slot of somebody else's must not be
// taken over when the slots are changed. Damage isn't for here: it is reported
// by what reads them next.
func (d *Dir) authenticateSlots(r *root) error {
	if d.keys == nil {
		return nil
	}
	if _, err := d.readKeySlots(r); err != nil && !damaged(err) {
		return err
	}
	return nil
}

// settledRecord reads the record. One that is damaged settles nothing.
func (d *Dir) settledRecord(st *state) (*settled, error) {
	rec, err := readSettled(d.dev, d.keys.sum())
	if err == nil || errors.Is(err, ErrTampered) {
		return rec, err
	}
	if !damaged(err) {
		return nil, err
	}
	st.status.SettledDamaged = err.Error()
	return nil, nil
}

// loadFree reads the free node for a writer. What it says is a hint: it is
// compared with what the directory reaches, and made anew where it lies.
func (d *Dir) loadFree(st *state) error {
	free, err := d.readFree(st.root, &st.prof)
	if err != nil && !damaged(err) {
		return err
	}
	why := ""
	if err != nil {
		why = err.Error()
	} else if st.root.blobs <= crossCheckBlobs || st.status.Recovered != "" {
		why, err = d.crossCheck(st, free)
		if err != nil {
			return err
		}
	}
	if why != "" {
		if free, err = d.rebuildFree(st); err != nil {
			return err
		}
		st.status.FreeRebuilt = why
	}
	st.free = free
	return nil
}
