package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
	"nvstore.dev/internal/qmp"
)

// A lender has QEMU export the store's node. QEMU gives no disk to another host
// that somebody may write to, so while a migration is under way there is an
// export for each commit only, and none once the machine is stopped.
type lender struct {
	mu      sync.Mutex
	c       *qmp.Client // nil while there is no connection
	away    bool        // another host has the disk, or will have had it
	leaving bool        // a migration is under way
	lent    bool        // the export was made, and not taken away
}

// connected tells that there is a connection, or that there is none any more.
func (l *lender) connected(ctx context.Context, c *qmp.Client) {
	leaving := false
	if c != nil {
		// Events tell of a migration in time. Whoever manages the machine
		// has them, too; while there is one they can't be turned on.
		_ = c.Do(ctx, "migrate-set-capabilities", map[string]any{"capabilities": []any{
			map[string]any{"capability": "events", "state": true}}}, nil)
		var r struct{ Status string }
		leaving = c.Do(ctx, "query-migrate", nil, &r) == nil && underWay(r.Status)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.c, l.leaving, l.lent, l.away = c, leaving, false, true
}

// underWay tells of a migration's status.
func underWay(status string) bool {
	return !slices.Contains([]string{"", "none", "completed", "failed", "cancelled"}, status)
}

// state takes QEMU's run state.
func (l *lender) state(status string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.away = slices.Contains([]string{"inmigrate", "finish-migrate", "postmigrate"}, status)
}

// client returns the connection, if the node may be exported.
func (l *lender) client() (c *qmp.Client, leaving bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.away {
		return nil, l.leaving
	}
	return l.c, l.leaving
}

// lend has QEMU export the node for good, or as long as no migration is under
// way; then it takes the export away.
func (w *watcher) lend() error {
	b, l := w.b, &w.b.lender
	l.mu.Lock()
	c, leaving, wanted, lent := l.c, l.leaving, !l.leaving && !l.away, l.lent
	l.mu.Unlock()
	switch {
	case b.export == "" || wanted == lent:
		return nil
	case wanted:
		if err := b.exportBy(w.ctx, c); err != nil {
			return err
		}
	case leaving:
		w.home.Drop()
		b.unexportBy(w.ctx, c)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lent = wanted
	return nil
}

// migration follows one.
func (w *watcher) migration(c *qmp.Client, data json.RawMessage) error {
	var ev struct{ Status string }
	if err := json.Unmarshal(data, &ev); err != nil {
		return fmt.Errorf("MIGRATION: %w", err)
	}
	l := &w.b.lender
	l.mu.Lock()
	was := l.leaving
	l.leaving = underWay(ev.Status)
	is := l.leaving
	l.mu.Unlock()
	switch {
	case is && was:
		return nil
	case !is: // it is over, one way or the other
		if err := w.ask(c); err != nil && !errors.Is(err, qmp.ErrTimeout) {
			return err
		}
	}
	return w.lend()
}

// exportBy has QEMU export the node, unless it does.
func (b *behind) exportBy(ctx context.Context, c *qmp.Client) error {
	for _, step := range []struct {
		command string
		args    map[string]any
		there   string // what QEMU says where it is done already
	}{
		{"nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": b.target.Address}},
			"max-connections": 1}, "already running"},
		{"block-export-add", map[string]any{"type": "nbd", "id": b.exportID(), "node-name": b.export, "name": b.target.Export,
			"writable": true}, "already in use"},
	} {
		err := c.Do(ctx, step.command, step.args, nil)
		if said := (*qmp.Error)(nil); errors.As(err, &said) && strings.Contains(said.Desc, step.there) {
			continue
		}
		if err != nil {
			return fmt.Errorf("exporting %s: %w", b.export, err)
		}
	}
	return nil
}

// unexportBy takes the export away, from whoever uses it. If QEMU says that there
// is none, that is as well.
func (b *behind) unexportBy(ctx context.Context, c *qmp.Client) {
	_ = c.Do(ctx, "block-export-del", map[string]any{"id": b.exportID(), "mode": "hard"}, nil)
}

func (b *behind) exportID() string { return "nvtpm-" + b.export }

// connect connects to the export, which is made if need be; loan tells that it
// is taken away when the device is closed.
func (b *behind) connect() (d image.Device, loan bool, err error) {
	open := func() (image.Device, error) {
		return nbd.OpenTarget(context.Background(), b.target, &nbd.Options{Reconnect: -1, Ordered: true}) // the server is QEMU's
	}
	c, leaving := b.lender.client()
	if !leaving {
		if d, err = open(); err == nil || !away(err) {
			return d, false, err
		}
	}
	if b.export == "" || c == nil {
		if leaving {
			d, err = open() // somebody else's
		}
		return d, false, err
	}
	ctx, stop := context.WithTimeout(context.Background(), askWithin)
	defer stop()
	if err := b.exportBy(ctx, c); err != nil {
		return nil, false, fmt.Errorf("%w: %w", nbd.ErrDisconnected, err)
	}
	if d, err = open(); err != nil || !leaving {
		return d, false, err
	}
	return &lentDevice{d, func() { b.unexportBy(context.Background(), c) }}, true, nil
}

// A lentDevice is exported as long as it is open.
type lentDevice struct {
	image.Device
	giveBack func()
}

func (d *lentDevice) Close() error {
	err := d.Device.Close()
	d.giveBack()
	return err
}
