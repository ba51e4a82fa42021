package live

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"path/filepath"

	"nvstore.dev/image"
	"nvstore.dev/internal/qmp"
)

// A Disk is an image that a running machine gets.
type Disk struct {
	Image  string // path
	Format string // raw, qcow2 or luks
	Node   string // of the block node; the file below it is NODE-file, its secret NODE-secret

	// Secret is the passphrase of a luks image, or of a qcow2 encrypted
	// with LUKS; nil where nothing is encrypted. QEMU gets it over QMP.
	Secret []byte

	ReadOnly bool

	// Device are properties of device_add, with "driver"; nil adds the
	// node only. "drive" is set.
	Device map[string]any
}

// AddDisk gives a running machine a disk: a secret, block nodes, a device. Any
// step that fails takes back those before it, so that no node, secret or device
// is left behind.
func (m *Machine) AddDisk(ctx context.Context, d *Disk) (err error) {
	node := map[string]any{"driver": d.Format, "node-name": d.Node, "file": d.Node + "-file", "read-only": d.ReadOnly}
	secret := d.Node + "-secret"
	switch {
	case d.Format == "luks" && d.Secret != nil:
		node["key-secret"] = secret
	case d.Format == "qcow2" && d.Secret != nil:
		node["encrypt"] = map[string]any{"format": "luks", "key-secret": secret}
	case d.Format != "raw" && d.Format != "qcow2" || d.Secret != nil:
		return fmt.Errorf("a disk of format %q, with a secret: %v: %w", d.Format, d.Secret != nil, image.ErrUnsupported)
	}
	path, err := filepath.Abs(d.Image)
	if err != nil {
		return err
	}
	var u undo
	defer func() {
		if err != nil {
			err = errors.Join(err, u.run(ctx))
		}
	}()
	step := func(command string, args map[string]any, takeBack string, back map[string]string) error {
		err := m.qmp.Do(ctx, command, args, nil)
		// What QEMU refused it didn't do; of what it didn't answer,
		// nobody knows.
		refused := errors.Is(err, qmp.ErrRefused)
		if !refused {
			unknown := err != nil
			u.add(func(ctx context.Context) error {
				err := m.qmp.Do(ctx, takeBack, back, nil)
				if unknown && errors.Is(err, qmp.ErrRefused) {
					return nil // there is nothing
				}
				return err
			})
		}
		return err
	}
	if d.Secret != nil {
		object := map[string]any{"qom-type": "secret", "id": secret, "data": base64.StdEncoding.EncodeToString(d.Secret), "format": "base64"}
		if err := step("object-add", object, "object-del", map[string]string{"id": secret}); err != nil {
			return err
		}
	}
	file := map[string]any{"driver": "file", "node-name": d.Node + "-file", "filename": path, "read-only": d.ReadOnly}
	if err := step("blockdev-add", file, "blockdev-del", map[string]string{"node-name": d.Node + "-file"}); err != nil {
		return err
	}
	if err := step("blockdev-add", node, "blockdev-del", map[string]string{"node-name": d.Node}); err != nil {
		return err
	}
	if d.Device == nil {
		return nil
	}
	device := maps.Clone(d.Device)
	device["drive"] = d.Node
	if device["id"] == nil {
		device["id"] = d.Node
	}
	return step("device_add", device, "device_del", map[string]string{"id": fmt.Sprint(device["id"])})
}
