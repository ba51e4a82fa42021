package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/qcow2"
)

// An imgSpec says what image to make: its format and the -o options, under
// QEMU's names.
type imgSpec struct {
	format string
	list   []string

	size     int64
	sized    bool
	qcow2    qcow2.CreateOptions
	crypt    imgCrypt
	luks     *luks.FormatOptions // how it is encrypted, or nil
	explicit map[string]string   // what -o said
	lazy     *bool
	prealloc qcow2.Preallocation
}

func (s *imgSpec) flags(c *cobra.Command, long, short, what string) {
	c.Flags().StringVarP(&s.format, long, short, "raw", what+"`FORMAT`, qcow2, raw or luks")
	c.RegisterFlagCompletionFunc(long, cobra.FixedCompletions([]string{"qcow2", "raw", "luks"}, cobra.ShellCompDirectiveNoFileComp))
	s.optionFlag(c)
}

func (s *imgSpec) optionFlag(c *cobra.Command) {
	c.Flags().StringArrayVarP(&s.list, "options", "o", nil, "`NAME=VALUE,...` of the format; -o help lists them")
}

// An imgOption is one of -o's.
type imgOption struct {
	name, value, text string
	formats           string
	set               func(s *imgSpec, v string) error
}

var imgOptions = slices.Concat(diskOptions, cryptOptions)

var diskOptions = []imgOption{
	{"size", "SIZE", "the disk's size", "raw qcow2 luks", func(s *imgSpec, v string) (err error) {
		s.size, err = parseImgSize(v)
		s.sized = true
		return err
	}},
	{"cluster_size", "SIZE", "512 to 2M (64k)", "qcow2", func(s *imgSpec, v string) error {
		n, err := parseImgSize(v)
		s.qcow2.ClusterSize = int(min(n, 1<<30))
		return err
	}},
	{"refcount_bits", "N", "width of a reference count, 1 to 64 (16)", "qcow2", func(s *imgSpec, v string) (err error) {
		if s.qcow2.RefcountBits, err = strconv.Atoi(v); err != nil || s.qcow2.RefcountBits == 0 {
			return invalidf("refcount_bits=%s: a number from 1 to 64", v)
		}
		return nil
	}},
	{"compat", "0.10|1.1", "version 2 or 3 of the format (1.1)", "qcow2", func(s *imgSpec, v string) error {
		switch v {
		case "0.10", "v2":
			s.qcow2.Version = 2
		case "1.1", "v3":
			s.qcow2.Version = 3
		default:
			return invalidf("compat=%s: 0.10 or 1.1", v)
		}
		return nil
	}},
	{"lazy_refcounts", "on|off", "write reference counts late (off)", "qcow2", func(s *imgSpec, v string) error {
		on, err := onOff("lazy_refcounts", v)
		s.lazy = &on
		return err
	}},
	{"preallocation", "MODE", "off, metadata, falloc or full; a raw image has no metadata (off)", "raw qcow2", func(s *imgSpec, v string) (err error) {
		s.prealloc, err = parsePrealloc(v)
		return err
	}},
	flagOption("extended_l2", "subclusters, 32 in each cluster of 16k or more (off)", func(s *imgSpec) *bool { return &s.qcow2.ExtendedL2 }),
	{"compression_type", "zlib|zstd", "of compressed clusters (zlib)", "qcow2", func(s *imgSpec, v string) error {
		switch v {
		case "zlib", "deflate":
			s.qcow2.Compression = "deflate"
		case "zstd":
			s.qcow2.Compression = "zstd"
		default:
			return invalidf("compression_type=%s: zlib or zstd", v)
		}
		return nil
	}},
	{"backing_file", "FILE", "read where the image has nothing itself", "qcow2", func(s *imgSpec, v string) error {
		s.qcow2.BackingFile = v
		return nil
	}},
	{"backing_fmt", "FORMAT", "the backing file's, raw or qcow2", "qcow2", func(s *imgSpec, v string) error {
		s.qcow2.BackingFormat = v
		return nil
	}},
	{"data_file", "FILE", "holds the data, made with the image", "qcow2", func(s *imgSpec, v string) error {
		s.qcow2.DataFile = v
		return nil
	}},
	flagOption("data_file_raw", "the data file reads as the disk does (off)", func(s *imgSpec) *bool { return &s.qcow2.DataFileRaw }),
}

func flagOption(name, text string, dst func(s *imgSpec) *bool) imgOption {
	return imgOption{name, "on|off", text, "qcow2", func(s *imgSpec, v string) (err error) {
		*dst(s), err = onOff(name, v)
		return err
	}}
}

// parse takes -o apart. It is called once, before anything is made.
func (s *imgSpec) parse() error {
	if s.format != chain.Raw && s.format != chain.QCOW2 && s.format != chain.LUKS {
		return usagef("format %q: qcow2, raw or luks", s.format)
	}
	pairs, err := optionList(s.list)
	if err != nil {
		return err
	}
	s.explicit = make(map[string]string)
	for _, p := range pairs {
		o, err := s.option(p[0])
		if err != nil {
			return err
		}
		if err := o.set(s, p[1]); err != nil {
			return err
		}
		s.explicit[p[0]] = p[1]
	}
	return s.crypt.check(s.format)
}

func (s *imgSpec) option(name string) (*imgOption, error) {
	for i := range imgOptions {
		if o := &imgOptions[i]; o.name == name && strings.Contains(o.formats, s.format) {
			return o, nil
		}
	}
	return nil, withHint(&kinded{fmt.Errorf("option %s of a %s image: %w", printable(name), s.format, image.ErrUnsupported), errInvalid},
		"-o help lists the options")
}

// wantsHelp tells whether -o help was given, and then prints the options.
func (s *imgSpec) wantsHelp(a *app, only ...string) (bool, error) {
	help := false
	for _, l := range s.list {
		help = help || l == "help" || l == "?"
	}
	if !help {
		return false, nil
	}
	var rows [][]string
	for _, o := range imgOptions {
		if strings.Contains(o.formats, s.format) && (only == nil || slices.Contains(only, o.name)) {
			rows = append(rows, []string{o.name, o.value, o.text})
		}
	}
	return true, a.printTable([]string{"option", "value", "meaning"}, rows)
}

// options returns what chain.Create takes.
func (s *imgSpec) options() *chain.CreateOptions {
	o := &chain.CreateOptions{Format: s.format, Size: s.size, Empty: s.size == 0, LUKS: s.luks}
	switch s.format {
	case chain.LUKS:
		unit := max(s.crypt.sector, 512)
		o.Size = (s.size + unit - 1) / unit * unit
	case chain.QCOW2:
		o.Size = (s.size + 511) &^ 511 // as QEMU does
		q := s.qcow2
		q.Preallocation = s.prealloc
		o.QCOW2 = &q
	}
	return o
}

func onOff(name, v string) (bool, error) {
	switch v {
	case "on", "yes", "true", "y":
		return true, nil
	case "off", "no", "false", "n":
		return false, nil
	}
	return false, invalidf("%s=%s: on or off", name, v)
}
