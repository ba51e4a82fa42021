package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image/chain"
	"nvstore.dev/machine/live"
)

type vmAddDisk struct {
	*app
	q        qmpFlags
	ref      imageRef
	name     string
	device   string
	readOnly bool
}

func (a *app) vmAddDiskCmd() *cobra.Command {
	o := &vmAddDisk{app: a}
	c := a.verb("add-disk IMAGE --qmp SOCKET -f FORMAT --name NAME [--device MODEL[,PROPERTY=VALUE...]]", "Give a machine that runs one more disk, encrypted or not", o.run)
	c.Long = `Give a machine that runs one more disk: a raw or qcow2 image, or with a secret a
LUKS image or a qcow2 encrypted with LUKS. QEMU gets a secret object, block nodes
and, with --device, a device. If any step fails, what was added is taken back. The
secret is tried here first, so that QEMU, which would stand still meanwhile, isn't
given a header that takes hours.`
	o.q.flags(c, false)
	f := c.Flags()
	f.StringVarP(&o.ref.format, "format", "f", "", "the image's `FORMAT`: raw, qcow2 or luks")
	f.StringVar(&o.name, "name", "", "the block node's `NAME`, and the device's")
	f.StringVar(&o.device, "device", "", "the `MODEL` of a device for it, with properties if wanted, as virtio-blk-pci,serial=x")
	f.BoolVarP(&o.readOnly, "read-only", "r", false, "let the machine only read")
	o.ref.secrets = new(secretFlags)
	o.ref.secrets.flags(c)
	return c
}

func (o *vmAddDisk) run(ctx context.Context, args []string) (err error) {
	if _, err := o.ref.take(args, 0, 0, ""); err != nil {
		return err
	}
	switch {
	case o.q.address == "" || o.name == "" || o.ref.format == "":
		return usagef("--qmp SOCKET, -f FORMAT and --name NAME are needed")
	case len(o.ref.secrets.files)+len(o.ref.secrets.keyFiles)+len(o.ref.secrets.fds) > 1:
		return usagef("an image has one secret")
	}
	d := &live.Disk{Image: o.ref.location, Format: o.ref.format, Node: o.name, ReadOnly: o.readOnly}
	if o.device != "" {
		if d.Device, err = parseDevice(o.device); err != nil {
			return err
		}
	}
	if d.Secret, err = o.unlock(ctx); err != nil {
		return err
	}
	defer clear(d.Secret)
	m, err := o.q.connect(ctx, "")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	if err := m.AddDisk(ctx, d); err != nil {
		return explainLive(err)
	}
	if o.json {
		return o.printJSON(struct {
			Node      string `json:"node"`
			Device    string `json:"device,omitempty"`
			Encrypted bool   `json:"encrypted"`
		}{o.name, fmt.Sprint(orEmpty(d.Device["driver"])), d.Secret != nil})
	}
	o.sayf("added %s as %s", printable(o.ref.location), printable(o.name))
	return nil
}

func orEmpty(v any) any {
	if v == nil {
		return ""
	}
	return v
}

// unlock opens the image here, for a moment, and returns the passphrase.
func (o *vmAddDisk) unlock(ctx context.Context) (passphrase []byte, err error) {
	if err := o.ref.secrets.load(ctx, o.app, &o.ref); err != nil {
		return nil, err
	}
	defer o.ref.secrets.wipe()
	dev, err := chain.Open(o.ref.location, &chain.Options{Format: o.ref.format, ReadOnly: true, AllowExternal: true,
		Secret: func(name string) ([]byte, error) {
			p, err := o.ref.secrets.get(name)
			passphrase = append([]byte(nil), p...)
			return p, err
		}})
	if err == nil {
		err = errors.Join(o.ref.secrets.unused(), dev.Close())
	}
	return passphrase, o.explain(&o.ref, err)
}

// parseDevice reads a -device argument: MODEL,PROPERTY=VALUE,... Values are
// numbers and switches where they look like it, as QEMU has them.
func parseDevice(text string) (map[string]any, error) {
	if strings.HasPrefix(text, "{") {
		var d map[string]any
		if err := json.Unmarshal([]byte(text), &d); err != nil || d["driver"] == nil {
			return nil, usagef("--device: JSON of an object with a driver")
		}
		return d, nil
	}
	model, rest, _ := strings.Cut(text, ",")
	d := map[string]any{"driver": model}
	for rest != "" {
		var pair string
		pair, rest, _ = strings.Cut(rest, ",")
		key, value, err := splitPair(pair)
		if err != nil {
			return nil, err
		}
		switch n, err := strconv.ParseInt(value, 0, 64); {
		case err == nil && key != "serial" && key != "bus" && key != "addr" && key != "id":
			d[key] = n
		case value == "on" || value == "off":
			d[key] = value == "on"
		default:
			d[key] = value
		}
	}
	return d, nil
}
