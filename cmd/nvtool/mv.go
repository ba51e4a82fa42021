package main

import (
	"context"

	"github.com/spf13/cobra"
)

func (a *app) mvCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	c := a.verb("mv IMAGE OLD NEW", "Rename a blob", func(ctx context.Context, args []string) (err error) {
		args, err = ref.take(args, 2, 2, "OLD and NEW")
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
		if err := s.Rename(names[0], names[1]); err != nil {
			return a.explain(&ref, err)
		}
		a.sayf("%s is now %s", printable(names[0]), printable(names[1]))
		return nil
	})
	c.Long = "Rename a blob. NEW must be free. The content stays where it is, and nothing is encrypted anew."
	ref.flags(c)
	key.flags(c, "the ")
	return c
}
