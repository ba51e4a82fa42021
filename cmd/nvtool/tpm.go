package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"nvstore.dev/cmd/internal/swtpmopt"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/swtpm"
	"nvstore.dev/tpmstate/vbox"
)

// A tpmPlace is where a TPM's state is: a store, or what swtpm and VirtualBox
// keep it in.
type tpmPlace struct {
	ref    imageRef
	key    keyFlags
	swtpm  string // swtpm's --key
	nvtpm  string
	tpm12  bool
	stated bool // --tpm12 or not was said
}

const placeHelp = `PLACE is an IMAGE with a store, a folder of swtpm's (dir://), a linear file of
swtpm's (file://), one state file of its, or a .nvram file of VirtualBox's. What
a file is is seen from what it begins with.`

func (p *tpmPlace) flags(c *cobra.Command) {
	p.ref.flags(c)
	p.key.flags(c, "the store's ")
	c.Flags().StringVar(&p.swtpm, "swtpm-key", "", "key of swtpm's files, as its --key: file=F|fd=N|pwdfile=F|pwdfd=N[,mode=aes-256-cbc][,format=hex|binary][,kdf=pbkdf2|sha512]")
}

func (p *tpmPlace) runFlags(c *cobra.Command) {
	c.Flags().StringVar(&p.nvtpm, "nvtpm", "", "`FILE` of the program that runs the TPM (default: beside nvtool, or on the PATH)")
}

// A tpmState is a state with what is known of it.
type tpmState struct {
	tpmstate.State
	version tpmstate.Version
	form    string // "store", "dir", "file", "state file", "VirtualBox"
	writer  string // of the permanent state, if recorded
}

// versionOf tells which TPM a permanent state is of. That of a TPM 2.0 begins
// with a version and a magic number (libtpms, NVMarshal.c).
func tpmVersionOf(permanent []byte) tpmstate.Version {
	if len(permanent) >= 6 && binary.BigEndian.Uint32(permanent[2:]) == 0xab364723 {
		return tpmstate.TPM20
	}
	return tpmstate.TPM12
}

// read reads the state at a location.
func (p *tpmPlace) read(ctx context.Context, a *app, location string) (*tpmState, error) {
	form := "store"
	if p.ref.opts == "" && p.ref.format == "" {
		var err error
		if form, err = formOf(location); err != nil {
			return nil, err
		}
	}
	if form == "store" {
		return p.readStore(ctx, a, location)
	}
	key, err := swtpmopt.Key("--swtpm-key", p.swtpm)
	if err != nil {
		return nil, swtpmUsage(err)
	}
	s := &tpmState{form: form}
	if form == "dir" {
		err = s.readDir(location, key)
	} else {
		err = s.readFile(location, key)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", location, err)
	}
	return s, s.settle(location)
}

// settle finds the version, and refuses a place without a TPM.
func (s *tpmState) settle(location string) error {
	if len(s.names()) == 0 {
		return &kinded{fmt.Errorf("%s has no TPM state: %w", location, tpmstate.ErrNotFound), nvstore.ErrNotFound}
	}
	if s.version == 0 {
		s.version = tpmVersionOf(s.State[tpmstate.Permanent])
	}
	return nil
}

// formOf tells what lies at a path.
func formOf(path string) (string, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "store", nil // whose error names it
	}
	if err != nil {
		return "", err
	}
	if info.IsDir() {
		return "dir", nil
	}
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	b := make([]byte, 512)
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return "", err
	}
	b = b[:n]
	switch {
	case bytes.HasPrefix(b, []byte("nilmptws")):
		return "file", nil
	case n == 512 && bytes.HasPrefix(b[257:], []byte("ustar")):
		return "VirtualBox", nil
	case n >= 10 && (b[0] == 1 || b[0] == 2) && b[2] == 0 && b[3] == 10:
		return "state file", nil
	}
	return "store", nil
}

func (s *tpmState) readDir(dir string, key *swtpm.Key) error {
	for _, v := range []tpmstate.Version{tpmstate.TPM20, tpmstate.TPM12} {
		for k := range s.State {
			b, err := readLimited(filepath.Join(dir, swtpm.FileName(v, tpmstate.Kind(k))))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return err
			}
			if s.version != 0 && s.version != v {
				return &kinded{errors.New("the folder has a TPM 2.0 and a TPM 1.2"), errInvalid}
			}
			s.version = v
			if s.State[k], err = swtpm.OpenFile(b, key); err != nil {
				return fmt.Errorf("%s: %w", swtpm.FileName(v, tpmstate.Kind(k)), err)
			}
		}
	}
	return nil
}

func (s *tpmState) readFile(path string, key *swtpm.Key) error {
	b, err := readLimited(path)
	if err != nil {
		return err
	}
	switch s.form {
	case "VirtualBox":
		s.State, err = vbox.Parse(b)
		return err
	case "state file":
		s.State[tpmstate.Permanent], err = swtpm.OpenFile(b, key)
		return err
	}
	l, err := swtpm.ParseLinear(b)
	if err != nil {
		return err
	}
	for k, f := range l.Files {
		if f == nil {
			continue
		}
		if s.State[k], err = swtpm.OpenFile(f, key); err != nil {
			return fmt.Errorf("%s: %w", tpmstate.Kind(k), err)
		}
	}
	return nil
}

// readStore reads the state in a store. A blob that was put there as swtpm's
// file is taken for what it is.
func (p *tpmPlace) readStore(ctx context.Context, a *app, location string) (*tpmState, error) {
	ref := p.ref
	if ref.opts == "" {
		ref.location = location
	}
	st, err := a.open(ctx, &ref, &p.key, reading)
	if err != nil {
		return nil, err
	}
	s := &tpmState{form: "store"}
	err = st.View(func(tx *nvstore.Tx) error {
		for k := range s.State {
			name := tpmstate.Kind(k).BlobName()
			e, err := tx.Stat(name)
			if errors.Is(err, nvstore.ErrNotFound) {
				continue
			}
			if err != nil {
				return err
			}
			if s.State[k], err = tx.Get(name, tpmstate.MaxState+4096); err != nil {
				return err
			}
			if b, err := swtpm.Parse(s.State[k]); err == nil && !b.Encrypted() {
				if s.State[k], err = swtpm.OpenFile(s.State[k], nil); err != nil {
					return err
				}
			}
			if tpmstate.Kind(k) == tpmstate.Permanent {
				s.writer = e.Writer
			}
		}
		return nil
	})
	if err = errors.Join(err, st.Close()); err != nil {
		return nil, a.explain(&ref, err)
	}
	return s, s.settle(ref.location)
}

// writeStore makes s the state in a store, all of it at once.
func (p *tpmPlace) writeStore(ctx context.Context, a *app, location string, s *tpmState) (err error) {
	ref := p.ref
	if ref.opts == "" {
		ref.location = location
	}
	st, err := a.open(ctx, &ref, &p.key, writing)
	if err != nil {
		return err
	}
	defer closing(st, &err)
	writer := s.writer
	if writer == "" {
		writer = "nvtool " + version()
	}
	n, err := tpmstate.New(st, &tpmstate.Options{Version: s.version, Writer: writer})
	if errors.Is(err, tpmstate.ErrVersion) {
		// What is there is going to be replaced, which the caller allowed.
		err = st.Delete(presentTPM(st)...)
		if err == nil {
			n, err = tpmstate.New(st, &tpmstate.Options{Version: s.version, Writer: writer})
		}
	}
	if err != nil {
		return err
	}
	return n.Replace(s.State)
}

// presentTPM lists the blobs of a TPM in a store.
func presentTPM(st *nvstore.Store) []string {
	var names []string
	for k := range (tpmstate.State{}) {
		if _, err := st.Stat(tpmstate.Kind(k).BlobName()); err == nil {
			names = append(names, tpmstate.Kind(k).BlobName())
		}
	}
	return names
}

// swtpmUsage turns an error about an option into nvtool's kind.
func swtpmUsage(err error) error {
	if errors.Is(err, swtpmopt.ErrUsage) {
		return usage(err)
	}
	return err
}

// tpmNames are a state's blobs, for a message: "permanent (6009 bytes)".
func (s *tpmState) names() []string {
	var out []string
	for k, b := range s.State {
		if b != nil {
			out = append(out, fmt.Sprintf("%s (%d bytes)", tpmstate.Kind(k), len(b)))
		}
	}
	return out
}
