package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/convert"
)

func (a *app) imgMapCmd() *cobra.Command {
	var ref imgRef
	var start, length string
	c := a.verb("map IMAGE", "Show where an image's data lies", func(ctx context.Context, args []string) error {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		return a.imgMap(ctx, &ref, start, length)
	})
	c.Long = `Show which parts of the disk are stored, in which layer, and where in its file.
For people only data that lies uncompressed in a file is listed; --output=json
has all runs.`
	ref.flags(c)
	ref.shareFlag(c)
	a.outputFlag(c)
	c.Flags().StringVar(&start, "start-offset", "0", "the first `BYTE` to show")
	c.Flags().StringVar(&length, "max-length", "", "how many `BYTES` to show")
	return c
}

func (a *app) imgMap(ctx context.Context, ref *imgRef, start, length string) (err error) {
	dev, err := a.openImg(ctx, ref, true)
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	off, err := parseImgSize(start)
	if err != nil {
		return err
	}
	n := dev.Size() - off
	if length != "" {
		max, err := parseImgSize(length)
		if err != nil {
			return err
		}
		n = min(n, max)
	}
	if off > dev.Size() {
		return invalidf("--start-offset %s: the disk has %d bytes", start, dev.Size())
	}
	out := bufio.NewWriter(a.out)
	show := showRun
	if a.json {
		show = encodeRun
	} else {
		fmt.Fprintf(out, "%-15s %-15s %-15s %s\n", "Offset", "Length", "Mapped to", "File")
	}
	first := true
	layers, err := a.layers(ctx, ref, dev)
	if err != nil {
		return err
	}
	err = convert.Map(ctx, dev, layers, off, n, func(r convert.Run) error {
		err := show(out, &r, first)
		first = false
		return err
	})
	if a.json && err == nil {
		if first {
			out.WriteString("[")
		}
		out.WriteString("]\n")
	}
	return a.explain(&ref.imageRef, errors.Join(err, out.Flush()))
}

// encodeRun writes a run as qemu-img does, one a line.
func encodeRun(w *bufio.Writer, r *convert.Run, first bool) error {
	s := ",\n"
	if first {
		s = "["
	}
	w.WriteString(s)
	plain := *r
	plain.Filename = "" // qemu-img has it for people only
	p, err := json.Marshal(&plain)
	if err != nil {
		return err
	}
	_, err = w.Write(p)
	return err
}

func showRun(w *bufio.Writer, r *convert.Run, _ bool) error {
	if !r.Data || r.Zero {
		return nil
	}
	if r.Offset == nil {
		return withHint(fmt.Errorf("at byte %d there is data that doesn't lie in a file as it is: %w", r.Start, image.ErrUnsupported),
			"--output=json shows compressed and encrypted clusters too")
	}
	_, err := fmt.Fprintf(w, "%#-15x %#-15x %#-15x %s\n", r.Start, r.Length, *r.Offset, printable(r.Filename))
	return err
}
