package convert

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"

	"nvstore.dev/image"
)

// Options for Convert. Nil is the zero value: everything is copied, to a
// target that may hold anything.
type Options struct {
	// Workers is how many pieces are in flight, at most 64; 0 is 8, or
	// one a core where there are more, and with compression two more than
	// there are cores.
	Workers int

	// OutOfOrder lets pieces be written as they come. By default they are
	// written from the first to the last byte, so that a format that
	// allocates lays them out that way. Compressed pieces never wait.
	OutOfOrder bool

	// Sparse is how long a run of zeros in data must be, in bytes, not to
	// be written; 0 is 4096. A negative one looks for no zeros at all,
	// neither in data nor by block status, and writes everything.
	Sparse int64

	// Compressed writes whole clusters through the target's
	// CompressedWriter. One that doesn't shrink is written as it is.
	Compressed bool

	// Cluster is the target's unit of allocation in bytes, a power of two
	// up to 2 MiB; 0 is 4096. Runs of data and zeros are cut there.
	Cluster int64

	// TargetZero: the target reads as zeros throughout. It is of no
	// account where Layers is set.
	TargetZero bool

	// Layers, if positive, copies only what that many of the source's
	// uppermost layers decide, and leaves the target as it is where what
	// the source reads is up to those below.
	Layers int

	// Offload has the system copy data between files, where it can (see
	// RangeCopier). Zeros are known by block status alone then.
	Offload bool

	// Through makes each piece, of a MiB, durable before it counts as done.
	Through bool

	// Rate limits the reading of data, in bytes a second.
	Rate int64

	// Progress is told after each piece; done counts what was skipped
	// too, and isn't in order of place.
	Progress func(done, total int64)

	// Salvage is called with each block of 512 bytes or more of the
	// source that can't be read, and zeros are written in its place. Nil,
	// an error ends the conversion.
	Salvage func(off, n int64, err error)
}

// A CompressedWriter stores clusters compressed, if that makes them smaller, and
// returns how many bytes of p it took. p is whole clusters, up to the end of the
// device. Calls for different clusters may run side by side.
type CompressedWriter interface {
	WriteCompressed(p []byte, off int64) (int, error)
}

// A RangeCopier copies from some kinds of other devices without the data's passing
// through this process. It may share the space instead. What it can't do is an
// image.ErrUnsupported.
type RangeCopier interface {
	CopyRange(off int64, src image.Device, from, n int64) error
}

// Convert copies the content of src to the beginning of dst, which must be
// large enough; what it has beyond src stays. It neither syncs dst nor closes
// anything.
func Convert(ctx context.Context, dst, src image.Device, o *Options) error {
	c, err := newConverter(dst, src, o)
	if err != nil {
		return err
	}
	return c.walk.run(ctx, c.piece)
}

type converter struct {
	Options
	walk     walk
	dst, src image.Device
	blocks   *prober
	pack     CompressedWriter
	zeroes   image.ZeroWriter // nil: zeros are written
	unit     int64            // of looking for zeros
	offload  RangeCopier      // nil: data is read and written
	refused  atomic.Bool      // by it
}

func newConverter(dst, src image.Device, o *Options) (*converter, error) {
	if o == nil {
		o = &Options{}
	}
	c := &converter{Options: *o, dst: dst, src: src, blocks: newProber(src)}
	if c.Cluster == 0 {
		c.Cluster = 4096
	}
	if c.Cluster < 512 || c.Cluster > 2<<20 || c.Cluster&(c.Cluster-1) != 0 {
		return nil, fmt.Errorf("convert: a cluster of %d bytes: %w", c.Cluster, image.ErrOutOfRange)
	}
	if src.Size() > dst.Size() {
		return nil, fmt.Errorf("convert: the target has %d bytes, and the source %d: %w", dst.Size(), src.Size(), image.ErrNoSpace)
	}
	if c.Sparse == 0 {
		c.Sparse = 4096
	}
	c.TargetZero = c.TargetZero && c.Layers <= 0
	c.unit = min(4096, roundUp(max(c.Sparse, 1), 512))
	if c.Compressed {
		var ok bool
		if c.pack, ok = image.As[CompressedWriter](dst); !ok {
			return nil, fmt.Errorf("convert: compression: %w by the target's format", image.ErrUnsupported)
		}
	}
	if c.Offload && c.pack == nil && c.Salvage == nil {
		c.offload, _ = image.As[RangeCopier](dst)
	}
	if z, ok := image.As[image.ZeroWriter](dst); ok && c.Sparse > 0 {
		c.zeroes = z
	}
	size := src.Size()
	c.walk = walk{size: size, align: c.Cluster, workers: workers(c.Workers), limit: newLimiter(c.Rate),
		report: newReporter(c.Progress, size), status: c.next, whole: c.zeroes != nil, unit: pieceSize}
	if c.pack != nil {
		c.walk.unit = max(pieceSize, c.Cluster) // a cluster is packed whole
		if c.Workers <= 0 {
			// As many as can pack, and some to read meanwhile.
			c.walk.workers = min(runtime.GOMAXPROCS(0)+2, maxWorkers)
		}
	}
	return c, nil
}

// next is walk.status.
func (c *converter) next(off, n int64) (int64, action, error) {
	if c.Sparse < 0 && c.Layers <= 0 {
		return off + n, apply, nil
	}
	e, err := c.blocks.status(off, n)
	if err != nil {
		if c.Salvage != nil { // reading will tell which blocks
			return off + min(n, pieceSize), apply, nil
		}
		return 0, 0, err
	}
	end := e.Start + e.Length
	switch {
	case c.Layers > 0 && (e.Depth >= c.Layers || !e.Allocated && !e.Zero):
		return end, skip, nil
	case c.Sparse < 0:
		return end, apply, nil
	case e.Zero && c.TargetZero:
		return end, skip, nil
	case e.Zero:
		return end, zero, nil
	}
	return end, apply, nil
}

// offloaded tells whether the system copied the piece.
func (c *converter) offloaded(p *piece) (bool, error) {
	if c.offload == nil || p.zero || c.refused.Load() {
		return false, nil
	}
	err := c.offload.CopyRange(p.off, c.src, p.off, p.n)
	if errors.Is(err, image.ErrUnsupported) {
		c.refused.Store(true)
		return false, nil
	}
	return err == nil, err
}

func (c *converter) piece(ctx context.Context, p *piece, buf []byte) error {
	if done, err := c.offloaded(p); done || err != nil {
		if err == nil && c.Through {
			err = c.dst.Sync()
		}
		if err != nil {
			return fmt.Errorf("copying at byte %d: %w", p.off, err)
		}
		return nil
	}
	data := buf
	if !p.zero {
		data = buf[:p.n]
		if err := c.read(data, p.off); err != nil {
			return fmt.Errorf("reading at byte %d: %w", p.off, err)
		}
	}
	// Packing is what takes the time then, and must not wait.
	if !c.OutOfOrder && c.pack == nil {
		if err := p.wait(ctx); err != nil {
			return err
		}
	} else if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var err error
	switch {
	case p.zero:
		err = c.writeZeroes(p.off, p.n)
	case c.pack != nil:
		err = c.writeCompressed(data, p.off)
	default:
		err = c.write(data, p.off)
	}
	if err == nil && c.Through {
		err = c.dst.Sync()
	}
	if err != nil {
		return fmt.Errorf("writing at byte %d: %w", p.off, err)
	}
	return nil
}

// read reads a piece. With Salvage, what can't be read becomes zeros.
func (c *converter) read(p []byte, off int64) error {
	err := image.ReadFull(c.src, p, off)
	if err == nil || c.Salvage == nil {
		return err
	}
	if len(p) <= 512 {
		clear(p)
		c.Salvage(off, int64(len(p)), err)
		return nil
	}
	half := int(roundUp(int64(len(p)/2), 512))
	if err := c.read(p[:half], off); err != nil {
		return err
	}
	return c.read(p[half:], off+int64(half))
}

// write writes what isn't zeros.
func (c *converter) write(p []byte, off int64) error {
	if c.Sparse < 0 {
		_, err := c.dst.WriteAt(p, off)
		return err
	}
	for len(p) > 0 {
		data, zeros := c.split(p)
		if data > 0 {
			if _, err := c.dst.WriteAt(p[:data], off); err != nil {
				return err
			}
		}
		if zeros > 0 && !c.TargetZero {
			if err := c.writeZeroes(off+int64(data), int64(zeros)); err != nil {
				return err
			}
		}
		p, off = p[data+zeros:], off+int64(data+zeros)
	}
	return nil
}

// split returns the length of the data that p begins with, and of the run of
// zeros behind it, which is long enough to count or 0.
func (c *converter) split(p []byte) (data, zeros int) {
	unit := int(c.unit)
	run := 0 // of zeros, before at
	at := 0
	for at < len(p) {
		b := p[at:min(at+unit, len(p))]
		if isZero(b) {
			run += len(b)
		} else if int64(run) >= c.Sparse {
			break
		} else {
			run = 0
		}
		at += len(b)
	}
	// At the end of a piece a short run counts if the piece is nothing
	// else: the next one may go on with it.
	if int64(run) >= c.Sparse || run == len(p) {
		return at - run, run
	}
	return len(p), 0
}

func (c *converter) writeZeroes(off, n int64) error {
	if c.zeroes != nil {
		return c.zeroes.WriteZeroes(off, n)
	}
	for n > 0 {
		k := min(n, int64(len(zeros)))
		if _, err := c.dst.WriteAt(zeros[:k], off); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return nil
}

// writeCompressed writes whole clusters. Where the source ends within one that
// the target has more of, zeros follow.
func (c *converter) writeCompressed(p []byte, off int64) error {
	if rest := int64(len(p)) % c.Cluster; rest != 0 && off+int64(len(p)) < c.dst.Size() {
		pad := min(c.Cluster-rest, c.dst.Size()-off-int64(len(p)))
		p = append(p, zeros[:min(pad, int64(len(zeros)))]...)
		p = append(p, make([]byte, max(pad-int64(len(zeros)), 0))...)
	}
	for len(p) > 0 {
		n, empty := 0, false
		for n < len(p) {
			b := p[n:min(n+int(c.Cluster), len(p))]
			z := c.Sparse > 0 && isZero(b)
			if n > 0 && z != empty {
				break
			}
			n, empty = n+len(b), z
		}
		var err error
		switch {
		case !empty:
			_, err = c.pack.WriteCompressed(p[:n], off)
		case !c.TargetZero:
			err = c.writeZeroes(off, int64(n))
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

var zeros [64 << 10]byte

// isZero compares with zeros, which is what the standard library does fastest.
func isZero(p []byte) bool {
	for len(p) > len(zeros) {
		if !bytes.Equal(p[:len(zeros)], zeros[:]) {
			return false
		}
		p = p[len(zeros):]
	}
	return bytes.Equal(p, zeros[:len(p)])
}
