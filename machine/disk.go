package machine

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// A Disk is an open machine's disk: a Device with a Layout. It doesn't own the
// device. Resize may not run beside other calls.
type Disk struct {
	dev    image.Device
	now    record
	status error
}

// Open finds the layout in dev: the copy of the record with the higher
// sequence. It reads the record's two blocks, and nothing else.
func Open(dev image.Device) (*Disk, error) {
	size := dev.Size()
	if size < Reserved {
		return nil, ErrNoLayout
	}
	var found [2]*record
	var status error
	for slot := range found {
		p := make([]byte, maxRecord)
		off := slotOffset(size, slot)
		if err := image.ReadFull(dev, p, off); err != nil {
			return nil, fmt.Errorf("layout record: %w", err)
		}
		var err error
		if !claims(p) {
			err = &Error{Off: off, Want: "a copy of the record", Rule: "L9", Kind: ErrNoLayout}
		} else {
			found[slot], err = parse(p, off, size, slot)
		}
		status = errors.Join(status, err)
	}
	a, b := found[0], found[1]
	switch {
	case a == nil && b == nil:
		if status != nil && !errors.Is(status, image.ErrCorrupt) && !errors.Is(status, image.ErrUnsupported) {
			return nil, ErrNoLayout
		}
		return nil, status
	case a == nil:
		return &Disk{dev, *b, status}, nil
	case b == nil:
		return &Disk{dev, *a, status}, nil
	case a.Machine != b.Machine || a.Sequence == b.Sequence:
		return nil, &Error{Off: slotOffset(size, 1), Field: "sequence", Got: b.Sequence,
			Want: "two copies of one machine's, written one after the other", Rule: "L10", Kind: image.ErrCorrupt}
	case a.Sequence > b.Sequence:
		return &Disk{dev, *a, nil}, nil
	}
	return &Disk{dev, *b, nil}, nil
}

// Format makes dev a machine's disk with this layout, which Plan made for its
// size. The record's blocks must be blank. The state window isn't touched: a
// caller who makes a store there first, and only then calls Format, leaves no
// machine's disk without one in a crash.
func Format(dev image.Device, l *Layout) (*Disk, error) {
	if l.ImageSize != dev.Size() {
		return nil, fmt.Errorf("%w: a layout for %d bytes, on an image of %d", ErrInvalid, l.ImageSize, dev.Size())
	}
	if _, field, got, want := l.check(); field != "" {
		return nil, fmt.Errorf("%w: %s is %v, and must be %s", ErrInvalid, field, got, want)
	}
	p := make([]byte, maxRecord)
	for slot := range 2 {
		if err := image.ReadFull(dev, p, slotOffset(l.ImageSize, slot)); err != nil {
			return nil, err
		}
		for _, b := range p {
			if b != 0 {
				return nil, fmt.Errorf("the layout record's place isn't blank: %w", image.ErrExist)
			}
		}
	}
	d := &Disk{dev: dev, now: record{Layout: *l, slot: 1}}
	d.now.Sequence = 0
	if err := d.write(l.DiskSize); err != nil {
		return nil, err
	}
	return d, nil
}

// write makes the size durable, in both copies. That which counts is never
// touched before the other is durable and newer.
func (d *Disk) write(disk int64) error {
	for range 2 {
		next := d.now
		next.DiskSize, next.Sequence, next.slot = disk, d.now.Sequence+1, 1-d.now.slot
		p := make([]byte, BlockSize)
		copy(p, next.encode())
		if _, err := d.dev.WriteAt(p, slotOffset(next.ImageSize, next.slot)); err != nil {
			return err
		}
		if err := d.dev.Sync(); err != nil {
			return err
		}
		d.now = next
	}
	d.status = nil
	return nil
}

// Layout returns what lies where.
func (d *Disk) Layout() Layout { return d.now.Layout }

// Status says why one copy of the record can't be read. The other one counts
// then; Resize, to any size, writes both.
func (d *Disk) Status() error { return d.status }

// Device returns the whole.
func (d *Disk) Device() image.Device { return d.dev }

// Guest returns the guest's disk, of the size that it has now. Closing it closes
// the whole.
func (d *Disk) Guest() (image.Device, error) { return d.window(0, d.now.DiskSize) }

// State returns the state window, of fixed size. Closing it closes the whole.
func (d *Disk) State() (image.Device, error) { return d.window(d.now.StateOffset, d.now.StateSize) }

// A part is a window that knows what it is a part of.
type part struct {
	image.Device
	of *Disk
}

func (p *part) Unwrap() image.Device { return p.Device }

func (d *Disk) window(off, size int64) (image.Device, error) {
	w, err := image.Window(d.dev, off, size)
	if err != nil {
		return nil, err
	}
	return &part{w, d}, nil
}

// Of returns the machine's disk that a Device is a window of, made by Guest or
// State.
func Of(dev image.Device) (*Disk, bool) {
	p, ok := image.As[*part](dev)
	if !ok {
		return nil, false
	}
	return p.of, true
}

// Resize changes the size of the guest's disk, in bytes, a multiple of 512. It
// can't get larger than Layout.MaxDisk, and smaller only if shrink says that
// what lies beyond may be lost. New bytes read as zeros. A crash leaves the old
// size or the new one; the old disk's bytes aren't touched.
func (d *Disk) Resize(size int64, shrink bool) error {
	old := d.now.DiskSize
	switch {
	case size < 0 || size%sector != 0:
		return fmt.Errorf("%w: a disk of %d bytes; a multiple of 512 is wanted", ErrInvalid, size)
	case size > d.now.MaxDisk():
		return fmt.Errorf("%w: a disk of %d bytes, where the state window leaves %d", ErrInvalid, size, d.now.MaxDisk())
	case size < old && !shrink:
		return fmt.Errorf("%w: from %d to %d bytes", ErrShrink, old, size)
	}
	if size > old {
		// An earlier disk may have been larger.
		if err := zero(d.dev, old, size-old); err != nil {
			return err
		}
		if err := d.dev.Sync(); err != nil {
			return err
		}
	}
	if err := d.write(size); err != nil {
		return err
	}
	if c, ok := image.As[image.Discarder](d.dev); ok && size < old {
		// Space is given back, if that can be; the size is right already.
		from := (size + align - 1) / align * align
		if from < old {
			if err := c.Discard(from, old-from); err != nil && !errors.Is(err, image.ErrUnsupported) {
				return err
			}
			return d.dev.Sync()
		}
	}
	return nil
}

// zero makes a range read as zeros, at a cost that depends on what is there
// where the device can tell.
func zero(dev image.Device, off, n int64) error {
	w, err := image.Window(dev, off, n)
	if err != nil {
		return err
	}
	s, status := w.(image.BlockStatuser)
	for at := int64(0); at < n; {
		length := n - at
		if status {
			e, err := s.BlockStatus(at, length)
			if err != nil {
				return err
			}
			if length = e.Length; e.Zero {
				at += length
				continue
			}
		}
		if err := w.(image.ZeroWriter).WriteZeroes(at, length); err != nil {
			return err
		}
		at += length
	}
	return nil
}
