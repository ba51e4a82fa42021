package nbd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"nvstore.dev/image"
)

// Device is an export of a server. It implements image.Device, Discarder,
// ZeroWriter and BlockStatuser.
type Device struct {
	target Target
	opts   *Options
	info   Info
	fua    bool // with every write: there is no flush
	piece  int64
	ledger ledger

	ctx    context.Context // ends with Close, for dialling
	cancel context.CancelFunc

	mu     sync.Mutex
	conn   *conn
	closed bool

	dialling sync.Mutex   // one goroutine reconnects, the others wait
	units    sync.RWMutex // held for writing while a part of a block is written
}

var _ interface {
	image.Device
	image.Discarder
	image.ZeroWriter
	image.BlockStatuser
} = (*Device)(nil)

// Open connects to the export that an NBD URI names; see ParseURI. ctx bounds
// the handshake only.
func Open(ctx context.Context, uri string, o *Options) (*Device, error) {
	t, err := ParseURI(uri)
	if err != nil {
		return nil, err
	}
	return OpenTarget(ctx, t, o)
}

// OpenTarget connects to an export. Errors are of the kinds of this package,
// image.ErrNotFound for an export that isn't there, image.ErrReadOnly and
// image.ErrUnsupported, or the system's for a server that isn't.
func OpenTarget(ctx context.Context, t *Target, o *Options) (*Device, error) {
	d := &Device{target: *t, opts: o.filled()}
	h, err := d.handshake(ctx)
	if err != nil {
		return nil, d.explain(err)
	}
	d.info = h.info
	if err := d.suits(); err != nil {
		return nil, errors.Join(d.explain(err), h.abort())
	}
	const piece = 1 << 20 // of a long request: many are under way at once
	d.piece = min(piece, d.info.MaxPayload)
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.conn = newConn(h, d.opts, &d.ledger)
	return d, nil
}

// explain puts the target in front of an error.
func (d *Device) explain(err error) error { return fmt.Errorf("%s: %w", &d.target, err) }

func (d *Device) handshake(ctx context.Context) (*haggler, error) {
	h, err := greet(ctx, &d.target, d.opts)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, d.opts.HandshakeTimeout)
	defer cancel()
	if err := h.within(ctx, func() error { return h.enter(d.target.Export) }); err != nil {
		if refused := (*refusal)(nil); errors.As(err, &refused) {
			return nil, errors.Join(err, h.abort())
		}
		return nil, errors.Join(err, h.nc.Close())
	}
	// What isn't a multiple of the smallest request can't be reached.
	h.info.Size &^= h.info.MinBlock - 1
	return h, nil
}

// suits tells whether the export can be used as the options ask.
func (d *Device) suits() error {
	switch {
	case d.opts.ReadOnly:
	case d.info.ReadOnly:
		return fmt.Errorf("nbd: the export: %w", image.ErrReadOnly)
	case !d.info.Flush && d.info.FUA:
		d.fua = true
	case !d.info.Flush:
		return fmt.Errorf("nbd: the server offers neither FLUSH nor FUA, so that nothing could be made durable: %w",
			image.ErrUnsupported)
	}
	return nil
}

// Info returns what the server said of the export.
func (d *Device) Info() Info { return d.info }

// Size returns the length in bytes, of whole blocks of the server's minimum.
func (d *Device) Size() int64 { return d.info.Size }

// use runs op on a connection, again on another if one was lost with nothing
// at stake.
func (d *Device) use(reading bool, op func(c *conn) error) error {
	const attempts = 4
	var err error
	for range attempts {
		if err := d.alive(reading); err != nil {
			return err
		}
		var c *conn
		if c, err = d.connection(); err != nil {
			break
		}
		if err = op(c); err == nil || !errors.Is(err, errUnsent) && !errors.Is(err, errLost) {
			return err
		}
		<-c.ended // then the ledger is right
	}
	if dead := d.alive(reading); dead != nil {
		return dead
	}
	if !errors.Is(err, ErrDisconnected) {
		err = fmt.Errorf("%w: %w", ErrDisconnected, err)
	}
	return d.explain(err)
}

// alive returns image.ErrClosed or image.ErrPoisoned.
func (d *Device) alive(reading bool) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return image.ErrClosed
	}
	return d.ledger.check(reading)
}

// connection returns the connection, or makes a new one.
func (d *Device) connection() (*conn, error) {
	d.mu.Lock()
	c := d.conn
	d.mu.Unlock()
	if !c.dead() {
		return c, nil
	}
	<-c.ended
	d.dialling.Lock()
	defer d.dialling.Unlock()
	d.mu.Lock()
	now := d.conn
	d.mu.Unlock()
	if now != c {
		return now, nil
	}
	// What was lost with the connection is known now, and so is whether
	// there is anything to go on with.
	if err := d.ledger.check(true); err != nil {
		return nil, err
	}
	if d.opts.Reconnect < 0 {
		return nil, fmt.Errorf("%w: %w", ErrDisconnected, c.why())
	}
	return d.redial(c.why())
}

// redial tries to connect until the time for it is over.
func (d *Device) redial(why error) (*conn, error) {
	ctx, cancel := context.WithTimeout(d.ctx, d.opts.Reconnect)
	defer cancel()
	for wait := 10 * time.Millisecond; ; wait = min(2*wait, time.Second) {
		h, err := d.handshake(ctx)
		if err == nil {
			return d.adopt(h)
		}
		why = err
		select {
		case <-time.After(wait):
			continue
		case <-ctx.Done():
		}
		return nil, fmt.Errorf("%w: %w", ErrDisconnected, why)
	}
}

// adopt goes on with a new connection, if it leads to the same export.
func (d *Device) adopt(h *haggler) (*conn, error) {
	is, was := h.info, d.info
	if is.Size != was.Size || is.MinBlock > was.MinBlock || is.MaxPayload < was.MaxPayload ||
		!d.opts.ReadOnly && (is.ReadOnly || was.Flush && !is.Flush || was.FUA && !is.FUA) {
		d.ledger.condemn(fmt.Errorf("the export is another after reconnecting: %d bytes, before %d", is.Size, was.Size))
		return nil, errors.Join(d.ledger.check(true), h.abort())
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, errors.Join(image.ErrClosed, h.abort())
	}
	d.conn = newConn(h, d.opts, &d.ledger)
	return d.conn, nil
}

// Close disconnects, without an implied Sync. Requests under way get a second
// to be answered.
func (d *Device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return image.ErrClosed
	}
	d.closed = true
	c := d.conn
	d.mu.Unlock()
	d.cancel()
	c.close()
	return nil
}

// transfer carries out a request of any length in pieces, several at once. at
// makes the request for n bytes from lo on, counted from the range's begin.
func transfer(c *conn, n, piece int64, at func(lo, n int64) request) error {
	if n <= piece {
		return c.do(at(0, n))
	}
	const window = 8
	var calls []*call
	var first error
	note := func(err error) {
		if first == nil {
			first = err
		}
	}
	oldest := func() {
		note(c.wait(calls[0]))
		calls = calls[1:]
	}
	for lo := int64(0); lo < n && first == nil; {
		k := min(piece, n-lo)
		// Only with empty hands may one wait for a free call: those who
		// hold some might all wait for each other.
		cl, err := c.send(at(lo, k), len(calls) == 0)
		if err != nil && err != errBusy {
			note(err)
			break
		}
		if err == nil {
			calls, lo = append(calls, cl), lo+k
		}
		if err == errBusy || len(calls) == window {
			oldest()
		}
	}
	for len(calls) > 0 {
		oldest()
	}
	return first
}

// ReadAt reads at off. Requests that a lost connection left unanswered are
// sent again.
func (d *Device) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, image.ErrOutOfRange
	}
	n := max(0, min(int64(len(p)), d.info.Size-off))
	if n == 0 {
		if err := d.alive(true); err != nil {
			return 0, err
		}
	} else if err := d.readParts(p[:n], off); err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return len(p), nil
}

// readParts reads whole blocks where p's ends aren't at blocks' ends.
func (d *Device) readParts(p []byte, off int64) error {
	unit := d.info.MinBlock
	for len(p) > 0 {
		skip, n := off&(unit-1), int64(len(p))
		if skip == 0 && n >= unit {
			n &^= unit - 1
			if err := d.readBlocks(p[:n], off); err != nil {
				return err
			}
		} else {
			block := make([]byte, unit)
			if err := d.readBlocks(block, off-skip); err != nil {
				return err
			}
			n = int64(copy(p, block[skip:]))
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (d *Device) readBlocks(p []byte, off int64) error {
	return d.use(true, func(c *conn) error {
		return transfer(c, int64(len(p)), d.piece, func(lo, n int64) request {
			return request{cmd: cmdRead, off: off + lo, n: n, into: p[lo : lo+n]}
		})
	})
}

// WriteAt writes at off, inside Size. A block of the server's minimum that is
// written in part is read, changed and written. After an error nobody knows
// what arrived.
func (d *Device) WriteAt(p []byte, off int64) (int, error) {
	return d.write(p, off, d.fua)
}

// WriteDurable is a WriteAt that is durable when it returns nil: with FUA, or
// where the server hasn't got that, with a Sync.
func (d *Device) WriteDurable(p []byte, off int64) (int, error) {
	n, err := d.write(p, off, d.info.FUA)
	if err != nil || d.info.FUA {
		return n, err
	}
	if err := d.Sync(); err != nil {
		return 0, err
	}
	return n, nil
}

func (d *Device) write(p []byte, off int64, fua bool) (int, error) {
	if err := d.writable(off, int64(len(p))); err != nil {
		return 0, err
	}
	if err := d.writeParts(p, off, fua); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (d *Device) writable(off, n int64) error {
	if d.opts.ReadOnly {
		if err := d.alive(true); err != nil {
			return err
		}
		return image.ErrReadOnly
	}
	if err := d.alive(false); err != nil {
		return err
	}
	return image.CheckRange(off, n, d.info.Size)
}

func (d *Device) writeParts(p []byte, off int64, fua bool) error {
	unit := d.info.MinBlock
	if (off|int64(len(p)))&(unit-1) == 0 {
		if unit > 1 {
			d.units.RLock()
			defer d.units.RUnlock()
		}
		return d.writeBlocks(p, off, fua)
	}
	d.units.Lock()
	defer d.units.Unlock()
	for len(p) > 0 {
		skip, n := off&(unit-1), int64(len(p))
		block := p[:n&^(unit-1)]
		if skip != 0 || n < unit {
			block = make([]byte, unit)
			if err := d.readBlocks(block, off-skip); err != nil {
				return err
			}
			n = int64(copy(block[skip:], p))
		} else {
			n = int64(len(block))
		}
		if err := d.writeBlocks(block, off-skip, fua); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

func (d *Device) writeBlocks(p []byte, off int64, fua bool) error {
	if len(p) == 0 {
		return nil
	}
	return d.use(false, func(c *conn) error {
		return transfer(c, int64(len(p)), d.piece, func(lo, n int64) request {
			return request{cmd: cmdWrite, flags: fuaFlag(fua), off: off + lo, n: n, data: p[lo : lo+n]}
		})
	})
}

func fuaFlag(on bool) uint16 {
	if on {
		return cmdFlagFUA
	}
	return 0
}

// Sync is a FLUSH: what was written before is durable when it returns nil.
func (d *Device) Sync() error {
	if d.opts.ReadOnly {
		return d.alive(true)
	}
	if d.fua {
		return d.alive(false)
	}
	return d.use(false, func(c *conn) error { return c.do(request{cmd: cmdFlush}) })
}
