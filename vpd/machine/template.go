package machine

import (
	"bytes"
	"embed"
	"fmt"
	"slices"
	"strings"

	"nvstore.dev/vpd/internal/spec"
)

//go:embed templates/*.jsonc
var files embed.FS

// A Template is a machine of QEMU's, of which the manifest gives all EEPROMs;
// or content for one blob.
type Template struct {
	Name   string
	About  string
	Blob   bool // it is for one blob
	rooms  []room
	layers []string // further blobs, as members of "blobs"
}

// A room is an EEPROM on an I2C bus.
type room struct {
	place string // 8-0050, or 4-0070/0-0050 behind channel 0 of a multiplexer
	size  int
	role  string // of a FRU inventory; empty if the EEPROM is blank
}

// Templates lists all: those of machines, then those of blobs.
func Templates() []Template {
	list := slices.Clone(machines)
	entries, err := files.ReadDir("templates")
	if err != nil {
		panic("internal error: " + err.Error())
	}
	for _, e := range entries {
		name := strings.TrimSuffix(e.Name(), ".jsonc")
		text := blobTemplate(name)
		about, _, _ := strings.Cut(strings.TrimPrefix(string(text), "// "), "\n")
		list = append(list, Template{Name: name, About: strings.TrimSuffix(about, "."), Blob: true})
	}
	return list
}

// ByName returns the template of a machine, or nil.
func ByName(name string) *Template {
	for i := range machines {
		if machines[i].Name == name {
			return &machines[i]
		}
	}
	return nil
}

func blobTemplate(name string) []byte {
	if strings.ContainsAny(name, "/\\.") {
		return nil
	}
	text, err := files.ReadFile("templates/" + name + ".jsonc")
	if err != nil {
		return nil
	}
	return text
}

// Manifest returns the manifest of a machine, or the spec for a blob, with
// comments.
func (t *Template) Manifest() []byte {
	if t.Blob {
		return blobTemplate(t.Name)
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, `// The %s, QEMU's -M %s.
{
  "manifest": 1,

  "values": {
    "serial": {"first": "NVS000001"}, // counts up from machine to machine
    "mac": {"first": "52:54:00:00:00:01"},
    "asset": "ASSET-${n:04}",
    "manufacturer": "QEMU",
    "product": %q,
    "part": "NVS-0001",
    "version": "1.0",
  },

  "blobs": {
`, t.About, t.Name, t.Name)
	for _, r := range t.rooms {
		fmt.Fprintf(&b, "    %q: {", "i2c/"+r.place+"/eeprom")
		if r.role != "" {
			fmt.Fprintf(&b, "\"template\": \"fru\", \"values\": {\"role\": %q}, ", r.role)
		}
		fmt.Fprintf(&b, "\"size\": %d},\n", r.size)
	}
	for _, l := range t.layers {
		b.WriteString("    " + l + ",\n")
	}
	b.WriteString("  },\n}\n")
	return b.Bytes()
}

// Format is the format of a blob's template.
func (t *Template) Format() string {
	if !t.Blob {
		return ""
	}
	name, err := spec.Format(blobTemplate(t.Name))
	if err != nil {
		panic("internal error: " + err.Error())
	}
	return name
}

// Size is how many bytes a machine's EEPROMs have, and Count how many there
// are.
func (t *Template) Size() (size int64, count int) {
	for _, r := range t.rooms {
		size += int64(r.size)
	}
	return size, len(t.rooms) + len(t.layers)
}
