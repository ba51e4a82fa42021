package live

import (
	"bytes"
	"errors"
	"fmt"
	"sync"
	"time"

	"nvstore.dev/tpmstate"
)

// Kinds of errors, for errors.Is.
var (
	// ErrBusy: the store can't be reached now. What is to be done can be
	// tried again.
	ErrBusy = errors.New("the TPM's store can't be reached now")
	// ErrMoved: the store has another state than the one that the TPM ran
	// on, and nobody handed that over. The TPM must be started anew.
	ErrMoved = errors.New("the TPM's state was changed underneath")
	// ErrStopped: the machine was stopped, or reverted, in the middle of a
	// commit, which is begun anew later.
	ErrStopped = errors.New("the machine is stopped")
)

// Options of a Home.
type Options struct {
	// Open opens the store, through QEMU or directly; direct tells that it
	// is to be closed as soon as it isn't needed, since QEMU can't open the
	// image meanwhile.
	Open func() (home tpmstate.Home, direct bool, err error)

	// Fatal tells of an error that trying again doesn't help: damage, no
	// space. Nil takes none for such.
	Fatal func(error) bool

	// Moved is called when the store has another state than the one that
	// was read first, before any command ran. The TPM must be started anew.
	// It is called by the goroutine that stores.
	Moved func()

	// Log is told what an operator should know.
	Log func(format string, args ...any)

	Limits Limits
}

// Limits bound waiting; 0 stands for the default.
type Limits struct {
	// Stopped is how long a command waits once the machine is stopped;
	// 250 ms. No virtual CPU runs then that could see the reply.
	Stopped time.Duration
	// Blind is how long one waits where it isn't known whether the machine
	// runs; 1 s.
	Blind time.Duration
	// Running is how long one waits while the machine runs; 60 s.
	Running time.Duration
	// Attach is how long the first command waits for the store; 10 s.
	Attach time.Duration
	// Close is how long Close tries; 5 s.
	Close time.Duration
}

func (l *Limits) fill() {
	for _, v := range []struct {
		p   *time.Duration
		std time.Duration
	}{
		{&l.Stopped, 250 * time.Millisecond}, {&l.Blind, time.Second}, {&l.Running, 60 * time.Second},
		{&l.Attach, 10 * time.Second}, {&l.Close, 5 * time.Second},
	} {
		if *v.p <= 0 {
			*v.p = v.std
		}
	}
}

// Home is the state in memory, and its way to the store.
type Home struct {
	o    Options
	done chan struct{} // closed when the goroutine that stores has ended

	mu      sync.Mutex
	changed chan struct{} // closed, and replaced, with each change below

	mem       tpmstate.State
	known     bool            // mem was read, or handed over
	stored    tpmstate.State  // what the store has
	attempt   *tpmstate.State // what it may have instead: a commit failed
	version   uint64          // of mem
	safe      uint64          // the version that is durable
	replace   bool            // mem was handed over, and is the truth whatever the store has
	handed    uint64          // how often mem was
	begun     uint64          // handed, when what is under way began
	writing   int             // requests that Go let through, and that have no answer
	cut       bool            // there were some when mem was handed over last
	used      bool            // a command ran on it
	compared  bool            // with the store, since the TPM was started
	failed    error
	machine   state
	stoppedAt time.Time
	started   bool // the TPM was: before, the image is left to QEMU
	closing   bool
	left      bool // the machine took the state along, to another host
	drop      bool // the store is to be closed now
	marked    bool // what comes after version mark may get lost
	mark      uint64
	since     time.Time // when the store got out of reach
	told      bool      // of that
}

// state is what is known of the machine.
type state uint8

const (
	unwatched state = iota
	running
	stopped // and may be saving or loading: nothing is begun
	paused  // its CPUs stand still, and nothing else
)

var _ tpmstate.Home = (*Home)(nil)

// New reads the state, unless later is set: then it is handed over, as by a
// migration, or read when it can be. The store is closed again.
func New(o *Options, later bool) (*Home, error) {
	h := &Home{o: *o, done: make(chan struct{}), changed: make(chan struct{})}
	h.o.Limits.fill()
	if h.o.Log == nil {
		h.o.Log = func(string, ...any) {}
	}
	if !later {
		if err := h.read(); err != nil {
			return nil, err
		}
	}
	go h.run()
	return h, nil
}

// read fills the memory from the store, at the begin.
func (h *Home) read() error {
	st, _, err := h.o.Open()
	if err != nil {
		return err
	}
	s, err := tpmstate.LoadAll(st)
	if err = errors.Join(err, st.Close()); err != nil {
		return err
	}
	h.mem, h.stored, h.known = s, s, true
	return nil
}

// change runs fn under the lock, and wakes all who wait.
func (h *Home) change(fn func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	fn()
	close(h.changed)
	h.changed = make(chan struct{})
}

// Load returns a blob from memory.
func (h *Home) Load(k tpmstate.Kind) ([]byte, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case !h.known:
		return nil, fmt.Errorf("%s: %w", k, ErrBusy)
	case h.mem[k] == nil:
		return nil, fmt.Errorf("%s: %w", k, tpmstate.ErrNotFound)
	}
	return bytes.Clone(h.mem[k]), nil
}

// Store replaces a blob in memory. Durable says when the store has it.
func (h *Home) Store(k tpmstate.Kind, blob []byte) error {
	if err := tpmstate.CheckSize(k, len(blob)); err != nil {
		return err
	}
	h.put(k, bytes.Clone(blob))
	return nil
}

// Delete removes a blob from memory.
func (h *Home) Delete(k tpmstate.Kind) error {
	h.put(k, nil)
	return nil
}

func (h *Home) put(k tpmstate.Kind, blob []byte) {
	h.change(func() {
		if bytes.Equal(h.mem[k], blob) {
			return
		}
		h.mem[k] = blob
		h.version++
	})
}

// Replace makes s the whole state: what a machine that is migrated or reverted
// brings along. What was to be stored before is dropped.
func (h *Home) Replace(s tpmstate.State) error {
	for k, blob := range s {
		if blob == nil {
			continue
		}
		if err := tpmstate.CheckSize(tpmstate.Kind(k), len(blob)); err != nil {
			return err
		}
	}
	h.change(func() {
		for k, blob := range s {
			h.mem[k] = bytes.Clone(blob)
		}
		h.known, h.replace, h.failed = true, true, nil
		h.version++
		h.handed++
		h.cut = h.writing > 0
	})
	return nil
}

// Restart is called before the TPM starts, from what Load returns. It forgets
// a failure, and what couldn't be stored for it.
func (h *Home) Restart() {
	h.change(func() {
		if h.failed != nil {
			h.mem, h.version, h.failed = h.stored, h.safe, nil
		}
		h.started, h.used, h.compared, h.told, h.marked, h.left, h.since = true, false, false, false, false, false, time.Time{}
	})
}

// Ready waits until the store has been compared with memory, and all of that is
// durable. It is called before each command; ErrBusy means to try again.
func (h *Home) Ready() error {
	h.mu.Lock()
	left := h.left
	h.mu.Unlock()
	if left { // and came back: the migration failed, or it was a snapshot
		h.change(func() { h.left = false })
	}
	return h.wait(func() bool {
		if h.failed != nil || !h.compared || h.safe != h.version {
			return h.failed != nil
		}
		h.used = true
		return true
	}, func() time.Duration {
		switch {
		case !h.used:
			return h.o.Limits.Attach
		case h.machine == unwatched:
			return h.o.Limits.Blind
		}
		return h.o.Limits.Running
	}, ErrBusy)
}

// Durable waits until what a command stored is durable. It returns nil earlier
// if that has to go on in the background, because the machine is stopped.
func (h *Home) Durable() error {
	h.mu.Lock()
	want := h.version
	h.mu.Unlock()
	err := h.wait(func() bool { return h.failed != nil || h.safe >= want }, func() time.Duration {
		if h.machine == unwatched {
			return h.o.Limits.Blind
		}
		return h.o.Limits.Running
	}, errLate)
	if !errors.Is(err, errLate) {
		return err
	}
	h.mu.Lock()
	runs := h.machine == running
	h.mu.Unlock()
	if runs {
		h.change(func() { h.failed = fmt.Errorf("%w: waited for %v", ErrBusy, h.o.Limits.Running) })
		return ErrBusy
	}
	h.o.Log("a reply goes out before its state is durable: the machine is stopped, or the store is slow; it is stored before the next command")
	return nil
}

var errLate = errors.New("too late")

// wait waits until ok says so, or the TPM has failed, at most for limit, and for
// less when the machine is stopped; late is returned then. The functions are
// called under the lock.
func (h *Home) wait(ok func() bool, limit func() time.Duration, late error) error {
	begin := time.Now()
	for {
		h.mu.Lock()
		if ok() {
			defer h.mu.Unlock()
			return h.failed
		}
		end := begin.Add(limit())
		if h.machine == stopped || h.machine == paused {
			from := h.stoppedAt
			if from.Before(begin) {
				from = begin
			}
			if e := from.Add(h.o.Limits.Stopped); e.Before(end) {
				end = e
			}
		}
		changed := h.changed
		h.mu.Unlock()
		left := time.Until(end)
		if left <= 0 {
			return late
		}
		timer := time.NewTimer(left)
		select {
		case <-changed:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// Machine tells what is known of the machine: whether its CPUs run, and if not,
// whether QEMU may be saving or loading. Nothing is begun then.
func (h *Home) Machine(runs, quiet bool) {
	h.change(func() {
		was := h.machine
		switch {
		case runs:
			h.machine = running
		case quiet:
			h.machine = paused
		default:
			h.machine = stopped
		}
		if !runs && was != stopped && was != paused {
			h.stoppedAt = time.Now()
		}
	})
}

// Running and Paused say what Machine was told last.
func (h *Home) Running() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.machine == running
}

// Paused is true of a machine whose CPUs stand still, and nothing else.
func (h *Home) Paused() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.machine == paused
}

// Unwatched tells that nothing is known of the machine any more.
func (h *Home) Unwatched() { h.change(func() { h.machine = unwatched }) }

// Go says whether a request may be sent to the store now; done is called when it
// was answered. Who opens the store through QEMU asks before each write, so that
// none of a commit's comes after a snapshot has been loaded underneath: QEMU
// hands the state over before it lets anybody at its disks again.
func (h *Home) Go() (done func(), err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.handed != h.begun:
		return nil, fmt.Errorf("%w: another state was handed over", ErrStopped)
	case (h.machine == stopped || h.left) && !h.closing:
		return nil, ErrStopped
	}
	h.writing++
	return func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.writing--
	}, nil
}

// Cut tells that a request was under way when the state was handed over, and may
// have come after a snapshot was loaded: the store is to be checked before it is
// used.
func (h *Home) Cut() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cut
}

// Mark says that what is stored from now on, until Restart, was acknowledged to
// nobody: it is no error if it gets lost with Close.
func (h *Home) Mark() { h.change(func() { h.mark, h.marked = h.version, true }) }

// Leave says that the machine has the state, and may be on its way to another
// host with it. The store is let go of, and nothing more is stored, unless
// another command comes: then it has stayed.
func (h *Home) Leave() { h.change(func() { h.left, h.drop = true, true }) }

// Drop lets go of the store until there is something to be stored.
func (h *Home) Drop() { h.change(func() { h.drop = true }) }

// Closing tells that Close was called.
func (h *Home) Closing() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.closing
}

// Close brings to the store what it doesn't have yet, and lets go of it.
func (h *Home) Close() error {
	h.change(func() { h.closing = true })
	timer := time.NewTimer(2 * h.o.Limits.Close)
	defer timer.Stop()
	select {
	case <-h.done:
	case <-timer.C:
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.left: // another host has it
	case h.version != h.safe && h.marked && h.safe >= h.mark:
		h.o.Log("the TPM was shut down without its machine's doing, and that can't be stored")
	case h.failed != nil:
		return h.failed
	case h.version != h.safe:
		return fmt.Errorf("%w, and what the TPM stored last isn't in it", ErrBusy)
	}
	return nil
}
