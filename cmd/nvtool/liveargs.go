package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

// codeNode is the node of the firmware that belongs to uefi/vars.
const codeNode = "nvstore-firmware"

// A liveWindow is a live extent as QEMU opens it.
type liveWindow struct {
	Name     string           `json:"name"`
	Size     int64            `json:"size"`
	Attached bool             `json:"attached"`
	Blockdev machine.Blockdev `json:"blockdev"`

	// Options are QEMU's, of the window and of the device that has it; the
	// window alone, if the blob's name tells of no device.
	Options []string `json:"options"`
	Device  bool     `json:"device"`
	note    string
}

// liveOptions are what the command line says of live extents.
type liveOptions struct {
	firmware string
	i2cBus   string
}

func (o *liveOptions) flags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&o.firmware, "firmware", "", "`FILE` with the firmware whose variables are uefi/vars (default OVMF's of their size)")
	f.StringVar(&o.i2cBus, "i2c-bus", "aspeed.i2c.bus.%d", "QEMU's `NAME` of I2C bus %d, for EEPROMs")
}

// windows makes a window of each live extent. base is where in the node below
// the store begins.
func (o *liveOptions) windows(list []nvstore.Entry, below string, base int64) []liveWindow {
	all := []liveWindow{}
	taken := make(map[string]bool)
	for i := range list {
		e := &list[i]
		if !e.Live {
			continue
		}
		w := liveWindow{Name: e.Name, Size: e.Size, Attached: e.Attached, Blockdev: machine.Blockdev{Driver: "raw",
			NodeName: windowNode(e, taken), File: below, Offset: base + e.Offset, Size: (e.Size + 511) / 512 * 512}}
		o.device(&w)
		all = append(all, w)
	}
	return all
}

// windowNode makes a node's name of a blob's: at most 31 letters, digits, and
// a few marks.
func windowNode(e *nvstore.Entry, taken map[string]bool) string {
	name := "nv-" + strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_' {
			return r
		}
		return '-'
	}, e.Name)
	if e.Name == "" || len(name) > 31 || taken[name] {
		name = "nv-" + hex.EncodeToString(e.ID[:14])
	}
	taken[name] = true
	return name
}

var (
	i2cName = regexp.MustCompile(`^i2c/(\d{1,3})-([0-9a-f]{4})/eeprom$`)
	spiName = regexp.MustCompile(`^spi/(\d{1,2})/flash$`)
)

// device gives the window to the device that the blob's name stands for.
func (o *liveOptions) device(w *liveWindow) {
	node := w.Blockdev.NodeName
	w.Options = []string{"-blockdev", w.Blockdev.String()}
	w.Device = true
	switch i2c, spi := i2cName.FindStringSubmatch(w.Name), spiName.FindStringSubmatch(w.Name); {
	case w.Name == "uefi/vars":
		code := o.firmware
		if code == "" {
			code = firmwareFor(w.Size)
		}
		if code == "" {
			w.Device, w.note = false, "no firmware is known for variables of that size: give --firmware"
			return
		}
		fw := machine.Blockdev{Driver: "file", NodeName: codeNode, Filename: code}
		w.Options = append(w.Options, "-blockdev", fw.String()+",read-only=on", "-machine", "pflash0="+codeNode+",pflash1="+node)
	case i2c != nil && w.Size%512 != 0:
		w.Device, w.note = false, "QEMU's at24c-eeprom takes content in multiples of 512 bytes only"
	case i2c != nil:
		bus := strings.ReplaceAll(o.i2cBus, "%d", i2c[1])
		addr, _ := strconv.ParseUint(i2c[2], 16, 16)
		w.Options = append(w.Options, "-device", fmt.Sprintf("at24c-eeprom,bus=%s,address=%#x,rom-size=%d,drive=%s", bus, addr, w.Size, node))
	case spi != nil:
		// Boards take their flash from -drive, which names another node
		// in JSON only.
		text, _ := json.Marshal(w.Blockdev)
		w.Options = []string{"-drive", "if=mtd,index=" + spi[1] + ",file=json:" + strings.ReplaceAll(string(text), ",", ",,")}
	case w.Name == "spapr/nvram":
		w.Options = append(w.Options, "-global", "spapr-nvram.drive="+node)
	default:
		w.Device, w.note = false, "its name tells of no device of QEMU's: give the node to one"
	}
}

// firmwareFor finds the firmware that is built with variables of this size.
func firmwareFor(size int64) string {
	for _, path := range map[int64][]string{
		528 << 10: {"/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/edk2/x64/OVMF_CODE.4m.fd", "/usr/share/qemu/edk2-x86_64-code.fd"},
		128 << 10: {"/usr/share/OVMF/OVMF_CODE.fd", "/usr/share/edk2/ovmf/OVMF_CODE.fd"},
		64 << 20:  {"/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/edk2/aarch64/QEMU_EFI-pflash.raw"},
	}[size] {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			return path
		}
	}
	return ""
}

// warnWindows says what keeps the windows from being used as they are.
func (a *app) warnWindows(location string, all []liveWindow) {
	for i := range all {
		w := &all[i]
		if w.note != "" {
			a.warnf("%s is node %s: %s", printable(w.Name), w.Blockdev.NodeName, w.note)
		}
		if !w.Attached {
			a.warnf("%s isn't attached, and what QEMU writes to it will count as damage: first nvtool live attach %s", printable(w.Name), printable(location))
		}
	}
}

// liveIn lists the windows of the store in a machine's disk. A machine without
// a store has none.
func (a *app) liveIn(d *machine.Disk, o *liveOptions) (all []liveWindow, err error) {
	all = []liveWindow{} // in JSON no null
	state, err := d.State()
	if err != nil {
		return nil, err
	}
	err = peek(state, &imageRef{tail: "no"}, nil, func(s *nvstore.Store) error {
		list, err := s.List("")
		l := d.Layout()
		all = o.windows(list, machine.DiskNode, l.StateOffset)
		return err
	})
	if errors.Is(err, nvstore.ErrFormat) {
		err = nil
	}
	return all, err
}

func (a *app) liveArgsCmd() *cobra.Command {
	var ref imageRef
	var key keyFlags
	var o liveOptions
	c := a.verb("args IMAGE", "Print QEMU's options that open an image and give its live extents to devices",
		func(ctx context.Context, args []string) error {
			if _, err := ref.take(args, 0, 0, ""); err != nil {
				return err
			}
			return a.liveArgs(ctx, &ref, &key, &o)
		})
	c.Long = `Print QEMU's options that open an image, each live extent of its store as a raw
window, and the device that has it, where the blob's name tells: uefi/vars is
pflash beside its firmware, i2c/BUS-ADDRESS/eeprom an at24c-eeprom, spi/N/flash
the board's flash N, spapr/nvram the NVRAM of pseries. For a machine's disk, nvtool
vm args prints the whole command line with them.

  nvtool live attach nv.qcow2
  eval "qemu-system-x86_64 -machine q35 $(nvtool live args nv.qcow2)"
  nvtool live detach nv.qcow2`
	ref.flags(c)
	key.flags(c, "the ")
	o.flags(c)
	return c
}

func (a *app) liveArgs(ctx context.Context, ref *imageRef, key *keyFlags, o *liveOptions) (err error) {
	if ref.opts != "" || strings.Contains(ref.location, "://") || strings.HasPrefix(ref.location, "pebble:") {
		return usagef("%s: QEMU opens a file", printable(ref.location))
	}
	s, err := a.open(ctx, ref, key, browsing)
	if err != nil {
		return err
	}
	defer closing(s, &err)
	list, err := s.List("")
	if err != nil {
		return a.explain(ref, err)
	}
	nodes, base, err := imageNodes(s.Dir().Device(), ref.location)
	if err != nil {
		return a.explain(ref, err)
	}
	all := o.windows(list, machine.DiskNode, base)
	if a.json {
		return a.printJSON(struct {
			Blockdev []machine.Blockdev `json:"blockdev"`
			Live     []liveWindow       `json:"live"`
		}{nodes, all})
	}
	var args []string
	for i := range nodes {
		args = append(args, "-blockdev", nodes[i].String())
	}
	for i := range all {
		args = append(args, all[i].Options...)
	}
	a.warnWindows(ref.location, all)
	if len(all) == 0 {
		a.warnf("%s has no live extents; nvtool put --live makes one", printable(ref.location))
	}
	words := make([]string, len(args))
	for i, arg := range args {
		words[i] = shellWord(arg)
	}
	_, err = fmt.Fprintln(a.out, strings.Join(words, " "))
	return err
}

// imageNodes are the nodes of an image, and where in it its store begins.
func imageNodes(dev image.Device, path string) (nodes []machine.Blockdev, base int64, err error) {
	if d, ok := machine.Of(dev); ok {
		l := d.Layout()
		dev, base = d.Device(), l.StateOffset
	}
	format := formatOf(dev)
	if format != "qcow2" && format != "raw" {
		return nil, 0, withHint(fmt.Errorf("windows of a %s image: %w", format, errors.ErrUnsupported), "nvtool vm args opens encrypted images, too")
	}
	return []machine.Blockdev{{Driver: "file", NodeName: machine.FileNode, Filename: path},
		{Driver: format, NodeName: machine.DiskNode, File: machine.FileNode}}, base, nil
}
