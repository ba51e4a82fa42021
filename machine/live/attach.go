package live

import (
	"context"
	"errors"
	"sync"
	"time"

	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
	"nvstore.dev/nvstore"
)

// StoreOptions are package nvstore's.
type StoreOptions = nvstore.Options

// requestPatience bounds one NBD request. While QEMU saves or loads the memory
// of a large machine it answers nobody.
const (
	requestPatience   = 10 * time.Minute
	reconnectPatience = 2 * time.Second
)

// An Attachment is a store in the tail of a running machine's disk, opened
// through that machine.
type Attachment struct {
	*Machine
	exported *Exported
	readOnly bool
	watching sync.WaitGroup

	looking sync.Mutex // one look at the store at a time

	mu     sync.Mutex
	store  *nvstore.Store
	dev    image.Device // that the store is on
	closed bool
}

// Attach opens the store of the machine whose QMP monitor is at an address (see
// Connect). ctx bounds attaching only. If there is an error, QEMU is as it was.
func Attach(ctx context.Context, address string, o *Options) (*Attachment, error) {
	m, err := Connect(ctx, address, o)
	if err != nil {
		return nil, err
	}
	a, err := m.attach(ctx)
	if err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return a, nil
}

func (m *Machine) attach(ctx context.Context) (*Attachment, error) {
	e := m.opts.Export
	readOnly := e.ReadOnly || m.opts.Store.ReadOnly || m.opts.Store.Keyless || m.opts.Store.Previous
	e.ReadOnly = readOnly && !e.Writable
	x, err := m.Export(ctx, &e)
	if err != nil {
		return nil, err
	}
	store, dev, err := m.open(ctx, x, readOnly)
	if err != nil {
		return nil, errors.Join(err, x.Close())
	}
	a := &Attachment{Machine: m, exported: x, store: store, dev: dev, readOnly: readOnly}
	a.watch()
	return a, nil
}

// open opens the store that is exported. While it does, the gate is shut to who
// snapshots: what it finds unsettled is made durable.
func (m *Machine) open(ctx context.Context, x *Exported, readOnly bool) (*nvstore.Store, image.Device, error) {
	dev, err := nbd.OpenTarget(ctx, &x.target, &nbd.Options{ReadOnly: readOnly, RequestTimeout: requestPatience, Reconnect: reconnectPatience,
		Ordered: true}) // the server is QEMU's
	if err != nil {
		return nil, nil, err
	}
	o := m.opts.Store
	if !readOnly {
		o.Gate = m.lock.pass
		defer m.lock.pass()()
	}
	s, err := nvstore.OpenDevice(dev, &o)
	if err != nil {
		return nil, nil, errors.Join(err, dev.Close())
	}
	return s, dev, nil
}

// Store returns the store. It is closed by Close.
func (a *Attachment) Store() *nvstore.Store {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.store
}

// Reopen opens the store anew, through the same export, where a call returned
// nvstore.ErrPoisoned, as when the NBD connection was cut during a commit.
// Nothing that was acknowledged, and not reverted, is lost. The store, and blobs,
// that were open before are of no use any more.
func (a *Attachment) Reopen(ctx context.Context) error {
	a.looking.Lock()
	defer a.looking.Unlock()
	_ = a.Store().Close() // which lets go of the only connection there may be
	s, dev, err := a.Machine.open(ctx, a.exported, a.readOnly)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return errors.Join(nvstore.ErrClosed, s.Close())
	}
	a.store, a.dev = s, dev
	return nil
}

// URI is where QEMU exports the store's device.
func (a *Attachment) URI() string { return a.exported.URI() }

// Close settles and closes the store, and takes away what was added to QEMU.
// With a QEMU that has ended, that is nothing, and no error; in a store that was
// reverted meanwhile there is nothing to settle.
func (a *Attachment) Close() error {
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return nvstore.ErrClosed
	}
	a.closed = true
	a.mu.Unlock()
	gone := a.gone()
	err := a.Store().Close()
	if gone || errors.Is(err, nbd.ErrDisconnected) || errors.Is(err, nvstore.ErrReverted) {
		err = nil // what was acknowledged is durable, or was taken back with the machine
	}
	err = errors.Join(err, a.exported.Close(), a.Machine.Close())
	a.watching.Wait()
	return err
}

func (a *Attachment) gone() bool {
	select {
	case <-a.Ended():
		return true
	default:
		return false
	}
}

func (a *Attachment) generation() int64 {
	info, err := a.Store().Info()
	if err != nil {
		return -1
	}
	return info.Generation
}
