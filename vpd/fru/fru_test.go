package fru_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/fru"
	"nvstore.dev/vpd/internal/formtest"
)

var f = fru.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "fru/"+name) }

// ipmiFRU shows an image as FreeIPMI reads it.
func ipmiFRU(t testing.TB, image []byte) string {
	path := filepath.Join(t.TempDir(), "fru.bin")
	require.NoError(t, os.WriteFile(path, image, 0o644))
	// Of most faults its exit status says nothing; of some it is 1.
	out, err := exec.Command("ipmi-fru", "--fru-file="+path).CombinedOutput()
	var exit *exec.ExitError
	require.True(t, err == nil || errors.As(err, &exit), "%v", err)
	return string(out)
}

// specWithoutBCD: FreeIPMI 1.6.10 reads BCD plus only if each upper digit is
// 0, since it masks that digit without shifting it.
func specWithoutBCD(t testing.TB) []byte {
	return bytes.Replace(read(t, "server.fru.jsonc"), []byte(`{"type": "bcd", "data": "2024-03.0501"}`), []byte(`"2024-03.0501"`), 1)
}

// BCD plus has the first character in the upper bits, as ipmitool reads it.
func TestBCD(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "server.fru.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Contains(t, string(image), "\x46\x20\x24\xb0\x3c\x05\x01")
	require.Empty(t, f.Verify(image))
	formtest.CheckAny(t, f, image)
}

func TestIPMIFRUReadsOurFields(t *testing.T) {
	image, warnings, err := f.Pack(specWithoutBCD(t))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 1024)
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	formtest.CheckAny(t, f, image)
	out := ipmiFRU(t, image)
	require.NotContains(t, out, "Error")
	var got []string
	for _, line := range strings.Split(out, "\n")[1:] {
		if line = strings.TrimSpace(line); line != "" {
			got = append(got, line)
		}
	}
	require.Equal(t, []string{
		"FRU Chassis Type: Rack Mount Chassis",
		"FRU Chassis Part Number: NVS-CH-01",
		"FRU Chassis Serial Number: 2024-03.0501",
		"FRU Chassis Custom Info: row 4",
		"FRU Chassis Custom Info: RACK_12",
		"FRU Board Manufacturing Date/Time: 03/05/24 - 14:30:00",
		"FRU Board Manufacturer: nvstore",
		"FRU Board Product Name: Example Main Board",
		"FRU Board Serial Number: NVS0123456789",
		"FRU Board Part Number: NVS-MB-1",
		"FRU FRU File ID: 1.0",
		"FRU Board Custom Info: A",
		"FRU Board Custom Info: 52h 54h 00h 12h 34h 56h",
		"FRU Product Manufacturer Name: nvstore",
		"FRU Product Name: Example Server",
		"FRU Product Part/Model Number: NVS-1U",
		"FRU Product Version: 2",
		"FRU Product Serial Number: SRV-0042",
		"FRU Product Asset Tag: ASSET-0042",
		"FRU Management Access System Unique ID:",
		"01h 23h 45h 67h 89h ABh 4Dh EFh",
		"81h 23h 45h 67h 89h ABh CDh EFh",
		"FRU OEM Manufacturer ID: Open Compute Project (A67Fh)",
		"FRU OEM Data: 01h 02h 03h",
	}, got)
}

// ipmi-fru and Verify agree on every checksum, whichever bit is wrong.
func TestIPMIFRUAgreesOnTheChecksums(t *testing.T) {
	image, _, err := f.Pack(specWithoutBCD(t))
	require.NoError(t, err)
	require.NotContains(t, ipmiFRU(t, image), "checksum")
	fields, err := f.Fields(image)
	require.NoError(t, err)
	seen := 0
	for _, fd := range fields {
		if !strings.HasSuffix(fd.Name, "checksum") {
			continue
		}
		seen++
		bad := bytes.Clone(image)
		bad[fd.Off] ^= 0x10
		require.Contains(t, ipmiFRU(t, bad), "checksum invalid", fd.Name)
		fixable := 0
		for _, p := range f.Verify(bad) {
			if p.Fixable {
				fixable++
			}
		}
		require.Positive(t, fixable, fd.Name)
		fixed, changes, err := f.Fix(bad)
		require.NoError(t, err)
		// A record's header covers the checksum of its data: one change
		// may mend both.
		require.NotEmpty(t, changes)
		require.LessOrEqual(t, len(changes), fixable)
		require.NotContains(t, ipmiFRU(t, fixed), "checksum")
	}
	require.Equal(t, 1+3+2*2, seen)
}

const recordSpec = `{"format": "fru", "multirecord": [
	{"type": 0, "fields": {"capacity_w": 750, "peak_va": 900, "inrush_a": 40, "inrush_interval_ms": 5,
		"input1_low_10mv": 9000, "input1_high_10mv": 14000, "input2_low_10mv": 18000, "input2_high_10mv": 26400,
		"frequency_low_hz": 47, "frequency_high_hz": 63, "dropout_ms": 12, "flags": "0x0e",
		"peak_w_and_hold_up_s": "0xa384", "combined_voltages": "0x00", "combined_w": 0, "tachometer_threshold_rps": 0}},
	{"type": 1, "fields": {"output": "0x81", "nominal_10mv": -1200, "negative_deviation_10mv": -1260, "positive_deviation_10mv": -1140,
		"ripple_mv": 120, "current_min_ma": 500, "current_max_ma": 62000}},
	{"type": 2, "fields": {"output": 2, "nominal_10mv": 330, "voltage_min_10mv": 313, "voltage_max_10mv": 347,
		"ripple_mv": 50, "current_min_ma": 100, "current_max_ma": 3000}}]}`

// ipmi-fru reads our records' numbers.
func TestIPMIFRUReadsOurRecords(t *testing.T) {
	image, warnings, err := f.Pack([]byte(recordSpec))
	require.NoError(t, err)
	require.Empty(t, warnings)
	formtest.CheckAny(t, f, image)
	out := ipmiFRU(t, image)
	require.NotContains(t, out, "Error")
	for _, line := range []string{
		"Power Supply Overall Capacity: 750 Watts", "Power Supply Peak VA: 900 VA", "Power Supply Max Inrush Current: 40 Amps",
		"Power Supply Inrush Interval: 5 ms", "Power Supply Low End Input Voltage 1: 90000 mV", "Power Supply High End Input Voltage 1: 140000 mV",
		"Power Supply Low End Input Voltage 2: 180000 mV", "Power Supply High End Input Voltage 2: 264000 mV",
		"Power Supply Low End Acceptable Frequency: 47 Hz", "Power Supply High End Acceptable Frequency: 63 Hz",
		"Power Supply A/C Dropout Tolerance: 12 ms", "Power Supply Hot Swap Support: Yes", "Power Supply Peak Capacity: 900 Watts",
		"Power Supply Hold Up Time: 10 s", "Power Supply Total Combined Wattage: 0 Watts",
		"DC Output Output Number: 1", "DC Output Nominal Voltage: -12000 mV", "DC Output Maximum Negative Voltage Deviation: -12600 mV",
		"DC Output Maximum Positive Voltage Deviation: -11400 mV", "DC Output Ripple and Noise pk-pk: 120 mV",
		"DC Output Minimum Current Draw: 500 mA", "DC Output Maximum Current Draw: 62000 mA",
		"DC Load Output Number: 2", "DC Load Nominal Voltage: 3300 mV", "DC Load Spec'd Minimum Voltage: 3130 mV",
		"DC Load Spec'd Maximum Voltage: 3470 mV", "DC Load Minimum Current Load: 100 mA", "DC Load Maximum Current Load: 3000 mA",
	} {
		require.Contains(t, out, line+"\n")
	}
}

// areas names what has a wrong checksum.
func areas(list []vpd.Problem) (names []string) {
	for _, p := range list {
		if p.Fixable {
			names = append(names, p.Area)
		}
	}
	return names
}

func TestFixtures(t *testing.T) {
	want := map[string][]string{"bad-product.bin": {"product"}, "bad-board-product.bin": {"board", "product"}}
	for _, name := range formtest.Images(t, f, "fru") {
		t.Run(name, func(t *testing.T) {
			image := read(t, name)
			require.True(t, f.Detect(image))
			problems := f.Verify(image)
			require.Equal(t, want[name], areas(problems))
			if name != "one-character.bin" {
				require.Len(t, problems, len(want[name]))
			}
			out := ipmiFRU(t, image)
			require.Equal(t, len(want[name]), strings.Count(out, "FRU Error"))
			for _, area := range want[name] {
				require.Contains(t, out, area+" info area checksum invalid")
			}
			fixed, changes, err := f.Fix(image)
			require.NoError(t, err)
			require.Len(t, changes, len(want[name]))
			require.NotContains(t, ipmiFRU(t, fixed), "FRU Error")
		})
	}
	require.Equal(t, "product at byte 0xcf: checksum: 0x83 -> 0x5f", fixedChange(t, read(t, "bad-product.bin")))
}

func fixedChange(t *testing.T, image []byte) string {
	_, changes, err := f.Fix(image)
	require.NoError(t, err)
	require.Len(t, changes, 1)
	return changes[0].String()
}

// A text of one character, as others write it, ends the area; the rest is
// found in the padding, and kept.
func TestOneCharacterFixture(t *testing.T) {
	image := read(t, "one-character.bin")
	problems := f.Verify(image)
	require.Len(t, problems, 1)
	require.Equal(t, "product.padding", problems[0].Area)
	require.NotContains(t, ipmiFRU(t, image), "lost")
	spec, _, err := f.Parse(image)
	require.NoError(t, err)
	require.Contains(t, string(spec), `"padding": {
      "type": "hex",
      "data": "58c46c6f7374"`)
}

// Editing one area moves those behind it, and leaves them as they are.
func TestEditMovesAreas(t *testing.T) {
	image := read(t, "nic-oem-record.bin")
	spec, warnings, err := f.Parse(image)
	require.NoError(t, err)
	require.Empty(t, warnings)
	edited := strings.Replace(string(spec), "Example Adapter OCP", "Example Adapter OCP with a much longer name", 1)
	again, warnings, err := f.Pack([]byte(edited))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Greater(t, len(again), len(image))
	product := int(image[4]) * 8
	moved := int(again[4]) * 8
	require.Greater(t, moved, product)
	require.Equal(t, image[product:], again[moved:])
	require.NotContains(t, ipmiFRU(t, again), "Error")
	require.Contains(t, ipmiFRU(t, again), "FRU OEM Data")
}

const goodSpec = `{
  "format": "fru",
  "board": {
    "language": 25,
    "date": "2021-11-02T15:51Z",
    "manufacturer": "NVTEST",
    "product_name": "Example Adapter OCP",
    "serial_number": "SN-AAAAAAAAAAAAAAAAAAAA",
    "part_number": "PN-BBBBBBBBBBBBBBBBBB",
    "file_id": "FRU Ver 0.02",
    "custom": [
      "",
      "",
      ""
    ]
  },
  "product": {
    "language": 25,
    "manufacturer": "NVTEST",
    "product_name": "Example Adapter OCP",
    "part_number": "PN-BBBBBBBBBBBBBBBBBB",
    "version": "A9                 ",
    "serial_number": "SN-AAAAAAAAAAAAAAAAAAAA",
    "asset_tag": "",
    "file_id": "",
    "custom": [
      "",
      "",
      "Example-6"
    ]
  },
  "multirecord": [
    {
      "type": "0xc0",
      "manufacturer_id": "0x000157",
      "data": {
        "type": "hex",
        "data": "01180bff0800ffff64000000000320"
      }
    }
  ]
}
`

func TestParse(t *testing.T) {
	spec, warnings, err := f.Parse(read(t, "nic-oem-record.bin"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, goodSpec, string(spec))
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "chassis-board-product.bin"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 11, Len: 4, Name: "chassis.part_number", Value: "N/A", CoveredBy: "chassis.checksum"}, byName["chassis.part_number"])
	require.Equal(t, "2024-03-05T14:30Z", byName["board.date"].Value)
	require.Equal(t, "header.checksum", byName["header.board"].CoveredBy)
	require.Equal(t, "Config A", byName["product.custom[1]"].Value)
}

func TestSpecsRefused(t *testing.T) {
	long := strings.Repeat("x", 64)
	formtest.Refused(t, f, `{"format": "fru", `, []formtest.Case{
		{"other format", `{"format": "pci"}`, `want "fru"`},
		{"unknown member", `"internals": {}`, "internals: unknown"},
		{"area a string", `"board": "x"`, "board: want an object"},
		{"unknown field", `"board": {"name": "x"}`, "board.name: unknown"},
		{"64 bytes", `"board": {"manufacturer": "` + long + `"}`, "64 bytes, want at most 63"},
		{"one lower-case character", `"board": {"manufacturer": "x"}`, "not in 6-bit ASCII"},
		{"one character as text", `"board": {"manufacturer": {"type": "text", "data": "X"}}`, "0xc1 ends the area"},
		{"one byte as text", `"board": {"manufacturer": {"type": "hex", "data": "58", "encoding": "text"}}`, "0xc1 ends the area"},
		{"not ASCII", `"board": {"manufacturer": "Bürk"}`, "not printable ASCII"},
		{"not UCS-2", `"board": {"language": 1, "manufacturer": "\ud83d\ude00"}`, "UCS-2 text has not"},
		{"6bit lower case", `"board": {"manufacturer": {"type": "6bit", "data": "abc"}}`, "not in 6-bit ASCII"},
		{"BCD letters", `"board": {"manufacturer": {"type": "bcd", "data": "12AB"}}`, "not in BCD plus"},
		{"BCD odd", `"board": {"manufacturer": {"type": "bcd", "data": "123"}}`, "so add a space"},
		{"bad hex", `"board": {"manufacturer": {"type": "hex", "data": "1"}}`, "pairs of hexadecimal digits"},
		{"encoding unknown", `"board": {"manufacturer": {"type": "hex", "data": "11", "encoding": "utf8"}}`, "want one of binary"},
		{"encoding of text", `"board": {"manufacturer": {"type": "text", "data": "11", "encoding": "text"}}`, "only for type hex"},
		{"unknown type", `"board": {"manufacturer": {"type": "base64", "data": ""}}`, "unknown type"},
		{"no data", `"board": {"manufacturer": {"type": "hex"}}`, "data: missing"},
		{"number", `"board": {"manufacturer": 5}`, "want a string"},
		{"field after null", `"board": {"manufacturer": null, "product_name": "xx"}`, "can't follow manufacturer"},
		{"custom after null", `"board": {"file_id": null, "custom": ["xx"]}`, "can't follow file_id"},
		{"custom no list", `"board": {"custom": "xx"}`, "want a list"},
		{"date of a product", `"product": {"date": "2020-01-01T00:00Z"}`, "only a board"},
		{"date too early", `"board": {"date": "1996-01-01T00:00Z"}`, "want a date"},
		{"date too late", `"board": {"date": "2027-11-24T20:16Z"}`, "want a date"},
		{"date misspelt", `"board": {"date": "2020-13-01T00:00Z"}`, "want a date"},
		{"language of a chassis", `"chassis": {"language": 0}`, "language: unknown"},
		{"language 256", `"board": {"language": 256}`, "from 0 to 255"},
		{"area size no multiple", `"board": {"area_size": 33}`, "multiple of 8"},
		{"area size too small", `"board": {"manufacturer": "0123456789", "area_size": 16}`, "takes 23 bytes"},
		{"area too large", `"product": {"custom": [` + strings.TrimSuffix(strings.Repeat(`{"type": "hex", "data": "00"},`, 1030), ",") + `]}`, "takes 2072 bytes"},
		{"padding too long", `"chassis": {"padding": {"type": "hex", "data": "0101"}}`, "padding: 2 bytes, want at most 1"},
		{"raw of another length", `"board": {"raw": {"type": "hex", "data": "0102030405060708"}}`, "board.raw: want version 1"},
		{"raw and a field", `"board": {"raw": {"type": "hex", "data": "0101030405060708"}, "manufacturer": ""}`, "unknown"},
		{"no record", `"multirecord": []`, "at least one"},
		{"record of no type", `"multirecord": [{"data": ""}]`, "type: missing"},
		{"record of no data", `"multirecord": [{"type": 1}]`, "data: missing"},
		{"record too long", `"multirecord": [{"type": 192, "manufacturer_id": 1, "data": {"type": "hex", "data": "00", "count": 253}}]`, "from 0 to 252"},
		{"fields of another", `"multirecord": [{"type": 3, "fields": {}}]`, "only types 0x00 to 0x02"},
		{"fields and data", `"multirecord": [{"type": 1, "fields": {}, "data": ""}]`, "can't stand beside data"},
		{"fields incomplete", `"multirecord": [{"type": 1, "fields": {"output": 1}}]`, "fields.nominal_10mv: missing"},
		{"unknown of fields", `"multirecord": [{"type": 1, "fields": {"volts": 1}}]`, "volts: unknown"},
		{"nominal of 16 bits", `"multirecord": [{"type": 1, "fields": {"output": 1, "nominal_10mv": 32768}}]`, "from -32768 to 32767"},
		{"output negative", `"multirecord": [{"type": 1, "fields": {"output": -1}}]`, "from 0 to 255"},
		{"subtype of another", `"multirecord": [{"type": 1, "subtype": 1, "data": ""}]`, "only type 0x03"},
		{"manufacturer of another", `"multirecord": [{"type": 1, "manufacturer_id": 1, "data": ""}]`, "only types 0xc0"},
		{"last in the middle", `"multirecord": [{"type": 192, "data": "abc", "last": false}, {"type": 192, "data": "abc"}]`, "to say false"},
		{"last true", `"multirecord": [{"type": 192, "data": "abc", "last": true}]`, "to say false"},
		{"raw record short", `"multirecord": [{"raw": {"type": "hex", "data": "c0820100"}}]`, "header of 5 bytes"},
		{"area out of reach", `"internal": {"type": "hex", "data": "00", "count": 2048}, "board": {}`, "the header reaches byte 2040"},
		{"header where an area is", `"board": {}, "header": {"board": 3}`, "is where the area lies"},
		{"size too small", `"board": {}, "size": 16`, "the data takes 24"},
		{"size too large", `"board": {}, "size": 262145`, "from 0 to 262144"},
		{"fill alone", `"board": {}, "fill": 0`, "needs a size"},
	})
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 256), "erased": bytes.Repeat([]byte{0xff}, 256),
		"cut off": {1, 0, 0, 1, 0, 0, 0}, "version 2": {2, 0, 0, 0, 0, 0, 0, 0xfe}, "too long": append([]byte{1}, make([]byte, fru.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "fru", `, []formtest.Case{
		{"header checksum", `"header": {"checksum": 1}`, "header at byte 0x7: wrong checksum: got 0x01, want 0xff"},
		{"pad", `"header": {"pad": 9}`, "header.pad at byte 0x6: is 0x09"},
		{"area beyond the end", `"header": {"chassis": 9}`, "begins at 72, and the image has 8 bytes"},
		{"two areas in a place", `"board": {}, "header": {"chassis": 1}`, "chassis at byte 0x2: is not where the header says: begins where another"},
		{"no area there", `"board": {}, "header": {"chassis": 4}, "size": 64`, "want version 1 of the area"},
		{"area of no length", `"header": {"chassis": 1}, "trailing": {"type": "hex", "data": "0100000000000000"}`, "has a length of 0"},
		{"area too long", `"header": {"chassis": 1}, "trailing": {"type": "hex", "data": "0102000000000000"}`, "has a length of 16 bytes, and up to"},
		{"area checksum", `"board": {"checksum": 1}`, "board at byte 0x17: wrong checksum: got 0x01, want 0x7c"},
		{"area version", `"chassis": {"raw": {"type": "hex", "data": "11010000c0c1006d"}}`, "upper bits are reserved"},
		{"padding", `"chassis": {"padding": {"type": "hex", "data": "07"}}`, "one character"},
		{"no end mark", `"chassis": {"raw": {"type": "hex", "data": "010100c00000003e"}}`, "without an end mark"},
		{"field cut off", `"chassis": {"raw": {"type": "hex", "data": "010100c0c24142f9"}}`, "fields reach the checksum"},
		{"field too long", `"chassis": {"raw": {"type": "hex", "data": "010100c0c34142f8"}}`, "is cut off by the area's end"},
		{"field missing", `"board": {"file_id": null}`, "board.file_id at byte 0x12: is missing"},
		{"all fields missing", `"board": {"manufacturer": null}`, "board.manufacturer at byte 0xe: is missing"},
		{"NUL in text", `"board": {"manufacturer": {"type": "hex", "data": "410042", "encoding": "text"}}`, "board.manufacturer at byte 0xe: holds characters"},
		{"odd UCS-2", `"board": {"language": 2, "manufacturer": {"type": "hex", "data": "410042", "encoding": "text"}}`, "holds characters"},
		{"digits of BCD", `"product": {"custom": [{"type": "hex", "data": "1d", "encoding": "bcd"}]}`, "product.custom[0] at byte 0x12: holds digits"},
		{"internal version", `"internal": {"type": "hex", "data": "00", "version": 2}`, "internal at byte 0x8: begins with 0x02"},
		{"record checksum", `"multirecord": [{"type": 192, "data": "abc", "checksum": 0}]`, "multirecord[0] at byte 0xb: wrong checksum of the data: got 0x00, want 0xda"},
		{"record header checksum", `"multirecord": [{"type": 192, "data": "abc", "header_checksum": 0}]`, "multirecord[0] at byte 0xc: wrong checksum of the header"},
		{"record version", `"multirecord": [{"type": 192, "data": "abc", "version": 3}]`, "has format version 3"},
		{"last record not marked", `"multirecord": [{"type": 192, "data": "abc", "last": false}]`, "multirecord at byte 0x10: the last record is not marked"},
		{"no record", `"header": {"multirecord": 1}, "size": 64`, "what stands there is no record"},
		{"record length", `"multirecord": [{"type": 1, "data": "abc"}]`, "has 3 bytes of data, and a record of type 0x01 has 13"},
		{"no subtype", `"multirecord": [{"type": 3, "data": ""}]`, "has no subtype"},
		{"no manufacturer", `"multirecord": [{"type": 200, "data": "a"}]`, "the manufacturer's number takes 3"},
	})
}

// Latin-1 is what 8-bit text is, and zeros fill it up: no problem, but not
// packed from a string.
func TestLatin1(t *testing.T) {
	image, warnings, err := f.Pack([]byte(`{"format": "fru", "board": {"manufacturer": {"type": "hex", "data": "42fc726b0000", "encoding": "text"}}}`))
	require.NoError(t, err)
	require.Empty(t, warnings)
	formtest.CheckAny(t, f, image)
}

func TestRandomSpecs(t *testing.T) {
	str := func(pattern, typ string) *rapid.Generator[any] {
		return rapid.Map(rapid.StringMatching(pattern), func(s string) any {
			if typ == "" {
				return s
			}
			return map[string]string{"type": typ, "data": s}
		})
	}
	value := rapid.OneOf(
		str(`|[ -_]|[ -~]{2,63}`, ""), str(`[ -_]{0,84}`, "6bit"), str(`([0-9 .\-]{2}){0,63}`, "bcd"), str(`([0-9a-f]{2}){0,63}`, "hex"),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 63), func(b []byte) any {
			codes := []string{"binary", "bcd", "6bit", "text"}
			code := codes[len(b)%4]
			if len(b) == 1 {
				code = "6bit"
			}
			return map[string]string{"type": "hex", "data": fmt.Sprintf("%x", b), "encoding": code}
		}))
	fields := map[string][]string{
		"chassis": {"part_number", "serial_number"},
		"board":   {"manufacturer", "product_name", "serial_number", "part_number", "file_id"},
		"product": {"manufacturer", "product_name", "part_number", "version", "serial_number", "asset_tag", "file_id"},
	}
	rapid.Check(t, func(t *rapid.T) {
		spec := `{"format": "fru"`
		add := func(name string, v any) {
			b, err := json.Marshal(v)
			require.NoError(t, err)
			spec += fmt.Sprintf(",\n%q: %s", name, b)
		}
		order := rapid.Permutation([]string{"internal", "chassis", "board", "product", "multirecord"}).Draw(t, "order")
		for _, name := range order[:rapid.IntRange(0, 5).Draw(t, "areas")] {
			switch name {
			case "internal":
				add(name, map[string]any{"type": "hex", "data": rapid.StringMatching(`([0-9a-f]{2}){0,40}`).Draw(t, name)})
			case "multirecord":
				n := rapid.IntRange(1, 4).Draw(t, "records")
				list := make([]any, n)
				for i := range list {
					list[i] = map[string]any{"type": rapid.Byte().Draw(t, "type"), "data": map[string]any{"type": "hex", "data": rapid.StringMatching(`([0-9a-f]{2}){0,80}`).Draw(t, "data")}}
				}
				add(name, list)
			default:
				area := map[string]any{}
				for _, fd := range fields[name] {
					if rapid.Bool().Draw(t, fd) {
						area[fd] = value.Draw(t, fd)
					}
				}
				area["custom"] = rapid.SliceOfN(value, 0, 5).Draw(t, "custom")
				add(name, area)
			}
		}
		add("size", rapid.IntRange(4096, 8192).Draw(t, "size"))
		add("fill", rapid.Byte().Draw(t, "fill"))
		image, _, err := f.Pack([]byte(spec + "}"))
		require.NoError(t, err, "%s", spec)
		require.Empty(t, areas(f.Verify(image)))
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	for _, name := range []string{"nic-oem-record.bin", "chassis-board-product.bin"} {
		formtest.Damage(t, f, read(t, name))
	}
}

func FuzzFRU(fz *testing.F) {
	for _, name := range []string{"nic-oem-record.bin", "chassis-board-product.bin", "bad-board-product.bin", "one-character.bin"} {
		fz.Add(read(fz, name))
	}
	fz.Add([]byte("\x01\x01\x02\x03\x04\x05\x07\x00\x01ab\x00\x00\x00\x00\x00\x01\x01\x00\xc0\xc0\xc1\x00\x00"))
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "server.fru.jsonc"))
	fz.Add([]byte(goodSpec))
	fz.Add([]byte(recordSpec))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
