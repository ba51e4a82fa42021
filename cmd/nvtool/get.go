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
	var unverified bool
	c := a.verb("get IMAGE NAME [-o FILE]", "Read a blob", func(ctx context.Context, args []string) error {
		return a.get(ctx, &ref, &key, args, output, unverified)
	})
	c.Long = `Write a blob's content to standard output or to FILE, which appears, or
replaces the one there was, only when all of it was read and verified. Blobs of
up to 16 MiB are verified before the first byte goes to standard output. A live
extent that is attached is read with --unverified only, as it is at this moment.`
	ref.flags(c)
	ref.previousFlag(c)
	key.flags(c, "the ")
	c.Flags().BoolVar(&unverified, "unverified", false, "read a live extent as it is, attached or damaged")
	c.Flags().StringVarP(&output, "output", "o", "", "write to `FILE`")
	return c
}

func (a *app) get(ctx context.Context, ref *imageRef, key *keyFlags, args []string, output string, unverified bool) (err error) {
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
		read := tx.ReadAt
		if unverified && e.Live {
			read = tx.Peek
			a.warnf("%s is a live extent, and what is read of it isn't verified", printable(e.Name))
		}
		toFile := output != "" && output != "-"
		if !toFile && e.Size <= 16<<20 {
			p := make([]byte, e.Size)
			if _, err := read(names[0], p, 0); err != nil && err != io.EOF {
				return err
			}
			return a.writeBytes("", p)
		}
		if !toFile && isTerminal(a.out) {
			return errBinary()
		}
		return a.writeOutput(output, func(w io.Writer) error { return a.stream(ctx, read, &e, w) })
	})
	return a.explain(ref, err)
}

// stream copies a blob in pieces.
func (a *app) stream(ctx context.Context, read func(string, []byte, int64) (int, error), e *nvstore.Entry, w io.Writer) error {
	bar := a.bar(e.Name, e.Size)
	defer bar.end()
	buf := make([]byte, putPiece)
	for off := int64(0); off < e.Size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(int64(len(buf)), e.Size-off)
		if _, err := read(e.Name, buf[:n], off); err != nil {
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
