package chain

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"nvstore.dev/image"
	"nvstore.dev/image/pebbledev"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/image/raw"
)

const defaultSize = 64 << 20

// CreateOptions for Create. Nil is the zero value: a qcow2 of 64 MiB.
type CreateOptions struct {
	// Format is Raw or QCOW2, and "" is QCOW2. Only a PATH has one.
	Format string

	// Size in bytes; 0 is 64 MiB. No space is allocated for it.
	Size int64

	// ClusterSize is a QCOW2's, in bytes; 0 is 64 KiB.
	ClusterSize int
}

// A Pending image is being filled. Nobody finds it under its name before
// Commit; a program that is killed before leaves a file ".nvstore-….new".
type Pending struct {
	// Device is for use at once, under the locks that Open takes, and
	// stays open after Commit.
	Device image.Device

	// Location opens the image again, once committed. It has the UUID
	// that Create chose for a machine in a Pebble folder.
	Location string

	temp, path string // of a file
	renamed    bool
	info       fs.FileInfo // the file, to recognise it

	dir     string // of a Pebble folder
	machine pebbledev.UUID
	done    bool
}

// Create makes an empty image at a PATH or in a Pebble folder, which is made
// if it is missing. What is there already is never touched, and then the error
// is fs.ErrExist or image.ErrExist. A machine in a Pebble folder can be seen
// before Commit; until its store is whole, opening that says so.
func Create(location string, o *CreateOptions) (*Pending, error) {
	c := CreateOptions{Format: QCOW2, Size: defaultSize}
	if o != nil {
		c.ClusterSize = o.ClusterSize
		if o.Format != "" {
			c.Format = o.Format
		}
		if o.Size != 0 {
			c.Size = o.Size
		}
	}
	n, err := parse(location)
	switch {
	case err != nil:
		return nil, err
	case n.driver == "pebble":
		if o != nil && o.Format != "" {
			return nil, badLocation(location, "format", o.Format, "none: it is a Pebble folder")
		}
		return createPebble(n, c.Size)
	case n.driver != "":
		return nil, badLocation(location, "driver", n.driver, "a path or a Pebble folder: stacks are made of images that exist")
	case c.Format != Raw && c.Format != QCOW2:
		return nil, unknownFormat(n.path, c.Format)
	}
	return createFile(n.path, &c)
}

func createFile(path string, c *CreateOptions) (_ *Pending, err error) {
	// Commit refuses it too; this is so that nobody works in vain.
	if _, err := os.Lstat(path); err == nil {
		return nil, &fs.PathError{Op: "create", Path: path, Err: syscall.EEXIST}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	size := c.Size
	if c.Format == QCOW2 {
		size = 0 // the driver grows the file
	}
	p := &Pending{path: path, Location: path}
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	p.temp = filepath.Join(filepath.Dir(path), ".nvstore-"+hex.EncodeToString(id[:])+".new")
	file, err := raw.Create(p.temp, size, nil)
	if err != nil {
		return nil, fmt.Errorf("create %s: %w", path, err)
	}
	p.Device = file
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Abort())
		}
	}()
	if p.info, err = os.Lstat(p.temp); err != nil {
		return nil, err
	}
	if c.Format == QCOW2 {
		im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: c.Size, ClusterSize: c.ClusterSize, Path: path,
			Extensions: []qcow2.Extension{{Type: extensionType, Data: []byte(extensionData)}}})
		if err != nil {
			return nil, err
		}
		p.Device = im
	}
	return p, nil
}

func createPebble(n *node, size int64) (*Pending, error) {
	p := &Pending{dir: n.dir}
	if n.machine == "" {
		_, _ = rand.Read(p.machine[:]) // never fails
		p.machine[6] = p.machine[6]&0x0f | 0x40
		p.machine[8] = p.machine[8]&0x3f | 0x80 // RFC 9562, version 4
	} else if id, err := pebbledev.ParseUUID(n.machine); err != nil {
		return nil, badLocation(n.dir, "machine", n.machine, "a UUID")
	} else {
		p.machine = id
	}
	p.Location = "pebble:" + n.dir + "/" + p.machine.String()
	f, err := pebbledev.OpenFolder(n.dir, &pebbledev.Options{Create: true})
	if err != nil {
		return nil, err
	}
	d, err := f.Create(p.machine, size)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", n.dir, err), f.Close())
	}
	// The device holds on to what it needs of the folder.
	if err := f.Close(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	p.Device = d
	return p, nil
}

// Commit gives the file its name, durably, if that is still free. The device
// should have been synced.
func (p *Pending) Commit() error {
	if p.done {
		return image.ErrClosed
	}
	if p.temp != "" {
		if err := rename(p.temp, p.path); err != nil {
			return &fs.PathError{Op: "create", Path: p.path, Err: err}
		}
		p.renamed = true
		if err := syncDir(filepath.Dir(p.path)); err != nil {
			return err
		}
	}
	p.done = true
	return nil
}

// Abort closes the device, if it is still open, and removes the image. After
// a Commit that succeeded it does nothing.
func (p *Pending) Abort() error {
	if p.done {
		return nil
	}
	p.done = true
	err := p.Device.Close()
	if errors.Is(err, image.ErrClosed) {
		err = nil
	}
	if p.temp == "" {
		return errors.Join(err, p.forget())
	}
	name := p.temp
	if p.renamed {
		// Our name by now, unless somebody gave it to another file.
		if now, e := os.Lstat(p.path); e == nil && os.SameFile(now, p.info) {
			name = p.path
		}
	}
	if e := os.Remove(name); !errors.Is(e, fs.ErrNotExist) {
		err = errors.Join(err, e)
	}
	return err
}

// forget deletes the machine again.
func (p *Pending) forget() error {
	f, err := pebbledev.OpenFolder(p.dir, nil)
	if err != nil {
		return err
	}
	return errors.Join(f.Delete(p.machine), f.Close())
}

// linkOver is rename for file systems that can't: the new name is a link.
func linkOver(from, to string) error {
	if err := os.Link(from, to); err != nil {
		return cause(err)
	}
	if err := os.Remove(from); err != nil {
		return cause(errors.Join(err, os.Remove(to)))
	}
	return nil
}

// cause strips the names off an error: the caller knows better ones.
func cause(err error) error {
	var le *os.LinkError
	var pe *fs.PathError
	switch {
	case errors.As(err, &le):
		return le.Err
	case errors.As(err, &pe):
		return pe.Err
	}
	return err
}

// syncDir makes a new name durable. Tests replace it.
var syncDir = func(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = f.Sync()
	f.Close()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, syscall.ENOTSUP) {
		return nil // no such thing on this file system
	}
	return err
}
