package gvpd_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/gvpd"
	"nvstore.dev/vpd/internal/formtest"
)

var f = gvpd.Format()

const header = "\xfe\x09\x01gVpdInfo\x04"

func read(t testing.TB, name string) []byte { return formtest.Read(t, "gvpd/"+name) }

func TestSample(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "chromebook.gvpd.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 16384)
	require.Equal(t, header, string(image[0x600:0x60c]))
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	formtest.CheckAny(t, f, image)
}

// The examples of the specification's section on syntax.
func TestSpecification(t *testing.T) {
	image, warnings, err := f.Pack([]byte(`{"format": "gvpd", "before": "", "values": {
		"UUID": "0123456789ABCDEF", "3G_IMEI": "AABBBBBB-CC-DD", "ethernet_mac": {"type": "hex", "data": "2a0203b3d57c"}}}`))
	require.NoError(t, err)
	require.Empty(t, warnings)
	want := "\x01\x04UUID\x100123456789ABCDEF\x01\x073G_IMEI\x0eAABBBBBB-CC-DD\x01\x0cethernet_mac\x06\x2a\x02\x03\xb3\xd5\x7c\x00"
	require.Equal(t, header+string(binary.LittleEndian.AppendUint32(nil, uint32(len(want))))+want, string(image))

	image, warnings, err = f.Pack([]byte(`{"format": "gvpd", "before": "", "values": {"any": {"type": "text", "data": "Very long", "size": 65793, "fill": 32}}}`))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, "\x01\x03any\x84\x82\x01Very", string(image[16:28]))
	require.Len(t, image, 16+8+65793+1)
	formtest.CheckAny(t, f, image)
}

func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "gvpd") {
		require.True(t, f.Detect(read(t, name)))
	}
	require.Empty(t, f.Verify(read(t, "empty.bin")))
	spec, _, err := f.Parse(read(t, "empty.bin"))
	require.NoError(t, err)
	require.Contains(t, string(spec), `"values": {}`)
	require.Contains(t, string(spec), `"data": "036173730431313131`, "what an earlier write left")

	problems := f.Verify(read(t, "broken.bin"))
	require.Len(t, problems, 1)
	require.Equal(t, "tail at byte 0x623: no terminator behind 1 entries: an entry's value has 120 bytes, and 4 are left",
		problems[0].String())
	spec, warnings, err := f.Parse(read(t, "broken.bin"))
	require.NoError(t, err)
	require.Len(t, warnings, 1)
	require.Contains(t, string(spec), `"serial_number": "abc"`)
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "broken.bin"))
	require.NoError(t, err)
	require.Equal(t, vpd.Field{Off: 0x610, Len: 19, Name: "values.serial_number", Value: "abc"}, fields[3])
	require.Equal(t, "tail", fields[4].Name)
}

func TestSpecsRefused(t *testing.T) {
	formtest.Refused(t, f, `{"format": "gvpd", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "gvpd"`},
		{"unknown member", `"value": {}`, "value: unknown"},
		{"values a list", `"values": []`, "values: want an object"},
		{"key with a dash", `"values": {"a-b": "x"}`, "a key is of letters"},
		{"key empty", `"values": {"": "x"}`, "a key is of letters"},
		{"key twice", `"values": {"a": "x", "a": "y"}`, "values.a: comes twice"},
		{"value a number", `"values": {"a": 1}`, "values.a: want a string"},
		{"value not ASCII", `"values": {"a": "é"}`, "not printable ASCII"},
		{"values and entries", `"values": {}, "entries": []`, "can't stand beside"},
		{"entry without key", `"entries": [{"value": "x"}]`, "entries[0].key: missing"},
		{"entry without value", `"entries": [{"key": "x"}]`, "entries[0].value: missing"},
		{"entry of type 2", `"entries": [{"key": "x", "value": "x", "type": 2}]`, "want 0x01 or 0xfe"},
		{"raw of two", `"entries": [{"raw": {"type": "hex", "data": "010000010000"}}]`, "is not one entry"},
		{"raw of none", `"entries": [{"raw": ""}]`, "is not one entry"},
		{"raw cut off", `"entries": [{"raw": {"type": "hex", "data": "01"}}]`, "is not one entry"},
		{"raw of 33 bits", `"entries": [{"raw": {"type": "hex", "data": "01908080808000"}}]`, "is not one entry"},
		{"raw and key", `"entries": [{"raw": {"type": "hex", "data": "010000"}, "key": ""}]`, "key: unknown"},
		{"header in front", `"before": {"type": "hex", "data": "fe090167567064496e666f0400000000"}`, "a header of its own"},
		{"too much", `"values": {"a": {"type": "hex", "data": "00", "count": 262144}}`, "would exceed 262144"},
		{"size too small", `"values": {}, "size": 1552`, "the data takes 1553"},
	})
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "erased": bytes.Repeat([]byte{0xff}, 4096), "cut off": []byte(header + "\x00\x00\x00"),
		"version 2": []byte("\xfe\x09\x02gVpdInfo\x04\x01\x00\x00\x00\x00"), "too long": append([]byte(header), make([]byte, gvpd.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "gvpd", "before": "", `, []formtest.Case{
		{"size beyond the image", `"data_size": 99`, "data_size at byte 0xc: is 99, and the image has 1"},
		{"size too small", `"values": {"a": "b"}, "data_size": 5`, "tail at byte 0x15: no terminator behind 1 entries: the data ends"},
		{"no terminator", `"values": {"a": "b"}, "tail": ""`, "no terminator behind 1 entries: the data ends"},
		{"behind the terminator", `"tail": {"type": "hex", "data": "00ff"}`, "tail at byte 0x11: 1 bytes"},
		{"unknown type", `"tail": {"type": "hex", "data": "02"}`, "type 0x02 stands there"},
		{"length cut off", `"tail": {"type": "hex", "data": "0180"}`, "the length of an entry's key is cut off"},
		{"length of 33 bits", `"tail": {"type": "hex", "data": "01908080808000"}`, "more than 32 bits"},
		{"key beyond the data", `"tail": {"type": "hex", "data": "010561"}`, "key has 5 bytes, and 1 are left"},
		{"value beyond the data", `"tail": {"type": "hex", "data": "01016105"}`, "value has 5 bytes, and 0 are left"},
		{"key with a dash", `"entries": [{"key": "a-b", "value": "x"}]`, "entries[0] at byte 0x10: key is not"},
		{"key twice", `"entries": [{"key": "a", "value": "x"}, {"key": "a", "value": "y"}]`, "entries[1] at byte 0x15: key a comes"},
		{"long length", `"entries": [{"raw": {"type": "hex", "data": "0180016100"}}]`, "not in the shortest form"},
	})
	// An erased byte ends the entries as a zero does, and an info entry is
	// one.
	image, warnings, err := f.Pack([]byte(`{"format": "gvpd", "entries": [{"type": "0xfe", "key": "\u0001gVpdInfo", "value": "abcd"}], "tail": {"type": "hex", "data": "ff"}}`))
	require.Error(t, err) // the key isn't text
	require.Nil(t, warnings)
	image, warnings, err = f.Pack([]byte(`{"format": "gvpd", "entries": [{"type": "0xfe", "key": "info", "value": "abcd"}], "tail": {"type": "hex", "data": "ff"}}`))
	require.NoError(t, err)
	require.Empty(t, warnings)
	formtest.CheckAny(t, f, image)
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		values := map[string]any{}
		for _, key := range rapid.SliceOfNDistinct(rapid.StringMatching(`[a-zA-Z0-9_.]{1,150}`), 0, 10, rapid.ID[string]).Draw(t, "keys") {
			values[key] = rapid.OneOf(
				rapid.Map(rapid.StringMatching(`[ -~]{0,150}`), func(s string) any { return s }),
				rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 300), func(b []byte) any {
					return map[string]string{"type": "hex", "data": fmt.Sprintf("%x", b)}
				})).Draw(t, key)
		}
		text, err := json.Marshal(values)
		require.NoError(t, err)
		spec := fmt.Sprintf(`{"format": "gvpd", "values": %s, "size": %d, "fill": %d}`, text,
			rapid.IntRange(8192, 16384).Draw(t, "size"), rapid.Byte().Draw(t, "fill"))
		image, warnings, err := f.Pack([]byte(spec))
		require.NoError(t, err, "%s", spec)
		require.Empty(t, warnings)
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	image, _, err := f.Pack([]byte(`{"format": "gvpd", "before": "ab", "values": {"a": "b", "long": {"type": "text", "data": "c", "size": 200, "fill": 32}, "d": ""}, "size": 260}`))
	require.NoError(t, err)
	formtest.Damage(t, f, image)
}

func FuzzGVPD(fz *testing.F) {
	for _, name := range []string{"empty.bin", "broken.bin"} {
		fz.Add(read(fz, name))
	}
	fz.Add([]byte(header + "\x14\x00\x00\x00\x01\x01a\x01b\x01\x01a\x80\x01c\xfe\x00\x00\x01\x01-\x01b\xff\x00\x00"))
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "chromebook.gvpd.jsonc"))
	fz.Add([]byte(`{"format": "gvpd", "before": "ab", "entries": [{"key": "a", "value": "x"}, {"raw": {"type": "hex", "data": "0180016100"}}], "tail": "abc", "data_size": 7, "trailing": "x", "size": 300, "fill": 0}`))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
