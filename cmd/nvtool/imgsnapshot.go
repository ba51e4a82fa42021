package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

func (a *app) imgSnapshotCmd() *cobra.Command {
	var ref imgRef
	var list bool
	var apply, create, remove string
	c := a.verb("snapshot [-l | -a TAG | -c TAG | -d TAG] IMAGE", "List, take, apply and delete internal snapshots",
		func(ctx context.Context, args []string) error {
			if _, err := ref.take(args, 0, 0, ""); err != nil {
				return err
			}
			switch {
			case apply != "":
				return a.imgSnapshot(ctx, &ref, "applied", apply, image.SnapshotSet.Revert)
			case create != "":
				return a.imgSnapshot(ctx, &ref, "took", create, image.SnapshotSet.Create)
			case remove != "":
				return a.imgSnapshot(ctx, &ref, "deleted", remove, image.SnapshotSet.Delete)
			}
			return a.imgSnapshotList(ctx, &ref)
		})
	c.Long = `List, take, apply and delete a qcow2 image's internal snapshots. TAG is an ID or
a name; an ID comes first. Applying one loses what was written since, unless
another snapshot keeps it.`
	ref.flags(c)
	ref.shareFlag(c)
	a.outputFlag(c)
	f := c.Flags()
	f.BoolVarP(&list, "list", "l", false, "list them, which is done unless another flag says more")
	f.StringVarP(&apply, "apply", "a", "", "make the disk what it was at snapshot `TAG`")
	f.StringVarP(&create, "create", "c", "", "take a snapshot named `TAG`")
	f.StringVarP(&remove, "delete", "d", "", "delete snapshot `TAG`")
	c.MarkFlagsMutuallyExclusive("list", "apply", "create", "delete")
	return c
}

func (a *app) imgSnapshot(ctx context.Context, ref *imgRef, done, tag string, do func(image.SnapshotSet, string) error) (err error) {
	dev, err := a.openImg(ctx, ref, false)
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	set, err := snapshots(ref, dev)
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := do(set, tag); err != nil {
		return a.explain(&ref.imageRef, err)
	}
	if a.json {
		return a.printJSON(struct {
			Filename string `json:"filename"`
			Tag      string `json:"tag"`
		}{ref.location, tag})
	}
	a.sayf("%s: %s snapshot %s", printable(ref.location), done, printable(tag))
	return nil
}

func snapshots(ref *imgRef, dev image.Device) (image.SnapshotSet, error) {
	s, ok := image.As[image.Snapshotter](dev)
	if !ok {
		return nil, withHint(fmt.Errorf("%s: snapshots of a %s image: %w", ref.location, formatOf(dev), image.ErrUnsupported),
			"only qcow2 images have internal snapshots")
	}
	return s.Snapshots(), nil
}

func (a *app) imgSnapshotList(ctx context.Context, ref *imgRef) (err error) {
	dev, err := a.openImg(ctx, ref, true)
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	set, err := snapshots(ref, dev)
	if err != nil {
		return err
	}
	list, err := set.List()
	if err != nil {
		return err
	}
	f := imgFacts{Snapshots: []snapFacts{}}
	f.fill(&qcow2.Info{Snapshots: list})
	if a.json {
		return a.printJSON(f.Snapshots)
	}
	a.printSnapshots(f.Snapshots)
	return nil
}
