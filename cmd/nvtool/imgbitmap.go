package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

type bitmapFlags struct {
	ref                                 imgRef
	add, remove, clear, enable, disable bool
	merge                               []string
	granularity                         string
	source                              backingRef
}

func (a *app) imgBitmapCmd() *cobra.Command {
	var o bitmapFlags
	c := a.verb("bitmap (--add | --remove | --clear | --enable | --disable | --merge SOURCE)... IMAGE [BITMAP]",
		"List, make, change and merge persistent dirty bitmaps",
		func(ctx context.Context, args []string) error { return a.imgBitmap(ctx, &o, args) })
	c.Long = `Change a qcow2 image's persistent dirty bitmap, which records what was written
for incremental backups; without BITMAP, list them. Several actions are done in
the order --add, --clear, --enable, --disable, --merge, --remove. Each is whole
or undone after a crash.`
	c.Example = `  nvtool img bitmap --add -g 64k disk.qcow2 monday
  nvtool img bitmap --merge monday disk.qcow2 week`
	o.ref.flags(c)
	o.ref.shareFlag(c)
	a.outputFlag(c)
	f := c.Flags()
	f.BoolVar(&o.add, "add", false, "make BITMAP, enabled unless --disable is given too")
	f.BoolVar(&o.remove, "remove", false, "remove BITMAP")
	f.BoolVar(&o.clear, "clear", false, "nothing is dirty in BITMAP any more")
	f.BoolVar(&o.enable, "enable", false, "record writes in BITMAP")
	f.BoolVar(&o.disable, "disable", false, "record no writes in BITMAP")
	f.StringArrayVar(&o.merge, "merge", nil, "what is dirty in bitmap `SOURCE` is in BITMAP too")
	f.StringVarP(&o.granularity, "granularity", "g", "", "of --add: `BYTES` that a bit stands for, a power of two")
	f.StringVarP(&o.source.name, "source-file", "b", "", "the image `FILE` that has --merge's SOURCE")
	f.StringVarP(&o.source.format, "source-format", "F", "", "that image's `FORMAT`, which is qcow2")
	c.MarkFlagsMutuallyExclusive("enable", "disable")
	return c
}

func (o *bitmapFlags) changes() bool {
	return o.add || o.remove || o.clear || o.enable || o.disable || len(o.merge) > 0
}

func (a *app) imgBitmap(ctx context.Context, o *bitmapFlags, args []string) (err error) {
	args, err = o.ref.take(args, 0, 1, "one BITMAP")
	if err != nil {
		return err
	}
	switch {
	case o.changes() != (len(args) == 1):
		return usagef("a BITMAP and an action are wanted, or neither, to list them")
	case o.granularity != "" && !o.add:
		return usagef("-g needs --add")
	case o.source.name != "" && len(o.merge) == 0:
		return usagef("-b needs --merge")
	case o.source.format != "" && o.source.format != "qcow2":
		return usagef("-F %s: only qcow2 images have bitmaps", o.source.format)
	}
	dev, err := a.openImgs(ctx, &o.ref, len(args) == 0, o.source.name != "")
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	im, err := asQCOW2(&o.ref, dev)
	if err != nil {
		return err
	}
	if len(args) == 0 {
		return a.listBitmaps(im)
	}
	from := im
	if o.source.name != "" {
		src, err := a.openBitmapSource(ctx, o)
		if err != nil {
			return err
		}
		defer closeAll(&err, src)
		if from, err = asQCOW2(&o.ref, src); err != nil {
			return err
		}
	}
	if err := o.apply(ctx, im, from, args[0]); err != nil {
		return a.explain(&o.ref.imageRef, err)
	}
	if a.json {
		return a.listBitmaps(im)
	}
	a.sayf("%s: changed bitmap %s", printable(o.ref.location), printable(args[0]))
	return nil
}

func (a *app) openBitmapSource(ctx context.Context, o *bitmapFlags) (image.Device, error) {
	r := imgRef{external: o.ref.external, alone: true}
	r.secrets = o.ref.secrets
	if r.location, r.format = o.source.name, o.source.format; r.location == "" {
		return nil, usagef("-b is empty")
	}
	return a.openImg(ctx, &r, true)
}

// apply does the actions.
func (o *bitmapFlags) apply(ctx context.Context, im, from *qcow2.Image, name string) error {
	b := &qcow2.BitmapOptions{Disabled: o.disable}
	if o.granularity != "" {
		var err error
		if b.Granularity, err = parseImgSize(o.granularity); err != nil {
			return err
		}
		if g := b.Granularity; g < 512 || g > 2<<30 || g&(g-1) != 0 {
			return invalidf("-g %s: a power of two from 512 to 2G", o.granularity)
		}
	}
	steps := []struct {
		wanted bool
		do     func() error
	}{
		{o.add, func() error { return im.AddBitmap(name, b) }},
		{o.clear, func() error { return im.ClearBitmap(name) }},
		{o.enable && !o.add, func() error { return im.EnableBitmap(name, true) }},
		{o.disable && !o.add, func() error { return im.EnableBitmap(name, false) }},
		{len(o.merge) > 0, func() error {
			for _, src := range o.merge {
				if err := im.MergeBitmap(name, from, src); err != nil {
					return err
				}
			}
			return nil
		}},
		{o.remove, func() error { return im.RemoveBitmap(name) }},
	}
	for _, s := range steps {
		if !s.wanted {
			continue
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.do(); err != nil {
			return err
		}
	}
	return nil
}

func (a *app) listBitmaps(im *qcow2.Image) error {
	list, err := im.Bitmaps()
	if err != nil {
		return err
	}
	if a.json {
		if list == nil {
			list = []qcow2.Bitmap{}
		}
		return a.printJSON(list)
	}
	rows := make([][]string, len(list))
	for i, b := range list {
		rows[i] = []string{printable(b.Name), fmt.Sprint(b.Granularity), printableAll(b.Flags)}
	}
	return a.printTable([]string{"bitmap", "granularity", "flags"}, rows)
}
