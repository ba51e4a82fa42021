// Package machine makes the blobs of whole virtual machines from one manifest:
// JSON, in which comments are allowed.
//
//	{
//	  "manifest": 1,
//	  "machine": "fby35-bmc",         // a template, whose blobs and values these add to
//	  "store": {"uuid": "...", "time": "2026-01-31T12:00:00Z", "size": "64M", "max_size": "1G"},
//	  "values": {
//	    "serial": {"first": "NVS0001", "last": "NVS0999"},       // counts up from machine to machine
//	    "mac": {"first": "52:54:00:00:00:00", "step": 4},
//	    "asset": "A-${n:04}"
//	  },
//	  "blobs": {
//	    "i2c/3-0050/eeprom": {"spec": {"format": "fru", "board": {"serial_number": "${serial}"}}, "size": 8192},
//	    "net0/nvm": {"template": "e1000", "values": {"mac": "${mac+1}"}},
//	    "pci/0000:00:03.0/vpd": {"spec": "nic.pci.jsonc", "size": "eeprom"},
//	    "tpm/permanent": {"file": "tpm-${n}.permall", "type": "tpm2-permanent"},
//	    "i2c/4-0051/eeprom": {"size": 131072, "fill": "0xff"},    // blank
//	    "uefi/vars": {"file": "OVMF_VARS_4M.fd", "live": true},   // for QEMU to open directly
//	    "i2c/6-0051/eeprom": null                                // of the template, left out
//	  }
//	}
//
// A blob has the content of a spec (the spec itself, or the name of a file
// with one), of a file, or of a template, or it is blank. It is filled up to its size; the size
// "eeprom" is the next power of two from 256 on. "type" and "attributes" are
// what the store says of it. One that is "live" is a live extent; in a sealed
// store it lies in clear, which "plain" says is meant.
//
// With "disk" in the store's part, the image is a machine's disk, with a guest's
// disk of that size, and the store in its tail; "size" is the window's then.
//
// In every string of a blob, "${name}" stands for a value, "${name+1}" for one
// that is so much further on, "${n:04}" for one with zeros in front, and "$$"
// for a dollar sign. The value n counts the machines from 1.
package machine

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

const (
	maxBlobs = 1 << 12
	maxSize  = 48 << 20 // bytes of a blob
	maxTotal = 1 << 30  // bytes of a machine's blobs

	// MaxCount is the most machines that one manifest makes at a time.
	MaxCount = 1 << 20
)

//go:embed schema.json
var ownSchema []byte

// Schema is the JSON Schema, of draft 2020-12, of a manifest without comments.
func Schema() []byte { return bytes.Clone(ownSchema) }

// A Manifest says what each of any number of machines has. It is never
// changed.
type Manifest struct {
	store  Store
	values []value
	blobs  []entry
}

// Store is how the stores are made. Sizes are in bytes; 0 is for nvtool to
// choose.
type Store struct {
	UUID      string // with values in it; empty to derive it from the content
	Time      time.Time
	Format    string
	Size      int64
	MaxSize   int64
	Disk      int64 // the guest's; 0 makes an image with a store alone
	MaxDisk   int64 // that it can grow to
	SealNames bool
}

// An entry is a blob as the manifest has it.
type entry struct {
	name string
	path string
	o    spec.Object
}

// A Machine is what one store gets.
type Machine struct {
	N      int
	Values map[string]string
	Blobs  []Blob // in the order of their names
	Store  Store
	UUID   [16]byte

	// Seed is a hash of all of it, for a reproducible store.
	Seed [32]byte
}

// A Blob is what a store keeps.
type Blob struct {
	Name       string
	Content    []byte
	Type       string
	Attributes [][2]string
	Live       bool          // a live extent
	Plain      bool          // which may lie in a sealed store in clear
	Warnings   []vpd.Warning // of packing its spec
}

// Parse reads a manifest. Its errors are of kind vpd.ErrSpec.
func Parse(text []byte) (*Manifest, error) {
	o, err := spec.Read(text)
	if err != nil {
		return nil, err
	}
	if err := o.Only("", "$schema", "manifest", "machine", "store", "values", "blobs"); err != nil {
		return nil, err
	}
	if _, ok := o.Get("manifest"); !ok {
		return nil, spec.Errorf("manifest", `missing: "manifest": 1 says that this is one`)
	}
	if v, err := form.Uint(o, "", "manifest", 1<<31, 0); err != nil || v != 1 {
		return nil, spec.Errorf("manifest", "want 1, the version that this program knows")
	}
	m := &Manifest{}
	if raw, ok := o.Get("machine"); ok {
		name, err := spec.String("machine", raw)
		if err != nil {
			return nil, err
		}
		t := ByName(name)
		if t == nil {
			return nil, spec.Errorf("machine", "no template %q; nvtool vpd template ls lists them", name)
		}
		if m, err = Parse(t.Manifest()); err != nil {
			return nil, err
		}
	}
	if err := m.parseStore(o); err != nil {
		return nil, err
	}
	if err := m.parseValues(o); err != nil {
		return nil, err
	}
	if err := m.parseBlobs(o); err != nil {
		return nil, err
	}
	return m, nil
}

func (m *Manifest) parseStore(whole spec.Object) error {
	raw, ok := whole.Get("store")
	if !ok {
		return nil
	}
	o, err := spec.ParseObject("store", raw)
	if err != nil {
		return err
	}
	if err := o.Only("store", "uuid", "time", "format", "size", "max_size", "disk", "max_disk", "seal_names"); err != nil {
		return err
	}
	for _, member := range o {
		path := "store." + member.Name
		if member.Name == "seal_names" {
			if m.store.SealNames, err = spec.Bool(path, member.Value); err != nil {
				return err
			}
			continue
		}
		if to := map[string]*int64{"size": &m.store.Size, "max_size": &m.store.MaxSize, "disk": &m.store.Disk, "max_disk": &m.store.MaxDisk}[member.Name]; to != nil {
			if *to, err = bytesOf(path, member.Value, 1<<50); err != nil {
				return err
			}
			continue
		}
		s, err := spec.String(path, member.Value)
		if err != nil {
			return err
		}
		switch member.Name {
		case "uuid":
			m.store.UUID = s
		case "time":
			if m.store.Time, err = time.Parse(time.RFC3339, s); err != nil || m.store.Time.Year() < 1950 {
				return spec.Errorf(path, "want a time such as 2026-01-31T12:00:00Z")
			}
		case "format":
			if m.store.Format = s; s != "qcow2" && s != "raw" {
				return spec.Errorf(path, "%q, want qcow2 or raw", s)
			}
		}
	}
	switch {
	case m.store.MaxDisk != 0 && m.store.Disk == 0:
		return spec.Errorf("store.max_disk", "needs a disk")
	case m.store.MaxSize != 0 && m.store.Disk != 0:
		return spec.Errorf("store.max_size", "a machine's disk has a window for the store, of which size is the size")
	}
	return nil
}

// bytesOf reads a number of bytes, of which a string may end in k, M, G or T.
func bytesOf(path string, raw json.RawMessage, max uint64) (int64, error) {
	if s, err := spec.String(path, raw); err == nil && len(s) > 1 {
		if i := strings.IndexByte("KMGT", s[len(s)-1]&^0x20); i >= 0 {
			shift := 10 * (i + 1)
			n, err := spec.Uint(path, json.RawMessage(`"`+s[:len(s)-1]+`"`), max>>shift)
			return int64(n) << shift, err
		}
	}
	n, err := spec.Uint(path, raw, max)
	return int64(n), err
}

func (m *Manifest) parseBlobs(whole spec.Object) error {
	raw, ok := whole.Get("blobs")
	if !ok {
		return nil
	}
	o, err := spec.ParseObject("blobs", raw)
	if err != nil {
		return err
	}
	for _, member := range o {
		m.blobs = slices.DeleteFunc(m.blobs, func(e entry) bool { return e.name == member.Name })
		if string(member.Value) == "null" {
			continue
		}
		path := "blobs[" + fmt.Sprintf("%q", member.Name) + "]"
		b, err := spec.ParseObject(path, member.Value)
		if err != nil {
			return err
		}
		if err := b.Only(path, "spec", "file", "template", "values", "size", "fill", "type", "attributes", "about", "live", "plain"); err != nil {
			return err
		}
		m.blobs = append(m.blobs, entry{member.Name, path, b})
	}
	if len(m.blobs) > maxBlobs {
		return spec.Errorf("blobs", "%d, want at most %d", len(m.blobs), maxBlobs)
	}
	slices.SortFunc(m.blobs, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	return nil
}

// Options say how machines are made. ReadFile reads what a manifest names;
// without it, that is refused.
type Options struct {
	// Values come before those of the manifest.
	Values map[string]string

	// ReadFile reads a file of at most limit bytes.
	ReadFile func(name string, limit int) ([]byte, error)
}

// Make makes machine n, from 1 on.
func (m *Manifest) Make(n int, opts *Options) (*Machine, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	if n < 1 || n > MaxCount {
		return nil, spec.Errorf("", "machine %d: want 1 to %d", n, MaxCount)
	}
	scope, err := m.scope(n, o.Values)
	if err != nil {
		return nil, err
	}
	x := &Machine{N: n, Values: scope.all, Store: m.store}
	total := 0
	for _, e := range m.blobs {
		b, err := e.make(scope, &o)
		if err != nil {
			return nil, err
		}
		if total += len(b.Content); total > maxTotal {
			return nil, spec.Errorf("blobs", "more than %d bytes in all", maxTotal)
		}
		x.Blobs = append(x.Blobs, *b)
	}
	x.Seed = x.hash()
	if err := x.identify(scope); err != nil {
		return nil, err
	}
	return x, nil
}

// hash covers all that goes into a store, and the values, since no two
// machines of a manifest may have the same seed.
func (x *Machine) hash() [32]byte {
	h := sha256.New()
	add := func(p []byte) {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(p))))
		h.Write(p)
	}
	add([]byte("nvstore machine 1"))
	add(fmt.Appendf(nil, "%s %d %d %d %s", x.Store.Format, x.Store.Size, x.Store.MaxSize, x.Store.Time.Unix(), x.Store.UUID))
	if x.Store.Disk != 0 {
		add(fmt.Appendf(nil, "disk %d %d", x.Store.Disk, x.Store.MaxDisk))
	}
	for _, name := range slices.Sorted(maps.Keys(x.Values)) {
		add([]byte(name))
		add([]byte(x.Values[name]))
	}
	for _, b := range x.Blobs {
		add([]byte(b.Name))
		add([]byte(b.Type))
		if b.Live {
			add([]byte("live"))
		}
		for _, a := range b.Attributes {
			add([]byte(a[0]))
			add([]byte(a[1]))
		}
		add(b.Content)
	}
	return [32]byte(h.Sum(nil))
}

// identify sets the UUID: the manifest's, or one of version 8 (RFC 9562) that
// the content gives.
func (x *Machine) identify(s *scope) error {
	if x.Store.UUID == "" {
		sum := sha256.Sum256(append([]byte("UUID"), x.Seed[:]...))
		copy(x.UUID[:], sum[:])
		x.UUID[6], x.UUID[8] = x.UUID[6]&0x0f|0x80, x.UUID[8]&0x3f|0x80
		return nil
	}
	text, err := s.expand("store.uuid", x.Store.UUID)
	if err != nil {
		return err
	}
	id, err := spec.Hex(text)
	if err != nil || len(id) != 16 {
		return spec.Errorf("store.uuid", "%q, want a UUID such as 01234567-89ab-4def-8123-456789abcdef", text)
	}
	copy(x.UUID[:], id)
	return nil
}
