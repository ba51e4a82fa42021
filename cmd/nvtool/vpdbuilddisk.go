package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	layout "nvstore.dev/machine"
	"nvstore.dev/nvstore"
	"nvstore.dev/vpd/machine"
)

func (b *builder) formatOf(x *machine.Machine) string {
	if b.o.format != "" {
		return b.o.format
	}
	return x.Store.Format
}

// layoutOf divides a machine's disk. The machine's ID comes from the content, as
// the store's does.
func (b *builder) layoutOf(x *machine.Machine, state int64) (*layout.Layout, error) {
	o := &layout.Options{Disk: x.Store.Disk, MaxDisk: x.Store.MaxDisk, State: state}
	if o.MaxDisk == 0 && b.formatOf(x) != chain.Raw {
		o.MaxDisk = defaultMax(0)
	}
	sum := sha256.Sum256(append([]byte("machine"), x.Seed[:]...))
	copy(o.Machine[:], sum[:])
	o.Machine[6], o.Machine[8] = o.Machine[6]&0x0f|0x80, o.Machine[8]&0x3f|0x80
	return layout.Plan(o)
}

// planDisk makes of a plan for a store one for a machine's disk.
func (b *builder) planDisk(x *machine.Machine, p *buildPlan) error {
	if strings.HasPrefix(b.o.output, "pebble:") {
		return withHint(fmt.Errorf("a machine's disk in a Pebble folder: %w", image.ErrUnsupported), "leave store.disk out: a Pebble folder has state alone")
	}
	state := p.Size
	if x.Store.Size == 0 {
		state = max(state, 64<<20) // as nvtool vm create has it
	}
	l, err := b.layoutOf(x, state)
	if err != nil {
		return &kinded{err, errInvalid}
	}
	p.Size, p.Disk, p.State = l.ImageSize, l.DiskSize, l.StateSize
	return nil
}

// fillDisk makes a machine's disk with its store.
func (b *builder) fillDisk(location string, x *machine.Machine, p *buildPlan, opts *nvstore.CreateOptions) error {
	l, err := b.layoutOf(x, p.State)
	if err != nil {
		return err
	}
	format := opts.Format
	if format == "" {
		format = chain.QCOW2
	}
	opts.Format, opts.Size = "", 0
	img, err := chain.Create(location, &chain.CreateOptions{Format: format, Size: l.ImageSize, Mark: chain.MarkMachine, LateSync: true})
	if err != nil {
		return fmt.Errorf("machine %d: %w", x.N, err)
	}
	err = b.fillTail(img.Device, l, x, p, opts)
	if err = errors.Join(err, img.Device.Close()); err == nil {
		err = img.Commit()
	}
	if err != nil {
		return errors.Join(fmt.Errorf("machine %d: %w", x.N, err), img.Abort())
	}
	return nil
}

func (b *builder) fillTail(dev image.Device, l *layout.Layout, x *machine.Machine, p *buildPlan, opts *nvstore.CreateOptions) error {
	w, err := image.Window(lent{dev}, l.StateOffset, l.StateSize)
	if err != nil {
		return err
	}
	s, err := nvstore.CreateDevice(w, opts)
	if err != nil {
		return err
	}
	if err := errors.Join(putMachine(s, x, p), s.Close()); err != nil {
		return err
	}
	_, err = layout.Format(dev, l)
	return err
}

// putBuilt stores a blob, as a live extent if it is to be one.
func putBuilt(tx *nvstore.Tx, name string, blob *machine.Blob, m *nvstore.Meta) error {
	if !blob.Live {
		return tx.Put(name, blob.Content, m)
	}
	if err := tx.CreateLive(name, int64(len(blob.Content)), m); err != nil {
		return err
	}
	_, err := tx.WriteAt(name, blob.Content, 0)
	return err
}
