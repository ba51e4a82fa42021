package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/convert"
)

// maxChain bounds how many images lie below each other, as package chain does.
const maxChain = 200

// backingChain describes an image and all below it, from the top, by their
// headers. Nothing that an image names is opened unless the flags allow it.
func (a *app) backingChain(ctx context.Context, ref *imgRef) ([]*imgFacts, error) {
	var list []*imgFacts
	var seen []os.FileInfo
	for next := *ref; ; {
		f, err := a.inspect(ctx, &next)
		if err != nil {
			return nil, err
		}
		list = append(list, f)
		if info, err := os.Stat(next.location); err == nil {
			for _, s := range seen {
				if os.SameFile(s, info) {
					return nil, &kinded{fmt.Errorf("%s: the chain of backing files is a loop", next.location), image.ErrCorrupt}
				}
			}
			seen = append(seen, info)
		}
		switch {
		case f.Backing == "":
			return list, nil
		case !ref.external:
			return nil, allowHint(fmt.Errorf("%s names the backing file %s: %w", next.location, printable(f.Backing), chain.ErrExternal))
		case f.BackingFormat == "":
			return nil, &kinded{fmt.Errorf("%s doesn't say the format of its backing file", next.location), image.ErrFormat}
		case len(list) > maxChain:
			return nil, &kinded{fmt.Errorf("%s: more than %d backing files", ref.location, maxChain), image.ErrUnsupported}
		case protocol(f.Backing):
			return nil, &kinded{fmt.Errorf("%s: the backing file %s isn't a path", next.location, printable(f.Backing)), image.ErrUnsupported}
		}
		next = imgRef{external: true, share: ref.share}
		next.location, next.format, next.secrets = f.FullBacking, f.BackingFormat, ref.secrets
	}
}

func allowHint(err error) error {
	return withHint(err, "--allow-external opens them, if you trust whoever wrote the image")
}

// protocol tells whether a name from an image is what QEMU takes for more than
// a path.
func protocol(name string) bool {
	colon, slash := strings.IndexByte(name, ':'), strings.IndexByte(name, '/')
	return colon >= 0 && (slash < 0 || colon < slash)
}

// layers describes an open image and what lies below it.
func (a *app) layers(ctx context.Context, ref *imgRef, dev image.Device) ([]convert.Layer, error) {
	if !isQCOW2(dev) || ref.opts != "" {
		return []convert.Layer{{Name: ref.location, Flat: !isQCOW2(dev), Size: dev.Size()}}, nil
	}
	facts, err := a.backingChain(ctx, ref)
	if err != nil {
		return nil, err
	}
	list := make([]convert.Layer, len(facts))
	for i, f := range facts {
		list[i] = convert.Layer{Name: f.Filename, Flat: f.Format != chain.QCOW2, Size: f.VirtualSize}
		if f.dataFile != "" {
			list[i].Name = besides(f.Filename, f.dataFile)
		}
	}
	return list, nil
}

// A backingRef is how the command line names a backing file.
type backingRef struct {
	name, format string
	set          bool
}

func (b *backingRef) flags(c *cobra.Command, what string) {
	c.Flags().StringVarP(&b.name, "backing", "b", "", what)
	c.Flags().StringVarP(&b.format, "backing-format", "F", "", "the backing file's `FORMAT`, qcow2, raw or luks")
}

// open opens the backing file that an image at path is to have. It was named by
// whoever runs nvtool, so that one alone is allowed; those below it aren't.
func (b *backingRef) open(ctx context.Context, a *app, path string, ref *imgRef) (image.Device, error) {
	switch {
	case b.format == "":
		return nil, withHint(usagef("the backing file's format isn't given"), "-F raw or -F qcow2: formats are never guessed")
	case protocol(b.name):
		return nil, invalidf("backing file %s: a path is wanted, without a protocol", printable(b.name))
	}
	r := imgRef{external: ref.external, share: ref.share}
	r.secrets = ref.secrets
	if _, err := r.take([]string{besides(path, b.name)}, 0, 0, ""); err != nil {
		return nil, err
	}
	if r.format = b.format; r.format != "raw" && r.format != "qcow2" && r.format != "luks" {
		return nil, usagef("backing format %q: qcow2, raw or luks", r.format)
	}
	d, err := a.openImgs(ctx, &r, true, true)
	if err != nil {
		return nil, fmt.Errorf("backing file: %w", err)
	}
	return d, nil
}

func (a *app) imgRebaseCmd() *cobra.Command {
	var ref imgRef
	var to backingRef
	var unsafe bool
	c := a.verb("rebase IMAGE -b BACKING [-F FORMAT] [-u]", "Give an image another backing file", func(ctx context.Context, args []string) error {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		return a.imgRebase(ctx, &ref, &to, unsafe)
	})
	c.Long = `Give a qcow2 image another backing file, or with -b "" none. What the disk reads
from the old one, and the new one reads otherwise, is copied into the image
first; so the disk reads the same, after an interruption or a crash too.

-u changes the name alone, as after a move of the backing file: no file is
opened, and the disk reads as the new one says.`
	ref.flags(c)
	to.flags(c, "the new backing `FILE`, relative to the image's folder; \"\" is none")
	c.Flags().BoolVarP(&unsafe, "unsafe", "u", false, "change the name only")
	c.MarkFlagRequired("backing")
	progressFlag(c)
	return c
}

func (a *app) imgRebase(ctx context.Context, ref *imgRef, to *backingRef, unsafe bool) (err error) {
	if to.name == "" && to.format != "" {
		return usagef("-F without a backing file")
	}
	var below image.Device
	if !unsafe && to.name != "" {
		if below, err = to.open(ctx, a, ref.location, ref); err != nil {
			return err
		}
		defer func() {
			if below != nil { // it isn't the image's
				closeAll(&err, below)
			}
		}()
	}
	dev, err := a.openWithout(ctx, ref, false, unsafe)
	if err != nil {
		return err
	}
	defer func() { closeAll(&err, dev) }()
	im, err := asQCOW2(ref, dev)
	if err != nil {
		return err
	}
	if !unsafe {
		o := &convert.RebaseOptions{Cluster: cluster(dev)}
		bar := a.bar("rebase", dev.Size())
		if bar != nil {
			o.Progress = bar.set
		}
		err := convert.Rebase(ctx, dev, below, o)
		bar.end()
		if err == nil {
			err = dev.Sync()
		}
		if err != nil {
			return a.explain(&ref.imageRef, err)
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := im.ChangeBacking(to.name, to.format, below); err != nil {
		return a.explain(&ref.imageRef, err)
	}
	below = nil
	if to.name == "" {
		a.sayf("%s: no backing file any more", printable(ref.location))
	} else {
		a.sayf("%s: the backing file is %s", printable(ref.location), printable(to.name))
	}
	return nil
}

func (a *app) imgCommitCmd() *cobra.Command {
	var ref imgRef
	var base, rate string
	var keep bool
	c := a.verb("commit IMAGE [-b BASE] [-d]", "Write an image's changes into its backing file", func(ctx context.Context, args []string) error {
		if _, err := ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		return a.imgCommit(ctx, &ref, base, rate, keep)
	})
	c.Long = `Write what is stored in a qcow2 image into its backing file, which grows if it
is smaller, and then empty the image. The disk reads the same at any time, after
an interruption or a crash too. Other images above the same backing file don't:
their content changes.

With -b the changes of all images above BASE, which is further down the chain,
go into it, and the images stay as they are; so does the image with -d.`
	ref.flags(c)
	c.Flags().StringVarP(&base, "backing", "b", "", "the `FILE` of the chain to write into")
	c.Flags().BoolVarP(&keep, "keep", "d", false, "don't empty the image")
	c.Flags().StringVarP(&rate, "rate", "r", "", "`BYTES` a second at most")
	progressFlag(c)
	return c
}

func (a *app) imgCommit(ctx context.Context, ref *imgRef, base, rate string, keep bool) (err error) {
	o := &convert.CommitOptions{Layers: 1, Keep: keep || base != ""}
	if rate != "" {
		if o.Rate, err = parseImgSize(rate); err != nil {
			return err
		}
	}
	if ref.opts != "" || strings.Contains(ref.location, "driver=") {
		return withHint(usagef("commit takes a PATH"), "the backing file is found by the image's header")
	}
	facts, err := a.backingChain(ctx, ref)
	if err != nil {
		return err
	}
	if len(facts) < 2 {
		return withHint(fmt.Errorf("%s has no backing file: %w", ref.location, image.ErrUnsupported), "")
	}
	if base != "" {
		o.Layers = 0
		for i, f := range facts[1:] {
			if f.Backing != "" && filepath.Clean(f.Filename) == filepath.Clean(base) || sameFile(f.Filename, base) {
				o.Layers = i + 1
				break
			}
		}
		if o.Layers == 0 {
			return &kinded{fmt.Errorf("%s isn't in the chain of %s", base, ref.location), image.ErrNotFound}
		}
	}
	top, below, err := a.openCommit(ctx, ref, facts, o)
	if err != nil {
		return err
	}
	defer closeAll(&err, top)
	o.Cluster = cluster(below)
	bar := a.bar("commit", top.Size())
	if bar != nil {
		o.Progress = bar.set
	}
	err = convert.Commit(ctx, top, below, o)
	bar.end()
	if err != nil {
		return a.explain(&ref.imageRef, err)
	}
	a.sayf("%s: committed into %s", printable(ref.location), printable(facts[o.Layers].Filename))
	return nil
}

// openCommit opens a chain whose layer number o.Layers may be written to, which
// is returned too. Closing the top closes all.
func (a *app) openCommit(ctx context.Context, ref *imgRef, facts []*imgFacts, o *convert.CommitOptions) (top, base image.Device, err error) {
	if err := ref.secrets.load(ctx, a, &ref.imageRef); err != nil {
		return nil, nil, err
	}
	defer ref.secrets.wipe()
	var dev image.Device
	for i := o.Layers; i >= 0; i-- {
		f := facts[i]
		co := &chain.Options{Format: f.Format, AllowExternal: true, Secret: ref.secrets.below(i), Backing: dev,
			ReadOnly: i > 0 && i < o.Layers || i == 0 && o.Keep}
		if i > 0 {
			co.Format = facts[i-1].BackingFormat
		} else {
			co.Format = ref.format
		}
		d, err := chain.Open(f.Filename, co)
		if err != nil {
			if dev != nil {
				err = errors.Join(err, dev.Close())
			}
			return nil, nil, a.explain(&ref.imageRef, err)
		}
		if dev = d; i == o.Layers {
			base = d
		}
	}
	if err := ref.secrets.unused(); err != nil {
		return nil, nil, errors.Join(err, dev.Close())
	}
	return dev, base, nil
}

// below gives the secrets of the layer that lies so many below the image as
// package chain names them when it opens the chain.
func (s *secretFlags) below(depth int) func(name string) ([]byte, error) {
	return func(name string) ([]byte, error) {
		if depth > 0 {
			name = strings.TrimSuffix(strings.Repeat("backing.", depth)+name, ".")
		}
		return s.get(name)
	}
}
