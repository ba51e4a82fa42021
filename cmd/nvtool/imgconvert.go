package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/convert"
	"nvstore.dev/image/qcow2"
)

type convertFlags struct {
	src              imgRef
	spec             imgSpec
	compress, force  bool
	existing, zeroed bool
	unordered        bool
	offload          bool
	salvage          bool
	bitmaps, skip    bool // copy them; leave out broken ones
	workers          int
	sparse, rate     string
	cache, srcCache  cacheMode
	targetOpts       string
	backing          backingRef
}

func (a *app) imgConvertCmd() *cobra.Command {
	var o convertFlags
	c := a.verb("convert SOURCE... TARGET [-f FORMAT] [-O FORMAT] [-o NAME=VALUE,...]", "Copy an image into another format",
		func(ctx context.Context, args []string) error {
			if done, err := o.spec.wantsHelp(a); done {
				return err
			}
			return a.imgConvert(ctx, &o, args)
		})
	c.Long = `Copy the content of SOURCE into a new image TARGET; of several, one behind the
other. What reads as zeros isn't written. TARGET appears when it is whole and
durable; with -n it is there already and is written to, and an interrupted
conversion leaves it half-written.`
	c.Example = `  nvtool img convert -f raw -O qcow2 disk.raw disk.qcow2
  nvtool img convert -f qcow2 -O qcow2 -c disk.qcow2 small.qcow2
  nvtool img convert -f qcow2 disk.qcow2 disk.raw`
	o.src.flags(c)
	o.spec.flags(c, "output-format", "O", "the target's ")
	f := c.Flags()
	f.StringVarP(&o.backing.name, "target-backing", "B", "", "the target's backing `FILE`, with the content of the source's: copy what lies above that alone")
	f.StringVarP(&o.backing.format, "backing-format", "F", "", "that backing file's `FORMAT`, qcow2 or raw")
	f.StringVarP(&o.src.snapshot, "snapshot", "l", "", "the source as it was at internal snapshot `TAG`, an ID or a name")
	o.src.shareFlag(c)
	f.BoolVarP(&o.compress, "compress", "c", false, "compress the target's clusters")
	f.BoolVarP(&o.existing, "no-create", "n", false, "write into a TARGET that is there")
	f.BoolVar(&o.zeroed, "target-is-zero", false, "with -n: the target reads as zeros already")
	f.StringVar(&o.targetOpts, "target-image-opts", "", "with -n: a stack in QEMU's notation, in place of TARGET")
	f.BoolVarP(&o.unordered, "out-of-order", "W", false, "write pieces as they come")
	f.BoolVarP(&o.offload, "copy-offload", "C", false, "have the system copy data between raw files, sharing blocks where it can; zeros in data aren't looked for")
	f.IntVarP(&o.workers, "parallel", "m", 0, "pieces in flight, 1 to 64 (default 8)")
	f.StringVarP(&o.sparse, "sparse", "S", "4k", "`SIZE` of a run of zeros that isn't written; 0 writes everything")
	f.StringVarP(&o.rate, "rate", "r", "", "`BYTES` a second at most")
	o.cache.flag(c, "cache", "t", "the target: `MODE` writeback is durable at the end, writethrough after each MiB, unsafe never; none is writeback and directsync writethrough, and leave nothing in the system's cache")
	o.srcCache.flag(c, "source-cache", "T", "the source: `MODE` none and directsync read past the system's cache; the others are as writeback")
	f.BoolVar(&o.salvage, "salvage", false, "write zeros for what can't be read")
	f.BoolVar(&o.bitmaps, "bitmaps", false, "copy the source's persistent dirty bitmaps too")
	f.BoolVar(&o.skip, "skip-broken-bitmaps", false, "with --bitmaps: leave out those that may be wrong")
	progressFlag(c)
	forceFlag(c, &o.force)
	return c
}

func (o *convertFlags) engine() (*convert.Options, error) {
	e := &convert.Options{Workers: o.workers, OutOfOrder: o.unordered, Compressed: o.compress, Through: o.cache.through()}
	if o.workers < 0 || o.workers > 64 {
		return nil, usagef("-m %d: 1 to 64", o.workers)
	}
	n, err := parseImgSize(o.sparse)
	switch {
	case err != nil:
		return nil, err
	case n == 0:
		e.Sparse = -1
	case n%512 != 0:
		return nil, usagef("-S %s: a multiple of 512", o.sparse)
	default:
		e.Sparse = n
	}
	if o.rate != "" {
		if e.Rate, err = parseImgSize(o.rate); err != nil {
			return nil, err
		}
	}
	e.Offload = o.offload
	if o.offload && (o.compress || o.sparse != "4k") {
		return nil, usagef("-C doesn't look at the data: leave out -c and -S")
	}
	if o.skip && !o.bitmaps {
		return nil, usagef("--skip-broken-bitmaps needs --bitmaps")
	}
	if (o.zeroed || o.targetOpts != "") && !o.existing {
		return nil, usagef("--target-is-zero and --target-image-opts need -n")
	}
	return e, nil
}

func (a *app) imgConvert(ctx context.Context, o *convertFlags, args []string) (err error) {
	engine, err := o.engine()
	if err != nil {
		return err
	}
	sources := 1
	if o.src.opts != "" {
		sources = 0
	}
	if o.targetOpts != "" {
		args = append(args, o.targetOpts)
	}
	if sources = max(sources, len(args)-1); len(args) != sources+1 {
		return usagef("a SOURCE and a TARGET are wanted")
	}
	path := args[len(args)-1]
	if err := o.spec.parse(); err != nil {
		return err
	}
	// Rescue is what the legacy encryption is read for.
	o.src.legacy = func(file string) error { return a.legacySource(o, file) }
	more := o.existing || o.spec.crypt.on || o.backing.name != "" || o.spec.qcow2.BackingFile != ""
	src, err := a.openSources(ctx, &o.src, args[:len(args)-1], more)
	if err != nil {
		return err
	}
	defer closeAll(&err, src)
	if err := o.srcCache.drop(src); err != nil {
		return err
	}
	if o.salvage {
		engine.Salvage = func(off, n int64, err error) {
			a.warnf("%s: zeros in place of %d bytes at byte %d: %v", printable(o.src.location), n, off, err)
		}
	}
	if o.existing && o.backing.name != "" {
		return usagef("-B is for a target that is made, not for -n")
	}
	if o.existing {
		return a.convertInto(ctx, o, engine, src, path)
	}
	if !o.spec.sized {
		o.spec.size = src.Size()
	}
	for _, s := range args[:len(args)-1] {
		if sameFile(s, path) {
			return usagef("source and target are the same file")
		}
	}
	if err := a.createBacking(ctx, &o.spec, &o.src, &o.backing, path, false); err != nil {
		return err
	}
	if more {
		err = a.createSecrets(ctx, &o.spec, &o.src, path)
	}
	if err != nil {
		if b := o.spec.qcow2.Backing; b != nil {
			closeAll(&err, b)
		}
		return err
	}
	t, err := a.createImg(path, &o.spec, o.force, o.cache.unsafe())
	if err != nil {
		if b := o.spec.qcow2.Backing; b != nil {
			closeAll(&err, b)
		}
		return err
	}
	engine.TargetZero = o.spec.format != chain.LUKS // that one reads as noise
	if o.spec.qcow2.BackingFile != "" {
		engine.Layers = 1
	}
	if err := a.prepare(ctx, t, &o.spec); err != nil {
		return t.finish(ctx, err)
	}
	engine.Cluster = cluster(t.Device)
	err = a.copyImg(ctx, t.Device, src, engine, path)
	if err == nil && o.bitmaps {
		err = a.copyBitmaps(t.Device, src, o)
	}
	if err == nil {
		err = o.dropCaches(t.Device, src)
	}
	return t.finish(ctx, err)
}

// copyImg converts, with a progress bar.
func (a *app) copyImg(ctx context.Context, dst, src image.Device, o *convert.Options, path string) error {
	bar := a.bar("convert", src.Size())
	defer bar.end()
	if bar != nil {
		o.Progress = bar.set
	}
	if err := convert.Convert(ctx, dst, src, o); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// convertInto fills an image that is there.
func (a *app) convertInto(ctx context.Context, o *convertFlags, engine *convert.Options, src image.Device, path string) (err error) {
	dst := imgRef{external: o.src.external}
	dst.secrets = o.src.secrets
	dst.location = path
	if o.targetOpts == "" {
		dst.format = o.spec.format
	}
	if len(o.spec.explicit) > 0 {
		return usagef("-o makes no difference to a target that is there: leave it out")
	}
	dev, err := a.openImg(ctx, &dst, false)
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	engine.TargetZero = o.zeroed
	engine.Cluster = cluster(dev)
	if err := a.copyImg(ctx, dev, src, engine, path); err != nil {
		return err
	}
	if o.bitmaps {
		if err := a.copyBitmaps(dev, src, o); err != nil {
			return err
		}
	}
	if o.cache.unsafe() {
		return nil
	}
	if err := dev.Sync(); err != nil {
		return err
	}
	return o.dropCaches(dev, src)
}

// dropCaches does what is left to do of the cache modes.
func (o *convertFlags) dropCaches(dst, src image.Device) error {
	if o.cache == "none" || o.cache == "directsync" {
		if err := dst.Sync(); err != nil { // what is dirty stays
			return err
		}
	}
	return errors.Join(o.cache.drop(dst), o.srcCache.drop(src))
}

// openSources opens what is read, joined if it is several. more says that
// another image follows.
func (a *app) openSources(ctx context.Context, r *imgRef, args []string, more bool) (image.Device, error) {
	r.snapshot = snapshotTag(r.snapshot)
	if r.opts != "" {
		if _, err := r.take(nil, 0, 0, ""); err != nil {
			return nil, err
		}
		return a.openImgs(ctx, r, true, more)
	}
	var devs []image.Device
	for i, arg := range args {
		one := *r
		if _, err := one.take([]string{arg}, 0, 0, ""); err != nil {
			closeAll(&err, devs...)
			return nil, err
		}
		d, err := a.openImgs(ctx, &one, true, more || i < len(args)-1)
		if err != nil {
			closeAll(&err, devs...)
			return nil, err
		}
		devs = append(devs, d)
	}
	r.location = strings.Join(args, " ")
	if len(devs) == 1 {
		return devs[0], nil
	}
	return convert.Concat(devs...), nil
}

// snapshotTag takes what qemu-img's -l may be apart: TAG, snapshot.id=ID or
// snapshot.name=NAME.
func snapshotTag(s string) string {
	for part := range strings.SplitSeq(s, ",") {
		for _, key := range []string{"snapshot.id=", "snapshot.name="} {
			if tag, ok := strings.CutPrefix(part, key); ok {
				return tag
			}
		}
	}
	return s
}

// copyBitmaps copies what the source has of persistent bitmaps.
func (a *app) copyBitmaps(dst, src image.Device, o *convertFlags) error {
	from, ok := image.As[*qcow2.Image](src)
	to, ok2 := image.As[*qcow2.Image](dst)
	if !ok || !ok2 {
		return withHint(fmt.Errorf("bitmaps of a %s image in a %s image: %w", formatOf(src), formatOf(dst), image.ErrUnsupported), "qcow2 images have them")
	}
	list, err := from.Bitmaps()
	if err != nil {
		return err
	}
	for _, b := range list {
		if slices.Contains(b.Flags, "in-use") {
			if !o.skip {
				return withHint(&kinded{fmt.Errorf("bitmap %s wasn't saved, and may be wrong", printable(b.Name)), image.ErrCorrupt},
					"--skip-broken-bitmaps leaves such bitmaps out")
			}
			a.warnf("bitmap %s wasn't saved, and isn't copied", printable(b.Name))
			continue
		}
		if err := to.AddBitmap(b.Name, &qcow2.BitmapOptions{Granularity: b.Granularity, Disabled: true}); err != nil {
			return err
		}
		if err := to.MergeBitmap(b.Name, from, b.Name); err != nil {
			return err
		}
		if slices.Contains(b.Flags, "auto") {
			if err := to.EnableBitmap(b.Name, true); err != nil {
				return err
			}
		}
	}
	return nil
}
