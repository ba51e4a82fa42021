package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"nvstore.dev/image/convert"
)

func (a *app) imgCompareCmd() *cobra.Command {
	var one, two imgRef
	var strict bool
	var cache cacheMode
	c := a.verb("compare IMAGE1 IMAGE2 [-f FORMAT1] [-F FORMAT2] [-s]", "Compare the contents of two images",
		func(ctx context.Context, args []string) error {
			return compareCoded(a.imgCompare(ctx, &one, &two, args, strict, cache))
		})
	c.Long = `Compare the contents of two images. If one is larger, what it has more must read
as zeros. -s also takes another size, or clusters that are stored in another
way, for a difference.

Exit code 0: they are the same. 1: they differ. Higher ones are errors.`
	one.flags(c)
	one.shareFlag(c)
	a.outputFlag(c)
	c.Flags().StringVarP(&two.format, "second-format", "F", "", "the second image's `FORMAT`")
	c.Flags().BoolVarP(&strict, "strict", "s", false, "sizes and allocation count too")
	cache.flag(c, "source-cache", "T", "`MODE` none and directsync read past the system's cache; writeback, writethrough and unsafe don't")
	progressFlag(c)
	return c
}

// compareCoded keeps exit code 1 for a difference.
func compareCoded(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errDiffer):
		return &exitCoded{err, 1}
	case kindOf(err).code == 1:
		return &exitCoded{err, 2}
	}
	return err
}

func (a *app) imgCompare(ctx context.Context, one, two *imgRef, args []string, strict bool, cache cacheMode) (err error) {
	if len(args) != 2 || one.opts != "" {
		return usagef("two images are wanted, which may be stacks in QEMU's notation")
	}
	two.external, two.share, two.secrets = one.external, one.share, one.secrets
	for i, r := range []*imgRef{one, two} {
		if _, err := r.take(args[i:i+1], 0, 0, ""); err != nil {
			return err
		}
	}
	da, err := a.openImgs(ctx, one, true, true)
	if err != nil {
		return err
	}
	defer closeAll(&err, da)
	db, err := a.openImg(ctx, two, true)
	if err != nil {
		return err
	}
	defer closeAll(&err, db)
	if err := errors.Join(cache.drop(da), cache.drop(db)); err != nil {
		return err
	}
	o := &convert.CompareOptions{Strict: strict}
	if strict {
		if o.A, err = a.layers(ctx, one, da); err != nil {
			return err
		}
		if o.B, err = a.layers(ctx, two, db); err != nil {
			return err
		}
	}
	bar := a.bar("compare", max(da.Size(), db.Size()))
	if bar != nil {
		o.Progress = bar.set
	}
	d, err := convert.Compare(ctx, da, db, o)
	bar.end()
	if err != nil {
		return err
	}
	if a.json {
		if err := a.printJSON(struct {
			Identical  bool                `json:"identical"`
			Difference *convert.Difference `json:"difference,omitempty"`
		}{d == nil, d}); err != nil {
			return err
		}
	}
	switch {
	case d == nil && da.Size() != db.Size():
		a.warnf("the images have different sizes: %d and %d bytes", da.Size(), db.Size())
		fallthrough
	case d == nil:
		a.sayf("Images are identical.")
		return nil
	case d.Kind == "size":
		return differ("the images differ in size: %d and %d bytes", da.Size(), db.Size())
	}
	return differ("the images differ in %s at byte %d", d.Kind, d.Offset)
}

func differ(format string, args ...any) error {
	return &kinded{fmt.Errorf(format, args...), errDiffer}
}
