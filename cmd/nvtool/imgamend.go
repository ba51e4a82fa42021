package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

func (a *app) imgAmendCmd() *cobra.Command {
	var ref imgRef
	spec := imgSpec{format: "qcow2"}
	c := a.verb("amend IMAGE -o NAME=VALUE,...", "Change properties of a qcow2 image", func(ctx context.Context, args []string) error {
		if done, err := spec.wantsHelp(a, amendable...); done {
			return err
		}
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		return a.imgAmend(ctx, &ref, &spec)
	})
	c.Long = `Change properties of a qcow2 image: compat, refcount_bits, lazy_refcounts, size,
data_file and data_file_raw. Each is changed by one write of the header, so a
crash leaves it old or new. Another backing file is for rebase.`
	ref.flags(c)
	spec.optionFlag(c)
	return c
}

// amendable are the -o options that an image can be given later.
var amendable = []string{"size", "compat", "refcount_bits", "lazy_refcounts", "data_file", "data_file_raw"}

func (a *app) imgAmend(ctx context.Context, ref *imgRef, spec *imgSpec) (err error) {
	if err := spec.parse(); err != nil {
		return err
	}
	if len(spec.explicit) == 0 {
		return usagef("-o NAME=VALUE is wanted")
	}
	for name := range spec.explicit {
		if !slices.Contains(amendable, name) {
			hint := "nvtool img convert makes an image with other options"
			if name == "backing_file" || name == "backing_fmt" {
				hint = "nvtool img rebase changes the backing file"
			}
			return withHint(fmt.Errorf("amending %s: %w", name, image.ErrUnsupported), hint)
		}
	}
	o := &qcow2.AmendOptions{Version: spec.qcow2.Version, RefcountBits: spec.qcow2.RefcountBits, LazyRefcounts: spec.lazy,
		DataFile: spec.qcow2.DataFile}
	if spec.sized {
		o.Size = (spec.size + 511) &^ 511
	}
	if _, ok := spec.explicit["data_file_raw"]; ok {
		o.RawDataFile = &spec.qcow2.DataFileRaw
	}
	dev, err := a.openImg(ctx, ref, false)
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	im, err := asQCOW2(ref, dev)
	if err != nil {
		return err
	}
	if o.Size != 0 && o.Size < dev.Size() {
		return withHint(invalidf("%s: shrinking it loses what lies beyond", ref.location), "nvtool img resize --shrink does that")
	}
	if err := im.Amend(ctx, o); err != nil {
		return a.explain(&ref.imageRef, err)
	}
	a.sayf("%s: amended", printable(ref.location))
	return nil
}

// asQCOW2 is for verbs that only this format has.
func asQCOW2(ref *imgRef, dev image.Device) (*qcow2.Image, error) {
	im, ok := image.As[*qcow2.Image](dev)
	if !ok {
		return nil, withHint(fmt.Errorf("%s: a %s image: %w", ref.location, formatOf(dev), image.ErrUnsupported), "this is for qcow2 images")
	}
	return im, nil
}
