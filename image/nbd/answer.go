package nbd

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// maxExtents bounds the answer to a block status.
const maxExtents = 1024

// valid returns the error that a request is refused with, or 0.
func (c *session) valid(j *job, off uint64) (code uint32, why string) {
	x := c.export
	known := [...]uint16{
		cmdRead: cmdFlagFUA, cmdWrite: cmdFlagFUA, cmdFlush: cmdFlagFUA, cmdTrim: cmdFlagFUA, cmdCache: cmdFlagFUA,
		cmdWriteZeroes: cmdFlagFUA | cmdFlagNoHole | cmdFlagFastZero, cmdBlockStatus: cmdFlagFUA | cmdFlagReqOne,
	}
	if int(j.cmd) >= len(known) {
		return errInvalid, "unknown command"
	}
	flags := known[j.cmd]
	if j.cmd == cmdRead && c.structured {
		flags |= cmdFlagDF
	}
	if j.flags&^flags != 0 {
		return errInvalid, "unknown flag"
	}
	if j.cmd == cmdFlush {
		return 0, ""
	}
	changes := j.cmd == cmdWrite || j.cmd == cmdTrim || j.cmd == cmdWriteZeroes
	mask := uint64(x.MinBlock - 1)
	switch {
	case changes && x.ReadOnly:
		return errPerm, "the export is read-only"
	case off > uint64(x.size) || j.n > x.size-int64(off):
		if j.cmd == cmdWrite || j.cmd == cmdWriteZeroes {
			return errNoSpace, "past the end of the export"
		}
		return errInvalid, "past the end of the export"
	case off&mask != 0 || uint64(j.n)&mask != 0:
		return errInvalid, "not a multiple of the minimum block size"
	case j.n > int64(x.MaxPayload) && j.cmd == cmdRead && c.structured:
		return errOverflow, "longer than the maximum payload"
	case j.n > int64(x.MaxPayload) && (j.cmd == cmdRead || j.cmd == cmdWrite):
		return errInvalid, "longer than the maximum payload"
	case j.cmd == cmdBlockStatus && (!c.hasMeta || c.meta != x.Name):
		return errInvalid, "no meta context was chosen for this export"
	case j.cmd == cmdBlockStatus && j.n == 0:
		return errInvalid, "a range of no bytes"
	}
	return 0, ""
}

// serve carries a valid request out and appends the reply to out, which has
// room for what a read returns.
func (c *session) serve(out []byte, j *job) []byte {
	d := c.export.Device
	var err error
	switch j.cmd {
	case cmdRead:
		return c.serveRead(out, j)
	case cmdWrite:
		err = c.serveWrite(j)
	case cmdFlush:
		err = c.sync()
	case cmdTrim:
		if t, ok := image.As[image.Discarder](d); ok && j.n > 0 {
			err = t.Discard(j.off, j.n)
		}
	case cmdWriteZeroes:
		err = c.serveZeroes(j)
	case cmdBlockStatus:
		return c.serveStatus(out, j)
	case cmdCache:
		err = c.serveCache(j)
	}
	if err == nil && j.flags&cmdFlagFUA != 0 && (j.cmd == cmdTrim || j.cmd == cmdWriteZeroes) {
		err = c.sync()
	}
	return c.outcome(out, j, err)
}

// sync makes durable what was written. Many who want that at once share one.
func (c *session) sync() error {
	if c.export.ReadOnly {
		return nil // nothing was written by this name
	}
	return c.export.flusher.sync(c.export.Device.Sync)
}

func (c *session) serveRead(out []byte, j *job) []byte {
	head := simpleLen
	if c.structured {
		head = headSpace
		if j.n == 0 {
			return c.outcome(out, j, nil)
		}
	}
	at := len(out)
	p := out[at : at+head+int(j.n)]
	if err := image.ReadFull(c.export.Device, p[head:], j.off); err != nil {
		return c.outcome(out, j, err)
	}
	if c.structured {
		putChunk(p, replyDone, chunkData, j.cookie, uint32(j.n)+8)
		be.PutUint64(p[structuredLen:], uint64(j.off))
	} else {
		putSimple(p, 0, j.cookie)
	}
	return out[:at+len(p)]
}

// A durableWriter has a write that is durable by itself, as our client has.
type durableWriter interface {
	WriteDurable(p []byte, off int64) (int, error)
}

func (c *session) serveWrite(j *job) error {
	if j.flags&cmdFlagFUA == 0 {
		_, err := c.export.Device.WriteAt(j.data, j.off)
		return err
	}
	if w, ok := c.export.Device.(durableWriter); ok {
		_, err := w.WriteDurable(j.data, j.off)
		return err
	}
	if _, err := c.export.Device.WriteAt(j.data, j.off); err != nil {
		return err
	}
	return c.sync()
}

// nulls are what is written where a Device can't zero.
var nulls [64 << 10]byte

// serveZeroes zeroes a range. Only a Device's own way is fast, and only
// writing is sure to leave no hole.
func (c *session) serveZeroes(j *job) error {
	z, ok := image.As[image.ZeroWriter](c.export.Device)
	if ok && j.flags&cmdFlagNoHole == 0 {
		err := z.WriteZeroes(j.off, j.n)
		if !errors.Is(err, image.ErrUnsupported) || j.flags&cmdFlagFastZero != 0 {
			return err
		}
	} else if j.flags&cmdFlagFastZero != 0 {
		return image.ErrUnsupported
	}
	for off, left := j.off, j.n; left > 0; {
		if c.broken.Load() != nil {
			return image.ErrClosed // nobody waits for it
		}
		p := nulls[:min(left, int64(len(nulls)))]
		if _, err := c.export.Device.WriteAt(p, off); err != nil {
			return err
		}
		off, left = off+int64(len(p)), left-int64(len(p))
	}
	return nil
}

// serveCache reads a range, so that it lies in some cache.
func (c *session) serveCache(j *job) error {
	w := jobs.Get().(*job)
	defer jobs.Put(w)
	for off, left := j.off, min(j.n, maxPayload); left > 0; {
		p := w.buf[:min(left, pieceSize)]
		if err := image.ReadFull(c.export.Device, p, off); err != nil {
			return err
		}
		off, left = off+int64(len(p)), left-int64(len(p))
	}
	return nil
}

// serveStatus answers with extents of base:allocation.
func (c *session) serveStatus(out []byte, j *job) []byte {
	at := len(out)
	out = append(out, make([]byte, structuredLen)...)
	out = be.AppendUint32(out, contextID)
	limit := maxExtents
	if j.flags&cmdFlagReqOne != 0 {
		limit = 1
	}
	var length, state uint32
	for off, end := j.off, j.off+j.n; off < end; {
		n, s, err := c.extent(off, end-off)
		if err != nil {
			return c.outcome(out[:at], j, err)
		}
		if length > 0 && s != state {
			out = be.AppendUint32(be.AppendUint32(out, length), state)
			length = 0
			if limit--; limit == 0 {
				break
			}
		}
		length, state, off = length+uint32(n), s, off+n
	}
	if length > 0 {
		out = be.AppendUint32(be.AppendUint32(out, length), state)
	}
	putChunk(out[at:], replyDone, chunkStatus, j.cookie, uint32(len(out)-at-structuredLen))
	return out
}

// extent returns the length and the state of the run at off, in whole blocks.
func (c *session) extent(off, n int64) (int64, uint32, error) {
	b, ok := image.As[image.BlockStatuser](c.export.Device)
	if !ok {
		return n, 0, nil
	}
	e, err := b.BlockStatus(off, n)
	if errors.Is(err, image.ErrUnsupported) {
		return n, 0, nil
	}
	if err != nil {
		return 0, 0, err
	}
	length := min(e.Length, n)
	if unit := int64(c.export.MinBlock); length < n {
		if length &^= unit - 1; length == 0 {
			return unit, 0, nil // a block that is one thing and another
		}
	}
	state := uint32(0)
	if e.Zero {
		state = stateZero
		if !e.Allocated {
			state |= stateHole
		}
	}
	return length, state, nil
}

// outcome appends the reply that says how a request without an answer went, or
// that it failed.
func (c *session) outcome(out []byte, j *job, err error) []byte {
	if err == nil {
		at := len(out)
		if c.structured && j.cmd == cmdRead {
			out = append(out, make([]byte, structuredLen)...)
			putChunk(out[at:], replyDone, chunkNone, j.cookie, 0)
			return out
		}
		out = append(out, make([]byte, simpleLen)...)
		putSimple(out[at:], 0, j.cookie)
		return out
	}
	code, why := errorCode(err)
	if code == errNotSup && j.flags&cmdFlagFastZero == 0 {
		code = errInvalid // ENOTSUP has one meaning
	}
	if code != errNotSup {
		c.server.report(c.peer, fmt.Errorf("nbd: export %.64q: %s of %d bytes at %d: %w", c.export.Name, opName(j.cmd), j.n, j.off, err))
	}
	return c.failure(out, j, code, why)
}

// failure appends a reply with an error.
func (c *session) failure(out []byte, j *job, code uint32, why string) []byte {
	at := len(out)
	if !c.structured {
		out = append(out, make([]byte, simpleLen)...)
		putSimple(out[at:], code, j.cookie)
		return out
	}
	out = append(out, make([]byte, structuredLen)...)
	out = be.AppendUint32(out, code)
	out = be.AppendUint16(out, uint16(len(why)))
	out = append(out, why...)
	putChunk(out[at:], replyDone, chunkError, j.cookie, uint32(6+len(why)))
	return out
}

// errorCode says of an error what concerns a client. The rest, which may name
// files, it isn't told.
func errorCode(err error) (code uint32, why string) {
	for _, k := range []struct {
		kind error
		code uint32
	}{
		{image.ErrNoSpace, errNoSpace}, {image.ErrReadOnly, errPerm}, {image.ErrOutOfRange, errInvalid},
		{image.ErrUnsupported, errNotSup}, {image.ErrClosed, errShutdown}, {image.ErrPoisoned, errIO}, {image.ErrCorrupt, errIO},
	} {
		if errors.Is(err, k.kind) {
			return k.code, k.kind.Error()
		}
	}
	return errIO, ""
}

func putSimple(p []byte, code uint32, cookie uint64) {
	be.PutUint32(p, magicSimple)
	be.PutUint32(p[4:], code)
	be.PutUint64(p[8:], cookie)
}

func putChunk(p []byte, flags, typ uint16, cookie uint64, n uint32) {
	be.PutUint32(p, magicStructured)
	be.PutUint16(p[4:], flags)
	be.PutUint16(p[6:], typ)
	be.PutUint64(p[8:], cookie)
	be.PutUint32(p[16:], n)
}
