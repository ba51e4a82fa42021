package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

const vmAbout = `Work on a machine's disk: one image with the guest's disk, and in its tail, which
the guest never sees, the store of what the machine's devices remember. Snapshots
of the image are of both at the same instant.

A layout record at the image's end says what lies where, so every copy of the
disk is one, too. All other verbs find the store by it: nvtool ls DISK.qcow2.`

func (a *app) vmCmd() *cobra.Command {
	c := group("vm", "Make, change and run a machine's disk with the state in its tail",
		a.vmCreateCmd(), a.vmAdoptCmd(), a.vmResizeCmd(), a.vmInfoCmd(), a.vmArgsCmd(),
		a.vmSnapshotCmd(), a.vmRevertCmd(), a.vmLsCmd(), a.vmRmCmd(),
		a.vmAttachCmd(), a.vmDetachCmd(), a.vmAddDiskCmd())
	c.Long = vmAbout
	return c
}

// A diskRef names a machine's disk.
type diskRef struct {
	imageRef
	share bool
}

func (r *diskRef) flags(c *cobra.Command) {
	r.register(c, "format")
	r.allowFlag(c)
}

// shareFlag adds -U to a verb that reads.
func (r *diskRef) shareFlag(c *cobra.Command) {
	c.Flags().BoolVarP(&r.share, "force-share", "U", false, "read without a lock what may be changing, as a running machine's disk")
}

// openDisk opens a machine's disk. The secrets must have been loaded.
func (a *app) openDisk(ref *diskRef, readOnly bool) (*machine.Disk, error) {
	dev, err := chain.Open(ref.location, &chain.Options{Format: ref.format, ReadOnly: readOnly, NoLock: ref.share && readOnly,
		AllowExternal: ref.allow, Secret: ref.secrets.get})
	if err != nil {
		return nil, a.explain(&ref.imageRef, err)
	}
	d, err := layoutOf(dev)
	if err == nil {
		err = ref.secrets.unused()
	}
	if err != nil {
		return nil, errors.Join(a.explain(&ref.imageRef, err), dev.Close())
	}
	if s := d.Status(); s != nil {
		a.warnf("one copy of the layout record is damaged, and the other one counts: %v", s)
	}
	return d, nil
}

// layoutOf reads the layout of what may be a machine's disk.
func layoutOf(dev image.Device) (*machine.Disk, error) {
	switch chain.MarkOf(dev) {
	case chain.MarkStore:
		return nil, withHint(fmt.Errorf("the image is a store's from its first byte on: %w", machine.ErrNoLayout),
			"nvtool vm create makes a machine's disk; put the blobs there")
	case chain.MarkMachine, chain.Unmarked:
	default:
		_, err := nvstore.Locate(dev, nvstore.Found)
		return nil, err
	}
	d, err := machine.Open(dev)
	if errors.Is(err, machine.ErrNoLayout) {
		err = withHint(err, "nvtool vm adopt makes an image a machine's disk; if its size was changed, change it back")
	}
	return d, err
}

// diskFacts are what is printed of a machine's disk.
type diskFacts struct {
	Image       string `json:"image"`
	Format      string `json:"format"`
	Machine     string `json:"machine"`
	VirtualSize int64  `json:"virtual_size"`
	DiskSize    int64  `json:"disk_size"`
	MaxDisk     int64  `json:"max_disk"`
	StateOffset int64  `json:"state_offset"`
	StateSize   int64  `json:"state_size"`
	Sequence    int64  `json:"sequence"`
	Damaged     string `json:"damaged,omitempty"` // why one copy of the record can't be read

	Store     *description     `json:"store,omitempty"`
	Snapshots []image.Snapshot `json:"snapshots"`
}

func factsOf(location string, d *machine.Disk) *diskFacts {
	l := d.Layout()
	f := &diskFacts{Image: location, Format: formatOf(d.Device()), Machine: uuidText(l.Machine), VirtualSize: l.ImageSize,
		DiskSize: l.DiskSize, MaxDisk: l.MaxDisk(), StateOffset: l.StateOffset, StateSize: l.StateSize, Sequence: l.Sequence,
		Snapshots: []image.Snapshot{}}
	if s := d.Status(); s != nil {
		f.Damaged = s.Error()
	}
	return f
}

func (a *app) vmInfoCmd() *cobra.Command {
	var ref diskRef
	var key keyFlags
	c := a.verb("info DISK", "Print what lies where on a machine's disk", func(ctx context.Context, args []string) error {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		return a.vmInfo(ctx, &ref, &key)
	})
	c.Long = "Print what lies where on a machine's disk, and facts about the store in its tail. No key is needed."
	ref.flags(c)
	ref.shareFlag(c)
	key.flags(c, "the ")
	return c
}

func (a *app) vmInfo(ctx context.Context, ref *diskRef, key *keyFlags) (err error) {
	cred, done, err := a.keys(ctx, &ref.imageRef, key, false)
	if err != nil {
		return err
	}
	defer done()
	d, err := a.openDisk(ref, true)
	if err != nil {
		return err
	}
	defer closeAll(&err, d.Device())
	f := factsOf(ref.location, d)
	ref.tail = "yes"
	err = peek(d.Device(), &ref.imageRef, cred, func(s *nvstore.Store) error {
		a.warnStatus(s)
		info, err := s.Info()
		if err == nil {
			f.Store = describe(s, info, &ref.imageRef)
			f.Store.Snapshots = nil
		}
		return err
	})
	if err != nil {
		return a.explain(&ref.imageRef, err)
	}
	if sn, ok := image.As[image.Snapshotter](d.Device()); ok {
		if f.Snapshots, err = sn.Snapshots().List(); err != nil {
			return a.explain(&ref.imageRef, err)
		}
	}
	if a.json {
		return a.printJSON(f)
	}
	return a.printDisk(f)
}

func (a *app) printDisk(f *diskFacts) error {
	rows := [][]string{
		{"image", printable(f.Image)},
		{"format", f.Format},
		{"machine", f.Machine},
		{"guest's disk", roughSize(f.DiskSize) + ", at most " + roughSize(f.MaxDisk)},
		{"state window", fmt.Sprintf("%s at byte %d", roughSize(f.StateSize), f.StateOffset)},
		{"virtual size", roughSize(f.VirtualSize)},
	}
	if s := f.Store; s != nil {
		sealed := "no"
		if s.Sealed {
			sealed = "yes"
		}
		rows = append(rows, [][]string{
			{"store", s.UUID},
			{"generation", fmt.Sprint(s.Generation)},
			{"sealed", sealed},
			{"blobs", fmt.Sprint(s.Blobs)},
			{"used", roughSize(s.UsedBytes)},
		}...)
	}
	rows = append(rows, []string{"snapshots", fmt.Sprint(len(f.Snapshots))})
	for _, s := range f.Snapshots {
		rows = append(rows, []string{"", printable(s.Name) + ", " + time.Unix(s.Seconds, 0).UTC().Format(time.RFC3339)})
	}
	return a.printTable([]string{"fact", "value"}, rows)
}
