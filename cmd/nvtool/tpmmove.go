package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/cmd/internal/swtpmopt"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/swtpm"
	"nvstore.dev/tpmstate/vbox"
)

func (a *app) tpmImportCmd() *cobra.Command {
	var p tpmPlace
	var replace bool
	c := a.verb("import IMAGE SOURCE [--replace]", "Put a TPM's state that swtpm or VirtualBox keeps into a store", func(ctx context.Context, args []string) error {
		args, err := p.ref.take(args, 1, 1, "one SOURCE")
		if err != nil {
			return err
		}
		return a.tpmImport(ctx, &p, args[0], replace)
	})
	c.Long = `Read a TPM's state out of SOURCE, which stays as it is, and put it into the
store, in one commit. SOURCE is a folder of swtpm's (dir://), a linear file of its
(file://), one state file, or VirtualBox's .nvram file. Damage that can be seen is
refused by name; swtpm would format such a file, and make a new TPM.`
	c.Example = `  nvtool tpm import vm.qcow2 /var/lib/libvirt/swtpm/UUID/tpm2 --passphrase-file pass
  nvtool tpm import vm.qcow2 tpm.lin --swtpm-key file=k,mode=aes-256-cbc`
	p.flags(c)
	c.Flags().BoolVar(&replace, "replace", false, "replace the TPM that the store has")
	return c
}

func (a *app) tpmImport(ctx context.Context, p *tpmPlace, source string, replace bool) error {
	from := *p
	from.ref = imageRef{}
	form, err := formOf(source)
	if err != nil {
		return err
	}
	if form == "store" {
		if _, err := os.Stat(source); err != nil {
			return err
		}
		return withHint(&kinded{fmt.Errorf("%s is no file of swtpm's or VirtualBox's", source), swtpm.ErrFormat},
			"the magic of a linear file, or a state's header, may be damaged; swtpm would make a new TPM of it")
	}
	s, err := from.read(ctx, a, source)
	if err != nil {
		return err
	}
	if s.State[tpmstate.Permanent] == nil {
		return &kinded{fmt.Errorf("%s has no permanent state: %w", source, tpmstate.ErrNotFound), nvstore.ErrNotFound}
	}
	if !replace {
		if err := p.refuseTPM(ctx, a); err != nil {
			return err
		}
	}
	if err := p.writeStore(ctx, a, p.ref.location, s); err != nil {
		return a.explain(&p.ref, err)
	}
	a.sayf("%s: a TPM %s: %s", p.ref.location, s.version, strings.Join(s.names(), ", "))
	if a.json {
		return a.printJSON(s.facts())
	}
	return nil
}

// refuseTPM fails if the store has a TPM.
func (p *tpmPlace) refuseTPM(ctx context.Context, a *app) (err error) {
	st, err := a.open(ctx, &p.ref, &p.key, reading)
	if err != nil {
		return err
	}
	defer closing(st, &err)
	if names := presentTPM(st); len(names) > 0 {
		return withHint(&kinded{fmt.Errorf("%s has a TPM: %s", p.ref.location, strings.Join(names, ", ")), nvstore.ErrExist},
			"--replace replaces it; nvtool snapshot create keeps what is there")
	}
	return nil
}

// facts are what --json prints of a state.
func (s *tpmState) facts() any {
	type blob struct {
		Kind string `json:"kind"`
		Size int    `json:"size"`
	}
	out := struct {
		Version string `json:"version"`
		Form    string `json:"form"`
		Writer  string `json:"writer,omitempty"`
		Blobs   []blob `json:"blobs"`
	}{Version: s.version.String(), Form: s.form, Writer: s.writer, Blobs: []blob{}}
	for k, b := range s.State {
		if b != nil {
			out.Blobs = append(out.Blobs, blob{tpmstate.Kind(k).String(), len(b)})
		}
	}
	return out
}

func (a *app) tpmExportCmd() *cobra.Command {
	var p tpmPlace
	var to string
	c := a.verb("export IMAGE TARGET --to dir|file|state|vbox", "Write a TPM's state as swtpm or VirtualBox keeps it", func(ctx context.Context, args []string) error {
		args, err := p.ref.take(args, 1, 1, "one TARGET")
		if err != nil {
			return err
		}
		return a.tpmExport(ctx, &p, args[0], to)
	})
	c.Long = `Write the TPM's state out of the store: as a folder (dir, which is made if it
isn't there), as a linear file (file), its permanent state alone as one state file
(state), or VirtualBox's .nvram file (vbox). With --swtpm-key, encrypted as swtpm
does under that key. A state that came from swtpm in clear comes out as the same
bytes. Nothing that is there is replaced.`
	c.Example = `  nvtool tpm export vm.qcow2 tpm2 --to dir --passphrase-file pass
  nvtool tpm export vm.qcow2 tpm.lin --to file --swtpm-key file=k,mode=aes-256-cbc`
	p.flags(c)
	c.Flags().StringVar(&to, "to", "dir", "the `FORM` of TARGET: dir, file, state or vbox")
	c.RegisterFlagCompletionFunc("to", cobra.FixedCompletions([]string{"dir", "file", "state", "vbox"}, cobra.ShellCompDirectiveNoFileComp))
	return c
}

func (a *app) tpmExport(ctx context.Context, p *tpmPlace, target, to string) error {
	files := map[string]func(*tpmState, *swtpm.Key) ([]byte, error){"file": linearOf, "vbox": vboxOf, "state": stateOf}
	if files[to] == nil && to != "dir" {
		return usagef("--to %s: dir, file, state or vbox", to)
	}
	if to == "vbox" && p.swtpm != "" {
		return usagef("VirtualBox encrypts its files itself: leave out --swtpm-key")
	}
	key, err := swtpmopt.Key("--swtpm-key", p.swtpm)
	if err != nil {
		return swtpmUsage(err)
	}
	s, err := p.readStore(ctx, a, p.ref.location)
	if err != nil {
		return err
	}
	if key == nil && to != "vbox" && p.key.given() {
		a.warnf("%s is not encrypted: give --swtpm-key to encrypt it as swtpm does", target)
	}
	if to == "dir" {
		err = exportDir(s, target, key)
	} else {
		var b []byte
		if b, err = files[to](s, key); err == nil {
			err = a.writeNew(target, b)
		}
	}
	if err != nil {
		return err
	}
	a.sayf("%s: %s", target, strings.Join(s.names(), ", "))
	if a.json {
		return a.printJSON(s.facts())
	}
	return nil
}

// writeNew makes a file that isn't there.
func (a *app) writeNew(path string, b []byte) error {
	if _, err := os.Lstat(path); err == nil {
		return &kinded{fmt.Errorf("%s is there already", path), nvstore.ErrExist}
	}
	return a.writeOutput(path, func(w io.Writer) error { _, err := w.Write(b); return err })
}

func linearOf(s *tpmState, key *swtpm.Key) ([]byte, error) {
	l := &swtpm.Linear{}
	for k, b := range s.State {
		if b == nil {
			continue
		}
		var err error
		if l.Files[k], err = swtpm.SealFile(b, key); err != nil {
			return nil, err
		}
	}
	return l.Encode(), nil
}

func vboxOf(s *tpmState, _ *swtpm.Key) ([]byte, error) { return vbox.Encode(s.State) }

func stateOf(s *tpmState, key *swtpm.Key) ([]byte, error) {
	if s.State[tpmstate.Permanent] == nil {
		return nil, &kinded{tpmstate.ErrNotFound, nvstore.ErrNotFound}
	}
	return swtpm.SealFile(s.State[tpmstate.Permanent], key)
}

// exportDir fills a folder that has no TPM of this version.
func exportDir(s *tpmState, dir string, key *swtpm.Key) (err error) {
	made := false
	if err := os.Mkdir(dir, 0o700); err == nil {
		made = true
	} else if !errors.Is(err, os.ErrExist) {
		return err
	}
	for k := range s.State {
		name := filepath.Join(dir, swtpm.FileName(s.version, tpmstate.Kind(k)))
		if _, err := os.Lstat(name); err == nil {
			return &kinded{fmt.Errorf("%s is there already", name), nvstore.ErrExist}
		}
	}
	h, err := swtpm.OpenDir(dir, &swtpm.HomeOptions{Version: s.version, Key: key})
	if err != nil {
		return err
	}
	err = errors.Join(h.Replace(s.State), h.Close())
	if err != nil && made {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	return err
}

func (a *app) tpmResetCmd() *cobra.Command {
	var p tpmPlace
	var yes bool
	c := a.verb("reset IMAGE --yes", "Remove a TPM's state, so that the next start makes a new TPM", func(ctx context.Context, args []string) (err error) {
		if _, err = p.ref.take(args, 0, 0, ""); err != nil {
			return err
		}
		if !yes {
			return withHint(usagef("all keys and all that is sealed to this TPM will be lost for good"), "say --yes; nvtool snapshot create keeps what is there")
		}
		st, err := a.open(ctx, &p.ref, &p.key, writing)
		if err != nil {
			return err
		}
		defer closing(st, &err)
		names := presentTPM(st)
		if len(names) == 0 {
			return &kinded{fmt.Errorf("%s has no TPM state", p.ref.location), nvstore.ErrNotFound}
		}
		if err := st.Delete(names...); err != nil {
			return err
		}
		a.sayf("%s: removed %s", p.ref.location, strings.Join(names, ", "))
		return nil
	})
	c.Long = `Remove the TPM's state from the store, in one commit. The TPM that starts next
on it is a new one, with other seeds and no certificates: what was sealed to the old
one can't be opened any more. The other blobs stay.`
	p.ref.flags(c)
	p.key.flags(c, "the store's ")
	c.Flags().BoolVar(&yes, "yes", false, "do it")
	return c
}
