package nic_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/nic"
)

var f = nic.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "nic/"+name) }

func sumWords(b []byte) (sum uint16) {
	for i := 0; i < len(b); i += 2 {
		sum += binary.LittleEndian.Uint16(b[i:])
	}
	return sum
}

var samples = map[string]int{"desktop": 128, "server": 1024, "quad": 2048, "eepro100": 128, "rtl8139": 128, "tulip": 128, "pcnet": 16}

func TestSamples(t *testing.T) {
	images := map[string][]byte{}
	for name, size := range samples {
		image := formtest.Pack(t, f, read(t, name+".nic.jsonc"))
		require.Len(t, image, size)
		require.True(t, f.Detect(image), name)
		images[name] = image
	}
	for _, name := range []string{"desktop", "server", "quad", "eepro100"} {
		require.Equal(t, uint16(0xbaba), sumWords(images[name][:128]), name)
	}
	for i, first := range []int{0, 0x80, 0xc0, 0x100} {
		section := images["quad"][2*first:][:128]
		require.Equal(t, uint16(0xbaba), sumWords(section))
		require.Equal(t, []byte{0x52, 0x54, 0, 0x11, 0, byte(i)}, section[:6])
	}
	server := images["server"]
	require.Equal(t, "\x06\x001G325400\x002"[:8], string(server[0x80:0x88]), "six words, in each the first character in the upper half")
	require.Equal(t, []byte{0x13, 0xe2, 0x01, 0x00}, images["desktop"][16:20])
}

func TestFixtures(t *testing.T) {
	bad := map[string]string{
		"bad-checksum.bin": "checksum at byte 0x7e: wrong checksum: got ",
		"bad-port.bin":     "lan2.checksum at byte 0x1fe: wrong checksum: got ",
		"bad-id-block.bin": "id_block_crc at byte 0x10: wrong CRC-8: got 0xac, want 0xec",
		"bad-aprom.bin":    "checksum at byte 0xc: wrong checksum: got ",
	}
	for _, name := range formtest.Images(t, f, "nic") {
		image := read(t, name)
		problems := f.Verify(image)
		require.True(t, f.Detect(image), name)
		if bad[name] == "" {
			require.Empty(t, problems, name)
			continue
		}
		require.Len(t, problems, 1, name)
		require.Contains(t, problems[0].String(), bad[name])
		fixed, changes, err := f.Fix(image)
		require.NoError(t, err)
		require.Empty(t, f.Verify(fixed))
		// The checksum of all has to follow the CRC of the ID block.
		require.Len(t, changes, map[bool]int{false: 1, true: 2}[name == "bad-id-block.bin"])
	}
	for bad, good := range map[string]string{"bad-checksum.bin": "good.bin", "bad-id-block.bin": "tulip.bin"} {
		fixed, _, err := f.Fix(read(t, bad))
		require.NoError(t, err)
		require.Equal(t, read(t, good), fixed)
	}
}

const goodSpec = `{
  "format": "nic",
  "model": "8254x",
  "mac": "52:54:00:12:34:5a",
  "compatibility": "0x0000",
  "pba": "A12345-002",
  "init_control_1": "0x4403",
  "subsystem_id": "0x100f",
  "subsystem_vendor_id": "0x8086",
  "device_id": "0x100f",
  "vendor_id": "0x8086"
}
`

func TestParse(t *testing.T) {
	spec, warnings, err := f.Parse(read(t, "good.bin"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, goodSpec, string(spec))
	spec, warnings, err = f.Parse(read(t, "bad-port.bin"))
	require.NoError(t, err)
	require.Len(t, warnings, 1)
	require.Contains(t, string(spec), `"lan2": {
    "mac": "52:54:01:22:00:02",
    "init_control_2": "0x1002",
    "checksum": "0x`)
}

func TestFields(t *testing.T) {
	byName := formtest.Fields(t, f, formtest.Pack(t, f, read(t, "server.nic.jsonc")))
	require.Equal(t, vpd.Field{Off: 0x1a, Len: 2, Name: "device_id", Value: "0x10d3 82574L", CoveredBy: "checksum"}, byName["device_id"])
	require.Equal(t, vpd.Field{Off: 0x80, Len: 12, Name: "pba_string", Value: "G12345-002"}, byName["pba_string"])
	for _, fd := range formtest.Fields(t, f, read(t, "tulip.bin")) {
		require.Equal(t, fd.Off < 18, fd.CoveredBy == "id_block_crc", "%s", fd.Name)
	}
}

func TestSpecsRefused(t *testing.T) {
	formtest.Refused(t, f, `{"format": "nic", "model": "82574", "mac": "52:54:00:12:34:56", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "nic"`},
		{"no model", `{"format": "nic"}`, "model: missing; want one of 8254x,"},
		{"unknown model", `{"format": "nic", "model": "ne2000"}`, `unknown "ne2000"`},
		{"no address", `{"format": "nic", "model": "8254x"}`, "mac: missing"},
		{"address of zeros", `{"format": "nic", "model": "8254x", "mac": "00:00:00:00:00:00", "device_id": "0xffff"}`, "model: the result would not be recognised"},
		{"another's device ID", `"device_id": "0x1521"`, "the result would not be recognised: nic image at byte 0x0: 128 bytes, and i350 takes 640"},
		{"another's device ID, large", `"device_id": "0x1521", "size": 2048`, "would be recognised as i350, not 82574"},
		{"unknown member", `"serial": 1`, "serial: unknown"},
		{"another model's member", `"lan1": {}`, "lan1: unknown"},
		{"member of a port", `{"format": "nic", "model": "i350", "lan1": {"pba": "E21300-001"}}`, "lan1.pba: unknown"},
		{"port a string", `{"format": "nic", "model": "i350", "lan1": "x"}`, "lan1: want an object"},
		{"MAC short", `{"format": "nic", "model": "8254x", "mac": "52:54:00:12:34"}`, "mac: want a MAC address"},
		{"MAC of 5 bytes", `{"format": "nic", "model": "8254x", "mac": {"type": "hex", "data": "5254001234"}}`, "mac: 5 bytes, want 6"},
		{"word of 17 bits", `"init_control_1": 65536`, "from 0 to 65535"},
		{"PBA short", `"pba": "E21300-01"`, "pba: want a number such as E21300-001"},
		{"PBA in lower case", `"pba": "e21300-001"`, "pba: want a number"},
		{"string without a place", `"pba_string": "G12345-002"`, "pba_string: nothing points to it"},
		{"string over fields", `"pba": "string at 0x0000", "pba_string": "G12345-002"`, "pba_string: overlaps other fields at byte 0x0"},
		{"string behind the image", `"pba": "string at 0x0040", "pba_string": "G12345-002"`, "pba_string: nothing points to it"},
		{"string that doesn't fit", `"size": 134, "pba": "string at 0x0040", "pba_string": "G12345-002"`, "pba_string: 12 bytes, and 6 are left"},
		{"string empty", `"size": 256, "pba": "string at 0x0040", "pba_string": ""`, "want 1 to 64 printable"},
		{"63 words", `"size": 126`, "size: 126, and 82574 takes 128"},
		{"half a word", `"size": 129`, "half a word"},
		{"too large", `"size": 65538`, "from 0 to 65536"},
		{"patch behind the end", `"patches": [{"offset": 127, "type": "hex", "data": "0000"}]`, "patches[0]: ends behind the image"},
		{"patch without offset", `"patches": [{"type": "hex", "data": "00"}]`, "patches[0].offset: missing"},
		{"patches overlap", `"patches": [{"offset": 80, "type": "hex", "data": "0000"}, {"offset": 81, "type": "hex", "data": "00"}]`, "patches[1]: overlaps"},
		{"patches no list", `"patches": {}`, "patches: want a list"},
	})
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "16 bytes": make([]byte, 16), "63 words": make([]byte, 126), "erased": bytes.Repeat([]byte{0xff}, 128),
		"zeros": make([]byte, 512), "half a word": bytes.Repeat([]byte{0x29, 0x81, 0}, 43), "text": bytes.Repeat([]byte("hello, world. "), 20),
		"too large": bytes.Repeat([]byte{0x29, 0x81}, nic.MaxSize/2+1), "three ports": read(t, "bad-port.bin")[:0x200],
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "nic", "model": "82574", "mac": "52:54:00:12:34:56", `, []formtest.Case{
		{"wrong checksum", `"checksum": "0x0000"`, "checksum at byte 0x7e: wrong checksum: got 0x0000, want 0x"},
		{"multicast", `{"format": "nic", "model": "8254x", "mac": "53:54:00:12:34:56"}`, "mac at byte 0x0: is a multicast address"},
		{"a port's checksum", `{"format": "nic", "model": "i350", "mac": "52:54:00:12:34:56", "lan3": {"checksum": 1}}`, "lan3.checksum at byte 0x27e"},
		{"empty to the chip", `{"format": "nic", "model": "8254x", "mac": "52:54:00:12:34:56", "init_control_1": "0xffff"}`, "bits 15:14 are its signature: got 11b, want 01b"},
		{"VPD behind the image", `"vpd_pointer": "0x0040"`, "vpd_pointer at byte 0x5e: points behind the image: got word 0x0040"},
		{"PBA string", `"size": 256, "pba": "string at 0x0050", "pba_string": {"type": "hex", "data": "02000102"}`, "pba_string at byte 0xa0: is not printable"},
		{"CRC of the ID block", `{"format": "nic", "model": "tulip", "mac": "52:54:00:12:34:56", "id_block_crc": 0}`, "id_block_crc at byte 0x10: wrong CRC-8: got 0x00"},
		{"CRC", `{"format": "nic", "model": "tulip", "mac": "52:54:00:12:34:56", "checksum": 0}`, "checksum at byte 0x7e: wrong CRC: got 0x0000"},
		{"sum at the end", `{"format": "nic", "model": "eepro100", "size": 512, "mac": "52:54:00:12:34:56", "checksum": 0}`, "checksum at byte 0x1fe"},
		{"APROM", `{"format": "nic", "model": "pcnet", "mac": "52:54:00:12:34:56", "checksum": 0}`, "checksum at byte 0xc"},
	})
}

func TestRandomSpecs(t *testing.T) {
	intel := []string{"8254x", "82574", "82576", "i210", "i350"}
	own := map[string]string{"8254x": "serdes_amplitude", "82574": "boot_agent_main", "82576": "nvm_version", "i210": "alternate_mac_pointer",
		"i350": "init_control_1", "eepro100": "controller", "rtl8139": "subsystem_id", "tulip": "subsystem_id"}
	rapid.Check(t, func(t *rapid.T) {
		model := rapid.SampledFrom(slices.Sorted(maps.Keys(own))).Draw(t, "model")
		fill := byte(0)
		members := []string{
			fmt.Sprintf(`"mac": "02:%02x:aa:bb:cc:dd"`, rapid.Byte().Draw(t, "mac")),
			fmt.Sprintf("%q: %d", own[model], rapid.Uint16().Draw(t, "word")),
		}
		if slices.Contains(intel, model) {
			fill = 0xff
			members = append(members, `"pba": "string at 0x0200"`,
				fmt.Sprintf(`"pba_string": %q`, rapid.StringMatching(`[A-Z][0-9]{5}-0[0-9]{0,10}`).Draw(t, "pba")))
		}
		if model == "i350" {
			members = append(members, fmt.Sprintf(`"lan2": {"mac": "02:%02x:aa:bb:cc:dd"}`, rapid.Byte().Draw(t, "mac of lan2")))
		}
		spec := fmt.Sprintf(`{"format": "nic", "model": %q, %s, "size": 2048, "fill": %d,
			"patches": [{"offset": "0x300", "type": "hex", "data": "%x"}, {"offset": "0x50", "type": "hex", "data": "%x"}]}`,
			model, strings.Join(members, ", "), fill,
			rapid.SliceOfN(rapid.Byte(), 0, 200).Draw(t, "patch"), rapid.SliceOfN(rapid.Byte(), 0, 14).Draw(t, "patch in the middle"))
		image, warnings, err := f.Pack([]byte(spec))
		require.NoError(t, err, "%s", spec)
		require.Empty(t, warnings)
		require.Len(t, image, 2048)
		require.Equal(t, model != "rtl8139", f.Detect(image)) // which has no checksum, and is no 93C46 here
		if slices.Contains(intel, model) {
			require.Equal(t, uint16(0xbaba), sumWords(image[:128]))
		}
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	for _, name := range []string{"good.bin", "tulip.bin", "bad-aprom.bin"} {
		formtest.Damage(t, f, read(t, name))
	}
	image, _, err := f.Pack(read(t, "server.nic.jsonc"))
	require.NoError(t, err)
	formtest.Damage(t, f, image[:256])
}

func FuzzNIC(fz *testing.F) {
	for _, name := range []string{"good.bin", "bad-port.bin", "bad-id-block.bin", "bad-aprom.bin"} {
		fz.Add(read(fz, name))
	}
	for name := range samples {
		image, _, err := f.Pack(read(fz, name+".nic.jsonc"))
		require.NoError(fz, err)
		fz.Add(image)
	}
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	for name := range samples {
		fz.Add(read(fz, name+".nic.jsonc"))
	}
	fz.Add([]byte(goodSpec))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
