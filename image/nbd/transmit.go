package nbd

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"nvstore.dev/image"
)

const (
	serverBuffer = 64 << 10  // read ahead of a client's requests
	pieceSize    = 256 << 10 // of a long request, in memory at once
	maxWorkers   = 16        // requests carried out at once, a connection
	inlineRead   = 128 << 10 // a longer one is left to a worker
	headSpace    = structuredLen + 8
	outSize      = pieceSize + headSpace
	shortReply   = 512 // bytes that hold any reply but those with data or extents

	// slow is from where on another goroutine carries a request out, so
	// that those behind it needn't wait. Below, handing over costs more
	// than it brings.
	slow = 50 * time.Microsecond
)

// A job is a request that is being carried out.
type job struct {
	cmd, flags uint16
	cookie     uint64
	off, n     int64
	data       []byte // of a write
	buf        []byte // a worker's: outSize bytes of payload or of a read's reply, and then a short reply
}

var jobs = sync.Pool{New: func() any { return &job{buf: make([]byte, outSize+shortReply)} }}

// A transmission is the part of a session behind the handshake.
//
// One goroutine, the reader, takes requests off the connection. While the
// Device is quick, it carries them out itself and sends the replies to all
// that have arrived with one write. Where the Device has been slow with
// requests of a kind, they go to workers.
type transmission struct {
	out  []byte // the reader's replies that weren't sent yet
	one  job    // the reader's
	work chan *job
	busy sync.WaitGroup
	crew int

	wmu    sync.Mutex // of the sending side
	broken atomic.Pointer[error]
	pace   [8]atomic.Int64 // nanoseconds that requests of a kind take, of late

	now     atomic.Int64 // ticks, from 1 on
	sending atomic.Int64 // tick when a send began; 0 if none is under way
	taking  atomic.Int64 // the same of a payload that is being read
	asked   atomic.Int64 // tick of the last request
}

// transmit serves requests until one side ends it.
func (c *session) transmit() error {
	c.out = make([]byte, 0, outSize)
	c.work = make(chan *job)
	c.now.Store(1)
	c.asked.Store(1)
	period := max(c.server.opts.StallTimeout/ticks, time.Millisecond)
	stop := every(period, func() bool { return c.overdue(period) })
	defer stop()
	err := c.requests()
	close(c.work)
	c.busy.Wait()
	c.flushOut()
	if why := c.broken.Load(); why != nil && !errors.Is(err, errBye) {
		return *why
	}
	return err
}

// every calls fn again and again, until it returns false or is stopped.
func every(period time.Duration, fn func() bool) (stop func()) {
	var mu sync.Mutex
	over := false
	mu.Lock()
	defer mu.Unlock()
	var timer *time.Timer
	timer = time.AfterFunc(period, func() {
		mu.Lock()
		defer mu.Unlock()
		if !over && fn() {
			timer.Reset(period)
		}
	})
	return func() {
		mu.Lock()
		defer mu.Unlock()
		over = true
		timer.Stop()
	}
}

// overdue cuts the connection if the client stalls. It tells whether to look
// again.
func (c *session) overdue(period time.Duration) bool {
	now := c.now.Add(1)
	for _, begun := range []int64{c.sending.Load(), c.taking.Load()} {
		if begun != 0 && now-begun > ticks {
			c.fail(fmt.Errorf("%w: the client neither sends nor reads", ErrTimeout))
			return false
		}
	}
	if idle := c.server.opts.IdleTimeout; idle > 0 && time.Duration(now-c.asked.Load())*period > idle {
		c.fail(fmt.Errorf("%w: the client was idle", ErrTimeout))
		return false
	}
	return true
}

// fail cuts the connection for a reason.
func (c *session) fail(err error) {
	if c.broken.CompareAndSwap(nil, &err) {
		_ = c.raw.Close()
	}
}

// send sends a reply, or several.
func (c *session) send(p []byte) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	if c.broken.Load() != nil {
		return
	}
	c.sending.Store(c.now.Load())
	_, err := c.nc.Write(p)
	c.sending.Store(0)
	if err != nil {
		c.fail(err)
	}
}

func (c *session) flushOut() {
	if len(c.out) > 0 {
		c.send(c.out)
		c.out = c.out[:0]
	}
}

// await makes n bytes lie in the read buffer, if n is no more than that holds.
// What was answered is sent before waiting.
func (c *session) await(n int) ([]byte, error) {
	if c.br.Buffered() < n {
		c.flushOut()
	}
	return c.br.Peek(n)
}

func (c *session) requests() error {
	for {
		h, err := c.await(requestLen)
		if err != nil {
			if err == io.EOF && len(h) > 0 {
				return io.ErrUnexpectedEOF
			}
			return err
		}
		if m := be.Uint32(h); m != magicRequest {
			return violation("request", "magic", m, "0x25609513")
		}
		j := &c.one
		j.flags, j.cmd = be.Uint16(h[4:]), be.Uint16(h[6:])
		j.cookie = be.Uint64(h[8:])
		off, n := be.Uint64(h[16:]), int64(be.Uint32(h[24:]))
		_, _ = c.br.Discard(requestLen)
		c.asked.Store(c.now.Load())
		if j.cmd == cmdDisc {
			return errBye
		}
		j.off, j.n = int64(off&(1<<63-1)), n
		if err := c.request(j, off); err != nil {
			return err
		}
	}
}

// request checks one request and has it carried out.
func (c *session) request(j *job, off uint64) error {
	if code, why := c.valid(j, off); code != 0 {
		if j.cmd == cmdWrite {
			if err := c.taken(int(j.n), func() error { _, err := io.CopyN(io.Discard, c.br, j.n); return err }); err != nil {
				return err
			}
		}
		c.out = c.failure(c.room(shortReply), j, code, why)
		return nil
	}
	worker := time.Duration(c.pace[j.class()].Load()) > slow
	switch {
	case j.cmd == cmdWrite && j.n > pieceSize:
		return c.longWrite(j)
	case j.cmd == cmdWrite && j.n > serverBuffer, j.cmd == cmdRead && j.n > inlineRead:
		worker = true
	}
	if worker {
		return c.hand(j)
	}
	if j.cmd == cmdWrite {
		// The bytes stay where they were read.
		if err := c.taken(int(j.n), func() (err error) {
			j.data, err = c.br.Peek(int(j.n))
			return err
		}); err != nil {
			return err
		}
	}
	c.out = c.timed(c.room(headSpace+int(j.n)), j)
	if j.cmd == cmdWrite {
		_, _ = c.br.Discard(int(j.n))
		j.data = nil
	}
	return nil
}

// room returns the unsent replies, with space for n bytes more where n is a
// short read's.
func (c *session) room(n int) []byte {
	if len(c.out)+n > cap(c.out) {
		c.flushOut()
	}
	return c.out
}

// class groups requests that take about as long.
func (j *job) class() int {
	if j.flags&cmdFlagFUA != 0 {
		return cmdFlush
	}
	return int(j.cmd)
}

// timed is serve, and keeps the pace.
func (c *session) timed(out []byte, j *job) []byte {
	begun := time.Now()
	out = c.serve(out, j)
	pace := &c.pace[j.class()]
	was := pace.Load()
	pace.Store(was + (int64(time.Since(begun))-was)/8)
	return out
}

// taken reads what a client has begun to send, of which n bytes may lie in the
// buffer.
func (c *session) taken(n int, read func() error) error {
	if c.br.Buffered() >= n {
		return read()
	}
	c.flushOut()
	c.taking.Store(c.now.Load())
	err := read()
	c.taking.Store(0)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// hand gives a request to a worker, with its payload, and waits if all are
// busy.
func (c *session) hand(j *job) error {
	w := jobs.Get().(*job)
	buf := w.buf
	*w = *j
	w.buf = buf
	if w.cmd == cmdWrite {
		w.data = w.buf[:w.n]
		if err := c.taken(int(w.n), func() error { _, err := io.ReadFull(c.br, w.data); return err }); err != nil {
			jobs.Put(w)
			return err
		}
	}
	select {
	case c.work <- w:
		return nil
	default:
	}
	if c.crew < maxWorkers {
		c.crew++
		c.busy.Go(func() { c.labour(w) })
		return nil
	}
	c.flushOut()
	c.work <- w
	return nil
}

// labour is a worker's life.
func (c *session) labour(j *job) {
	for ok := true; ok; j, ok = <-c.work {
		switch {
		case j.cmd == cmdRead && j.n > inlineRead && c.structured && j.flags&cmdFlagDF == 0:
			c.longRead(j)
		case j.cmd == cmdRead && j.n > pieceSize:
			c.send(c.serveLarge(j))
		case j.cmd == cmdRead:
			c.send(c.timed(j.buf[:0], j))
		default:
			c.send(c.timed(j.buf[outSize:outSize], j)) // behind the payload
		}
		j.data = nil
		jobs.Put(j)
	}
}

// serveLarge is serve for a read that must be answered in one piece. Few are
// under way at once, in all connections together.
func (c *session) serveLarge(j *job) []byte {
	c.server.large <- struct{}{}
	defer func() { <-c.server.large }()
	return c.serve(make([]byte, 0, headSpace+j.n), j)
}

// longWrite takes a payload piece by piece.
func (c *session) longWrite(j *job) error {
	w := jobs.Get().(*job)
	defer jobs.Put(w)
	var failed error
	for off, left := j.off, j.n; left > 0; {
		p := w.buf[:min(left, pieceSize)]
		if err := c.taken(len(p), func() error { _, err := io.ReadFull(c.br, p); return err }); err != nil {
			return err
		}
		if failed == nil {
			_, failed = c.export.Device.WriteAt(p, off)
		}
		off, left = off+int64(len(p)), left-int64(len(p))
	}
	if failed == nil && j.flags&cmdFlagFUA != 0 {
		failed = c.sync()
	}
	c.out = c.outcome(c.room(shortReply), j, failed)
	return nil
}

// longRead answers a read in chunks, and leaves out what is a hole.
func (c *session) longRead(j *job) {
	status, sparse := image.As[image.BlockStatuser](c.export.Device)
	for off, end := j.off, j.off+j.n; off < end; {
		n, zero := min(end-off, pieceSize), false
		if sparse {
			if e, err := status.BlockStatus(off, end-off); err == nil && e.Length > 0 {
				// Not for a few bytes: a chunk costs as much.
				if zero = e.Zero && e.Length >= 4096; zero {
					n = min(e.Length, end-off)
				} else {
					n = min(n, max(e.Length, 4096))
				}
			}
		}
		flags := uint16(0)
		if off+n == end {
			flags = replyDone
		}
		p := j.buf[:headSpace]
		if zero {
			putChunk(p, flags, chunkHole, j.cookie, 12)
			be.PutUint64(p[structuredLen:], uint64(off))
			p = be.AppendUint32(p, uint32(n))
		} else {
			p = p[:headSpace+n]
			if err := image.ReadFull(c.export.Device, p[headSpace:], off); err != nil {
				c.send(c.outcome(p[:0], j, err))
				return
			}
			putChunk(p, flags, chunkData, j.cookie, uint32(n)+8)
			be.PutUint64(p[structuredLen:], uint64(off))
		}
		c.send(p)
		off += n
	}
}
