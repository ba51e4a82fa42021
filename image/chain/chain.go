package chain

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"nvstore.dev/image"
	"nvstore.dev/image/pebbledev"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/image/raw"
)

// ErrLocation is the kind of error for a location that makes no sense.
var ErrLocation = errors.New("invalid image location")

// The formats that a PATH may have.
const (
	Raw   = "raw"
	QCOW2 = "qcow2"
)

// Magic is how a raw image begins that holds a store from its first byte on.
// The rest of the header isn't looked at. It belongs to package blobdir, which
// this one can't import.
const Magic = "\x30\x5d\x30\x55\x06\x22\x2a\x86\x48\x86\xf7\x14\x01\xbe\x40\x93\x7a\x83\xfa\x31" +
	"\x81\xc9\x7d\xc3\x32\x81\x8a\x7d\x82\xc8\x6f\xb0\xc0\x77\x87\x93\xe3\x44\x01\x01"

// The qcow2 header extension by which Create marks an image as ours: type
// "nvst".
const (
	extensionType = 0x6e767374
	extensionData = "nvstore\x00"
)

// Options for Open. Nil is the zero value: for reading and writing, and of a
// PATH only what is marked as ours.
type Options struct {
	// Format is Raw or QCOW2; "" lets only files of ours open. Only a
	// PATH has one.
	Format string

	ReadOnly bool
}

// Open opens what a location names. Raw files take QEMU's locks, and fail with
// image.ErrLocked. A PATH that isn't marked as ours and comes without a format
// fails with image.ErrFormat, what isn't built with image.ErrUnsupported, and
// what makes no sense with ErrLocation.
func Open(location string, o *Options) (image.Device, error) {
	if o == nil {
		o = &Options{}
	}
	n, err := parse(location)
	if err != nil {
		return nil, err
	}
	if n.driver != "" {
		if o.Format != "" {
			return nil, badLocation(location, "format", o.Format, "none: the location says it")
		}
		return n.open(o.ReadOnly)
	}
	switch o.Format {
	case Raw:
		d, err := raw.Open(n.path, &raw.Options{ReadOnly: o.ReadOnly})
		if err != nil {
			return nil, err // not d: a nil pointer in an interface isn't nil
		}
		return d, nil
	case QCOW2:
		return openQCOW2(n.path, o.ReadOnly)
	case "":
		return openOurs(n.path, o.ReadOnly)
	}
	return nil, unknownFormat(n.path, o.Format)
}

func unknownFormat(path, format string) error {
	return &image.FormatError{Path: path, Off: -1, Struct: "image", Field: "format", Got: format,
		Want: "raw or qcow2", Kind: image.ErrUnsupported}
}

// openOurs detects under the lock, so that what was detected is what is used.
func openOurs(path string, readOnly bool) (image.Device, error) {
	file, err := raw.Open(path, &raw.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	format, err := detect(file, path)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	if format == Raw {
		return file, nil
	}
	return stackQCOW2(file, path, readOnly)
}

func openQCOW2(path string, readOnly bool) (image.Device, error) {
	file, err := raw.Open(path, &raw.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	return stackQCOW2(file, path, readOnly)
}

// stackQCOW2 takes file over.
func stackQCOW2(file image.Device, path string, readOnly bool) (image.Device, error) {
	im, err := qcow2.Open(file, &qcow2.OpenOptions{ReadOnly: readOnly, Path: path})
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return im, nil
}

// Detect returns the format of a file that is marked as ours, and
// image.ErrFormat for any other. It takes no lock: what it says may change.
func Detect(path string) (format string, err error) {
	file, err := raw.Open(path, &raw.Options{ReadOnly: true, NoLock: true})
	if err != nil {
		return "", err
	}
	format, err = detect(file, path)
	if err = errors.Join(err, file.Close()); err != nil {
		return "", err
	}
	return format, nil
}

func detect(file image.Device, path string) (string, error) {
	p := make([]byte, len(Magic))
	if n, err := file.ReadAt(p, 0); err != nil && err != io.EOF {
		return "", err
	} else if p = p[:n]; string(p) == Magic {
		return Raw, nil
	}
	if strings.HasPrefix(string(p), "QFI\xfb") {
		if info, err := qcow2.Inspect(file, path); err == nil && marked(info) {
			return QCOW2, nil
		}
	}
	return "", &image.FormatError{Path: path, Off: -1, Struct: "image", Field: "format",
		Want: "to be told (-f raw or -f qcow2): the file wasn't made by nvstore, and a guest can write any header it likes into a raw disk",
		Kind: image.ErrFormat}
}

func marked(info *qcow2.Info) bool {
	for _, x := range info.Extensions {
		if x.Type == extensionType && string(x.Data) == extensionData {
			return true
		}
	}
	return false
}

// Machines lists the machines of a Pebble folder, as UUIDs.
func Machines(dir string) ([]string, error) {
	f, err := pebbledev.OpenFolder(dir, &pebbledev.Options{ReadOnly: true})
	if errors.Is(err, image.ErrLocked) {
		// This process may have it open for writing.
		f, err = pebbledev.OpenFolder(dir, nil)
	}
	if err != nil {
		return nil, err
	}
	list, err := machines(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	return list, nil
}

func machines(f *pebbledev.Folder) ([]string, error) {
	ids, err := f.Machines()
	if err != nil {
		return nil, err
	}
	list := make([]string, len(ids))
	for i, id := range ids {
		list[i] = id.String()
	}
	return list, nil
}

func openPebble(dir, machine string, readOnly bool) (image.Device, error) {
	f, err := pebbledev.OpenFolder(dir, &pebbledev.Options{ReadOnly: readOnly})
	if err != nil {
		return nil, err
	}
	d, err := openMachine(f, dir, machine)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// The device holds on to what it needs of the folder.
	if err := f.Close(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func openMachine(f *pebbledev.Folder, dir, machine string) (image.Device, error) {
	if machine == "" {
		var err error
		if machine, err = onlyMachine(f, dir); err != nil {
			return nil, err
		}
	}
	id, err := pebbledev.ParseUUID(machine)
	if err != nil {
		return nil, badLocation("pebble:"+dir, "machine", machine, "a UUID")
	}
	d, err := f.Open(id)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", dir, err)
	}
	return d, nil
}

// maxListed bounds an error message.
const maxListed = 16

func onlyMachine(f *pebbledev.Folder, dir string) (string, error) {
	list, err := machines(f)
	switch {
	case err != nil:
		return "", err
	case len(list) == 0:
		return "", fmt.Errorf("%s: no machine in this folder: %w", dir, image.ErrNotFound)
	case len(list) == 1:
		return list[0], nil
	}
	want := "one of " + strings.Join(list[:min(len(list), maxListed)], ", ")
	if len(list) > maxListed {
		want += fmt.Sprintf(" and %d more", len(list)-maxListed)
	}
	return "", badLocation("pebble:"+dir, "machine", nil, want)
}

func badLocation(location, field string, got any, want string) error {
	return &image.FormatError{Path: location, Off: -1, Struct: "location", Field: field, Got: got, Want: want, Kind: ErrLocation}
}
