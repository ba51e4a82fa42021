package convert

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"time"

	"nvstore.dev/image"
)

const (
	pieceSize = 1 << 20
	// maxZeroPiece is what one request zeroes, so that progress shows and
	// an interrupt is heeded.
	maxZeroPiece   = 1 << 30
	defaultWorkers = 8
	maxWorkers     = 64
)

// An action is what is to be done with a run of bytes.
type action uint8

const (
	skip  action = iota // nothing
	zero                // it reads as zeros
	apply               // it must be read
)

// A piece is the unit of work.
type piece struct {
	off, n int64
	zero   bool

	turn <-chan struct{} // closed when all before it have done their part in order
	done chan struct{}
}

// wait waits until it is the piece's turn.
func (p *piece) wait(ctx context.Context) error {
	select {
	case <-p.turn:
		return context.Cause(ctx)
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A walk goes over [0, size) of a device.
type walk struct {
	size    int64
	align   int64 // pieces end at multiples of it, or at size
	unit    int64 // size of a piece
	workers int
	limit   *limiter
	report  *reporter

	// status tells what is to be done from off on, and for how long.
	status func(off, n int64) (int64, action, error)
	// whole tells that a run of zeros needs no pieces of 1 MiB.
	whole bool
}

// run calls work for the pieces, some at a time. Each worker has a buffer for
// one. The first error ends it.
func (w *walk) run(ctx context.Context, work func(ctx context.Context, p *piece, buf []byte) error) error {
	if w.unit == 0 {
		w.unit = pieceSize
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	pieces := make(chan *piece)
	var wg sync.WaitGroup
	for range w.workers {
		wg.Go(func() {
			var buf []byte
			for p := range pieces {
				if buf == nil && !(p.zero && w.whole) {
					buf = make([]byte, w.unit)
				}
				if err := work(ctx, p, buf); err != nil {
					cancel(err)
				}
				close(p.done)
				w.report.add(p.n)
			}
		})
	}
	err := w.plan(ctx, pieces)
	close(pieces)
	wg.Wait()
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// plan cuts the range into pieces.
func (w *walk) plan(ctx context.Context, pieces chan<- *piece) error {
	first := make(chan struct{})
	close(first)
	turn := (<-chan struct{})(first)
	emit := func(off, end int64, a action) error {
		for off < end {
			n := end - off
			switch {
			case a == skip:
			case a == zero && w.whole:
				n = min(n, maxZeroPiece)
			default:
				n = min(n, w.unit-off%w.unit)
			}
			if a == skip {
				w.report.add(n)
				off += n
				continue
			}
			if a == apply {
				if err := w.limit.wait(ctx, n); err != nil {
					return err
				}
			}
			p := &piece{off: off, n: n, zero: a == zero, turn: turn, done: make(chan struct{})}
			select {
			case pieces <- p:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
			turn = p.done
			off += n
		}
		return nil
	}
	var start int64
	pending := skip
	for off := int64(0); off < w.size; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		end, a, err := w.next(off)
		if err != nil {
			return err
		}
		if a != pending {
			if err := emit(start, off, pending); err != nil {
				return err
			}
			start, pending = off, a
		} else if a == apply && off-start >= 4*w.unit {
			// Work begins before a long run has been seen to its end.
			cut := off - off%w.unit
			if err := emit(start, cut, a); err != nil {
				return err
			}
			start = cut
		}
		off = end
	}
	return emit(start, w.size, pending)
}

// next returns where the run from off ends. What is only in part to be left
// alone counts as to be done.
func (w *walk) next(off int64) (int64, action, error) {
	end, a, err := w.status(off, w.size-off)
	if err != nil {
		return 0, 0, err
	}
	if end >= w.size {
		return w.size, a, nil
	}
	if a == apply {
		return min(roundUp(end, w.align), w.size), a, nil
	}
	if end -= end % w.align; end > off {
		return end, a, nil
	}
	return min(off+w.align, w.size), apply, nil
}

func roundUp(n, unit int64) int64 { return (n + unit - 1) / unit * unit }

// workers is how many pieces are in flight.
func workers(n int) int {
	if n <= 0 {
		n = max(defaultWorkers, runtime.GOMAXPROCS(0))
	}
	return min(n, maxWorkers)
}

// A prober asks a device for block status, if it tells. It keeps the last answer,
// as some take as long as the run that they describe. One goroutine uses it.
type prober struct {
	d    image.Device
	s    image.BlockStatuser // nil if it doesn't
	last image.Extent
}

func newProber(d image.Device) *prober {
	p := &prober{d: d}
	p.s, _ = image.As[image.BlockStatuser](d)
	return p
}

// status describes the bytes from off, at most n of them.
func (p *prober) status(off, n int64) (image.Extent, error) {
	if p.s == nil {
		return image.Extent{Start: off, Length: n, Allocated: true, Offset: -1}, nil
	}
	if off < p.last.Start || off >= p.last.Start+p.last.Length {
		// All that follows is asked for, not n bytes: see above.
		e, err := p.s.BlockStatus(off, p.d.Size()-off)
		if err == nil && (e.Start != off || e.Length <= 0) {
			err = errors.New("internal error: block status of other bytes than those asked for")
		}
		if err != nil {
			return image.Extent{}, fmt.Errorf("block status at byte %d: %w", off, err)
		}
		p.last = e
	}
	e := p.last
	if skipped := off - e.Start; e.Offset >= 0 {
		e.Offset += skipped
	}
	e.Length = min(n, e.Start+e.Length-off)
	e.Start = off
	return e, nil
}

// A limiter keeps work to a number of bytes a second. Nil, it doesn't.
type limiter struct {
	rate int64
	next time.Time
}

func newLimiter(rate int64) *limiter {
	if rate <= 0 {
		return nil
	}
	return &limiter{rate: rate}
}

// wait is called by one goroutine.
func (l *limiter) wait(ctx context.Context, n int64) error {
	if l == nil {
		return nil
	}
	now := time.Now()
	if l.next.Before(now) {
		l.next = now
	}
	d := l.next.Sub(now)
	l.next = l.next.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A reporter adds up what is done and tells it, one call at a time.
type reporter struct {
	mu          sync.Mutex
	tell        func(done, total int64)
	done, total int64
}

func newReporter(tell func(done, total int64), total int64) *reporter {
	if tell == nil {
		return nil
	}
	return &reporter{tell: tell, total: total}
}

func (r *reporter) add(n int64) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.done += n
	r.tell(r.done, r.total)
}
