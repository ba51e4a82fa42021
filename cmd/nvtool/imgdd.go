package main

import (
	"context"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/convert"
)

type ddFlags struct {
	src             imgRef
	spec            imgSpec
	force           bool
	in, out         string
	bs, count, skip int64
	counted         bool
}

func (a *app) imgDDCmd() *cobra.Command {
	var o ddFlags
	c := a.verb("dd if=IMAGE of=TARGET [bs=SIZE] [count=N] [skip=N] [-f FORMAT] [-O FORMAT]", "Copy a part of an image into a new one",
		func(ctx context.Context, args []string) error { return a.imgDD(ctx, &o, args) })
	c.Long = `Copy count blocks of bs bytes (512) of IMAGE, from block skip on, into a new
image. Without count that is everything up to the end.`
	o.src.flags(c)
	o.src.shareFlag(c)
	o.spec.flags(c, "output-format", "O", "the target's ")
	forceFlag(c, &o.force)
	progressFlag(c)
	return c
}

func (o *ddFlags) parse(args []string) error {
	o.bs = 512
	for _, arg := range args {
		key, value, err := splitPair(arg)
		if err != nil {
			return err
		}
		switch key {
		case "if":
			o.in = value
		case "of":
			o.out = value
		case "bs":
			o.bs, err = parseImgSize(value)
		case "count":
			o.count, err = parseImgSize(value)
			o.counted = true
		case "skip":
			o.skip, err = parseImgSize(value)
		default:
			err = usagef("%s=: if, of, bs, count and skip are known", printable(key))
		}
		if err != nil {
			return err
		}
	}
	switch {
	case o.in == "" && o.src.opts == "" || o.out == "":
		return usagef("if=IMAGE and of=TARGET are wanted")
	case o.bs <= 0 || o.bs > math.MaxInt32:
		return invalidf("bs=%d: 1 to %d", o.bs, math.MaxInt32)
	case strings.Contains(o.out, "driver="):
		return usagef("of= is a path")
	}
	return nil
}

func (a *app) imgDD(ctx context.Context, o *ddFlags, args []string) (err error) {
	if err := o.parse(args); err != nil {
		return err
	}
	if err := o.spec.parse(); err != nil {
		return err
	}
	args = nil
	if o.in != "" {
		args = []string{o.in}
	}
	src, err := a.openSources(ctx, &o.src, args, o.spec.crypt.on)
	if err != nil {
		return err
	}
	defer closeAll(&err, src)
	off := src.Size()
	if o.skip <= src.Size()/o.bs {
		off = o.skip * o.bs
	}
	n := src.Size() - off
	if o.counted && o.count < n/o.bs+1 {
		n = min(n, o.count*o.bs)
	}
	part, err := image.Window(src, off, n)
	if err != nil {
		return err
	}
	if sameFile(o.in, o.out) {
		return usagef("if= and of= are the same file")
	}
	o.spec.size = n
	if err := o.spec.encrypt(ctx, o.src.secrets); err != nil {
		return err
	}
	t, err := a.createImg(o.out, &o.spec, o.force, false)
	if err != nil {
		return err
	}
	if err := a.prepare(ctx, t, &o.spec); err != nil {
		return t.finish(ctx, err)
	}
	return t.finish(ctx, a.copyImg(ctx, t.Device, part, &convert.Options{TargetZero: o.spec.format != chain.LUKS, Cluster: cluster(t.Device)}, o.out))
}
