package main

import (
	"context"
	"io"

	"github.com/spf13/cobra"

	"nvstore.dev/vpd/machine"
)

func (a *app) vpdTemplateCmd() *cobra.Command {
	c := group("template", "List and show the templates of machines and of blobs", a.templateLsCmd(), a.templateShowCmd())
	c.Long = `Templates of QEMU's machines, with the EEPROMs that each board has, and of single
blobs, such as the EEPROM of a network card. A manifest takes them in with
"machine" and "template".`
	return c
}

func (a *app) templateLsCmd() *cobra.Command {
	return a.verb("ls", "List the templates", func(_ context.Context, args []string) error {
		if len(args) > 0 {
			return usagef("template ls takes no arguments")
		}
		type fact struct {
			Name  string `json:"name"`
			For   string `json:"for"`
			About string `json:"about"`
			Blobs int    `json:"blobs,omitempty"`
			Size  int64  `json:"size,omitempty"`
		}
		list := []fact{}
		var rows [][]string
		for _, t := range machine.Templates() {
			f := fact{t.Name, "machine", t.About, 0, 0}
			if f.Size, f.Blobs = t.Size(); t.Blob {
				f.For, f.Blobs = "blob, "+t.Format(), 0
			}
			size, blobs := "", ""
			if f.Size > 0 {
				size = formatSize(f.Size)
			}
			if f.Blobs > 0 {
				blobs = count(int64(f.Blobs), "blob")
			}
			list = append(list, f)
			rows = append(rows, []string{f.Name, f.For, blobs, size, f.About})
		}
		if a.json {
			return a.printJSON(list)
		}
		return a.printTable([]string{"name", "for", "blobs", "size", "what it is"}, rows)
	})
}

func (a *app) templateShowCmd() *cobra.Command {
	output := ""
	c := a.verb("show NAME [-o FILE]", "Print a template: a manifest, or a blob's spec", func(_ context.Context, args []string) error {
		if len(args) != 1 {
			return usagef("template show takes one NAME")
		}
		for _, t := range machine.Templates() {
			if t.Name == args[0] {
				return a.writeOutput(output, func(w io.Writer) error {
					_, err := w.Write(t.Manifest())
					return err
				})
			}
		}
		return withHint(usagef("no template %q", args[0]), "nvtool vpd template ls lists them")
	})
	c.Flags().StringVarP(&output, "output", "o", "", "write to `FILE` (default: standard output)")
	return c
}
