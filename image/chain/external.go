package chain

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

// ErrExternal: an image names other files, and the caller hasn't allowed it to
// have them opened.
var ErrExternal = errors.New("files that an image names are opened only if that is allowed")

// maxBacking bounds how many backing files lie below each other.
const maxBacking = 200

// external is what a qcow2 image names.
type external struct{ backing, data image.Device }

func (x external) close() (err error) {
	for _, d := range []image.Device{x.backing, x.data} {
		if d != nil {
			err = errors.Join(err, d.Close())
		}
	}
	return err
}

// openExternal opens what the qcow2 image in file names. A backing file is
// opened for reading, with locks as QEMU's: others may read it too, and nobody
// may write it. Names are paths, and nothing else: neither QEMU's protocols
// ("nbd:", "json:") nor a location of ours. Relative ones count from the
// folder of the image, also those of data files.
func (n *node) openExternal(file image.Device, o *Options) (x external, err error) {
	info, err := qcow2.Inspect(file, n.child.path)
	if err != nil {
		return external{}, err
	}
	defer func() {
		if err != nil {
			if o.Backing != nil {
				x.backing = nil // stays the caller's
			}
			x, err = external{}, errors.Join(err, x.close())
		}
	}()
	if info.DataFile == "" && n.data != nil {
		return x, n.badExternal("data_file", "", "one, in the place of which another is given", ErrLocation)
	}
	if info.BackingFile == "" && (o.Backing != nil || n.backing != nil) {
		return x, n.badExternal("backing_file", "", "one, in the place of which another is given", ErrLocation)
	}
	if info.DataFile != "" {
		if x.data, err = n.openData(info, o); err != nil {
			return x, err
		}
	}
	if o.Backing != nil {
		x.backing = o.Backing
	} else if info.BackingFile != "" && !o.NoBacking {
		x.backing, err = n.openBacking(info, o)
	}
	return x, err
}

// openData opens the data file that the location gives, or else the one that
// the image names.
func (n *node) openData(info *qcow2.Info, o *Options) (image.Device, error) {
	m := n.data
	if m == nil {
		path, err := n.resolve("data_file", info.DataFile, o)
		if err != nil {
			return nil, err
		}
		m = &node{driver: "file", path: path, size: -1}
	}
	below := Options{ReadOnly: o.ReadOnly, NoLock: o.NoLock, Secret: o.Secret, Budget: o.Budget}
	d, err := m.open(&below)
	if err != nil {
		return nil, fmt.Errorf("data file of %s: %w", n.child.path, err)
	}
	return d, nil
}

// takeNamed reads the keys "backing." and "data-file." of a qcow2 driver, and
// returns the others. What lies below is written in the location like any other
// node, so nothing has to be allowed. The format of a backing file isn't
// guessed.
func (n *node) takeNamed(location, prefix string, own map[string]string, depth int) (rest map[string]string, err error) {
	rest, back := splitChild(own, "backing.")
	if len(back) > 0 {
		if back["driver"] == "" {
			return nil, badLocation(location, prefix+"backing.driver", nil, "a driver, as formats are never guessed")
		}
		if n.backing, err = parseNode(location, prefix+"backing.", back, depth+1); err != nil {
			return nil, err
		}
	}
	rest, data := splitChild(rest, "data-file.")
	if len(data) > 0 {
		n.data, err = parseNode(location, prefix+"data-file.", data, depth+1)
	}
	return rest, err
}

func (n *node) badExternal(field, name, want string, kind error) error {
	return &image.FormatError{Path: n.child.path, Off: -1, Struct: "qcow2 header", Field: field, Got: name, Want: want, Kind: kind}
}

// resolve turns a name that the image gives into a path.
func (n *node) resolve(field, name string, o *Options) (string, error) {
	colon, slash := strings.IndexByte(name, ':'), strings.IndexByte(name, '/')
	switch {
	case !o.AllowExternal:
		return "", n.badExternal(field, name, "to be allowed by the caller", ErrExternal)
	case colon >= 0 && (slash < 0 || colon < slash):
		return "", n.badExternal(field, name, "a path without a protocol", image.ErrUnsupported)
	case strings.IndexByte(name, 0) >= 0:
		return "", n.badExternal(field, name, "a path", image.ErrUnsupported)
	case filepath.IsAbs(name):
		return name, nil
	case n.child.path == "":
		return "", n.badExternal(field, name, "an absolute path, as the image isn't a file in a folder", image.ErrUnsupported)
	}
	return filepath.Join(filepath.Dir(n.child.path), name), nil
}

// openBacking opens the backing file that the location gives, or else the one
// that the image names.
func (n *node) openBacking(info *qcow2.Info, o *Options) (image.Device, error) {
	if n.backing != nil {
		below := *o
		below.ReadOnly, below.Format, below.Snapshot = true, "", ""
		var err error
		if below.above, err = n.above(o); err != nil {
			return nil, err
		}
		d, err := n.backing.open(&below)
		if err != nil {
			return nil, fmt.Errorf("backing file of %s: %w", n.child.path, err)
		}
		return d, nil
	}
	path, err := n.resolve("backing_file", info.BackingFile, o)
	if err != nil {
		return nil, err
	}
	format := info.BackingFormat
	if format == "" {
		format = o.BackingFormat
	}
	switch format {
	case Raw, QCOW2, LUKS:
	case "":
		return nil, n.badExternal("backing_file", info.BackingFile,
			"its format in the image, or to be told it: a guest can write any header it likes into a raw disk", image.ErrFormat)
	default:
		return nil, n.badExternal("backing_format", format, "raw, qcow2 or luks", image.ErrUnsupported)
	}
	below := *o
	below.ReadOnly, below.Format, below.Snapshot = true, "", ""
	if below.above, err = n.above(o); err != nil {
		return nil, err
	}
	if len(below.above) > maxBacking {
		return nil, n.badExternal("backing_file", info.BackingFile, fmt.Sprintf("at most %d backing files", maxBacking), image.ErrUnsupported)
	}
	at, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("backing file of %s: %w", n.child.path, err)
	}
	for _, a := range below.above {
		if os.SameFile(a, at) {
			return nil, n.badExternal("backing_file", info.BackingFile, "no image that is above it already: a loop", image.ErrCorrupt)
		}
	}
	m := &node{driver: "file", path: path, size: -1}
	if format != Raw {
		secret := strings.TrimSuffix(strings.Repeat("backing.", max(1, len(below.above))), ".")
		m = &node{driver: format, child: m, path: path, size: -1, secret: secret}
	}
	d, err := m.open(&below)
	if err != nil {
		return nil, fmt.Errorf("backing file of %s: %w", n.child.path, err)
	}
	return d, nil
}

// above is the chain down to this image, with it.
func (n *node) above(o *Options) ([]os.FileInfo, error) {
	if n.child.path == "" {
		return o.above, nil
	}
	info, err := os.Stat(n.child.path)
	if err != nil {
		return nil, err
	}
	return append(o.above[:len(o.above):len(o.above)], info), nil
}
