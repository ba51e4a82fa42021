package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
	"nvstore.dev/vpd"
	"nvstore.dev/vpd/edit"
	"nvstore.dev/vpd/formats"
)

const pathHelp = `A PATH is that of a spec's member, as unpack prints it: board.serial_number,
board.custom[0], read_only.SN. A list ends in [+], where a value is appended; its
elements may be called by their names or types, variables.Timeout.data. A name
with periods in it may be quoted, values["a.b"]. A PATH that begins with a slash
is a JSON Pointer.`

func (a *app) vpdGetCmd() *cobra.Command {
	j := &vpdJob{app: a}
	c := a.verb("get FILE|IMAGE NAME PATH [--json]", "Print one field of an image", func(ctx context.Context, args []string) error {
		if len(args) == 0 {
			return usagef("get needs a PATH; nvtool vpd unpack prints all fields")
		}
		last := len(args) - 1
		if err := j.target(ctx, args[:last]); err != nil {
			return err
		}
		return j.get(args[last])
	})
	c.Long = `Print the value of one field: a string as it is, bytes as the hexadecimal
digits of its spec, and a number as a number. --json prints it as the spec has it.
Exit code 27 if a checksum in the image is wrong.

` + pathHelp
	c.Example = `  nvtool vpd get server.fru board.serial_number
  nvtool vpd get vm.qcow2 pci/0000:00:03.0/vpd read_only.SN --passphrase-file pass`
	j.flags(c)
	return c
}

func (j *vpdJob) get(path string) error {
	p, f, err := j.load()
	if err != nil {
		return err
	}
	spec, warnings, err := f.Parse(p)
	if err != nil {
		return fmt.Errorf("%s: %w", j.what(), err)
	}
	j.warnAll(warnings)
	v, err := edit.Get(spec, path)
	if err != nil {
		return withHint(fmt.Errorf("%s: %w", j.what(), err), "nvtool vpd unpack prints all fields")
	}
	if err := j.printField(v); err != nil {
		return err
	}
	return wrongSums(j.what(), f, p)
}

func (j *vpdJob) printField(v json.RawMessage) error {
	if j.json {
		return j.printJSON(v)
	}
	var s string
	var typed struct{ Type, Data *string }
	switch {
	case json.Unmarshal(v, &s) == nil:
	case json.Unmarshal(v, &typed) == nil && typed.Type != nil && typed.Data != nil:
		s = *typed.Data
	default:
		return j.printJSON(v)
	}
	if isTerminal(j.out) {
		s = printable(s)
	}
	fmt.Fprintln(j.out, s)
	return nil
}

func (a *app) vpdSetCmd() *cobra.Command {
	j := &vpdJob{app: a}
	var o setOptions
	c := a.verb("set FILE|IMAGE NAME PATH=VALUE... [--delete PATH]...", "Change fields of an image", func(ctx context.Context, args []string) error {
		n := 0
		for n < len(args) && (n == 0 && j.ref.opts == "" || !strings.Contains(args[n], "=")) {
			n++
		}
		if err := j.target(ctx, args[:n]); err != nil {
			return err
		}
		return j.set(&o, args[n:])
	})
	c.Long = `Change fields, all of them or none, in place or into a file (-o). Checksums are
computed anew; what isn't changed stays byte for byte, and moves if need be.
What the format can't represent is refused, and nothing is written.

  PATH=TEXT     a string
  PATH=@FILE    a file's bytes (of a text, @@ is a single @)
  PATH:=JSON    a number, null, or a value such as {"type": "hex", "data": "00ff"}

` + pathHelp
	c.Example = `  nvtool vpd set server.fru board.serial_number=NVS0042 product.asset_tag=A-17
  nvtool vpd set server.fru 'board.custom[+]=rev B' --delete product.file_id
  nvtool vpd set vm.qcow2 pci/0000:00:03.0/vpd read_write.YA=A-17 --passphrase-file pass
  nvtool vpd set switch.eeprom fields.mac_base=52:54:00:12:34:56 fields.mac_count:=32`
	j.flags(c)
	f := c.Flags()
	f.StringArrayVarP(&o.remove, "delete", "d", nil, "take the field at `PATH` away; may be repeated; done before fields are set")
	f.BoolVarP(&o.dry, "dry-run", "n", false, "show what would change, and write nothing")
	f.StringVarP(&j.output, "output", "o", "", "write to `FILE` (default: in place)")
	return c
}

type setOptions struct {
	remove []string
	dry    bool
}

// changes reads the command line's.
func (o *setOptions) changes(args []string) ([]edit.Change, error) {
	var list []edit.Change
	for _, path := range o.remove {
		list = append(list, edit.Change{Path: path})
	}
	for _, arg := range args {
		path, value, ok := strings.Cut(arg, "=")
		if !ok || path == "" {
			return nil, usagef("%q: PATH=VALUE is wanted", arg)
		}
		var raw json.RawMessage
		var err error
		switch {
		case strings.HasSuffix(path, ":"):
			path = strings.TrimSuffix(path, ":")
			if raw = json.RawMessage(value); !json.Valid(raw) {
				return nil, usagef("%q: JSON is wanted behind :=", arg)
			}
		case strings.HasPrefix(value, "@@"):
			raw, err = edit.String(value[1:])
		case strings.HasPrefix(value, "@"):
			var p []byte
			if p, err = readLimited(value[1:]); err == nil {
				raw, err = edit.Bytes(p)
			}
		default:
			raw, err = edit.String(value)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		list = append(list, edit.Change{Path: path, Value: raw})
	}
	if len(list) == 0 {
		return nil, usagef("set needs PATH=VALUE, or --delete PATH")
	}
	return list, nil
}

// An edited image, and what of it is new.
type edited struct {
	f        vpd.Format
	image    []byte
	was      int // bytes
	warnings []vpd.Warning
	diff     []edit.Difference
}

func (j *vpdJob) set(o *setOptions, args []string) error {
	changes, err := o.changes(args)
	if err != nil {
		return err
	}
	if j.name != "" && j.output == "" && !o.dry {
		return j.setBlob(changes)
	}
	p, err := j.read()
	if err != nil {
		return err
	}
	e, err := j.edit(p, changes)
	if err != nil {
		return err
	}
	to := j.output
	if to == "" && j.file != "-" {
		to = j.file
	}
	if !o.dry {
		if err := j.writeBytes(to, e.image); err != nil {
			return err
		}
	}
	return j.edited(e, !o.dry && (to == "" || to == "-"))
}

func (j *vpdJob) edit(p []byte, changes []edit.Change) (*edited, error) {
	f, err := j.choose(p)
	if err != nil {
		return nil, err
	}
	e := &edited{f: f, was: len(p)}
	if e.image, e.warnings, err = edit.Apply(f, p, changes); err != nil {
		return nil, fmt.Errorf("%s: %w", j.what(), err)
	}
	e.diff, err = diffImages(f, p, f, e.image)
	return e, err
}

func diffImages(f vpd.Format, older []byte, g vpd.Format, newer []byte) ([]edit.Difference, error) {
	a, _, err := f.Parse(older)
	if err != nil {
		return nil, err
	}
	b, _, err := g.Parse(newer)
	if err != nil {
		return nil, err
	}
	return edit.Diff(a, b)
}

// setBlob changes a blob in one transaction.
func (j *vpdJob) setBlob(changes []edit.Change) (err error) {
	s, err := j.open(j.ctx, &j.ref, &j.key, writing)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	var e *edited
	err = s.Update(func(tx *nvstore.Tx) error {
		entry, err := tx.Stat(j.name)
		if err != nil {
			return err
		}
		j.typ = entry.Type
		p, err := tx.Get(j.name, vpdLimit)
		if err != nil {
			return err
		}
		if e, err = j.edit(p, changes); err != nil || len(e.diff) == 0 {
			return err
		}
		return tx.Put(j.name, e.image, nil)
	})
	if err != nil {
		return j.explain(&j.ref, err)
	}
	return j.edited(e, false)
}

// edited tells what was changed, on standard error where the image went to
// the output.
func (j *vpdJob) edited(e *edited, taken bool) error {
	j.warnAll(e.warnings)
	if len(e.image) != e.was {
		j.warnf("%s: %d bytes became %d; the memory that it is for must have that size", j.what(), e.was, len(e.image))
	}
	w := j.out
	if taken {
		w = j.err
	}
	if j.json && !taken {
		return j.printDiff(w, e.diff, true)
	}
	if j.quiet {
		return nil
	}
	if len(e.diff) == 0 {
		fmt.Fprintf(w, "%s: nothing changes\n", j.what())
	}
	return j.printDiff(w, e.diff, false)
}

func (a *app) printDiff(w io.Writer, list []edit.Difference, asJSON bool) error {
	if asJSON {
		if list == nil {
			list = []edit.Difference{}
		}
		return a.printJSON(list)
	}
	for _, d := range list {
		line := printable(d.String())
		if w == a.out && a.colours() {
			line = map[byte]text.Color{'+': text.FgGreen, '-': text.FgRed, '~': text.FgYellow}[d.String()[0]].Sprint(line)
		}
		fmt.Fprintln(w, line)
	}
	return nil
}

func (a *app) vpdDiffCmd() *cobra.Command {
	j := &vpdJob{app: a}
	c := a.verb("diff OLD NEW", "Compare two images, specs or blobs field by field", func(ctx context.Context, args []string) error {
		j.ctx = ctx
		return j.diff(args)
	})
	c.Use = "diff FILE|IMAGE NAME FILE|IMAGE NAME"
	c.Long = `Compare two images, specs or blobs field by field. Each is a FILE, or a blob as
IMAGE NAME; of three arguments, the first two are a blob. Exit code 28 if they
differ, and 27 if they don't and a checksum is wrong.`
	c.Example = `  nvtool vpd diff old.fru new.fru
  nvtool vpd diff vm.qcow2 fru/baseboard server.fru.jsonc
  nvtool vpd diff a.qcow2 fru/baseboard b.qcow2 fru/baseboard`
	j.flags(c)
	return c
}

// A side is what is compared: the image, its format and what to call it.
type side struct {
	image []byte
	f     vpd.Format
	what  string
}

func (j *vpdJob) diff(args []string) error {
	if len(args) < 2 || len(args) > 4 || j.ref.opts != "" {
		return usagef("diff takes two of FILE and IMAGE NAME, and no --image-opts")
	}
	n := 1
	if len(args) > 2 {
		n = 2
	}
	var sides [2]side
	for i, list := range [][]string{args[:n], args[n:]} {
		k := *j
		if err := k.target(j.ctx, list); err != nil {
			return err
		}
		var err error
		if sides[i], err = k.side(); err != nil {
			return err
		}
	}
	a, b := sides[0], sides[1]
	list, err := diffImages(a.f, a.image, b.f, b.image)
	if err != nil {
		return err
	}
	if err := j.printDiff(j.out, list, j.json); err != nil {
		return err
	}
	if len(list) == 0 {
		return errors.Join(wrongSums(a.what, a.f, a.image), wrongSums(b.what, b.f, b.image))
	}
	return &kinded{fmt.Errorf("%s and %s differ in %s", a.what, b.what, count(int64(len(list)), "field")), errDiffer}
}

// side reads an image; a file may be a spec, which is packed.
func (j *vpdJob) side() (side, error) {
	p, err := j.read()
	if err != nil {
		return side{}, err
	}
	if j.file != "" {
		if f, err := formats.OfSpec(p); err == nil {
			image, _, err := f.Pack(p)
			if err != nil {
				return side{}, fmt.Errorf("%s: %w", j.what(), err)
			}
			return side{image, f, j.what()}, nil
		}
	}
	f, err := j.choose(p)
	return side{p, f, j.what()}, err
}
