package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"nvstore.dev/image"
)

// CompareOptions for Compare. Nil is the zero value.
type CompareOptions struct {
	// Strict also takes another size, and blocks that are stored in
	// another way (in the image or not, as zeros or not), for differences.
	Strict bool

	// A and B describe the layers of the two, for Strict; see Run.
	A, B []Layer

	Workers  int                     // as Options has it
	Progress func(done, total int64) // as Options has it
}

// A Difference is what Compare found first.
type Difference struct {
	// Kind is "size", "status" or "content".
	Kind string `json:"kind"`

	// Offset is the first byte that differs, or the first of the run
	// whose status does. Of sizes it is the smaller one.
	Offset int64 `json:"offset"`
}

// Compare returns the first place where a and b differ, or nil. Where one is
// longer than the other, what it has more must read as zeros.
func Compare(ctx context.Context, a, b image.Device, o *CompareOptions) (*Difference, error) {
	if o == nil {
		o = &CompareOptions{}
	}
	c := &comparer{CompareOptions: *o, a: a, b: b, blocksA: newProber(a), blocksB: newProber(b),
		short: min(a.Size(), b.Size())}
	if o.Strict && a.Size() != b.Size() {
		return &Difference{"size", c.short}, nil
	}
	size := max(a.Size(), b.Size())
	w := walk{size: size, align: 1, workers: workers(o.Workers), report: newReporter(o.Progress, size), status: c.next}
	if err := w.run(ctx, c.piece); err != nil && err != errFound {
		return nil, err
	}
	return c.found, nil
}

type comparer struct {
	CompareOptions
	a, b             image.Device
	blocksA, blocksB *prober
	short            int64

	mu    sync.Mutex
	found *Difference
}

// errFound ends the walk.
var errFound = errors.New("found a difference")

// next compares by status where that is enough.
func (c *comparer) next(off, n int64) (int64, action, error) {
	if off >= c.short {
		longer := c.blocksA
		if c.b.Size() > c.a.Size() {
			longer = c.blocksB
		}
		e, err := longer.status(off, n)
		if err != nil {
			return 0, 0, err
		}
		if e.Zero {
			return e.Start + e.Length, skip, nil
		}
		return e.Start + e.Length, apply, nil
	}
	n = c.short - off
	ea, err := c.blocksA.status(off, n)
	if err != nil {
		return 0, 0, err
	}
	eb, err := c.blocksB.status(off, n)
	if err != nil {
		return 0, 0, err
	}
	end := min(ea.Start+ea.Length, eb.Start+eb.Length)
	if c.Strict {
		ra, rb := newRun(ea, c.A), newRun(eb, c.B)
		if ra.Present != rb.Present || ra.Zero != rb.Zero || ra.Data != rb.Data {
			c.report(&Difference{"status", off})
			return 0, 0, errFound
		}
	}
	if ea.Zero && eb.Zero {
		return end, skip, nil
	}
	return end, apply, nil
}

// report keeps the difference that comes first.
func (c *comparer) report(d *Difference) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.found == nil || d.Offset < c.found.Offset {
		c.found = d
	}
}

// piece compares the content. A difference ends the walk, and those before it
// go on to their ends.
func (c *comparer) piece(ctx context.Context, p *piece, buf []byte) error {
	at, err := c.differ(p, buf)
	if err != nil {
		return err
	}
	if at >= 0 {
		c.report(&Difference{"content", at})
		return errFound
	}
	return nil
}

// differ returns the first byte of the piece that differs, or -1.
func (c *comparer) differ(p *piece, buf []byte) (int64, error) {
	const half = 128 << 10 // both fit a core's cache
	for off := p.off; off < p.off+p.n; {
		n := min(half, p.off+p.n-off)
		pa, err := readPart(c.a, buf[:n], off)
		if err != nil {
			return 0, fmt.Errorf("reading the first image at byte %d: %w", off, err)
		}
		pb, err := readPart(c.b, buf[half:][:n], off)
		if err != nil {
			return 0, fmt.Errorf("reading the second image at byte %d: %w", off, err)
		}
		if !bytes.Equal(pa, pb) {
			for i := range pa {
				if pa[i] != pb[i] {
					return off + int64(i), nil
				}
			}
		}
		off += n
	}
	return -1, nil
}

// readPart reads at off, and zeros past the end.
func readPart(d image.Device, p []byte, off int64) ([]byte, error) {
	n := max(0, min(int64(len(p)), d.Size()-off))
	clear(p[n:])
	if n == 0 {
		return p, nil
	}
	return p, image.ReadFull(d, p[:n], off)
}
