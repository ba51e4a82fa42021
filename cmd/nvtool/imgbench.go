package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
)

type benchFlags struct {
	ref                imgRef
	count, depth       int
	size, step, offset string
	pattern            uint8
	flush              int
	write              bool
}

func (a *app) imgBenchCmd() *cobra.Command {
	var o benchFlags
	c := a.verb("bench IMAGE [-c COUNT] [-d DEPTH] [-s SIZE] [-w]", "Time reads or writes of an image",
		func(ctx context.Context, args []string) error {
			if _, err := o.ref.take(args, 0, 0, ""); err != nil {
				return err
			}
			return a.imgBench(ctx, &o)
		})
	c.Long = `Send COUNT requests of SIZE bytes, DEPTH of them at a time, each STEP bytes
behind the one before and again from the start where the disk ends, and say how
long they took. With -w they are writes, and what the image holds there is lost.`
	o.ref.flags(c)
	a.outputFlag(c)
	f := c.Flags()
	f.IntVarP(&o.count, "count", "c", 75000, "requests")
	f.IntVarP(&o.depth, "depth", "d", 64, "requests in flight, at most 1024")
	f.StringVarP(&o.size, "buffer-size", "s", "4k", "`SIZE` of a request")
	f.StringVarP(&o.step, "step-size", "S", "", "`BYTES` from one request to the next (default: SIZE)")
	f.StringVarP(&o.offset, "offset", "o", "0", "`BYTE` to begin at")
	f.Uint8Var(&o.pattern, "pattern", 0, "byte to write")
	f.IntVar(&o.flush, "flush-interval", 0, "with -w: sync after each `N` requests")
	f.BoolVarP(&o.write, "write", "w", false, "write; what is there is lost")
	return c
}

// A benchRun is what is done and what it took.
type benchRun struct {
	Operation string  `json:"operation"`
	Requests  int     `json:"requests"`
	Size      int64   `json:"request-size"`
	Depth     int     `json:"depth"`
	Seconds   float64 `json:"seconds"`
	PerSecond float64 `json:"requests-per-second"`
	MiBs      float64 `json:"mib-per-second"`
	P50       float64 `json:"latency-p50-us"`
	P99       float64 `json:"latency-p99-us"`

	offset, step int64
	flush        int
	pattern      byte
}

func (o *benchFlags) run() (*benchRun, error) {
	r := &benchRun{Operation: "read", Requests: o.count, Depth: o.depth, flush: o.flush, pattern: o.pattern}
	if o.write {
		r.Operation = "write"
	}
	var err error
	if r.Size, err = parseImgSize(o.size); err != nil {
		return nil, err
	}
	r.step = r.Size
	if o.step != "" {
		if r.step, err = parseImgSize(o.step); err != nil {
			return nil, err
		}
	}
	if r.offset, err = parseImgSize(o.offset); err != nil {
		return nil, err
	}
	switch {
	case o.count < 1, o.depth < 1, o.depth > 1024:
		return nil, invalidf("-c %d -d %d: at least one request, and 1 to 1024 in flight", o.count, o.depth)
	case r.Size < 1 || r.Size > 64<<20 || r.Size*int64(o.depth) > 1<<30:
		return nil, invalidf("-s %s -d %d: requests of 1 byte to 64 MiB, and 1 GiB in flight at most", o.size, o.depth)
	case o.flush < 0, o.flush > 0 && !o.write:
		return nil, usagef("--flush-interval needs -w and a number")
	}
	return r, nil
}

func (a *app) imgBench(ctx context.Context, o *benchFlags) (err error) {
	r, err := o.run()
	if err != nil {
		return err
	}
	dev, err := a.openImg(ctx, &o.ref, !o.write)
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	if r.offset > dev.Size()-r.Size {
		return invalidf("-o %d: the disk has %d bytes", r.offset, dev.Size())
	}
	if !a.json {
		a.sayf("Sending %d %s requests, %d bytes each, %d in parallel (starting at offset %d, step size %d)",
			r.Requests, r.Operation, r.Size, r.Depth, r.offset, r.step)
	}
	if err := r.measure(ctx, dev); err != nil {
		return a.explain(&o.ref.imageRef, err)
	}
	if a.json {
		return a.printJSON(r)
	}
	a.sayf("Run completed in %.3f seconds.", r.Seconds)
	a.sayf("%.0f requests and %.1f MiB a second; half took %.0f µs or less, 99 %% took %.0f µs or less", r.PerSecond, r.MiBs, r.P50, r.P99)
	return nil
}

func (r *benchRun) measure(ctx context.Context, dev image.Device) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	took := make([]time.Duration, r.Requests)
	var next atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	for range r.Depth {
		wg.Go(func() {
			buf := make([]byte, r.Size)
			for i := range buf {
				buf[i] = r.pattern
			}
			for {
				i := int(next.Add(1) - 1)
				if i >= r.Requests || ctx.Err() != nil {
					return
				}
				begin := time.Now()
				if err := r.request(dev, buf, i); err != nil {
					cancel(err)
					return
				}
				took[i] = time.Since(begin)
			}
		})
	}
	wg.Wait()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if r.Operation == "write" {
		if err := dev.Sync(); err != nil {
			return err
		}
	}
	r.Seconds = time.Since(start).Seconds()
	r.PerSecond = float64(r.Requests) / r.Seconds
	r.MiBs = r.PerSecond * float64(r.Size) / (1 << 20)
	slices.Sort(took)
	r.P50 = float64(took[len(took)/2]) / float64(time.Microsecond)
	r.P99 = float64(took[len(took)*99/100]) / float64(time.Microsecond)
	return nil
}

func (r *benchRun) request(dev image.Device, buf []byte, i int) error {
	// Places wrap around as qemu-img's do: behind the last whole request.
	room := dev.Size() - r.Size - r.offset
	off := r.offset
	if room > 0 && r.step > 0 {
		per := room/r.step + 1
		off += int64(i) % per * r.step
	}
	if r.Operation == "read" {
		_, err := dev.ReadAt(buf, off)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return err
	}
	if _, err := dev.WriteAt(buf, off); err != nil {
		return err
	}
	if r.flush > 0 && (i+1)%r.flush == 0 {
		if err := dev.Sync(); err != nil {
			return fmt.Errorf("sync: %w", err)
		}
	}
	return nil
}
