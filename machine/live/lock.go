package live

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// Bytes of an image file that are locked, by OFD locks. QEMU uses 100 to 299,
// libvirt 0.
const (
	ownerByte     = 300 // exclusively, by whoever is attached
	gateByte      = 301 // shared by commits, exclusively by who snapshots
	turnstileByte = 302 // shared for a moment before gateByte, exclusively before that is taken exclusively
)

// gatePatience is how long a commit waits for who snapshots. That one may have
// been stopped; a commit needs the gate for nothing but good manners.
const gatePatience = 60 * time.Second

// poll is how often a lock is tried.
const poll = time.Millisecond

// errTaken: somebody else has a lock.
var errTaken = errors.New("locked")

// An imageLock are the locks on one image file. They bind processes that agree
// to use them, and among them, goroutines of this process. Without a file that
// can be opened only these are bound.
type imageLock struct {
	file *os.File // nil if there is none
	path string
	err  error // why there is none

	mu      sync.Mutex
	inside  int           // commits under way
	held    bool          // and gateByte is locked for them
	closed  chan struct{} // closed when the gate opens; nil while it is open
	emptied chan struct{} // closed when the last commit leaves; nil if nobody waits
}

func newImageLock(path string) *imageLock {
	l := &imageLock{path: path}
	if path == "" {
		l.err = errors.New("it is no file")
		return l
	}
	l.file, l.err = os.OpenFile(path, os.O_RDWR, 0)
	return l
}

func (l *imageLock) close() {
	if l.file != nil {
		l.file.Close()
	}
}

// own takes the image for an attachment. known tells whether anything was
// locked.
func (l *imageLock) own() (known bool, err error) {
	if l.file == nil {
		return false, nil
	}
	switch err := lockByte(l.file, ownerByte, exclusive); {
	case err == errTaken:
		return true, fmt.Errorf("%w to %s", ErrInUse, l.path)
	case err != nil:
		return false, nil // as on a file system without locks
	}
	return true, nil
}

func (l *imageLock) disown() {
	if l.file != nil {
		_ = lockByte(l.file, ownerByte, unlocked)
	}
}

// pass is a commit's way through the gate.
func (l *imageLock) pass() (leave func()) {
	end := time.Now().Add(gatePatience)
	l.mu.Lock()
	for l.closed != nil && time.Now().Before(end) {
		opens := l.closed
		l.mu.Unlock()
		select {
		case <-opens:
		case <-time.After(time.Until(end)):
		}
		l.mu.Lock()
	}
	if l.inside++; l.inside == 1 && l.file != nil && l.closed == nil {
		for _, b := range []int64{turnstileByte, gateByte} {
			for lockByte(l.file, b, shared) == errTaken && time.Now().Before(end) {
				time.Sleep(poll)
			}
		}
		_ = lockByte(l.file, turnstileByte, unlocked)
		l.held = true
	}
	l.mu.Unlock()
	return l.leave
}

func (l *imageLock) leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.inside--; l.inside > 0 {
		return
	}
	if l.held {
		_ = lockByte(l.file, gateByte, unlocked)
		l.held = false
	}
	if l.emptied != nil {
		close(l.emptied)
		l.emptied = nil
	}
}

// shut closes the gate, and returns when no commit is under way.
func (l *imageLock) shut(ctx context.Context) (open func(), err error) {
	l.mu.Lock()
	for l.closed != nil {
		opens := l.closed
		l.mu.Unlock()
		select {
		case <-opens:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		l.mu.Lock()
	}
	l.closed = make(chan struct{})
	var emptied chan struct{}
	if l.inside > 0 {
		emptied = make(chan struct{})
		l.emptied = emptied
	}
	l.mu.Unlock()
	if emptied != nil {
		select {
		case <-emptied:
		case <-ctx.Done():
			l.open()
			return nil, ctx.Err()
		}
	}
	if l.file != nil {
		for _, b := range []int64{turnstileByte, gateByte} {
			if err := l.lock(ctx, b); err != nil {
				l.open()
				return nil, err
			}
		}
	}
	return l.open, nil
}

// lock takes a byte exclusively. Where files can't be locked, it returns nil.
func (l *imageLock) lock(ctx context.Context, b int64) error {
	for lockByte(l.file, b, exclusive) == errTaken {
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (l *imageLock) open() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_ = lockByte(l.file, gateByte, unlocked)
		_ = lockByte(l.file, turnstileByte, unlocked)
	}
	close(l.closed)
	l.closed = nil
}

// How a byte is locked.
const (
	unlocked = iota
	shared
	exclusive
)
