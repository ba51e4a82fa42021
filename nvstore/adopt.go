package nvstore

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/machine"
)

// AdoptOptions say how an image becomes a machine's disk.
type AdoptOptions struct {
	// Disk is the size of the guest's disk in bytes; 0 is the image's. An
	// image that was larger is cut: what lies beyond is lost.
	Disk int64

	// MaxDisk is how large the disk can get, and State the size of the
	// state window, in bytes; 0 is the disk's size, and 64 MiB.
	MaxDisk, State int64

	// Fixed keeps the image at its size. Disk must be given, and the rest of
	// the image must be blank.
	Fixed bool

	// Snapshots says that there may be some. They keep the image as it was:
	// loading one takes the store away, and a running QEMU can't load it.
	Snapshots bool

	// Store says how the store is made.
	Store CreateOptions
}

// Adopt makes an image a machine's disk: its content becomes the guest's disk,
// byte for byte, and a store is made behind it. dev stays the caller's.
//
// A crash leaves a qcow2 image as it was, or marked as being adopted: Adopt,
// again, makes it a machine's disk then, and nothing else opens its store. Of a
// raw one it may leave an image that is larger than it was, with zeros behind
// the disk or parts of a store; then Disk says how large it was.
func Adopt(dev image.Device, o *AdoptOptions) (*machine.Disk, error) {
	mark := chain.MarkOf(dev)
	plan := machine.Options{Disk: o.Disk, MaxDisk: o.MaxDisk, State: o.State}
	if plan.Disk == 0 {
		plan.Disk = dev.Size()
	}
	if strings.HasPrefix(string(mark), string(chain.MarkAdopting)) {
		plan.Disk = int64(binary.BigEndian.Uint64([]byte(mark[len(chain.MarkAdopting):])))
		if plan.Disk < 0 || plan.Disk > dev.Size() {
			return nil, fmt.Errorf("the image was being adopted, at a size of %d bytes, and has %d: %w", plan.Disk, dev.Size(), image.ErrCorrupt)
		}
	} else if err := adoptable(dev, o); err != nil {
		return nil, err
	}
	if o.Fixed {
		plan.ImageSize = dev.Size()
	}
	l, err := machine.Plan(&plan)
	if err != nil {
		return nil, err
	}
	a := adoption{dev: dev, layout: l, mark: mark, size: dev.Size()}
	d, err := a.run(o)
	if err != nil {
		return nil, errors.Join(err, a.undo(o))
	}
	return d, nil
}

// adoptable refuses what is a machine's or a store's already, and what has
// something to lose.
func adoptable(dev image.Device, o *AdoptOptions) error {
	_, err := machine.Open(dev)
	if err == nil {
		return fmt.Errorf("the image is a machine's disk already: %w", image.ErrExist)
	}
	if !errors.Is(err, machine.ErrNoLayout) && !errors.Is(err, image.ErrCorrupt) {
		return err
	}
	if store, err := recognize(dev); err != nil {
		return err
	} else if store {
		return fmt.Errorf("the image is a store's from its first byte on: %w", image.ErrExist)
	}
	im, ok := image.As[*qcow2.Image](dev)
	if !ok {
		return nil
	}
	info, err := im.Info()
	switch {
	case err != nil:
		return err
	case info.DataFile != "":
		return fmt.Errorf("a machine's disk with a data file of its own, which has no snapshots: %w", image.ErrUnsupported)
	case o.Fixed || len(info.Snapshots) == 0:
		return nil
	case info.Version < 3:
		return fmt.Errorf("an image of version 2 with snapshots, which don't record its size: %w", image.ErrUnsupported)
	case !o.Snapshots:
		return fmt.Errorf("%w: %d of them", ErrSnapshots, len(info.Snapshots))
	}
	return nil
}

// An adoption is under way.
type adoption struct {
	dev    image.Device
	layout *machine.Layout
	mark   chain.Mark // that it had
	size   int64      // likewise
}

func (a *adoption) run(o *AdoptOptions) (*machine.Disk, error) {
	_, marks := image.As[*qcow2.Image](a.dev)
	if marks {
		m := binary.BigEndian.AppendUint64([]byte(chain.MarkAdopting), uint64(a.layout.DiskSize))
		if err := chain.SetMark(a.dev, chain.Mark(m)); err != nil {
			return nil, err
		}
	}
	if !o.Fixed {
		if err := a.grow(); err != nil {
			return nil, err
		}
	}
	if err := a.fill(o); err != nil {
		return nil, err
	}
	d, err := machine.Format(a.dev, a.layout)
	if err == nil && marks {
		err = chain.SetMark(a.dev, chain.MarkMachine)
	}
	return d, err
}

// grow makes room, which reads as zeros: what an attempt before has left there
// is cut off.
func (a *adoption) grow() error {
	r, ok := image.As[image.Resizer](a.dev)
	if !ok {
		return fmt.Errorf("making the image larger: %w", image.ErrUnsupported)
	}
	if err := r.Resize(a.layout.DiskSize); err != nil {
		return err
	}
	if err := r.Resize(a.layout.ImageSize); err != nil {
		return err
	}
	return a.dev.Sync()
}

// fill makes the store.
func (a *adoption) fill(o *AdoptOptions) error {
	w, err := image.Window(keptOpen{a.dev}, a.layout.StateOffset, a.layout.StateSize)
	if err != nil {
		return err
	}
	c := o.Store
	c.Idle = -1
	s, err := CreateDevice(w, &c)
	if err != nil {
		return err
	}
	return s.Close()
}

// undo makes the image what it was, after an error.
func (a *adoption) undo(o *AdoptOptions) error {
	if o.Fixed || a.size != a.layout.DiskSize {
		return nil // what was there before isn't known
	}
	if r, ok := image.As[image.Resizer](a.dev); ok && a.dev.Size() != a.size {
		if err := r.Resize(a.size); err != nil {
			return err
		}
	}
	if chain.MarkOf(a.dev) == a.mark {
		return nil
	}
	return chain.SetMark(a.dev, a.mark)
}

// A keptOpen device isn't closed by the store on it.
type keptOpen struct{ image.Device }

func (k keptOpen) Unwrap() image.Device { return k.Device }
func (keptOpen) Close() error           { return nil }
