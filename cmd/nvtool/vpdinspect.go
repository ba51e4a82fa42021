package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"nvstore.dev/blobdir"
	"nvstore.dev/nvstore"
	"nvstore.dev/vpd"
	"nvstore.dev/vpd/formats"
)

type inspectOptions struct {
	output string
	table  bool
	hexMap bool
}

func (a *app) vpdInspectCmd() *cobra.Command {
	j := &vpdJob{app: a}
	var o inspectOptions
	c := a.verb("inspect FILE|IMAGE [NAME] [-o page.html]", "Show an image field by field, or all that a store has", func(ctx context.Context, args []string) error {
		j.ctx = ctx
		if len(args) == 1 && j.ref.opts == "" && !j.isStore(args[0]) {
			j.file = args[0]
			return j.inspect(&o)
		}
		args, err := j.ref.take(args, 0, 1, "at most one NAME")
		if err != nil {
			return err
		}
		if len(args) == 0 {
			return j.inspectAll(&o)
		}
		names, err := canonical(args)
		if err != nil {
			return err
		}
		j.name = names[0]
		return j.inspect(&o)
	})
	c.Long = `Show an image's fields: where each lies, its value, its bytes, and which checksum
covers it. On a terminal it is drawn first, 16 bytes to the line: colours tell
areas apart, checksums are inverse, and what has a problem is on red. Of an
IMAGE without NAME, list the blobs whose format is recognised. Exit code 27 if a
checksum is wrong.

-o makes one self-contained page, for a browser, of the image or of all blobs.`
	c.Example = `  nvtool vpd inspect server.fru
  nvtool vpd inspect vm.qcow2 fru/baseboard -o fru.html
  nvtool vpd inspect vm.qcow2 -o machine.html --passphrase-file pass`
	j.flags(c)
	f := c.Flags()
	f.StringVarP(&o.output, "output", "o", "", "write a page in HTML to `FILE`")
	f.BoolVar(&o.table, "table", false, "show the table of fields only")
	f.BoolVar(&o.hexMap, "map", false, "draw the image too where the output is no terminal")
	c.MarkFlagsMutuallyExclusive("table", "map", "output")
	return c
}

// isStore tells an image with a store from a file of VPD, by how it begins.
func (j *vpdJob) isStore(path string) bool {
	if j.ref.format != "" || strings.HasPrefix(path, "pebble:") {
		return true
	}
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	head := make([]byte, len(blobdir.Magic))
	n, _ := io.ReadFull(f, head)
	return bytes.HasPrefix(head[:n], []byte("QFI\xfb")) || bytes.Equal(head[:n], blobdir.Magic)
}

func (j *vpdJob) inspect(o *inspectOptions) error {
	p, f, err := j.load()
	if err != nil {
		return err
	}
	m, err := newHexMap(j.what(), f, p)
	if err != nil {
		return fmt.Errorf("%s: %w", j.what(), err)
	}
	if err := j.show(o, m, f, p); err != nil {
		return err
	}
	return wrongSums(j.what(), f, p)
}

func (j *vpdJob) show(o *inspectOptions, m *hexMap, f vpd.Format, p []byte) error {
	if o.output != "" {
		return j.page(o.output, j.what(), []*hexMap{m})
	}
	if j.json {
		fields, err := f.Fields(p)
		if err != nil {
			return err
		}
		if fields == nil {
			fields = []vpd.Field{}
		}
		return j.printJSON(struct {
			Format string      `json:"format"`
			Size   int         `json:"size"`
			Fields []vpd.Field `json:"fields"`
		}{f.Name(), len(p), fields})
	}
	j.sayf("%s: %d bytes of %s, %s", j.what(), len(p), f.Name(), m.verdict())
	drawn := o.hexMap || isTerminal(j.out) && !o.table
	if drawn {
		if err := m.terminal(j.out, j.width(), j.colours()); err != nil {
			return err
		}
	}
	header, rows := []string{"offset", "length", "field", "value", "covered by", "bytes"}, j.fieldRows(m)
	if isTerminal(j.out) {
		header, rows = fit(header, rows, j.width(), drawn)
	}
	return j.printTable(header, rows)
}

// fit leaves out the bytes where they are drawn already, and cuts values so that
// a row fits on a line of a terminal.
func fit(header []string, rows [][]string, width int, drawn bool) ([]string, [][]string) {
	const value, hex = 3, 5
	n := len(header)
	if drawn {
		n = hex
	}
	longest := make([]int, n)
	for _, row := range append([][]string{header}, rows...) {
		for i := range n {
			longest[i] = max(longest[i], text.StringWidthWithoutEscSequences(row[i]))
		}
	}
	room := width - 1 - 3*n
	for i, l := range longest {
		if i != value {
			room -= l
		}
	}
	for i, row := range rows {
		rows[i] = row[:n]
		if s := []rune(row[value]); len(s) > max(room, 16) {
			row[value] = string(s[:max(room, 16)-1]) + "…"
		}
	}
	return header[:n], rows
}

func (j *vpdJob) page(path, title string, maps []*hexMap) error {
	if err := j.writeOutput(path, func(w io.Writer) error { return writePage(w, title, maps) }); err != nil || path == "-" {
		return err
	}
	j.sayf("%s: %s", printable(path), count(int64(len(maps)), "image"))
	return nil
}

// A found blob is one that could be VPD.
type found struct {
	Name     string        `json:"name"`
	Size     int64         `json:"size"`
	Format   string        `json:"format,omitempty"` // empty if it isn't recognised
	Problems []vpd.Problem `json:"problems,omitempty"`
	Fields   []vpd.Field   `json:"fields,omitempty"`
	m        *hexMap
}

// inspectAll decodes every blob that it recognises.
func (j *vpdJob) inspectAll(o *inspectOptions) error {
	list, err := j.findAll()
	if err != nil {
		return err
	}
	if err := j.showAll(o, list); err != nil {
		return err
	}
	for _, x := range list {
		if x.m != nil {
			if err := wrongSums(printable(j.ref.location+" "+x.Name), formats.ByName(x.Format), x.m.image); err != nil {
				return err
			}
		}
	}
	return nil
}

func (j *vpdJob) showAll(o *inspectOptions, list []found) error {
	if o.output != "" {
		var maps []*hexMap
		for _, x := range list {
			if x.m != nil {
				maps = append(maps, x.m)
			}
		}
		return j.page(o.output, j.ref.location, maps)
	}
	if j.json {
		return j.printJSON(list)
	}
	var rows [][]string
	known := 0
	for _, x := range list {
		verdict, summary := "", ""
		if x.m != nil {
			known++
			verdict, summary = x.m.verdict(), x.m.summary()
		}
		rows = append(rows, []string{printable(x.Name), fmt.Sprint(x.Size), x.Format, verdict, summary})
	}
	j.sayf("%s: %s, of which %d recognised", printable(j.ref.location), count(int64(len(list)), "blob"), known)
	return j.printTable([]string{"name", "size", "format", "checked", "what it says"}, rows)
}

func (j *vpdJob) findAll() (list []found, err error) {
	s, err := j.open(j.ctx, &j.ref, &j.key, reading)
	if err != nil {
		return nil, err
	}
	defer closing(s, &err)
	list = []found{}
	err = s.View(func(tx *nvstore.Tx) error {
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			x := found{Name: e.Name, Size: e.Size}
			if e.Size <= vpdLimit {
				if err := j.recognise(tx, &e, &x); err != nil {
					return err
				}
			}
			list = append(list, x)
		}
		return nil
	})
	return list, j.explain(&j.ref, err)
}

func (j *vpdJob) recognise(tx *nvstore.Tx, e *nvstore.Entry, x *found) error {
	p, err := tx.Get(e.Name, vpdLimit)
	if err != nil {
		return err
	}
	f := formats.ByName(strings.TrimPrefix(e.Type, "vpd/"))
	if f == nil || !strings.HasPrefix(e.Type, "vpd/") {
		f = formats.Detect(p)
	}
	if f == nil {
		return nil
	}
	m, err := newHexMap(e.Name, f, p)
	if errors.Is(err, vpd.ErrImage) {
		return nil // its type is wrong
	}
	if err != nil {
		return err
	}
	fields, err := f.Fields(p)
	x.Format, x.Problems, x.Fields, x.m = f.Name(), m.problems, fields, m
	return err
}

// telling are parts of names whose values tell one thing from another, the
// more telling first.
var telling = []string{"product_name", "identifier", "serial", ".SN", "mac", "part_number", ".PN", "manufacturer", "vendor", "name"}

// summary is a few values that tell what it is.
func (m *hexMap) summary() string {
	var parts []string
	seen := map[string]bool{}
	for _, word := range telling {
		for _, p := range m.parts {
			v := printable(p.Value)
			if len(parts) < 4 && strings.Contains(p.Name, word) && v != "" && !strings.HasPrefix(v, "0x") && len(v) > 2 && len(v) <= 40 && !seen[v] && p.area >= 0 && !p.fill {
				seen[v] = true
				parts = append(parts, v)
				break
			}
		}
	}
	return strings.Join(parts, ", ")
}
