package spd_test

import (
	"bytes"
	"encoding/hex"
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
	"nvstore.dev/vpd/spd"
)

var f = spd.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "spd/"+name) }

// decodeDimms shows an image as i2c-tools read it, with single spaces. It
// takes hexdumps only, shows nothing of an image whose CRC is wrong unless
// asked to, and always exits with 0.
func decodeDimms(t testing.TB, image []byte) string {
	path := filepath.Join(t.TempDir(), "dump")
	require.NoError(t, os.WriteFile(path, []byte(hex.Dump(image)), 0o644))
	out, err := exec.Command("decode-dimms", "--checksum", "-x", path).CombinedOutput()
	require.NoError(t, err, "%s", out)
	var lines []string
	for _, line := range strings.Split(string(out), "\n") {
		lines = append(lines, strings.Join(strings.Fields(line), " "))
	}
	return strings.Join(lines, "\n")
}

func pack(t testing.TB, name string) []byte {
	image := formtest.Pack(t, f, read(t, name+".spd.jsonc"))
	require.True(t, f.Detect(image))
	return image
}

func TestSamples(t *testing.T) {
	for name, size := range map[string]int{"server": 512, "laptop": 256, "desktop": 1024, "ddimm": 4096} {
		require.Len(t, pack(t, name), size)
	}
	desktop := pack(t, "desktop")
	require.Equal(t, "\x80\xad\x00\x24\x50\xfe\xed\xf0\x0dNVS-DDR5-16G-4800             \x00\x80\xad\xff", string(desktop[512:555]))
}

func TestDecodeDimmsReadsOurFields(t *testing.T) {
	out := decodeDimms(t, pack(t, "server"))
	for _, line := range []string{
		"EEPROM CRC of bytes 0-125 OK (0x02D4)", "EEPROM CRC of bytes 128-253 OK (0x47CC)",
		"Fundamental Memory type DDR4 SDRAM", "SPD Revision 1.2", "Module Type RDIMM", "Maximum module speed 3200 MT/s (PC4-25600)",
		"Size 65536 MB", "Ranks 2", "SDRAM Device Width 4 bits", "AA-RCD-RP-RAS (cycles) 22-22-22-52",
		"Minimum Recovery Delay (tRFC1) 350.000 ns", "Minimum Recovery Delay (tRFC4) 160.000 ns", "Minimum Four Activate Window Delay (tFAW) 10.000 ns",
		"Minimum Row Active to Row Active Delay (tRRD_L) 5.000 ns", "Minimum Write to Read Time (tWTR_L) 7.500 ns", "Maximum Cycle Time (tCKmax) 1.600 ns",
		"Module Height 32 mm", "Module Reference Card B revision 1", "Thermal Sensor TSE2004 compliant",
		"Module Manufacturer Micron Technology", "DRAM Manufacturer Micron Technology", "Manufacturing Location Code 0x06",
		"Manufacturing Date 2024-W07", "Assembly Serial Number 0x0BADCAFE", "Part Number NVS-DDR4-64G-3200",
		"Number of SDRAM DIMMs detected and decoded: 1",
	} {
		require.Contains(t, out, line)
	}
	out = decodeDimms(t, pack(t, "laptop"))
	for _, line := range []string{
		"EEPROM CRC of bytes 0-116 OK (0x5BA4)", "Fundamental Memory type DDR3 SDRAM", "Module Type SO-DIMM", "Size 4096 MB",
		"Maximum module speed 1600 MT/s (PC3-12800)", "tCL-tRCD-tRP-tRAS 11-11-11-28", "Operable voltages 1.5V, 1.35V",
		"Minimum Active to Auto-Refresh Delay (tRC) 48.125 ns", "Minimum Recovery Delay (tRFC) 260.000 ns",
		"Minimum Read to Pre-charge CMD Delay (tRTP) 7.500 ns", "Module Reference Card B revision 2", "Manufacturing Date 2014-W31",
		"Assembly Serial Number 0x12345678", "Part Number NVS-DDR3-4G-1600", "Revision Code 0x0001",
	} {
		require.Contains(t, out, line)
	}
}

// decode-dimms and Verify agree on each CRC, wherever the fault is.
func TestDecodeDimmsAgreesOnTheCRCs(t *testing.T) {
	for _, c := range []struct {
		image []byte
		offs  map[int]string // of a flipped bit, and which CRC is wrong then
	}{
		{read(t, "ddr4.bin"), map[int]string{1: "crc", 125: "crc", 126: "crc", 128: "module_crc", 253: "module_crc", 255: "module_crc", 330: ""}},
		{read(t, "ddr3.bin"), map[int]string{1: "crc", 116: "crc", 117: "crc", 125: "crc", 127: "crc", 128: ""}},
		{pack(t, "laptop"), map[int]string{1: "crc", 116: "crc", 117: "", 125: "", 127: "crc", 128: ""}},
	} {
		for off, area := range c.offs {
			bad := bytes.Clone(c.image)
			bad[off] ^= 0x01
			var wrong []vpd.Problem
			for _, p := range f.Verify(bad) {
				if p.Fixable {
					wrong = append(wrong, p)
				}
			}
			out := decodeDimms(t, bad)
			require.Equal(t, area == "", len(wrong) == 0, "byte %d: %v", off, wrong)
			require.Equal(t, area != "", strings.Contains(out, " Bad\n"), "byte %d\n%s", off, out)
			if area == "" {
				continue
			}
			require.Len(t, wrong, 1)
			require.Equal(t, area, wrong[0].Area)
			require.Contains(t, out, "calculated 0x"+strings.ToUpper(wrong[0].Want[2:]))
			fixed, changes, err := f.Fix(bad)
			require.NoError(t, err)
			require.Len(t, changes, 1)
			require.NotContains(t, decodeDimms(t, fixed), " Bad\n")
		}
	}
}

func TestFixtures(t *testing.T) {
	bad := map[string]string{
		"bad-module-crc.bin": "module_crc at byte 0xfe: wrong CRC-16: got 0x0000, want 0x7d19",
		"bad-range.bin":      "crc at byte 0x1fe: wrong CRC-16: got 0x750c, want 0x6e51",
		"bad-ddimm.bin":      "crc at byte 0x7e: wrong CRC-16: got 0xe066, want 0xfd13",
	}
	for _, name := range formtest.Images(t, f, "spd") {
		image := read(t, name)
		require.True(t, f.Detect(image), name)
		problems := f.Verify(image)
		if bad[name] == "" {
			require.Empty(t, problems, name)
			continue
		}
		require.Len(t, problems, 1)
		require.Equal(t, bad[name], problems[0].String())
	}
}

// A DDIMM isn't fixed into what another type would be: the CRCs of the good
// ones stay, and of the damaged one only the one that is wrong changes.
func TestDDIMM(t *testing.T) {
	for _, name := range []string{"ddr4-ddimm.bin", "ddr5-ddimm.bin"} {
		fixed, changes, err := f.Fix(read(t, name))
		require.NoError(t, err)
		require.Empty(t, changes)
		require.Equal(t, read(t, name), fixed)
	}
	_, changes, err := f.Fix(read(t, "bad-ddimm.bin"))
	require.NoError(t, err)
	require.Len(t, changes, 1)
	spec, _, err := f.Parse(read(t, "ddr4-ddimm.bin"))
	require.NoError(t, err)
	for _, line := range []string{
		`"type": "ddr4-ddimm"`, `"barcode": "11S78P6575YH351T15S0D5327B"`, `"serial_number": "15S0D5"`, `"part_number": "SR57P8G4IB432PM2HA"`,
		`"module_manufacturer": "0x0194"`, `"dram_manufacturer": "0x80ad"`,
	} {
		require.Contains(t, string(spec), line)
	}
	require.NotContains(t, string(spec), "crc")
}

const goodSpec = `{
  "format": "spd",
  "type": "ddr5",
  "bytes_used": "0x30",
  "spd_revision": "0x10",
  "memory_type": "0x12",
  "module_type": "0x02",
  "first_density_package": "0x04",
  "first_io_width": "0x20",
  "first_bank_groups": "0x62",
  "tckavg_min_ps": 416,
  "tckavg_max_ps": 1010,
  "module_revision": "0x10",
  "bus_width": "0x22",
  "module_manufacturer": "0x802c",
  "date": "2024-W05",
  "serial_number": "0x00000007",
  "part_number": "NVS-DDR5-16G",
  "dram_manufacturer": "0x802c",
  "crc": "0x750c"
}
`

func TestParse(t *testing.T) {
	spec, warnings, err := f.Parse(read(t, "bad-range.bin"))
	require.NoError(t, err)
	require.Len(t, warnings, 1)
	require.Equal(t, goodSpec, string(spec))
}

// A dump in whole, and what one wants to be different.
func TestDump(t *testing.T) {
	dump := read(t, "ddr4.bin")
	image, warnings, err := f.Pack(fmt.Appendf(nil, `{"format": "spd", "type": "ddr4", "serial_number": "0x00000001", "taa_min": 100,
		"patches": [{"offset": 0, "type": "hex", "data": "%x"}]}`, dump))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Empty(t, f.Verify(image))
	for i := range dump {
		same := i != 24 && i != 126 && i != 127 && (i < 325 || i > 328)
		require.Equal(t, same, dump[i] == image[i], "byte %d", i)
	}
}

func TestFields(t *testing.T) {
	byName := formtest.Fields(t, f, pack(t, "server"))
	require.Equal(t, vpd.Field{Off: 3, Len: 1, Name: "module_type", Value: "0x01 RDIMM", CoveredBy: "crc"}, byName["module_type"])
	require.Equal(t, vpd.Field{Off: 320, Len: 2, Name: "module_manufacturer", Value: "0x802c Micron"}, byName["module_manufacturer"])
	require.Equal(t, "module_crc", byName["module_height"].CoveredBy)
	for _, fd := range formtest.Fields(t, f, pack(t, "laptop")) {
		require.Equal(t, fd.Off < 117 || fd.Off == 126, fd.CoveredBy == "crc", "%s", fd.Name)
	}
}

func TestSpecsRefused(t *testing.T) {
	formtest.Refused(t, f, `{"format": "spd", "type": "ddr4", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "spd"`},
		{"no type", `{"format": "spd"}`, "type: missing; want one of ddr3, ddr4, ddr5, ddr4-ddimm, ddr5-ddimm"},
		{"DDR2", `{"format": "spd", "type": "ddr2"}`, `type: unknown "ddr2"`},
		{"unknown member", `"serial": 1`, "serial: unknown"},
		{"another type's member", `"pmic0_revision": 1`, "pmic0_revision: unknown"},
		{"another memory", `"memory_type": "0x0b"`, "the result would be recognised as ddr3, not ddr4"},
		{"another module", `"module_type": "0x0a", "size": 4096`, "recognised as ddr4-ddimm"},
		{"byte of 9 bits", `"taa_min": 256`, "from 0 to 255"},
		{"maker's code long", `"module_manufacturer": "0x180ce"`, "from 0 to 65535"},
		{"maker a name", `"module_manufacturer": "Samsung"`, "want an integer"},
		{"part number long", `"part_number": "012345678901234567890"`, "21 bytes, want at most 20"},
		{"part number not ASCII", `"part_number": "µ"`, "not printable ASCII"},
		{"date with day", `"date": "2024-02-13"`, "want a year and a week, such as 2024-W07"},
		{"week 54", `"date": "2024-W54"`, "want a year and a week"},
		{"week 0", `"date": "2024-W00"`, "want a year and a week"},
		{"last century", `"date": "1999-W10"`, "want a year and a week"},
		{"serial a word", `"serial_number": "SN1"`, "want an integer"},
		{"17 bytes of 18", `"bit_mapping": {"type": "hex", "data": "00", "count": 17}`, "17 bytes, want 18"},
		{"mapping a string", `"bit_mapping": "x"`, "1 bytes, want 18"},
		{"CRC of 17 bits", `"crc": "0x10000"`, "from 0 to 65535"},
		{"cut before a field", `"size": 300, "serial_number": 1`, "serial_number: lies behind the image, which has 300 bytes"},
		{"cut before a CRC", `"size": 200, "module_crc": 1`, "module_crc: lies behind the image"},
		{"too small", `"size": 127`, "ddr4 takes 128"},
		{"too large", `"size": 8193`, "from 0 to 8192"},
	})
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "127 bytes": read(t, "ddr4.bin")[:127], "zeros": make([]byte, 512), "erased": bytes.Repeat([]byte{0xff}, 512),
		"half of DDR5": read(t, "bad-range.bin")[:511], "DDIMM cut": read(t, "ddr5-ddimm.bin")[:639], "too large": append(read(t, "ddr4.bin"), make([]byte, spd.MaxSize)...),
		"DDR2": append([]byte{0x80, 0x08, 0x08}, make([]byte, 253)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "spd", "type": "ddr4", `, []formtest.Case{
		{"CRC", `"crc": 0`, "crc at byte 0x7e: wrong CRC-16: got 0x0000, want 0x"},
		{"second CRC", `"module_crc": 1`, "module_crc at byte 0xfe: wrong CRC-16: got 0x0001, want 0x0000"},
		{"second CRC cut off", `"size": 200`, "module_crc: is missing: the image ends before it"},
		{"CRC of DDR3", `{"format": "spd", "type": "ddr3", "crc": 0}`, "crc at byte 0x7e"},
		{"CRC of DDR5", `{"format": "spd", "type": "ddr5", "crc": 0}`, "crc at byte 0x1fe"},
		{"third CRC of a DDIMM", `{"format": "spd", "type": "ddr5-ddimm", "manufacturing_crc": 1}`, "manufacturing_crc at byte 0x27e"},
		{"parity of a code", `"module_manufacturer": "0x812c"`, "module_manufacturer at byte 0x140: is no code of JEP106, which has odd parity: 0x812c"},
		{"date not BCD", `"date": {"type": "hex", "data": "af82"}`, "date at byte 0x143: is no year and week in BCD: 0xaf82"},
		{"part number ends with zeros", `"part_number": {"type": "text", "data": "PART", "size": 20}`, "part_number at byte 0x149: is not printable ASCII with 0x20 behind it"},
	})
}

func TestRandomSpecs(t *testing.T) {
	sizes := map[string]int{"ddr3": 256, "ddr4": 512, "ddr5": 1024, "ddr4-ddimm": 4096, "ddr5-ddimm": 4096}
	rapid.Check(t, func(t *rapid.T) {
		typ := rapid.SampledFrom([]string{"ddr3", "ddr4", "ddr5", "ddr4-ddimm", "ddr5-ddimm"}).Draw(t, "type")
		date := fmt.Sprintf(`"date": "20%02d-W%02d", "serial_number": %d,`, rapid.IntRange(0, 99).Draw(t, "year"), rapid.IntRange(1, 53).Draw(t, "week"), rapid.Uint32().Draw(t, "serial"))
		if strings.HasSuffix(typ, "ddimm") {
			date = fmt.Sprintf(`"serial_number": %q,`, rapid.StringMatching(`[0-9A-F]{6}`).Draw(t, "serial"))
		}
		spec := fmt.Sprintf(`{"format": "spd", "type": %q, "module_manufacturer": "0x802c", %s "part_number": %q, "revision": %d, "bytes_used": %d,
			"patches": [{"offset": 86, "type": "hex", "data": "%x"}, {"offset": %d, "type": "hex", "data": "%x"}]}`,
			typ, date, rapid.StringMatching(`[A-Z0-9-]{1,18}`).Draw(t, "part"), rapid.Byte().Draw(t, "revision"), rapid.Byte().Draw(t, "bytes used"),
			rapid.SliceOfN(rapid.Byte(), 0, 31).Draw(t, "patch"), sizes[typ]-60, rapid.SliceOfN(rapid.Byte(), 0, 60).Draw(t, "patch at the end"))
		image, warnings, err := f.Pack([]byte(spec))
		require.NoError(t, err, "%s", spec)
		require.Empty(t, warnings)
		require.Len(t, image, sizes[typ])
		require.True(t, f.Detect(image))
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, read(t, "ddr3.bin"))
}

func FuzzSPD(fz *testing.F) {
	for _, name := range []string{"ddr3.bin", "ddr4.bin", "bad-range.bin", "bad-ddimm.bin"} {
		fz.Add(read(fz, name))
	}
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	for _, name := range []string{"server", "laptop", "desktop", "ddimm"} {
		fz.Add(read(fz, name+".spd.jsonc"))
	}
	fz.Add([]byte(goodSpec))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
