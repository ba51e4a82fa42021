package tlvinfo_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"hash/crc32"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/tlvinfo"
)

var f = tlvinfo.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "tlvinfo/"+name) }

func TestSample(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "switch.tlvinfo.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 2048)
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	formtest.CheckAny(t, f, image)
	end := 11 + int(binary.BigEndian.Uint16(image[9:]))
	require.Equal(t, []byte{0xfe, 4}, image[end-6:end-4])
	require.Equal(t, crc32.ChecksumIEEE(image[:end-4]), binary.BigEndian.Uint32(image[end-4:]))
	require.Contains(t, string(image), "\x24\x06\x52\x54\x00\x12\x34\x56\x2a\x02\x01\x00\x25\x1303/05/2024 14:30:00\x26\x01\x01\x27\x03R01")
}

const goodSpec = `{
  "format": "tlvinfo",
  "fields": {
    "product_name": "NVTEST",
    "mac_base": "02:fe:04:fe:ff:04",
    "vendor_extension": {
      "enterprise": 33049,
      "type": "hex",
      "data": "fe0461626364"
    },
    "vendor_extension#2": {
      "enterprise": 32473,
      "type": "hex",
      "data": "0001"
    }
  },
  "size": 256,
  "fill": "0xff"
}
`

func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "tlvinfo") {
		image := read(t, name)
		require.True(t, f.Detect(image))
		require.Equal(t, name == "bad-crc.bin", len(f.Verify(image)) > 0)
	}
	// The CRC is found by walking: its type is also in values.
	spec, warnings, err := f.Parse(read(t, "fe-in-value.bin"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, goodSpec, string(spec))

	image := read(t, "bad-crc.bin")
	problems := f.Verify(image)
	require.Len(t, problems, 1)
	require.Equal(t, "crc at byte 0x40: wrong CRC-32: got 0x12345678, want 0x4515ced1", problems[0].String())
	fixed, changes, err := f.Fix(image)
	require.NoError(t, err)
	require.Len(t, changes, 1)
	require.Equal(t, read(t, "switch.bin")[:256], fixed)
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "switch.bin"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 0x32, Len: 8, Name: "mac_base", Value: "52:54:00:12:34:56", CoveredBy: "crc"}, byName["mac_base"])
	require.Equal(t, "1", byName["mac_count"].Value)
	require.Empty(t, byName["trailing"].CoveredBy)
}

func TestSpecsRefused(t *testing.T) {
	long := strings.Repeat("x", 256)
	formtest.Refused(t, f, `{"format": "tlvinfo", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "tlvinfo"`},
		{"unknown member", `"tlvs": {}`, "tlvs: unknown"},
		{"fields a list", `"fields": []`, "fields: want an object"},
		{"unknown field", `"fields": {"serial": "x"}`, "fields.serial: unknown"},
		{"type by number for a name", `"fields": {"0x23": "x"}`, "fields.0x23: unknown"},
		{"type of three digits", `"fields": {"0x123": "x"}`, "unknown"},
		{"256 bytes", `"fields": {"serial_number": "` + long + `"}`, "256 bytes, want at most 255"},
		{"252 of an extension", `"fields": {"vendor_extension": {"enterprise": 1, "type": "text", "data": "` + long[:252] + `"}}`, "256 bytes, want at most 255"},
		{"not ASCII", `"fields": {"serial_number": "é"}`, "not printable ASCII"},
		{"number for text", `"fields": {"serial_number": 5}`, "want a string"},
		{"MAC short", `"fields": {"mac_base": "52:54:00:12:34"}`, "want a MAC address"},
		{"version 256", `"fields": {"device_version": 256}`, "from 0 to 255"},
		{"count 65536", `"fields": {"mac_count": 65536}`, "from 0 to 65535"},
		{"day first", `"fields": {"manufacture_date": "25/03/2024 14:30:00"}`, "month first"},
		{"date without time", `"fields": {"manufacture_date": "03/05/2024"}`, "month first"},
		{"country in lower case", `"fields": {"country_code": "de"}`, "two capital letters"},
		{"extension a string", `"fields": {"vendor_extension": "x"}`, "want an object"},
		{"enterprise of 33 bits", `"fields": {"vendor_extension": {"enterprise": 4294967296, "type": "hex", "data": ""}}`, "from 0 to 4294967295"},
		{"CRC a number", `"fields": {"crc": 1}`, "is computed"},
		{"second named as first", `"fields": {"vendor_extension": {"type": "hex", "data": ""}, "vendor_extension#3": {"type": "hex", "data": ""}}`, "named vendor_extension#2"},
		{"first named as second", `"fields": {"part_number#2": "x"}`, "named part_number"},
		{"too much", `"fields": {` + many(9) + `}`, "want at most 2037"},
		{"size too small", `"fields": {}, "size": 16`, "the data takes 17"},
		{"size too large", `"size": 262145`, "from 0 to 262144"},
	})
}

func many(n int) string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf(`"0x%02x": {"type": "hex", "data": "00", "count": 255}`, 0x50+i))
	}
	return strings.Join(list, ", ")
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 256), "header cut off": []byte("TlvInfo\x00\x01\x00"),
		"another text": []byte("TlvInfo2\x01\x00\x00"), "too long": append([]byte("TlvInfo\x00"), make([]byte, tlvinfo.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "tlvinfo", `, []formtest.Case{
		{"version", `"version": 2`, "version at byte 0x8: is 2, want 1"},
		{"wrong CRC", `"fields": {"crc": {"type": "hex", "data": "00000000"}}`, "crc at byte 0xd: wrong CRC-32: got 0x00000000"},
		{"short CRC", `"fields": {"crc": {"type": "hex", "data": "000000"}}`, "crc at byte 0xb: has 3 bytes, want 4"},
		{"no CRC", `"fields": {"crc": null}`, "crc: is missing"},
		{"CRC not last", `"fields": {"crc": {"type": "crc32"}, "serial_number": "x"}`, "is not the last TLV"},
		{"type twice", `"fields": {"serial_number": "x", "serial_number#2": "y"}`, "serial_number#2 at byte 0xe: type comes more"},
		{"bytes in text", `"fields": {"serial_number": {"type": "hex", "data": "ff"}}`, "not printable ASCII"},
		{"MAC of 5", `"fields": {"mac_base": {"type": "hex", "data": "0000000000"}}`, "has 5 bytes, want 6"},
		{"multicast", `"fields": {"mac_base": "01:00:00:00:00:00"}`, "multicast"},
		{"date", `"fields": {"manufacture_date": {"type": "text", "data": "2024-03-05"}}`, "not a date"},
		{"country", `"fields": {"country_code": {"type": "text", "data": "DEU"}}`, "two capital letters"},
		{"version of 2", `"fields": {"device_version": {"type": "hex", "data": "0001"}}`, "number of 2 bytes, want 1"},
		{"count of 1", `"fields": {"mac_count": {"type": "hex", "data": "01"}}`, "number of 1 bytes, want 2"},
		{"no vendor", `"fields": {"vendor_extension": {"type": "hex", "data": "010203"}}`, "the vendor's number takes 4"},
		{"tail", `"tail": {"type": "hex", "data": "21ff"}`, "tail at byte 0x11: 2 bytes"},
		{"total length beyond the image", `"total_length": 99`, "is 99, and the image has 6"},
	})
	// Two faults at once, for they go together.
	image, warnings, err := f.Pack([]byte(`{"format": "tlvinfo", "total_length": 2301, "fields": {` + many(9) + `}}`))
	require.NoError(t, err)
	require.Len(t, warnings, 3) // the length, the TLV it cuts, the CRC behind
	formtest.CheckAny(t, f, image)
	image, warnings, err = f.Pack([]byte(`{"format": "tlvinfo", "total_length": 0, "size": 64, "fields": {"part_number": "x"}}`))
	require.NoError(t, err)
	require.Len(t, warnings, 1)
	formtest.CheckAny(t, f, image)
}

func TestRandomSpecs(t *testing.T) {
	names := []string{"product_name", "part_number", "serial_number", "label_revision", "platform_name",
		"onie_version", "manufacturer", "vendor", "diag_version", "service_tag", "0x00", "0x50", "0xff"}
	rapid.Check(t, func(t *rapid.T) {
		var b strings.Builder
		for _, name := range rapid.Permutation(names).Draw(t, "order")[:rapid.IntRange(0, len(names)).Draw(t, "fields")] {
			v, err := json.Marshal(rapid.StringMatching(`[ -~]{0,60}`).Draw(t, name))
			require.NoError(t, err)
			fmt.Fprintf(&b, "%q: %s,\n", name, v)
		}
		fmt.Fprintf(&b, `"mac_base": "02:%02x:00:00:00:00", "mac_count": %d, "device_version": %d,`,
			rapid.Byte().Draw(t, "mac"), rapid.Uint16().Draw(t, "count"), rapid.Byte().Draw(t, "version"))
		for i := range rapid.IntRange(0, 3).Draw(t, "extensions") {
			name := "vendor_extension"
			if i > 0 {
				name = fmt.Sprintf("vendor_extension#%d", i+1)
			}
			fmt.Fprintf(&b, `%q: {"enterprise": %d, "type": "hex", "data": "%x"},`, name,
				rapid.Uint32().Draw(t, "enterprise"), rapid.SliceOfN(rapid.Byte(), 0, 60).Draw(t, "data"))
		}
		spec := fmt.Sprintf(`{"format": "tlvinfo", "fields": {%s}, "size": %d, "fill": %d}`, b.String(),
			rapid.IntRange(2048, 4096).Draw(t, "size"), rapid.Byte().Draw(t, "fill"))
		image, warnings, err := f.Pack([]byte(spec))
		require.NoError(t, err, "%s", spec)
		require.Empty(t, warnings)
		end := 11 + int(binary.BigEndian.Uint16(image[9:]))
		require.Equal(t, crc32.ChecksumIEEE(image[:end-4]), binary.BigEndian.Uint32(image[end-4:]))
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, bytes.Clone(read(t, "fe-in-value.bin")))
}

func FuzzTlvInfo(fz *testing.F) {
	for _, name := range []string{"fe-in-value.bin", "bad-crc.bin"} {
		fz.Add(read(fz, name))
	}
	fz.Add([]byte("TlvInfo\x00\x01\x00\x0e\xfe\x04\x00\x00\x00\x00\xfe\x04\x00\x00\x00\x00\x21\xff"))
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "switch.tlvinfo.jsonc"))
	fz.Add([]byte(goodSpec))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
