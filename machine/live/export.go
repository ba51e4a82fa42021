package live

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"nvstore.dev/image/nbd"
	"nvstore.dev/internal/qmp"
)

// An Export says how QEMU exports a node. The zero value is for one client that
// reads and writes.
type Export struct {
	// Socket is the path of the unix socket; empty is a new one in a
	// folder of its own.
	Socket string

	// Server is the URI of an NBD server that QEMU runs already, of which
	// the export is to be one more; empty starts one, in the place of one
	// that exports nothing. QEMU can have one.
	Server string

	// ReadOnly keeps all clients from writing. Attach adds it where it
	// opens the store for reading, unless Writable is set, which leaves
	// writing to others.
	ReadOnly, Writable bool

	// Connections is how many clients may be connected at once; 0 is 1.
	Connections int

	// TakeOver removes an export of this project's that is there already
	// also where nothing tells whether the service that made it still
	// lives. Otherwise that is done if the lock on the image is free.
	TakeOver bool
}

// An Exported is a node that QEMU exports.
type Exported struct {
	m      *Machine
	id     string
	target nbd.Target
	args   map[string]any // of block-export-add
	undo   undo
}

// An undo is what takes things back, the last first.
type undo []func(ctx context.Context) error

func (u *undo) add(f func(ctx context.Context) error) { *u = append(*u, f) }

// undoPatience bounds taking things back.
const undoPatience = 10 * time.Second

// run takes everything back, also if ctx has ended. With a QEMU that is gone
// there is nothing to take back in it.
func (u *undo) run(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoPatience)
	defer cancel()
	for i := len(*u) - 1; i >= 0; i-- {
		if e := (*u)[i](ctx); e != nil && !errors.Is(e, qmp.ErrDisconnected) {
			err = errors.Join(err, e)
		}
	}
	*u = nil
	return err
}

// exportID is an export's ID in QEMU, for a node.
func exportID(node string) string { return "nvstore-" + strings.TrimLeft(node, "#") }

// Export has QEMU export the state's node over NBD, whole or not at all.
func (m *Machine) Export(ctx context.Context, e *Export) (x *Exported, err error) {
	if e == nil {
		e = new(Export)
	}
	list, err := m.nodes(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := list.need(m.opts.Node); err != nil {
		return nil, err
	}
	x = &Exported{m: m, id: exportID(m.opts.Node)}
	defer func() {
		if err != nil {
			err = errors.Join(err, x.undo.run(ctx))
			x = nil
		}
	}()
	sole, err := m.lock.own()
	if err != nil {
		return x, err
	}
	x.undo.add(func(context.Context) error { m.lock.disown(); return nil })
	if err := m.takeOver(ctx, x.id, sole || e.TakeOver); err != nil {
		return x, err
	}
	if err := x.serve(ctx, e); err != nil {
		return x, err
	}
	x.target.Export = m.opts.Node
	x.args = map[string]any{"type": "nbd", "id": x.id, "node-name": m.opts.Node, "name": m.opts.Node, "writable": !e.ReadOnly}
	x.undo.add(func(ctx context.Context) error { return m.unexport(ctx, x.id) })
	if err := m.qmp.Do(ctx, "block-export-add", x.args, nil); err != nil {
		return x, err
	}
	return x, nil
}

// renew cuts off the export's clients, and makes it anew.
func (x *Exported) renew(ctx context.Context) error {
	if err := x.m.unexport(ctx, x.id); err != nil {
		return err
	}
	return x.m.qmp.Do(ctx, "block-export-add", x.args, nil)
}

// takeOver removes what a service that was killed left behind: its export, and
// a server that exports nothing.
func (m *Machine) takeOver(ctx context.Context, id string, may bool) error {
	switch there, err := m.exported(ctx, id); {
	case err != nil:
		return err
	case there && !may:
		return fmt.Errorf("%w: QEMU has export %q, and the image can't be locked (%v)", ErrInUse, id, m.lock.err)
	case there:
		if err := m.unexport(ctx, id); err != nil {
			return err
		}
	}
	if others, err := m.exports(ctx); err != nil || len(others) > 0 || !may {
		return err
	}
	return m.stopServer(ctx)
}

// exports are the IDs of all NBD exports.
func (m *Machine) exports(ctx context.Context) (ids []string, err error) {
	var list []struct{ ID, Type string }
	err = m.qmp.Do(ctx, "query-block-exports", nil, &list)
	for _, x := range list {
		if x.Type == "nbd" {
			ids = append(ids, x.ID)
		}
	}
	return ids, err
}

func (m *Machine) exported(ctx context.Context, id string) (bool, error) {
	ids, err := m.exports(ctx)
	for _, x := range ids {
		if x == id {
			return true, nil
		}
	}
	return false, err
}

// unexport removes an export, if it is there, and waits until it is gone.
func (m *Machine) unexport(ctx context.Context, id string) error {
	deleted := m.qmp.Subscribe("BLOCK_EXPORT_DELETED")
	defer deleted.Close()
	asked := false
	for {
		there, err := m.exported(ctx, id)
		if err != nil || !there {
			return err
		}
		if !asked {
			asked = true
			if err := m.qmp.Do(ctx, "block-export-del", map[string]string{"id": id, "mode": "hard"}, nil); err != nil {
				return err
			}
			continue
		}
		select {
		case <-deleted.Events():
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("export %q doesn't go away: %w", id, ctx.Err())
		}
	}
}

// stopServer stops QEMU's NBD server, if there is one.
func (m *Machine) stopServer(ctx context.Context) error {
	err := m.qmp.Do(ctx, "nbd-server-stop", nil, nil)
	if e := (*qmp.Error)(nil); errors.As(err, &e) && strings.Contains(e.Desc, "not running") {
		return nil
	}
	return err
}

// serve sees to an NBD server.
func (x *Exported) serve(ctx context.Context, e *Export) error {
	if e.Server != "" {
		t, err := nbd.ParseURI(e.Server)
		if err == nil {
			x.target = *t
		}
		return err
	}
	path, err := x.socket(e.Socket)
	if err != nil {
		return err
	}
	socket, err := listen(path)
	if err != nil {
		return err
	}
	defer socket.Close()
	x.undo.add(func(context.Context) error { return remove(path) })
	return x.start(ctx, socket, path, max(e.Connections, 1))
}

// start starts QEMU's server on a socket of ours: so it has our permissions,
// and QEMU needs none to make it.
func (x *Exported) start(ctx context.Context, socket *os.File, path string, connections int) error {
	const name = "nvstore-nbd"
	if err := x.m.qmp.SendFile(ctx, name, socket); err != nil {
		return err
	}
	err := x.m.qmp.Do(ctx, "nbd-server-start", map[string]any{
		"addr": map[string]any{"type": "fd", "data": map[string]any{"str": name}}, "max-connections": connections}, nil)
	if err != nil {
		// A file that was taken can't be closed, one that wasn't must be.
		_ = x.m.qmp.Do(context.WithoutCancel(ctx), "closefd", map[string]string{"fdname": name}, nil)
		if e := (*qmp.Error)(nil); errors.As(err, &e) && strings.Contains(e.Desc, "already running") {
			return fmt.Errorf("%w: %w", ErrServer, err)
		}
		return err
	}
	x.undo.add(x.m.stopServer)
	x.target = nbd.Target{Network: "unix", Address: path}
	return nil
}

// socket chooses where the socket lies.
func (x *Exported) socket(path string) (string, error) {
	if path != "" {
		return filepath.Abs(path)
	}
	dir, err := os.MkdirTemp("", "nvstore-")
	if err != nil {
		return "", err
	}
	x.undo.add(func(context.Context) error { return os.RemoveAll(dir) })
	return filepath.Join(dir, "nbd"), nil
}

// answers tells whether somebody listens on a socket.
func answers(path string) bool {
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	return err == nil
}

func remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// listen makes a socket for QEMU to listen on, which appears at path with
// permissions 0600, in the place of one that nobody listens on any more.
func listen(path string) (f *os.File, err error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, err
	case info.Mode()&fs.ModeSocket == 0 || answers(path):
		return nil, &fs.PathError{Op: "listen", Path: path, Err: fs.ErrExist}
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), ".nbd-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	hidden := filepath.Join(dir, "s")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	syscall.CloseOnExec(fd)
	f = os.NewFile(uintptr(fd), path)
	defer func() {
		if err != nil {
			f.Close()
			f = nil
		}
	}()
	if err := syscall.Bind(fd, &syscall.SockaddrUnix{Name: hidden}); err != nil {
		return f, &os.PathError{Op: "bind", Path: path, Err: err}
	}
	if err := os.Chmod(hidden, 0o600); err != nil {
		return f, err
	}
	return f, os.Rename(hidden, path)
}

// URI is where the export is.
func (x *Exported) URI() string { return x.target.String() }

// Close takes away what was added to QEMU: the export, whose client is cut off,
// and the server.
func (x *Exported) Close() error { return x.undo.run(context.Background()) }

// Leave keeps the export when the monitor is closed. Machine.Detach takes it
// away.
func (x *Exported) Leave() { x.undo = nil }

// Detach takes away what an attachment that wasn't closed left behind, and tells
// whether there was anything. With force that is done even if the service that
// made it still lives.
func (m *Machine) Detach(ctx context.Context, force bool) (found bool, err error) {
	sole, err := m.lock.own()
	if err != nil && !force {
		return false, err
	}
	if err == nil {
		defer m.lock.disown()
	}
	id := exportID(m.opts.Node)
	if found, err = m.exported(ctx, id); err != nil || !found {
		return false, err
	}
	return true, m.takeOver(ctx, id, sole || force || m.lock.file == nil)
}
