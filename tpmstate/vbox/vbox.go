// Package vbox reads and writes the file in which VirtualBox keeps a machine's
// TPM state.
package vbox

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"

	"nvstore.dev/image"
	"nvstore.dev/tpmstate"
)

// ErrFormat: this isn't a .nvram file.
var ErrFormat = errors.New("not a .nvram file of VirtualBox")

func bad(entry, want string) error {
	return &image.FormatError{Off: -1, Struct: "VirtualBox nvram file", Field: entry, Want: want, Kind: ErrFormat}
}

// Parse reads the TPM's state out of VirtualBox's .nvram file, a tar with
// libtpms' blobs as they are, under their names (DrvTpmEmuTpms.cpp). Other
// entries, such as UEFI variables, are left alone.
func Parse(p []byte) (tpmstate.State, error) {
	var s tpmstate.State
	r := tar.NewReader(bytes.NewReader(p))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return tpmstate.State{}, bad("", fmt.Sprintf("a tar file (%v)", err))
		}
		k, ok := tpmstate.ByLibraryName(path.Base(h.Name))
		if !ok || h.Typeflag != tar.TypeReg {
			continue
		}
		if s[k] != nil {
			return tpmstate.State{}, bad(h.Name, "each state once")
		}
		if h.Size > tpmstate.MaxState {
			return tpmstate.State{}, fmt.Errorf("%s: %w", h.Name, tpmstate.ErrTooLarge)
		}
		if s[k], err = io.ReadAll(io.LimitReader(r, tpmstate.MaxState+1)); err != nil {
			return tpmstate.State{}, bad(h.Name, fmt.Sprintf("%d bytes (%v)", h.Size, err))
		}
	}
	return s, nil
}

// Encode makes the .nvram file of a TPM's state alone.
func Encode(s tpmstate.State) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for k, blob := range s {
		if blob == nil {
			continue
		}
		h := &tar.Header{Name: "TpmEmuTpms/" + tpmstate.Kind(k).LibraryName(), Mode: 0o600, Size: int64(len(blob)), Format: tar.FormatGNU}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(blob); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
