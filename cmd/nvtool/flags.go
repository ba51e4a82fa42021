package main

import (
	"math"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"nvstore.dev/nvstore"
)

// A size is a number of bytes on the command line: 4096, 64k, 64M, 1GiB.
type size int64

func (s *size) Set(text string) error {
	n, err := parseSize(text)
	*s = size(n)
	return err
}

func (s *size) String() string {
	if *s == 0 {
		return ""
	}
	return formatSize(int64(*s))
}

func (*size) Type() string { return "SIZE" }

const units = "KMGTP"

func parseSize(text string) (int64, error) {
	t := strings.ToUpper(text)
	t = strings.TrimSuffix(t, "IB")
	shift := 0
	if n := len(t); n > 0 {
		if i := strings.IndexByte(units, t[n-1]); i >= 0 {
			shift, t = 10*(i+1), t[:n-1]
		}
	}
	n, err := strconv.ParseUint(t, 10, 63)
	if err != nil || n > math.MaxInt64>>shift {
		return 0, invalidf("size %q: a number of bytes, with k, M, G or T for powers of 1024", text)
	}
	return int64(n) << shift, nil
}

// formatSize writes a size as parseSize reads it, exactly.
func formatSize(n int64) string {
	unit := ""
	for i := 0; i < len(units) && n >= 1024 && n%1024 == 0; i++ {
		n, unit = n/1024, units[i:i+1]
	}
	return strconv.FormatInt(n, 10) + unit
}

// roughSize writes a size for people.
func roughSize(n int64) string {
	if n < 1024 {
		return strconv.FormatInt(n, 10) + " B"
	}
	f, i := float64(n)/1024, 0
	for ; f >= 1024 && i < len(units)-1; i++ {
		f /= 1024
	}
	prec := 1
	if f >= 100 || f == math.Trunc(f) {
		prec = 0
	}
	return strconv.FormatFloat(f, 'f', prec, 64) + " " + units[i:i+1] + "iB"
}

// An imageRef is how the command line names an image.
type imageRef struct {
	opts     string
	format   string
	previous bool
	secrets  *secretFlags // of encrypted layers

	// Of an image with a store: where in it, and whether the files that it
	// names may be opened.
	tail     string
	allow    bool
	snapshot string

	location string
}

// flags adds those of an image with a store.
func (r *imageRef) flags(c *cobra.Command) {
	r.register(c, "format")
	r.allowFlag(c)
	f := c.Flags()
	f.StringVar(&r.tail, "tail", "", "whether the store lies in the tail of a machine's disk, `yes` or no; without it, that is found out if there is no doubt")
	f.Lookup("tail").NoOptDefVal = "yes"
}

func (r *imageRef) allowFlag(c *cobra.Command) {
	c.Flags().BoolVar(&r.allow, "allow-external", false, "open the backing and data files that the image names")
}

// place is where in the image the store is.
func (r *imageRef) place() nvstore.Place {
	return map[string]nvstore.Place{"yes": nvstore.Tail, "no": nvstore.Whole}[r.tail]
}

// register adds the flags; long is the name of the one for the format.
func (r *imageRef) register(c *cobra.Command, long string) {
	c.Flags().StringVar(&r.opts, "image-opts", "", "a stack in QEMU's notation, in place of IMAGE")
	c.Flags().StringVarP(&r.format, long, "f", "", "the image's `FORMAT`, qcow2, raw or luks; without it only images that nvtool made are opened")
	c.RegisterFlagCompletionFunc(long, cobra.FixedCompletions([]string{"qcow2", "raw", "luks"}, cobra.ShellCompDirectiveNoFileComp))
	r.secrets = new(secretFlags)
	r.secrets.flags(c)
}

// previousFlag adds --previous, and --snapshot, to a verb that reads.
func (r *imageRef) previousFlag(c *cobra.Command) {
	c.Flags().BoolVar(&r.previous, "previous", false, "read the generation before the newest, for rescue")
	r.snapshotFlag(c)
}

// snapshotFlag adds --snapshot to a verb that reads.
func (r *imageRef) snapshotFlag(c *cobra.Command) {
	c.Flags().StringVar(&r.snapshot, "snapshot", "", "read a qcow2 image as it was at internal snapshot `TAG`, an ID or a name")
}

// take splits the arguments into the image and between min and max others;
// max < 0 is any number.
func (r *imageRef) take(args []string, min, max int, want string) ([]string, error) {
	switch {
	case r.format != "" && r.format != "qcow2" && r.format != "raw" && r.format != "luks":
		return nil, usagef("format %q: qcow2, raw or luks", r.format)
	case r.tail != "" && r.tail != "yes" && r.tail != "no":
		return nil, usagef("--tail=%s: yes or no", r.tail)
	case r.opts != "" && r.format != "":
		return nil, usagef("--image-opts says the format itself: leave out -f")
	case r.opts != "":
		r.location = r.opts
	case len(args) == 0 || args[0] == "":
		return nil, usagef("no IMAGE is given")
	default:
		r.location, args = args[0], args[1:]
	}
	if len(args) < min || max >= 0 && len(args) > max {
		if want == "" {
			want = "nothing"
		}
		return nil, usagef("%d arguments behind the image, and the verb takes %s", len(args), want)
	}
	return args, nil
}

// splitPair takes KEY=VALUE apart.
func splitPair(s string) (key, value string, err error) {
	key, value, ok := strings.Cut(s, "=")
	if !ok || key == "" {
		return "", "", usagef("%q: NAME=VALUE is wanted", s)
	}
	return key, value, nil
}
