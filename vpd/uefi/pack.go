package uefi

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "version", "layout", "header", "volume_checksum", "variables", "free", "work", "cut",
		"trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	if raw, ok := o.Get("version"); ok && string(raw) != fmt.Sprint(jsonVersion) {
		return nil, nil, spec.Errorf("version", "%s, want %d", raw, jsonVersion)
	}
	b, err := newBuilder(o)
	if err != nil {
		return nil, nil, err
	}
	vars, err := readVariables(o, b.geo.auth)
	if err != nil {
		return nil, nil, err
	}
	reclaimed, err := b.store(o, vars)
	if err != nil {
		return nil, nil, err
	}
	out, err := b.finish(o)
	if err != nil {
		return nil, nil, err
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be a variable store: %v", err)
	}
	if l.end != b.end {
		return nil, nil, spec.Errorf("free", "begins with a variable")
	}
	return out, append(reclaimed, form.Warnings(l.problems())...), nil
}

// A builder is an image that comes to be.
type builder struct {
	geo   geometry
	start int // of the variables
	end   int // behind them
	limit int // of the store
	out   []byte
}

// newBuilder makes the volume without variables.
func newBuilder(o spec.Object) (*builder, error) {
	b := new(builder)
	if _, ok := o.Get("header"); ok {
		head, err := form.Bytes(o, "", "header", maxHeader+storeHeaderSize)
		if err != nil {
			return nil, err
		}
		geo, off, msg := readGeometry(head)
		if msg == "" && geo.header+storeHeaderSize != len(head) {
			off, msg = len(head), fmt.Sprintf("has %d bytes, want %d", len(head), geo.header+storeHeaderSize)
		}
		if msg != "" {
			return nil, spec.Errorf("header", "at byte %#x: %s", off, msg)
		}
		for _, name := range []string{"layout", "volume_checksum"} {
			if _, ok := o.Get(name); ok {
				return nil, spec.Errorf(name, "can't stand beside header")
			}
		}
		b.geo = geo
		b.out = append(head, bytes.Repeat([]byte{0xff}, geo.volume-len(head))...)
	} else {
		geo, err := readLayout(o)
		if err != nil {
			return nil, err
		}
		b.geo = geo
		head := geo.headers()
		b.out = append(head, bytes.Repeat([]byte{0xff}, geo.store-storeHeaderSize)...)
		b.out = append(b.out, geo.areas()...)
		sum, err := form.Uint(o, "", "volume_checksum", 0xffff, uint64(binary.LittleEndian.Uint16(head[volumeChecksum:])))
		if err != nil {
			return nil, err
		}
		binary.LittleEndian.PutUint16(b.out[volumeChecksum:], uint16(sum))
	}
	b.start = b.geo.header + storeHeaderSize
	b.limit = min(b.geo.header+b.geo.store, b.geo.volume)
	return b, nil
}

func readLayout(o spec.Object) (geometry, error) {
	raw, ok := o.Get("layout")
	if !ok {
		return layouts[0].geo, nil
	}
	if len(raw) > 0 && raw[0] == '"' {
		name, err := spec.String("layout", raw)
		if err != nil {
			return geometry{}, err
		}
		var names []byte
		for i, l := range layouts {
			if l.name == name {
				return l.geo, nil
			}
			if i > 0 {
				names = append(names, ", "...)
			}
			names = append(names, l.name...)
		}
		return geometry{}, spec.Errorf("layout", "unknown %q; want one of %s, or an object", name, names)
	}
	return readGeometryObject(raw)
}

func readGeometryObject(raw json.RawMessage) (g geometry, err error) {
	const path = "layout"
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return g, err
	}
	if err := o.Only(path, "volume_size", "block_size", "blocks", "attributes", "store_size", "work_offset", "work_size", "authenticated"); err != nil {
		return g, err
	}
	g.header = volumeHeaderSize
	for _, f := range []struct {
		name    string
		to      *int
		missing uint64
	}{{"volume_size", &g.volume, 0}, {"block_size", &g.block, 0x1000}, {"store_size", &g.store, 0},
		{"work_offset", &g.work, 0}, {"work_size", &g.workSize, 0}} {
		n, err := form.Uint(o, path, f.name, MaxSize, f.missing)
		if err != nil {
			return g, err
		}
		*f.to = int(n)
	}
	attr, err := form.Uint(o, path, "attributes", 1<<32-1, volumeAttributes)
	if err != nil {
		return g, err
	}
	g.attr, g.auth = uint32(attr), true
	if raw, ok := o.Get("authenticated"); ok {
		if g.auth, err = spec.Bool(path+".authenticated", raw); err != nil {
			return g, err
		}
	}
	if msg := g.valid(); msg != "" {
		return g, spec.Errorf(path, "%s", msg)
	}
	blocks, err := form.Uint(o, path, "blocks", 1<<32-1, uint64(g.volume/g.block))
	g.blocks = int(blocks)
	return g, err
}

// store puts the variables into the store. If they don't fit, those that are
// dead are left out, and the warning says so.
func (b *builder) store(o spec.Object, vars []*variable) ([]vpd.Warning, error) {
	free, err := form.Bytes(o, "", "free", MaxSize)
	if err != nil {
		return nil, err
	}
	room := b.limit - b.start
	total := size(vars, b.geo.auth) + len(free)
	var warnings []vpd.Warning
	if total > room {
		kept := living(vars)
		if n := len(vars) - len(kept); n > 0 {
			now := size(kept, b.geo.auth) + len(free)
			warnings = []vpd.Warning{{Off: -1, Field: "variables",
				Msg: fmt.Sprintf("reclaimed %d bytes: %d deleted or unfinished variables are left out, since all would not fit", total-now, n)}}
			vars, total = kept, now
		}
		if total > room {
			return nil, spec.Errorf("variables", "take %d bytes, and the store has room for %d", total, room)
		}
	}
	b.end = b.start
	for i, v := range vars {
		if len(v.padding) != v.pad() && i < len(vars)-1 {
			return nil, spec.Errorf(fmt.Sprintf("variables[%d].padding", i), "has %d bytes, want %d", len(v.padding), v.pad())
		}
		b.end += copy(b.out[b.end:], v.encode(b.geo.auth))
	}
	copy(b.out[b.end:], free)
	return warnings, nil
}

func size(vars []*variable, auth bool) (n int) {
	for _, v := range vars {
		n += headerSize(auth) + len(v.name) + len(v.data) + len(v.padding)
	}
	return n
}

// living are the variables that a reclaim keeps: the added ones, and those in
// transition that have no successor.
func living(vars []*variable) []*variable {
	added := map[string]bool{}
	for _, v := range vars {
		if v.state == stateAdded {
			added[v.id()] = true
		}
	}
	var kept []*variable
	for _, v := range vars {
		if v.state == stateAdded || v.state == stateInTransition && !added[v.id()] {
			kept = append(kept, v)
		}
	}
	return kept
}

// finish puts in what lies behind the store.
func (b *builder) finish(o spec.Object) ([]byte, error) {
	if _, ok := o.Get("work"); ok {
		list, err := form.List(o, "", "work", MaxSize)
		if err != nil {
			return nil, err
		}
		copy(b.out[b.limit:], bytes.Repeat([]byte{0xff}, len(b.out)-b.limit))
		for i, raw := range list {
			if err := b.patch(fmt.Sprintf("work[%d]", i), raw); err != nil {
				return nil, err
			}
		}
	}
	raw, ok := o.Get("cut")
	if !ok {
		return form.Pad(o, b.out, MaxSize)
	}
	n, err := spec.Uint("cut", raw, uint64(len(b.out)))
	if err != nil {
		return nil, err
	}
	if int(n) < b.end {
		return nil, spec.Errorf("cut", "%d, and the variables end at %d", n, b.end)
	}
	for _, name := range []string{"trailing", "size", "fill"} {
		if _, ok := o.Get(name); ok {
			return nil, spec.Errorf(name, "can't stand beside cut")
		}
	}
	return b.out[:n], nil
}

func (b *builder) patch(path string, raw json.RawMessage) error {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return err
	}
	if err := o.Only(path, "offset", "data"); err != nil {
		return err
	}
	off, err := form.Uint(o, path, "offset", MaxSize, 0)
	if err != nil {
		return err
	}
	data, err := hexData(o, path, "data")
	if err != nil {
		return err
	}
	if int(off) < b.limit || int(off)+len(data) > len(b.out) {
		return spec.Errorf(path, "bytes %#x to %#x are not behind the store, %#x to %#x", off, int(off)+len(data), b.limit, len(b.out))
	}
	copy(b.out[off:], data)
	return nil
}

// hexData reads a member that is hexadecimal if it is a string.
func hexData(o spec.Object, path, name string) ([]byte, error) {
	raw, ok := o.Get(name)
	path = spec.Join(path, name)
	if !ok {
		return nil, spec.Errorf(path, "missing")
	}
	if raw[0] != '"' {
		v, err := spec.ParseValue(path, raw, MaxSize)
		return v.Bytes, err
	}
	s, err := spec.String(path, raw)
	if err != nil {
		return nil, err
	}
	b, err := spec.Hex(s)
	if err != nil {
		return nil, spec.Errorf(path, "want hexadecimal digits, or an object with type and data")
	}
	return b, nil
}

func readVariables(o spec.Object, auth bool) ([]*variable, error) {
	list, err := form.List(o, "", "variables", MaxSize/plainHeaderSize)
	if err != nil {
		return nil, err
	}
	var vars []*variable
	var digests []digest
	seen := map[string]bool{}
	for i, raw := range list {
		path := fmt.Sprintf("variables[%d]", i)
		o, err := spec.ParseObject(path, raw)
		if err != nil {
			return nil, err
		}
		v, err := readSpecVariable(o, path, auth)
		if err != nil {
			return nil, err
		}
		if _, explicit := o.Get("state"); v.state == stateAdded {
			if seen[v.id()] && !explicit {
				return nil, spec.Errorf(path, "%s comes more than once in its namespace", v.label())
			}
			seen[v.id()] = true
		}
		if _, ok := o.Get("digest"); ok {
			hash, err := hexData(o, path, "digest")
			if err != nil {
				return nil, err
			}
			d := digest{spec.Join(path, "digest"), v, hash}
			if err := d.shape(); err != nil {
				return nil, err
			}
			digests = append(digests, d)
		}
		vars = append(vars, v)
	}
	return addDigests(vars, digests)
}

func readSpecVariable(o spec.Object, path string, auth bool) (*variable, error) {
	if err := o.Only(path, "name", "guid", "attr", "data", "time", "digest", "count", "key", "state", "reserved", "sizes", "padding"); err != nil {
		return nil, err
	}
	v := new(variable)
	var err error
	if v.name, err = readName(o, path); err != nil {
		return nil, err
	}
	if v.data, err = hexData(o, path, "data"); err != nil {
		return nil, err
	}
	raw, ok := o.Get("guid")
	s, err := spec.String(spec.Join(path, "guid"), raw)
	if !ok || err != nil {
		return nil, spec.Errorf(spec.Join(path, "guid"), "want a string such as 8be4df61-93ca-11d2-aa0d-00e098032b8c")
	}
	if v.guid, ok = parseGUID(s); !ok {
		return nil, spec.Errorf(spec.Join(path, "guid"), "%q is not one such as 8be4df61-93ca-11d2-aa0d-00e098032b8c", s)
	}
	if _, ok := o.Get("attr"); !ok {
		return nil, spec.Errorf(spec.Join(path, "attr"), "missing; 7 is a variable that is kept and can be read at boot and run time")
	}
	var attr, key, state, reserved uint64
	for _, f := range []struct {
		name         string
		to           *uint64
		max, missing uint64
	}{{"attr", &attr, 1<<32 - 1, 0}, {"count", &v.count, 1<<64 - 1, 0}, {"key", &key, 1<<32 - 1, 0},
		{"state", &state, 0xff, stateAdded}, {"reserved", &reserved, 0xff, 0}} {
		if *f.to, err = form.Uint(o, path, f.name, f.max, f.missing); err != nil {
			return nil, err
		}
	}
	v.attr, v.key, v.state, v.reserved = uint32(attr), uint32(key), byte(state), byte(reserved)
	if err := v.readTime(o, path); err != nil {
		return nil, err
	}
	if !auth && (v.time != [16]byte{} || v.count != 0 || v.key != 0) {
		return nil, spec.Errorf(path, "%s has a time, a count or a key, and a store that isn't authenticated keeps none", v.label())
	}
	if err := v.readSizes(o, path); err != nil {
		return nil, err
	}
	v.padding = bytes.Repeat([]byte{0xff}, v.pad())
	if _, ok := o.Get("padding"); ok {
		v.padding, err = form.Bytes(o, path, "padding", v.pad())
	}
	return v, err
}

func (v *variable) readTime(o spec.Object, path string) error {
	if _, ok := o.Get("time"); !ok {
		return nil
	}
	b, err := hexData(o, path, "time")
	if err == nil && len(b) != len(v.time) {
		err = spec.Errorf(spec.Join(path, "time"), "has %d bytes, want %d", len(b), len(v.time))
	}
	copy(v.time[:], b)
	return err
}

// readSizes checks that the firmware would find the name and the data. A
// header that was never finished gives sizes that don't count.
func (v *variable) readSizes(o spec.Object, path string) error {
	v.nameSize, v.dataSize = uint32(len(v.name)), uint32(len(v.data))
	if _, ok := o.Get("sizes"); ok {
		list, err := form.List(o, path, "sizes", 2)
		if err != nil {
			return err
		}
		if len(list) != 2 {
			return spec.Errorf(spec.Join(path, "sizes"), "want two numbers")
		}
		for i, to := range []*uint32{&v.nameSize, &v.dataSize} {
			n, err := spec.Uint(spec.Join(path, "sizes"), list[i], 1<<32-1)
			if err != nil {
				return err
			}
			*to = uint32(n)
		}
	}
	if n, d := v.sizes(); int(n) != len(v.name) || int(d) != len(v.data) {
		return spec.Errorf(path, "its header gives name and data %d and %d bytes, and they have %d and %d", n, d, len(v.name), len(v.data))
	}
	return nil
}

func readName(o spec.Object, path string) ([]byte, error) {
	raw, ok := o.Get("name")
	path = spec.Join(path, "name")
	if !ok {
		return nil, spec.Errorf(path, "missing")
	}
	if raw[0] == '{' {
		v, err := spec.ParseValue(path, raw, MaxSize)
		if err == nil && v.Type == "text" {
			err = spec.Errorf(path, "text is a plain string; other types are the name's bytes in UTF-16")
		}
		return v.Bytes, err
	}
	s, err := spec.String(path, raw)
	if err != nil {
		return nil, err
	}
	name := encodeName(s)
	if name == nil || len(name) > maxName {
		return nil, spec.Errorf(path, "want 1 to %d characters, none of them 0", maxName/2-1)
	}
	return name, nil
}
