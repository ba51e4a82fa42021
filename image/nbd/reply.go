package nbd

import (
	"fmt"
	"io"
	"slices"
)

// reply reads one simple reply, or one chunk of a structured one. An error
// ends the connection.
func (c *conn) reply() error {
	p := c.scratch[:simpleLen]
	if _, err := io.ReadFull(c.br, p); err != nil {
		return err
	}
	switch m := be.Uint32(p); m {
	case magicSimple:
		return c.simple(be.Uint32(p[4:]), be.Uint64(p[8:]))
	case magicStructured:
		if !c.info.Structured {
			return violation("reply", "magic", m, "a simple reply: structured ones weren't negotiated")
		}
		if _, err := io.ReadFull(c.br, c.scratch[simpleLen:structuredLen]); err != nil {
			return err
		}
		p = c.scratch[:structuredLen]
		return c.chunk(be.Uint16(p[4:]), be.Uint16(p[6:]), be.Uint64(p[8:]), be.Uint32(p[16:]))
	default:
		return violation("reply", "magic", m, "that of a reply")
	}
}

// find returns the call that a cookie names.
func (c *conn) find(cookie uint64) (*call, error) {
	if i := uint32(cookie); int(i) < len(c.calls) {
		cl := c.calls[i]
		c.mu.Lock()
		defer c.mu.Unlock()
		if cl.active && cl.cookie() == cookie {
			return cl, nil
		}
	}
	return nil, violation("reply", "cookie", cookie, "that of a request in flight")
}

func (c *conn) simple(code uint32, cookie uint64) error {
	cl, err := c.find(cookie)
	if err != nil {
		return err
	}
	switch {
	case c.info.Structured && (cl.cmd == cmdRead || cl.cmd == cmdBlockStatus && code == 0):
		return violation("reply", "magic", uint32(magicSimple), "a structured reply to "+opName(cl.cmd))
	case cl.chunks > 0:
		return violation("reply", "magic", uint32(magicSimple), "the rest of a structured reply")
	case code != 0:
		cl.err = cl.remote(code, "")
	case cl.cmd == cmdRead:
		if _, err := io.ReadFull(c.br, cl.buf); err != nil {
			return err
		}
	}
	c.finish(cl)
	return shutdown(code)
}

// shutdown ends the connection as the protocol asks of a client that is told
// that the server goes.
func shutdown(code uint32) error {
	if code == errShutdown {
		return fmt.Errorf("%w: the server is shutting down", ErrDisconnected)
	}
	return nil
}

// maxChunks bounds a reply's chunks: a server should cut at sectors only.
func maxChunks(n int64) int { return int(n/512) + 64 }

func (c *conn) chunk(flags, typ uint16, cookie uint64, n uint32) error {
	cl, err := c.find(cookie)
	if err != nil {
		return err
	}
	if cl.chunks++; cl.chunks > maxChunks(cl.n) {
		return violation("reply", "chunks", cl.chunks, "fewer for such a request")
	}
	var code uint32
	switch typ {
	case chunkNone:
		if n != 0 || flags&replyDone == 0 {
			return violation("chunk", "type", typ, "NONE to be empty, and the last")
		}
	case chunkData:
		err = c.data(cl, n)
	case chunkHole:
		err = c.hole(cl, n)
	case chunkStatus:
		err = c.blockStatus(cl, n)
	default:
		if typ&chunkErrorBit == 0 {
			return violation("chunk", "type", typ, "one that was negotiated")
		}
		code, err = c.errorChunk(cl, typ, n)
	}
	if err != nil || flags&replyDone == 0 {
		return err
	}
	if cl.err == nil {
		switch {
		case cl.cmd == cmdRead && !cl.got.all(cl.n):
			return violation("reply", "data", nil, "all that was asked for")
		case cl.cmd == cmdBlockStatus && cl.extent == 0:
			return violation("reply", "block status", nil, "base:allocation, which was negotiated")
		}
	}
	c.finish(cl)
	return shutdown(code)
}

// place checks that [off, off+n) is a part of a read that was asked for and
// hasn't come yet.
func (cl *call) place(off uint64, n int64) ([]byte, error) {
	rel := int64(off) - cl.off
	if cl.cmd != cmdRead || n < 1 || off > 1<<63-1 || rel < 0 || rel > cl.n || n > cl.n-rel {
		return nil, violation("chunk", "range", off, "inside a read's")
	}
	if !cl.got.add(rel, n) {
		return nil, violation("chunk", "range", off, "one that wasn't sent before")
	}
	return cl.buf[rel : rel+n], nil
}

func (c *conn) data(cl *call, n uint32) error {
	if n < 9 {
		return violation("chunk", "length", n, "at least 9 of data")
	}
	p := c.scratch[:8]
	if _, err := io.ReadFull(c.br, p); err != nil {
		return err
	}
	dst, err := cl.place(be.Uint64(p), int64(n)-8)
	if err != nil {
		return err
	}
	_, err = io.ReadFull(c.br, dst)
	return err
}

func (c *conn) hole(cl *call, n uint32) error {
	if n != 12 {
		return violation("chunk", "length", n, "12 of a hole")
	}
	p := c.scratch[:12]
	if _, err := io.ReadFull(c.br, p); err != nil {
		return err
	}
	dst, err := cl.place(be.Uint64(p), int64(be.Uint32(p[8:])))
	clear(dst)
	return err
}

// blockStatus takes the first extent: requests ask for one.
func (c *conn) blockStatus(cl *call, n uint32) error {
	if cl.cmd != cmdBlockStatus || n != 12 || cl.extent != 0 {
		return violation("chunk", "length", n, "one extent, once, in answer to a block status")
	}
	p := c.scratch[:12]
	if _, err := io.ReadFull(c.br, p); err != nil {
		return err
	}
	if id := be.Uint32(p); id != c.allocID {
		return violation("chunk", "context", id, fmt.Sprintf("%d, of base:allocation", c.allocID))
	}
	cl.extent, cl.status = int64(be.Uint32(p[4:])), be.Uint32(p[8:])
	if cl.extent < 1 || cl.extent > cl.n {
		return violation("chunk", "extent", cl.extent, "one byte or more, inside the request's range")
	}
	return nil
}

// errorChunk keeps the first error of a reply.
func (c *conn) errorChunk(cl *call, typ uint16, n uint32) (code uint32, err error) {
	fixed := uint32(6)
	if typ == chunkErrorOffset {
		fixed = 14
	}
	if n < fixed || n > maxOptReply {
		return 0, violation("chunk", "length", n, "that of an error")
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(c.br, p); err != nil {
		return 0, err
	}
	code = be.Uint32(p)
	said := uint32(be.Uint16(p[4:]))
	switch {
	case said > n-fixed || said > maxString:
		return 0, violation("chunk", "message length", said, "inside the chunk, and at most 4096")
	case code == 0:
		return 0, violation("chunk", "error", code, "one")
	}
	if cl.err == nil {
		cl.err = cl.remote(code, clip(p[6:6+said]))
	}
	return code, nil
}

// A coverage tells which bytes of a read have come: spans [lo, hi) in order,
// that don't touch.
type coverage struct {
	spans [][2]int64
}

func (g *coverage) reset() {
	if cap(g.spans) > 64 {
		g.spans = nil // one read's many chunks aren't kept for ever
	}
	g.spans = g.spans[:0]
}

func (g *coverage) all(n int64) bool {
	return n == 0 || len(g.spans) == 1 && g.spans[0] == [2]int64{0, n}
}

// add reports false if a part of [lo, lo+n) is there already.
func (g *coverage) add(lo, n int64) bool {
	hi := lo + n
	i, _ := slices.BinarySearchFunc(g.spans, lo, func(s [2]int64, lo int64) int {
		if s[0] < lo {
			return -1
		}
		return 1
	})
	left := i > 0 && g.spans[i-1][1] == lo
	right := i < len(g.spans) && g.spans[i][0] == hi
	switch {
	case i > 0 && g.spans[i-1][1] > lo, i < len(g.spans) && g.spans[i][0] < hi:
		return false
	case left && right:
		g.spans[i-1][1] = g.spans[i][1]
		g.spans = slices.Delete(g.spans, i, i+1)
	case left:
		g.spans[i-1][1] = hi
	case right:
		g.spans[i][0] = lo
	default:
		g.spans = slices.Insert(g.spans, i, [2]int64{lo, hi})
	}
	return true
}
