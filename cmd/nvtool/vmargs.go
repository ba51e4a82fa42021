package main

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/machine"
)

type vmArgsOptions struct {
	ref       diskRef
	qemu      string
	device    string
	qmp       []string
	tpm       string
	tpmDevice string
	libvirt   bool
	live      liveOptions
}

func (a *app) vmArgsCmd() *cobra.Command {
	var o vmArgsOptions
	c := a.verb("args DISK [--qemu BINARY] [--qmp SOCKET]... [--tpm SOCKET] [-- OPTION...]", "Print the QEMU command line that opens a machine's disk",
		func(ctx context.Context, args []string) error { return a.vmArgs(ctx, &o, args) })
	c.Long = `Print the QEMU command line that opens a machine's disk: the image once, and as
windows of it the guest's disk, the state, which is on no device, and each live
extent, with the device that its name stands for (nvtool live args --help). What
is given behind "--" is added. The line is ready for a shell:

  eval "$(nvtool vm args vm.qcow2 -- -m 2G -display none)"

As long as the machine runs, reach the store through the QMP socket, with nvtool
vm attach. Snapshots are taken and loaded over QMP, too, of the node nvstore-disk:
the human monitor's savevm takes one for each window, and its loadvm, as -loadvm,
leaves the windows hanging (QEMU 7.2). A monitor serves one client: give --qmp
once for each that there is to be at the same time, as nvtpm --live is one.

An image that is encrypted, or a qcow2 in a LUKS container (--image-opts), is
opened with the file that --secret-file names. QEMU counts each of its bytes, a
newline at the end as well.

With --tpm the machine has the TPM that nvtpm --ctrl type=unixio,path=SOCKET is.
With --libvirt the options are printed as elements for a domain's XML: libvirt has
none of its own for a window of a qcow2. It has a monitor of its own, so that only
those are there which --qmp names.`
	o.ref.flags(c)
	o.ref.shareFlag(c)
	o.live.flags(c)
	f := c.Flags()
	f.StringVar(&o.qemu, "qemu", "qemu-system-x86_64", "the `BINARY`")
	f.StringVar(&o.device, "device", "virtio-blk-pci", "the guest's disk's `MODEL`, with properties if wanted")
	f.StringArrayVar(&o.qmp, "qmp", nil, "`SOCKET` for QMP, one for each client (default: the image's path with .qmp)")
	f.StringVar(&o.tpm, "tpm", "", "`SOCKET` of nvtpm's control channel")
	f.StringVar(&o.tpmDevice, "tpm-device", "tpm-tis", "the TPM's `MODEL`, with properties if wanted")
	f.BoolVar(&o.libvirt, "libvirt", false, "print XML for a libvirt domain")
	return c
}

func (a *app) vmArgs(ctx context.Context, o *vmArgsOptions, args []string) error {
	more, err := o.ref.take(args, 0, -1, "QEMU's options")
	if err != nil {
		return err
	}
	for i, path := range o.qmp {
		if o.qmp[i], err = o.path(path); err != nil {
			return err
		}
		path = o.qmp[i]
		if slices.Contains(o.qmp[:i], path) {
			return usagef("--qmp %s: each monitor has a socket of its own", printable(path))
		}
	}
	if err := o.ref.secrets.load(ctx, a, &o.ref.imageRef); err != nil {
		return err
	}
	defer o.ref.secrets.wipe()
	r, err := a.runOf(o)
	if err != nil {
		return err
	}
	r.Args = append(r.Args, more...)
	a.warnWindows(o.ref.location, r.Live)
	switch {
	case a.json:
		return a.printJSON(r)
	case o.libvirt:
		return a.printLibvirt(r.Args)
	}
	return a.printCommand(o.qemu, r.Args)
}

// A vmRun is how a machine's disk is run.
type vmRun struct {
	QEMU     string             `json:"qemu"`
	Args     []string           `json:"args"`
	Blockdev []machine.Blockdev `json:"blockdev"`
	Device   string             `json:"device"`
	Live     []liveWindow       `json:"live"`     // windows of the state that devices have open
	QMP      string             `json:"qmp"`      // the first of
	Monitors []string           `json:"monitors"` // all QMP sockets

	// Attach are the QMP commands that export the state window.
	Attach []qmpCommand `json:"attach"`
}

type qmpCommand struct {
	Execute   string         `json:"execute"`
	Arguments map[string]any `json:"arguments"`
}

func (a *app) runOf(o *vmArgsOptions) (r *vmRun, err error) {
	d, err := a.openDisk(&o.ref, true)
	if err != nil {
		return nil, err
	}
	defer closeAll(&err, d.Device())
	f, secret, err := o.file(formatOf(d.Device()))
	if err != nil {
		return nil, err
	}
	path, l := f.Path, d.Layout()
	if len(o.qmp) == 0 && !o.libvirt {
		o.qmp = []string{path + ".qmp"}
	}
	r = &vmRun{QEMU: o.qemu, Blockdev: l.Nodes(f), Monitors: append([]string{}, o.qmp...), Args: secret,
		Device: o.device + ",id=guest-disk,drive=" + machine.GuestNode + ",share-rw=on"}
	for i := range r.Blockdev {
		r.Args = append(r.Args, "-blockdev", r.Blockdev[i].String())
	}
	r.Args = append(r.Args, "-device", r.Device)
	if r.Live, err = a.liveIn(d, &o.live); err != nil {
		return nil, a.explain(&o.ref.imageRef, err)
	}
	for i := range r.Live {
		r.Args = append(r.Args, r.Live[i].Options...)
	}
	channels, err := o.channels()
	if err != nil {
		return nil, err
	}
	r.Args = append(r.Args, channels...)
	if len(o.qmp) > 0 {
		r.QMP = o.qmp[0]
	}
	nbd := filepath.Join(filepath.Dir(path), filepath.Base(path)+".nbd")
	r.Attach = []qmpCommand{
		{"nbd-server-start", map[string]any{"addr": map[string]any{"type": "unix", "data": map[string]any{"path": nbd}}, "max-connections": 1}},
		{"block-export-add", map[string]any{"type": "nbd", "id": machine.StateNode, "node-name": machine.StateNode,
			"name": machine.StateNode, "writable": true}},
	}
	return r, nil
}

// channels are the options for the monitors, and for the TPM.
func (o *vmArgsOptions) channels() (args []string, err error) {
	for i, path := range o.qmp {
		id := "nvstore-qmp"
		if i > 0 {
			id = fmt.Sprintf("%s-%d", id, i+1)
		}
		args = append(args, "-chardev", "socket,id="+id+",path="+strings.ReplaceAll(path, ",", ",,")+",server=on,wait=off",
			"-mon", "chardev="+id+",mode=control")
	}
	if o.tpm != "" {
		path, err := o.path(o.tpm)
		if err != nil {
			return nil, err
		}
		args = append(args, "-chardev", "socket,id=nvstore-tpm,path="+strings.ReplaceAll(path, ",", ",,"),
			"-tpmdev", "emulator,id=nvstore-tpm,chardev=nvstore-tpm", "-device", o.tpmDevice+",tpmdev=nvstore-tpm")
	}
	return args, nil
}

// printCommand prints a command for a shell, an option a line.
func (a *app) printCommand(qemu string, args []string) error {
	var b strings.Builder
	b.WriteString(shellWord(qemu))
	for _, arg := range args {
		if strings.HasPrefix(arg, "-") {
			b.WriteString(" \\\n ")
		}
		b.WriteString(" " + shellWord(arg))
	}
	_, err := fmt.Fprintln(a.out, b.String())
	return err
}

// shellWord quotes what a shell would take apart.
func shellWord(s string) string {
	const plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=,./:+@%"
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// printLibvirt prints the options as a domain's qemu:commandline.
func (a *app) printLibvirt(args []string) error {
	type arg struct {
		Value string `xml:"value,attr"`
	}
	doc := struct {
		XMLName xml.Name `xml:"qemu:commandline"`
		NS      string   `xml:"xmlns:qemu,attr"`
		Args    []arg    `xml:"qemu:arg"`
	}{NS: "http://libvirt.org/schemas/domain/qemu/1.0"}
	for _, s := range args {
		doc.Args = append(doc.Args, arg{s})
	}
	text, err := xml.MarshalIndent(doc, "", "  ")
	if err != nil {
		return errors.Join(errors.New("the options can't be written as XML"), err)
	}
	_, err = fmt.Fprintf(a.out, "%s\n", text)
	return err
}
