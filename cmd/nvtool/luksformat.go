package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"os"

	"github.com/spf13/cobra"

	"nvstore.dev/crypto/secret"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
)

type luksFormatOptions struct {
	ref                imageRef
	kdf                slotKDF
	header             string
	kind, cipher, hash string
	uuid               string
	keyBits            int
	size, sector       size
	force, zero        bool
}

func (a *app) luksFormatCmd() *cobra.Command {
	var o luksFormatOptions
	c := a.verb("format IMAGE [-f raw|qcow2] [--type luks2] [--size 64M] --secret-file FILE", "Make an encrypted image",
		func(ctx context.Context, args []string) error { return a.luksFormat(ctx, &o, args) })
	c.Long = `Make a LUKS image: in a new file, which appears when it is whole; in one that is
there, if that is blank or with --force; or on the stack that --image-opts
names, as driver=luks,file.driver=qcow2,file.file.filename=IMAGE; the secrets of
layers below the new one are named by LAYER. With
-f qcow2 the LUKS image lies inside a qcow2. (A qcow2 that is encrypted by
itself, whose size can be read without the key, is made by nvtool img create
-f qcow2 -o encrypt.format=luks.)

The first MiB of the content reads as zeros, the rest as noise: whatever lay
there. --zero writes encrypted zeros everywhere, which takes as long as
filling the disk. QEMU reads luks1 only.`
	c.Example = `  nvtool luks format disk.luks --size 20G --secret-file pass
  nvtool luks format disk.luks --type luks1 --size 20G --secret-file pass
  nvtool luks format disk.img --header disk.header --size 20G --secret-file pass`
	f := c.Flags()
	f.StringVar(&o.ref.opts, "image-opts", "", "a stack in QEMU's notation with driver=luks on top, in place of IMAGE")
	f.StringVarP(&o.ref.format, "format", "f", "", "`FORMAT` of what the LUKS image lies in, raw (default) or qcow2")
	o.ref.secrets = new(secretFlags)
	o.ref.secrets.flags(c)
	o.kdf.flags(c)
	f.StringVar(&o.header, "header", "", "new `FILE` for the header, detached from IMAGE")
	f.StringVar(&o.kind, "type", "luks2", "`VERSION` luks1 or luks2")
	f.StringVar(&o.cipher, "cipher", "", "`CIPHER` aes, serpent, twofish or cast5, with mode and IV (default aes-xts-plain64)")
	f.IntVar(&o.keyBits, "key-size", 0, "`BITS` of the volume key (default: the most that the cipher takes, 512 for aes-xts)")
	f.StringVar(&o.hash, "hash", "", "`HASH` of all derivations but Argon2 (default sha256)")
	f.Var(&o.sector, "sector-size", "of LUKS2's payload, 512 to 4096 (default 512)")
	f.Var(&o.size, "size", "of the content (default: what there is, or 64M for a new file)")
	f.StringVar(&o.uuid, "uuid", "", "of the image (default: random)")
	f.BoolVar(&o.force, "force", false, "overwrite what is there")
	f.BoolVar(&o.zero, "zero", false, "write encrypted zeros to all of the content")
	c.MarkFlagsMutuallyExclusive("image-opts", "header")
	return c
}

func (o *luksFormatOptions) options(pass []byte) (*luks.FormatOptions, error) {
	k, err := o.kdf.options(pass)
	if err != nil {
		return nil, err
	}
	version := map[string]int{"luks1": 1, "luks2": 2, "luks": 2}[o.kind]
	switch {
	case version == 0:
		return nil, usagef("--type %q: luks1 or luks2", o.kind)
	case o.keyBits%8 != 0 || o.keyBits < 0:
		return nil, invalidf("--key-size %d: bits, a multiple of 8", o.keyBits)
	case o.sector > math.MaxInt32:
		return nil, invalidf("--sector-size %s: 512 to 4096", o.sector.String())
	}
	return &luks.FormatOptions{Version: version, Passphrase: pass, Encryption: o.cipher, KeySize: o.keyBits / 8, Hash: o.hash,
		PBKDF2: k.PBKDF2, Iterations: k.Iterations, Argon2id: k.Argon2id, SectorSize: int(o.sector), Size: int64(o.size), UUID: o.uuid}, nil
}

func (a *app) luksFormat(ctx context.Context, o *luksFormatOptions, args []string) error {
	if _, err := o.ref.take(args, 0, 0, ""); err != nil {
		return err
	}
	if o.ref.format == "" {
		o.ref.format = chain.Raw
	}
	if o.ref.format == chain.LUKS {
		return usagef("-f luks: what the LUKS image lies in, raw or qcow2")
	}
	if err := o.ref.secrets.load(ctx, a, &o.ref); err != nil {
		return err
	}
	defer o.ref.secrets.wipe()
	pass, err := o.ref.secrets.newPassphrase(ctx, o.ref.keySecret())
	if err != nil {
		return err
	}
	defer clear(pass)
	if err := secret.Harden(); err != nil {
		return err
	}
	opts, err := o.options(pass)
	if err != nil {
		return err
	}
	t, err := a.luksTarget(o, opts)
	if err == nil {
		if err = o.ref.secrets.unused(); err != nil {
			err = errors.Join(err, t.end())
		}
	}
	if err != nil {
		return a.explain(&o.ref, err)
	}
	return a.explain(&o.ref, errors.Join(a.luksMake(ctx, o, opts, t), t.end()))
}

// A luksTarget is where a LUKS image is to be made.
type luksTarget struct {
	payload, header image.Device // the same if it isn't detached
	location        string       // opens the image afterwards
	fresh           []*chain.Pending
	done            bool
}

// end closes what is left, and removes what wasn't finished.
func (t *luksTarget) end() error {
	var errs []error
	for _, p := range t.fresh {
		if !t.done {
			errs = append(errs, p.Abort())
		}
	}
	for _, d := range []image.Device{t.payload, t.header} {
		if d != nil {
			if err := d.Close(); !errors.Is(err, image.ErrClosed) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// luksTarget opens or makes the images.
func (a *app) luksTarget(o *luksFormatOptions, opts *luks.FormatOptions) (t *luksTarget, err error) {
	t = &luksTarget{}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.end())
		}
	}()
	if o.ref.opts != "" {
		t.location = "--image-opts " + o.ref.location
		t.header, t.payload, err = chain.OpenHeader(o.ref.location, &chain.Options{Secret: o.ref.secrets.get})
		if err == nil && t.payload == nil {
			err = withHint(usagef("a qcow2 that is encrypted by itself is made as a whole"), "nvtool img create -f qcow2 -o encrypt.format=luks")
		}
		return t, err
	}
	if t.payload, err = a.luksPart(t, o.ref.location, o.ref.format); err != nil {
		return t, err
	}
	if o.size == 0 && len(t.fresh) > 0 {
		opts.Size = 64 << 20
	}
	t.location = "-f luks " + o.ref.location
	if t.header = t.payload; o.header != "" {
		if t.header, err = a.luksPart(t, o.header, chain.Raw); err != nil {
			return t, err
		}
		stack, err := detachedStack(o.ref.location, o.ref.format, o.header)
		t.location = "--image-opts " + stack
		return t, err
	}
	if o.ref.format == chain.QCOW2 {
		t.location = "--image-opts driver=luks,file.driver=qcow2,file.file.filename=" + o.ref.location
	}
	return t, nil
}

// luksPart opens a file, or makes a new one.
func (a *app) luksPart(t *luksTarget, path, format string) (image.Device, error) {
	there, err := exists(path)
	if err != nil {
		return nil, err
	}
	if there {
		return chain.Open(path, &chain.Options{Format: format})
	}
	p, err := chain.Create(path, &chain.CreateOptions{Format: format, Empty: true})
	if err != nil {
		return nil, err
	}
	t.fresh = append(t.fresh, p)
	return p.Device, nil
}

// luksMake makes the image on the target.
func (a *app) luksMake(ctx context.Context, o *luksFormatOptions, opts *luks.FormatOptions, t *luksTarget) error {
	if !o.force {
		for _, d := range []image.Device{t.payload, t.header} {
			if err := blankStart(d); err != nil {
				return err
			}
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if t.header != t.payload {
		opts.Header = t.header
	}
	d, err := luks.Format(t.payload, opts)
	if err != nil {
		return err
	}
	n := min(d.Size(), 1<<20)
	if o.zero {
		n = d.Size()
	}
	if err := a.writeZeros(ctx, d, n); err != nil {
		return err
	}
	if err := d.Sync(); err != nil {
		return err
	}
	info := d.Info()
	if err := d.Close(); err != nil {
		return err
	}
	for i, p := range t.fresh {
		if err := p.Commit(); err != nil {
			for _, q := range t.fresh[:i] { // half of a pair is nothing
				err = errors.Join(err, os.Remove(q.Location))
			}
			return err
		}
	}
	t.done = true
	return a.luksFormatted(o, t, info)
}

func (a *app) luksFormatted(o *luksFormatOptions, t *luksTarget, info *luks.Info) error {
	if a.json {
		f := luksFactsOf(o.ref.location, &chain.Probe{Format: chain.LUKS, Encryption: fmt.Sprintf("luks%d", info.Version), LUKS: info})
		return a.printJSON(f)
	}
	a.sayf("%s: LUKS%d, %s with a key of %d bits, UUID %s; opens as %s", printable(o.ref.location), info.Version,
		info.Encryption, info.KeySize*8, info.UUID, printable(t.location))
	return nil
}

// blankStart refuses a device that has content where LUKS and its users put
// theirs.
func blankStart(d image.Device) error {
	p := make([]byte, min(d.Size(), 1<<20))
	if err := image.ReadFull(d, p, 0); err != nil {
		return err
	}
	if len(bytes.Trim(p, "\x00")) > 0 {
		return withHint(&kinded{errors.New("the image isn't blank"), os.ErrExist}, "--force overwrites what is there; it is lost then")
	}
	return nil
}

// writeZeros writes zeros over the first n bytes, with a progress bar.
func (a *app) writeZeros(ctx context.Context, d image.Device, n int64) error {
	b := a.bar("writing", n)
	defer b.end()
	zeros := make([]byte, 1<<20)
	for at := int64(0); at < n; at += int64(len(zeros)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		if _, err := d.WriteAt(zeros[:min(n-at, int64(len(zeros)))], at); err != nil {
			return err
		}
		b.set(at, n)
	}
	return nil
}
