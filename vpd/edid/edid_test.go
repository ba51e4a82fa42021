package edid_test

import (
	"bytes"
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
	"nvstore.dev/vpd/edid"
	"nvstore.dev/vpd/internal/formtest"
)

var f = edid.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "edid/"+name) }

// edidDecode shows an image as edid-decode reads it. Its exit status tells of
// any deviation from any standard.
func edidDecode(t testing.TB, image []byte) string {
	path := filepath.Join(t.TempDir(), "edid.bin")
	require.NoError(t, os.WriteFile(path, image, 0o644))
	out, err := exec.Command("edid-decode", "--check", path).CombinedOutput()
	var exit *exec.ExitError
	require.True(t, err == nil || errors.As(err, &exit), "%v", err)
	return string(out)
}

func TestEDIDDecodeReadsOurFields(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "monitor.edid.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 256)
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	formtest.CheckAny(t, f, image)
	out := edidDecode(t, image)
	require.Contains(t, out, "EDID conformity: PASS")
	for _, line := range []string{
		"Manufacturer: NVS", "Model: 4660", "Serial Number: 4242", "Made in: week 10 of 2024",
		"EDID Structure Version & Revision: 1.4", "DisplayPort interface", "Maximum image size: 53 cm x 30 cm", "Gamma: 2.20",
		"1280x1024", "1680x1050", "1600x900",
		"DTD 1:  1920x1080   60.000000 Hz  16:9     67.500 kHz    148.500000 MHz (527 mm x 296 mm)",
		"Hfront   88 Hsync  44 Hback  148 Hpol P", "Vfront    4 Vsync   5 Vback   36 Vpol P",
		"Monitor ranges (Bare Limits): 50-75 Hz V, 30-83 kHz H, max dotclock 170 MHz",
		"Display Product Name: 'NVS Monitor'", "Display Product Serial Number: 'NVS0123456789'",
		"CTA-861 Extension Block",
	} {
		require.Contains(t, out, line)
	}
}

// edid-decode and Verify agree on both checksums.
func TestEDIDDecodeAgreesOnTheChecksums(t *testing.T) {
	image, _, err := f.Pack(read(t, "monitor.edid.jsonc"))
	require.NoError(t, err)
	require.NotContains(t, edidDecode(t, image), "(should be")
	for i, area := range []string{"base", "extensions[0]"} {
		for _, off := range []int{12, 127} {
			bad := bytes.Clone(image)
			bad[i*128+off] ^= 0x10
			problems := f.Verify(bad)
			require.Len(t, problems, 1)
			require.Equal(t, area, problems[0].Area)
			require.Contains(t, edidDecode(t, bad), fmt.Sprintf("Checksum: %s (should be %s)", problems[0].Got, problems[0].Want))
			fixed, changes, err := f.Fix(bad)
			require.NoError(t, err)
			require.Len(t, changes, 1)
			require.NotContains(t, edidDecode(t, fixed), "(should be")
		}
	}
}

func TestFixtures(t *testing.T) {
	bad := map[string]string{
		"wrong-checksum.bin": "base at byte 0x7f: wrong checksum",
		"bad-extension.bin":  "extensions[0] at byte 0xff: wrong checksum",
	}
	for _, name := range formtest.Images(t, f, "edid") {
		image := read(t, name)
		require.True(t, f.Detect(image))
		problems := f.Verify(image)
		require.Equal(t, bad[name] != "", strings.Contains(edidDecode(t, image), "(should be"))
		if bad[name] == "" {
			require.Empty(t, problems)
			continue
		}
		require.Len(t, problems, 1)
		require.Contains(t, problems[0].String(), bad[name])
	}
	spec, warnings, err := f.Parse(read(t, "edid13.bin"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, goodSpec, string(spec))
}

const goodSpec = `{
  "format": "edid",
  "manufacturer": "TST",
  "product": "0xbeef",
  "serial": 7,
  "week": 1,
  "year": 2021,
  "version": "1.3",
  "video_input": "0x80",
  "width_cm": 34,
  "height_cm": 27,
  "gamma": "0x78",
  "features": "0x2a",
  "chromaticity": {
    "type": "hex",
    "data": "ee91a3544c99260f5054"
  },
  "established_timings": {
    "type": "hex",
    "data": "210800"
  },
  "standard_timings": [
    "1280x1024@60"
  ],
  "descriptors": [
    {
      "timing": {
        "clock_khz": 108000,
        "h_active": 1280,
        "h_blank": 408,
        "h_sync_offset": 48,
        "h_sync_width": 112,
        "v_active": 1024,
        "v_blank": 42,
        "v_sync_offset": 1,
        "v_sync_width": 3,
        "width_mm": 338,
        "height_mm": 270,
        "h_border": 0,
        "v_border": 0,
        "flags": "0x1e"
      }
    },
    {
      "range_limits": {
        "v_min_hz": 56,
        "v_max_hz": 76,
        "h_min_khz": 30,
        "h_max_khz": 83,
        "clock_max_mhz": 140,
        "more": {
          "type": "hex",
          "data": "000a202020202020"
        }
      }
    },
    {
      "name": "Test 17"
    },
    {
      "serial": "SN-000042"
    }
  ]
}
`

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "bad-extension.bin"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 90, Len: 18, Name: "descriptors[2]", Value: "Test 17", CoveredBy: "checksum"}, byName["descriptors[2]"])
	require.Equal(t, "1280x1024, 108000 kHz", byName["descriptors[0]"].Value)
	require.Equal(t, "0x02 CTA-861", byName["extensions[0].tag"].Value)
	require.Equal(t, "extensions[0].checksum", byName["extensions[0].data"].CoveredBy)
}

const timing = `"clock_khz": 10000, "h_active": 640, "h_blank": 160, "h_sync_offset": 16, "h_sync_width": 96, "v_active": 480, "v_blank": 45, "v_sync_offset": 10, "v_sync_width": 2`

func TestSpecsRefused(t *testing.T) {
	formtest.Refused(t, f, `{"format": "edid", "manufacturer": "NVS", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "edid"`},
		{"no manufacturer", `{"format": "edid"}`, "manufacturer: missing"},
		{"two letters", `{"format": "edid", "manufacturer": "NV"}`, "three capital letters"},
		{"no letters", `{"format": "edid", "manufacturer": ""}`, "three capital letters"},
		{"lower case", `{"format": "edid", "manufacturer": "Nvs"}`, "three capital letters"},
		{"manufacturer of 3 bytes", `{"format": "edid", "manufacturer": {"type": "hex", "data": "000000"}}`, "want at most 2"},
		{"unknown member", `"model": 1`, "model: unknown"},
		{"product of 17 bits", `"product": 65536`, "from 0 to 65535"},
		{"year 1989", `"year": 1989`, "want 1990 to 2245"},
		{"year 2246", `"year": 2246`, "from 0 to 2245"},
		{"version a word", `"version": "one"`, "such as 1.4"},
		{"chromaticity short", `"chromaticity": {"type": "hex", "data": "00"}`, "1 bytes, want 10"},
		{"established long", `"established_timings": {"type": "hex", "data": "00000000"}`, "want at most 3"},
		{"9 standard timings", `"standard_timings": ["","","","","","","","",""]`, "9 elements, want at most 8"},
		{"width no multiple", `"standard_timings": ["1366x768@60"]`, "in steps of 8"},
		{"aspect", `"standard_timings": ["1280x1000@60"]`, "aspect 16:10"},
		{"refresh 59", `"standard_timings": ["1280x1024@59"]`, "60 to 123 Hz"},
		{"5 descriptors", `"descriptors": [{}, {}, {}, {}, {}]`, "5 elements, want at most 4"},
		{"descriptor of nothing", `"descriptors": [{}]`, "descriptors[0]: want one member"},
		{"descriptor unknown", `"descriptors": [{"title": "x"}]`, "descriptors[0].title: unknown"},
		{"name of 14", `"descriptors": [{"name": "0123456789abcd"}]`, "14 bytes, want at most 13"},
		{"name not ASCII", `"descriptors": [{"name": "é"}]`, "not printable ASCII"},
		{"dummy false", `"descriptors": [{"dummy": false}]`, "want true"},
		{"descriptor of 17", `"descriptors": [{"type": "hex", "data": "00", "count": 17}]`, "17 bytes, want 18"},
		{"timing incomplete", `"descriptors": [{"timing": {"clock_khz": 10}}]`, "h_active: missing"},
		{"clock not in tens", `"descriptors": [{"timing": {` + strings.Replace(timing, "10000", "10001", 1) + `}}]`, "a multiple of 10"},
		{"clock 0", `"descriptors": [{"timing": {` + strings.Replace(timing, "10000", "0", 1) + `}}]`, "that isn't 0"},
		{"4096 pixels", `"descriptors": [{"timing": {` + strings.Replace(timing, "640", "4096", 1) + `}}]`, "from 0 to 4095"},
		{"64 lines of sync", `"descriptors": [{"timing": {` + timing[:len(timing)-1] + `64}}]`, "from 0 to 63"},
		{"unknown of timing", `"descriptors": [{"timing": {` + timing + `, "hz": 60}}]`, "hz: unknown"},
		{"range incomplete", `"descriptors": [{"range_limits": {}}]`, "v_min_hz: missing"},
		{"range of 256", `"descriptors": [{"range_limits": {"v_min_hz": 256, "v_max_hz": 1, "h_min_khz": 1, "h_max_khz": 1, "clock_max_mhz": 10}}]`, "want 1 to 255"},
		{"clock of 15", `"descriptors": [{"range_limits": {"v_min_hz": 1, "v_max_hz": 1, "h_min_khz": 1, "h_max_khz": 1, "clock_max_mhz": 15}}]`, "a multiple of 10"},
		{"extension of no tag", `"extensions": [{}]`, "extensions[0].tag: missing"},
		{"extension of 127", `"extensions": [{"tag": 2, "data": {"type": "hex", "data": "00", "count": 127}}]`, "from 0 to 126"},
		{"size too small", `"size": 127`, "the data takes 128"},
	})
}

func TestImagesRefused(t *testing.T) {
	good := read(t, "edid13.bin")
	for name, image := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 128), "cut off": good[:127], "another header": append([]byte{1}, good[1:]...),
		"too long": append(bytes.Clone(good), make([]byte, edid.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	head := `{"format": "edid", "manufacturer": "NVS", `
	first := `"descriptors": [{"timing": {` + timing + `}}`
	formtest.Irregular(t, f, head, []formtest.Case{
		{"checksum", first + `], "checksum": 0`, "base at byte 0x7f: wrong checksum: got 0x00"},
		{"extension checksum", first + `], "extensions": [{"tag": 2, "checksum": 0}]`, "extensions[0] at byte 0xff: wrong checksum"},
		{"manufacturer", `{"format": "edid", "manufacturer": {"type": "hex", "data": "ffff"}, ` + first + `]}`, "manufacturer at byte 0x8: is not"},
		{"week", first + `], "week": 60`, "week at byte 0x10: is 60"},
		{"version 2", first + `], "version": "2.0"`, "version at byte 0x12: is 2.0"},
		{"version 1.5", first + `], "version": "1.5"`, "is 1.5"},
		{"no timing first", `"descriptors": [{"name": "x"}]`, "descriptors[0] at byte 0x36: is no detailed timing"},
		{"text without newline", first + `, {"type": "hex", "data": "000000fc0041000000000000000000000000"}]`, "descriptors[1] at byte 0x48: is not text"},
		{"third byte", first + `, {"type": "hex", "data": "000001100000000000000000000000000000"}]`, "third byte is 0"},
		{"reserved tag", first + `, {"type": "hex", "data": "000000200000000000000000000000000000"}]`, "reserved tag 0x20"},
		{"range upside down", first + `, {"range_limits": {"v_min_hz": 75, "v_max_hz": 50, "h_min_khz": 1, "h_max_khz": 1, "clock_max_mhz": 10}}]`, "lower limit above"},
		{"extension missing", first + `], "extension_count": 1`, "extension_count at byte 0x7e: is 1, and 0 whole"},
		{"extension cut off", first + `], "extension_count": 1, "size": 255, "fill": 2`, "is 1, and 0 whole"},
	})
}

func TestRandomSpecs(t *testing.T) {
	text := rapid.StringMatching(`[ !#-Z^-~]{0,13}`)
	rapid.Check(t, func(t *rapid.T) {
		n := func(label string, max int) int { return rapid.IntRange(0, max).Draw(t, label) }
		hex := func(label string, max int) string {
			return fmt.Sprintf("%x", rapid.SliceOfN(rapid.Byte(), 0, max).Draw(t, label))
		}
		list := []string{
			fmt.Sprintf(`{"timing": {"clock_khz": %d, "h_active": %d, "h_blank": %d, "h_sync_offset": %d, "h_sync_width": %d, "v_active": %d, "v_blank": %d, "v_sync_offset": %d, "v_sync_width": %d, "width_mm": %d, "height_mm": %d, "flags": %d}}`,
				(n("clock", 65534)+1)*10, n("ha", 4095), n("hb", 4095), n("hso", 1023), n("hsw", 1023), n("va", 4095), n("vb", 4095), n("vso", 63), n("vsw", 63), n("w", 4095), n("h", 4095), n("flags", 255)),
			fmt.Sprintf(`{"name": "%s"}`, text.Draw(t, "name")),
			fmt.Sprintf(`{"serial": "%s"}`, text.Draw(t, "serial")),
			fmt.Sprintf(`{"range_limits": {"v_min_hz": 1, "v_max_hz": %d, "h_min_khz": 1, "h_max_khz": %d, "clock_max_mhz": %d}}`,
				n("v", 254)+1, n("h", 254)+1, 10*(n("clock", 254)+1)),
		}
		var exts []string
		for range n("extensions", 3) {
			exts = append(exts, fmt.Sprintf(`{"tag": %d, "data": {"type": "hex", "data": "%s"}}`, n("tag", 255), hex("data", 126)))
		}
		spec := fmt.Sprintf(`{"format": "edid", "manufacturer": "%s", "product": %d, "serial": %d, "week": %d, "year": %d, "version": "1.%d", "video_input": %d, "standard_timings": ["%dx%d@%d"], "descriptors": [%s], "extensions": [%s]}`,
			rapid.StringMatching(`[A-Z]{3}`).Draw(t, "manufacturer"), n("product", 65535), rapid.Uint32().Draw(t, "serial"), n("week", 54),
			1990+n("year", 255), n("version", 4), n("video", 255), 1280, []int{800, 960, 1024, 720}[n("aspect", 3)], 60+n("hz", 63),
			strings.Join(list[:n("descriptors", 3)+1], ", "), strings.Join(exts, ", "))
		image, warnings, err := f.Pack([]byte(spec))
		require.NoError(t, err, "%s", spec)
		require.Empty(t, warnings)
		for i := 0; i < len(image); i += 128 {
			var sum byte
			for _, b := range image[i : i+128] {
				sum += b
			}
			require.Zero(t, sum)
		}
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, read(t, "bad-extension.bin"))
}

func FuzzEDID(fz *testing.F) {
	for _, name := range []string{"edid13.bin", "bad-extension.bin"} {
		fz.Add(read(fz, name))
	}
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "monitor.edid.jsonc"))
	fz.Add([]byte(goodSpec))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
