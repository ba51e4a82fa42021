package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image/pebbledev"
	"nvstore.dev/nvstore"
)

type createOptions struct {
	ref               imageRef
	key               keyFlags
	kdf               kdfFlags
	size, max, chunks size
	fixed, existing   bool
	sealNames         bool
	label             string
}

func (a *app) createCmd() *cobra.Command {
	var o createOptions
	c := a.verb("create IMAGE [-f qcow2|raw] [--size 64M] [KEY]", "Make an image with an empty store",
		func(ctx context.Context, args []string) error { return a.create(ctx, &o, args) })
	c.Long = `Make an image with an empty store in it. With a key the store is sealed:
content and attributes are encrypted, and everything is authenticated. Without
one it is plain, and whoever reads the image reads the secrets in it.

The image appears under its name only when it is whole. It takes space as it is
used, and grows unless it is --fixed. A stack given by --image-opts, and with
--existing also a PATH, must be there already, and blank where the store's
fixed structures go.`
	c.Example = `  nvtool create vm.qcow2 --passphrase-file pass
  nvtool create nv.img -f raw --size 8M --fixed --key-file key
  nvtool create pebble:/var/lib/nv/6e76746f-6f6c-4000-8000-000000000001`
	o.ref.flags(c)
	o.key.flags(c, "the ")
	o.kdf.flags(c)
	f := c.Flags()
	f.Var(&o.size, "size", "the image's `SIZE` at first (default 64M)")
	f.Var(&o.max, "max-size", "`SIZE` beyond which the image isn't grown (default: no limit)")
	f.BoolVar(&o.fixed, "fixed", false, "never grow the image: --max-size is --size")
	f.Var(&o.chunks, "cluster-size", "of a qcow2 image, a `SIZE` from 512 to 2M (default 64k)")
	f.BoolVar(&o.existing, "existing", false, "make the store on an image that is there already")
	f.BoolVar(&o.sealNames, "seal-names", false, "hide names, types and writers too; then ls needs the key")
	f.StringVar(&o.label, "key-label", "", "a `LABEL` for the key's slot, readable without the key")
	c.MarkFlagsMutuallyExclusive("fixed", "max-size")
	return c
}

func (a *app) create(ctx context.Context, o *createOptions, args []string) error {
	if _, err := o.ref.take(args, 0, 0, ""); err != nil {
		return err
	}
	params, err := o.kdf.params()
	if err != nil {
		return err
	}
	cred, done, err := a.newKey(ctx, &o.ref, &o.key, o.sealNames)
	if err != nil {
		return err
	}
	defer done()
	opts := &nvstore.CreateOptions{Format: o.ref.format, Size: int64(o.size), MaxSize: int64(o.max), ClusterSize: int(o.chunks),
		Key: cred, KDF: params, KeyLabel: o.label, SealNames: o.sealNames, Existing: o.existing || o.ref.opts != "", Idle: -1}
	if o.fixed {
		if opts.MaxSize = opts.Size; opts.MaxSize == 0 {
			opts.MaxSize = 64 << 20
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	o.ref.location = withMachine(o.ref.location)
	s, err := a.createStore(&o.ref, opts)
	if err != nil {
		return a.explain(&o.ref, existsHint(err))
	}
	err = a.created(s, &o.ref)
	closing(s, &err)
	return err
}

// createStore makes the store. What is there already is looked at before that:
// whether it is encrypted, as a secret says.
func (a *app) createStore(ref *imageRef, opts *nvstore.CreateOptions) (*nvstore.Store, error) {
	if !opts.Existing {
		if ref.secrets.given() {
			return nil, withHint(usagef("a secret is for an encrypted image, which must be there already"),
				"make one with nvtool luks format, and then the store on it with nvtool create --existing")
		}
		return nvstore.Create(ref.location, opts)
	}
	dev, err := a.device(ref, false)
	if err != nil {
		return nil, err
	}
	s, err := nvstore.CreateDevice(dev, opts)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	return s, nil
}

// withMachine chooses a machine's UUID where a Pebble folder comes without
// one, so that it can be told.
func withMachine(location string) string {
	dir, ok := strings.CutPrefix(location, "pebble:")
	if !ok || dir == "" {
		return location
	}
	if _, err := pebbledev.ParseUUID(dir[strings.LastIndexByte(dir, '/')+1:]); err == nil {
		return location
	}
	var id pebbledev.UUID
	rand.Read(id[:])
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // RFC 9562, version 4
	return "pebble:" + strings.TrimRight(dir, "/") + "/" + id.String()
}

func existsHint(err error) error {
	if kindOf(err).name == "exists" {
		return withHint(err, "choose another path; --existing makes a store on a blank image that is there already")
	}
	return err
}

func (a *app) created(s *nvstore.Store, ref *imageRef) error {
	info, err := s.Info()
	if err != nil {
		return err
	}
	if !info.Sealed {
		// Said even with -q: whoever thinks that it is sealed must learn.
		fmt.Fprintln(a.err, "nvtool: warning: THE STORE IS NOT SEALED: no key was given. Whoever can read the image can read and change all that is put there.")
	}
	if a.json {
		return a.printJSON(describe(s, info, ref))
	}
	sealed := "plain"
	if info.Sealed {
		sealed = "sealed"
	}
	a.sayf("%s: %s store %s in a %s image of %s", printable(ref.location), sealed, uuidText(info.UUID),
		formatOf(s.Dir().Device()), roughSize(info.Size))
	return nil
}
