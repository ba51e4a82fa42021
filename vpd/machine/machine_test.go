package machine_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/formats"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/machine"
)

func parse(t testing.TB, text string) *machine.Manifest {
	m, err := machine.Parse([]byte(text))
	require.NoError(t, err)
	return m
}

func make1(t testing.TB, text string, n int, values map[string]string) *machine.Machine {
	x, err := parse(t, text).Make(n, &machine.Options{Values: values, ReadFile: files(map[string]string{
		"raw.jsonc": `/* comment */ {"format": "raw", "size": 2, "patches": [{"offset": 0, "type": "text", "data": "${n}"}]}`, "bin-1": "\x01\x02", "bin-2": "\x03"})})
	require.NoError(t, err)
	return x
}

func files(m map[string]string) func(string, int) ([]byte, error) {
	return func(name string, _ int) ([]byte, error) {
		if s, ok := m[name]; ok {
			return []byte(s), nil
		}
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
}

// Every template makes machines, of good images in their formats, without a
// warning, and of another serial number and address each.
func TestTemplates(t *testing.T) {
	names := map[string]bool{}
	for _, tm := range machine.Templates() {
		require.False(t, names[tm.Name], tm.Name)
		names[tm.Name] = true
		require.NotEmpty(t, tm.About)
		text := string(tm.Manifest())
		if tm.Blob {
			text = `{"manifest": 1, "machine": "ast2600-evb", "values": {"role": "X"}, "blobs": {"blob": {"template": "` + tm.Name + `"}}}`
		}
		require.NoError(t, formtest.ValidateBy("manifest", machine.Schema(), []byte(text)), tm.Name)
		m := parse(t, text)
		seen := map[[16]byte]bool{}
		for n := 1; n <= 3; n++ {
			x, err := m.Make(n, nil)
			require.NoError(t, err, tm.Name)
			require.NotEmpty(t, x.Blobs)
			require.False(t, seen[x.UUID], tm.Name)
			seen[x.UUID] = true
			for _, b := range x.Blobs {
				require.Empty(t, b.Warnings, "%s %s", tm.Name, b.Name)
				if b.Type == "" {
					require.Empty(t, bytes.Trim(b.Content, "\xff"))
					continue
				}
				f := formats.ByName(strings.TrimPrefix(b.Type, "vpd/"))
				require.Empty(t, f.Verify(b.Content), "%s %s", tm.Name, b.Name)
			}
			size, count := tm.Size()
			if !tm.Blob {
				require.Len(t, x.Blobs, count)
				sum := 0
				for _, b := range x.Blobs {
					if strings.HasPrefix(b.Name, "i2c/") {
						sum += len(b.Content)
					}
				}
				require.Equal(t, int(size), sum)
			}
		}
	}
	require.Nil(t, machine.ByName("none"))
	require.Nil(t, machine.ByName("fru"), "that is a blob's")
}

func TestManifest(t *testing.T) {
	const text = `{
		"manifest": 1, // comment
		"values": {
			"serial": {"first": "NVS0098", "last": "NVS0101"},
			"mac": {"first": "52:54:00:00:00:FE", "step": 2},
			"name": "vm-${serial}-${n:03}",
		},
		"blobs": {
			"c/inline": {"spec": {"format": "fru", "board": {"serial_number": "${serial}", "part_number": "$$${name}"}, "multirecord": [{"type": "0xc0", "data": {"type": "hex", "data": "${mac+1}"}}]}},
			"a/file": {"file": "bin-${n}", "type": "x-${n}", "size": 4, "fill": "0x00", "attributes": {"mac": "${mac}"}},
			"b/spec": {"spec": "raw.jsonc", "size": "eeprom"},
			"d/blank": {"size": "1K"},
			"e/values": {"spec": {"format": "raw", "size": 20, "patches": [{"offset": 0, "type": "text", "data": "${own} ${n}"}]}, "values": {"own": "<${serial}>"}},
		},
	}`
	require.NoError(t, formtest.ValidateBy("manifest", machine.Schema(), []byte(text)))
	x := make1(t, text, 2, nil)
	require.Equal(t, map[string]string{"n": "2", "serial": "NVS0099", "mac": "52:54:00:00:01:00", "name": "vm-NVS0099-002"}, x.Values)
	var names []string
	content := map[string]string{}
	for _, b := range x.Blobs {
		names = append(names, b.Name)
		content[b.Name] = string(b.Content)
	}
	require.Equal(t, []string{"a/file", "b/spec", "c/inline", "d/blank", "e/values"}, names)
	require.Equal(t, "\x03\x00\x00\x00", content["a/file"])
	require.Equal(t, "x-2", x.Blobs[0].Type)
	require.Equal(t, [][2]string{{"mac", "52:54:00:00:01:00"}}, x.Blobs[0].Attributes)
	require.Equal(t, "2"+strings.Repeat("\xff", 255), content["b/spec"])
	require.Equal(t, "vpd/raw", x.Blobs[1].Type)
	require.Equal(t, strings.Repeat("\xff", 1024), content["d/blank"])
	require.Contains(t, content["e/values"], "<NVS0099> 2\xff")
	spec, _, err := formats.ByName("fru").Parse(x.Blobs[2].Content)
	require.NoError(t, err)
	require.Contains(t, string(spec), `"serial_number": "NVS0099"`)
	require.Contains(t, string(spec), `"part_number": "$vm-NVS0099-002"`)
	require.Contains(t, string(spec), `"0x005452"`)
	require.Contains(t, string(spec), `"000101"`)
	s, err := x.Expand("${name}.qcow2")
	require.NoError(t, err)
	require.Equal(t, "vm-NVS0099-002.qcow2", s)

	// What is given comes first, and isn't counted up.
	x = make1(t, text, 2, map[string]string{"serial": "Z", "more": "m"})
	require.Equal(t, "vm-Z-002", x.Values["name"])

	// The range ends.
	_, err = parse(t, text).Make(5, nil)
	require.ErrorIs(t, err, vpd.ErrSpec)
	require.ErrorContains(t, err, `end at "NVS0101"`)
}

// The same machine has the same UUID and seed; whatever is another changes
// both.
func TestIdentity(t *testing.T) {
	one := func(blob, store string) *machine.Machine {
		return make1(t, `{"manifest": 1, "store": {`+store+`}, "blobs": {"x": `+blob+`}}`, 1, nil)
	}
	a := one(`{"size": 4}`, "")
	require.Equal(t, a, one(`{"size": "0x4"}`, ""))
	require.Equal(t, byte(0x80), a.UUID[6]&0xf0)
	require.Equal(t, byte(0x80), a.UUID[8]&0xc0)
	for _, b := range []*machine.Machine{one(`{"size": 5}`, ""), one(`{"size": 4, "fill": 0}`, ""), one(`{"size": 4, "type": "t"}`, ""),
		one(`{"size": 4, "about": "t"}`, ""), one(`{"size": 4}`, `"size": "1M"`), one(`{"size": 4}`, `"time": "2026-01-31T12:00:00Z"`)} {
		require.NotEqual(t, a.UUID, b.UUID)
		require.NotEqual(t, a.Seed, b.Seed)
	}
	c := one(`{"size": 4}`, `"uuid": "01234567-89ab-4def-8123-45678900000${n}"`)
	require.Equal(t, [16]byte{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0x4d, 0xef, 0x81, 0x23, 0x45, 0x67, 0x89, 0, 0, 1}, c.UUID)
}

func TestOverTemplate(t *testing.T) {
	x := make1(t, `{"manifest": 1, "machine": "fby35-bmc", "values": {"product": "Mine"}, "blobs": {
		"i2c/4-0051/eeprom": null, "i2c/6-0051/eeprom": {"file": "bin-1"}, "more": {"size": 1}}}`, 1, nil)
	require.Len(t, x.Blobs, 5)
	spec, _, err := formats.ByName("fru").Parse(x.Blobs[0].Content)
	require.NoError(t, err)
	require.Contains(t, string(spec), `"product_name": "Mine"`)
	require.Equal(t, "\x01\x02", string(x.Blobs[2].Content))
}

func TestCounting(t *testing.T) {
	for first, want := range map[string]string{
		"A9": "full", "A09": "A10", "9": "full", "x-099-y0099": "x-099-y0100", "52:54:00:00:00:ff": "52:54:00:00:01:00", "52-54-00-00-00-0F": "52-54-00-00-00-10",
		"ff:ff:ff:ff:ff:ff": "full", "01234567-89ab-4def-8123-00000000ffff": "01234567-89ab-4def-8123-000000010000", "abc": "no number", "": "no number",
		"99999999999999999999999999999998": "99999999999999999999999999999999",
	} {
		m := parse(t, fmt.Sprintf(`{"manifest": 1, "values": {"v": {"first": %q}}}`, first))
		x, err := m.Make(2, nil)
		switch want {
		case "full":
			require.ErrorContains(t, err, "has no room", first)
		case "no number":
			require.ErrorContains(t, err, "ends in no number", first)
		default:
			require.NoError(t, err)
			require.Equal(t, want, x.Values["v"])
		}
		_, err = m.Make(1, nil)
		require.NoError(t, err)
	}
}

func TestRefused(t *testing.T) {
	for _, c := range [][2]string{
		{`{}`, "manifest: missing"}, {`{"manifest": 2}`, "want 1"}, {`{"manifest": 1, "x": 1}`, "unknown"}, {`[]`, "object"}, {`{"manifest": 1, "machine": "none"}`, "template ls"},
		{`{"manifest": 1, "machine": 1}`, "string"}, {`{"manifest": 1, "store": {"time": "yesterday"}}`, "store.time"}, {`{"manifest": 1, "store": {"format": "vmdk"}}`, "want qcow2 or raw"},
		{`{"manifest": 1, "store": {"size": "1P"}}`, "store.size"}, {`{"manifest": 1, "store": {"x": 1}}`, "unknown"}, {`{"manifest": 1, "store": {"seal_names": 1}}`, "true or false"},
		{`{"manifest": 1, "values": {"n": "1"}}`, "is not n"}, {`{"manifest": 1, "values": {"a b": "1"}}`, "letters"}, {`{"manifest": 1, "values": {"a": 1}}`, "want a string"},
		{`{"manifest": 1, "values": {"a": {"step": 1}}}`, "first: missing"}, {`{"manifest": 1, "values": {"a": {"first": "1", "step": 0}}}`, "1 or more"},
		{`{"manifest": 1, "blobs": {"b": {"nofile": 1}}}`, "unknown"}, {`{"manifest": 1, "blobs": {"b": 1}}`, "object"}, {`{"manifest": 1, "blobs": []}`, "object"},
	} {
		m, err := machine.Parse([]byte(c[0]))
		require.ErrorIs(t, err, vpd.ErrSpec, c[0])
		require.ErrorContains(t, err, c[1])
		require.Nil(t, m)
	}
	for _, c := range [][2]string{
		{`{}`, "want one of spec, file and template"}, {`{"spec": {"format": "raw", "size": 1}, "file": "bin-1"}`, "want one of"},
		{`{"spec": {"format": "none"}}`, `spec.format: unknown`}, {`{"spec": {"format": "raw"}}`, "spec.size: missing"}, {`{"spec": 1}`, "object"},
		{`{"spec": {"format": "raw", "size": 1}, "size": 0}`, "has 1 bytes"}, {`{"size": "eprom"}`, "size"}, {`{"file": "bin-1", "fill": 1}`, "needs a size"},
		{`{"template": "none"}`, "no template"}, {`{"template": "../fru"}`, "no template"}, {`{"template": "fru"}`, "no value"}, {`{"size": 1, "type": "${none}"}`, "no value"},
		{`{"size": 1, "type": "$n"}`, "dollar sign"}, {`{"size": 1, "type": "${n"}`, "dollar sign"}, {`{"size": 1, "type": "${m+1}", "values": {"m": "x"}}`, "no number"},
		{`{"size": "49M"}`, "size"}, {`{"size": 1, "type": 1}`, "string"}, {`{"size": 1, "attributes": {"a": 1}}`, "string"}, {`{"size": 1, "about": 1}`, "string"},
		{`{"spec": {"format": "fru", "board": {"serial_number": "Ä"}}}`, `blobs["b"].spec.board.serial_number`},
	} {
		x, err := parse(t, `{"manifest": 1, "blobs": {"b": `+c[0]+`}}`).Make(1, &machine.Options{ReadFile: files(map[string]string{"bin-1": "x"})})
		require.ErrorIs(t, err, vpd.ErrSpec, c[0])
		require.ErrorContains(t, err, c[1])
		require.Nil(t, x)
	}
	m := parse(t, `{"manifest": 1, "blobs": {"b": {"file": "none"}}}`)
	_, err := m.Make(1, &machine.Options{ReadFile: files(nil)})
	require.ErrorIs(t, err, fs.ErrNotExist)
	_, err = m.Make(1, nil)
	require.ErrorIs(t, err, vpd.ErrSpec)
	_, err = m.Make(0, nil)
	require.Error(t, err)
	_, err = m.Make(1, &machine.Options{Values: map[string]string{"n": "x"}})
	require.Error(t, err)
	_, err = parse(t, `{"manifest": 1, "store": {"uuid": "x"}}`).Make(1, nil)
	require.ErrorContains(t, err, "want a UUID")
	// Values can't grow without bound.
	grow := `{"manifest": 1, "values": {"a0": "0123456789"`
	for i := range 12 {
		grow += fmt.Sprintf(`, "a%d": "%s"`, i+1, strings.Repeat(fmt.Sprintf("${a%d}", i), 10))
	}
	_, err = parse(t, grow+`}}`).Make(1, nil)
	require.ErrorContains(t, err, "take more than")
}

// The fixture is as its schema says, and makes machines.
func TestFixture(t *testing.T) {
	text, err := os.ReadFile("../../fixtures/machine/bmc.jsonc")
	require.NoError(t, err)
	require.NoError(t, formtest.ValidateBy("manifest", machine.Schema(), text))
	require.Error(t, formtest.ValidateBy("manifest", machine.Schema(), []byte(`{"manifest": 1, "blobs": {"b": {}}}`)))
	// And the parser agrees with it about machines' disks and live extents.
	for text, good := range map[string]bool{
		`{"manifest": 1, "store": {"disk": "1G", "max_disk": "1T"}, "blobs": {"b": {"size": 1, "live": true, "plain": true}}}`: true,
		`{"manifest": 1, "blobs": {"b": {"size": 1, "live": false}}}`:                                                          true,
		`{"manifest": 1, "store": {"max_disk": "1T"}}`:                                                                         false,
		`{"manifest": 1, "store": {"disk": 512, "max_size": "1T"}}`:                                                            false,
		`{"manifest": 1, "blobs": {"b": {"size": 1, "plain": true}}}`:                                                          false,
		`{"manifest": 1, "blobs": {"b": {"size": 1, "live": 1}}}`:                                                              false,
	} {
		require.Equal(t, good, formtest.ValidateBy("manifest", machine.Schema(), []byte(text)) == nil, text)
		m, err := machine.Parse([]byte(text))
		if err == nil {
			_, err = m.Make(1, nil)
		}
		require.Equal(t, good, err == nil, "%s: %v", text, err)
	}
	m, err := machine.Parse(text)
	require.NoError(t, err)
	for n := range 3 {
		x, err := m.Make(n+1, nil)
		require.NoError(t, err)
		require.Len(t, x.Blobs, 7)
	}
}

// No manifest makes Parse or Make panic or take memory without bound.
func FuzzManifest(fz *testing.F) {
	text, err := os.ReadFile("../../fixtures/machine/bmc.jsonc")
	require.NoError(fz, err)
	fz.Add(text)
	fz.Add([]byte(`{"manifest": 1, "values": {"a": {"first": "52:54:00:00:00:00", "step": 4294967296}}, "blobs": {"b": {"size": "eeprom", "type": "${a+999999999:99}"}}}`))
	fz.Fuzz(func(t *testing.T, text []byte) {
		m, err := machine.Parse(text)
		if err != nil {
			require.ErrorIs(t, err, vpd.ErrSpec)
			require.Nil(t, m)
			return
		}
		for _, n := range []int{1, 77, machine.MaxCount} {
			x, err := m.Make(n, &machine.Options{ReadFile: files(nil)})
			if err != nil {
				require.True(t, errors.Is(err, vpd.ErrSpec) || errors.Is(err, fs.ErrNotExist), "%v", err)
				continue
			}
			total := 0
			for _, b := range x.Blobs {
				total += len(b.Content)
			}
			if total > 1<<20 {
				break // it would be slow, and find nothing more
			}
			again, err := m.Make(n, &machine.Options{ReadFile: files(nil)})
			require.NoError(t, err)
			require.Equal(t, x, again)
		}
	})
}
