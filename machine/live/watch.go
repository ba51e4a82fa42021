package live

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"nvstore.dev/internal/qmp"
)

// A Revert tells that the store isn't what its last commit left: the machine was
// reverted, or somebody else wrote.
type Revert struct {
	From, To int64 // generations before, as far as was looked, and now; -1 if there is none that can be read
	Loaded   bool  // QEMU was seen to load a snapshot by a job
	// Err is why the store can't be read: a revert cut through a commit,
	// and must be done once more.
	Err error
}

func (r Revert) String() string {
	if r.Err != nil {
		return fmt.Sprintf("reverted from generation %d: %v", r.From, r.Err)
	}
	return fmt.Sprintf("reverted from generation %d to %d", r.From, r.To)
}

// watch looks at the store whenever it may have been reverted: jobs load
// snapshots, and a machine that is reverted stops and goes on.
func (a *Attachment) watch() {
	events := a.qmp.Subscribe("RESUME", "STOP", "JOB_STATUS_CHANGE")
	a.watching.Go(func() {
		jobs := map[string]bool{} // by ID: whether they load a snapshot
		for e := range events.Events() {
			look, loaded := a.judge(e, jobs)
			// Whatever came meanwhile is answered by the same look.
			for n := len(events.Events()); n > 0; n-- {
				if e, ok := <-events.Events(); ok {
					l, ld := a.judge(e, jobs)
					look, loaded = look || l, loaded || ld
				}
			}
			if look {
				a.look(loaded)
			}
		}
	})
}

// judge tells whether an event is a reason to look, and the end of a job that
// loaded a snapshot.
func (a *Attachment) judge(e qmp.Event, jobs map[string]bool) (look, loaded bool) {
	if e.Name != "JOB_STATUS_CHANGE" {
		return true, false
	}
	var job struct{ ID, Status string }
	if json.Unmarshal(e.Data, &job) != nil {
		return false, false
	}
	switch job.Status {
	case "null": // it is gone
		loaded = jobs[job.ID]
		delete(jobs, job.ID)
		return true, loaded
	case "concluded", "aborting":
		return true, false
	}
	if _, known := jobs[job.ID]; !known && len(jobs) < 64 {
		jobs[job.ID] = a.loads(job.ID)
	}
	return false, false
}

// loads tells whether a job loads a snapshot.
func (a *Attachment) loads(id string) bool {
	list, err := a.qmp.Jobs(context.Background())
	for _, j := range list {
		if j.ID == id {
			return err == nil && j.Type == "snapshot-load"
		}
	}
	return false
}

// look has readers see what there is. The next load may come at any time, this
// look's own requests may be those that QEMU forgets.
func (a *Attachment) look(loaded bool) {
	a.revive()
	looked := make(chan struct{})
	go func() {
		a.refresh(loaded)
		close(looked)
	}()
	tick := time.NewTicker(a.opts.Timeout)
	defer tick.Stop()
	for {
		select {
		case <-looked:
			return
		case <-tick.C:
			a.revive()
		}
	}
}

// revive makes the export anew if it answers no more. So it is after the human
// monitor's loadvm: QEMU 7.2 then never lets the requests go on of a client that
// was connected. While QEMU saves or loads by a job it answers nobody, on QMP
// neither; so that it does says that requests have no reason to wait.
func (a *Attachment) revive() {
	a.mu.Lock()
	dev, closed := a.dev, a.closed
	a.mu.Unlock()
	if closed {
		return
	}
	answered := make(chan struct{})
	go func() {
		_, _ = dev.ReadAt(make([]byte, 512), 0) // an error is an answer
		close(answered)
	}()
	for free := false; ; {
		timer := time.NewTimer(a.opts.Timeout)
		select {
		case <-answered:
			timer.Stop()
			return
		case <-a.Ended():
			timer.Stop()
			return
		case <-timer.C:
		}
		if free && a.renew() {
			return
		}
		_, _, err := a.Status(context.Background())
		free = err == nil
	}
}

// renew makes the export anew, and tells whether there is no more to do.
func (a *Attachment) renew() (done bool) {
	a.mu.Lock()
	defer a.mu.Unlock() // not while it is closed
	if a.closed {
		return true
	}
	ctx, cancel := context.WithTimeout(context.Background(), a.opts.Timeout)
	defer cancel()
	err := a.exported.renew(ctx)
	return err == nil || errors.Is(err, qmp.ErrRefused) || errors.Is(err, qmp.ErrDisconnected)
}

// refresh has readers see what there is, and tells of it.
func (a *Attachment) refresh(loaded bool) {
	a.looking.Lock()
	defer a.looking.Unlock()
	a.mu.Lock()
	closed := a.closed
	a.mu.Unlock()
	if closed || a.gone() {
		return
	}
	from := a.generation()
	changed, err := a.Store().Dir().Refresh()
	if !changed && !loaded || a.opts.Reverted == nil {
		return
	}
	a.opts.Reverted(Revert{From: from, To: a.generation(), Loaded: loaded, Err: err})
}
