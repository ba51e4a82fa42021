package blobdir

import (
	"bytes"
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// Attach marks live extents as open in an emulator, before it opens them; no
// names are all that the store has. Until Detach nothing else reads or changes
// their content, and check says nothing of it. What is attached already stays
// so; what is damaged is refused. Both roots say so when Attach returns, so
// that the generation before the newest promises nothing about bytes that the
// emulator changes.
func (d *Dir) Attach(names ...string) error {
	changed := false
	err := d.Update(func(tx *Tx) error {
		return tx.eachLive(names, func(b *blob) error {
			if b.live.attached {
				return nil
			}
			if err := b.verifyLive(); err != nil {
				return err
			}
			l := *b.live
			l.attached, l.crc, l.mac = true, nil, nil
			b.mark(&l)
			changed = true
			return nil
		})
	}, nil)
	if err != nil || !changed {
		return err
	}
	return d.Update(func(tx *Tx) error { tx.again = true; return nil }, nil)
}

// Detach makes what the emulator wrote durable, and records the checksums of
// live extents that were attached, after the emulator has closed them; no
// names are all that the store has. It is also the way back after a crash of
// the machine, and after a revert to a snapshot of a running one.
func (d *Dir) Detach(names ...string) error { return d.record(false, names) }

// Accept is Detach for extents that needn't be attached: it records the
// checksums of their bytes as they are, damaged or not, as when an emulator
// wrote to them without their being attached.
func (d *Dir) Accept(names ...string) error { return d.record(true, names) }

func (d *Dir) record(all bool, names []string) error {
	return d.Update(func(tx *Tx) error {
		synced := false
		return tx.eachLive(names, func(b *blob) error {
			if !b.live.attached && !all {
				return nil
			}
			if !synced {
				if err := tx.settleEmulator(); err != nil {
					return err
				}
				synced = true
			}
			l := *b.live
			var err error
			if l.crc, l.mac, err = d.liveSums(&l, b.ID, tx.prof.keys); err != nil {
				return withBlob(err, b.Name)
			}
			if l.attached = false; !b.live.attached && bytes.Equal(l.crc, b.live.crc) && bytes.Equal(l.mac, b.live.mac) {
				return nil
			}
			b.mark(&l)
			b.Modified = tx.now
			return nil
		})
	}, nil)
}

// settleEmulator makes what somebody else wrote durable before its checksum
// is recorded: the root must not be on the medium without the bytes. They are
// read from the medium then, if that can be had.
func (tx *Tx) settleEmulator() error {
	d := tx.d
	if err := d.dev.Sync(); err != nil {
		return d.poison(err)
	}
	if c, ok := image.As[image.CacheDropper](d.dev); ok {
		if err := c.DropCache(); err != nil && !errors.Is(err, image.ErrUnsupported) {
			return err
		}
	}
	return nil
}

// mark changes what is said of an extent, and not its bytes.
func (b *blob) mark(l *liveExtent) {
	was := b.Modified
	b.setLive(l)
	b.touch()
	b.Modified = was
	b.tx.hold(b)
}

// eachLive calls fn for the live extents named, or for all.
func (tx *Tx) eachLive(names []string, fn func(*blob) error) error {
	if err := tx.usable(true); err != nil {
		return err
	}
	// The answer is about the image as it is, also where nothing changes.
	if err := tx.start(); err != nil {
		return err
	}
	if len(names) == 0 {
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			if e.Live {
				names = append(names, e.Name)
			}
		}
	}
	for _, name := range names {
		b, err := tx.existing(name, true)
		if err != nil {
			return err
		}
		if b.live == nil {
			return fmt.Errorf("%w: blob %q is no live extent", ErrInvalid, name)
		}
		if err := fn(b); err != nil {
			return err
		}
	}
	return nil
}
