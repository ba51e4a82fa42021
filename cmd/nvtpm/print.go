package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"nvstore.dev/cmd/nvtpm/internal/libtpms"
	"nvstore.dev/tpmstate"
)

// capabilities prints what scripts and libvirt ask for, in swtpm's form.
func (o *options) capabilities(log *logger) error {
	lib, err := libtpms.Open(o.libtpms, libtpms.Callbacks{})
	if err != nil {
		return err
	}
	features := []string{"tpm-1.2", "tpm-2.0", "tpm-send-command-header", "flags-opt-startup", "flags-opt-disable-auto-shutdown",
		"ctrl-opt-terminate", "cmdarg-seccomp", "cmdarg-key-fd", "cmdarg-pwd-fd", "cmdarg-print-states", "cmdarg-migration",
		"nvram-backend-dir", "nvram-backend-file", "nvram-backend-nvstore", "tpmstate-opt-lock",
		"tpmstate-dir-backend-opt-fsync"}
	lib.Choose(o.tpm2)
	features = append(features, rsaSizes(lib.Info(4))...)
	p, err := json.Marshal(struct {
		Type     string   `json:"type"`
		Features []string `json:"features"`
		Version  string   `json:"version"`
		Libtpms  string   `json:"libtpms"`
	}{"swtpm", features, programVersion(), lib.Version()})
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(o.stdout, "%s\n", p)
	return err
}

// rsaSizes are features of libtpms' own (TPMLIB_INFO_TPMFEATURES).
func rsaSizes(info string) []string {
	var v struct{ TPMFeatures struct{ RSAKeySizes []int } }
	if json.Unmarshal([]byte(info), &v) != nil {
		return nil
	}
	var out []string
	for _, n := range v.TPMFeatures.RSAKeySizes {
		out = append(out, fmt.Sprintf("rsa-keysize-%d", n))
	}
	return out
}

// states prints which blobs there are.
func (o *options) states(src *source) error {
	h, err := src.open()
	if err != nil {
		return err
	}
	type state struct {
		Name string `json:"name"`
		Size int    `json:"size"`
	}
	list := []state{}
	for _, k := range []tpmstate.Kind{tpmstate.Permanent, tpmstate.Volatile, tpmstate.Savestate} {
		p, err := h.Load(k)
		if errors.Is(err, tpmstate.ErrNotFound) {
			continue
		}
		if err != nil {
			return errors.Join(err, h.Close())
		}
		list = append(list, state{k.LibraryName(), len(p)})
	}
	p, err := json.Marshal(struct {
		Type   string  `json:"type"`
		States []state `json:"states"`
	}{"swtpm", list})
	if err == nil {
		_, err = fmt.Fprintln(o.stdout, strings.TrimSpace(string(p)))
	}
	return errors.Join(err, h.Close())
}
