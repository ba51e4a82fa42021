package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

// tailFlags say how a machine's disk is divided, and how its store is made.
type tailFlags struct {
	key                  keyFlags
	kdf                  kdfFlags
	disk, maxDisk, state size
	sealNames            bool
	label                string
}

func (o *tailFlags) flags(c *cobra.Command, disk string) {
	o.key.flags(c, "the store's ")
	o.kdf.flags(c)
	f := c.Flags()
	f.Var(&o.disk, "disk", disk)
	f.Var(&o.maxDisk, "max-disk", "`SIZE` that it can grow to (default: 16T in a qcow2, else the disk's)")
	f.Var(&o.state, "state", "`SIZE` of the window for the store, which can't grow (default 64M)")
	f.BoolVar(&o.sealNames, "seal-names", false, "hide names, types and writers too; then ls needs the key")
	f.StringVar(&o.label, "key-label", "", "a `LABEL` for the key's slot, readable without the key")
}

// options are those of the store.
func (o *tailFlags) options(cred *keyslot.Credential) (*nvstore.CreateOptions, error) {
	params, err := o.kdf.params()
	if err != nil {
		return nil, err
	}
	return &nvstore.CreateOptions{Key: cred, KDF: params, KeyLabel: o.label, SealNames: o.sealNames, Idle: -1}, nil
}

// warnPlain is said even with -q: whoever thinks that it is sealed must learn.
func (a *app) warnPlain(cred *keyslot.Credential) {
	if cred == nil {
		fmt.Fprintln(a.err, "nvtool: warning: THE STORE IS NOT SEALED: no key was given. Whoever can read the image can read and change all that is put there.")
	}
}

// defaultMax is what a disk in a qcow2 can grow to: as much as a first-level
// table of 256 KiB maps, which is read when the image is opened. With clusters
// of 64 KiB it is 16 TiB.
func defaultMax(cluster int64) int64 {
	if cluster == 0 {
		cluster = 64 << 10
	}
	return 32768 * cluster * (cluster / 8)
}

type vmCreateOptions struct {
	tailFlags
	ref      imageRef
	cluster  size
	existing bool
	like     string
}

func (a *app) vmCreateCmd() *cobra.Command {
	var o vmCreateOptions
	c := a.verb("create DISK --disk SIZE [--max-disk 16T] [--state 64M] [-f qcow2|raw] [KEY]", "Make a machine's disk, with an empty store in its tail",
		func(ctx context.Context, args []string) error { return a.vmCreate(ctx, &o, args) })
	c.Long = `Make an image with a guest's disk of SIZE bytes, and a store in its tail. It takes
space as it is used, and appears under its name when it is whole. In a qcow2 the
disk can grow to --max-disk without a change of the image's size, which a live
snapshot can't bear. A stack given by --image-opts, and with --existing also a
PATH, must be there already, and blank in its tail.`
	c.Example = `  nvtool vm create vm.qcow2 --disk 20G --passphrase-file pass
  nvtool vm args vm.qcow2 -- -m 2G`
	o.ref.register(c, "format")
	o.tailFlags.flags(c, "`SIZE` of the guest's disk")
	c.Flags().Var(&o.cluster, "cluster-size", "of a qcow2 image, a `SIZE` from 512 to 2M (default 64k)")
	f := c.Flags()
	f.BoolVar(&o.existing, "existing", false, "use an image that is there already")
	f.StringVar(&o.like, "like", "", "divide it as the machine's disk `OTHER`, which may be in use, and make no store: a mirror brings it")
	for _, name := range []string{"disk", "max-disk", "state", "existing", "image-opts", "seal-names", "key-label", "passphrase", "passphrase-file", "passphrase-fd", "key-file"} {
		c.MarkFlagsMutuallyExclusive("like", name)
	}
	return c
}

func (a *app) vmCreate(ctx context.Context, o *vmCreateOptions, args []string) error {
	if _, err := o.ref.take(args, 0, 0, ""); err != nil {
		return err
	}
	switch {
	case o.like != "":
		return a.vmCreateLike(ctx, o)
	case o.disk == 0:
		return withHint(usagef("the size of the guest's disk isn't given"), "nvtool vm create "+printable(o.ref.location)+" --disk 20G")
	case o.maxDisk != 0 && o.maxDisk < o.disk:
		return invalidf("--max-disk %s: the disk has %s", o.maxDisk.String(), o.disk.String())
	case strings.HasPrefix(o.ref.location, "pebble:"):
		return withHint(fmt.Errorf("a machine's disk in a Pebble folder: %w", image.ErrUnsupported), "Pebble folders have state alone: nvtool create")
	}
	cred, done, err := a.newKey(ctx, &o.ref, &o.key, o.sealNames)
	if err != nil {
		return err
	}
	defer done()
	if err := ctx.Err(); err != nil {
		return err
	}
	f, err := a.makeDisk(o, cred)
	if err != nil {
		return a.explain(&o.ref, err)
	}
	a.warnPlain(cred)
	if a.json {
		return a.printJSON(f)
	}
	a.sayf("%s: a disk of %s, which can grow to %s, and a store in a window of %s", printable(o.ref.location),
		roughSize(f.DiskSize), roughSize(f.MaxDisk), roughSize(f.StateSize))
	return nil
}

func (a *app) makeDisk(o *vmCreateOptions, cred *keyslot.Credential) (f *diskFacts, err error) {
	plan := machine.Options{Disk: int64(o.disk), MaxDisk: int64(o.maxDisk), State: int64(o.state)}
	if o.existing || o.ref.opts != "" {
		return a.fillDisk(o, &plan, cred)
	}
	if o.ref.secrets.given() {
		return nil, withHint(usagef("a secret is for an encrypted image, which must be there already"),
			"make one with nvtool luks format or nvtool img create, and then use nvtool vm create --existing")
	}
	format := o.ref.format
	switch format {
	case "":
		format = chain.QCOW2
	case chain.LUKS:
		return nil, withHint(usagef("-f luks: an encrypted image must be there already"), "nvtool luks format makes one; then --existing")
	}
	if format == chain.QCOW2 && plan.MaxDisk == 0 {
		plan.MaxDisk = defaultMax(int64(o.cluster))
	}
	l, err := machine.Plan(&plan)
	if err != nil {
		return nil, err
	}
	return a.newDisk(o, format, l, func(dev image.Device) (*machine.Disk, error) { return o.fill(dev, l, cred) })
}

// newDisk makes the image, which fill makes a machine's disk.
func (a *app) newDisk(o *vmCreateOptions, format string, l *machine.Layout, fill func(image.Device) (*machine.Disk, error)) (f *diskFacts, err error) {
	p, err := chain.Create(o.ref.location, &chain.CreateOptions{Format: format, Size: l.ImageSize, ClusterSize: int(o.cluster),
		Mark: chain.MarkMachine, LateSync: true})
	if err != nil {
		if kindOf(err).name == "exists" {
			err = withHint(err, "choose another path; nvtool vm adopt makes an image that is there a machine's disk")
		}
		if errors.Is(err, image.ErrOutOfRange) {
			err = withHint(&kinded{err, errInvalid}, "a smaller --max-disk or larger clusters will do")
		}
		return nil, err
	}
	d, err := fill(p.Device)
	if err != nil {
		return nil, errors.Join(err, p.Abort())
	}
	f = factsOf(o.ref.location, d)
	if err := errors.Join(p.Device.Close(), p.Commit()); err != nil {
		return nil, errors.Join(err, p.Abort())
	}
	return f, nil
}

// vmCreateLike makes a disk that another machine's is to be mirrored to.
func (a *app) vmCreateLike(ctx context.Context, o *vmCreateOptions) error {
	other := diskRef{imageRef: imageRef{location: o.like, format: o.ref.format, allow: true, secrets: o.ref.secrets}, share: true}
	if err := other.secrets.load(ctx, a, &other.imageRef); err != nil {
		return err
	}
	defer other.secrets.wipe()
	// A mark says the other's format; else it is the new one's.
	if format, err := chain.Detect(o.like); err == nil {
		other.format = format
	}
	d, err := a.openDisk(&other, true)
	if err != nil {
		return err
	}
	l := d.Layout()
	if err := d.Device().Close(); err != nil {
		return err
	}
	format := o.ref.format
	if format == "" {
		format = chain.QCOW2
	}
	f, err := a.newDisk(o, format, &l, func(dev image.Device) (*machine.Disk, error) { return machine.Format(dev, &l) })
	if err != nil {
		return a.explain(&o.ref, err)
	}
	if a.json {
		return a.printJSON(f)
	}
	a.sayf("%s: a disk of %s, and room for a store in a window of %s", printable(o.ref.location), roughSize(f.DiskSize), roughSize(f.StateSize))
	return nil
}

// fill makes a store in a new image, and then says where it is.
func (o *tailFlags) fill(dev image.Device, l *machine.Layout, cred *keyslot.Credential) (*machine.Disk, error) {
	opts, err := o.options(cred)
	if err != nil {
		return nil, err
	}
	w, err := image.Window(lent{dev}, l.StateOffset, l.StateSize)
	if err != nil {
		return nil, err
	}
	s, err := nvstore.CreateDevice(w, opts)
	if err != nil {
		return nil, err
	}
	if err := s.Close(); err != nil {
		return nil, err
	}
	return machine.Format(dev, l)
}

// fillDisk makes a machine's disk of a blank image that is there.
func (a *app) fillDisk(o *vmCreateOptions, plan *machine.Options, cred *keyslot.Credential) (f *diskFacts, err error) {
	opts, err := o.options(cred)
	if err != nil {
		return nil, err
	}
	dev, err := a.device(&o.ref, false)
	if err != nil {
		return nil, err
	}
	defer closeAll(&err, dev)
	d, err := nvstore.Adopt(dev, &nvstore.AdoptOptions{Disk: plan.Disk, MaxDisk: plan.MaxDisk, State: plan.State, Fixed: true, Store: *opts})
	if errors.Is(err, nvstore.ErrExist) || errors.Is(err, image.ErrExist) {
		err = withHint(err, "the tail must read as zeros: choose a new image; nvtool luks format --zero makes a LUKS image read so")
	}
	if err != nil {
		return nil, err
	}
	return factsOf(o.ref.location, d), nil
}
