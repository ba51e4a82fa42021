// Package foreign reads what other tools write about the same memories, and
// makes specs of it. It is lenient about how something is written down, since
// those tools are, and strict about what: a member that isn't known or a value
// that can't be meant is refused, not dropped.
package foreign

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"nvstore.dev/vpd/formats"
	"nvstore.dev/vpd/internal/spec"
)

// A Kind is a form that something is written in.
type Kind struct {
	Name   string // for Import, such as "frugen"
	Format string // of the spec; empty if that depends on the content
	About  string
	read   func(text []byte, o *Options) (*result, error)
}

// Kinds lists what can be read.
func Kinds() []Kind { return slices.Clone(kinds) }

var kinds = []Kind{
	{"frugen", "fru", "JSON of frugen", frugen},
	{"fru-tool", "fru", "TOML of fru-tool (frutool)", fruTool},
	{"openbmc", "fru", "JSON of OpenBMC's entity-manager: properties of a FRU on D-Bus, or a configuration's probe", openBMC},
	{"eepmake", "hat", "settings text of eepmake and eepdump", eepmake},
	{"virt-firmware", "uefi", "JSON of virt-firmware, python-uefivars and QEMU's uefi-vars", virtFirmware},
	{"uboot", "ubootenv", "name=value lines of mkenvimage, fw_printenv and U-Boot's printenv", uBoot},
	{"hex", "", "hex dumps of ethtool -e, lspci -xxx, hexdump, xxd and i2cdump", hexDump},
}

// Options say how to read. The zero value, and nil, are fine.
type Options struct {
	// Format is that of a hex dump's bytes; without it, it is recognised,
	// or else raw.
	Format string

	// Device names one of several in a dump, such as "00:03.0" of lspci.
	Device string

	// ReadFile reads a file that the text names; without it, that is
	// refused.
	ReadFile func(name string) ([]byte, error)
}

// A result is a spec, or an image of which Import makes one.
type result struct {
	spec  spec.Object
	image []byte
	notes []string
}

func (r *result) notef(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// Import makes a spec of a text. Its notes say what of the text could be read
// in more than one way. An error is of kind vpd.ErrSpec, except one of
// ReadFile's. The spec may still be one that Pack refuses, where a value can't be
// represented.
func Import(kind string, text []byte, opts *Options) (out []byte, notes []string, err error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	i := slices.IndexFunc(kinds, func(k Kind) bool { return k.Name == kind })
	if i < 0 {
		return nil, nil, spec.Errorf("", "unknown kind %q; want one of %s", kind, strings.Join(names(), ", "))
	}
	if len(text) > spec.MaxSize {
		return nil, nil, spec.Errorf("", "%d bytes, want at most %d", len(text), spec.MaxSize)
	}
	r, err := kinds[i].read(text, &o)
	if err != nil {
		return nil, nil, err
	}
	if r.image != nil {
		out, err = parseImage(r, &o)
	} else {
		out, err = r.spec.Text()
	}
	if err != nil {
		return nil, nil, err
	}
	return out, r.notes, nil
}

func names() []string {
	var list []string
	for _, k := range kinds {
		list = append(list, k.Name)
	}
	return list
}

func parseImage(r *result, o *Options) ([]byte, error) {
	f := formats.Detect(r.image)
	if o.Format != "" {
		if f = formats.ByName(o.Format); f == nil {
			return nil, spec.Errorf("", "unknown format %q", o.Format)
		}
	}
	if f == nil {
		f = formats.ByName("raw")
	}
	text, warnings, err := f.Parse(r.image)
	if err != nil {
		return nil, spec.Errorf("", "%v", err)
	}
	for _, w := range warnings {
		r.notef("%s", w)
	}
	return text, nil
}

// set copies members under other names.
type set struct {
	path string
	from spec.Object
	to   spec.Object
	used []string
}

// text copies a string, or with the encodings that are given, a typed one.
func (s *set) value(name, to string, read func(path string, raw json.RawMessage) (any, error)) error {
	raw, ok := s.from.Get(name)
	if !ok {
		return nil
	}
	s.used = append(s.used, name)
	v, err := read(spec.Join(s.path, name), raw)
	if err != nil || v == nil {
		return err
	}
	s.to.Add(to, v)
	return nil
}

// rest refuses what nothing was made of.
func (s *set) rest() error { return s.from.Only(s.path, s.used...) }
