package nbd

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// errLost marks what came of a connection that ended: the request may have
// been carried out, or not.
var errLost = errors.New("the connection was lost")

// errUnsent is for a request that never went out, because the connection had
// ended before.
var errUnsent = errors.New("not sent")

// errBusy: all calls are in use.
var errBusy = errors.New("all calls are in use")

// A call is one request under way. A connection has a fixed number of them,
// which bounds the requests in flight.
type call struct {
	cmd    uint16
	flags  uint16
	active bool // sent, and not done; under conn.mu
	index  uint32
	uses   uint32 // makes each cookie another, so that late replies are noticed
	tick   uint32 // when it was sent
	off    int64
	n      int64
	buf    []byte // of a read: where the data goes; nobody else touches it meanwhile
	mark   uint64 // of a flush: the writes that were complete before

	got    coverage
	chunks int
	status uint32 // of a block status: flags and length of the extent
	extent int64
	err    error
	done   chan struct{} // one token
}

// cookie names the call on the wire.
func (cl *call) cookie() uint64 { return uint64(cl.uses)<<32 | uint64(cl.index) }

func (cl *call) remote(code uint32, message string) error {
	err := &RemoteError{Op: opName(cl.cmd), Off: cl.off, N: cl.n, Code: code, Message: message}
	if code == errShutdown {
		return fmt.Errorf("%w: %w", errLost, err) // another connection may do
	}
	return err
}

// writes tells whether the server's content changes by the call.
func (cl *call) writes() bool {
	return cl.cmd == cmdWrite || cl.cmd == cmdWriteZeroes || cl.cmd == cmdTrim
}

// A conn is one connection in transmission. Requests are written by whoever
// makes them. Replies are read by one goroutine at a time, so that a server that
// must send before it reads on can't block both sides: by whoever made the
// requests, if they were all there are and have all gone out, and otherwise by
// a goroutine of its own. On another goroutine an answer arrives a fifth later.
type conn struct {
	nc      net.Conn
	raw     net.Conn // below TLS: closing it never waits
	br      *bufio.Reader
	idle    *listener // nil: somebody reads at all times
	info    Info
	allocID uint32
	ledger  *ledger
	free    chan *call
	ended   chan struct{} // closed when the reader is gone and all calls are done

	wmu  sync.Mutex // of the sending side
	hdr  [maxBatch * requestLen]byte
	iov  [2 * maxBatch][]byte
	bufs net.Buffers

	mu      sync.Mutex
	calls   []*call
	active  int  // calls that are
	reading bool // by somebody; if nobody does, nothing is active
	over    bool // nothing may be sent any more

	tick    atomic.Uint32
	watch   *time.Timer
	limit   uint32 // ticks that a call may take; 0 is no limit
	failure atomic.Pointer[error]
	scratch [structuredLen + 16]byte // of the reader
}

// wholeRead is up to which length a read is asked for in one piece, which every
// server that can do that at all must grant. Otherwise QEMU looks for holes
// first.
const wholeRead = 64 << 10

// ticks are how many parts a timeout is measured in.
const ticks = 8

func newConn(h *haggler, o *Options, l *ledger) *conn {
	c := &conn{nc: h.nc, raw: h.raw, br: h.br, info: h.info, allocID: h.allocID, ledger: l,
		free: make(chan *call, o.InFlight), ended: make(chan struct{}), calls: make([]*call, o.InFlight)}
	for i := range c.calls {
		c.calls[i] = &call{index: uint32(i), done: make(chan struct{}, 1)}
		c.free <- c.calls[i]
	}
	if o.RequestTimeout > 0 {
		period := max(o.RequestTimeout/ticks, time.Millisecond)
		c.limit = ticks + 1
		c.mu.Lock()
		c.watch = time.AfterFunc(period, func() { c.overdue(period) })
		c.mu.Unlock()
	}
	if c.idle = newListener(c.nc); c.idle == nil {
		c.reading = true
		go c.read()
	}
	return c
}

// overdue ends the connection if a call takes too long.
func (c *conn) overdue(period time.Duration) {
	now := c.tick.Add(1)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over {
		return
	}
	for _, cl := range c.calls {
		if cl.active && now-cl.tick >= c.limit {
			c.fail(fmt.Errorf("%w: no answer to %s of %d bytes at %d", ErrTimeout, opName(cl.cmd), cl.n, cl.off))
			return
		}
	}
	c.watch.Reset(period)
}

// fail closes the connection for a reason. The reader does the rest.
func (c *conn) fail(err error) {
	if c.failure.CompareAndSwap(nil, &err) {
		_ = c.raw.Close()
	}
}

// dead tells whether the connection is of no use any more.
func (c *conn) dead() bool { return c.failure.Load() != nil }

// why returns what the connection ended by.
func (c *conn) why() error {
	if err := c.failure.Load(); err != nil {
		return *err
	}
	return errLost
}

// A request is what send sends.
type request struct {
	cmd, flags uint16
	off, n     int64
	data       []byte // of a write
	into       []byte // of a read
}

// take gets a free call for a request, or nil if there is none. With patience
// it waits for one.
func (c *conn) take(r request, patient bool) *call {
	var cl *call
	select {
	case cl = <-c.free:
	default:
		if !patient {
			return nil
		}
		cl = <-c.free // calls come back when the connection ends, too
	}
	cl.cmd, cl.flags, cl.off, cl.n, cl.buf = r.cmd, r.flags, r.off, r.n, r.into
	if r.cmd == cmdRead && r.n <= wholeRead && c.info.DontFragment && c.info.Structured {
		cl.flags |= cmdFlagDF
	}
	cl.uses++
	cl.err, cl.chunks, cl.extent = nil, 0, 0
	cl.got.reset()
	return cl
}

// header puts the request that a call is for into p.
func (cl *call) header(p []byte) {
	be.PutUint32(p, magicRequest)
	be.PutUint16(p[4:], cl.flags)
	be.PutUint16(p[6:], cl.cmd)
	be.PutUint64(p[8:], cl.cookie())
	be.PutUint64(p[16:], uint64(cl.off))
	be.PutUint32(p[24:], uint32(cl.n))
}

// send begins a request. The call it returns must be waited for. The error is
// errUnsent, or without patience errBusy, or there is none: what goes wrong
// later shows in the call.
func (c *conn) send(r request, patient bool) (*call, error) {
	cl := c.take(r, patient)
	if cl == nil {
		return nil, errBusy
	}
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.claim() {
		go c.read()
	}
	active := c.activate(cl)
	if c.begin() { // who read has just rested
		go c.read()
	}
	if !active {
		c.free <- cl
		return nil, errUnsent
	}
	cl.header(c.hdr[:])
	if !c.transmit(append(c.iov[:0], c.hdr[:requestLen]), r.data) {
		c.recall(cl)
		return nil, errUnsent
	}
	return cl, nil
}

// transmit sends what was put together, and a last piece. It reports false if
// the connection had ended already, so that none of it went out. Under c.wmu.
func (c *conn) transmit(iov [][]byte, data []byte) bool {
	if len(data) > 0 {
		iov = append(iov, data)
	}
	c.bufs = iov
	n, err := c.bufs.WriteTo(c.nc)
	clear(c.iov[:])
	if err != nil {
		c.fail(fmt.Errorf("%w: %w", errLost, err))
	}
	return err == nil || n > 0 || c.nc != c.raw // TLS may have sent a part of a record
}

// recall takes back calls that were not sent. Under c.wmu.
func (c *conn) recall(calls ...*call) {
	for _, cl := range calls {
		c.mu.Lock()
		answered := !cl.active // a server may well answer what it wasn't asked
		if !answered {
			cl.active = false
			c.active--
		}
		c.mu.Unlock()
		if answered {
			<-cl.done
		}
		c.free <- cl
	}
}

// maxBatch is how many requests go out by one write.
const maxBatch = 16

// exchange begins as many of the requests as there are free calls for, in order
// and by one write, and waits for them. It returns how many these were, with
// errs for each. It waits for the first call, and for no other: of those who
// hold some, each might wait for what the next one holds. The error is that of
// the connection, errUnsent or errLost.
func (c *conn) exchange(rs []request, errs []error) (int, error) {
	var room [maxBatch]*call
	calls := room[:0]
	for i, r := range rs[:min(len(rs), maxBatch)] {
		cl := c.take(r, i == 0)
		if cl == nil {
			break
		}
		calls = append(calls, cl)
	}
	sent, mine, err := c.sendAll(calls, rs)
	if mine {
		c.readFor(calls[:sent])
	}
	// The last one's answer is likely to be the last: whoever waits for that
	// one first is woken once.
	for i := sent - 1; i >= 0; i-- {
		if errs[i] = c.wait(calls[i]); errors.Is(errs[i], errLost) {
			err = errs[i]
		}
	}
	return sent, err
}

// sendAll sends the requests that calls are for. It returns how many, which is
// all or comes with errUnsent, and whether it is the caller's turn to read.
func (c *conn) sendAll(calls []*call, rs []request) (sent int, mine bool, err error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	mine = c.claim()
	iov, from := c.iov[:0], 0 // of hdr, what isn't in iov yet
	for i, cl := range calls {
		if !c.activate(cl) {
			// None will be any more: those before it end with the connection.
			for _, cl := range calls[i:] {
				c.free <- cl
			}
			return i, mine || c.begin(), errUnsent
		}
		end := (i + 1) * requestLen
		cl.header(c.hdr[end-requestLen : end])
		if len(rs[i].data) > 0 || i+1 == len(calls) {
			iov = append(iov, c.hdr[from:end])
			from = end
		}
		if len(rs[i].data) > 0 && i+1 < len(calls) {
			iov = append(iov, rs[i].data)
		}
	}
	mine = mine || c.begin() // who read has just rested
	if !c.transmit(iov, rs[len(calls)-1].data) {
		c.recall(calls...)
		return 0, mine, errUnsent
	}
	return len(calls), mine, nil
}

func (c *conn) activate(cl *call) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over || c.dead() {
		return false
	}
	if cl.cmd == cmdFlush {
		cl.mark = c.ledger.mark()
	}
	cl.active, cl.tick = true, c.tick.Load()
	c.active++
	return true
}

// wait returns how a call ended, and lets go of it.
func (c *conn) wait(cl *call) error {
	<-cl.done
	err := cl.err
	cl.buf = nil
	c.free <- cl
	return err
}

// status asks for the first extent of a range.
func (c *conn) status(off, n int64) (flags uint32, length int64, err error) {
	cl, err := c.send(request{cmd: cmdBlockStatus, flags: cmdFlagReqOne, off: off, n: n}, true)
	if err != nil {
		return 0, 0, err
	}
	<-cl.done
	cl.done <- struct{}{} // for wait
	flags, length = cl.status, cl.extent
	return flags, length, c.wait(cl)
}

// do is a request from begin to end.
func (c *conn) do(r request) error {
	var errs [1]error
	if _, err := c.exchange([]request{r}, errs[:]); err != nil {
		return err
	}
	return errs[0]
}

// finish ends a call with the server's answer. Only who reads calls it.
func (c *conn) finish(cl *call) {
	c.mu.Lock()
	cl.active = false
	c.active--
	c.mu.Unlock()
	c.ledger.answered(cl)
	cl.done <- struct{}{}
}

// end is the last act of who reads.
func (c *conn) end(err error) {
	c.fail(err)
	c.wmu.Lock() // whoever was sending knows by now whether anything went out
	c.mu.Lock()
	c.over = true
	if c.watch != nil {
		c.watch.Stop()
	}
	var left []*call
	writes := false
	for _, cl := range c.calls {
		if cl.active {
			cl.active = false
			left = append(left, cl)
			writes = writes || cl.writes()
		}
	}
	c.active = 0
	c.mu.Unlock()
	c.wmu.Unlock()
	err = c.why()
	// First the ledger: whoever is woken must find out what was lost.
	c.ledger.lost(writes, err)
	for _, cl := range left {
		cl.err = fmt.Errorf("%w: %w", errLost, err)
		cl.done <- struct{}{}
	}
	close(c.ended)
}

// quiet tells whether nothing is in flight.
func (c *conn) quiet() bool { return len(c.free) == cap(c.free) }

// close takes leave. Requests in flight get a moment to be answered.
func (c *conn) close() {
	const grace = time.Second
	for begun := time.Now(); !c.quiet() && !c.dead() && time.Since(begun) < grace; {
		time.Sleep(time.Millisecond)
	}
	if !c.dead() && c.wmu.TryLock() {
		_ = c.nc.SetWriteDeadline(time.Now().Add(grace))
		var p [requestLen]byte
		be.PutUint32(p[:], magicRequest)
		be.PutUint16(p[6:], cmdDisc)
		_, _ = c.nc.Write(p[:])
		c.wmu.Unlock()
	}
	c.fail(errLost)
	if c.begin() {
		c.end(errLost) // nobody else will
	}
	<-c.ended
}
