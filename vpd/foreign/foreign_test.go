package foreign_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/edit"
	"nvstore.dev/vpd/foreign"
	"nvstore.dev/vpd/formats"
	"nvstore.dev/vpd/internal/formtest"
)

func read(t testing.TB, name string) []byte {
	b, err := os.ReadFile("../../fixtures/" + name)
	require.NoError(t, err)
	return b
}

// fields imports a text, packs the spec, which must be good, and returns what
// the image says, with the notes.
func fields(t *testing.T, kind string, text []byte, o *foreign.Options) (func(path string) string, []byte, []string) {
	spec, notes, err := foreign.Import(kind, text, o)
	require.NoError(t, err)
	f, err := formats.OfSpec(spec)
	require.NoError(t, err)
	require.NoError(t, formtest.Validate(f, spec), "%s", spec)
	image, warnings, err := f.Pack(spec)
	require.NoError(t, err, "%s", spec)
	require.Empty(t, warnings)
	parsed, _, err := f.Parse(image)
	require.NoError(t, err)
	return func(path string) string {
		raw, err := edit.Get(parsed, path)
		require.NoError(t, err, path)
		return strings.Trim(string(raw), `"`)
	}, image, notes
}

func TestFrugen(t *testing.T) {
	get, _, notes := fields(t, "frugen", read(t, "foreign/frugen.json"), nil)
	for path, want := range map[string]string{
		"internal.data": "0102deadbeef", "chassis.type": "0x17", "chassis.part_number": "NVS-CH-01", "chassis.serial_number.type": "bcd",
		"chassis.custom[0]": "row 4", "chassis.custom[1].data": "b14a87", "board.date": "2024-03-05T14:30Z", "board.product_name": "Example Main Board",
		"board.part_number.type": "6bit", "board.custom[0]": "A", "board.custom[1]": "plain", "product.language": "25", "product.version": "2",
		"product.asset_tag": "ASSET-0042", "product.file_id": "frugen.json", "multirecord[0].subtype": "0x07",
		"multirecord[0].data.data": "33221100554477668899aabbccddeeff", "multirecord[1].data": "https://bmc.example", "multirecord[2].manufacturer_id": "0x00a67f",
	} {
		require.Contains(t, get(path), want, path)
	}
	require.Len(t, notes, 1)
	require.Contains(t, notes[0], "local time")
	// FreeIPMI reads it. It is wrong about BCD plus, see package fru.
	_, image, _ := fields(t, "frugen", bytes.Replace(read(t, "foreign/frugen.json"), []byte("bcdplus"), []byte("auto"), 1), nil)
	path := filepath.Join(t.TempDir(), "fru")
	require.NoError(t, os.WriteFile(path, image, 0o644))
	out, err := exec.Command("ipmi-fru", "--fru-file="+path).CombinedOutput()
	require.NoError(t, err)
	require.NotContains(t, string(out), "Error")
	require.Contains(t, string(out), "FRU Product Serial Number: SRV-0042")
	require.Contains(t, string(out), "33h 22h 11h 00h 55h 44h 77h 66h")

	for bad, want := range map[string]string{
		`{"x": 1}`: "unknown", `{"board": {"x": 1}}`: "unknown", `{"board": {"date": "2024-03-05"}}`: "DD/MM/YYYY", `{"chassis": {"type": 256}}`: "0 to 255",
		`{"internal": "0"}`: "pairs", `{"internal": 1}`: "object", `{"board": {"pn": 5}}`: "want a string", `{"board": {"pn": {"type": "x", "data": ""}}}`: "unknown type",
		`{"board": {"pn": {"type": "binary", "data": "xyz"}}}`: "pairs", `{"board": {"custom": "x"}}`: "want a list", `{"multirecord": [{"type": "psu"}]}`: "want management",
		`{"multirecord": [{"type": "management", "subtype": "none"}]}`: "unknown subtype", `{"multirecord": [{"type": "management", "subtype": "uuid", "uuid": "1"}]}`: "want a UUID",
		`{"multirecord": [{"type": "custom", "custom_type": "100", "data": ""}]}`: "custom_type", `[`: "spec",
	} {
		refuses(t, "frugen", bad, want, nil)
	}
}

func refuses(t *testing.T, kind, text, want string, o *foreign.Options) {
	t.Helper()
	spec, notes, err := foreign.Import(kind, []byte(text), o)
	require.ErrorIs(t, err, vpd.ErrSpec, text)
	require.ErrorContains(t, err, want, text)
	require.Nil(t, spec)
	require.Nil(t, notes)
}

func TestFruTool(t *testing.T) {
	get, image, _ := fields(t, "fru-tool", read(t, "foreign/frutool.toml"), nil)
	require.Len(t, image, 1024)
	require.Zero(t, image[1023])
	for path, want := range map[string]string{
		"internal.data": "deadbeef", "chassis.type": "0x17", "chassis.serial_number": "2024-03.0501", "board.date": "2024-03-05T14:30Z", "board.language": "0",
		"board.product_name": `Example \"Main\" Board`, "board.custom[1]": "B", "product.language": "25", "product.version": "2", "product.asset_tag": "ASSET-0042",
	} {
		require.Contains(t, get(path), want, path)
	}
	// Sections that are left out; a date of TOML, none, and data in a file.
	base := "[common]\nsize = 64\ninclude_chassis = false\n[chassis]\ntype = 1\n[board]\nmanufacturer = \"x y\"\n"
	for date, want := range map[string]string{"2024-03-05T14:30:00": "2024-03-05T14:30Z", "2024-03-05T14:30:00+01:00": "2024-03-05T13:30Z"} {
		get, _, _ = fields(t, "fru-tool", []byte(base+"mfg_date_time = "+date+"\n"), nil)
		require.Equal(t, want, get("board.date"))
	}
	spec, _, err := foreign.Import("fru-tool", []byte(base+"mfg_date_time = \"1996-01-01 00:00\"\n[internal]\nfile = \"f\"\n"),
		&foreign.Options{ReadFile: func(name string) ([]byte, error) { return []byte("in " + name), nil }})
	require.NoError(t, err)
	require.NotContains(t, string(spec), "date")
	require.NotContains(t, string(spec), "chassis")
	require.Contains(t, string(spec), fmt.Sprintf("%x", "in f"))
	_, _, err = foreign.Import("fru-tool", []byte("[internal]\nfile = \"f\"\n"), &foreign.Options{ReadFile: func(string) ([]byte, error) { return nil, fs.ErrNotExist }})
	require.ErrorIs(t, err, fs.ErrNotExist)

	for bad, want := range map[string]string{
		"[board\n": "line 2", "[none]\n": "unknown section", "board = 1": "want a section", "[board]\nx = 1": "unknown", "[board]\nlanguage_code = 256": "0 to 255",
		"[board]\nmanufacturer = 1": "want a string", "[board]\nmfg_date_time = \"yesterday\"": "YYYY-MM-DD", "[board]\nmfg_date_time = 5": "want a date",
		"[board]\ncustom_fields = \"x\"": "want a list", "[board]\ncustom_fields = [1]": "want a string", "[internal]\ndata = [256]": "0 to 255", "[internal]\ndata = 1.5": "want a list",
		"[internal]\nfile = \"f\"": "no files", "[common]\nformat_version = 2": "want 1", "[common]\ninclude_board = 1": "true or false", "[common]\nsize = -1": "want a number",
		"[multirecord]\nx = 1": "multirecord",
	} {
		refuses(t, "fru-tool", bad, want, nil)
	}
}

func TestOpenBMC(t *testing.T) {
	get, _, notes := fields(t, "openbmc", read(t, "foreign/openbmc-busctl.json"), nil)
	require.Empty(t, notes)
	for path, want := range map[string]string{
		"chassis.type": "0x17", "chassis.part_number": "NVS-CH-01", "board.language": "25", "board.date": "2024-03-05T14:30Z", "board.custom[1]": "LBG-1G",
		"board.serial_number": "NVS0123456789", "product.asset_tag": "ASSET-0042", "product.version": "0A",
	} {
		require.Equal(t, want, get(path), path)
	}
	get, _, notes = fields(t, "openbmc", read(t, "foreign/openbmc-config.json"), nil)
	require.Equal(t, "Example Card", get("product.product_name"))
	require.Equal(t, "nvstore", get("product.manufacturer"))
	require.Len(t, notes, 2)
	require.Contains(t, notes[0], `"nvstore" is what it finds`)
	for date, want := range map[string]string{"2020-01-01 - 12:00:00": "2020-01-01T12:00Z", "Thu Jul 11 17:09:00 2019": "2019-07-11T17:09Z"} {
		get, _, _ = fields(t, "openbmc", []byte(`[{"BOARD_MANUFACTURE_DATE": "`+date+`"}]`), nil)
		require.Equal(t, want, get("board.date"))
	}
	for bad, want := range map[string]string{
		`{}`: "no properties", `[1]`: "no properties", `x`: "spec", `{"BOARD_LANGUAGE_CODE": "x"}`: "0 to 255", `{"BOARD_MANUFACTURE_DATE": "x"}`: "want a date",
		`{"BOARD_NONE": "x"}`: "no property", `{"BOARD_INFO_AM2": "x"}`: "no property",
		`{"Probe": "xyz.openbmc_project.FruDevice({'BOARD_PRODUCT_NAME': 'A[0-9]+'})"}`: "regular expression",
	} {
		refuses(t, "openbmc", bad, want, nil)
	}
}

// The reference tool makes the same bytes of these settings.
func TestEepmake(t *testing.T) {
	_, image, notes := fields(t, "eepmake", read(t, "foreign/eepmake.txt"), nil)
	require.Empty(t, notes)
	require.Equal(t, read(t, "vpd/hat/plus.eep"), image)

	const head = "product_uuid 01234567-89ab-4def-8123-456789abcdef\nproduct_id 0x1\nproduct_ver 2\nvendor \"nvstore\"\nproduct \"a # b\" # comment\n"
	get, _, _ := fields(t, "eepmake", []byte(head+"gpio_drive 3\ngpio_slew 1\ngpio_hysteresis 2\nback_power 1\nsetgpio 4 ALT0 UP\nsetgpio 27 OUTPUT NONE\nbank1_gpio_drive 8\nsetgpio 28 INPUT DOWN\ndt_blob\n01 02\n03\nend\n"), nil)
	require.Equal(t, "1", get("version"))
	require.Equal(t, "a # b", get("atoms[0].vendor.product"))
	require.Equal(t, "9301"+"00000000a4"+strings.Repeat("00", 22)+"e1", get("atoms[1].gpio_bank0.data"))
	require.Equal(t, "010203", get("atoms[2].device_tree.data"))
	require.Equal(t, "0800c0"+strings.Repeat("00", 17), get("atoms[3].gpio_bank1.data"))
	get, _, _ = fields(t, "eepmake", []byte(head+"current_supply 3000\ncustom_data \"\nline\\\\\n\\0\n\\\"\n"), nil)
	require.Equal(t, "3000", get("atoms[1].power_supply_ma"))
	require.Equal(t, fmt.Sprintf("%x", "line\\\n\x00"), get("atoms[2].custom.data"))

	for bad, want := range map[string]string{
		"": "product_uuid", "product_uuid 00000000-0000-0000-0000-000000000000": "write one down", head + "nonsense 1": "line 6: unknown setting",
		head + "vendor x": "in quotes", head + "custom_data\nabc\n": "odd number", head + "custom_data\nxyz\n": "no hexadecimal", head + "custom_data \"\nx": "no end",
		head + "custom_data \"\n\\x\n": "unknown escape", head + "setgpio 46 INPUT UP": "0 to 45", head + "setgpio 4 INPUT": "wants", head + "setgpio 4 IN UP": "one of",
		head + "gpio_drive 9": "0 to 8", head + "bank1_back_power 1": "want a number", head + "dt_blob \"a\"\ndt_blob \"b\"": "second", head + "product_id 0x10000": "16 bits",
		head + "current_supply x": "milliamps", head + "custom_data \"a": "quote at its end",
	} {
		refuses(t, "eepmake", bad, want, nil)
	}
}

func TestVirtFirmware(t *testing.T) {
	get, _, notes := fields(t, "virt-firmware", read(t, "foreign/virt-firmware.json"), nil)
	require.Equal(t, "Timeout", get("variables[0].name"))
	require.Len(t, notes, 1)
	for bad, want := range map[string]string{`{}`: "want 2", `{"version": 1}`: "want 2", `{"version": 2}`: "variables: missing", `{"version": 2, "x": 1}`: "unknown", `x`: "spec"} {
		refuses(t, "virt-firmware", bad, want, nil)
	}
}

func TestUBoot(t *testing.T) {
	spec, notes, err := foreign.Import("uboot", read(t, "foreign/uboot.txt"), nil)
	require.NoError(t, err)
	require.Len(t, notes, 1)
	for path, want := range map[string]string{
		"bootdelay": "3", "bootargs": `console=ttyS0,115200 \nroot=/dev/mmcblk0p2 rw`, "ethaddr": "52:54:00:12:34:56", "serial#": "NVS0042", "empty": "",
	} {
		raw, err := edit.Get(spec, `variables["`+path+`"]`)
		require.NoError(t, err)
		require.Equal(t, `"`+want+`"`, string(raw))
	}
	// mkenvimage makes the same of it.
	f := formats.ByName("ubootenv")
	ours, warnings, err := f.Pack(spec)
	require.NoError(t, err)
	require.Empty(t, warnings)
	path := filepath.Join(t.TempDir(), "env")
	require.NoError(t, exec.Command("mkenvimage", "-s", "0x2000", "-o", path, "../../fixtures/foreign/uboot.txt").Run())
	theirs, err := os.ReadFile(path)
	require.NoError(t, err)
	require.Equal(t, theirs, ours)

	for bad, want := range map[string]string{"x\n": "want name=value", "=x\n": "want name=value", "a=1\na=2\n": "twice", "a=1\\\n": "backslash"} {
		refuses(t, "uboot", bad, want, nil)
	}
}

func TestHexDumps(t *testing.T) {
	get, image, _ := fields(t, "hex", read(t, "foreign/ethtool.txt"), nil)
	require.Len(t, image, 64)
	require.Equal(t, "raw", get("format"))
	_, image, _ = fields(t, "hex", read(t, "foreign/lspci.txt"), &foreign.Options{Device: "00:03.0"})
	require.Len(t, image, 32)
	require.Equal(t, "\x86\x80\x0e\x10", string(image[:4]))
	refuses(t, "hex", string(read(t, "foreign/lspci.txt")), "00:02.0, 00:03.0", nil)
	refuses(t, "hex", string(read(t, "foreign/lspci.txt")), "no device", &foreign.Options{Device: "00:04.0"})
	refuses(t, "hex", string(read(t, "foreign/ethtool.txt")), "names no devices", &foreign.Options{Device: "00:04.0"})
	// xxd: pairs of bytes, and characters that could be digits.
	_, image, _ = fields(t, "hex", []byte("00000000: 0100 0001 0000 00fe 0106 00c9 4279 7465  ............Byte\n00000010: 6162 63                                  abc\n"), &foreign.Options{Format: "raw"})
	require.Equal(t, "\x01\x00\x00\x01\x00\x00\x00\xfe\x01\x06\x00\xc9Byteabc", string(image))
	_, image, notes := fields(t, "hex", read(t, "foreign/i2cdump.txt"), &foreign.Options{Format: "raw"})
	require.Len(t, image, 48)
	require.Equal(t, "Byted", string(image[12:17]))
	require.Equal(t, []string{"2 bytes, XX in the dump, could not be read: they are 0xff here"}, notes)
	for bad, want := range map[string]string{
		"": "no line", "text\n": "no line", "10: 00\n": "want 0", "00: 01 02\n10: 03\n": "missing", "00: 01 02\n00: 03\n": "not behind",
		"00: 01\n*\n7fffffff: 01\n": "at most", "00000000: 01\n*\n": "ends in a *",
	} {
		refuses(t, "hex", bad, want, nil)
	}
	refuses(t, "hex", "00: 01\n", "unknown format", &foreign.Options{Format: "none"})
	refuses(t, "hex", "00: 01\n", "fru image", &foreign.Options{Format: "fru"})
}

// What Debian's tools print of every sample image is read as that image.
func TestRealHexDumps(t *testing.T) {
	paths, err := filepath.Glob("../../fixtures/vpd/*/*")
	require.NoError(t, err)
	n := 0
	for _, path := range paths {
		if ext := filepath.Ext(path); ext == ".md" || ext == ".jsonc" {
			continue
		}
		want, err := os.ReadFile(path)
		require.NoError(t, err)
		if len(want) > 64<<10 {
			continue
		}
		for _, cmd := range [][]string{{"hexdump", "-C", path}, {"hexdump", "-C", "-v", path}, {"xxd", path}, {"od", "-A", "x", "-t", "x1z", path}, {"od", "-A", "x", "-v", "-t", "x1", path}} {
			out, err := exec.Command(cmd[0], cmd[1:]...).Output()
			require.NoError(t, err)
			spec, _, err := foreign.Import("hex", out, &foreign.Options{Format: "raw"})
			require.NoError(t, err, "%v", cmd)
			got, _, err := formats.ByName("raw").Pack(spec)
			require.NoError(t, err)
			require.True(t, bytes.Equal(want, got), "%v", cmd)
		}
		n++
	}
	require.Greater(t, n, 10)
}

// lspci reads a device's configuration space from a tree as in sysfs, and prints
// it.
func TestRealLspci(t *testing.T) {
	dir := t.TempDir()
	device := filepath.Join(dir, "devices", "0000:00:03.0")
	require.NoError(t, os.MkdirAll(device, 0o755))
	config := make([]byte, 256)
	copy(config, "\x86\x80\x0e\x10\x07\x01\x00\x00\x03\x00\x00\x02")
	config[0xff] = 0xaa
	files := map[string]string{"config": string(config), "vendor": "0x8086\n", "device": "0x100e\n", "class": "0x020000\n", "irq": "0\n",
		"resource": strings.Repeat("0x0000000000000000 0x0000000000000000 0x0000000000000000\n", 7)}
	for name, text := range files {
		require.NoError(t, os.WriteFile(filepath.Join(device, name), []byte(text), 0o644))
	}
	out, err := exec.Command("lspci", "-A", "linux-sysfs", "-O", "sysfs.path="+dir, "-xxx").Output()
	require.NoError(t, err)
	_, image, _ := fields(t, "hex", out, &foreign.Options{Format: "raw"})
	require.Equal(t, config, image)
}

func TestKinds(t *testing.T) {
	for _, k := range foreign.Kinds() {
		require.NotEmpty(t, k.About)
	}
	refuses(t, "none", "", "unknown kind", nil)
}

// No text makes an import panic, or take memory without bound, and what comes
// out is a spec of its format.
func FuzzImport(fz *testing.F) {
	for i, k := range foreign.Kinds() {
		for _, name := range []string{"frugen.json", "frutool.toml", "openbmc-busctl.json", "openbmc-config.json", "virt-firmware.json", "uboot.txt", "ethtool.txt", "lspci.txt", "i2cdump.txt", "eepmake.txt"} {
			if strings.HasPrefix(strings.ReplaceAll(k.Name, "-", ""), name[:4]) || k.Name == "hex" {
				fz.Add(byte(i), read(fz, "foreign/"+name))
			}
		}
	}
	kinds := foreign.Kinds()
	fz.Fuzz(func(t *testing.T, i byte, text []byte) {
		k := kinds[int(i)%len(kinds)]
		spec, notes, err := foreign.Import(k.Name, text, nil)
		if err != nil {
			require.ErrorIs(t, err, vpd.ErrSpec)
			require.Nil(t, spec)
			require.Nil(t, notes)
			return
		}
		f, err := formats.OfSpec(spec)
		if err != nil {
			require.Nil(t, formats.ByName(k.Format))
			return
		}
		if k.Format != "" {
			require.Equal(t, k.Format, f.Name())
		}
		if _, _, err := f.Pack(spec); err != nil {
			var se *vpd.SpecError
			require.True(t, errors.As(err, &se))
		}
	})
}
