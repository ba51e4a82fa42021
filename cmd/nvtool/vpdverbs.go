package main

import (
	"encoding/hex"
	"fmt"
	"io"

	"github.com/jedib0t/go-pretty/v6/text"
	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
	"nvstore.dev/vpd"
)

func (a *app) vpdUnpackCmd() *cobra.Command {
	return a.vpdVerb("unpack", "Make a spec of an image", "standard output",
		"Make a spec of an image. Packing that spec gives the image again, byte by byte. Exit\ncode 27 if a checksum is wrong, which the spec spells out.",
		func(j *vpdJob) error {
			p, f, err := j.load()
			if err != nil {
				return err
			}
			spec, warnings, err := f.Parse(p)
			if err != nil {
				return fmt.Errorf("%s: %w", j.what(), err)
			}
			j.warnAll(warnings)
			if err := j.writeOutput(j.output, func(w io.Writer) error {
				_, err := w.Write(spec)
				return err
			}); err != nil {
				return err
			}
			return wrongSums(j.what(), f, p)
		})
}

// fieldRows shows fields, with the first bytes of each.
func (j *vpdJob) fieldRows(m *hexMap) [][]string {
	colour := func(c text.Color, s string) string {
		if j.colours() && s != "" {
			return c.Sprint(s)
		}
		return s
	}
	rows := make([][]string, 0, len(m.parts))
	for i := range m.parts {
		p := &m.parts[i]
		if p.area < 0 {
			continue
		}
		raw := m.bytes(p)
		shown := hex.EncodeToString(raw[:min(len(raw), 12)])
		if len(raw) > 12 {
			shown += "…"
		}
		value := printable(p.Value)
		if p.fill {
			value = fmt.Sprintf("0x%02x, %d times", raw[0], len(raw))
		}
		rows = append(rows, []string{colour(text.FgHiBlack, fmt.Sprintf("%#06x", p.Off)), fmt.Sprint(p.Len),
			m.sgr(j.colours(), &hexPart{area: p.area, check: p.check, bad: p.bad}, printable(p.Name)), value,
			printable(p.CoveredBy), colour(text.FgHiBlack, shown)})
	}
	return rows
}

func (a *app) vpdVerifyCmd() *cobra.Command {
	return a.vpdVerb("verify", "Say what is wrong with an image", "",
		"Say what is wrong with an image: which area, and what is there instead of what. Exit code 27 if anything is.",
		func(j *vpdJob) error {
			p, f, err := j.load()
			if err != nil {
				return err
			}
			problems := f.Verify(p)
			if j.json {
				if problems == nil {
					problems = []vpd.Problem{}
				}
				if err := j.printJSON(struct {
					Format   string        `json:"format"`
					Problems []vpd.Problem `json:"problems"`
				}{f.Name(), problems}); err != nil {
					return err
				}
			}
			fixable := 0
			for _, q := range problems {
				if q.Fixable {
					fixable++
				}
				if !j.json {
					fmt.Fprintln(j.out, q)
				}
			}
			if len(problems) == 0 {
				j.sayf("%s: good %s of %d bytes", j.what(), f.Name(), len(p))
				return nil
			}
			hint := "no checksum is wrong: unpack it, correct the spec, and pack that"
			if fixable > 0 {
				hint = fmt.Sprintf("nvtool vpd fix corrects %d of them", fixable)
			}
			return withHint(&kinded{fmt.Errorf("%s: %s", j.what(), count(int64(len(problems)), "problem")), errVPD}, hint)
		})
}

func (a *app) vpdFixCmd() *cobra.Command {
	return a.vpdVerb("fix", "Correct an image's checksums", "in place",
		"Correct an image's checksums, in place or into FILE, and say what was changed. Nothing else is.",
		func(j *vpdJob) error {
			if j.name != "" && j.output == "" {
				return j.fixBlob()
			}
			p, f, err := j.load()
			if err != nil {
				return err
			}
			fixed, changes, err := f.Fix(p)
			if err != nil {
				return fmt.Errorf("%s: %w", j.what(), err)
			}
			to := j.output
			if to == "" && j.file != "-" {
				to = j.file
			}
			if len(changes) > 0 || j.output != "" || j.file == "-" {
				if err := j.writeBytes(to, fixed); err != nil {
					return err
				}
			}
			return j.printChanges(changes, to == "" || to == "-")
		})
}

// fixBlob corrects a blob in one transaction.
func (j *vpdJob) fixBlob() (err error) {
	s, err := j.open(j.ctx, &j.ref, &j.key, writing)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	var changes []vpd.Change
	err = s.Update(func(tx *nvstore.Tx) error {
		e, err := tx.Stat(j.name)
		if err != nil {
			return err
		}
		j.typ = e.Type
		p, err := tx.Get(j.name, vpdLimit)
		if err != nil {
			return err
		}
		f, err := j.choose(p)
		if err != nil {
			return err
		}
		var fixed []byte
		if fixed, changes, err = f.Fix(p); err != nil || len(changes) == 0 {
			return err
		}
		return tx.Put(j.name, fixed, nil)
	})
	if err != nil {
		return j.explain(&j.ref, err)
	}
	return j.printChanges(changes, false)
}

// printChanges goes to standard error where the image went to the output.
func (j *vpdJob) printChanges(changes []vpd.Change, taken bool) error {
	w := j.out
	if taken {
		w = j.err
	} else if j.json {
		if changes == nil {
			changes = []vpd.Change{}
		}
		return j.printJSON(changes)
	}
	if j.quiet {
		return nil
	}
	for _, c := range changes {
		fmt.Fprintln(w, c)
	}
	if len(changes) == 0 {
		fmt.Fprintf(w, "%s: nothing to fix\n", j.what())
	}
	return nil
}
