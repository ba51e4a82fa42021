package main

import (
	"context"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/vpd/formats"
	"nvstore.dev/vpd/machine"
)

func (a *app) vpdSchemaCmd() *cobra.Command {
	output := ""
	c := a.verb("schema FORMAT|manifest [-o FILE]", "Print the JSON Schema of a format's spec", func(_ context.Context, args []string) error {
		if len(args) != 1 {
			return usagef("schema takes one FORMAT: %s, or manifest", formatNames())
		}
		var text []byte
		if f := formats.ByName(args[0]); f != nil {
			text = f.Schema()
		} else if args[0] == "manifest" {
			text = machine.Schema()
		} else {
			return usagef("VPD format %q: %s, or manifest", args[0], formatNames())
		}
		return a.writeOutput(output, func(w io.Writer) error {
			_, err := w.Write(text)
			return err
		})
	})
	c.Long = `Print the JSON Schema (draft 2020-12) of a format's spec, one of
` + formatNames() + `,
or of the manifest that nvtool vpd build takes. An editor that is told of it completes and checks specs;
a spec may name it in its member "$schema".`
	c.Example = `  nvtool vpd schema fru -o fru.schema.json
  code server.fru.jsonc   # which begins with {"$schema": "./fru.schema.json", "format": "fru", ...`
	c.Flags().StringVarP(&output, "output", "o", "", "write to `FILE` (default: standard output)")
	c.ValidArgsFunction = cobra.FixedCompletions(strings.Split(formatNames()+", manifest", ", "), cobra.ShellCompDirectiveNoFileComp)
	return c
}
