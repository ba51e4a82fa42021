package main

import (
	"context"
	"slices"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/convert"
	"nvstore.dev/image/qcow2"
)

func (a *app) imgMeasureCmd() *cobra.Command {
	var ref imgRef
	var spec imgSpec
	var sized string
	c := a.verb("measure [IMAGE | --size SIZE] [-O FORMAT] [-o NAME=VALUE,...]", "Say how large the file of a new image gets",
		func(ctx context.Context, args []string) error {
			if done, err := spec.wantsHelp(a); done {
				return err
			}
			return a.imgMeasure(ctx, &ref, &spec, args, sized)
		})
	c.Long = `Say how large the file gets that holds IMAGE's data, or an empty disk of SIZE
bytes, in another format: what is required now, and once all of it is written.`
	ref.flags(c)
	ref.shareFlag(c)
	spec.flags(c, "output-format", "O", "the new image's ")
	a.outputFlag(c)
	c.Flags().StringVarP(&ref.snapshot, "snapshot", "l", "", "IMAGE as it was at internal snapshot `TAG`, an ID or a name")
	c.Flags().StringVar(&sized, "size", "", "of an empty disk, in place of IMAGE: `SIZE`")
	return c
}

func (a *app) imgMeasure(ctx context.Context, ref *imgRef, spec *imgSpec, args []string, sized string) (err error) {
	if err := spec.parse(); err != nil {
		return err
	}
	var src image.Device
	var size int64
	if sized != "" {
		if len(args) > 0 || ref.opts != "" {
			return usagef("--size takes IMAGE's place")
		}
		if size, err = parseImgSize(sized); err != nil {
			return err
		}
	} else {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		ref.snapshot = snapshotTag(ref.snapshot)
		if src, err = a.openImg(ctx, ref, true); err != nil {
			return err
		}
		defer closeAll(&err, src)
		size = src.Size()
	}
	target := spec.measured()
	if src != nil && target.QCOW2 && spec.qcow2.Version != 2 {
		if target.Bitmaps, err = bitmapShapes(src); err != nil {
			return a.explain(&ref.imageRef, err)
		}
	}
	m, err := convert.Measure(ctx, size, src, target)
	if err != nil {
		return a.explain(&ref.imageRef, err)
	}
	if a.json {
		return a.printJSON(m)
	}
	a.sayf("required size: %d\nfully allocated size: %d", m.Required, m.FullyAllocated)
	if m.Bitmaps != nil {
		a.sayf("bitmaps size: %d", *m.Bitmaps)
	}
	return nil
}

// bitmapShapes returns the bitmaps that convert --bitmaps would copy, and nil of
// an image that can't have any.
func bitmapShapes(src image.Device) ([]convert.BitmapShape, error) {
	im, ok := image.As[*qcow2.Image](src)
	if !ok {
		return nil, nil
	}
	info, err := im.Info()
	if err != nil || info.Version < 3 {
		return nil, err
	}
	list, err := im.Bitmaps()
	if err != nil {
		return nil, err
	}
	shapes := []convert.BitmapShape{}
	for _, b := range list {
		if !slices.Contains(b.Flags, "in-use") {
			shapes = append(shapes, convert.BitmapShape{Name: b.Name, Granularity: b.Granularity})
		}
	}
	return shapes, nil
}

// measured is the spec as convert.Measure takes it.
func (s *imgSpec) measured() *convert.Target {
	return &convert.Target{QCOW2: s.format == "qcow2", ClusterSize: int64(s.qcow2.ClusterSize), RefcountBits: s.qcow2.RefcountBits,
		ExtendedL2: s.qcow2.ExtendedL2, Header: s.headerSize(), Full: s.qcow2.BackingFile != "" || s.prealloc >= qcow2.PreallocFalloc}
}
