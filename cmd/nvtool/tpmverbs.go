package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate"
)

// errTPM is the kind of error for a state that no TPM starts on.
var errTPM = errors.New("the TPM's state is damaged")

func (a *app) tpmCmd() *cobra.Command {
	return group("tpm", "Make, move, show, check and clone a TPM's state",
		a.tpmSetupCmd(), a.tpmImportCmd(), a.tpmExportCmd(), a.tpmInspectCmd(), a.tpmVerifyCmd(),
		a.tpmDiffCmd(), a.tpmCloneCmd(), a.tpmResetCmd())
}

// take sets the place that args or --image-opts name.
func (p *tpmPlace) take(args []string, more int, want string) (string, []string, error) {
	args, err := p.ref.take(args, more, more, want)
	return p.ref.location, args, err
}

func (a *app) tpmInspectCmd() *cobra.Command {
	var p tpmPlace
	var secrets bool
	c := a.verb("inspect PLACE [--secrets]", "Show what is in a TPM's state", func(ctx context.Context, args []string) error {
		location, _, err := p.take(args, 0, "")
		if err != nil {
			return err
		}
		s, err := p.read(ctx, a, location)
		if err != nil {
			return err
		}
		f, err := a.tpmFacts(ctx, &p, s, secrets)
		if err != nil {
			return &kinded{err, errTPM}
		}
		if a.json {
			return a.printJSON(f)
		}
		return a.printTPM(f)
	})
	c.Long = `Start a TPM on a copy of the state in memory, and print what it says: NV indices
with size and attributes, persistent objects, hierarchies, lockout counters, PCR banks.
The state stays as it is. Contents of NV indices that an empty authorization opens are
shown with --secrets only.

` + placeHelp
	p.flags(c)
	p.runFlags(c)
	c.Flags().BoolVar(&secrets, "secrets", false, "show contents of NV indices, too")
	return c
}

// printTPM prints facts for people.
func (a *app) printTPM(f *tpmFacts) error {
	line := func(name, format string, args ...any) {
		fmt.Fprintf(a.out, "%-12s "+format+"\n", append([]any{name}, args...)...)
	}
	line("version", "TPM %s", f.Version)
	if f.Writer != "" {
		line("writer", "%s", printable(f.Writer))
	}
	for _, k := range []tpmstate.Kind{tpmstate.Permanent, tpmstate.Volatile, tpmstate.Savestate} {
		if n, ok := f.Sizes[k.String()]; ok {
			line(k.String(), "%d bytes", n)
		}
	}
	if f.Vendor == "" {
		return nil
	}
	line("vendor", "%s, firmware %s, library %s", printable(f.Vendor), f.Firmware, f.Revision)
	for _, h := range f.Hierarchies {
		state := "no authorization"
		if h.AuthSet {
			state = "authorization set"
		}
		line(h.Name, "%s", state)
	}
	l := f.Lockout
	line("failures", "%d of %d, one forgiven in %d s, lockout recovery %d s%s", l.Failures, l.MaxFailures, l.Interval, l.Recovery,
		map[bool]string{true: "; LOCKED OUT"}[l.Active])
	line("resets", "%d, restarts %d, clock %d ms", f.Resets.Resets, f.Resets.Restarts, f.Resets.Clock)
	line("PCR banks", "%s", strings.Join(f.PCRBanks, ", "))
	if len(f.NV) > 0 {
		var rows [][]string
		for _, n := range f.NV {
			note := printable(n.Certificate)
			if n.Content != "" {
				note = n.Content
			}
			rows = append(rows, []string{n.Index, fmt.Sprint(n.Size), n.Type, strings.Join(n.Attributes, " "), note})
		}
		if err := a.printTable([]string{"NV index", "size", "type", "attributes", "content"}, rows); err != nil {
			return err
		}
	}
	if len(f.Persistent) > 0 {
		var rows [][]string
		for _, o := range f.Persistent {
			rows = append(rows, []string{o.Handle, o.Type, strings.Join(o.Attributes, " "), o.Name})
		}
		return a.printTable([]string{"object", "type", "attributes", "name"}, rows)
	}
	return nil
}

func (a *app) tpmVerifyCmd() *cobra.Command {
	var p tpmPlace
	c := a.verb("verify PLACE", "Check a TPM's state, and say what the check is worth", func(ctx context.Context, args []string) error {
		location, _, err := p.take(args, 0, "")
		if err != nil {
			return err
		}
		s, err := p.read(ctx, a, location)
		if err != nil {
			return err
		}
		if s.State[tpmstate.Permanent] == nil {
			return &kinded{fmt.Errorf("%s has no permanent state", location), nvstore.ErrNotFound}
		}
		r, err := a.runTPM(ctx, p.nvtpm, s.State, s.version)
		if err != nil {
			return &kinded{fmt.Errorf("%s: the TPM doesn't start on this state: %w", location, err), errTPM}
		}
		r.end()
		worth := "every byte has a checksum, and all are right"
		switch {
		case s.form != "store" && p.swtpm != "":
			worth = "authenticated with the key given"
		case s.form != "store":
			worth = "its structure is right; this form has no checksum, so a changed byte can go unnoticed"
		case p.key.given():
			worth = "every byte has a checksum and is authenticated, and all are right"
		}
		a.sayf("%s: a TPM %s starts on it: %s", location, s.version, worth)
		if a.json {
			return a.printJSON(struct {
				OK      bool   `json:"ok"`
				Version string `json:"version"`
				Form    string `json:"form"`
				Worth   string `json:"worth"`
			}{true, s.version.String(), s.form, worth})
		}
		return nil
	})
	c.Long = `Check the structure of the place and of all wrappings, and start a TPM on a copy
in memory. In a store every stored byte has a checksum. swtpm's files in clear have
none: of the bytes of a state, nine in ten can change without a word.

` + placeHelp
	p.flags(c)
	p.runFlags(c)
	return c
}

func (a *app) tpmDiffCmd() *cobra.Command {
	var p, q tpmPlace
	q.key.prefix = "other-"
	c := a.verb("diff PLACE OTHER", "Compare two TPMs' states", func(ctx context.Context, args []string) error {
		location, rest, err := p.take(args, 1, "one OTHER")
		if err != nil {
			return err
		}
		q.nvtpm = p.nvtpm
		one, err := p.read(ctx, a, location)
		if err != nil {
			return err
		}
		two, err := q.read(ctx, a, rest[0])
		if err != nil {
			return err
		}
		same := one.version == two.version
		for k := range one.State {
			same = same && bytes.Equal(one.State[k], two.State[k])
		}
		var lines []tpmDifference
		if !same {
			f, err := a.tpmFacts(ctx, &p, one, true)
			if err != nil {
				return &kinded{fmt.Errorf("%s: %w", location, err), errTPM}
			}
			g, err := a.tpmFacts(ctx, &q, two, true)
			if err != nil {
				return &kinded{fmt.Errorf("%s: %w", rest[0], err), errTPM}
			}
			lines = differences(f, g)
		}
		if a.json {
			if err := a.printJSON(struct {
				Same        bool            `json:"same"`
				Differences []tpmDifference `json:"differences"`
			}{same, append([]tpmDifference{}, lines...)}); err != nil {
				return err
			}
		}
		if same {
			a.sayf("the same, byte for byte")
			return nil
		}
		if !a.json {
			for _, d := range lines {
				fmt.Fprintf(a.out, "%s: %s | %s\n", d.Field, d.One, d.Other)
			}
			if len(lines) == 0 {
				fmt.Fprintln(a.out, "what can be seen is the same; seeds, counters or contents that are not readable differ")
			}
		}
		return &kinded{errors.New("the states differ"), errDiffer}
	})
	c.Long = `Compare two states by what a TPM on each says, and exit with 28 if they differ.
Contents of NV indices are compared, and not shown.

` + placeHelp
	p.flags(c)
	p.runFlags(c)
	q.ref.secrets = p.ref.secrets
	q.key.flags(c, "the other store's ")
	c.Flags().StringVar(&q.swtpm, "other-swtpm-key", "", "as --swtpm-key, of the other place")
	return c
}

type tpmDifference struct {
	Field string `json:"field"`
	One   string `json:"one"`
	Other string `json:"other"`
}

// differences compares facts by their JSON, member by member.
func differences(f, g *tpmFacts) []tpmDifference {
	one, two := flatten(f), flatten(g)
	var fields []string
	for k := range one {
		fields = append(fields, k)
	}
	for k := range two {
		if _, ok := one[k]; !ok {
			fields = append(fields, k)
		}
	}
	slices.Sort(fields)
	var out []tpmDifference
	for _, k := range fields {
		if one[k] == two[k] {
			continue
		}
		d := tpmDifference{k, one[k], two[k]}
		if strings.HasSuffix(k, ".content") {
			d.One, d.Other = "(content)", "(other content)"
		}
		out = append(out, d)
	}
	return out
}

// flatten makes "nv_indices[0x01500016].size" of each member.
func flatten(f *tpmFacts) map[string]string {
	out := map[string]string{}
	b, err := json.Marshal(f)
	if err != nil {
		return out
	}
	var v any
	if json.Unmarshal(b, &v) != nil {
		return out
	}
	var walk func(path string, v any)
	walk = func(path string, v any) {
		switch v := v.(type) {
		case map[string]any:
			for k, e := range v {
				walk(strings.TrimPrefix(path+"."+k, "."), e)
			}
		case []any:
			for i, e := range v {
				key := fmt.Sprint(i)
				if m, ok := e.(map[string]any); ok {
					for _, name := range []string{"index", "handle", "name"} {
						if s, ok := m[name].(string); ok {
							key = s
							break
						}
					}
				}
				walk(path+"["+key+"]", e)
			}
		default:
			out[path] = fmt.Sprint(v)
		}
	}
	walk("", v)
	return out
}

func (a *app) tpmCloneCmd() *cobra.Command {
	var p, q tpmPlace
	q.key.prefix = "to-"
	var fresh, replace bool
	c := a.verb("clone PLACE IMAGE [--new-identity]", "Copy a TPM's state into another store", func(ctx context.Context, args []string) error {
		location, rest, err := p.take(args, 1, "one IMAGE")
		if err != nil {
			return err
		}
		q.ref.location = rest[0]
		s, err := p.read(ctx, a, location)
		if err != nil {
			return err
		}
		if !replace {
			if err := q.refuseTPM(ctx, a); err != nil {
				return err
			}
		}
		if fresh {
			if err := a.newIdentity(ctx, p.nvtpm, s); err != nil {
				return err
			}
		}
		if err := q.writeStore(ctx, a, rest[0], s); err != nil {
			return a.explain(&q.ref, err)
		}
		if fresh {
			a.sayf("%s: a TPM %s with seeds of its own", rest[0], s.version)
		} else {
			a.sayf("%s: the same TPM %s; two machines must not run with it", rest[0], s.version)
		}
		if a.json {
			return a.printJSON(s.facts())
		}
		return nil
	})
	c.Long = `Copy the state into the store in IMAGE, in one commit. Without --new-identity
the copy is the same TPM: same seeds, same keys, same certificates. With it, the copy
gets new endorsement, platform and storage seeds: what the owner and the endorsement
hierarchy had is gone, and so are the certificates of the old endorsement key; NV
indices that the platform defined stay. nvtool tpm setup --keep makes new certificates.

` + placeHelp
	p.flags(c)
	p.runFlags(c)
	q.ref.secrets = p.ref.secrets
	q.key.flags(c, "the key of IMAGE: ")
	c.Flags().BoolVar(&fresh, "new-identity", false, "give the copy seeds of its own")
	c.Flags().BoolVar(&replace, "replace", false, "replace the TPM that IMAGE has")
	return c
}
