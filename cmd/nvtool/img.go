package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/qcow2"
)

const imgAbout = `Work on disk images as qemu-img does, with its option names, JSON keys and, for
check and compare, exit codes. Formats are raw, qcow2 and luks.

An image's format is given with -f, or known because nvtool made the image. It
is never guessed: a guest can write any header into a raw disk. Files that an
image names (backing and data files) are opened only with --allow-external.
Files that are made appear, or with --force replace others, only when they are
whole.`

func (a *app) imgCmd() *cobra.Command {
	c := group("img", "Make, convert, check and change disk images, as qemu-img does",
		a.imgCreateCmd(), a.imgInfoCmd(), a.imgCheckCmd(), a.imgConvertCmd(), a.imgResizeCmd(), a.imgSnapshotCmd(),
		a.imgMapCmd(), a.imgMeasureCmd(), a.imgCompareCmd(), a.imgDDCmd(), a.imgBenchCmd(),
		a.imgRebaseCmd(), a.imgCommitCmd(), a.imgAmendCmd(), a.imgBitmapCmd())
	c.Long = imgAbout
	return c
}

// An imgRef is how the command line names an image, and what may be done to
// open it.
type imgRef struct {
	imageRef
	external bool
	legacy   func(file string) error // of the legacy encryption, may be read
	share    bool
	alone    bool   // without its backing file
	snapshot string // to open it at
}

func (r *imgRef) flags(c *cobra.Command) {
	r.imageRef.register(c, "format")
	r.externalFlag(c)
}

// shareFlag adds -U to a verb that reads.
func (r *imgRef) shareFlag(c *cobra.Command) {
	c.Flags().BoolVarP(&r.share, "force-share", "U", false, "read without a lock what may be changing, as a running machine's disk")
}

func (r *imgRef) externalFlag(c *cobra.Command) {
	c.Flags().BoolVar(&r.external, "allow-external", false, "open the backing and data files that the image names")
}

// outputFlag is --output, which qemu-img has for --json.
func (a *app) outputFlag(c *cobra.Command) {
	c.Flags().Var((*outputFormat)(&a.json), "output", "`FORMAT` of the facts, human or json")
	c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"human", "json"}, cobra.ShellCompDirectiveNoFileComp))
}

type outputFormat bool

func (o *outputFormat) Set(s string) error {
	if s != "human" && s != "json" {
		return usagef("output format %q: human or json", s)
	}
	*o = s == "json"
	return nil
}

func (o *outputFormat) String() string { return "" }
func (*outputFormat) Type() string     { return "FORMAT" }

// progressFlag is -p, for those who are used to it.
func progressFlag(c *cobra.Command) {
	c.Flags().BoolP("progress", "p", false, "show progress, which a terminal always gets")
}

// openImg opens the only image that the verb got, or the last of several.
func (a *app) openImg(ctx context.Context, r *imgRef, readOnly bool) (image.Device, error) {
	return a.openImgs(ctx, r, readOnly, false)
}

// openImgs opens an image. The secrets of encrypted layers are read by the first
// one; more says that others follow, which use them too.
func (a *app) openImgs(ctx context.Context, r *imgRef, readOnly, more bool) (image.Device, error) {
	if r.secrets.m == nil {
		if err := r.secrets.load(ctx, a, &r.imageRef); err != nil {
			return nil, err
		}
	}
	dev, err := chain.Open(r.location, r.options(readOnly))
	if err == nil && r.snapshot != "" && !isQCOW2(dev) {
		err = errors.Join(fmt.Errorf("a snapshot of a %s image: %w", formatOf(dev), image.ErrUnsupported), dev.Close())
	}
	if errors.Is(err, chain.ErrExternal) {
		err = allowHint(err)
	}
	if err == nil {
		if err = r.harden(); err != nil {
			err = errors.Join(err, dev.Close())
		}
	}
	if more && err == nil {
		return dev, nil
	}
	if err == nil {
		if err = r.secrets.unused(); err != nil {
			err = errors.Join(err, dev.Close())
		}
	}
	r.secrets.wipe()
	if err != nil {
		return nil, a.explain(&r.imageRef, err)
	}
	return dev, nil
}

// openWithout is openImg, without the backing file if so wanted.
func (a *app) openWithout(ctx context.Context, r *imgRef, readOnly, noBacking bool) (image.Device, error) {
	if !noBacking {
		return a.openImg(ctx, r, readOnly)
	}
	r.alone = true
	return a.openImg(ctx, r, readOnly)
}

// options is what the image is opened with.
func (r *imgRef) options(readOnly bool) *chain.Options {
	return &chain.Options{Format: r.format, ReadOnly: readOnly, AllowExternal: r.external, NoBacking: r.alone,
		NoLock: r.share && readOnly, LegacyAES: r.legacy, Snapshot: r.snapshot, Secret: r.secrets.get}
}

// closeAll closes what was opened, at a verb's end.
func closeAll(err *error, devs ...image.Device) {
	for _, d := range slices.Backward(devs) {
		if d != nil {
			*err = errors.Join(*err, d.Close())
		}
	}
}

func isQCOW2(dev image.Device) bool {
	_, ok := image.As[*qcow2.Image](dev)
	return ok
}

// cluster is what an image allocates at once, or 0.
func cluster(dev image.Device) int64 {
	im, ok := image.As[*qcow2.Image](dev)
	if !ok {
		return 0
	}
	info, err := im.Info()
	if err != nil {
		return 0 // whoever uses it will say
	}
	return int64(info.ClusterSize)
}

// optionList takes -o's KEY=VALUE,... apart. A comma in a value is doubled.
func optionList(lists []string) ([][2]string, error) {
	var out [][2]string
	for _, list := range lists {
		list = strings.ReplaceAll(list, ",,", "\x00")
		for part := range strings.SplitSeq(list, ",") {
			if part == "" {
				continue
			}
			part = strings.ReplaceAll(part, "\x00", ",")
			key, value, ok := strings.Cut(part, "=")
			if !ok { // as in QEMU, a flag alone is on
				value = "on"
			}
			if key == "" {
				return nil, usagef("-o %q: NAME=VALUE,... is wanted", part)
			}
			out = append(out, [2]string{key, value})
		}
	}
	return out, nil
}

// parseImgSize reads a size as qemu-img does: b is bytes, and a fraction of a
// unit will do.
func parseImgSize(text string) (int64, error) {
	if t := strings.TrimRight(text, "bB"); t != text {
		return parseSize(t)
	}
	return parseSize(text)
}

// A target is an image that a verb makes. It appears when it is whole.
type target struct {
	*chain.Pending
	path string
	data *chain.Pending // its data file, if it has one
}

// create begins an image. force replaces a file that is there.
func (a *app) createImg(path string, spec *imgSpec, force, noSync bool) (*target, error) {
	o := spec.options()
	o.Replace, o.LateSync, o.NoSync = force, true, noSync
	data, err := dataFile(path, o)
	if err != nil {
		return nil, err
	}
	p, err := chain.Create(path, o)
	if err != nil {
		if data != nil {
			err = errors.Join(err, data.Abort())
		}
		if errors.Is(err, fs.ErrExist) && !force {
			err = withHint(err, "choose another name, or replace the file with --force")
		}
		if errors.Is(err, image.ErrOutOfRange) { // an option's value
			err = &kinded{err, errInvalid}
		}
		return nil, a.explain(&imageRef{location: path}, err)
	}
	return &target{p, path, data}, nil
}

// finish gives the image its name, if what filled it went well.
func (t *target) finish(ctx context.Context, err error) error {
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = errors.Join(t.Device.Sync(), t.Device.Close())
	}
	if err == nil && t.data != nil {
		err = t.data.Commit()
	}
	if err == nil {
		err = t.Commit()
	}
	if err != nil {
		err = errors.Join(err, t.Abort())
		if t.data != nil {
			err = errors.Join(err, t.data.Abort())
		}
	}
	return err
}

// dataFile begins the data file of a new image, which appears before it does.
func dataFile(path string, o *chain.CreateOptions) (*chain.Pending, error) {
	if o.QCOW2 == nil || o.QCOW2.DataFile == "" {
		return nil, nil
	}
	if protocol(o.QCOW2.DataFile) {
		return nil, invalidf("data_file=%s: a path is wanted, without a protocol", printable(o.QCOW2.DataFile))
	}
	p, err := chain.Create(besides(path, o.QCOW2.DataFile), &chain.CreateOptions{Format: chain.Raw, Empty: true,
		Replace: o.Replace, LateSync: true, NoSync: o.NoSync})
	if err != nil {
		return nil, fmt.Errorf("data file: %w", err)
	}
	o.QCOW2.Data = p.Device
	return p, nil
}

// forceFlag is --force.
func forceFlag(c *cobra.Command, p *bool) {
	c.Flags().BoolVar(p, "force", false, "replace a file of that name, once the new one is whole")
}

// sameFile tells whether two paths are one file, and so can't be source and
// target.
func sameFile(a, b string) bool {
	ia, err := os.Stat(a)
	if err != nil {
		return false
	}
	ib, err := os.Stat(b)
	return err == nil && os.SameFile(ia, ib) || filepath.Clean(a) == filepath.Clean(b)
}

// An exitCoded error has an exit code that isn't its kind's: that of a verb
// whose codes are qemu-img's.
type exitCoded struct {
	error
	code int
}

func (e *exitCoded) Unwrap() error { return e.error }
