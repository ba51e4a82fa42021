package nbd

import (
	"errors"
	"fmt"
	"sync"

	"nvstore.dev/image"
)

// A ledger knows what would be lost with the connection. It outlives
// connections.
type ledger struct {
	mu      sync.Mutex
	written uint64 // writes answered, ever
	durable uint64 // of them, those that a flush covers
	failed  error  // why writing is over; nil while it isn't
	gone    bool   // writes were lost: what can be read isn't what was written
}

// mark is taken before a flush is sent: the writes that it covers.
func (l *ledger) mark() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.written
}

// answered books a call that the server answered.
func (l *ledger) answered(cl *call) {
	if !cl.writes() && cl.cmd != cmdFlush {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case cl.err != nil:
		if !harmless(cl) && l.failed == nil {
			l.failed = cl.err
		}
	case cl.cmd == cmdFlush:
		l.durable = max(l.durable, cl.mark)
	case cl.flags&cmdFlagFUA == 0:
		l.written++
	}
}

// harmless tells whether a write that failed left everything as it was: the
// server didn't want it. A trim promises nothing anyway.
func harmless(cl *call) bool {
	remote := (*RemoteError)(nil)
	if !errors.As(cl.err, &remote) || cl.cmd == cmdFlush {
		return false
	}
	switch remote.Code {
	case errPerm, errInvalid, errOverflow, errNotSup, errShutdown:
		return true
	}
	return cl.cmd == cmdTrim
}

// lost books the end of a connection, which had writes in flight or not.
func (l *ledger) lost(writes bool, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !writes && l.written == l.durable {
		return
	}
	l.gone = true
	if l.failed == nil {
		l.failed = fmt.Errorf("writes since the last Sync may be lost: %w", err)
	}
}

// condemn ends writing and reading.
func (l *ledger) condemn(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.gone = true
	if l.failed == nil {
		l.failed = err
	}
}

// check returns image.ErrPoisoned if writing, or also reading, is over.
func (l *ledger) check(reading bool) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.failed == nil || reading && !l.gone {
		return nil
	}
	return fmt.Errorf("nbd: %w: %w", image.ErrPoisoned, l.failed)
}
