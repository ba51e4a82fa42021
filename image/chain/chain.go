package chain

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"nvstore.dev/image"
	"nvstore.dev/image/luks"
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
	LUKS  = "luks"
)

// Magic is how a raw image begins that holds a store from its first byte on.
// The rest of the header isn't looked at. It belongs to package blobdir, which
// this one can't import.
const Magic = "\x30\x5d\x30\x55\x06\x22\x2a\x86\x48\x86\xf7\x14\x01\xbe\x40\x93\x7a\x83\xfa\x31" +
	"\x81\xc9\x7d\xc3\x32\x81\x8a\x7d\x82\xc8\x6f\xb0\xc0\x77\x87\x93\xe3\x44\x01\x01"

// The qcow2 header extension by which an image is marked as ours: type "nvst".
const extensionType = 0x6e767374

// A Mark is what such an extension says (FORMAT.md, section 4).
type Mark string

const (
	Unmarked Mark = ""
	// MarkStore is of an image that holds a store from its first byte on.
	MarkStore Mark = "nvstore\x00"
	// MarkMachine is of a machine's disk, with a layout record (package
	// machine) at its end.
	MarkMachine Mark = "machine\x00"
	// MarkAdopting is of an image that is being made a machine's disk. The
	// size in bytes that it had follows, in 8 bytes, big-endian.
	MarkAdopting Mark = "adopting"
)

// MarkOf returns the mark of the topmost qcow2 image that dev is or wraps.
func MarkOf(dev image.Device) Mark {
	im, ok := image.As[*qcow2.Image](dev)
	if !ok {
		return Unmarked
	}
	info, err := im.Info()
	if err != nil {
		return Unmarked
	}
	return markOf(info)
}

// SetMark marks the topmost qcow2 image that dev is or wraps, durably; a crash
// leaves the old mark or the new one.
func SetMark(dev image.Device, m Mark) error {
	im, ok := image.As[*qcow2.Image](dev)
	if !ok {
		return fmt.Errorf("a mark in what isn't a qcow2 image: %w", image.ErrUnsupported)
	}
	if m == Unmarked {
		return im.SetExtension(extensionType, nil)
	}
	return im.SetExtension(extensionType, []byte(m))
}

func markOf(info *qcow2.Info) Mark {
	for _, x := range info.Extensions {
		m := Mark(x.Data)
		if x.Type == extensionType && (m == MarkStore || m == MarkMachine || len(m) == 16 && m[:8] == MarkAdopting) {
			return m
		}
	}
	return Unmarked
}

// Options for Open. Nil is the zero value: for reading and writing, and of a
// PATH only what is marked as ours.
type Options struct {
	// Format is Raw, QCOW2 or LUKS; "" lets only files of ours open. Only
	// a PATH has one.
	Format string

	ReadOnly bool

	// AllowExternal lets the files be opened that a qcow2 image names: its
	// backing file, with the backing file's own, and its data file. Whoever
	// wrote the image chose the names. Without it, such an image fails with
	// ErrExternal.
	AllowExternal bool

	// BackingFormat is the format of backing files of which the image that
	// names them doesn't say it; "" refuses them. Formats are never guessed.
	BackingFormat string

	// NoBacking opens a qcow2 image without its backing file. What only
	// that one has can't be read then.
	NoBacking bool

	// Backing stands for the backing file of the topmost qcow2 image, which
	// is neither looked at nor opened then, and is closed with it.
	Backing image.Device

	// Snapshot opens the topmost qcow2 image as it was at this snapshot, an
	// ID or a name, for reading.
	Snapshot string

	// NoLock takes no locks and heeds none, as qemu-img's -U. It is for
	// reading; what is read may change meanwhile.
	NoLock bool

	// Secret returns the passphrase of an encrypted layer, which Open wipes
	// after use. The name is the layer's key-secret, and "" if the location
	// gives it none; that of a backing file which an image names is
	// "backing", of the one below it "backing.backing". Nil is for stacks without such a layer: one fails with
	// ErrSecret.
	Secret func(name string) ([]byte, error)

	// LegacyAES is called with the name of each file that is a qcow2 image
	// of the legacy encryption; if it returns nil, that is opened, for
	// reading alone. Nothing tells whether its secret is right. Nil refuses.
	LegacyAES func(file string) error

	// Budget is what may be spent on deriving an encrypted layer's key;
	// nil means the default.
	Budget *luks.Budget

	above []fs.FileInfo // the files whose backing file this is to be
}

// Open opens what a location names. Raw files take QEMU's locks, and fail with
// image.ErrLocked. A PATH that isn't marked as ours and comes without a format
// fails with image.ErrFormat, what isn't built with image.ErrUnsupported, and
// what makes no sense with ErrLocation.
func Open(location string, o *Options) (image.Device, error) {
	if o == nil {
		o = &Options{}
	}
	if o.NoLock && !o.ReadOnly {
		return nil, badLocation(location, "lock", nil, "one, for writing")
	}
	n, err := parse(location)
	if err != nil {
		return nil, err
	}
	if n.driver != "" {
		if o.Format != "" {
			return nil, badLocation(location, "format", o.Format, "none: the location says it")
		}
		return n.open(o)
	}
	switch o.Format {
	case LUKS, QCOW2:
		return (&node{driver: o.Format, child: &node{driver: "file", path: n.path}, path: n.path}).open(o)
	case Raw:
		d, err := raw.Open(n.path, o.raw())
		if err != nil {
			return nil, err // not d: a nil pointer in an interface isn't nil
		}
		return d, nil
	case "":
		return openOurs(n.path, o)
	}
	return nil, unknownFormat(n.path, o.Format)
}

// raw is how files are opened.
func (o *Options) raw() *raw.Options {
	return &raw.Options{ReadOnly: o.ReadOnly, NoLock: o.NoLock && o.ReadOnly}
}

func unknownFormat(path, format string) error {
	return &image.FormatError{Path: path, Off: -1, Struct: "image", Field: "format", Got: format,
		Want: "raw, qcow2 or luks", Kind: image.ErrUnsupported}
}

// openOurs detects under the lock, so that what was detected is what is used.
func openOurs(path string, o *Options) (image.Device, error) {
	file, err := raw.Open(path, o.raw())
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
	n := &node{driver: QCOW2, child: &node{driver: "file", path: path}, path: path}
	return n.stackQCOW2(file, o)
}

// stackQCOW2 takes file over.
func (n *node) stackQCOW2(file image.Device, o *Options) (image.Device, error) {
	unlock, err := n.unlock(file, o)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	ext, err := n.openExternal(file, o)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	im, err := qcow2.Open(file, &qcow2.OpenOptions{ReadOnly: o.ReadOnly, Path: n.child.path,
		Backing: ext.backing, NoBacking: o.NoBacking, DataFile: ext.data, Unlock: unlock, Snapshot: o.Snapshot})
	if err != nil {
		if o.Backing != nil {
			ext.backing = nil // stays the caller's
		}
		return nil, errors.Join(err, file.Close(), ext.close())
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
		if info, err := qcow2.Inspect(file, path); err == nil && markOf(info) != Unmarked {
			return QCOW2, nil
		}
	}
	return "", &image.FormatError{Path: path, Off: -1, Struct: "image", Field: "format",
		Want: "to be told (-f raw or -f qcow2): the file wasn't made by nvstore, and a guest can write any header it likes into a raw disk",
		Kind: image.ErrFormat}
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
