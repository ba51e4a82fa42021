package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

func (a *app) imgCreateCmd() *cobra.Command {
	var spec imgSpec
	var ref imgRef // what opening a backing file takes
	var backing backingRef
	var force, unopened bool
	c := a.verb("create FILE [SIZE] [-f raw|qcow2] [-o NAME=VALUE,...]", "Make an empty image",
		func(ctx context.Context, args []string) error {
			if done, err := spec.wantsHelp(a); done {
				return err
			}
			return a.imgCreate(ctx, &spec, &ref, &backing, args, force, unopened)
		})
	c.Long = `Make an empty image of SIZE bytes, which may have one of the suffixes k, M, G and
T. With a backing file, SIZE is its by default.`
	c.Example = `  nvtool img create disk.raw 10G
  nvtool img create -f qcow2 -o cluster_size=128k disk.qcow2 10G
  nvtool img create -f qcow2 -o encrypt.format=luks --secret-file pass disk.qcow2 10G`
	spec.flags(c, "format", "f", "the image's ")
	backing.flags(c, "the backing `FILE`, relative to the image's folder")
	ref.externalFlag(c)
	ref.secrets = new(secretFlags)
	ref.secrets.flags(c)
	c.Flags().BoolVarP(&unopened, "unsafe", "u", false, "don't open the backing file")
	forceFlag(c, &force)
	return c
}

func (a *app) imgCreate(ctx context.Context, spec *imgSpec, ref *imgRef, backing *backingRef, args []string, force, unopened bool) error {
	if len(args) < 1 || len(args) > 2 || args[0] == "" {
		return usagef("a FILE and a SIZE are wanted")
	}
	if err := spec.parse(); err != nil {
		return err
	}
	if len(args) == 2 {
		if spec.sized {
			return usagef("the size is given twice, with -o size and as an argument")
		}
		n, err := parseImgSize(args[1])
		if err != nil {
			return err
		}
		spec.size, spec.sized = n, true
	}
	if err := a.createBacking(ctx, spec, ref, backing, args[0], unopened); err != nil {
		return err
	}
	if !spec.sized {
		return withHint(usagef("no SIZE is given"), "nvtool img create "+args[0]+" 10G")
	}
	if err := a.createSecrets(ctx, spec, ref, args[0]); err != nil {
		if b := spec.qcow2.Backing; b != nil {
			closeAll(&err, b)
		}
		return err
	}
	t, err := a.createImg(args[0], spec, force, false)
	if err != nil {
		if b := spec.qcow2.Backing; b != nil {
			closeAll(&err, b)
		}
		return err
	}
	if err := a.prepare(ctx, t, spec); err != nil {
		return t.finish(ctx, err)
	}
	size := t.Device.Size()
	if err := t.finish(ctx, nil); err != nil {
		return err
	}
	if a.json {
		return a.printJSON(struct {
			Filename    string `json:"filename"`
			Format      string `json:"format"`
			VirtualSize int64  `json:"virtual-size"`
		}{args[0], spec.format, size})
	}
	a.sayf("%s: %s image of %s", printable(args[0]), spec.format, roughSize(size))
	return nil
}

// createBacking opens the backing file that a new image is to have.
func (a *app) createBacking(ctx context.Context, spec *imgSpec, ref *imgRef, b *backingRef, path string, unopened bool) (err error) {
	if b.name == "" {
		b.name, b.format = spec.qcow2.BackingFile, spec.qcow2.BackingFormat
	}
	if b.name == "" {
		if b.format != "" {
			return usagef("a backing format without a backing file")
		}
		return nil
	}
	if spec.format != "qcow2" {
		return withHint(fmt.Errorf("a backing file of a %s image: %w", spec.format, image.ErrUnsupported), "-f qcow2 has backing files")
	}
	spec.qcow2.BackingFile, spec.qcow2.BackingFormat = b.name, b.format
	if unopened {
		return nil
	}
	if spec.qcow2.Backing, err = b.open(ctx, a, path, ref); err != nil {
		return err
	}
	if !spec.sized {
		spec.size, spec.sized = spec.qcow2.Backing.Size(), true
	}
	return nil
}

// prepare does to a new image what its creation leaves out.
func (a *app) prepare(ctx context.Context, t *target, spec *imgSpec) error {
	if !isQCOW2(t.Device) {
		if err := preallocate(ctx, t.Device, 0, t.Device.Size(), spec.prealloc); err != nil {
			return err
		}
	}
	if im, ok := image.As[*qcow2.Image](t.Device); ok && spec.lazy != nil && *spec.lazy {
		return im.Amend(ctx, &qcow2.AmendOptions{LazyRefcounts: spec.lazy})
	}
	return nil
}

// createSecrets gets the passphrase of a new image.
func (a *app) createSecrets(ctx context.Context, spec *imgSpec, ref *imgRef, path string) error {
	if ref.secrets.m == nil { // no image has been opened
		if err := ref.secrets.load(ctx, a, &imageRef{location: path}); err != nil {
			return err
		}
	}
	defer ref.secrets.wipe()
	if err := spec.encrypt(ctx, ref.secrets); err != nil {
		return err
	}
	return ref.secrets.unused() // nothing is to be encrypted
}
