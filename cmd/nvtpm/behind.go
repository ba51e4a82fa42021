package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"nvstore.dev/cmd/internal/swtpmopt"
	"nvstore.dev/cmd/nvtpm/internal/live"
	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
	"nvstore.dev/internal/qmp"
	machinelive "nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate"
)

// behind is the QEMU whose image has the store, and whose TPM this is.
type behind struct {
	target *nbd.Target
	qmp    string // "" is none
	export string // node that QEMU is told to export; "" is none
	later  bool   // the state isn't read at the start: it is handed over
	log    *logger
	lender lender
	limits live.Limits
	moved  func() // the TPM is to be started anew

	// gate is shut by a "nvtool vm snapshot" or revert; it returns nil where
	// that can't be known.
	gate func() *machinelive.Gate
}

// parseBehind reads --live and --qmp.
func (o *options) parseBehind(log *logger) (*behind, error) {
	switch {
	case o.live == "" && (o.qmp != "" || o.export != ""):
		return nil, swtpmopt.Usagef("--qmp and --export go with --live, which says where the running machine's store is")
	case o.live == "":
		return nil, nil
	case o.export != "" && o.qmp == "":
		return nil, swtpmopt.Usagef("--export goes with --qmp, by which QEMU is told")
	}
	t, err := nbd.ParseURI(o.live)
	if err != nil {
		return nil, swtpmopt.Usagef("--live: %w", err)
	}
	if o.export != "" && (t.Network != "unix" || t.TLS) {
		return nil, swtpmopt.Usagef("--export is for a unix socket: --live nbd+unix:///NAME?socket=PATH")
	}
	return &behind{target: t, qmp: o.qmp, export: o.export, log: log}, nil
}

// openLive makes a home behind a running QEMU: the store is opened through it
// while it has the image, and directly when nobody has.
func (s *source) openLive() (*place, error) {
	b := s.behind
	p := &place{}
	if b.gate == nil {
		b.gate = sync.OnceValue(func() *machinelive.Gate { return b.openGate(s.location) })
	}
	o := &live.Options{Fatal: fatal, Moved: b.moved, Log: b.log.printf, Limits: b.limits}
	o.Open = func() (tpmstate.Home, bool, error) {
		loan := false
		h, err := s.openStore(p, func(o *nvstore.Options) (st *nvstore.Store, err error) {
			st, loan, err = b.open(p, o)
			return st, err
		})
		if err == nil || !away(err) {
			b.later = b.later && err != nil
			return h, loan, err
		}
		if b.later && !p.live.Closing() {
			// The machine isn't there yet, and QEMU will want the image.
			return nil, false, err
		}
		direct, derr := s.openStore(p, s.openImage)
		switch {
		case derr == nil:
			return direct, true, nil
		case errors.Is(derr, image.ErrLocked):
			return nil, false, err // QEMU has it
		}
		return nil, false, derr
	}
	h, err := live.New(o, b.later)
	if err != nil {
		return nil, err
	}
	p.Home, p.live, p.sealed = h, h, s.hasKey
	if b.qmp != "" {
		ctx, stop := context.WithCancel(context.Background())
		watcher := &watcher{b: b, home: h, ctx: ctx}
		done := make(chan struct{})
		go func() {
			defer close(done)
			watcher.run()
		}()
		p.Home = &watched{Home: h, stop: func() { stop(); <-done }}
	}
	return p, nil
}

// openGate opens what keeps commits and snapshots apart.
func (b *behind) openGate(location string) *machinelive.Gate {
	path := fileOf(location)
	if path == "" {
		return nil
	}
	g, err := machinelive.OpenGate(path)
	if err != nil {
		b.log.printf("snapshots that nvtool takes can't wait for the TPM's writes: %v", err)
		return nil
	}
	return g
}

// open opens the store through QEMU; loan tells that it is to be closed as soon
// as it isn't needed.
func (b *behind) open(p *place, o *nvstore.Options) (st *nvstore.Store, loan bool, err error) {
	d, loan, err := b.connect()
	if err != nil {
		return nil, false, err
	}
	if g := b.gate(); g != nil {
		o.Gate = g.Pass
		defer g.Pass()() // what isn't settled is made durable
	}
	o.Idle = -1 // what isn't asked for might be under way when a snapshot is loaded
	st, err = nvstore.OpenDevice(&guarded{d, p}, o)
	if err != nil {
		return nil, false, errors.Join(err, d.Close())
	}
	if p.live != nil && p.live.Cut() {
		if err := whole(st); err != nil {
			err = errors.Join(err, d.Close())
			_ = st.Close() // which writes nothing any more
			return nil, false, err
		}
	}
	return st, loan, nil
}

// whole checks a store after a snapshot was loaded in the middle of a write. The
// state that QEMU handed over replaces the TPM's, but not what else may have
// been hit.
func whole(st *nvstore.Store) error {
	r, err := st.Check(context.Background(), nil)
	if err != nil {
		return err
	}
	for _, p := range append(r.Errors, r.Warnings...) {
		if len(r.Errors) > 0 || p.Code == "torn" { // the other root counts, and may be older than the snapshot's
			return fmt.Errorf("%w; revert the image once more: %s: %s", nvstore.ErrStraddled, p.Where, p.Message)
		}
	}
	return nil
}

// away tells an export that isn't there from one that is in no good state.
func away(err error) bool {
	return errors.Is(err, nbd.ErrDisconnected) || errors.Is(err, os.ErrNotExist) || errors.Is(err, image.ErrNotFound) ||
		errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, new(net.Error))
}

// fatal tells what doesn't get better by trying again.
func fatal(err error) bool {
	for _, kind := range []error{nvstore.ErrNoSpace, nvstore.ErrCorrupt, nvstore.ErrTampered, nvstore.ErrKey, nvstore.ErrFormat,
		nvstore.ErrStraddled, tpmstate.ErrVersion, tpmstate.ErrTooLarge, image.ErrReadOnly} {
		if errors.Is(err, kind) && !errors.Is(err, nvstore.ErrReverted) {
			return true
		}
	}
	return false
}

// A guarded device lets no write through to QEMU while it may be saving or
// loading a snapshot: a commit's second half doesn't belong on what was loaded.
// Of the device's other abilities it has batches alone.
type guarded struct {
	image.Device
	p *place
}

func (g *guarded) WriteAt(p []byte, off int64) (int, error) {
	done, err := g.ask()
	if err != nil {
		return 0, err
	}
	defer done()
	return g.Device.WriteAt(p, off)
}

func (g *guarded) Sync() error {
	done, err := g.ask()
	if err != nil {
		return err
	}
	defer done()
	return g.Device.Sync()
}

func (g *guarded) ReadBatch(reads []image.Request) error {
	return image.BatcherOf(g.Device).ReadBatch(reads)
}

func (g *guarded) WriteBatch(writes []image.Request) error {
	done, err := g.ask()
	if err != nil {
		return err
	}
	defer done()
	return image.BatcherOf(g.Device).WriteBatch(writes)
}

func (g *guarded) SyncBatch(reads []image.Request) error {
	done, err := g.ask()
	if err != nil {
		return err
	}
	defer done()
	return image.BatcherOf(g.Device).SyncBatch(reads)
}

// ask lets pass what opens the store for the first time.
func (g *guarded) ask() (done func(), err error) {
	if g.p.live == nil {
		return func() {}, nil
	}
	return g.p.live.Go()
}

// A watched home has a watcher, which ends first.
type watched struct {
	*live.Home
	stop func()
}

func (w *watched) Close() error {
	w.stop()
	return w.Home.Close()
}

// A watcher follows the machine through QMP.
type watcher struct {
	b    *behind
	home *live.Home
	ctx  context.Context
	told bool
}

const (
	redial    = 20 * time.Millisecond
	askPause  = time.Second // a machine that stops for a snapshot doesn't answer earlier
	askWithin = 5 * time.Second
)

func (w *watcher) run() {
	for w.ctx.Err() == nil {
		err := w.follow()
		w.home.Unwatched()
		if err != nil && !w.told && !away(err) {
			w.b.log.printf("QMP: %v", err)
			w.told = true
		}
		select {
		case <-w.ctx.Done():
		case <-time.After(redial):
		}
	}
}

// follow tells the home what happens, until the connection ends.
func (w *watcher) follow() error {
	c, err := qmp.Dial(w.ctx, w.b.qmp, &qmp.Options{Timeout: askWithin})
	if err != nil {
		return err
	}
	defer c.Close()
	sub := c.Subscribe("STOP", "RESUME", "JOB_STATUS_CHANGE", "MIGRATION")
	defer sub.Close()
	w.b.lender.connected(w.ctx, c)
	defer w.b.lender.connected(w.ctx, nil)
	if err := w.ask(c); err != nil { // which wakes the home
		return err
	}
	if err := w.lend(); err != nil {
		return err
	}
	w.told = false
	ask := time.NewTimer(askPause)
	defer ask.Stop()
	for {
		select {
		case <-w.ctx.Done():
			return nil
		case ev, ok := <-sub.Events():
			if !ok {
				return c.Err()
			}
			switch ev.Name {
			case "RESUME":
				w.home.Machine(true, true)
				w.b.lender.state("running")
				if err := w.lend(); err != nil {
					return err
				}
			case "MIGRATION":
				if err := w.migration(c, ev.Data); err != nil {
					return err
				}
			case "STOP":
				w.home.Machine(false, false)
				ask.Reset(askPause)
			default: // a job on a machine that is paused may load a snapshot
				if w.home.Paused() {
					w.home.Machine(false, false)
					ask.Reset(askPause)
				}
			}
		case <-ask.C:
			if w.home.Running() {
				continue
			}
			if err := w.ask(c); err != nil && !errors.Is(err, qmp.ErrTimeout) {
				return err
			}
			if err := w.lend(); err != nil {
				return err
			}
			ask.Reset(askPause)
		}
	}
}

// ask asks for the machine's state. That QEMU answers says that it neither
// saves nor loads.
func (w *watcher) ask(c *qmp.Client) error {
	var r struct {
		Running bool
		Status  string
	}
	if err := c.Do(w.ctx, "query-status", nil, &r); err != nil {
		return fmt.Errorf("query-status: %w", err)
	}
	w.b.lender.state(r.Status)
	if r.Status == "postmigrate" {
		w.home.Leave()
	}
	switch r.Status {
	case "inmigrate", "finish-migrate", "postmigrate", "save-vm", "restore-vm", "colo":
		w.home.Machine(r.Running, false)
	default:
		w.home.Machine(r.Running, true)
	}
	return nil
}
