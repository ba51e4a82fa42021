package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/vpd/edit"
	"nvstore.dev/vpd/foreign"
	"nvstore.dev/vpd/formats"
)

type importOptions struct {
	from   string
	into   string
	set    []string
	pack   bool
	format string
	device string
}

func (a *app) vpdImportCmd() *cobra.Command {
	j := &vpdJob{app: a}
	var o importOptions
	c := a.verb("import --from KIND FILE [-o FILE | --pack -o FILE | --into IMAGE NAME]", "Make a spec, or an image, of what another tool writes",
		func(ctx context.Context, args []string) error {
			j.ctx = ctx
			return j.importFile(&o, args)
		})
	var about strings.Builder
	var names []string
	for _, k := range foreign.Kinds() {
		names = append(names, k.Name)
		format := k.Format
		if format == "" {
			format = "any"
		}
		fmt.Fprintf(&about, "  %-14s %-9s %s\n", k.Name, format, k.About)
	}
	c.Long = `Make a spec of what another tool writes. What such a file can't say is set with
--set, in the spec's paths; --pack makes the image at once, and --into puts it
into a store.

  KIND           FORMAT    WHAT
` + about.String()
	c.Example = `  nvtool vpd import --from frugen fru.json -o server.fru.jsonc
  nvtool vpd import --from uboot env.txt --set env_size=0x4000 --pack -o env.bin
  ethtool -e eth0 | nvtool vpd import --from hex - --pack -o nic.bin
  nvtool vpd import --from eepmake settings.txt --into vm.qcow2 hat/id --passphrase-file pass`
	j.ref.register(c, "image-format")
	j.key.flags(c, "the ")
	f := c.Flags()
	f.StringVar(&o.from, "from", "", "`KIND` of the file: "+strings.Join(names, ", "))
	f.StringVarP(&j.output, "output", "o", "", "write to `FILE` (default: standard output)")
	f.BoolVar(&o.pack, "pack", false, "write the image instead of the spec")
	f.StringVar(&o.into, "into", "", "put the image into the store of `IMAGE`, as the blob NAME")
	f.StringArrayVar(&o.set, "set", nil, "add to the spec, `PATH=TEXT` or PATH:=JSON; may be repeated")
	f.StringVar(&o.format, "format", "", "the `FORMAT` of a hex dump's bytes (default: recognised, else raw)")
	f.StringVar(&o.device, "device", "", "which `DEVICE` of a dump that has several, such as 00:03.0")
	c.MarkFlagsMutuallyExclusive("output", "into")
	c.RegisterFlagCompletionFunc("from", cobra.FixedCompletions(names, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (j *vpdJob) importFile(o *importOptions, args []string) error {
	if o.from == "" || len(args) == 0 {
		return withHint(usagef("import needs --from KIND and a FILE"), "nvtool vpd import --help lists the kinds")
	}
	known := false
	for _, k := range foreign.Kinds() {
		known = known || k.Name == o.from
	}
	if !known {
		return withHint(usagef("kind %q is not known", o.from), "nvtool vpd import --help lists the kinds")
	}
	file, rest := args[0], args[1:]
	if o.into != "" {
		names, err := j.ref.take(append([]string{o.into}, rest...), 1, 1, "one NAME")
		if err != nil {
			return err
		}
		if names, err = canonical(names); err != nil {
			return err
		}
		j.name = names[0]
	} else if len(rest) > 0 {
		return usagef("import takes one FILE; a NAME needs --into IMAGE")
	}
	spec, err := j.importSpec(o, file)
	if err != nil {
		return err
	}
	if o.into == "" && !o.pack {
		return j.writeOutput(j.output, func(w io.Writer) error {
			_, err := w.Write(spec)
			return err
		})
	}
	f, err := formats.OfSpec(spec)
	if err != nil {
		return fmt.Errorf("%s: %w", printable(file), err)
	}
	p, warnings, err := f.Pack(spec)
	if err != nil {
		return withHint(fmt.Errorf("%s: %w", printable(file), err), "without --pack and --into, import prints the spec, which can be corrected")
	}
	j.warnAll(warnings)
	if o.into != "" {
		return j.store(p, vpdType(f))
	}
	return j.writeBytes(j.output, p)
}

func (j *vpdJob) importSpec(o *importOptions, file string) ([]byte, error) {
	changes := []edit.Change(nil)
	if len(o.set) > 0 {
		var err error
		if changes, err = (&setOptions{}).changes(o.set); err != nil {
			return nil, err
		}
	}
	text, err := readLimited(file)
	if err != nil {
		return nil, err
	}
	spec, notes, err := foreign.Import(o.from, text, &foreign.Options{Format: o.format, Device: o.device, ReadFile: func(name string) ([]byte, error) {
		if !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(file), name)
		}
		return readLimited(name)
	}})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", printable(file), err)
	}
	for _, n := range notes {
		j.warnf("%s", printable(n))
	}
	if len(changes) == 0 {
		return spec, nil
	}
	spec, err = edit.Text(spec, changes)
	if err != nil {
		return nil, fmt.Errorf("--set: %w", err)
	}
	return spec, nil
}
