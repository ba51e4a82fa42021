package live

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"nvstore.dev/internal/qmp"
	"nvstore.dev/machine"
)

// Options for Connect and Attach. Nil is the zero value.
type Options struct {
	// Node is the block node that the store lies on; empty is "nv", as
	// package machine names the state window.
	Node string

	// Image, if not empty, is the image that must be below the node.
	Image string

	// Devices are the nodes that take part in snapshots; empty is all
	// writable qcow2 nodes, and then there must be no other writable
	// ones.
	Devices []string

	// Stale lets Load go on although a device would show the bytes from
	// before, and write them back. It doesn't where QEMU would hang.
	Stale bool

	// Timeout bounds each QMP command, and how long writers may take to
	// come to rest before a snapshot; 0 is 30 s. The work of a snapshot
	// has no bound but its context's.
	Timeout time.Duration

	Export Export

	// Store says how Attach opens the store: key, read-only. Its Gate is
	// Attach's own.
	Store StoreOptions

	// Reverted, if not nil, is told that the store was reverted, or
	// changed by another writer, once its readers see what there is now.
	// It is called once at a
	// time, and must not call the Attachment's Load.
	Reverted func(Revert)
}

func (o *Options) filled() Options {
	var f Options
	if o != nil {
		f = *o
	}
	if f.Node == "" {
		f.Node = machine.StateNode
	}
	if f.Timeout <= 0 {
		f.Timeout = 30 * time.Second
	}
	return f
}

// A Machine is a QEMU that runs. It may be used by many goroutines.
type Machine struct {
	qmp  *qmp.Client
	opts Options
	lock *imageLock
}

// Connect connects to the QMP monitor at an address: a unix socket's path, or
// "tcp:HOST:PORT". The monitor takes one client at a time. Errors are the
// system's, or of the kinds of this package.
func Connect(ctx context.Context, address string, o *Options) (*Machine, error) {
	opts := o.filled()
	c, err := qmp.Dial(ctx, address, &qmp.Options{Timeout: opts.Timeout})
	if err != nil {
		return nil, err
	}
	m := &Machine{qmp: c, opts: opts}
	if err := m.find(ctx); err != nil {
		c.Close()
		return nil, err
	}
	return m, nil
}

// find looks for the state's image, to lock it.
func (m *Machine) find(ctx context.Context) error {
	nodes, err := m.nodes(ctx)
	if err != nil {
		return err
	}
	path := ""
	if n := nodes.named(m.opts.Node); n != nil {
		path = m.local(n.leaf())
	}
	if m.opts.Image != "" {
		if err := sameFile(m.opts.Image, path); err != nil {
			return err
		}
	}
	m.lock = newImageLock(path)
	return nil
}

// local is where QEMU's path is for us.
func (m *Machine) local(path string) string {
	if path == "" || filepath.IsAbs(path) || strings.Contains(path, "://") {
		return path
	}
	if pid := m.qmp.PeerPID(); pid > 0 {
		if dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid)); err == nil {
			return filepath.Join(dir, path)
		}
	}
	return ""
}

func sameFile(given, open string) error {
	want, err := os.Stat(given)
	if err != nil {
		return err
	}
	if open == "" {
		return fmt.Errorf("%w: not a file, and %s was named", ErrOther, given)
	}
	got, err := os.Stat(open)
	if err != nil {
		return err
	}
	if !os.SameFile(want, got) {
		return fmt.Errorf("%w: %s, and %s was named", ErrOther, open, given)
	}
	return nil
}

// Close lets go of the monitor. Nothing in QEMU changes by that.
func (m *Machine) Close() error {
	err := m.qmp.Close()
	if m.lock != nil {
		m.lock.close()
	}
	return err
}

// Ended is closed when QEMU, or the connection to it, has ended.
func (m *Machine) Ended() <-chan struct{} { return m.qmp.Ended() }

// Version is QEMU's, as "7.2.22".
func (m *Machine) Version() string { return m.qmp.Version().String() }

// Status returns QEMU's run state, such as "running", "paused" or "prelaunch",
// and whether the machine runs.
func (m *Machine) Status(ctx context.Context) (state string, running bool, err error) {
	var s struct {
		Status  string
		Running bool
	}
	err = m.qmp.Do(ctx, "query-status", nil, &s)
	return s.Status, s.Running, err
}
