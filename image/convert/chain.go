package convert

import (
	"bytes"
	"context"
	"fmt"

	"nvstore.dev/image"
)

// RebaseOptions for Rebase. Nil is the zero value.
type RebaseOptions struct {
	Cluster  int64                   // top's, as Options has it
	Progress func(done, total int64) // as Options has it
}

// Rebase copies into top what top reads from the layers below it where below,
// which is to take their place, reads otherwise. With below nil, that is
// everything but zeros. Top reads the same as before at any time, and once it
// is synced also with below in place.
func Rebase(ctx context.Context, top, below image.Device, o *RebaseOptions) error {
	if o == nil {
		o = &RebaseOptions{}
	}
	cluster := o.Cluster
	if cluster == 0 {
		cluster = 4096
	}
	if cluster < 512 || cluster > 2<<20 || cluster&(cluster-1) != 0 {
		return fmt.Errorf("rebase: a cluster of %d bytes: %w", cluster, image.ErrOutOfRange)
	}
	r := &rebaser{top: top, below: below, blocks: newProber(top), cluster: cluster}
	if r.below != nil {
		r.blocksBelow = newProber(below)
	}
	r.zeroes, _ = image.As[image.ZeroWriter](top)
	w := walk{size: top.Size(), align: cluster, workers: workers(0), report: newReporter(o.Progress, top.Size()), status: r.next}
	return w.run(ctx, r.piece)
}

type rebaser struct {
	top, below          image.Device
	blocks, blocksBelow *prober
	zeroes              image.ZeroWriter
	cluster             int64
}

// next leaves alone what top has itself, and what reads as zeros on either
// side.
func (r *rebaser) next(off, n int64) (int64, action, error) {
	e, err := r.blocks.status(off, n)
	if err != nil {
		return 0, 0, err
	}
	end := e.Start + e.Length
	if e.Allocated && e.Depth == 0 {
		return end, skip, nil
	}
	if !e.Zero {
		return end, apply, nil
	}
	if r.below == nil || off >= r.below.Size() {
		return end, skip, nil
	}
	end = min(end, r.below.Size())
	b, err := r.blocksBelow.status(off, end-off)
	if err != nil {
		return 0, 0, err
	}
	if b.Zero {
		return b.Start + b.Length, skip, nil
	}
	return b.Start + b.Length, apply, nil
}

func (r *rebaser) piece(ctx context.Context, p *piece, buf []byte) error {
	const half = pieceSize / 2
	for off := p.off; off < p.off+p.n; {
		n := min(half, p.off+p.n-off)
		if err := r.part(ctx, buf[:n], buf[half:][:n], off); err != nil {
			return fmt.Errorf("rebase at byte %d: %w", off, err)
		}
		off += n
	}
	return nil
}

// part writes the clusters of [off, off+len(is)) that differ. Top keeps its own
// clusters, which a piece may have at its ends.
func (r *rebaser) part(ctx context.Context, is, below []byte, off int64) error {
	if err := image.ReadFull(r.top, is, off); err != nil {
		return err
	}
	clear(below)
	if r.below != nil {
		if _, err := readPart(r.below, below, off); err != nil {
			return err
		}
	}
	for at := 0; at < len(is); {
		n := min(int(r.cluster-(off+int64(at))%r.cluster), len(is)-at)
		for at+n < len(is) && !r.same(is, below, at) && !r.same(is, below, at+n) {
			n = min(n+int(r.cluster), len(is)-at)
		}
		if !r.same(is, below, at) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if err := r.write(is[at:at+n], off+int64(at)); err != nil {
				return err
			}
		}
		at += n
	}
	return nil
}

// same compares the cluster at index at.
func (r *rebaser) same(is, below []byte, at int) bool {
	end := min(at+int(r.cluster), len(is))
	return bytes.Equal(is[at:end], below[at:end])
}

func (r *rebaser) write(p []byte, off int64) error {
	if r.zeroes != nil && isZero(p) {
		return r.zeroes.WriteZeroes(off, int64(len(p)))
	}
	_, err := r.top.WriteAt(p, off)
	return err
}

// An Emptier drops everything that is stored in an image itself, so that it
// reads as what lies below it. A crash leaves the image as it was or empty.
type Emptier interface{ Empty() error }

// CommitOptions for Commit. Nil is the zero value: one layer, which is emptied.
type CommitOptions struct {
	// Layers is how many of top's layers, from the top, go into base; 0
	// is 1. Base is the layer below them.
	Layers int

	// Keep leaves top as it is. With more than one layer it must be set:
	// an empty top would show what lies between.
	Keep bool

	Cluster  int64                   // base's, as Options has it
	Rate     int64                   // as Options has it
	Progress func(done, total int64) // as Options has it
}

// Commit writes what is stored in the layers of top above base into base,
// which grows if it is the smaller one, syncs it, and only then empties top.
// Top reads the same at any time.
func Commit(ctx context.Context, top, base image.Device, o *CommitOptions) error {
	if o == nil {
		o = &CommitOptions{}
	}
	layers := max(o.Layers, 1)
	if layers > 1 && !o.Keep {
		return fmt.Errorf("commit of %d layers, which would empty one of them: %w", layers, image.ErrUnsupported)
	}
	var e Emptier
	if !o.Keep {
		var ok bool
		if e, ok = image.As[Emptier](top); !ok {
			return fmt.Errorf("commit: emptying the image: %w by its format", image.ErrUnsupported)
		}
	}
	if base.Size() < top.Size() {
		r, ok := image.As[image.Resizer](base)
		if !ok {
			return fmt.Errorf("commit: growing the backing file: %w by its format", image.ErrUnsupported)
		}
		if err := r.Resize(top.Size()); err != nil {
			return fmt.Errorf("commit: growing the backing file: %w", err)
		}
	}
	if err := Convert(ctx, base, top, &Options{Layers: layers, Cluster: o.Cluster, Rate: o.Rate, Progress: o.Progress}); err != nil {
		return err
	}
	if err := base.Sync(); err != nil {
		return err
	}
	if o.Keep {
		return nil
	}
	return e.Empty()
}
