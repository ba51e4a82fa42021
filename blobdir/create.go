package blobdir

import (
	"bytes"
	"fmt"
	"time"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
)

// CreateOptions say how a new store is made. The zero value makes a plain
// store.
type CreateOptions struct {
	// Key seals the store. KDF says how hard a passphrase is to guess;
	// zero is the default of package kdf. Label names the slot.
	Key   *keyslot.Credential
	KDF   kdf.Argon2id
	Label string

	// SealNames hides names, types and writers too. It needs a Key.
	SealNames bool

	// MaxSize is the size in bytes beyond which the image isn't grown; 0
	// is no limit.
	MaxSize int64

	// UUID names the store; a zero UUID is replaced by a random one.
	UUID [16]byte

	// Force formats a device that isn't blank.
	Force bool

	// Seed, unless it is empty, makes the store reproducible: with the
	// same seed and Time, the same calls on the Dir that Create returns
	// give the same bytes. Its identifiers come from the seed, which must
	// be another one for other content: they tell generations apart. Only
	// a plain store can be reproducible.
	Seed []byte
	Time time.Time // what the clock of such a Dir says
}

// Create makes a store on dev, which must be blank where the fixed structures
// go, and opens it. dev belongs to the Dir from then on if there is no error.
func Create(dev image.Device, opts *CreateOptions) (*Dir, error) {
	var o CreateOptions
	if opts != nil {
		o = *opts
	}
	if o.SealNames && o.Key == nil {
		return nil, fmt.Errorf("%w: names can't be sealed without a key", ErrInvalid)
	}
	if o.MaxSize < 0 || o.MaxSize > 0 && o.MaxSize < minStoreSize {
		return nil, fmt.Errorf("%w: a store needs at least %d bytes", ErrInvalid, minStoreSize)
	}
	source, err := newSeeded(&o)
	if err != nil {
		return nil, err
	}
	if err := prepare(dev, o.Force); err != nil {
		return nil, err
	}
	d := &Dir{dev: dev, readers: make(map[int64]int), opts: Options{Key: o.Key}, seeded: source}
	if o.UUID == ([16]byte{}) {
		if err := d.random(o.UUID[:]); err != nil {
			return nil, err
		}
		o.UUID[6], o.UUID[8] = o.UUID[6]&0x0f|0x40, o.UUID[8]&0x3f|0x80 // RFC 9562, version 4
	}
	if err := d.format(&o); err != nil {
		return nil, err
	}
	if err := d.reload(); err != nil {
		return nil, err
	}
	// That there is no generation before the first is no loss to report.
	st := *d.st.Load()
	st.status = Status{}
	d.st.Store(&st)
	// A second generation, so that losing either root loses nothing.
	d.writer.Lock()
	defer d.writer.Unlock()
	limit := o.MaxSize
	if err := d.update(func(tx *Tx) error { tx.maxSize = &limit; return nil }); err != nil {
		return nil, err
	}
	return d, nil
}

// prepare demands room, and blank blocks where the fixed structures go.
func prepare(dev image.Device, force bool) error {
	if short := minStoreSize - dev.Size(); short > 0 {
		r, ok := image.As[image.Resizer](dev)
		if !ok {
			return &SpaceError{Missing: short, Size: dev.Size()}
		}
		if err := r.Resize(minStoreSize); err != nil {
			return &SpaceError{Missing: short, Size: dev.Size(), Cause: err}
		}
	}
	if force {
		return nil
	}
	p := make([]byte, BlockSize)
	for _, off := range []int64{headerOffset, rootSlot0, rootSlot1, settledOffset} {
		if err := image.ReadFull(dev, p, off); err != nil {
			return err
		}
		if !blank(p) {
			return &Error{Off: off, Struct: "image", Want: "a blank image", Kind: ErrExist}
		}
	}
	return nil
}

// format writes generation 1 and, when that is durable, the header.
func (d *Dir) format(o *CreateOptions) error {
	st := &state{root: &root{store: o.UUID, sealNames: o.SealNames}, free: &freeNode{end: firstEnd, extents: []freeExtent{
		{off: headerOffset + BlockSize, length: rootSlot0 - BlockSize},
		{off: rootSlot0 + BlockSize, length: rootSlot1 - rootSlot0 - BlockSize},
		{off: rootSlot1 + BlockSize, length: settledOffset - rootSlot1 - BlockSize},
	}}}
	st.prof = profile{store: o.UUID, sealed: o.Key != nil, sealNames: o.SealNames, gen: 1}
	var slots []byte
	if o.Key != nil {
		master := make([]byte, 32)
		if err := random(master); err != nil {
			return err
		}
		ks, err := keyslot.New(o.UUID, master, o.Key, &keyslot.Options{Label: o.Label, Argon2: o.KDF})
		if err != nil {
			return err
		}
		if slots, err = ks.Encode(); err != nil {
			return err
		}
		if d.keys, err = newKeys(master, o.UUID); err != nil {
			return err
		}
		st.prof.keys = d.keys
	}
	d.st.Store(st)
	for _, off := range []int64{headerOffset, rootSlot0, rootSlot1, settledOffset} {
		if _, err := d.dev.WriteAt(zeroBlock[:], off); err != nil {
			return d.poison(err)
		}
	}
	if err := d.firstRoot(st, slots); err != nil {
		return err
	}
	p := make([]byte, maxRoot)
	copy(p, encodeHeader(o.UUID))
	if _, err := d.dev.WriteAt(p, headerOffset); err != nil {
		return d.poison(err)
	}
	if err := d.dev.Sync(); err != nil {
		return d.poison(err)
	}
	return nil
}

// firstRoot writes an empty directory and the root of generation 1.
func (d *Dir) firstRoot(st *state, slots []byte) error {
	tx := d.begin()
	tx.started, tx.keySlots, tx.now = true, slots, d.now()
	tx.dir = tree{kind: directoryTree, pg: tx, root: kid{dirty: &node{kind: directoryTree, size: nodeOverhead}}}
	r, err := tx.newRoot()
	if err != nil {
		return err
	}
	r.slot, r.parent, r.parentGen = 0, nil, 0
	p := make([]byte, maxRoot)
	copy(p, bytes.Clone(r.encode(d.keys.sum())))
	if err := tx.flush(image.Request{P: p, Off: rootSlots[0]}); err != nil {
		return err
	}
	if err := d.dev.Sync(); err != nil {
		return d.poison(err)
	}
	return nil
}
