package hat_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/hat"
	"nvstore.dev/vpd/internal/formtest"
)

var f = hat.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "hat/"+name) }

func TestSample(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "sensor.hat.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 4096)
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	formtest.CheckAny(t, f, image)
}

// From the settings that eepmake read comes what eepmake wrote.
func TestEepmake(t *testing.T) {
	lorem := "\nLorem ipsum dolor sit amet, consectetur adipiscing elit, sed do eiusmod tempor\n" +
		"incididunt ut labore et dolore magna aliqua. Ut enim ad minim veniam, quis\n" +
		"nostrud exercitation ullamco laboris nisi ut aliquip ex ea commodo consequat.\n" +
		"Duis aute irure dolor in reprehenderit in voluptate velit esse cillum dolore\n" +
		"eu fugiat nulla pariatur. Excepteur sint occaecat cupidatat non proident, sunt\n" +
		"in culpa qui officia deserunt mollit anim id est laborum.\n"
	custom, err := json.Marshal(lorem[1:])
	require.NoError(t, err)
	image, warnings, err := f.Pack([]byte(`{"format": "hat", "version": 2, "atoms": [
		{"vendor": {"uuid": "01234567-89ab-4def-8123-456789abcdef", "product_id": 0, "product_version": 0,
		            "vendor": "ACME Technology Company", "product": "Special Sensor Board"}},
		{"device_tree": "acme-sensor"},
		{"custom": {"type": "hex", "data": "deadbeef c001c0de"}},
		{"custom": ` + string(custom) + `}]}`))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, read(t, "plus.eep"), image)
}

func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "hat") {
		require.True(t, f.Detect(read(t, name)))
	}
	require.Empty(t, f.Verify(read(t, "plus.eep")))
	image := read(t, "bad-crc.eep")
	problems := f.Verify(image)
	require.Len(t, problems, 2)
	require.Contains(t, problems[0].String(), "atoms[0] at byte 0x55: wrong CRC-16: got 0xf032, want ")
	require.Equal(t, "atoms[3] at byte 0x244: wrong CRC-16: got 0x28bc, want 0xa8bc", problems[1].String())
	fixed, changes, err := f.Fix(image)
	require.NoError(t, err)
	require.Len(t, changes, 2)
	require.Equal(t, read(t, "plus.eep")[0x57:], fixed[0x57:])
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "plus.eep"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 0x14, Len: 16, Name: "atoms[0].vendor.uuid", Value: "01234567-89ab-4def-8123-456789abcdef", CoveredBy: "atoms[0].crc"}, byName["atoms[0].vendor.uuid"])
	require.Equal(t, "Special Sensor Board", byName["atoms[0].vendor.product"].Value)
	require.Equal(t, "acme-sensor", byName["atoms[1].data"].Value)
	require.Empty(t, byName["length"].CoveredBy)
}

const vendor = `{"vendor": {"uuid": "01234567-89ab-4def-8123-456789abcdef", "vendor": "a", "product": "b"}}`

func TestSpecsRefused(t *testing.T) {
	v := func(members string) string { return `"atoms": [{"vendor": {` + members + `}}]` }
	id := `"uuid": "01234567-89ab-4def-8123-456789abcdef", `
	formtest.Refused(t, f, `{"format": "hat", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "hat"`},
		{"unknown member", `"atom": []`, "atom: unknown"},
		{"atoms an object", `"atoms": {}`, "atoms: want a list"},
		{"atom of nothing", `"atoms": [{}]`, "atoms[0]: want one member"},
		{"two in an atom", `"atoms": [{"custom": "a", "device_tree": "b"}]`, "want one member"},
		{"unknown atom", `"atoms": [{"gpio": "a"}]`, "atoms[0].gpio: unknown"},
		{"no data", `"atoms": [{"type": 9}]`, "data: missing"},
		{"type of 17 bits", `"atoms": [{"type": 65536, "data": ""}]`, "from 0 to 65535"},
		{"no UUID", v(`"vendor": "a", "product": "b"`), "uuid: missing"},
		{"UUID short", v(`"uuid": "01234567-89ab-4def-8123-456789abcd", "vendor": "a", "product": "b"`), "want a UUID"},
		{"no vendor", v(id + `"product": "b"`), "vendor.vendor: missing"},
		{"no product", v(id + `"vendor": "b"`), "vendor.product: missing"},
		{"vendor of 256", v(id + `"vendor": "` + strings.Repeat("x", 256) + `", "product": "b"`), "want at most 255"},
		{"vendor not ASCII", v(id + `"vendor": "é", "product": "b"`), "not printable ASCII"},
		{"product id of 17 bits", v(id + `"vendor": "a", "product": "b", "product_id": 65536`), "from 0 to 65535"},
		{"unknown of vendor", v(id + `"vendor": "a", "product": "b", "serial": 1`), "serial: unknown"},
		{"GPIO of 29", `"atoms": [{"gpio_bank0": {"type": "hex", "data": "00", "count": 29}}]`, "29 bytes, want 30"},
		{"GPIO bank 1 of 21", `"atoms": [{"gpio_bank1": {"type": "hex", "data": "00", "count": 21}}]`, "from 0 to 20"},
		{"current a string", `"atoms": [{"power_supply_ma": "much"}]`, "want an integer"},
		{"count of 17 bits", `"atoms": [{"custom": "a", "count": 65536}]`, "from 0 to 65535"},
		{"too much", `"atoms": [{"custom": {"type": "hex", "data": "00", "count": 262144}}]`, "would exceed 262144"},
		{"size too small", `"atoms": [{"custom": ""}], "size": 21`, "the data takes 22"},
	})
}

func TestImagesRefused(t *testing.T) {
	good := read(t, "plus.eep")
	for name, image := range map[string][]byte{
		"nothing": nil, "erased": bytes.Repeat([]byte{0xff}, 64), "cut off": good[:11], "another text": append([]byte("r"), good[1:]...),
		"too long": append(bytes.Clone(good), make([]byte, hat.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	atoms := `"atoms": [` + vendor
	formtest.Irregular(t, f, `{"format": "hat", `, []formtest.Case{
		{"version 3", atoms + `], "version": 3`, "version at byte 0x4: is 3"},
		{"reserved", atoms + `], "reserved": 1`, "reserved at byte 0x5: is 0x01"},
		{"more atoms said", atoms + `], "atom_count": 2`, "atom_count at byte 0x6: is 2, and there are 1 atoms: 0 bytes are left"},
		{"fewer atoms said", atoms + `, {"custom": "x"}], "atom_count": 1`, "tail at byte 0x2e: 11 bytes"},
		{"length beyond", atoms + `], "length": 99`, "length at byte 0x8: is 99, and the image has 46"},
		{"CRC", atoms + `, {"custom": "x", "crc": 0}]`, "atoms[1] at byte 0x37: wrong CRC-16: got 0x0000"},
		{"count", atoms + `, {"custom": "x", "count": 7}]`, "atoms[1] at byte 0x30: has count 7, want 1"},
		{"type 0", atoms + `, {"type": 0, "data": ""}]`, "invalid type 0x0000"},
		{"type 0xffff", atoms + `, {"type": "0xffff", "data": ""}]`, "invalid type 0xffff"},
		{"vendor atom short", `"atoms": [{"type": 1, "data": {"type": "hex", "data": "00"}}]`, "whose strings don't fill it"},
		{"GPIO short", atoms + `, {"type": 2, "data": "x"}]`, "has 1 bytes of data, and an atom of type gpio_bank0 has 30"},
		{"power of 2 bytes", atoms + `, {"type": 6, "data": "xy"}]`, "power_supply_ma has 4"},
		{"custom empty", atoms + `, {"custom": ""}]`, "has no data"},
		{"vendor second", `"atoms": [{"custom": "x"}, ` + vendor + `]`, "atoms[0] at byte 0xc: is not the vendor"},
		{"no atoms", `"atoms": []`, "is not the vendor"},
		{"tail", atoms + `], "tail": {"type": "hex", "data": "00"}`, "tail at byte 0x2e: 1 bytes"},
	})
}

// A length that leaves no room for atoms is two faults.
func TestLengthBelowHeader(t *testing.T) {
	image, warnings, err := f.Pack([]byte(`{"format": "hat", "length": 3, "atoms": [` + vendor + `]}`))
	require.NoError(t, err)
	require.Len(t, warnings, 2)
	require.Equal(t, "length at byte 0x8: is 3, and the header alone has 12", warnings[1].String())
	formtest.CheckAny(t, f, image)
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		str := func(label string) string {
			b, err := json.Marshal(rapid.StringMatching(`[ -~]{0,255}`).Draw(t, label))
			require.NoError(t, err)
			return string(b)
		}
		hex := func(label string, low, high int) string {
			return fmt.Sprintf(`{"type": "hex", "data": "%x"}`, rapid.SliceOfN(rapid.Byte(), low, high).Draw(t, label))
		}
		atoms := []string{fmt.Sprintf(`{"vendor": {"uuid": "%x", "product_id": %d, "product_version": %d, "vendor": %s, "product": %s}}`,
			rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "uuid"), rapid.Uint16().Draw(t, "id"), rapid.Uint16().Draw(t, "version"), str("vendor"), str("product"))}
		for range rapid.IntRange(0, 5).Draw(t, "atoms") {
			atoms = append(atoms, rapid.OneOf(
				rapid.Just(`{"gpio_bank0": `+hex("gpio0", 30, 30)+`}`),
				rapid.Just(`{"gpio_bank1": `+hex("gpio1", 20, 20)+`}`),
				rapid.Just(`{"device_tree": `+str("tree")+`}`),
				rapid.Just(`{"custom": `+hex("custom", 1, 300)+`}`),
				rapid.Just(fmt.Sprintf(`{"power_supply_ma": %d}`, rapid.Uint32().Draw(t, "power"))),
				rapid.Just(`{"type": "0x0007", "data": `+hex("data", 0, 99)+`}`),
			).Draw(t, "atom"))
		}
		spec := fmt.Sprintf(`{"format": "hat", "version": %d, "atoms": [%s], "size": %d, "fill": %d}`,
			rapid.IntRange(1, 2).Draw(t, "version"), strings.Join(atoms, ", "), rapid.IntRange(4096, 8192).Draw(t, "size"), rapid.Byte().Draw(t, "fill"))
		image, warnings, err := f.Pack([]byte(spec))
		require.NoError(t, err, "%s", spec)
		require.Empty(t, warnings)
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, bytes.Clone(read(t, "plus.eep")))
}

func FuzzHAT(fz *testing.F) {
	for _, name := range []string{"plus.eep", "bad-crc.eep"} {
		fz.Add(read(fz, name))
	}
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "sensor.hat.jsonc"))
	fz.Add([]byte(`{"format": "hat", "version": 3, "reserved": 1, "atom_count": 9, "length": 3, "atoms": [` + vendor + `, {"type": 2, "data": "", "count": 5, "crc": 1}], "tail": "abc", "trailing": "x", "size": 300, "fill": 0}`))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
