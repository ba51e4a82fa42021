package live

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"nvstore.dev/tpmstate"
)

// A job is a state to be stored.
type job struct {
	mem     tpmstate.State
	stored  tpmstate.State
	version uint64
	replace bool
	compare bool
}

// run brings to the store what is in memory, until the home is closed.
func (h *Home) run() {
	defer close(h.done)
	var st tpmstate.Home
	drop := func() {
		if st != nil {
			st.Close() // whatever that says: what matters was committed
			st = nil
		}
	}
	defer drop()
	var end time.Time
	pause := minPause
	for {
		j, closing := h.next()
		if closing {
			if end.IsZero() {
				end = time.Now().Add(h.o.Limits.Close)
			}
			if j == nil || time.Now().After(end) {
				return
			}
		}
		if j == nil {
			drop()
			continue
		}
		if j.compare {
			drop()
		}
		direct, err := false, error(nil)
		if st == nil {
			st, direct, err = h.attach()
		}
		if err == nil && st != nil {
			err = h.commit(st)
		}
		switch {
		case err != nil:
			drop()
			h.trouble(err)
			h.rest(pause)
			pause = min(2*pause, maxPause)
		case direct:
			drop()
			fallthrough
		default:
			pause = minPause
		}
	}
}

const (
	minPause = 5 * time.Millisecond
	maxPause = 200 * time.Millisecond
)

// rest waits before something is tried again, or until something changes, as
// the store's being exported.
func (h *Home) rest(pause time.Duration) {
	h.mu.Lock()
	changed := h.changed
	h.mu.Unlock()
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-changed:
		time.Sleep(minPause)
	case <-timer.C:
	}
}

// next waits for something to do. Nil is nothing, when closing, and else to close
// the store.
func (h *Home) next() (*job, bool) {
	for {
		h.mu.Lock()
		work := h.failed == nil && h.known && h.started && !h.left && (h.version != h.safe || !h.compared)
		if h.closing && h.version == h.safe {
			work = false
		}
		if h.closing && !work {
			h.mu.Unlock()
			return nil, true
		}
		if h.drop {
			h.drop = false
			h.mu.Unlock()
			return nil, false
		}
		if work && (h.machine != stopped || h.closing) {
			j := h.job()
			h.mu.Unlock()
			return j, j != nil && h.closing
		}
		changed := h.changed
		h.mu.Unlock()
		<-changed
	}
}

// job describes what is to be done, from now on. The lock is held.
func (h *Home) job() *job {
	h.begun = h.handed
	return &job{mem: h.mem, stored: h.stored, version: h.version, replace: h.replace, compare: !h.compared}
}

// attach opens the store, and compares it with what it is known to have.
func (h *Home) attach() (tpmstate.Home, bool, error) {
	st, direct, err := h.o.Open()
	if err != nil {
		return nil, false, err
	}
	has, err := tpmstate.LoadAll(st)
	if err != nil {
		return nil, false, errors.Join(err, st.Close())
	}
	moved := false
	h.change(func() { moved, err = h.compare(has) })
	if moved {
		h.o.Log("the store has another state than before; the TPM starts with that")
		if h.o.Moved != nil {
			h.o.Moved()
		}
		h.change(func() { h.compared = true }) // and commands may run
	}
	if err != nil {
		return nil, false, errors.Join(err, st.Close())
	}
	return st, direct, nil
}

// compare decides between the store and the memory. The lock is held.
func (h *Home) compare(has tpmstate.State) (moved bool, err error) {
	same := true
	for k := range has {
		if !bytes.Equal(has[k], h.stored[k]) && (h.attempt == nil || !bytes.Equal(has[k], h.attempt[k])) {
			same = false
		}
	}
	h.stored, h.attempt = has, nil
	if same || h.replace {
		h.compared = true
		return false, nil
	}
	if h.used {
		h.failed = fmt.Errorf("%w, while the TPM ran on it", ErrMoved)
		return false, h.failed
	}
	// No command ran: the TPM can begin once more.
	h.mem, h.safe = has, h.version
	return true, nil
}

// commit stores what the memory has and the store hasn't.
func (h *Home) commit(st tpmstate.Home) error {
	h.mu.Lock()
	j := h.job()
	h.attempt = &j.mem
	h.mu.Unlock()
	if err := j.store(st); err != nil {
		return err
	}
	h.change(func() {
		h.stored, h.attempt = j.mem, nil
		h.safe = j.version
		if h.version == j.version {
			h.replace = false
		}
		h.told, h.since = false, time.Time{}
		if h.begun == h.handed {
			h.cut = false // what was opened was whole
		}
	})
	return nil
}

func (j *job) store(st tpmstate.Home) error {
	if j.replace {
		return st.Replace(j.mem)
	}
	for k, blob := range j.mem {
		if bytes.Equal(blob, j.stored[k]) {
			continue
		}
		var err error
		if blob == nil {
			err = st.Delete(tpmstate.Kind(k))
		} else {
			err = st.Store(tpmstate.Kind(k), blob)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// patience is how long the store may be out of reach before an operator is told:
// when QEMU starts or ends, it is for a moment.
const patience = 2 * time.Second

// trouble decides whether to try again after an error.
func (h *Home) trouble(err error) {
	h.change(func() {
		h.compared = false
		fatal := !errors.Is(err, ErrStopped) && h.o.Fatal != nil && h.o.Fatal(err)
		if fatal && h.failed == nil {
			h.failed = err
		}
		switch {
		case h.failed != nil && !h.told:
			h.o.Log("error: the TPM's state can't be stored, and the TPM answers with a failure until it is started anew: %v", err)
		case h.since.IsZero():
			h.since = time.Now()
			return
		case !errors.Is(err, ErrStopped) && !h.told && time.Since(h.since) > patience:
			h.o.Log("the TPM's store can't be reached; trying on: %v", err)
		default:
			return
		}
		h.told = true
	})
}
