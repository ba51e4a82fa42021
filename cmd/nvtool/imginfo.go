package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/image/raw"
)

func (a *app) imgInfoCmd() *cobra.Command {
	var ref imgRef
	var all bool
	c := a.verb("info IMAGE", "Print facts about an image", func(ctx context.Context, args []string) error {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		return a.imgInfo(ctx, &ref, all)
	})
	c.Long = `Print what an image's header says. No other file is opened, whatever the header
names, unless --backing-chain shows the images below too. Without -f the format
shown is what the file begins as; nothing acts on it.`
	ref.flags(c)
	ref.shareFlag(c)
	a.outputFlag(c)
	c.Flags().BoolVar(&all, "backing-chain", false, "show the backing files too, which takes --allow-external")
	return c
}

// imgFacts are qemu-img info's.
type imgFacts struct {
	BackingFormat string         `json:"backing-filename-format,omitempty"`
	Snapshots     []snapFacts    `json:"snapshots,omitempty"`
	VirtualSize   int64          `json:"virtual-size"`
	Filename      string         `json:"filename"`
	ClusterSize   int            `json:"cluster-size,omitempty"`
	Encrypted     bool           `json:"encrypted,omitempty"`
	Format        string         `json:"format"`
	ActualSize    int64          `json:"actual-size"`
	Specific      *specificFacts `json:"format-specific,omitempty"`
	FullBacking   string         `json:"full-backing-filename,omitempty"`
	Backing       string         `json:"backing-filename,omitempty"`
	Dirty         bool           `json:"dirty-flag"`

	dataFile string
}

type snapFacts struct {
	ICount      *int64 `json:"icount,omitempty"`
	VMClockNSec int64  `json:"vm-clock-nsec"`
	Name        string `json:"name"`
	DateSec     int64  `json:"date-sec"`
	DateNSec    int64  `json:"date-nsec"`
	VMClockSec  int64  `json:"vm-clock-sec"`
	ID          string `json:"id"`
	VMStateSize int64  `json:"vm-state-size"`
}

type specificFacts struct {
	Type string `json:"type"`
	Data any    `json:"data"` // qcow2Facts or cryptFacts
}

type qcow2Facts struct {
	Compat      string `json:"compat"`
	DataFile    string `json:"data-file,omitempty"`
	DataFileRaw *bool  `json:"data-file-raw,omitempty"`
	Compression string `json:"compression-type"`
	Lazy        *bool  `json:"lazy-refcounts,omitempty"`
	Refcount    int    `json:"refcount-bits"`
	Corrupt     *bool  `json:"corrupt,omitempty"`
	ExtendedL2  *bool  `json:"extended-l2,omitempty"`

	Bitmaps []qcow2.Bitmap `json:"bitmaps,omitempty"`

	Encrypt *cryptFacts `json:"encrypt,omitempty"`
}

func (a *app) imgInfo(ctx context.Context, ref *imgRef, all bool) (err error) {
	if all {
		return a.imgInfoChain(ctx, ref)
	}
	facts, err := a.inspect(ctx, ref)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(facts)
	}
	a.printImgInfo(facts)
	return nil
}

func (a *app) imgInfoChain(ctx context.Context, ref *imgRef) error {
	list, err := a.backingChain(ctx, ref)
	if err != nil {
		return err
	}
	if a.json {
		return a.printJSON(list)
	}
	for i, f := range list {
		if i > 0 {
			fmt.Fprintln(a.out)
		}
		a.printImgInfo(f)
	}
	return nil
}

// inspect reads an image's header.
func (a *app) inspect(ctx context.Context, ref *imgRef) (facts *imgFacts, err error) {
	if ref.opts != "" || strings.Contains(ref.location, "driver=") || strings.HasPrefix(ref.location, "pebble:") {
		return a.inspectStack(ctx, ref)
	}
	file, err := raw.Open(ref.location, &raw.Options{ReadOnly: true, NoLock: ref.share})
	if err != nil {
		return nil, a.explain(&ref.imageRef, err)
	}
	defer closeAll(&err, file)
	facts = &imgFacts{Filename: ref.location, Format: chain.Raw, VirtualSize: file.Size()}
	_, facts.ActualSize, _ = fileSize(ref.location)
	magic := make([]byte, 4)
	if n, _ := file.ReadAt(magic, 0); ref.format == chain.QCOW2 || ref.format == "" && n == 4 && bytes.Equal(magic, []byte("QFI\xfb")) {
		return facts, facts.qcow2(file, ref.location)
	}
	return facts, facts.luks(file, ref.format)
}

// inspectStack tells what a stack shows, which is open to be read.
func (a *app) inspectStack(ctx context.Context, ref *imgRef) (facts *imgFacts, err error) {
	dev, err := a.openImg(ctx, ref, true)
	if err != nil {
		return nil, err
	}
	defer closeAll(&err, dev)
	facts = &imgFacts{Filename: ref.location, Format: formatOf(dev), VirtualSize: dev.Size()}
	if im, ok := image.As[*qcow2.Image](dev); ok {
		info, err := im.Info()
		if err != nil {
			return nil, err
		}
		facts.fill(info)
	}
	return facts, nil
}

func (f *imgFacts) qcow2(file image.Device, path string) error {
	info, err := qcow2.Inspect(file, path)
	if err != nil {
		return err
	}
	var bitmaps []qcow2.Bitmap
	// An image that doesn't open for reading alone has its header to show.
	if im, err := qcow2.Open(keepOpen{file}, &qcow2.OpenOptions{ReadOnly: true, Path: path, NoBacking: true}); err == nil {
		if i, err := im.Info(); err == nil {
			info = i
		}
		bitmaps, _ = im.Bitmaps() // those that can't be read are for check
		if err := im.Close(); err != nil {
			return err
		}
	} else if !errors.Is(err, image.ErrUnsupported) && !errors.Is(err, image.ErrCorrupt) {
		return err
	}
	f.fill(info)
	if q, ok := f.Specific.Data.(*qcow2Facts); ok {
		q.Bitmaps = bitmaps
	}
	return f.cryptOf(file)
}

// keepOpen is closed by its owner.
type keepOpen struct{ image.Device }

func (keepOpen) Close() error { return nil }

func (f *imgFacts) fill(info *qcow2.Info) {
	f.Format, f.VirtualSize, f.ClusterSize = chain.QCOW2, info.VirtualSize, info.ClusterSize
	f.Encrypted = info.Encryption != ""
	f.Backing, f.BackingFormat = info.BackingFile, info.BackingFormat
	if f.Backing != "" {
		f.FullBacking = besides(f.Filename, f.Backing)
	}
	has := func(kind string, bit int) bool {
		for _, x := range info.Features {
			if x.Kind == kind && x.Bit == bit {
				return true
			}
		}
		return false
	}
	d := qcow2Facts{Compat: "0.10", Compression: map[string]string{"deflate": "zlib"}[info.Compression], Refcount: info.RefcountBits}
	if d.Compression == "" {
		d.Compression = info.Compression
	}
	if info.Version >= 3 {
		d.Compat = "1.1"
		lazy, corrupt, ext := has("compatible", 0), has("incompatible", 1), has("incompatible", 4)
		d.Lazy, d.Corrupt, d.ExtendedL2 = &lazy, &corrupt, &ext
		f.dataFile = info.DataFile
		if d.DataFile = info.DataFile; d.DataFile != "" {
			r := has("autoclear", 1)
			d.DataFileRaw = &r
		}
	}
	f.Dirty = has("incompatible", 0)
	f.Specific = &specificFacts{"qcow2", &d}
	for _, s := range info.Snapshots {
		f.Snapshots = append(f.Snapshots, snapFacts{VMClockNSec: s.VMClock % 1e9, Name: s.Name, DateSec: s.Seconds,
			DateNSec: s.Nanoseconds, VMClockSec: s.VMClock / 1e9, ID: s.ID, VMStateSize: s.VMStateSize, ICount: s.ICount})
	}
}

// besides resolves a name that an image has for another file.
func besides(image, name string) string {
	if strings.HasPrefix(name, "/") {
		return name
	}
	if i := strings.LastIndexByte(image, os.PathSeparator); i >= 0 {
		return image[:i+1] + name
	}
	return name
}

func (a *app) printImgInfo(f *imgFacts) {
	p := func(format string, args ...any) { fmt.Fprintf(a.out, format+"\n", args...) }
	p("image: %s", printable(f.Filename))
	p("file format: %s", f.Format)
	p("virtual size: %s (%d bytes)", roughSize(f.VirtualSize), f.VirtualSize)
	p("disk size: %s", roughSize(f.ActualSize))
	if f.Encrypted {
		p("encrypted: yes")
	}
	if f.ClusterSize > 0 {
		p("cluster_size: %d", f.ClusterSize)
	}
	if f.Dirty {
		p("cleanly shut down: no")
	}
	if f.Backing != "" {
		p("backing file: %s", printable(f.Backing))
		if f.BackingFormat != "" {
			p("backing file format: %s", printable(f.BackingFormat))
		}
	}
	if len(f.Snapshots) > 0 {
		p("Snapshot list:")
		a.printSnapshots(f.Snapshots)
	}
	if f.Specific == nil {
		return
	}
	p("Format specific information:")
	if c, ok := f.Specific.Data.(*cryptFacts); ok {
		c.print(p, "    ")
		return
	}
	d := f.Specific.Data.(*qcow2Facts)
	p("    compat: %s", d.Compat)
	p("    compression type: %s", d.Compression)
	for _, b := range []struct {
		name string
		v    *bool
	}{{"lazy refcounts", d.Lazy}} {
		if b.v != nil {
			p("    %s: %t", b.name, *b.v)
		}
	}
	p("    refcount bits: %d", d.Refcount)
	if d.DataFile != "" {
		p("    data file: %s", printable(d.DataFile))
		p("    data file raw: %t", *d.DataFileRaw)
	}
	for i, b := range d.Bitmaps {
		if i == 0 {
			p("    bitmaps:")
		}
		p("        %s: granularity %d %s", printable(b.Name), b.Granularity, printableAll(b.Flags))
	}
	if d.Corrupt != nil {
		p("    corrupt: %t", *d.Corrupt)
		p("    extended l2: %t", *d.ExtendedL2)
	}
	if d.Encrypt != nil {
		p("    encrypt:")
		d.Encrypt.print(p, "        ")
	}
}

func (a *app) printSnapshots(list []snapFacts) {
	rows := make([][]string, len(list))
	for i, s := range list {
		clock := time.Duration(s.VMClockSec)*time.Second + time.Duration(s.VMClockNSec)
		rows[i] = []string{printable(s.ID), printable(s.Name), roughSize(s.VMStateSize),
			time.Unix(s.DateSec, 0).UTC().Format("2006-01-02 15:04:05"), fmt.Sprintf("%02d:%02d:%02d.%03d",
				int(clock.Hours()), int(clock.Minutes())%60, int(clock.Seconds())%60, clock.Milliseconds()%1000)}
	}
	a.printTable([]string{"ID", "TAG", "VM SIZE", "DATE", "VM CLOCK"}, rows)
}
