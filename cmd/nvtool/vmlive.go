package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	"nvstore.dev/internal/qmp"
	"nvstore.dev/machine"
	"nvstore.dev/machine/live"
)

// qmpFlags say how to reach a machine that runs.
type qmpFlags struct {
	address string
	node    string
	devices []string
	timeout time.Duration
	stale   bool
}

func (q *qmpFlags) flags(c *cobra.Command, snapshots bool) {
	f := c.Flags()
	f.StringVar(&q.address, "qmp", "", "the machine runs: QEMU's QMP `SOCKET`, or tcp:HOST:PORT")
	f.StringVar(&q.node, "node", machine.StateNode, "the block `NODE` that the store lies on")
	f.DurationVar(&q.timeout, "timeout", 30*time.Second, "how long QEMU may take to answer, and writers to come to rest")
	if snapshots {
		f.StringArrayVar(&q.devices, "snapshot-node", nil, "a block `NODE` that takes part in the snapshot; without the flag, all that are written, which must be qcow2")
	}
}

// orLive has a verb do fn where --qmp is given.
func (a *app) orLive(c *cobra.Command, long string, fn func(context.Context, *qmpFlags, []string) error) *qmpFlags {
	q := new(qmpFlags)
	q.flags(c, true)
	c.Long += "\n\n" + long
	offline := c.RunE
	c.RunE = func(c *cobra.Command, args []string) error {
		if q.address != "" {
			a.started = true
			return fn(c.Context(), q, args)
		}
		for _, flag := range []string{"node", "timeout", "snapshot-node", "stale-devices"} {
			if c.Flags().Changed(flag) {
				return usagef("--%s is for a machine that runs, and there is no --qmp", flag)
			}
		}
		return offline(c, args)
	}
	return q
}

// options are package live's. disk may be empty.
func (q *qmpFlags) options(disk string) (*live.Options, error) {
	if q.timeout <= 0 {
		return nil, invalidf("--timeout %v: more than 0", q.timeout)
	}
	return &live.Options{Node: q.node, Image: disk, Devices: q.devices, Timeout: q.timeout, Stale: q.stale}, nil
}

// explainLive adds the next step to what QEMU says.
func explainLive(err error) error {
	if err == nil {
		return nil
	}
	text := err.Error()
	hint := ""
	switch {
	case errors.Is(err, qmp.ErrBusy):
		hint = "a monitor takes one client at a time; give the machine a second one, as vm args prints it with two --qmp"
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, qmp.ErrProtocol):
		hint = "does the machine run, and is this its QMP socket?"
	case errors.Is(err, live.ErrNode):
		hint = "start the machine with what nvtool vm args prints, or name the node with --node"
	case errors.Is(err, live.ErrInUse):
		hint = "stop the service that is attached; nvtool vm detach --force cuts it off"
	case errors.Is(err, live.ErrServer):
		hint = "end what uses it, as a backup; QMP's query-block-exports shows what is exported"
	case errors.Is(err, live.ErrWriters):
		hint = "a service that writes to the store hangs; stop it, or give it more --timeout"
	case errors.Is(err, live.ErrStopped):
		hint = "revert to a snapshot that can be loaded; QMP's cont lets the machine go on as it is"
	case errors.Is(err, live.ErrDevice) && strings.Contains(text, "would hang"):
		hint = "end QEMU, nvtool vm revert DISK TAG, and start it again: it boots from the reverted disk"
	case errors.Is(err, live.ErrDevice):
		hint = "end QEMU, nvtool vm revert DISK TAG, start it again with -S, and load the snapshot's memory with --qmp and --stale-devices"
	case strings.Contains(text, "is written, and has no snapshots"):
		hint = "make it read-only or a qcow2; or name those that take part with --snapshot-node, and the others keep what they have"
	case strings.Contains(text, "encrypted by itself"):
		hint = "stop the machine, and use nvtool vm snapshot or revert on DISK; or move the disk into a container: nvtool img convert -f raw -O luks"
	case strings.Contains(text, "has no memory"):
		hint = "stop the machine, and revert its disk with nvtool vm revert DISK TAG"
	case strings.Contains(text, "Operation not supported"):
		hint = "a snapshot of an image of another size can't be loaded while the machine runs; stop it, and revert with nvtool vm revert DISK TAG"
	default:
		return err
	}
	return withHint(err, hint)
}

// connect connects to a machine that runs.
func (q *qmpFlags) connect(ctx context.Context, disk string) (*live.Machine, error) {
	o, err := q.options(disk)
	if err != nil {
		return nil, err
	}
	m, err := live.Connect(ctx, q.address, o)
	return m, explainLive(err)
}

// split takes [DISK] TAG apart, where tags is 1, or [DISK].
func (q *qmpFlags) split(args []string, tags int) (disk, tag string, err error) {
	if len(args) < tags || len(args) > tags+1 {
		return "", "", usagef("%d arguments, and with --qmp the verb takes %s", len(args), map[int]string{0: "DISK or none", 1: "one TAG, and DISK before it or not"}[tags])
	}
	if tags == 1 {
		tag, args = args[len(args)-1], args[:len(args)-1]
		if tag == "" {
			return "", "", usagef("the TAG is empty")
		}
	}
	if len(args) == 1 {
		disk = args[0]
	}
	return disk, tag, nil
}

// A liveDone is what a verb on a running machine's snapshots prints.
type liveDone struct {
	Tag     string `json:"tag"`
	QEMU    string `json:"qemu"`
	State   string `json:"state"` // the machine's run state afterwards
	Seconds string `json:"seconds"`
}

// vmSnapshotLive takes, loads or removes a snapshot of a machine that runs.
func (a *app) vmSnapshotLive(ctx context.Context, q *qmpFlags, args []string, doing, done string,
	do func(*live.Machine, context.Context, string, func(done, total int64)) error) (err error) {
	disk, tag, err := q.split(args, 1)
	if err != nil {
		return err
	}
	m, err := q.connect(ctx, disk)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	begun := time.Now()
	end := a.wait(doing + " " + printable(tag))
	err = do(m, ctx, tag, nil)
	end()
	if err != nil {
		return explainLive(err)
	}
	state, _, err := m.Status(ctx)
	if err != nil {
		return err
	}
	took := time.Since(begun)
	if a.json {
		return a.printJSON(liveDone{tag, m.Version(), state, fmt.Sprintf("%.3f", took.Seconds())})
	}
	a.sayf("%s %s; the machine is in state %s", done, printable(tag), state)
	return nil
}

// vmLsLive lists a running machine's snapshots.
func (a *app) vmLsLive(ctx context.Context, q *qmpFlags, args []string) (err error) {
	disk, _, err := q.split(args, 0)
	if err != nil {
		return err
	}
	m, err := q.connect(ctx, disk)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	list, err := m.Snapshots(ctx)
	if err != nil {
		return explainLive(err)
	}
	if a.json {
		return a.printJSON(list)
	}
	rows := make([][]string, len(list))
	for i, s := range list {
		problem := ""
		if len(s.Missing) > 0 {
			problem = "not on " + printableAll(s.Missing)
		}
		rows[i] = []string{printable(s.ID), printable(s.Name), time.Unix(s.Seconds, 0).UTC().Format(time.RFC3339), roughSize(s.VMStateSize),
			printableAll(s.Devices), problem}
	}
	return a.printTable([]string{"id", "tag", "taken", "vm state", "nodes", "problem"}, rows)
}

// wait shows on a terminal that something takes its time. QEMU doesn't tell how
// far it is.
func (a *app) wait(label string) (end func()) {
	if a.quiet || !isTerminal(a.err) {
		return func() {}
	}
	p := mpb.New(mpb.WithOutput(a.err), mpb.WithWidth(8))
	b := p.AddSpinner(0, mpb.BarRemoveOnComplete(), mpb.PrependDecorators(decor.Name(label+" ")), mpb.AppendDecorators(decor.Elapsed(decor.ET_STYLE_GO)))
	return func() {
		b.Abort(true)
		p.Wait()
	}
}
