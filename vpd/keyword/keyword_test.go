package keyword_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/keyword"
)

var f = keyword.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "keyword/"+name) }

func TestSample(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "part.keyword.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 256)
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	require.Equal(t, "\x82\x0c\x00EXAMPLE PART\x84\x43\x00FN\x07NVS0001PN\x07NVS0002SN\x0dNVS0123456789", string(image[:15+3+10+10+16]))
	formtest.CheckAny(t, f, image)
}

// part.dat is from the tests of the public parser.
func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "keyword") {
		require.Equal(t, name == "part.dat", f.Detect(read(t, name)))
	}
	image := read(t, "part.dat")
	require.Empty(t, f.Verify(image))
	text, warnings, err := f.Parse(image)
	require.NoError(t, err)
	require.Empty(t, warnings)
	var spec struct {
		Name     string
		Keywords map[string]any
	}
	require.NoError(t, json.Unmarshal(text, &spec))
	require.Equal(t, "VSBPD04M0 06GSAS", spec.Name)
	require.Equal(t, "YH30BG78B014", spec.Keywords["SN"])
	require.Len(t, spec.Keywords, 11)

	// A changed value gets a new checksum.
	edited, warnings, err := f.Pack(bytes.Replace(text, []byte("YH30BG78B014"), []byte("NVS123"), 1))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Empty(t, f.Verify(edited))

	problems := f.Verify(read(t, "bad-checksum.dat"))
	require.Len(t, problems, 1)
	require.Equal(t, "checksum at byte 0xb2: is wrong: got 0xb0, want 0xaf", problems[0].String())
	fixed, changes, err := f.Fix(read(t, "bad-checksum.dat"))
	require.NoError(t, err)
	require.Len(t, changes, 1)
	require.Empty(t, f.Verify(fixed))
}

// The public parser's tests refuse these, too.
func TestCorrupted(t *testing.T) {
	for off, c := range map[int]struct {
		b    byte
		says string
	}{
		0x00: {0x83, "doesn't begin with the tag 0x82"}, 0xb1: {0, "no checksum"}, 0x14: {0, "no checksum"}, 0x18: {0x99, "keyword FN has 153 bytes, and 152"},
	} {
		image := read(t, "part.dat")
		image[off] = c.b
		problems := f.Verify(image)
		require.NotEmpty(t, problems)
		require.Contains(t, problems[0].String(), c.says)
		formtest.CheckAny(t, f, image)
	}
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "part.dat"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 0x2b, Len: 15, Name: "keywords.SN", Value: "YH30BG78B014", CoveredBy: "checksum"}, byName["keywords.SN"])
	require.Equal(t, vpd.Field{Off: 0xb3, Len: 1, Name: "end", Value: "0x78"}, byName["end"])
}

func TestSpecsRefused(t *testing.T) {
	long := `{"type": "u8", "data": 0, "count": 256}`
	formtest.Refused(t, f, `{"format": "keyword", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "keyword"`},
		{"unknown member", `"name": "x", "values": {}`, "values: unknown"},
		{"no name", `"keywords": {}`, "name: missing"},
		{"name not ASCII", `"name": "é"`, "not printable ASCII"},
		{"tag", `"name": "x", "tag": 130`, "0x82, want 0x84 or 0x90"},
		{"keyword of three", `"name": "x", "keywords": {"SNR": "1"}`, "two printable characters"},
		{"keyword not ASCII", `"name": "x", "keywords": {"é": "1"}`, "two printable characters"},
		{"keyword twice", `"name": "x", "keywords": {"SN": "1", "SN": "1"}`, "keywords.SN: comes twice"},
		{"value a number", `"name": "x", "keywords": {"SN": 1}`, "want a string"},
		{"value of 256", `"name": "x", "keywords": {"SN": ` + long + `}`, "from 0 to 255"},
		{"keywords and data", `"name": "x", "keywords": {}, "data": ""`, "can't stand beside keywords"},
		{"checksum 256", `"name": "x", "checksum": 256`, "from 0 to 255"},
		{"no checksum but one", `"name": "x", "checksum": null, "trailing": {"type": "hex", "data": "790078"}`, "is a checksum and an end"},
		{"size too small", `"name": "x", "size": 9`, "the data takes 10"},
	})
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 64), "name cut": []byte("\x82\x05\x00ab"), "no second tag": []byte("\x82\x00\x00\x85\x00\x00\x79\x00\x78"),
		"keywords cut": []byte("\x82\x00\x00\x84\x05\x00ab"), "second tag cut": []byte("\x82\x00\x00\x84\x05"),
		"too long": append([]byte("\x82\x00\x00\x84\x00\x00"), make([]byte, keyword.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "keyword", "name": "x", `, []formtest.Case{
		{"checksum", `"checksum": 0`, "checksum at byte 0x8: is wrong: got 0x00, want 0x7c"},
		{"no checksum", `"checksum": null`, "checksum at byte 0x7: no checksum"},
		{"bytes behind", `"data": {"type": "hex", "data": "534e01317878"}`, "2 bytes behind the keywords are none"[2:]},
		{"value too long", `"data": {"type": "hex", "data": "534e0231"}`, "keyword SN has 2 bytes, and 1 are left"},
		{"not printable", `"data": {"type": "hex", "data": "53ff00"}`, "not two printable"},
		{"twice", `"data": {"type": "hex", "data": "534e00534e00"}`, "keyword SN comes more than once"},
	})
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keywords := map[string]any{}
		for _, k := range rapid.SliceOfNDistinct(rapid.StringMatching(`[ -~]{2}`), 0, 10, rapid.ID[string]).Draw(t, "keywords") {
			keywords[k] = map[string]any{"type": "hex", "data": fmt.Sprintf("%x", rapid.SliceOfN(rapid.Byte(), 0, 255).Draw(t, "value"))}
		}
		text, err := json.Marshal(map[string]any{"format": "keyword", "name": rapid.StringMatching(`[ -~]{0,30}`).Draw(t, "name"), "keywords": keywords,
			"tag": rapid.SampledFrom([]int{0x84, 0x90}).Draw(t, "tag"), "size": rapid.IntRange(4000, 5000).Draw(t, "size"), "fill": rapid.Byte().Draw(t, "fill")})
		require.NoError(t, err)
		image, warnings, err := f.Pack(text)
		require.NoError(t, err, "%s", text)
		require.Empty(t, warnings)
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, read(t, "part.dat")[:200])
}

func FuzzKeyword(fz *testing.F) {
	fz.Add(read(fz, "part.dat")[:200])
	fz.Add(read(fz, "bad-checksum.dat"))
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "part.keyword.jsonc"))
	fz.Add([]byte(`{"format": "keyword", "name": "x", "tag": "0x90", "data": "abc", "checksum": null, "trailing": "x", "size": 300, "fill": 1}`))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
