package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/machine"
	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
)

// A vmSnapshotJob is one of the verbs on a machine's snapshots.
type vmSnapshotJob struct {
	*app
	ref   diskRef
	key   keyFlags
	tag   string
	force bool

	cred *keyslot.Credential
	disk *machine.Disk
	set  image.SnapshotSet
}

// vmSnapshotVerb makes a verb on the snapshots of a machine that is off. fn
// has the disk open.
func (a *app) vmSnapshotVerb(use, short, long string, tags int, readOnly bool, fn func(*vmSnapshotJob) error) (*cobra.Command, *vmSnapshotJob) {
	j := &vmSnapshotJob{app: a}
	c := a.verb(use, short, func(ctx context.Context, args []string) error {
		args, err := j.ref.take(args, tags, tags, map[int]string{1: "one TAG"}[tags])
		if err != nil {
			return err
		}
		if tags == 1 {
			if j.tag = args[0]; j.tag == "" {
				return usagef("the TAG is empty")
			}
		}
		return j.offline(ctx, readOnly, fn)
	})
	c.Long = long
	j.ref.flags(c)
	j.key.flags(c, "the store's ")
	return c, j
}

func (j *vmSnapshotJob) offline(ctx context.Context, readOnly bool, fn func(*vmSnapshotJob) error) (err error) {
	if err := j.ref.secrets.load(ctx, j.app, &j.ref.imageRef); err != nil {
		return err
	}
	defer j.ref.secrets.wipe()
	if j.cred, err = j.key.credential(ctx, j.app, false); err != nil {
		return err
	}
	defer wipe(j.cred)
	if j.disk, err = j.openDisk(&j.ref, readOnly); err != nil {
		if errors.Is(err, image.ErrLocked) {
			err = withHint(err, "if the machine runs, give its QMP socket with --qmp")
		}
		return err
	}
	defer closeAll(&err, j.disk.Device())
	sn, ok := image.As[image.Snapshotter](j.disk.Device())
	if !ok {
		return withHint(fmt.Errorf("%s: snapshots of a %s image: %w", j.ref.location, formatOf(j.disk.Device()), image.ErrUnsupported),
			"only qcow2 images have snapshots; nvtool img convert -O qcow2 makes one, and nvtool vm adopt marks it")
	}
	j.set = sn.Snapshots()
	if err := ctx.Err(); err != nil {
		return err
	}
	return j.explain(&j.ref.imageRef, fn(j))
}

// A vmState is what a machine's disk has at some instant.
type vmState struct {
	Tag        string `json:"tag"`
	DiskSize   int64  `json:"disk_size"`
	Generation int64  `json:"generation"`
	Blobs      int64  `json:"blobs"`
}

// state looks at layout and store.
func (j *vmSnapshotJob) state(dev image.Device) (*vmState, error) {
	d, err := machine.Open(dev)
	if err != nil {
		return nil, err
	}
	s := &vmState{Tag: j.tag, DiskSize: d.Layout().DiskSize}
	ref := imageRef{tail: "yes"}
	err = peek(dev, &ref, j.cred, func(st *nvstore.Store) error {
		j.warnStatus(st)
		info, err := st.Info()
		if err == nil {
			s.Generation, s.Blobs = info.Generation, info.Blobs
		}
		return err
	})
	if errors.Is(err, nvstore.ErrKey) && j.cred == nil {
		err = errNoKey
	}
	return s, err
}

func (j *vmSnapshotJob) told(format string, s *vmState) error {
	if j.json {
		return j.printJSON(s)
	}
	j.sayf("%s: "+format+": a disk of %s, generation %d with %s", printable(j.ref.location), printable(j.tag),
		roughSize(s.DiskSize), s.Generation, count(s.Blobs, "blob"))
	return nil
}

func (a *app) vmSnapshotCmd() *cobra.Command {
	c, _ := a.vmSnapshotVerb("snapshot {DISK | --qmp SOCKET} TAG", "Take a snapshot of disk and state",
		"Take a snapshot of a machine that is off: of its disk and its state, at the same instant.", 1, false,
		func(j *vmSnapshotJob) error {
			s, err := j.state(j.disk.Device())
			if err != nil {
				return err
			}
			if err := j.set.Create(j.tag); err != nil {
				return err
			}
			return j.told("took snapshot %s", s)
		})
	a.orLive(c, `With --qmp, of a machine that runs or is paused, and with its memory: services
that are attached are kept out meanwhile, and the machine goes on as it was.`,
		func(ctx context.Context, q *qmpFlags, args []string) error {
			return a.vmSnapshotLive(ctx, q, args, "saving", "took snapshot", (*live.Machine).Save)
		})
	return c
}

func (a *app) vmRmCmd() *cobra.Command {
	c, _ := a.vmSnapshotVerb("rm {DISK | --qmp SOCKET} TAG", "Remove a snapshot", "Remove a snapshot of a machine that is off. Disk and state stay as they are.", 1, false,
		func(j *vmSnapshotJob) error {
			if err := j.set.Delete(j.tag); err != nil {
				return err
			}
			j.sayf("%s: removed snapshot %s", printable(j.ref.location), printable(j.tag))
			return nil
		})
	a.orLive(c, "With --qmp, of one that runs.", func(ctx context.Context, q *qmpFlags, args []string) error {
		return a.vmSnapshotLive(ctx, q, args, "removing", "removed snapshot", (*live.Machine).Delete)
	})
	return c
}

func (a *app) vmRevertCmd() *cobra.Command {
	c, j := a.vmSnapshotVerb("revert {DISK | --qmp SOCKET} TAG", "Make disk and state what they were at a snapshot",
		`Make disk and state of a machine that is off what they were when the snapshot
was taken. What was written since is lost unless another snapshot keeps it. The
machine boots from its disk then. If the snapshot has its memory, too, start it
with -S, and load the snapshot with --qmp.`, 1, false, (*vmSnapshotJob).revert)
	c.Flags().BoolVar(&j.force, "force", false, "also to a snapshot from before the image was a machine's disk, which has no store")
	q := a.orLive(c, `With --qmp, disk, memory and state of a machine that runs or is paused, which goes
on as it was: services that are attached are kept out meanwhile, and see what was
reverted at once. Some devices keep what they have read of their drive, and show
it after the revert: with those, or where QEMU would hang, nothing is done.
--stale-devices is for a machine that was just started from the reverted disk.`, func(ctx context.Context, q *qmpFlags, args []string) error {
		return a.vmSnapshotLive(ctx, q, args, "reverting to", "reverted to snapshot", (*live.Machine).Load)
	})
	c.Flags().BoolVar(&q.stale, "stale-devices", false, "also if devices would go on with what they read of their drives before")
	return c
}

func (j *vmSnapshotJob) revert() error {
	s, err := find(j.set, j.tag)
	if err != nil {
		return err
	}
	old := s.DiskSize != j.disk.Layout().ImageSize
	if old && !j.force {
		return withHint(invalidf("snapshot %s is from before the image was a machine's disk: it has %d bytes, and no store", printable(j.tag), s.DiskSize),
			"--force reverts to it; nvtool vm adopt makes the image a machine's disk again")
	}
	if err := j.set.Revert(j.tag); err != nil {
		return err
	}
	if old {
		j.sayf("%s: reverted to snapshot %s, which has no store", printable(j.ref.location), printable(j.tag))
		return nil
	}
	now, err := j.state(j.disk.Device())
	if err != nil {
		return fmt.Errorf("the disk was reverted, and its store can't be opened: %w", err)
	}
	if s.VMStateSize > 0 {
		j.warnf("the snapshot has the machine's memory, too, which isn't loaded: for that start the machine with -S, and revert it with --qmp")
	}
	return j.told("reverted to snapshot %s", now)
}

// find looks for a snapshot by ID, then by name.
func find(set image.SnapshotSet, tag string) (*image.Snapshot, error) {
	list, err := set.List()
	if err != nil {
		return nil, err
	}
	for _, match := range []func(*image.Snapshot) bool{
		func(s *image.Snapshot) bool { return s.ID == tag },
		func(s *image.Snapshot) bool { return s.Name == tag },
	} {
		for i := range list {
			if match(&list[i]) {
				return &list[i], nil
			}
		}
	}
	return nil, fmt.Errorf("snapshot %q: %w", tag, image.ErrNotFound)
}

// A vmSnapshot is a snapshot and what is in it.
type vmSnapshot struct {
	image.Snapshot
	GuestDisk  int64  `json:"guest_disk"` // 0 if it isn't a machine's disk
	Generation int64  `json:"generation"` // of the store; 0 if there is none
	Blobs      int64  `json:"blobs"`
	Problem    string `json:"problem,omitempty"` // why the store can't be opened
}

func (a *app) vmLsCmd() *cobra.Command {
	c, _ := a.vmSnapshotVerb("ls {DISK | --qmp SOCKET}", "List the snapshots", `List the snapshots, those that QEMU took too, with what the store has in each. With
--snapshot TAG, nvtool ls, get, info, check and map look into one.`, 0, true, (*vmSnapshotJob).list)
	a.orLive(c, "With --qmp, of a machine that runs, with the block nodes that have each.", a.vmLsLive)
	return c
}

func (j *vmSnapshotJob) list() error {
	list, err := j.set.List()
	if err != nil {
		return err
	}
	out := make([]vmSnapshot, 0, len(list))
	for _, s := range list {
		v := vmSnapshot{Snapshot: s}
		if err := j.look(&v); err != nil {
			v.Problem = err.Error()
		}
		out = append(out, v)
	}
	if j.json {
		return j.printJSON(out)
	}
	rows := make([][]string, 0, len(out))
	for _, v := range out {
		rows = append(rows, []string{v.ID, printable(v.Name), time.Unix(v.Seconds, 0).UTC().Format(time.RFC3339), roughSize(v.VMStateSize), roughSize(v.GuestDisk),
			fmt.Sprint(v.Generation), fmt.Sprint(v.Blobs), printable(v.Problem)})
	}
	return j.printTable([]string{"id", "tag", "taken", "vm state", "disk size", "generation", "blobs", "problem"}, rows)
}

// look opens the image as it was at the snapshot.
func (j *vmSnapshotJob) look(v *vmSnapshot) (err error) {
	dev, err := chain.Open(j.ref.location, &chain.Options{Format: j.ref.format, ReadOnly: true, AllowExternal: j.ref.allow,
		Snapshot: v.ID, Secret: j.ref.secrets.get})
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	s, err := j.state(dev)
	if err == nil {
		v.GuestDisk, v.Generation, v.Blobs = s.DiskSize, s.Generation, s.Blobs
	}
	return err
}
