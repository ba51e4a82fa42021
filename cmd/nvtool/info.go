package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/nvstore"
)

func (a *app) infoCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	c := a.verb("info IMAGE", "Print facts about an image and its store", func(ctx context.Context, args []string) (err error) {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		s, err := a.open(ctx, &ref, &key, browsing)
		if err != nil {
			return err
		}
		defer closing(s, &err)
		info, err := s.Info()
		if err != nil {
			return err
		}
		d := describe(s, info, &ref)
		if err := d.countLive(s); err != nil {
			return a.explain(&ref, err)
		}
		if a.json {
			return a.printJSON(d)
		}
		return a.printInfo(d)
	})
	c.Long = "Print facts about an image and its store. No key is needed; with one, the facts are authenticated."
	ref.flags(c)
	ref.previousFlag(c)
	key.flags(c, "the ")
	return c
}

// A description is what info prints.
type description struct {
	Image          string           `json:"image"`
	Format         string           `json:"format"`
	VirtualSize    int64            `json:"virtual_size"`
	FileSize       int64            `json:"file_size"`
	DiskSize       int64            `json:"disk_size"` // allocated on the file system
	MaxSize        int64            `json:"max_size"`  // 0: no limit
	UUID           string           `json:"uuid"`
	Generation     int64            `json:"generation"`
	Sealed         bool             `json:"sealed"`
	SealNames      bool             `json:"seal_names"`
	KeySlots       []slotFacts      `json:"key_slots"`
	Blobs          int64            `json:"blobs"`
	Live           int64            `json:"live_extents"`
	Attached       int64            `json:"attached"` // of the live extents
	UsedBytes      int64            `json:"used_bytes"`
	FreeBytes      int64            `json:"free_bytes"`
	Settled        bool             `json:"settled"`
	Recovered      string           `json:"recovered"` // why the newest generation doesn't count
	FreeRebuilt    string           `json:"free_rebuilt"`
	HeaderDamaged  string           `json:"header_damaged"`
	SettledDamaged string           `json:"settled_damaged"`
	Snapshots      []image.Snapshot `json:"snapshots,omitempty"`
}

func describe(s *nvstore.Store, in *nvstore.Info, ref *imageRef) *description {
	dev := s.Dir().Device()
	d := &description{Image: ref.location, Format: formatOf(dev), VirtualSize: in.Size, MaxSize: in.MaxSize,
		UUID: uuidText(in.UUID), Generation: in.Generation, Sealed: in.Sealed, SealNames: in.SealNames,
		KeySlots: slotList(in.KeySlots), Blobs: in.Blobs, UsedBytes: in.Used, FreeBytes: in.Free, Settled: in.Settled,
		Recovered: in.Status.Recovered, FreeRebuilt: in.Status.FreeRebuilt, HeaderDamaged: in.Status.HeaderDamaged,
		SettledDamaged: in.Status.SettledDamaged}
	d.FileSize, d.DiskSize, _ = fileSize(ref.location)
	if sn, ok := image.As[image.Snapshotter](dev); ok {
		d.Snapshots, _ = sn.Snapshots().List() // of a stack that has none, nothing
	}
	return d
}

// countLive counts the live extents.
func (d *description) countLive(s *nvstore.Store) error {
	return s.View(func(tx *nvstore.Tx) error {
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			if e.Live {
				d.Live++
			}
			if e.Attached {
				d.Attached++
			}
		}
		return nil
	})
}

func (a *app) printInfo(d *description) error {
	yes := map[bool]string{true: "yes", false: "no"}
	limit := "none"
	if d.MaxSize > 0 {
		limit = roughSize(d.MaxSize)
	}
	rows := [][]string{
		{"image", printable(d.Image)},
		{"format", d.Format},
		{"virtual size", roughSize(d.VirtualSize)},
		{"size limit", limit},
	}
	if d.FileSize > 0 {
		rows = append(rows, []string{"file size", fmt.Sprintf("%s (%s allocated)", roughSize(d.FileSize), roughSize(d.DiskSize))})
	}
	sealed := yes[d.Sealed]
	if d.SealNames {
		sealed += ", names too"
	}
	rows = append(rows, [][]string{
		{"uuid", d.UUID},
		{"generation", fmt.Sprint(d.Generation)},
		{"sealed", sealed},
		{"key slots", fmt.Sprint(len(d.KeySlots))},
		{"blobs", fmt.Sprint(d.Blobs)},
		{"live extents", fmt.Sprintf("%d, %d of them attached", d.Live, d.Attached)},
		{"used", roughSize(d.UsedBytes)},
		{"free", roughSize(d.FreeBytes)},
		{"settled", yes[d.Settled]},
		{"snapshots", fmt.Sprint(len(d.Snapshots))},
	}...)
	for _, n := range []struct{ name, text string }{{"recovered", d.Recovered}, {"free space", d.FreeRebuilt}, {"header", d.HeaderDamaged}, {"settled record", d.SettledDamaged}} {
		if n.text != "" {
			rows = append(rows, []string{n.name, n.text})
		}
	}
	return a.printTable([]string{"fact", "value"}, rows)
}
