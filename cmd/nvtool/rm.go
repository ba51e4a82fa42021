package main

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *app) rmCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	var force bool
	c := a.verb("rm IMAGE NAME...", "Remove blobs, all or none", func(ctx context.Context, args []string) (err error) {
		args, err = ref.take(args, 1, -1, "")
		if err != nil {
			return err
		}
		names, err := canonical(args)
		if err != nil {
			return err
		}
		s, err := a.open(ctx, &ref, &key, writing)
		if err != nil {
			return err
		}
		defer closing(s, &err)
		if force {
			if err := detachThese(s, names); err != nil {
				return a.explain(&ref, err)
			}
		}
		if err := s.Delete(names...); err != nil {
			return a.explain(&ref, err)
		}
		a.sayf("removed %s", printableAll(names))
		return nil
	})
	c.Long = `Remove blobs, all or none. Their bytes stay in the image until the space is
used again: in a sealed store nobody without the key can read them. A live
extent that is attached is refused without --force: a machine that has it open
would go on writing to its blocks, whatever lies there by then.`
	ref.flags(c)
	key.flags(c, "the ")
	c.Flags().BoolVar(&force, "force", false, "remove live extents that are attached, too; the machine must be off")
	return c
}
