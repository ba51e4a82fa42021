package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
)

func (a *app) getCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	var output string
	c := a.verb("get IMAGE NAME [-o FILE]", "Read a blob", func(ctx context.Context, args []string) error {
		return a.get(ctx, &ref, &key, args, output)
	})
	c.Long = `Write a blob's content to standard output or to FILE, which appears, or
replaces the one there was, only when all of it was read and verified. Blobs of
up to 16 MiB are verified before the first byte goes to standard output.`
	ref.flags(c)
	ref.previousFlag(c)
	key.flags(c, "the ")
	c.Flags().StringVarP(&output, "output", "o", "", "write to `FILE`")
	return c
}

func (a *app) get(ctx context.Context, ref *imageRef, key *keyFlags, args []string, output string) (err error) {
	args, err = ref.take(args, 1, 1, "one NAME")
	if err != nil {
		return err
	}
	names, err := canonical(args)
	if err != nil {
		return err
	}
	s, err := a.open(ctx, ref, key, reading)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	err = s.View(func(tx *nvstore.Tx) error {
		e, err := tx.Stat(names[0])
		if err != nil {
			return err
		}
		toFile := output != "" && output != "-"
		if !toFile && e.Size <= 16<<20 {
			p, err := tx.Get(names[0], 0)
			if err != nil {
				return err
			}
			return a.writeBytes("", p)
		}
		if !toFile && isTerminal(a.out) {
			return errBinary()
		}
		return a.writeOutput(output, func(w io.Writer) error { return a.stream(ctx, tx, &e, w) })
	})
	return a.explain(ref, err)
}

// stream copies a blob in pieces.
func (a *app) stream(ctx context.Context, tx *nvstore.Tx, e *nvstore.Entry, w io.Writer) error {
	bar := a.bar(e.Name, e.Size)
	defer bar.end()
	buf := make([]byte, putPiece)
	for off := int64(0); off < e.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(int64(len(buf)), e.Size-off)
		if _, err := tx.ReadAt(e.Name, buf[:n], off); err != nil {
			return err
		}
		if _, err := w.Write(buf[:n]); err != nil {
			return err
		}
		off += n
		bar.set(off, e.Size)
	}
	return nil
}
