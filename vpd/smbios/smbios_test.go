package smbios_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/smbios"
)

var f = smbios.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "smbios/"+name) }

// dmidecode shows a dump as dmidecode reads it.
func dmidecode(t testing.TB, image []byte, args ...string) string {
	path := filepath.Join(t.TempDir(), "dump")
	require.NoError(t, os.WriteFile(path, image, 0o600))
	out, err := exec.Command("dmidecode", append([]string{"--from-dump", path}, args...)...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

// dmidecode reads our fields, with both kinds of entry points.
func TestDmidecodeReadsOurFields(t *testing.T) {
	for bits, says := range map[string]string{"64": "SMBIOS 3.3.0 present.", "32": "SMBIOS 3.3 present."} {
		spec := bytes.Replace(read(t, "server.smbios.jsonc"), []byte(`"bits": 64`), []byte(`"bits": `+bits), 1)
		image, warnings, err := f.Pack(spec)
		require.NoError(t, err)
		require.Empty(t, warnings)
		require.Empty(t, f.Verify(image))
		require.True(t, f.Detect(image))
		formtest.CheckAny(t, f, image)
		for key, want := range map[string]string{
			"bios-vendor": "nvstore", "bios-version": "1.0.2", "bios-release-date": "03/05/2024", "bios-revision": "1.0",
			"system-manufacturer": "nvstore", "system-product-name": "Example Server", "system-version": "rev 2",
			"system-serial-number": "SRV-0042", "system-uuid": "01234567-89ab-4def-8123-456789abcdef", "system-sku-number": "NVS-1U",
			"system-family": "Example", "baseboard-manufacturer": "nvstore", "baseboard-product-name": "Example Main Board",
			"baseboard-serial-number": "NVS0123456789", "baseboard-asset-tag": "ASSET-0042", "chassis-type": "Rack Mount Chassis",
			"chassis-serial-number": "CH-0042", "chassis-asset-tag": "ASSET-0043", "processor-manufacturer": "QEMU", "processor-version": "virtual",
		} {
			require.Equal(t, want+"\n", dmidecode(t, image, "-s", key), "%s", key)
		}
		out := dmidecode(t, image)
		for _, line := range []string{says, "ROM Size: 16 MB", "Type: Motherboard", "Location In Chassis: bay 1", "Height: 1 U", "Number Of Power Cords: 2",
			"SKU Number: NVS-CH", "Core Count: 4", "Thread Count: 8", "64-bit capable", "String 1: io.example:role=db", "String 2: row 4",
			"Error Correction Type: Multi-bit ECC", "Maximum Capacity: 16 GB", "Size: 16 GB", "Locator: DIMM 0", "Type: DDR4", "Speed: 3200 MT/s",
			"Part Number: NVS-16G", "Configured Memory Speed: 2933 MT/s", "a vendor's own", "End Of Table"} {
			require.Contains(t, out, line+"\n")
		}
		require.NotContains(t, out, "BAD INDEX")
		require.NotContains(t, out, "TRUNCATED")
		require.NotContains(t, out, "Wrong")
	}
}

// dmidecode doesn't find an entry point with a wrong checksum, and does once
// Fix has mended it.
func TestDmidecodeAgreesOnTheChecksums(t *testing.T) {
	for name, offs := range map[string][]int{"laptop.bin": {5, 9, 0x10}, "server32.bin": {4, 8, 0x15, 0x1e}} {
		good := read(t, name)
		require.Empty(t, f.Verify(good))
		require.Contains(t, dmidecode(t, good), "present.")
		for _, off := range offs {
			bad := bytes.Clone(good)
			bad[off] ^= 0x40
			require.NotContains(t, dmidecode(t, bad), "present.", "%s %#x", name, off)
			fixed, changes, err := f.Fix(bad)
			require.NoError(t, err)
			require.NotEmpty(t, changes)
			if off == 5 || off == 4 || off == 0x15 {
				require.Equal(t, good, fixed)
			}
			if off != 0x10 { // the address is still wrong
				require.Contains(t, dmidecode(t, fixed), "present.")
			}
		}
	}
}

func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "smbios") {
		require.Equal(t, name != "bad.bin", f.Detect(read(t, name)))
	}
	var got []string
	for _, p := range f.Verify(read(t, "bad.bin")) {
		got = append(got, p.String())
	}
	require.Equal(t, []string{
		"entry_point at byte 0x15: wrong intermediate_checksum: got 0xce, want 0x4e",
		"entry_point at byte 0x4: wrong checksum: got 0x47, want 0x46",
		"structures[0] bios.vendor at byte 0x24: is string 9, and there are 3",
	}, got)
	require.Contains(t, dmidecode(t, fixed(t, read(t, "bad.bin"))), "Vendor: <BAD INDEX>")

	// A dump is an entry point in front of the tables. Of what version
	// those are, and so how long a structure should be, they don't say.
	structures := func(name string) []map[string]any {
		text, _, err := f.Parse(read(t, name))
		require.NoError(t, err)
		var spec struct{ Structures []map[string]any }
		require.NoError(t, json.Unmarshal(text, &spec))
		for _, s := range spec.Structures {
			delete(s, "length")
		}
		return spec.Structures
	}
	require.Equal(t, structures("server32.bin"), structures("tables.bin"))
}

func fixed(t *testing.T, image []byte) []byte {
	fixed, _, err := f.Fix(image)
	require.NoError(t, err)
	return fixed
}

func TestStructures(t *testing.T) {
	text, warnings, err := f.Parse(read(t, "server32.bin"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	var spec struct{ Structures []map[string]any }
	require.NoError(t, json.Unmarshal(text, &spec))
	s := spec.Structures
	require.Equal(t, "S-0042", s[1]["serial_number"])
	require.Equal(t, "03020100-0504-0706-0809-0a0b0c0d0e0f", s[1]["uuid"])
	// Two fields share a string, so they are numbers.
	require.Equal(t, []any{"Same", "Board"}, s[2]["strings"])
	require.Equal(t, []any{1.0, 2.0, 1.0}, []any{s[2]["manufacturer"], s[2]["product_name"], s[2]["serial_number"]})
	// The chassis has an element, so where its last field lies isn't known.
	require.NotContains(t, s[3], "sku_number")
	require.Equal(t, map[string]any{"type": "hex", "data": "82000100"}, s[3]["extra"])
	require.Equal(t, "C-1", s[3]["serial_number"])
	require.Equal(t, []any{"first", "second"}, s[4]["strings"])
	require.NotContains(t, s[4], "count")
	require.Equal(t, 200.0, s[5]["type"])

	// Before version 2.6, a UUID is as it is.
	text, _, err = f.Parse(bytes.Replace(read(t, "server32.bin"), []byte{2, 8}, []byte{2, 5}, 1))
	require.NoError(t, err)
	require.Contains(t, string(text), `"uuid": "00010203-0405-0607-0809-0a0b0c0d0e0f"`)
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "server32.bin"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 0x18, Len: 4, Name: "entry_point.address", Value: "0x00000020", CoveredBy: "entry_point.intermediate_checksum"}, byName["entry_point.address"])
	require.Equal(t, "S-0042", byName["structures[1] system.serial_number"].Value)
	require.Equal(t, "S-0042", byName["structures[1] system.strings[2]"].Value)
	require.Equal(t, "0x82000100", byName["structures[3] chassis.data"].Value)
}

func TestSpecsRefused(t *testing.T) {
	s := func(members string) string { return `"structures": [{` + members + `}]` }
	ep := func(members string) string {
		return `"entry_point": {"version": "3.3", ` + members + `}, "structures": [{"type": "end"}]`
	}
	formtest.Refused(t, f, `{"format": "smbios", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "smbios"`},
		{"unknown member", `"tables": []`, "tables: unknown"},
		{"no structures", `"entry_point": {"version": "3.3"}`, "would not be SMBIOS"},
		{"no type", s(`"handle": 1`), "structures[0].type: missing"},
		{"unknown name", s(`"type": "cpu"`), "or one of bios, system"},
		{"type 256", s(`"type": 256`), "want an integer from 0 to 255"},
		{"handle 65536", s(`"type": 200, "handle": 65536`), "from 0 to 65535"},
		{"field of another type", s(`"type": "system", "vendor": "x"`), "structures[0].vendor: unknown"},
		{"field of an unknown type", s(`"type": 200, "vendor": "x"`), "structures[0].vendor: unknown"},
		{"data of a known type", s(`"type": "system", "data": "x"`), "structures[0].data: unknown"},
		{"data of 252", s(`"type": 200, "data": {"type": "u8", "data": 0, "count": 252}`), "from 0 to 251"},
		{"number too large", s(`"type": "bios", "rom_size": 256`), "from 0 to 255"},
		{"text for a number", s(`"type": "bios", "rom_size": "big"`), "want an integer"},
		{"number for text", s(`"type": "bios", "vendor": 1`), "vendor: want a string"},
		{"text for a string's number", s(`"type": "bios", "vendor": "x", "strings": ["x"]`), "vendor: want an integer"},
		{"not ASCII", s(`"type": "bios", "vendor": "é"`), "not printable ASCII"},
		{"zero in a string", s(`"type": "bios", "vendor": {"type": "u8", "data": 0}`), "would end it"},
		{"empty string", s(`"type": "oem_strings", "strings": ["a", ""]`), "strings[1]: is empty"},
		{"two zeros", s(`"type": "oem_strings", "strings": {"type": "hex", "data": "61000062"}`), "two zeros, which would end them, at byte 1"},
		{"UUID short", s(`"type": "system", "uuid": "0123"`), "want a UUID"},
		{"length too small", s(`"type": "bios", "vendor": "x", "length": 4`), "4, and its fields take 5 bytes"},
		{"length and extra", s(`"type": "bios", "length": 40, "extra": "x"`), "can't stand beside extra"},
		{"extra too long", s(`"type": "bios", "extra": {"type": "u8", "data": 0, "count": 255}`), "would have 259 bytes"},
		{"SKU behind elements", s(`"type": "chassis", "contained_count": 1, "contained_length": 3, "sku_number": "x"`), "lies behind the contained elements"},
		{"end in the middle", `"structures": [{"type": "end"}, {"type": 200}]`, "is the end, and more follow"},
		{"tail alone", s(`"type": "end"`) + `, "tail": "x"`, "needs an entry point"},
		{"version missing", `"entry_point": {"bits": 64}, "structures": [{"type": "end"}]`, "entry_point.version: missing"},
		{"version of three", `"entry_point": {"version": "3.3.0"}, "structures": [{"type": "end"}]`, "want one such as 3.3"},
		{"48 bits", ep(`"bits": 48`), "48, want 32 or 64"},
		{"count in 64 bits", ep(`"count": 1`), "count: unknown"},
		{"formatted area in 64 bits", ep(`"formatted_area": "x"`), "has none"},
		{"address elsewhere", ep(`"address": 24`), "no structure stands there"},
		{"address in the padding", ep(`"padding": {"type": "hex", "data": "0000000000000000c80400000000"}, "address": 32`), "would make 1 structures at 0x20 of 1 at 0x26"},
		{"table too large for 32 bits", `"entry_point": {"bits": 32, "version": "2.8"}, "structures": [{"type": "end"}], "tail": {"type": "u8", "data": 0, "count": 65536}`, "table_size: would be 65542"},
		{"trailing a structure", s(`"type": 200`) + `, "trailing": {"type": "hex", "data": "c80400000000"}`, "would make 2 structures"},
	})
}

func TestImagesRefused(t *testing.T) {
	good := read(t, "server32.bin")
	for name, image := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 64), "erased": bytes.Repeat([]byte{0xff}, 64), "the entry point alone": good[:0x1f],
		"the first structure cut": good[:0x28], "too long": append(bytes.Clone(good), make([]byte, smbios.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	ep := func(bits int, members, more string) string {
		return fmt.Sprintf(`"entry_point": {"bits": %d, "version": "2.8"%s}, "structures": [{"type": 200}, {"type": "end"}]%s`, bits, members, more)
	}
	s := func(members string) string { return `"structures": [{` + members + `}, {"type": "end"}]` }
	formtest.Irregular(t, f, `{"format": "smbios", `, []formtest.Case{
		{"checksum of 64 bits", ep(64, `, "checksum": 0`, ""), "entry_point at byte 0x5: wrong checksum: got 0x00"},
		{"checksum of 32 bits", ep(32, `, "checksum": 0`, ""), "entry_point at byte 0x4: wrong checksum: got 0x00"},
		{"length of 64 bits", ep(64, `, "length": 23`, ""), "entry_point.length at byte 0x6: is wrong: got 23, want 24"},
		{"length of 32 bits", ep(32, `, "length": 32`, ""), "entry_point.length at byte 0x5: is wrong: got 32, want 31"},
		{"count", ep(32, `, "count": 3`, ""), "entry_point.count at byte 0x1c: is wrong: got 3, want 2"},
		{"largest", ep(32, `, "largest": 5`, ""), "entry_point.largest at byte 0x8: is wrong: got 5, want 6"},
		{"table size", ep(32, `, "table_size": 13`, ""), "entry_point.table_size at byte 0x16: is wrong: got 13, want 12"},
		{"tail", ep(32, "", `, "tail": "x"`), "entry_point.table_size at byte 0x16: is wrong: got 13, want 12"},
		{"no end", `"structures": [{"type": 200}]`, "structures at byte 0x6: no structure of type 127 is the last: the table ends"},
		{"handle twice", `"structures": [{"type": 200, "handle": 5}, {"type": "end", "handle": 5}]`, "structures[1] end at byte 0x8: handle 0x0005 comes"},
		{"too short", s(`"type": "bios", "length": 17`), "structures[0] bios at byte 0x1: has 17 bytes, want at least 18"},
		{"no such string", s(`"type": "bios", "vendor": 2, "strings": ["x"]`), "bios.vendor at byte 0x4: is string 2, and there are 1"},
		{"string too many counted", s(`"type": "oem_strings", "count": 2, "strings": ["x"]`), "counts 2 strings, and has 1"},
		{"empty string", s(`"type": 200, "strings": {"type": "hex", "data": "0061"}`), "one of its strings is empty"},
		{"trailing", s(`"type": 200`) + `, "trailing": "x"`, "trailing at byte 0xc: 1 bytes behind"},
	})
	// Not irregular: the length that version 2.1 of the specification gave,
	// a maximum of the table's size that isn't reached, and one structure
	// that is large.
	for _, spec := range []string{ep(32, `, "length": 30`, ""), ep(64, `, "table_size": 4096`, ""), ep(64, "", `, "tail": {"type": "hex", "data": "0000"}`), ep(32, `, "largest": 100`, "")} {
		image, warnings, err := f.Pack([]byte(`{"format": "smbios", ` + spec + "}"))
		require.NoError(t, err)
		require.Empty(t, warnings)
		formtest.CheckAny(t, f, image)
	}
	// Two faults, since one checksum is in the other.
	image, warnings, err := f.Pack([]byte(`{"format": "smbios", ` + ep(32, `, "intermediate_checksum": 0, "checksum": 0`, "") + "}"))
	require.NoError(t, err)
	require.Len(t, warnings, 2)
	formtest.CheckAny(t, f, image)
}

// More strings than a field can refer to, and the largest spec of an image.
func TestManyStrings(t *testing.T) {
	table := append([]byte{200, 4, 0, 0}, bytes.Repeat([]byte{0x80, 0}, 300)...)
	formtest.CheckAny(t, f, append(table, 0, 127, 4, 1, 0, 0, 0))
	if testing.Short() {
		return
	}
	table = append([]byte{200, 4, 0, 0}, bytes.Repeat([]byte{0x80, 0}, smbios.MaxSize/2-8)...)
	formtest.RoundTrip(t, f, append(table, 0, 127, 4, 1, 0, 0, 0))
}

func TestRandomSpecs(t *testing.T) {
	str := rapid.StringMatching(`[ -~]{0,20}`)
	rapid.Check(t, func(t *rapid.T) {
		var list []map[string]any
		for i := range rapid.IntRange(0, 6).Draw(t, "structures") {
			var s map[string]any
			switch rapid.IntRange(0, 3).Draw(t, "kind") {
			case 0:
				s = map[string]any{"type": "system", "manufacturer": str.Draw(t, "manufacturer"), "serial_number": str.Draw(t, "serial"), "family": str.Draw(t, "family")}
			case 1:
				s = map[string]any{"type": "memory_device", "device_locator": str.Draw(t, "locator"), "part_number": str.Draw(t, "part"),
					"speed": rapid.Uint16().Draw(t, "speed"), "logical_size": rapid.Uint64().Draw(t, "logical")}
			case 2:
				s = map[string]any{"type": "oem_strings", "strings": rapid.SliceOfN(rapid.StringMatching(`[ -~]{1,20}`), 0, 5).Draw(t, "strings")}
			default:
				s = map[string]any{"type": rapid.IntRange(200, 255).Draw(t, "type"), "data": map[string]any{"type": "hex",
					"data": fmt.Sprintf("%x", rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "data"))}}
			}
			s["handle"] = i * 3
			list = append(list, s)
		}
		spec := map[string]any{"format": "smbios", "structures": append(list, map[string]any{"type": "end"})}
		if bits := rapid.SampledFrom([]int{0, 32, 64}).Draw(t, "bits"); bits > 0 {
			spec["entry_point"] = map[string]any{"bits": bits, "version": rapid.SampledFrom([]string{"2.1", "2.8", "3.0", "3.7"}).Draw(t, "version")}
			spec["size"] = rapid.IntRange(3000, 4000).Draw(t, "size")
		}
		text, err := json.Marshal(spec)
		require.NoError(t, err)
		image, warnings, err := f.Pack(text)
		require.NoError(t, err, "%s", text)
		require.Empty(t, warnings, "%s", text)
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, read(t, "server32.bin"))
	formtest.Damage(t, f, read(t, "tables.bin"))
}

func FuzzSMBIOS(fz *testing.F) {
	for _, name := range []string{"server32.bin", "tables.bin", "laptop.bin"} {
		fz.Add(read(fz, name))
	}
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "server.smbios.jsonc"))
	fz.Add([]byte(strings.ReplaceAll(`{"format": "smbios", "entry_point": {"bits": 32, "version": "2.1", "address": 32, "padding": "x", "largest": 9},
		"structures": [{"type": "chassis", "contained_count": 1, "contained_length": 2, "extra": "ab"}, {"type": 3, "length": 9, "strings": {"type": "hex", "data": "0061"}}],
		"tail": "x", "trailing": "abc", "size": 300, "fill": 1}`, "\n", "")))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
