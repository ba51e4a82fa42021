package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
	"nvstore.dev/vpd"
	"nvstore.dev/vpd/formats"
)

// vpdLimit bounds a file of VPD: the largest spec of the largest format.
const vpdLimit = 64 << 20

// vpdType is what nvtool calls the content of a blob that it packed.
func vpdType(f vpd.Format) string { return "vpd/" + f.Name() }

// A vpdJob is a verb on a file, or on a blob in an image.
type vpdJob struct {
	*app
	ref    imageRef
	key    keyFlags
	format string
	output string

	file string // one of these two
	name string
	typ  string // of the blob
	ctx  context.Context
}

// vpdVerb makes a verb that takes FILE or IMAGE NAME.
func (a *app) vpdVerb(name, short, output, long string, fn func(*vpdJob) error) *cobra.Command {
	j := &vpdJob{app: a}
	c := a.verb(name+" FILE|IMAGE NAME [--format F]", short, func(ctx context.Context, args []string) error {
		if err := j.target(ctx, args); err != nil {
			return err
		}
		return fn(j)
	})
	c.Long = long
	j.flags(c)
	if output != "" {
		c.Flags().StringVarP(&j.output, "output", "o", "", "write to `FILE` (default: "+output+")")
	}
	return c
}

// flags adds what all verbs on a FILE or a blob take.
func (j *vpdJob) flags(c *cobra.Command) {
	j.ref.register(c, "image-format")
	j.key.flags(c, "the ")
	c.Flags().StringVar(&j.format, "format", "", "the VPD's `FORMAT`: "+formatNames()+" (default: recognised)")
	c.RegisterFlagCompletionFunc("format", cobra.FixedCompletions(strings.Split(formatNames(), ", "), cobra.ShellCompDirectiveNoFileComp))
}

// target reads FILE, or IMAGE NAME.
func (j *vpdJob) target(ctx context.Context, args []string) error {
	j.ctx = ctx
	if len(args) == 1 && j.ref.opts == "" {
		j.file = args[0]
		return nil
	}
	args, err := j.ref.take(args, 1, 1, "one NAME; or else give one FILE alone")
	if err != nil {
		return err
	}
	names, err := canonical(args)
	if err != nil {
		return err
	}
	j.name = names[0]
	return nil
}

func formatNames() string {
	var names []string
	for _, f := range formats.All() {
		names = append(names, f.Name())
	}
	return strings.Join(names, ", ")
}

// read returns the image.
func (j *vpdJob) read() (p []byte, err error) {
	if j.file != "" {
		return readLimited(j.file)
	}
	s, err := j.open(j.ctx, &j.ref, &j.key, reading)
	if err != nil {
		return nil, err
	}
	defer closing(s, &err)
	err = s.View(func(tx *nvstore.Tx) error {
		e, err := tx.Stat(j.name)
		if err != nil {
			return err
		}
		j.typ = e.Type
		p, err = tx.Get(j.name, vpdLimit)
		return err
	})
	return p, j.explain(&j.ref, err)
}

// readLimited reads a file, or standard input.
func readLimited(path string) ([]byte, error) {
	f := os.Stdin
	if path != "-" {
		var err error
		if f, err = os.Open(path); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	p, err := io.ReadAll(io.LimitReader(f, vpdLimit+1))
	if err != nil {
		return nil, err
	}
	if len(p) > vpdLimit {
		return nil, invalidf("%s has more than %d bytes", path, vpdLimit)
	}
	return p, nil
}

// choose finds the format: what the flag says, what the blob's type says, or
// what the image plainly is.
func (j *vpdJob) choose(p []byte) (vpd.Format, error) {
	if j.format != "" {
		if f := formats.ByName(j.format); f != nil {
			return f, nil
		}
		return nil, usagef("VPD format %q: %s", j.format, formatNames())
	}
	if name, ok := strings.CutPrefix(j.typ, "vpd/"); ok {
		if f := formats.ByName(name); f != nil {
			return f, nil
		}
	}
	if f := formats.Detect(p); f != nil {
		return f, nil
	}
	return nil, withHint(&kinded{fmt.Errorf("%s is of no VPD format that can be recognised", j.what()), errVPD},
		"say it with --format: "+formatNames())
}

func (j *vpdJob) what() string {
	if j.file != "" {
		return printable(j.file)
	}
	return printable(j.ref.location + " " + j.name)
}

// load reads the image and chooses its format.
func (j *vpdJob) load() ([]byte, vpd.Format, error) {
	p, err := j.read()
	if err != nil {
		return nil, nil, err
	}
	f, err := j.choose(p)
	return p, f, err
}

// wrongSums is an error if a checksum in an image is wrong. Verbs that read an
// image show what there is all the same, and end with it, so that no script
// takes damage for data.
func wrongSums(what string, f vpd.Format, p []byte) error {
	var first *vpd.Problem
	n := int64(0)
	for _, q := range f.Verify(p) {
		if q.Fixable {
			if n++; first == nil {
				first = &q
			}
		}
	}
	switch n {
	case 0:
		return nil
	case 1:
		return withHint(&kinded{fmt.Errorf("%s: %s", what, first), errVPD}, "nvtool vpd fix corrects it, if the rest is as it should be")
	}
	return withHint(&kinded{fmt.Errorf("%s: %d checksums are wrong, the first: %s", what, n, first), errVPD}, "nvtool vpd verify lists them; nvtool vpd fix corrects them")
}

func (a *app) warnAll(list []vpd.Warning) {
	for _, w := range list {
		a.warnf("%s", w)
	}
}

func (a *app) vpdPackCmd() *cobra.Command {
	j := &vpdJob{app: a}
	into := ""
	c := a.verb("pack SPEC [-o FILE | --into IMAGE NAME]", "Make an image of a spec", func(ctx context.Context, args []string) error {
		j.ctx = ctx
		return j.pack(args, into)
	})
	c.Long = `Make an image of a spec: JSON, in which comments are allowed, whose "format"
is one of ` + formatNames() + `. Checksums are computed.`
	c.Example = `  nvtool vpd pack nic.jsonc -o nic.vpd
  nvtool vpd pack nic.jsonc --into vm.qcow2 pci/0000:00:03.0/vpd --passphrase-file pass`
	j.ref.register(c, "image-format")
	j.key.flags(c, "the ")
	c.Flags().StringVarP(&j.output, "output", "o", "", "write to `FILE` (default: standard output)")
	c.Flags().StringVar(&into, "into", "", "put it into the store of `IMAGE`, as the blob NAME")
	c.MarkFlagsMutuallyExclusive("output", "into")
	return c
}

func (j *vpdJob) pack(args []string, into string) error {
	if len(args) == 0 {
		return usagef("pack needs a SPEC")
	}
	spec, rest := args[0], args[1:]
	store := into != "" || j.ref.opts != ""
	if store {
		if into != "" {
			rest = append([]string{into}, rest...)
		}
		names, err := j.ref.take(rest, 1, 1, "one NAME")
		if err != nil {
			return err
		}
		if names, err = canonical(names); err != nil {
			return err
		}
		j.name = names[0]
	} else if len(rest) > 0 {
		return usagef("pack takes one SPEC; a NAME needs --into IMAGE")
	}
	specText, err := readLimited(spec)
	if err != nil {
		return err
	}
	f, err := formats.OfSpec(specText)
	if err != nil {
		return fmt.Errorf("%s: %w", spec, err)
	}
	p, warnings, err := f.Pack(specText)
	if err != nil {
		return fmt.Errorf("%s: %w", spec, err)
	}
	j.warnAll(warnings)
	if !store {
		if err := j.writeBytes(j.output, p); err != nil || j.output == "" || j.output == "-" {
			return err
		}
		j.sayf("%s: %d bytes of %s", printable(j.output), len(p), f.Name())
		return nil
	}
	return j.store(p, vpdType(f))
}

// store puts an image into the store, and keeps the attributes of a blob that
// is there already.
func (j *vpdJob) store(p []byte, typ string) (err error) {
	s, err := j.open(j.ctx, &j.ref, &j.key, writing)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	err = s.Update(func(tx *nvstore.Tx) error { return putPacked(tx, j.name, p, typ) })
	if err != nil {
		return j.explain(&j.ref, err)
	}
	return j.putDone(s, j.name)
}

func putPacked(tx *nvstore.Tx, name string, p []byte, typ string) error {
	var m nvstore.Meta
	e, err := tx.Stat(name)
	if err == nil {
		m = e.Meta
	} else if !errors.Is(err, nvstore.ErrNotFound) {
		return err
	}
	m.Type, m.Writer = typ, "nvtool "+version()
	return tx.Put(name, p, &m)
}
