package image

// A Request is a read or a write of a batch, of P from Off on.
type Request struct {
	P   []byte
	Off int64

	// Err is how a read went: nil if P is full, io.ErrUnexpectedEOF if the
	// range reaches past Size, else what ReadAt returns. After an error the
	// content of P is undefined.
	Err error
}

// A Batcher carries out several requests in the time of about one, where each
// waits for an answer from elsewhere. When a method returns, nothing of the
// batch is under way any more.
type Batcher interface {
	// ReadBatch reads. The reads have no order among themselves. It sets
	// each one's Err, and returns the first of these that isn't nil.
	ReadBatch(reads []Request) error

	// WriteBatch writes one after the other, as far as anyone can tell who
	// changes the content underneath: what is done by then is the first
	// few, and what is yet to be done the rest. A crash may keep any of
	// them, as of all writes before a Sync. After an error nobody knows
	// what was written.
	WriteBatch(writes []Request) error

	// SyncBatch is a Sync of what was written before, and a ReadBatch,
	// which may be carried out before the Sync, after it, or meanwhile. The
	// error is that of the Sync; the reads have their own.
	SyncBatch(reads []Request) error
}

// BatcherOf returns the Batcher that d is or wraps, or else one that uses d for
// one request after the other.
func BatcherOf(d Device) Batcher {
	if b, ok := As[Batcher](d); ok {
		return b
	}
	return oneByOne{d}
}

type oneByOne struct{ d Device }

func (o oneByOne) ReadBatch(reads []Request) (first error) {
	for i := range reads {
		r := &reads[i]
		if r.Err = ReadFull(o.d, r.P, r.Off); r.Err != nil && first == nil {
			first = r.Err
		}
	}
	return first
}

func (o oneByOne) WriteBatch(writes []Request) error {
	for _, w := range writes {
		if _, err := o.d.WriteAt(w.P, w.Off); err != nil {
			return err
		}
	}
	return nil
}

func (o oneByOne) SyncBatch(reads []Request) error {
	if err := o.d.Sync(); err != nil {
		return err
	}
	_ = o.ReadBatch(reads) // the reads have the errors
	return nil
}
