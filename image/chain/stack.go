package chain

import (
	"errors"
	"fmt"
	"math"
	"strconv"
	"strings"

	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
	"nvstore.dev/image/pebbledev"
	"nvstore.dev/image/raw"
)

// Limits of a location.
const (
	maxLocation = 16 << 10 // bytes
	maxOptions  = 64
	maxDepth    = 8 // nodes above each other
	sector      = 512
)

// A node is one driver of a stack, as the location describes it. A PATH is a
// node without a driver.
type node struct {
	driver       string
	path         string // of a file
	encrypt      string // of qcow2: "luks", "aes", or "" for one that isn't encrypted
	secret       string // name of an encrypted layer's
	header       *node  // of LUKS, if it is detached
	dir, machine string // of Pebble
	offset, size int64  // of raw; size is -1 to the end
	window       bool
	target       *nbd.Target // of NBD
	child        *node
	backing      *node // of qcow2, in place of the one that the image names
	data         *node // of qcow2, likewise
}

// parse takes a location apart.
func parse(location string) (*node, error) {
	if len(location) > maxLocation {
		return nil, badLocation(location[:64]+"…", "length", len(location), fmt.Sprintf("at most %d bytes", maxLocation))
	}
	if isStack(location) {
		opts, err := splitOptions(location)
		if err != nil {
			return nil, err
		}
		n, err := parseNode(location, "", opts, 0)
		if err == nil && n.unnamed() > 1 {
			err = badLocation(location, "key-secret", nil, "a name in each of several encrypted layers")
		}
		if err != nil {
			return nil, err
		}
		return n, nil
	}
	if rest, ok := strings.CutPrefix(location, "pebble:"); ok {
		return parsePebble(location, rest)
	}
	if scheme, _, ok := strings.Cut(location, "://"); ok && isScheme(scheme) {
		if isNBD(scheme) {
			return parseNBD(location)
		}
		return nil, unsupported(location, "scheme", scheme)
	}
	if location == "" {
		return nil, badLocation(location, "path", nil, "a path that isn't empty")
	}
	return &node{path: location}, nil
}

func isStack(location string) bool {
	return strings.HasPrefix(location, "driver=") || strings.Contains(location, ",driver=")
}

func isScheme(s string) bool {
	for i, c := range s {
		letter := 'a' <= c|0x20 && c|0x20 <= 'z'
		if !letter && (i == 0 || !strings.ContainsRune("0123456789+.-", c)) {
			return false
		}
	}
	return s != ""
}

func unsupported(location, field, got string) error {
	return &image.FormatError{Path: location, Off: -1, Struct: "location", Field: field, Got: got,
		Want: "raw, qcow2, luks, file, host_device, nbd or pebble", Kind: image.ErrUnsupported}
}

// parsePebble splits DIR/UUID at the last slash, if what follows is a UUID.
func parsePebble(location, rest string) (*node, error) {
	n := &node{driver: "pebble", dir: rest}
	if i := strings.LastIndexByte(rest, '/'); i > 0 {
		if id, err := pebbledev.ParseUUID(rest[i+1:]); err == nil {
			n.dir, n.machine = rest[:i], id.String()
		}
	}
	if n.dir == "" {
		return nil, badLocation(location, "dir", nil, "a folder")
	}
	return n, nil
}

// splitOptions reads KEY=VALUE,… with commas in values doubled.
func splitOptions(location string) (map[string]string, error) {
	opts := make(map[string]string)
	for rest := location; ; {
		key, tail, ok := strings.Cut(rest, "=")
		if !ok || key == "" || strings.Contains(key, ",") {
			return nil, badLocation(location, "", key, "key=value, separated by commas")
		}
		value, more := cutValue(&tail)
		if _, dup := opts[key]; dup {
			return nil, badLocation(location, key, nil, "each key once")
		}
		if opts[key] = value; len(opts) > maxOptions {
			return nil, badLocation(location, "", nil, fmt.Sprintf("at most %d keys", maxOptions))
		}
		if !more {
			return opts, nil
		}
		rest = tail
	}
}

// cutValue takes a value from the front of s, and tells whether a comma
// followed it.
func cutValue(s *string) (value string, more bool) {
	var b strings.Builder
	for {
		i := strings.IndexByte(*s, ',')
		if i < 0 {
			b.WriteString(*s)
			return b.String(), false
		}
		b.WriteString((*s)[:i])
		*s = (*s)[i+1:]
		if !strings.HasPrefix(*s, ",") {
			return b.String(), true
		}
		b.WriteByte(',')
		*s = (*s)[1:]
	}
}

// parseNode makes a node from the options, which are its own alone. prefix is
// for error messages.
func parseNode(location, prefix string, opts map[string]string, depth int) (*node, error) {
	if depth >= maxDepth {
		return nil, badLocation(location, prefix+"driver", nil, fmt.Sprintf("at most %d nodes", maxDepth))
	}
	own, below := splitChild(opts, "file.")
	n := &node{driver: own["driver"], size: -1}
	if _, ok := own["driver"]; !ok && prefix != "" {
		n.driver = "file" // as QEMU has it for a child
	}
	delete(own, "driver")
	var err error
	switch n.driver {
	case Raw, QCOW2:
		if n.driver == Raw {
			err = n.takeWindow(location, prefix, own)
		} else if err = n.takeEncrypt(location, prefix, own); err == nil {
			own, err = n.takeNamed(location, prefix, own, depth)
		}
		if err == nil {
			n.child, err = parseNode(location, prefix+"file.", below, depth+1)
		}
		below = nil
	case LUKS:
		n.child, err = parseNode(location, prefix+"file.", below, depth+1)
		if err == nil {
			own, err = n.takeLUKS(location, prefix, own, depth)
		}
		below = nil
	case "file", "host_device":
		n.path, err = take(location, prefix, own, "filename", true)
	case "pebble":
		err = n.takePebble(location, prefix, own)
	case "nbd":
		err = n.takeNBD(location, prefix, own)
	default:
		return nil, unsupported(location, prefix+"driver", n.driver)
	}
	if err != nil {
		return nil, err
	}
	for key := range below {
		own["file."+key] = ""
	}
	return n, refuseRest(location, prefix, n.driver, own)
}

// splitChild takes the options of a child node out of those of its parent.
func splitChild(opts map[string]string, child string) (own, below map[string]string) {
	own, below = make(map[string]string), make(map[string]string)
	for key, value := range opts {
		if k, ok := strings.CutPrefix(key, child); ok {
			below[k] = value
		} else {
			own[key] = value
		}
	}
	return own, below
}

// take removes a key from the options.
func take(location, prefix string, own map[string]string, key string, required bool) (string, error) {
	v, ok := own[key]
	delete(own, key)
	if v == "" && (ok || required) {
		return "", badLocation(location, prefix+key, nil, "a value")
	}
	return v, nil
}

func refuseRest(location, prefix, driver string, own map[string]string) error {
	first := ""
	for key := range own {
		if first == "" || key < first {
			first = key
		}
	}
	if first == "" {
		return nil
	}
	return badLocation(location, prefix+first, nil, "only keys of driver "+driver)
}

func (n *node) takeWindow(location, prefix string, own map[string]string) error {
	for _, f := range []struct {
		key string
		dst *int64
	}{{"offset", &n.offset}, {"size", &n.size}} {
		s, err := take(location, prefix, own, f.key, false)
		if err != nil {
			return err
		}
		if s == "" {
			continue
		}
		v, ok := parseSize(s)
		if !ok || v%sector != 0 {
			// Halves of a sector are torn by a write of the neighbour.
			return badLocation(location, prefix+f.key, s, "bytes, with k, M, G or T if wanted, and a multiple of 512")
		}
		*f.dst, n.window = v, true
	}
	return nil
}

func (n *node) takePebble(location, prefix string, own map[string]string) (err error) {
	if n.dir, err = take(location, prefix, own, "dir", true); err != nil {
		return err
	}
	s, err := take(location, prefix, own, "machine", false)
	if s == "" || err != nil {
		return err
	}
	id, err := pebbledev.ParseUUID(s)
	if err != nil {
		return badLocation(location, prefix+"machine", s, "a UUID")
	}
	n.machine = id.String()
	return nil
}

// parseSize reads a number of bytes with one of QEMU's suffixes.
func parseSize(s string) (int64, bool) {
	shift := 0
	if len(s) > 0 {
		// B is bytes, and then there is one letter for each 2¹⁰.
		if i := strings.IndexByte("BKMGTPE", s[len(s)-1]&^0x20); i >= 0 {
			shift, s = 10*i, s[:len(s)-1]
		}
	}
	v, err := strconv.ParseUint(s, 10, 63)
	if err != nil || v > math.MaxInt64>>shift {
		return 0, false
	}
	return int64(v) << shift, true
}

// open builds the stack, from below.
func (n *node) open(o *Options) (image.Device, error) {
	readOnly := o.ReadOnly
	switch n.driver {
	case "pebble":
		return openPebble(n.dir, n.machine, readOnly)
	case "nbd":
		return n.openNBD(readOnly)
	case "file", "host_device":
		d, err := raw.Open(n.path, o.raw())
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	below := *o
	if n.driver == QCOW2 { // which is the one that these are for
		below.Backing, below.Snapshot = nil, ""
	}
	file, err := n.child.open(&below)
	if err != nil {
		return nil, err
	}
	switch n.driver {
	case QCOW2:
		return n.stackQCOW2(file, o)
	case LUKS:
		return n.stackLUKS(file, o)
	}
	if !n.window {
		return file, nil
	}
	size := n.size
	if size < 0 {
		size = file.Size() - n.offset
	}
	w, err := image.Window(file, n.offset, size)
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return w, nil
}
