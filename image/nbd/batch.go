package nbd

import (
	"nvstore.dev/image"
)

// ReadBatch has all reads of a batch under way at once, up to Options.InFlight.
// They go to the server together, so that a batch takes about as long as one
// read does. Those that a lost connection left unanswered are sent again.
func (d *Device) ReadBatch(reads []image.Request) error {
	var b batch
	rest := b.addReads(d, reads)
	if err := d.use(true, b.run); err != nil {
		b.fail(err)
	}
	return b.finish(d, reads, rest)
}

// SyncBatch has the FLUSH and the reads under way at once.
func (d *Device) SyncBatch(reads []image.Request) error {
	if d.opts.ReadOnly || d.fua {
		if err := d.Sync(); err != nil {
			return err
		}
		_ = d.ReadBatch(reads) // the reads have the errors
		return nil
	}
	b := batch{reqs: []request{{cmd: cmdFlush}}}
	rest := b.addReads(d, reads)
	if err := d.use(false, b.run); err != nil {
		return err
	}
	if err := b.errs[0]; err != nil {
		return err
	}
	_ = b.finish(d, reads, rest)
	return nil
}

// WriteBatch has all writes under way at once, in requests that go out in
// order, where Options.Ordered says that this will do. Otherwise each waits for
// the one before it.
func (d *Device) WriteBatch(writes []image.Request) error {
	var b batch
	for _, w := range writes {
		n := int64(len(w.P))
		if !d.opts.Ordered || n == 0 || n > d.piece || (w.Off|n)&(d.info.MinBlock-1) != 0 || d.writable(w.Off, n) != nil {
			return d.writeEach(writes)
		}
		b.reqs = append(b.reqs, request{cmd: cmdWrite, flags: fuaFlag(d.fua), off: w.Off, n: n, data: w.P})
	}
	d.units.RLock() // not while part of a block is written
	defer d.units.RUnlock()
	if err := d.use(false, b.run); err != nil {
		return err
	}
	return b.first()
}

func (d *Device) writeEach(writes []image.Request) error {
	for _, w := range writes {
		if _, err := d.WriteAt(w.P, w.Off); err != nil {
			return err
		}
	}
	return nil
}

// A batch is requests that are under way together.
type batch struct {
	reqs  []request
	errs  []error          // the server's, of each
	reads []*image.Request // that the last requests are for
}

// addReads makes requests of reads, and returns how many couldn't be made one
// each: those are left for later.
func (b *batch) addReads(d *Device, reads []image.Request) (rest int) {
	for i := range reads {
		r := &reads[i]
		n := int64(len(r.P))
		if n == 0 || n > d.piece || image.CheckRange(r.Off, n, d.info.Size) != nil || !b.add(r, d.info.MinBlock, d.piece) {
			rest++
			r.Err = errUnsent
		}
	}
	return rest
}

// add makes the request of a read, for whole blocks of unit bytes. It reports
// false if that is more than most.
func (b *batch) add(r *image.Request, unit, most int64) bool {
	lo, hi := r.Off&^(unit-1), (r.Off+int64(len(r.P))+unit-1)&^(unit-1)
	if hi-lo > most {
		return false
	}
	into := r.P
	if hi-lo != int64(len(into)) {
		into = make([]byte, hi-lo)
	}
	b.reads = append(b.reads, r)
	b.reqs = append(b.reqs, request{cmd: cmdRead, off: lo, n: hi - lo, into: into})
	return true
}

// run carries the batch out on a connection. Its error is that of the
// connection; the server's are each request's own.
func (b *batch) run(c *conn) error {
	b.errs = make([]error, len(b.reqs))
	for done := 0; done < len(b.reqs); {
		n, err := c.exchange(b.reqs[done:], b.errs[done:])
		if done += n; err != nil {
			return err
		}
	}
	return nil
}

// fail makes an error of the connection that of each request.
func (b *batch) fail(err error) {
	b.errs = make([]error, len(b.reqs))
	for i := range b.errs {
		b.errs[i] = err
	}
}

func (b *batch) first() error {
	for _, err := range b.errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// finish hands over what was read, and reads what is left. It returns the first
// read's error.
func (b *batch) finish(d *Device, reads []image.Request, rest int) error {
	skip := len(b.reqs) - len(b.reads)
	for i, r := range b.reads {
		q := &b.reqs[skip+i]
		if r.Err = b.errs[skip+i]; r.Err == nil && len(q.into) != len(r.P) {
			copy(r.P, q.into[r.Off-q.off:])
		}
	}
	for i := range reads {
		if r := &reads[i]; rest > 0 && r.Err == errUnsent {
			r.Err = image.ReadFull(d, r.P, r.Off)
		}
	}
	for i := range reads {
		if err := reads[i].Err; err != nil {
			return err
		}
	}
	return nil
}
