package main

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *app) rmCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
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
		if err := s.Delete(names...); err != nil {
			return a.explain(&ref, err)
		}
		a.sayf("removed %s", printableAll(names))
		return nil
	})
	c.Long = `Remove blobs, all or none. Their bytes stay in the image until the space is
used again: in a sealed store nobody without the key can read them.`
	ref.flags(c)
	key.flags(c, "the ")
	return c
}
