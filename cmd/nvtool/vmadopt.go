package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

type vmAdoptOptions struct {
	tailFlags
	ref   diskRef
	force bool
}

func (a *app) vmAdoptCmd() *cobra.Command {
	var o vmAdoptOptions
	c := a.verb("adopt IMAGE [-f qcow2|raw] [--max-disk 16T] [--state 64M] [KEY]", "Make an image that is there a machine's disk",
		func(ctx context.Context, args []string) error { return a.vmAdopt(ctx, &o, args) })
	c.Long = `Make an image a machine's disk: its content stays as it is, and is the guest's
disk; behind it the image grows, thinly, by a store. The machine must be off.

Snapshots that are there keep the image as it was, with its former size: loading
one takes the store away again, and a running QEMU can't load it at all. --force
says that this is known.

After a crash in the middle, adopting a qcow2 again finishes it. A raw image may
have grown; then say its former size with --disk, and --force.`
	c.Example = `  nvtool vm adopt -f qcow2 vm.qcow2 --passphrase-file pass
  nvtool vm adopt -f raw disk.img --max-disk 100G`
	o.ref.flags(c)
	o.tailFlags.flags(c, "`SIZE` of the guest's disk, of an image whose adoption was interrupted; the rest is cut off (needs --force)")
	c.Flags().BoolVar(&o.force, "force", false, "though snapshots can't be loaded any more, or what lies beyond --disk is lost")
	return c
}

func (a *app) vmAdopt(ctx context.Context, o *vmAdoptOptions, args []string) error {
	if _, err := o.ref.take(args, 0, 0, ""); err != nil {
		return err
	}
	if o.disk != 0 && !o.force {
		return usagef("--disk cuts off what lies beyond: it needs --force")
	}
	cred, done, err := a.newKey(ctx, &o.ref.imageRef, &o.key, o.sealNames)
	if err != nil {
		return err
	}
	defer done()
	if err := ctx.Err(); err != nil {
		return err
	}
	f, err := a.adopt(o, cred)
	if err != nil {
		return a.explain(&o.ref.imageRef, adoptHint(err))
	}
	a.warnPlain(cred)
	if n := len(f.Snapshots); n > 0 {
		a.warnf("%s from before have no store, and a running QEMU can't load them", count(int64(n), "snapshot"))
	}
	if a.json {
		return a.printJSON(f)
	}
	a.sayf("%s: a disk of %s, which can grow to %s, and a store in a window of %s", printable(o.ref.location),
		roughSize(f.DiskSize), roughSize(f.MaxDisk), roughSize(f.StateSize))
	return nil
}

func adoptHint(err error) error {
	switch {
	case errors.Is(err, nvstore.ErrSnapshots):
		return withHint(&kinded{err, errInvalid}, "delete them, or adopt with --force, after which a running QEMU can't load them, and loading one offline takes the store away")
	case errors.Is(err, image.ErrExist):
		return withHint(err, "nvtool vm info shows a machine's disk; nvtool vm create makes another one")
	}
	return err
}

func (a *app) adopt(o *vmAdoptOptions, cred *keyslot.Credential) (f *diskFacts, err error) {
	opts, err := o.options(cred)
	if err != nil {
		return nil, err
	}
	dev, err := a.device(&o.ref.imageRef, false)
	if err != nil {
		return nil, err
	}
	defer closeAll(&err, dev)
	ao := &nvstore.AdoptOptions{Disk: int64(o.disk), MaxDisk: int64(o.maxDisk), State: int64(o.state), Snapshots: o.force, Store: *opts}
	var list []image.Snapshot
	if im, ok := image.As[*qcow2.Image](dev); ok {
		info, err := im.Info()
		if err != nil {
			return nil, err
		}
		list = info.Snapshots
		if ao.MaxDisk == 0 {
			ao.MaxDisk = defaultMax(int64(info.ClusterSize))
		}
	}
	d, err := nvstore.Adopt(dev, ao)
	if err != nil {
		return nil, err
	}
	f = factsOf(o.ref.location, d)
	f.Snapshots = append(f.Snapshots, list...)
	return f, nil
}

func (a *app) vmResizeCmd() *cobra.Command {
	var ref diskRef
	var shrink bool
	c := a.verb("resize DISK [+|-]SIZE", "Make the guest's disk larger or smaller", func(ctx context.Context, args []string) error {
		args, err := ref.take(args, 1, 1, "one SIZE")
		if err != nil {
			return err
		}
		return a.vmResize(ctx, &ref, args[0], shrink)
	})
	c.Long = `Make the guest's disk SIZE bytes large, or by that much larger (+) or smaller (-;
write "--" before it). The image keeps its size, so that all snapshots can be
loaded; loading one gives the disk back the size that it had. New bytes read as
zeros, and those that are there aren't touched. Only with --shrink, which is how
one says that what lies beyond the new end may be lost, it gets smaller.`
	ref.flags(c)
	c.Flags().BoolVar(&shrink, "shrink", false, "the disk may get smaller")
	return c
}

func (a *app) vmResize(ctx context.Context, ref *diskRef, text string, shrink bool) (err error) {
	n, err := parseSize(strings.TrimLeft(text, "+-"))
	if err != nil {
		return err
	}
	if err := ref.secrets.load(ctx, a, &ref.imageRef); err != nil {
		return err
	}
	defer ref.secrets.wipe()
	d, err := a.openDisk(ref, false)
	if err != nil {
		return err
	}
	defer closeAll(&err, d.Device())
	l := d.Layout()
	switch {
	case text[0] == '+' && n > l.MaxDisk():
		n = l.MaxDisk() + 512 // too large, whatever it is
	case text[0] == '+':
		n += l.DiskSize
	case text[0] == '-':
		if n = l.DiskSize - n; n < 0 {
			return invalidf("size %s: the disk has %d bytes", text, l.DiskSize)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := d.Resize(n, shrink); err != nil {
		switch {
		case errors.Is(err, machine.ErrShrink):
			err = withHint(err, "first make the guest's file systems and partitions smaller; then give --shrink")
		case errors.Is(err, machine.ErrInvalid) && n > l.MaxDisk():
			err = withHint(err, fmt.Sprintf("it can have at most %s; a larger --max-disk is chosen when the image is made", formatSize(l.MaxDisk())))
		}
		return a.explain(&ref.imageRef, err)
	}
	if a.json {
		return a.printJSON(factsOf(ref.location, d))
	}
	a.sayf("%s: a disk of %s", printable(ref.location), roughSize(d.Layout().DiskSize))
	return nil
}
