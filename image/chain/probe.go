package chain

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"nvstore.dev/image"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/qcow2"
)

// qcow2 header extensions about encryption: the one that QEMU merged in 2017
// (docs/interop/qcow2.txt, "Full disk encryption header pointer"), and the one
// of the patch of 2016 that it didn't.
const (
	extLUKS      = 0x0537be77
	extLUKSDraft = 0x4c554b53
)

// What is said where a layer hides the rest.
const (
	noteClaim  = "this is what the image's first bytes claim; the guest of a raw disk can write them too"
	noteInside = "what is inside (a disk, a qcow2, another layer) can't be known without the key"
	noteGuest  = "the content may be encrypted all the same, by the guest or by a LUKS layer above: that can't be told from the image"
	noteNone   = "no header was found: plain data, or LUKS whose header is detached or destroyed, look the same from here"
	noteLegacy = "crypt_method 1 is AES-128-CBC under the passphrase itself: no key derivation, nothing that tells a wrong passphrase; convert the image"
	noteDraft  = "header extension 0x4c554b53 is of a draft patch of 2016 that QEMU didn't merge (it has 0x0537be77); no released program opens this"
	noteLUKS2  = "QEMU knows no LUKS2, and takes this for a raw disk unless told not to"
)

// A Probe is what an image tells of itself without a key. It is for people:
// nothing may be opened for writing on its word.
type Probe struct {
	// Format is LUKS, QCOW2, or "" if nothing is recognised.
	Format string `json:"format"`

	// Encryption is "luks1", "luks2", "aes" (qcow2's legacy one),
	// "luks-draft", "none" (of a qcow2's own) or "" if it can't be known.
	Encryption string `json:"encryption"`

	// LUKS is the LUKS header, if there is a readable one, and Damaged why
	// there is none where there should be.
	LUKS    *luks.Info `json:"-"`
	Damaged error      `json:"-"`

	QCOW2 *qcow2.Info `json:"qcow2,omitempty"`

	// Notes are what can't be known, and what should be.
	Notes []string `json:"notes"`
}

// Inspect tells how a device is encrypted, without a key, as far as that can
// be told. Errors are those of reading.
func Inspect(d image.Device) (*Probe, error) {
	p := make([]byte, 4)
	if n, err := d.ReadAt(p, 0); err != nil && err != io.EOF {
		return nil, err
	} else if string(p[:n]) == "QFI\xfb" {
		return inspectQCOW2(d)
	}
	info, err := luks.Inspect(d)
	switch {
	case err == nil:
		pr := &Probe{Format: LUKS, Encryption: fmt.Sprintf("luks%d", info.Version), LUKS: info, Notes: []string{noteClaim, noteInside}}
		if info.Version == 2 {
			pr.Notes = append(pr.Notes, noteLUKS2)
		}
		return pr, nil
	case errors.Is(err, image.ErrFormat):
		return &Probe{Notes: []string{noteNone}}, nil
	case isLUKSError(err):
		return &Probe{Format: LUKS, Damaged: err, Notes: []string{noteClaim}}, nil
	}
	return nil, err
}

// isLUKSError tells what is wrong with a header from what went wrong reading.
func isLUKSError(err error) bool {
	return errors.Is(err, image.ErrCorrupt) || errors.Is(err, image.ErrUnsupported) || errors.Is(err, luks.ErrTruncated)
}

func inspectQCOW2(d image.Device) (*Probe, error) {
	info, err := qcow2.Inspect(d, "")
	if err != nil {
		if f := (*image.FormatError)(nil); errors.As(err, &f) {
			return &Probe{Format: QCOW2, Damaged: err, Notes: []string{noteClaim}}, nil
		}
		return nil, err
	}
	pr := &Probe{Format: QCOW2, QCOW2: info, Notes: []string{noteClaim}}
	switch info.Encryption {
	case "":
		pr.Encryption = "none"
		pr.Notes = append(pr.Notes, noteGuest)
		return pr, nil
	case "aes":
		pr.Encryption = "aes"
		pr.Notes = append(pr.Notes, noteLegacy)
		return pr, nil
	}
	if drafted(info) {
		pr.Encryption = "luks-draft"
		pr.Notes = append(pr.Notes, noteDraft)
		return pr, nil
	}
	pr.Encryption = "luks1"
	w, err := fdeHeader(d, info, "")
	if err == nil {
		pr.LUKS, err = luks.Inspect(w)
	}
	if pr.LUKS != nil {
		pr.Encryption = fmt.Sprintf("luks%d", pr.LUKS.Version)
	}
	pr.Damaged = err
	return pr, nil
}

func drafted(info *qcow2.Info) bool {
	_, merged := extension(info, extLUKS)
	_, draft := extension(info, extLUKSDraft)
	return draft && !merged
}

func extension(info *qcow2.Info, typ uint32) ([]byte, bool) {
	for _, x := range info.Extensions {
		if x.Type == typ {
			return x.Data, true
		}
	}
	return nil, false
}

// fdeHeader is the window of a qcow2 file that its LUKS header lies in.
func fdeHeader(file image.Device, info *qcow2.Info, path string) (image.Device, error) {
	bad := func(field string, got any, want string, kind error) error {
		return &image.FormatError{Path: path, Off: -1, Struct: "qcow2 header", Field: field, Got: got, Want: want, Kind: kind}
	}
	switch {
	case info.Encryption == "aes":
		return nil, bad("crypt_method", 1, "2 (LUKS): the legacy encryption has no header and no key slots", image.ErrUnsupported)
	case info.Encryption == "":
		return nil, bad("crypt_method", 0, "2 (LUKS): this image isn't encrypted by itself, though a LUKS layer may be above or below it", image.ErrUnsupported)
	case drafted(info):
		return nil, bad("extensions", nil, noteDraft, image.ErrUnsupported)
	}
	data, ok := extension(info, extLUKS)
	if !ok || len(data) != 16 {
		return nil, bad("extensions", nil, "one of type 0x0537be77 and 16 bytes, as crypt_method is 2", image.ErrCorrupt)
	}
	off, n := binary.BigEndian.Uint64(data), binary.BigEndian.Uint64(data[8:])
	size := uint64(max(0, file.Size()))
	if off == 0 || off%uint64(info.ClusterSize) != 0 || off > size || n > size-off {
		return nil, bad("encryption header", fmt.Sprintf("%d bytes at %#x", n, off),
			"whole clusters inside the file, from a cluster's start", image.ErrCorrupt)
	}
	return image.Window(file, int64(off), int64(n))
}

// OpenHeader opens the image that a location's LUKS header lies in, for what
// needs no key or changes key slots: a PATH of format LUKS, or of QCOW2 that is
// encrypted by itself; or a stack whose topmost driver is luks, or qcow2 with
// encrypt.format=luks. payload is the image of the payload, the same as header
// unless that is detached, and nil for a qcow2. Both are closed by closing
// each, payload only if it is another.
func OpenHeader(location string, o *Options) (header, payload image.Device, err error) {
	if o == nil {
		o = &Options{}
	}
	n, err := parse(location)
	if err != nil {
		return nil, nil, err
	}
	if n.driver == "" {
		switch o.Format {
		case LUKS, QCOW2:
			n = &node{driver: o.Format, child: &node{driver: "file", path: n.path}}
		default:
			return nil, nil, badLocation(location, "format", o.Format, "luks, or qcow2 for one that is encrypted by itself")
		}
	} else if o.Format != "" {
		return nil, nil, badLocation(location, "format", o.Format, "none: the location says it")
	}
	switch n.driver {
	case LUKS:
		return n.openParts(o)
	case QCOW2:
		header, err = n.openFDE(o)
		return header, nil, err
	}
	return nil, nil, badLocation(location, "driver", n.driver, "luks, or qcow2 with encrypt.format=luks, at the top")
}

func (n *node) openParts(o *Options) (header, payload image.Device, err error) {
	if payload, err = n.child.open(o); err != nil {
		return nil, nil, err
	}
	if n.header == nil {
		return payload, payload, nil
	}
	if header, err = n.header.open(o); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("LUKS header: %w", err), payload.Close())
	}
	return header, payload, nil
}

func (n *node) openFDE(o *Options) (image.Device, error) {
	file, err := n.child.open(o)
	if err != nil {
		return nil, err
	}
	info, err := qcow2.Inspect(file, n.child.path)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	w, err := fdeHeader(file, info, n.child.path)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return w, nil
}
