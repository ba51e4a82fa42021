package live_test

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/cmd/nvtpm/internal/live"
	"nvstore.dev/tpmstate"
)

// A disk is a store that can be out of reach, stall, fail, and be reverted.
type disk struct {
	mu     sync.Mutex
	s      tpmstate.State
	away   bool
	err    error
	stores int
	direct bool

	stall   chan struct{} // each store waits for it to be closed; nil: none does
	stalled chan struct{} // told when one does
	opened  atomic.Int32
}

func (d *disk) open() (tpmstate.Home, bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.away {
		return nil, false, errors.New("connection refused")
	}
	d.opened.Add(1)
	return &handle{d, d.s}, d.direct, nil
}

func (d *disk) set(fn func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	fn()
}

func (d *disk) get() tpmstate.State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.s
}

// A handle notices a revert before it stores, as a store does.
type handle struct {
	d    *disk
	last tpmstate.State
}

func (h *handle) Load(k tpmstate.Kind) ([]byte, error) {
	if h.last[k] == nil {
		return nil, tpmstate.ErrNotFound
	}
	return h.last[k], nil
}

func (h *handle) change(rerun bool, fn func(*tpmstate.State)) error {
	h.d.mu.Lock()
	stall := h.d.stall
	h.d.mu.Unlock()
	if stall != nil {
		h.d.stalled <- struct{}{}
		<-stall
	}
	h.d.mu.Lock()
	defer h.d.mu.Unlock()
	if h.d.err != nil {
		return h.d.err
	}
	if fmt.Sprint(h.d.s) != fmt.Sprint(h.last) && !rerun {
		return tpmstate.ErrReverted
	}
	h.d.stores++
	fn(&h.d.s)
	h.last = h.d.s
	return nil
}

func (h *handle) Store(k tpmstate.Kind, p []byte) error {
	return h.change(false, func(s *tpmstate.State) { s[k] = p })
}
func (h *handle) Delete(k tpmstate.Kind) error {
	return h.change(false, func(s *tpmstate.State) { s[k] = nil })
}
func (h *handle) Replace(n tpmstate.State) error {
	return h.change(true, func(s *tpmstate.State) { *s = n })
}
func (h *handle) Close() error { return nil }

var errFatal = errors.New("no space")

func newHome(t *testing.T, d *disk, o live.Options) *live.Home {
	o.Open = d.open
	o.Fatal = func(err error) bool { return errors.Is(err, errFatal) }
	o.Log = t.Logf
	if o.Limits == (live.Limits{}) {
		o.Limits = live.Limits{Stopped: 20 * time.Millisecond, Blind: 50 * time.Millisecond, Attach: 20 * time.Second, Running: 20 * time.Second, Close: 10 * time.Second}
	}
	h, err := live.New(&o, false)
	require.NoError(t, err)
	h.Restart()
	return h
}

func state(s string) tpmstate.State { return tpmstate.State{[]byte(s)} }

func load(t *testing.T, h *live.Home) string {
	p, err := h.Load(tpmstate.Permanent)
	require.NoError(t, err)
	return string(p)
}

func TestStore(t *testing.T) {
	d := &disk{s: state("one")}
	h := newHome(t, d, live.Options{})
	require.Equal(t, "one", load(t, h))
	require.NoError(t, h.Ready())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.NoError(t, h.Durable())
	require.Equal(t, state("two"), d.get())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.NoError(t, h.Store(tpmstate.Volatile, []byte("ram")))
	require.NoError(t, h.Delete(tpmstate.Volatile))
	require.NoError(t, h.Durable())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("three"))) // by the control channel: nobody waits
	require.NoError(t, h.Close())
	require.Equal(t, state("three"), d.get())
	require.ErrorIs(t, h.Store(tpmstate.Permanent, make([]byte, tpmstate.MaxState+1)), tpmstate.ErrTooLarge)
}

// TestLetGo: while the machine is stopped in the middle of a store, the reply
// goes, control commands are answered, and the next command waits.
func TestLetGo(t *testing.T) {
	d := &disk{s: state("one"), stall: make(chan struct{}), stalled: make(chan struct{}, 9)}
	h := newHome(t, d, live.Options{})
	h.Machine(true, false)
	require.NoError(t, h.Ready())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	<-d.stalled
	replied := make(chan error, 1)
	go func() { replied <- h.Durable() }()
	select {
	case <-replied:
		t.Fatal("the reply went out while the machine ran, and the state wasn't durable")
	case <-time.After(100 * time.Millisecond):
	}
	h.Machine(false, false)
	require.NoError(t, <-replied)
	require.Equal(t, state("one"), d.get())
	_, err := h.Go()
	require.ErrorIs(t, err, live.ErrStopped)
	require.Equal(t, "two", load(t, h), "memory answers")
	require.ErrorIs(t, h.Ready(), live.ErrBusy, "and no further command runs")
	d.set(func() { close(d.stall); d.stall = nil })
	h.Machine(true, false)
	require.NoError(t, h.Ready())
	require.Equal(t, state("two"), d.get())
	require.NoError(t, h.Close())
}

// TestCut: what began before the state was handed over sends no more writes,
// whether anybody tells that the machine was stopped or not; one that was sent
// already is told of until the store was opened and written.
func TestCut(t *testing.T) {
	d := &disk{s: state("one"), stall: make(chan struct{}), stalled: make(chan struct{}, 9)}
	h := newHome(t, d, live.Options{})
	require.NoError(t, h.Ready())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	<-d.stalled
	answered, err := h.Go()
	require.NoError(t, err)
	require.False(t, h.Cut())
	h.Restart()
	require.NoError(t, h.Replace(state("zero")))
	require.True(t, h.Cut())
	_, err = h.Go()
	require.ErrorIs(t, err, live.ErrStopped)
	answered()
	d.set(func() { d.err = err; close(d.stall); d.stall = nil }) // as the next write of that commit
	require.Eventually(t, func() bool {
		done, err := h.Go()
		if err == nil {
			done()
		}
		return err == nil
	}, 10*time.Second, time.Millisecond)
	require.True(t, h.Cut())
	d.set(func() { d.err = nil })
	require.NoError(t, h.Ready())
	require.Equal(t, state("zero"), d.get())
	require.False(t, h.Cut())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("three")))
	require.NoError(t, h.Durable())
	require.NoError(t, h.Replace(state("zero")))
	require.False(t, h.Cut(), "nothing was under way")
	require.NoError(t, h.Close())
}

// TestBlind: where nobody tells whether the machine runs, a store that takes
// long lets the reply go.
func TestBlind(t *testing.T) {
	d := &disk{s: state("one"), stall: make(chan struct{}), stalled: make(chan struct{}, 9)}
	h := newHome(t, d, live.Options{})
	require.NoError(t, h.Ready())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.NoError(t, h.Durable())
	require.Equal(t, state("one"), d.get())
	require.ErrorIs(t, h.Ready(), live.ErrBusy)
	d.set(func() { close(d.stall); d.stall = nil })
	require.Eventually(t, func() bool { return h.Ready() == nil }, 10*time.Second, time.Millisecond)
	require.Equal(t, state("two"), d.get())
	require.NoError(t, h.Close())
}

// TestLoadDropsPending: what was to be stored when a snapshot is loaded is
// dropped, and what the snapshot brings is stored.
func TestLoadDropsPending(t *testing.T) {
	d := &disk{s: state("one"), stall: make(chan struct{}), stalled: make(chan struct{}, 9)}
	h := newHome(t, d, live.Options{})
	h.Machine(true, false)
	require.NoError(t, h.Ready())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("lost")))
	<-d.stalled
	h.Machine(false, false)
	require.NoError(t, h.Durable())
	d.set(func() { d.s = state("zero") }) // the image is reverted,
	require.NoError(t, h.Replace(state("snapshot")))
	h.Restart()
	require.Equal(t, "snapshot", load(t, h))
	d.set(func() { close(d.stall); d.stall = nil })
	h.Machine(true, false)
	require.NoError(t, h.Ready())
	require.Equal(t, state("snapshot"), d.get())
	require.NoError(t, h.Close())
}

// TestMoved: a state that was changed between the start and the first command
// is the one that counts; one that changes later is an error.
func TestMoved(t *testing.T) {
	d := &disk{s: state("one")}
	moved := make(chan struct{}, 1)
	o := live.Options{Open: d.open, Log: t.Logf, Moved: func() { moved <- struct{}{} }}
	h, err := live.New(&o, false)
	require.NoError(t, err)
	d.set(func() { d.s = state("two") })
	h.Restart()
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("by the start")))
	require.NoError(t, h.Ready())
	<-moved
	require.Equal(t, "two", load(t, h))
	require.NoError(t, h.Close())
	require.Equal(t, state("two"), d.get())

	d = &disk{s: state("one")}
	h = newHome(t, d, o)
	require.NoError(t, h.Ready())
	d.set(func() { d.s = state("other") })
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.ErrorIs(t, h.Durable(), live.ErrMoved)
	require.ErrorIs(t, h.Ready(), live.ErrMoved)
	require.Equal(t, state("other"), d.get(), "nothing was stored over it")
	h.Restart()
	require.NoError(t, h.Ready())
	require.Equal(t, "other", load(t, h), "the TPM starts with it")
	require.NoError(t, h.Close())
}

// TestLostAcknowledgement: a commit whose answer was lost is recognised.
func TestLostAcknowledgement(t *testing.T) {
	d := &disk{s: state("one"), stall: make(chan struct{}), stalled: make(chan struct{}, 9)}
	h := newHome(t, d, live.Options{})
	require.NoError(t, h.Ready())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	<-d.stalled
	d.set(func() { d.s, d.err = state("two"), errors.New("connection reset"); close(d.stall); d.stall = nil })
	require.NoError(t, h.Durable()) // let go
	d.set(func() { d.err = nil })
	require.Eventually(t, func() bool { return h.Ready() == nil }, 10*time.Second, time.Millisecond)
	require.NoError(t, h.Close())
	require.Equal(t, state("two"), d.get())
}

// TestAway: the first command waits for the store, and nothing is lost when it
// is away for long.
func TestAway(t *testing.T) {
	d := &disk{s: state("one")}
	h := newHome(t, d, live.Options{Limits: live.Limits{Attach: 50 * time.Millisecond, Close: 100 * time.Millisecond}})
	d.set(func() { d.away = true })
	h.Restart()
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.Eventually(t, func() bool { return errors.Is(h.Ready(), live.ErrBusy) }, 10*time.Second, time.Millisecond)
	d.set(func() { d.away = false })
	require.Eventually(t, func() bool { return h.Ready() == nil }, 10*time.Second, time.Millisecond)
	d.set(func() { d.away, d.err = true, errors.New("gone") })
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("three")))
	require.ErrorIs(t, h.Close(), live.ErrBusy, "what isn't stored is said")
}

// TestFatal: no space is a failure of the TPM, until it is started anew.
func TestFatal(t *testing.T) {
	d := &disk{s: state("one")}
	h := newHome(t, d, live.Options{})
	require.NoError(t, h.Ready())
	d.set(func() { d.err = errFatal })
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.ErrorIs(t, h.Durable(), errFatal)
	require.ErrorIs(t, h.Ready(), errFatal)
	d.set(func() { d.err = nil })
	h.Restart()
	require.Equal(t, "one", load(t, h))
	require.NoError(t, h.Ready())
	require.NoError(t, h.Close())
}

// TestDirect: a store that was opened directly isn't kept.
func TestDirect(t *testing.T) {
	d := &disk{s: state("one"), direct: true}
	h := newHome(t, d, live.Options{})
	require.NoError(t, h.Ready())
	before := d.opened.Load()
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.NoError(t, h.Durable())
	require.Greater(t, d.opened.Load(), before)
	require.NoError(t, h.Close())
}

// TestPaused: a machine whose CPUs stand still, without a snapshot being saved
// or loaded, doesn't keep the state in memory.
func TestPaused(t *testing.T) {
	d := &disk{s: state("one")}
	h := newHome(t, d, live.Options{})
	require.NoError(t, h.Ready())
	h.Machine(false, false)
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.NoError(t, h.Durable())
	require.Equal(t, state("one"), d.get())
	h.Machine(false, true)
	require.Eventually(t, func() bool { return string(d.get()[0]) == "two" }, 10*time.Second, time.Millisecond)
	require.NoError(t, h.Close())
}

// TestLeave: once the machine has the state, to take it to another host, nothing
// is stored, and no commit goes on; the next command says that it has stayed.
func TestLeave(t *testing.T) {
	d := &disk{s: state("one")}
	h := newHome(t, d, live.Options{})
	h.Machine(true, false)
	require.NoError(t, h.Ready())
	before := d.opened.Load()
	h.Leave()
	_, err := h.Go()
	require.ErrorIs(t, err, live.ErrStopped)
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("on its way")))
	time.Sleep(20 * time.Millisecond)
	require.Equal(t, state("one"), d.get())
	require.NoError(t, h.Ready())
	require.Equal(t, state("on its way"), d.get())
	require.Greater(t, d.opened.Load(), before, "the store was let go of")
	h.Leave()
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("another host's")))
	require.NoError(t, h.Close())
	require.Equal(t, state("on its way"), d.get())
}

// TestMark: what nobody was told of may get lost at the end.
func TestMark(t *testing.T) {
	d := &disk{s: state("one")}
	h := newHome(t, d, live.Options{Limits: live.Limits{Close: 50 * time.Millisecond}})
	require.NoError(t, h.Ready())
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("two")))
	require.NoError(t, h.Durable())
	h.Mark()
	d.set(func() { d.away, d.err = true, errors.New("gone") })
	require.NoError(t, h.Store(tpmstate.Permanent, []byte("three")))
	require.NoError(t, h.Close())
	require.Equal(t, state("two"), d.get())
}
