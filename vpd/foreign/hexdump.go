package foreign

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"regexp"
	"strconv"
	"strings"

	"nvstore.dev/vpd/internal/spec"
)

// maxDump is the most bytes of a dump.
const maxDump = 16 << 20

var (
	// A line of bytes: an offset, with 0x or a colon or neither, and groups
	// of hexadecimal digits; XX of i2cdump is a byte that can't be read.
	dumpLine = regexp.MustCompile(`^\s*(?:0x)?([0-9A-Fa-f]{2,8})(?::|\s)\s*((?:(?:[0-9A-Fa-f]{2}|XX)+(?:\s+|$)|-(?:\s|$))+)`)
	group    = regexp.MustCompile(`^(?:(?:[0-9A-Fa-f]{2}|XX)+)(?:\s|$)`)
	// A line that begins another device, as lspci writes it.
	slotLine = regexp.MustCompile(`^((?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) `)
)

// hexDump reads bytes with offsets in front, as ethtool -e, lspci -xxx,
// hexdump -C, xxd and i2cdump write them. What stands behind the bytes of a
// line, such as their characters, is no part of it: a line has 16 bytes at
// most, and as many as the next offset leaves room for.
func hexDump(text []byte, o *Options) (*result, error) {
	r := &result{}
	devices := map[string]*dump{}
	var order []string
	d := &dump{}
	line := 0
	s := bufio.NewScanner(bytes.NewReader(text))
	s.Buffer(nil, len(text)+1)
	for s.Scan() {
		line++
		if m := slotLine.FindStringSubmatch(s.Text()); m != nil {
			d = &dump{}
			devices[m[1]] = d
			order = append(order, m[1])
			continue
		}
		if err := d.line(s.Text(), line); err != nil {
			return nil, err
		}
	}
	if len(order) > 0 {
		name := o.Device
		if name == "" {
			if len(order) > 1 {
				return nil, spec.Errorf("", "has %d devices, %s: say which one is meant", len(order), strings.Join(order, ", "))
			}
			name = order[0]
		}
		if d = devices[name]; d == nil {
			return nil, spec.Errorf("", "no device %q; there are %s", name, strings.Join(order, ", "))
		}
	} else if o.Device != "" {
		return nil, spec.Errorf("", "names no devices, so none is %q", o.Device)
	}
	if d.skip {
		return nil, spec.Errorf("", "ends in a *, so that its length isn't known")
	}
	if d.finish(-1); len(d.image) == 0 {
		return nil, spec.Errorf("", "no line has an offset and bytes")
	}
	r.image = d.image
	if d.unread > 0 {
		r.notef("%d bytes, XX in the dump, could not be read: they are 0xff here", d.unread)
	}
	return r, nil
}

// A dump collects bytes. Those of the last line wait for the next offset.
type dump struct {
	image  []byte
	last   []byte
	bad    []bool
	skip   bool // a * of hexdump: lines like the last are left out
	unread int
}

func (d *dump) line(text string, n int) error {
	if strings.TrimSpace(text) == "*" {
		d.skip = true
		return nil
	}
	m := dumpLine.FindStringSubmatch(text)
	if m == nil {
		// The last line of hexdump -C and od is the length alone.
		if end, err := strconv.ParseInt(strings.TrimSpace(text), 16, 40); err == nil && len(d.last) > 0 && len(strings.TrimSpace(text)) >= 6 {
			return d.to(end, n)
		}
		return nil
	}
	off, err := strconv.ParseInt(m[1], 16, 40)
	if err != nil {
		return spec.Errorf("line "+strconv.Itoa(n), "%v", err)
	}
	if len(d.last) == 0 && len(d.image) == 0 && off != 0 {
		return spec.Errorf("line "+strconv.Itoa(n), "the first bytes are at %#x, want 0", off)
	}
	if len(d.last) > 0 {
		if err := d.to(off, n); err != nil {
			return err
		}
	}
	rest := text[strings.Index(text, m[2]):]
	for len(d.last) < 16 {
		rest = strings.TrimLeft(rest, " \t")
		if rest = strings.TrimPrefix(rest, "- "); rest == "" {
			break
		}
		g := group.FindString(rest)
		if g == "" {
			break
		}
		rest = rest[len(g):]
		for g = strings.TrimSpace(g); g != "" && len(d.last) < 16; g = g[2:] {
			b, err := hex.DecodeString(strings.ReplaceAll(g[:2], "XX", "ff"))
			if err != nil {
				return spec.Errorf("line "+strconv.Itoa(n), "%v", err)
			}
			d.last = append(d.last, b...)
			d.bad = append(d.bad, g[:2] == "XX")
		}
	}
	return nil
}

// to finishes the line, and what a * left out, up to an offset.
func (d *dump) to(off int64, n int) error {
	at := int64(len(d.image))
	switch {
	case off > maxDump:
		return spec.Errorf("line "+strconv.Itoa(n), "an offset of %#x, want at most %#x", off, maxDump)
	case off <= at:
		return spec.Errorf("line "+strconv.Itoa(n), "the offset %#x is not behind the last, %#x", off, at)
	case !d.skip && off-at > int64(len(d.last)):
		return spec.Errorf("line "+strconv.Itoa(n), "the bytes from %#x to %#x are missing", at+int64(len(d.last)), off)
	}
	last := d.last
	for d.finish(int(off - at)); d.skip && int64(len(d.image)) < off; {
		left := int(off) - len(d.image)
		d.image = append(d.image, last[:min(left, len(last))]...)
	}
	d.skip = false
	return nil
}

// finish takes the last line's bytes, at most n of them.
func (d *dump) finish(n int) {
	if n < 0 || n > len(d.last) {
		n = len(d.last)
	}
	d.image = append(d.image, d.last[:n]...)
	for _, bad := range d.bad[:n] {
		if bad {
			d.unread++
		}
	}
	d.last, d.bad = nil, nil
}
