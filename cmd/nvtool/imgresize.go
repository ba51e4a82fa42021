package main

import (
	"context"
	"fmt"
	"math"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

func (a *app) imgResizeCmd() *cobra.Command {
	var ref imgRef
	var shrink bool
	var prealloc string
	c := a.verb("resize IMAGE [+|-]SIZE", "Make an image larger or smaller", func(ctx context.Context, args []string) error {
		args, err := ref.take(args, 1, 1, "one SIZE")
		if err != nil {
			return err
		}
		return a.imgResize(ctx, &ref, args[0], shrink, prealloc)
	})
	c.Long = `Make an image SIZE bytes large, or by that much larger (+) or smaller (-; write
"--" before it). Only with --shrink, which is how one says that what lies
beyond the new end may be lost, an image gets smaller.`
	ref.flags(c)
	c.Flags().StringVar(&prealloc, "preallocation", "off", "of what is added, `MODE`: off, metadata, falloc or full")
	c.Flags().BoolVar(&shrink, "shrink", false, "the image may get smaller")
	return c
}

func (a *app) imgResize(ctx context.Context, ref *imgRef, text string, shrink bool, prealloc string) (err error) {
	n, err := parseImgSize(strings.TrimLeft(text, "+-"))
	if err != nil {
		return err
	}
	mode, err := parsePrealloc(prealloc)
	if err != nil {
		return err
	}
	dev, err := a.openImg(ctx, ref, false)
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	old := dev.Size()
	switch text[0] {
	case '+':
		if n > math.MaxInt64-old {
			return invalidf("size %s: too large", text)
		}
		n += old
	case '-':
		if n = old - n; n < 0 {
			return invalidf("size %s: the image has %d bytes", text, old)
		}
	}
	if isQCOW2(dev) {
		n = min(n, math.MaxInt64-511)
		n = (n + 511) &^ 511 // as QEMU does
	}
	r, ok := image.As[image.Resizer](dev)
	switch {
	case !ok:
		return fmt.Errorf("%s: resizing a %s image: %w", ref.location, formatOf(dev), image.ErrUnsupported)
	case n < old && !shrink:
		return withHint(invalidf("%s: shrinking it from %d to %d bytes loses what lies beyond", ref.location, old, n),
			"first make the guest's file systems and partitions smaller; then give --shrink")
	}
	if n < old && mode != qcow2.PreallocOff {
		return usagef("--preallocation is for an image that grows")
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := r.Resize(n); err != nil {
		return a.explain(&ref.imageRef, err)
	}
	if err := preallocate(ctx, dev, old, n-old, mode); err != nil {
		return fmt.Errorf("%s was resized: %w", ref.location, err)
	}
	if err := dev.Sync(); err != nil {
		return err
	}
	if a.json {
		return a.printJSON(struct {
			Filename    string `json:"filename"`
			VirtualSize int64  `json:"virtual-size"`
		}{ref.location, n})
	}
	a.sayf("%s: resized to %s", printable(ref.location), roughSize(n))
	return nil
}
