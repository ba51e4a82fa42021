package chain

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"

	"nvstore.dev/image"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/pebbledev"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/image/raw"
)

const defaultSize = 64 << 20

// CreateOptions for Create. Nil is the zero value: a qcow2 of 64 MiB.
type CreateOptions struct {
	// Format is Raw, QCOW2 or LUKS, and "" is QCOW2. Only a PATH has one.
	Format string

	// LUKS says how a LUKS image is made, and makes a QCOW2 one that is
	// encrypted by itself. Its Size and Header don't count. A LUKS image's
	// content reads as noise where nothing was written.
	LUKS *luks.FormatOptions

	// Size in bytes; 0 is 64 MiB, unless Empty says that it is meant. No
	// space is allocated for it.
	Size  int64
	Empty bool

	// ClusterSize is a QCOW2's, in bytes; 0 is 64 KiB.
	ClusterSize int

	// QCOW2 has a QCOW2's other options. Its Size, Path and Extensions
	// don't count, and its ClusterSize if the one above isn't 0.
	QCOW2 *qcow2.CreateOptions

	// Mark is a QCOW2's; the zero value is MarkStore.
	Mark Mark

	// Replace lets Commit replace a regular file of that name, which
	// keeps its permissions, unless somebody has it open: then Create
	// fails with image.ErrLocked.
	Replace bool

	// LateSync makes a file durable in Commit only. Until then nobody
	// finds it, so the device's Sync does nothing.
	LateSync bool

	// NoSync leaves it to the system when a file gets durable. After a
	// power cut it may be there and empty.
	NoSync bool
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
	late       *lateSync   // nil if Sync is as ever
	noSync     bool
	replaced   image.Device // what Commit replaces, locked; nil if nothing

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
		format, size := c.Format, c.Size
		c = *o
		c.Format, c.Size = format, size
		if o.Format != "" {
			c.Format = o.Format
		}
		if o.Size != 0 || o.Empty {
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
	case c.Format != Raw && c.Format != QCOW2 && c.Format != LUKS:
		return nil, unknownFormat(n.path, c.Format)
	case c.Format == Raw && c.LUKS != nil || c.Format == LUKS && c.LUKS == nil:
		return nil, badLocation(location, "format", c.Format, "luks or qcow2, with options for LUKS")
	}
	return createFile(n.path, &c)
}

func createFile(path string, c *CreateOptions) (_ *Pending, err error) {
	p := &Pending{path: path, Location: path}
	mode, err := p.claim(c.Replace)
	if err != nil {
		return nil, err
	}
	size := c.Size
	if c.Format != Raw {
		size = 0 // the driver grows the file
	}
	path = p.path
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails
	p.temp = filepath.Join(filepath.Dir(path), ".nvstore-"+hex.EncodeToString(id[:])+".new")
	file, err := raw.Create(p.temp, size, &raw.Options{Mode: mode})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("create %s: %w", path, err), p.release())
	}
	p.Device = file
	if c.LateSync || c.NoSync {
		p.late, p.noSync = &lateSync{Device: file, never: c.NoSync}, c.NoSync
		p.Device = p.late
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.Abort())
		}
	}()
	if p.info, err = os.Lstat(p.temp); err != nil {
		return nil, err
	}
	switch c.Format {
	case LUKS:
		f := *c.LUKS
		f.Size, f.Header = c.Size, nil
		d, err := luks.Format(p.Device, &f)
		if err != nil {
			return nil, err
		}
		p.Device = d
	case QCOW2:
		q := qcow2.CreateOptions{}
		if c.QCOW2 != nil {
			q = *c.QCOW2
		}
		if c.ClusterSize != 0 {
			q.ClusterSize = c.ClusterSize
		}
		q.Size, q.Path = c.Size, path
		if c.LUKS != nil {
			if q.Crypt, err = encrypted(c.LUKS); err != nil {
				return nil, err
			}
		}
		mark := MarkStore
		if c.Mark != Unmarked {
			mark = c.Mark
		}
		q.Extensions = []qcow2.Extension{{Type: extensionType, Data: []byte(mark)}}
		im, err := qcow2.Create(p.Device, &q)
		if err != nil {
			return nil, err
		}
		p.Device = im
	}
	return p, nil
}

// claim sees to it that the path is free, or may be replaced; what is there is
// held then, so that nobody opens it meanwhile. mode is for the new file.
func (p *Pending) claim(replace bool) (mode fs.FileMode, err error) {
	// Commit looks too; this is so that nobody works in vain.
	info, err := os.Lstat(p.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return 0, nil
	case err != nil:
		return 0, err
	case !replace:
		return 0, &fs.PathError{Op: "create", Path: p.path, Err: syscall.EEXIST}
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		if p.path, err = filepath.EvalSymlinks(p.path); err != nil {
			return 0, err
		}
		if info, err = os.Stat(p.path); err != nil {
			return 0, err
		}
	}
	if !info.Mode().IsRegular() {
		return 0, fmt.Errorf("create %s: replacing what isn't a regular file: %w", p.path, image.ErrUnsupported)
	}
	d, err := raw.Open(p.path, nil)
	if err != nil {
		return 0, err
	}
	p.replaced = d
	return info.Mode().Perm(), nil
}

// release lets go of what was to be replaced.
func (p *Pending) release() error {
	if p.replaced == nil {
		return nil
	}
	d := p.replaced
	p.replaced = nil
	return d.Close()
}

// A lateSync has no use for Sync before somebody can find the file.
type lateSync struct {
	image.Device
	never  bool
	found  atomic.Bool
	closed atomic.Bool
}

func (l *lateSync) Unwrap() image.Device { return l.Device }

func (l *lateSync) Sync() error {
	if !l.found.Load() {
		return nil
	}
	return l.Device.Sync()
}

// Close makes good what Sync left out: the file may still be committed.
func (l *lateSync) Close() error {
	var err error
	if !l.found.Load() && !l.never {
		err = l.Device.Sync()
	}
	if err == nil {
		l.closed.Store(true)
	}
	return errors.Join(err, l.Device.Close())
}

// commit makes the content durable and Sync what it says.
func (l *lateSync) commit() error {
	l.found.Store(true)
	if l.never || l.closed.Load() {
		return nil
	}
	return l.Device.Sync()
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

// Commit gives the file its name, durably, if that is still free or was there
// to be replaced. The device should have been synced, and may be closed.
func (p *Pending) Commit() error {
	if p.done {
		return image.ErrClosed
	}
	if p.temp != "" {
		if p.late != nil {
			if err := p.late.commit(); err != nil {
				return err
			}
		}
		move := rename
		if p.replaced != nil {
			move = replace
		}
		if err := move(p.temp, p.path); err != nil {
			return &fs.PathError{Op: "create", Path: p.path, Err: err}
		}
		p.renamed = true
		if !p.noSync {
			if err := syncDir(filepath.Dir(p.path)); err != nil {
				return err
			}
		}
	}
	p.done = true
	return p.release()
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
	err = errors.Join(err, p.release())
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

// replace is rename over what is there.
func replace(from, to string) error {
	if err := os.Rename(from, to); err != nil {
		return cause(err)
	}
	return nil
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
