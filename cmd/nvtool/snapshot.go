package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/nvstore"
)

// snapshotVerb makes a verb on a qcow2's internal snapshots. fn gets the set
// and the tag, with the image open and known to hold a store.
func (a *app) snapshotVerb(use, short, long string, tags int, readOnly bool,
	fn func(*snapshotJob) error) *cobra.Command {
	j := &snapshotJob{app: a}
	c := a.verb(use, short, func(ctx context.Context, args []string) (err error) {
		args, err = j.ref.take(args, tags, tags, map[int]string{1: "one TAG"}[tags])
		if err != nil {
			return err
		}
		if tags == 1 {
			if j.tag = args[0]; j.tag == "" {
				return usagef("the TAG is empty")
			}
		}
		return j.run(ctx, readOnly, fn)
	})
	c.Long = long
	j.ref.flags(c)
	j.key.flags(c, "the ")
	return c
}

type snapshotJob struct {
	*app
	ref  imageRef
	key  keyFlags
	tag  string
	cred *keyslot.Credential
	dev  image.Device
	set  image.SnapshotSet
}

func (j *snapshotJob) run(ctx context.Context, readOnly bool, fn func(*snapshotJob) error) (err error) {
	if err := j.ref.secrets.load(ctx, j.app, &j.ref); err != nil {
		return err
	}
	defer j.ref.secrets.wipe()
	if j.cred, err = j.key.credential(ctx, j.app, false); err != nil {
		return err
	}
	defer wipe(j.cred)
	if j.dev, err = j.device(&j.ref, readOnly); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.dev.Close()) }()
	sn, ok := image.As[image.Snapshotter](j.dev)
	if !ok {
		return withHint(fmt.Errorf("%s: snapshots of a %s image: %w", j.ref.location, formatOf(j.dev), image.ErrUnsupported),
			"only qcow2 images have snapshots; copy the image instead, or nvtool create -f qcow2 and put the blobs there")
	}
	j.set = sn.Snapshots()
	if err := ctx.Err(); err != nil {
		return err
	}
	return j.explain(&j.ref, fn(j))
}

// store demands a store, and returns its generation and number of blobs. A
// store that a revert cut through is let pass: reverting is the remedy.
func (j *snapshotJob) store() (info *nvstore.Info, err error) {
	err = peek(j.dev, &j.ref, j.cred, func(s *nvstore.Store) error {
		j.warnStatus(s)
		info, err = s.Info()
		return err
	})
	if errors.Is(err, nvstore.ErrKey) && j.cred == nil {
		err = errNoKey
	}
	return info, err
}

func (a *app) snapshotCreateCmd() *cobra.Command {
	return a.snapshotVerb("create IMAGE TAG", "Take a snapshot of the whole image",
		"Take an internal snapshot of the whole image, as qemu-img snapshot -c does. It keeps the store as it is.", 1, false,
		func(j *snapshotJob) error {
			info, err := j.store()
			if err != nil {
				return err
			}
			if err := j.set.Create(j.tag); err != nil {
				return err
			}
			return j.told("snapshot %s of generation %d", info)
		})
}

func (a *app) snapshotRmCmd() *cobra.Command {
	return a.snapshotVerb("rm IMAGE TAG", "Remove a snapshot", "Remove an internal snapshot. The image stays as it is.", 1, false,
		func(j *snapshotJob) error {
			if err := j.set.Delete(j.tag); err != nil {
				return err
			}
			j.sayf("removed snapshot %s", printable(j.tag))
			return nil
		})
}

func (a *app) snapshotRevertCmd() *cobra.Command {
	return a.snapshotVerb("revert IMAGE TAG", "Make the image what it was at a snapshot",
		`Make the whole image what it was when the snapshot was taken, a disk in it
included. What was written since is lost unless another snapshot keeps it.`, 1, false,
		func(j *snapshotJob) error {
			// A damaged store is a reason to revert; an image without
			// one isn't ours to change.
			if _, err := j.store(); err != nil && !isDamage(err) {
				return err
			}
			if err := j.set.Revert(j.tag); err != nil {
				return err
			}
			info, err := j.store()
			if errors.Is(err, blobdir.ErrFormat) {
				return withHint(fmt.Errorf("the image was reverted, and snapshot %s holds no store: %w", printable(j.tag), err),
					"revert to a snapshot that was taken after nvtool create")
			}
			if err != nil {
				return fmt.Errorf("the image was reverted, and the store can't be opened: %w", err)
			}
			return j.told("reverted to snapshot %s: generation %d", info)
		})
}

func (j *snapshotJob) told(format string, info *nvstore.Info) error {
	if j.json {
		return j.printJSON(struct {
			Tag        string `json:"tag"`
			Generation int64  `json:"generation"`
			Blobs      int64  `json:"blobs"`
		}{j.tag, info.Generation, info.Blobs})
	}
	j.sayf(format, printable(j.tag), info.Generation)
	return nil
}

func (a *app) snapshotLsCmd() *cobra.Command {
	return a.snapshotVerb("ls IMAGE", "List the snapshots", "List the internal snapshots, those that QEMU took too.", 0, true,
		func(j *snapshotJob) error {
			list, err := j.set.List()
			if err != nil {
				return err
			}
			if j.json {
				if list == nil {
					list = []image.Snapshot{}
				}
				return j.printJSON(list)
			}
			rows := make([][]string, len(list))
			for i, s := range list {
				rows[i] = []string{printable(s.ID), printable(s.Name), time.Unix(s.Seconds, 0).UTC().Format(time.RFC3339),
					roughSize(s.DiskSize), roughSize(s.VMStateSize)}
			}
			return j.printTable([]string{"id", "tag", "taken", "disk size", "vm state"}, rows)
		})
}
