package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
)

type vmAttach struct {
	daemon
	q        qmpFlags
	socket   string
	server   string
	readOnly bool
	keep     bool
	takeOver bool
}

func (a *app) vmAttachCmd() *cobra.Command {
	o := &vmAttach{daemon: daemon{app: a}}
	var command []string
	c := a.verb("attach [DISK] --qmp SOCKET [-- COMMAND [ARG...]]", "Reach the store of a machine that runs", func(ctx context.Context, args []string) error {
		return o.run(ctx, args, command)
	})
	fn := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		if n := c.ArgsLenAtDash(); n >= 0 {
			if command = args[n:]; len(command) == 0 {
				return usagef(`no COMMAND behind "--"`)
			}
			args = args[:n]
		}
		return fn(c, args)
	}
	c.Long = `Have QEMU export the state of a machine that runs, over NBD, on a socket that is
for its owner only, and print the URI, which all other verbs take for IMAGE. QEMU
lets in one client at a time, so there is one writer.

The attachment lasts until nvtool is interrupted, or the machine ends; meanwhile
reverts of the machine are printed. With a COMMAND it lasts as long as that runs;
{} among its arguments, and $NVSTORE_URI, are the URI:

  nvtool vm attach --qmp vm.qcow2.qmp -- nvtool put {} net0/nvm nvm.bin

With --keep it lasts until nvtool vm detach. DISK, if it is given, must be the
image that QEMU has. A monitor takes one client: give the machine a second
for nvtool vm snapshot and others meanwhile.`
	o.q.flags(c, false)
	f := c.Flags()
	f.StringVar(&o.socket, "socket", "", "listen at `PATH` (default: the QMP socket's with .nbd)")
	f.StringVar(&o.server, "nbd-server", "", "QEMU's NBD server runs already: its `URI`, as nbd+unix:///?socket=PATH")
	f.BoolVarP(&o.readOnly, "read-only", "r", false, "let clients only read")
	f.BoolVar(&o.keep, "keep", false, "return at once, and leave the attachment to nvtool vm detach")
	f.BoolVar(&o.takeOver, "take-over", false, "remove an attachment of which nothing tells whether its service lives")
	f.StringVar(&o.pidFile, "pid-file", "", "write the process ID to `FILE` when clients can connect")
	return c
}

func (o *vmAttach) run(ctx context.Context, args, command []string) error {
	switch {
	case o.q.address == "":
		return usagef("--qmp SOCKET is missing; without it, give DISK to the other verbs while the machine is off")
	case o.keep && (len(command) > 0 || o.pidFile != ""):
		return usagef("--keep returns at once: no COMMAND, and no --pid-file")
	case o.server != "" && o.socket != "":
		return usagef("--nbd-server has a socket already: no --socket")
	}
	disk, _, err := o.q.split(args, 0)
	if err != nil {
		return err
	}
	opts, err := o.q.options(disk)
	if err != nil {
		return err
	}
	// Beside the one client there is ourselves, to watch.
	opts.Export = live.Export{Socket: o.path(), Server: o.server, ReadOnly: o.readOnly, Writable: !o.readOnly, Connections: 2, TakeOver: o.takeOver}
	if o.keep {
		return explainLive(o.leave(ctx, opts))
	}
	opts.Store = live.StoreOptions{ReadOnly: true, Keyless: true, Idle: -1}
	opts.Reverted = o.reverted
	at, err := live.Attach(ctx, o.q.address, opts)
	if err != nil {
		return explainLive(err)
	}
	err = o.hold(ctx, at, command)
	return errors.Join(err, at.Close())
}

// path is where the socket lies by default.
func (o *vmAttach) path() string {
	if o.socket != "" || o.server != "" || strings.HasPrefix(o.q.address, "tcp:") {
		return o.socket
	}
	return strings.TrimPrefix(o.q.address, "unix:") + ".nbd"
}

// attached is what is printed of an attachment.
type attached struct {
	URI        string `json:"uri"`
	Node       string `json:"node"`
	QEMU       string `json:"qemu"`
	PID        int    `json:"pid,omitempty"`
	Generation int64  `json:"generation"`
	Sealed     bool   `json:"sealed"`
	Blobs      int64  `json:"blobs"`
}

func (o *vmAttach) announce(uri, qemu string, s *nvstore.Store) error {
	info, err := s.Info()
	if err != nil {
		return err
	}
	o.warnStatus(s)
	if o.json {
		at := attached{URI: uri, Node: o.q.node, QEMU: qemu, PID: os.Getpid(), Generation: info.Generation, Sealed: info.Sealed, Blobs: info.Blobs}
		if o.keep {
			at.PID = 0
		}
		return o.printJSON(at)
	}
	o.sayf("%s", uri)
	return nil
}

// leave attaches, looks whether there is a store, and lets go.
func (o *vmAttach) leave(ctx context.Context, opts *live.Options) (err error) {
	opts.Export.Connections = 1
	m, err := live.Connect(ctx, o.q.address, opts)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	x, err := m.Export(ctx, &opts.Export)
	if err != nil {
		return err
	}
	s, err := nvstore.Open(x.URI(), &nvstore.Options{ReadOnly: true, Keyless: true, Place: nvstore.Whole})
	if err == nil {
		err = errors.Join(o.announce(x.URI(), m.Version(), s), s.Close())
	}
	if err != nil {
		return errors.Join(err, x.Close())
	}
	x.Leave()
	return nil
}

// hold keeps the attachment.
func (o *vmAttach) hold(ctx context.Context, at *live.Attachment, command []string) error {
	if len(command) > 0 {
		return o.execute(ctx, at, command)
	}
	if err := o.announce(at.URI(), at.Version(), at.Store()); err != nil {
		return err
	}
	undo, err := o.ready()
	if err != nil {
		return err
	}
	select {
	case <-ctx.Done():
	case <-at.Ended():
		o.sayf("the machine has ended, or closed its monitor")
	}
	return undo()
}

// execute runs a command while the attachment lasts.
func (o *vmAttach) execute(ctx context.Context, at *live.Attachment, command []string) error {
	args := make([]string, len(command))
	for i, arg := range command {
		args[i] = strings.ReplaceAll(arg, "{}", at.URI())
	}
	c := exec.CommandContext(ctx, args[0], args[1:]...)
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, o.out, o.err
	c.Env = append(os.Environ(), "NVSTORE_URI="+at.URI())
	c.Cancel = func() error { return c.Process.Signal(syscall.SIGTERM) }
	c.WaitDelay = 10 * time.Second
	err := c.Run()
	if e := (*exec.ExitError)(nil); errors.As(err, &e) && e.ExitCode() > 0 {
		return &exitCoded{fmt.Errorf("%s: %w", printable(args[0]), err), e.ExitCode()}
	}
	return err
}

// reverted tells that the machine was reverted. Commits of whoever is attached
// change the store, too.
func (o *vmAttach) reverted(r live.Revert) {
	if r.Err == nil && !r.Loaded && r.To >= r.From {
		return
	}
	text := "the machine was reverted"
	if r.Err != nil {
		text += ", and its store can't be read: " + r.Err.Error()
	} else {
		text += fmt.Sprintf(": the store is of generation %d", r.To)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.json {
		_ = o.printJSON(struct {
			Event      string `json:"event"`
			Generation int64  `json:"generation"`
			Error      string `json:"error,omitempty"`
		}{"reverted", r.To, errorText(r.Err)})
		return
	}
	o.sayf("%s", text)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func (a *app) vmDetachCmd() *cobra.Command {
	var o vmAttach
	var force bool
	c := a.verb("detach [DISK] --qmp SOCKET", "End an attachment that lasts", func(ctx context.Context, args []string) (err error) {
		if o.q.address == "" {
			return usagef("--qmp SOCKET is missing")
		}
		disk, _, err := o.q.split(args, 0)
		if err != nil {
			return err
		}
		m, err := o.q.connect(ctx, disk)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, m.Close()) }()
		found, err := m.Detach(ctx, force)
		if err != nil {
			return explainLive(err)
		}
		if path := o.path(); found && path != "" {
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
		if !found {
			return withHint(fmt.Errorf("nothing is attached to node %s: %w", printable(o.q.node), fs.ErrNotExist), "nvtool vm attach attaches")
		}
		if a.json {
			return a.printJSON(struct {
				Node string `json:"node"`
			}{o.q.node})
		}
		a.sayf("detached from node %s", printable(o.q.node))
		return nil
	})
	c.Long = `End an attachment that nvtool vm attach --keep made, or that a service left behind
that was killed: its client is cut off, and QEMU exports nothing any more. A
service that lives has a lock on the image, and is only cut off with --force.`
	o.q.flags(c, false)
	c.Flags().StringVar(&o.socket, "socket", "", "the attachment's socket, if vm attach was given one")
	c.Flags().BoolVar(&force, "force", false, "also cut off a service that lives")
	return c
}
