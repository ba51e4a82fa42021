package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
	"nvstore.dev/machine"
)

// path is one as QEMU is given it: libvirt starts QEMU in another folder.
func (o *vmArgsOptions) path(p string) (string, error) {
	if !o.libvirt {
		return p, nil
	}
	return filepath.Abs(p)
}

// file says how QEMU opens the image, and makes the objects with the passphrases
// of what is encrypted.
func (o *vmArgsOptions) file(format string) (f *machine.File, objects []string, err error) {
	s := &stackOfFile{path: o.ref.location, format: format, encrypted: format == "luks" || o.ref.secrets.given()}
	if o.ref.opts != "" {
		if s, err = parseStack(o.ref.opts); err != nil {
			return nil, nil, err
		}
	}
	if strings.Contains(s.path, "://") || strings.HasPrefix(s.path, "pebble:") {
		return nil, nil, usagef("%s: QEMU opens a file", printable(s.path))
	}
	f = &machine.File{Format: s.format}
	if f.Path, err = o.path(s.path); err != nil {
		return nil, nil, err
	}
	if err := s.version(); err != nil {
		return nil, nil, err
	}
	for _, layer := range []struct {
		wanted bool
		name   string
		id     string
		key    *string
	}{{s.encrypted, s.secret, "nvstore-secret", &f.KeySecret}, {s.contained, s.container, "nvstore-luks-secret", &f.Container}} {
		if !layer.wanted {
			continue
		}
		object, err := o.object(layer.name, layer.id)
		if err != nil {
			return nil, nil, err
		}
		*layer.key = layer.id
		objects = append(objects, "-object", object)
	}
	return f, objects, nil
}

// A stackOfFile is what QEMU's nodes are made for: a format in a file, or in a
// LUKS container in a file.
type stackOfFile struct {
	path, format string
	encrypted    bool
	secret       string // key-secret of the format
	contained    bool
	container    string // key-secret of the container
}

// parseStack reads one in QEMU's notation.
func parseStack(opts string) (*stackOfFile, error) {
	list, err := optionList([]string{opts})
	if err != nil {
		return nil, err
	}
	m := map[string]string{}
	for _, kv := range list {
		m[kv[0]] = kv[1]
	}
	take := func(key string) string {
		v := m[key]
		delete(m, key)
		return v
	}
	s := &stackOfFile{format: take("driver")}
	below := "file."
	if m["file.driver"] == "luks" {
		take("file.driver")
		s.contained, s.container = true, take("file.key-secret")
		below = "file.file."
	}
	switch {
	case s.format == "qcow2" && take("encrypt.format") == "luks":
		s.encrypted, s.secret = true, take("encrypt.key-secret")
	case s.format == "luks" && !s.contained:
		s.encrypted, s.secret = true, take("key-secret")
	}
	if m[below+"driver"] == "file" {
		take(below + "driver")
	}
	s.path = take(below + "filename")
	if s.path == "" || len(m) > 0 || s.format != "qcow2" && s.format != "raw" && s.format != "luks" || s.format == "luks" && s.contained {
		return nil, withHint(fmt.Errorf("--image-opts %s: %w: QEMU's options are printed for qcow2, raw or luks in a file, and for qcow2 or raw in a luks container in a file",
			printable(opts), errors.ErrUnsupported), "give QEMU the stack as it is, and windows of it as nvtool vm info has their places")
	}
	return s, nil
}

// version refuses what QEMU can't open.
func (s *stackOfFile) version() (err error) {
	if !s.contained && s.format != "luks" {
		return nil
	}
	dev, err := chain.Open(s.path, &chain.Options{Format: chain.Raw, ReadOnly: true, NoLock: true})
	if err != nil {
		return err
	}
	defer closeAll(&err, dev)
	info, err := luks.Inspect(dev)
	if err == nil && info.Version != 1 {
		err = withHint(fmt.Errorf("%s is LUKS%d, and QEMU opens LUKS1 alone: %w", printable(s.path), info.Version, errors.ErrUnsupported),
			"nvtool luks format --type luks1, or nvtool img create -o encrypt.format=luks")
	}
	return err
}

// object is QEMU's, with the secret of a layer. QEMU reads the file itself, and
// counts each of its bytes.
func (o *vmArgsOptions) object(layer, id string) (string, error) {
	s := o.ref.secrets
	file, more, strip := "", "", false
	for _, text := range s.files {
		if name, source := splitLayer(text); name == layer || name == "" || layer == "" {
			file, strip = source, true
		}
	}
	for _, text := range s.keyFiles {
		if name, source := splitLayer(text); name == layer || name == "" || layer == "" {
			file, strip = source, false
		}
	}
	for _, text := range s.objects {
		if m, err := secretObject(text); err == nil && (m["id"] == layer || layer == "") {
			file, strip = m["file"], false
			if m["format"] != "" {
				more = ",format=" + m["format"]
			}
		}
	}
	if file == "" {
		return "", withHint(usagef("QEMU reads the passphrase from a file"), "--secret-file, --secret-key-file or --object")
	}
	if strip {
		p, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		defer clear(p)
		if bytes.HasSuffix(p, []byte("\n")) {
			return "", withHint(fmt.Errorf("%s ends with a newline, which QEMU takes for a part of the passphrase: %w", printable(file), errors.ErrUnsupported),
				"head -c -1 "+file+" > FILE makes one without it")
		}
	}
	path, err := o.path(file)
	return "secret,id=" + id + ",file=" + strings.ReplaceAll(path, ",", ",,") + more, err
}
