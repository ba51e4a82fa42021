package main

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/nvstore"
	"nvstore.dev/vpd/machine"
)

type buildOptions struct {
	key     keyFlags
	kdf     kdfFlags
	output  string
	format  string
	machine string
	csv     string
	set     []string
	count   int
	first   int
	dry     bool
}

func (a *app) vpdBuildCmd() *cobra.Command {
	var o buildOptions
	c := a.verb("build MANIFEST|--machine NAME -o IMAGE [--count N | --csv FILE]", "Make whole machines' stores from a manifest",
		func(ctx context.Context, args []string) error { return a.build(ctx, &o, args) })
	c.Long = `Make an image with a store that has all blobs of a machine: VPD from specs,
files, and templates, with the sizes worked out. MANIFEST is JSON, in which
comments are allowed; nvtool vpd template show prints one to begin with, and
nvtool vpd schema manifest what may stand in it. File names in it are relative
to it. With store.disk in it, the image is a machine's disk as nvtool vm create
makes one; a blob with "live": true is a live extent, as nvtool put --live.

--count makes that many machines, whose values count up; with --csv there is one
for each line of FILE, whose first line names the values. IMAGE then has a value
in its name, as in vm-${n:03}.qcow2 or ${serial}.qcow2; pebble:DIR takes any
number.

All is checked before the first image is made. The same manifest and files give
the same bytes: the time is that of the manifest, else SOURCE_DATE_EPOCH, else
1980, and identifiers come from the content. A sealed store can't be the same
twice, because its keys and nonces must not be.`
	c.Example = `  nvtool vpd template show fby35-bmc > bmc.jsonc
  nvtool vpd build bmc.jsonc -o bmc.qcow2
  nvtool vpd build --machine ast2600-evb --set serial=NVS0042 -o evb.qcow2
  nvtool vpd build rack.jsonc --count 40 -o 'rack/${serial}.qcow2'
  nvtool vpd build rack.jsonc --csv rack.csv -o pebble:machines --passphrase-file pass`
	o.key.flags(c, "the ")
	o.kdf.flags(c)
	f := c.Flags()
	f.StringVarP(&o.output, "output", "o", "", "the `IMAGE` to make, which must not be there")
	f.StringVarP(&o.format, "image-format", "f", "", "the image's `FORMAT`, qcow2 or raw (default: the manifest's, or qcow2)")
	f.StringVar(&o.machine, "machine", "", "build the template of QEMU's machine `NAME`")
	f.StringArrayVar(&o.set, "set", nil, "a value, `NAME=TEXT`, in place of the manifest's; may be repeated")
	f.StringVar(&o.csv, "csv", "", "make a machine for each line of `FILE`")
	f.IntVar(&o.count, "count", 1, "make `N` machines")
	f.IntVar(&o.first, "first", 1, "number of the first machine, from 1 on")
	f.BoolVarP(&o.dry, "dry-run", "n", false, "check all, and make nothing")
	c.MarkFlagsMutuallyExclusive("csv", "count")
	c.RegisterFlagCompletionFunc("machine", cobra.FixedCompletions(machineNames(), cobra.ShellCompDirectiveNoFileComp))
	return c
}

func machineNames() []string {
	var names []string
	for _, t := range machine.Templates() {
		if !t.Blob {
			names = append(names, t.Name)
		}
	}
	return names
}

// A builder makes machines.
type builder struct {
	*app
	o    *buildOptions
	m    *machine.Manifest
	dir  string // of the manifest
	set  map[string]string
	rows []map[string]string // of the CSV file
	cred *keyslot.Credential
	kdf  kdf.Argon2id
}

func (a *app) build(ctx context.Context, o *buildOptions, args []string) error {
	b := &builder{app: a, o: o, set: map[string]string{}}
	if err := b.prepare(args); err != nil {
		return err
	}
	n := o.count
	if o.csv != "" {
		n = len(b.rows)
	}
	plans, err := b.check(ctx, n)
	if err != nil {
		return err
	}
	if b.kdf, err = o.kdf.params(); err != nil {
		return err
	}
	if b.cred, err = o.key.credential(ctx, a, true); err != nil {
		return err
	}
	defer wipe(b.cred)
	if b.cred != nil && !o.dry {
		a.warnf("a sealed store is not the same each time that it is built: its keys and nonces must not repeat")
	}
	bar := (*bar)(nil)
	if n > 1 && !o.dry {
		bar = a.bar("machines", int64(n))
	}
	defer bar.end()
	for i := range plans {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !o.dry {
			if err := b.store(i, plans[i]); err != nil {
				return err
			}
		}
		bar.set(int64(i+1), int64(n))
	}
	return b.report(plans)
}

func (b *builder) prepare(args []string) error {
	o := b.o
	switch {
	case len(args) > 1 || (len(args) == 1) == (o.machine != ""):
		return usagef("build takes one MANIFEST, or --machine NAME")
	case o.output == "" && !o.dry:
		return usagef("build needs -o IMAGE")
	case o.format != "" && o.format != "qcow2" && o.format != "raw":
		return usagef("format %q: qcow2 or raw", o.format)
	case o.count < 1 || o.first < 1 || o.count > machine.MaxCount || o.first > machine.MaxCount-o.count+1:
		return usagef("--count and --first: 1 to %d", machine.MaxCount)
	}
	for _, text := range o.set {
		k, v, err := splitPair(text)
		if err != nil {
			return err
		}
		b.set[k] = v
	}
	name := "template " + o.machine
	text := []byte(nil)
	if o.machine != "" {
		t := machine.ByName(o.machine)
		if t == nil {
			return withHint(usagef("no machine %q", o.machine), "nvtool vpd template ls lists them")
		}
		text = t.Manifest()
	} else {
		name = args[0]
		b.dir = filepath.Dir(name)
		var err error
		if text, err = readLimited(name); err != nil {
			return err
		}
	}
	var err error
	if b.m, err = machine.Parse(text); err != nil {
		return fmt.Errorf("%s: %w", printable(name), err)
	}
	if o.csv != "" {
		b.rows, err = readRows(o.csv)
	}
	return err
}

// readRows reads a CSV file, whose first line names the columns.
func readRows(path string) ([]map[string]string, error) {
	text, err := readLimited(path)
	if err != nil {
		return nil, err
	}
	bad := func(format string, args ...any) error {
		return &kinded{fmt.Errorf("%s: "+format, append([]any{printable(path)}, args...)...), errInvalid}
	}
	r := csv.NewReader(bytes.NewReader(bytes.TrimPrefix(text, []byte("\xef\xbb\xbf"))))
	r.TrimLeadingSpace = true
	header, err := r.Read()
	if err != nil {
		return nil, bad("%v", err)
	}
	seen := map[[2]string]int{}
	var rows []map[string]string
	for {
		record, err := r.Read()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, bad("%v", err)
		}
		line, _ := r.FieldPos(0)
		row := map[string]string{}
		for i, name := range header {
			if name = strings.TrimSpace(name); name == "" {
				return nil, bad("column %d has no name in the first line", i+1)
			}
			if _, ok := row[name]; ok {
				return nil, bad("two columns have the name %q", name)
			}
			row[name] = record[i]
			if name != "serial" && name != "mac" && name != "uuid" {
				continue
			}
			key := [2]string{name, strings.ToLower(record[i])}
			if other, ok := seen[key]; ok {
				return nil, bad("lines %d and %d have the same %s, %s", other, line, name, printable(record[i]))
			}
			seen[key] = line
		}
		rows = append(rows, row)
	}
	if len(rows) == 0 || len(rows) > machine.MaxCount {
		return nil, bad("%d lines behind the first, want 1 to %d", len(rows), machine.MaxCount)
	}
	return rows, nil
}

// make makes machine i, from 0 on.
func (b *builder) make(i int) (*machine.Machine, error) {
	values := map[string]string{}
	for k, v := range b.set {
		values[k] = v
	}
	if b.rows != nil {
		for k, v := range b.rows[i] {
			values[k] = v
		}
	}
	x, err := b.m.Make(b.o.first+i, &machine.Options{Values: values, ReadFile: b.readFile})
	if err != nil {
		return nil, fmt.Errorf("machine %d: %w", b.o.first+i, err)
	}
	return x, nil
}

func (b *builder) readFile(name string, limit int) ([]byte, error) {
	if !filepath.IsAbs(name) {
		name = filepath.Join(b.dir, name)
	}
	p, err := readLimited(name)
	if err == nil && len(p) > limit {
		err = invalidf("%s has more than %d bytes", name, limit)
	}
	return p, err
}

// A buildPlan is what is known of a machine before it is made.
type buildPlan struct {
	N        int               `json:"n"`
	Location string            `json:"location"`
	UUID     string            `json:"uuid"`
	Size     int64             `json:"image_size"`
	Values   map[string]string `json:"values"`
	Disk     int64             `json:"disk_size,omitempty"`  // the guest's
	State    int64             `json:"state_size,omitempty"` // of the window for the store
	Blobs    []builtBlob       `json:"blobs"`
	seed     [32]byte
}

type builtBlob struct {
	Name string `json:"name"`
	Size int    `json:"size"`
	Type string `json:"type,omitempty"`
	Live bool   `json:"live,omitempty"`
}

// check makes all machines once, and keeps what must differ among them.
func (b *builder) check(ctx context.Context, n int) ([]*buildPlan, error) {
	locations, uuids := map[string]int{}, map[string]int{}
	var list []*buildPlan
	for i := range n {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		x, err := b.make(i)
		if err != nil {
			return nil, err
		}
		p, err := b.plan(x)
		if err != nil {
			return nil, fmt.Errorf("machine %d: %w", x.N, err)
		}
		if other, ok := locations[p.Location]; ok && p.Location != "" {
			return nil, withHint(invalidf("machines %d and %d would both be %s", other, x.N, printable(p.Location)), "have a value in the image's name, as in vm-${n:03}.qcow2")
		}
		if other, ok := uuids[p.UUID]; ok {
			return nil, withHint(invalidf("machines %d and %d would have the same store UUID, %s", other, x.N, p.UUID),
				"have a value in store.uuid that counts up, or leave it out")
		}
		locations[p.Location], uuids[p.UUID] = x.N, x.N
		if i == 0 {
			for _, blob := range x.Blobs {
				for _, w := range blob.Warnings {
					b.warnf("%s: %s", printable(blob.Name), w)
				}
			}
		}
		list = append(list, p)
	}
	return list, nil
}

func (b *builder) plan(x *machine.Machine) (*buildPlan, error) {
	p := &buildPlan{N: x.N, UUID: uuidText(x.UUID), Values: x.Values, Blobs: []builtBlob{}, Size: x.Store.Size, seed: x.Seed}
	var sizes []string
	for _, blob := range x.Blobs {
		names, err := canonical([]string{blob.Name})
		if err != nil {
			return nil, err
		}
		if blob.Live && !blob.Plain && b.o.key.given() {
			return nil, withHint(invalidf("%s: the store is sealed, and a live extent lies in it in clear", printable(blob.Name)), `"plain": true says that this is meant`)
		}
		p.Blobs = append(p.Blobs, builtBlob{names[0], len(blob.Content), blob.Type, blob.Live})
		sizes = append(sizes, names[0]+"="+strconv.Itoa(len(blob.Content)))
	}
	if p.Size == 0 {
		if len(sizes) > 0 {
			pl, err := makePlan(sizes, &planOptions{growth: 25, slack: 15})
			if err != nil {
				return nil, err
			}
			p.Size = pl.ImageSize
		}
		p.Size = (max(p.Size, 1) + 1<<20 - 1) >> 20 << 20
	}
	if x.Store.Disk != 0 {
		if err := b.planDisk(x, p); err != nil {
			return nil, err
		}
	}
	if b.o.output == "" {
		return p, nil
	}
	var err error
	if p.Location, err = x.Expand(b.o.output); err != nil {
		return nil, err
	}
	if strings.HasPrefix(p.Location, "pebble:") {
		p.Location = strings.TrimRight(p.Location, "/") + "/" + p.UUID
		return p, nil
	}
	if _, err := os.Lstat(p.Location); err == nil {
		return nil, existsHint(&kinded{fmt.Errorf("%s is there already", printable(p.Location)), fs.ErrExist})
	}
	if info, err := os.Stat(filepath.Dir(p.Location)); err != nil {
		return nil, err
	} else if !info.IsDir() {
		return nil, invalidf("%s is no folder", printable(filepath.Dir(p.Location)))
	}
	return p, nil
}

// store makes the image of a machine, under another name until it is whole.
func (b *builder) store(i int, p *buildPlan) error {
	x, err := b.make(i)
	if err != nil {
		return err
	}
	if x.Seed != p.seed {
		return invalidf("machine %d: a file that the manifest names was changed in the meantime", x.N)
	}
	if strings.HasPrefix(p.Location, "pebble:") {
		return b.fill(p.Location, x, p)
	}
	dir, err := os.MkdirTemp(filepath.Dir(p.Location), ".nvtool-build-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	tmp := filepath.Join(dir, filepath.Base(p.Location))
	if err := b.fill(tmp, x, p); err != nil {
		return err
	}
	// A link, unlike a rename, doesn't replace what came in between.
	if err := os.Link(tmp, p.Location); errors.Is(err, fs.ErrExist) {
		return existsHint(err)
	} else if err != nil {
		if err := os.Rename(tmp, p.Location); err != nil {
			return err
		}
	}
	return syncDir(filepath.Dir(p.Location))
}

// sourceTime is when a reproducible store was made.
func sourceTime(t time.Time) (time.Time, error) {
	if !t.IsZero() {
		return t, nil
	}
	if s := os.Getenv("SOURCE_DATE_EPOCH"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < 0 || n >= 253402300800 {
			return t, invalidf("SOURCE_DATE_EPOCH %q: seconds since 1970 are wanted", s)
		}
		return time.Unix(n, 0), nil
	}
	return time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC), nil
}

func (b *builder) fill(location string, x *machine.Machine, p *buildPlan) (err error) {
	opts := &nvstore.CreateOptions{Format: b.formatOf(x), Size: p.Size, MaxSize: x.Store.MaxSize, UUID: x.UUID,
		Key: b.cred, KDF: b.kdf, SealNames: x.Store.SealNames, Idle: -1}
	if b.cred == nil {
		if opts.Time, err = sourceTime(x.Store.Time); err != nil {
			return err
		}
		opts.Seed = x.Seed[:]
	}
	if p.Disk != 0 {
		return b.fillDisk(location, x, p, opts)
	}
	s, err := nvstore.Create(location, opts)
	if err != nil {
		return fmt.Errorf("machine %d: %w", x.N, err)
	}
	defer closing(s, &err)
	return putMachine(s, x, p)
}

// putMachine stores the blobs of a machine, as one commit.
func putMachine(s *nvstore.Store, x *machine.Machine, p *buildPlan) error {
	return s.Update(func(tx *nvstore.Tx) error {
		for i, blob := range x.Blobs {
			m := &nvstore.Meta{Type: blob.Type, Writer: "nvtool"}
			for _, attr := range blob.Attributes {
				m.Attributes = append(m.Attributes, blobdir.Attribute{Key: attr[0], Value: attr[1]})
			}
			if err := putBuilt(tx, p.Blobs[i].Name, &blob, m); err != nil {
				return fmt.Errorf("machine %d: %s: %w", x.N, p.Blobs[i].Name, err)
			}
		}
		return nil
	})
}

func (b *builder) report(list []*buildPlan) error {
	if b.json {
		return b.printJSON(list)
	}
	for _, p := range list {
		total := int64(0)
		for _, blob := range p.Blobs {
			total += int64(blob.Size)
		}
		what := printable(p.Location)
		if b.o.dry {
			what = fmt.Sprintf("machine %d", p.N)
		}
		b.sayf("%s: store %s, %s, %s", what, p.UUID, count(int64(len(p.Blobs)), "blob"), roughSize(total))
	}
	return nil
}
