package ipz_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/ipz"
)

var f = ipz.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "ipz/"+name) }

func TestSample(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "planar.ipz.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 8192)
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	formtest.CheckAny(t, f, image)
	// As a real one begins, but for the ECC and the types.
	real := read(t, "system.dat")
	require.Equal(t, real[11:33], image[11:33])
	require.Equal(t, real[43:56], image[43:56])
	require.Equal(t, real[58:67], image[58:67])
}

type system struct {
	Header  struct{ Version, Protects string }
	Records []struct {
		Name     string
		Type     int
		Keywords map[string]any
		Offset   *int
		ECC      struct{ Data string } `json:"ecc"`
	}
}

func parse(t *testing.T, image []byte) (text []byte, s system) {
	text, _, err := f.Parse(image)
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &s))
	return text, s
}

func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "ipz") {
		require.True(t, f.Detect(read(t, name)))
	}
	require.Empty(t, f.Verify(read(t, "system.dat")))
	_, s := parse(t, read(t, "system.dat"))
	var names []string
	for _, r := range s.Records {
		names = append(names, r.Name)
		require.Nil(t, r.Offset)
		require.NotEmpty(t, r.ECC.Data)
	}
	require.Equal(t, "VINI LXR0 VCEN VEIR VER0 MER0 VMPU VSBP VSYS UTIL", strings.Join(names, " "))
	require.Equal(t, "Y131UF07300L", s.Records[0].Keywords["SN"])
	require.Equal(t, "00108d72605cf2710505ef000d65c99387c41825cb0300181b1c30e5fea53e42e7", s.Records[0].ECC.Data)
	require.Len(t, s.Records[3].Keywords["#I"].(map[string]any)["data"], 2*0x10e)

	var areas []string
	for _, p := range f.Verify(read(t, "without-tags.bin")) {
		require.Contains(t, p.Msg, "with 00")
		areas = append(areas, p.Area)
	}
	require.Equal(t, []string{"header", "toc", "records[0] VINI", "records[1] VSYS"}, areas)
}

// Pack keeps the ECC of what is as it was, and makes none for what isn't.
func TestECC(t *testing.T) {
	image := read(t, "system.dat")
	text, _ := parse(t, image)
	again, warnings, err := f.Pack(text)
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, image, again)

	for what, change := range map[string][2]string{
		"records[0].ecc":             {`"Y131UF07300L"`, `"Y131UF07300M"`},
		"toc.ecc":                    {`"type": 213,` + "\n      \"keywords\"", `"type": 214,` + "\n      \"keywords\""},
		"header.ecc":                 {`"version": "01"`, `"version": "02"`},
		"toc.ecc: the bytes":         {`"name": "VSYS"`, `"name": "VSYT"`},
		"records[0].protects":        {`"protects": "ed12`, `"protects": "zz12`},
		"records[0].ecc: the bytes":  {`"protects": "ed12`, `"protects": "ed13`},
		"records[0].ecc: needs prot": {`"protects": "ed12ebb0ca54fcd0912fe7761a5b2c002342217c9bc9fc3ccef71f0b8ec9b9bc"`, `"type": 213`},
	} {
		changed := bytes.Replace(text, []byte(change[0]), []byte(change[1]), 1)
		if what == "records[0].ecc: needs prot" {
			changed = bytes.Replace(changed, []byte(`"type": 213,`+"\n      \"keywords\""), []byte(`"keywords"`), 1)
		}
		require.NotEqual(t, text, changed, what)
		_, _, err := f.Pack(changed)
		require.ErrorIs(t, err, vpd.ErrSpec)
		require.ErrorContains(t, err, what)
	}

	// Without ECC, as in an emulator, anything goes.
	var spec map[string]any
	require.NoError(t, json.Unmarshal(text, &spec))
	drop := func(m any) {
		for _, name := range []string{"ecc", "ecc_offset", "protects"} {
			delete(m.(map[string]any), name)
		}
	}
	drop(spec["header"])
	drop(spec["toc"])
	for _, r := range spec["records"].([]any) {
		drop(r)
	}
	spec["records"].([]any)[0].(map[string]any)["keywords"].(map[string]any)["SN"] = "NVS0123456789ABC"
	text, err = json.Marshal(spec)
	require.NoError(t, err)
	edited, warnings, err := f.Pack(text)
	require.NoError(t, err)
	require.Empty(t, warnings)
	_, s := parse(t, edited)
	require.Equal(t, "NVS0123456789ABC", s.Records[0].Keywords["SN"])
	_, before := parse(t, image)
	require.Equal(t, before.Records[8].Keywords, s.Records[8].Keywords)
	formtest.CheckAny(t, f, edited)
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "system.dat"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 0x111, Len: 15, Name: "records[0] VINI.SN", Value: "Y131UF07300L", CoveredBy: "records[0] VINI.ecc"}, byName["records[0] VINI.SN"])
	require.EqualValues(t, 2390, byName["toc.ecc"].Off)
	require.Equal(t, "header.ecc", byName["header.PT"].CoveredBy)
}

func TestSpecsRefused(t *testing.T) {
	r := func(members string) string { return `"records": [{"name": "VINI", ` + members + `}]` }
	formtest.Refused(t, f, `{"format": "ipz", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "ipz"`},
		{"unknown member", `"record": []`, "record: unknown"},
		{"image and records", `"image": "", "records": []`, "can't stand beside image"},
		{"image that is none", `"image": "abc"`, "would not be IPZ VPD"},
		{"version of one", `"header": {"version": "1"}`, "has 1 bytes, want 2"},
		{"header ECC of one", `"header": {"ecc": "1", "protects": "` + strings.Repeat("00", 32) + `"}`, "has 1 bytes, want 11"},
		{"no name", `"records": [{"keywords": {}}]`, "records[0].name: missing"},
		{"name of three", `"records": [{"name": "VIN", "keywords": {}}]`, "has 3 characters, want 4"},
		{"no keywords", `"records": [{"name": "VINI"}]`, "records[0].keywords: missing"},
		{"keywords and raw", r(`"keywords": {}, "raw": ""`), "can't stand beside raw"},
		{"keyword RT", r(`"keywords": {"RT": "x"}`), "isn't RT"},
		{"keyword of one", r(`"keywords": {"R": "x"}`), "two printable characters"},
		{"value of 256", r(`"keywords": {"SN": {"type": "u8", "data": 0, "count": 256}}`), "from 0 to 255"},
		{"not ASCII", r(`"keywords": {"SN": "é"}`), "not printable ASCII"},
		{"too long", r(`"keywords": {"#A": {"type": "u8", "data": 0, "count": 60000}, "#B": {"type": "u8", "data": 0, "count": 6000}}`), "more than 65535 bytes"},
		{"two too long", `"records": [{"name": "AAAA", "keywords": {"#A": {"type": "u8", "data": 0, "count": 60000}}}, {"name": "BBBB", "keywords": {"#A": {"type": "u8", "data": 0, "count": 6000}}}]`, "offsets go to 65535"},
		{"overlap", r(`"offset": 20, "keywords": {}`), "records[0]: would lie at 20 to 31, and something else does"},
		{"ECC without proof", r(`"keywords": {}, "ecc_offset": 500, "ecc": "x"`), "needs protects"},
		{"proof that is none", r(`"keywords": {}, "protects": "00"`), "want the SHA-256"},
		{"ECC of something else", r(`"keywords": {}, "ecc_offset": 500, "ecc": "x", "protects": "` + strings.Repeat("00", 32) + `"`), "is not public"},
		{"gap in a record", `"gaps": [{"offset": 20, "data": "x"}]`, "gaps[0]: would lie at 20"},
		{"gap behind the end", `"gaps": [{"offset": 500, "data": "x"}]`, "and the image has 66 bytes"},
		{"size too small", `"size": 65`, "the data takes 66"},
	})
}

func TestImagesRefused(t *testing.T) {
	good := read(t, "without-tags.bin")
	for name, image := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 64), "cut in the header": good[:42], "no RT": append(bytes.Repeat([]byte{0}, 17), good[17:]...),
		"no PT": bytes.Replace(good, []byte("PT\x0e"), []byte("PT\x0d"), 1), "too long": append(bytes.Clone(good), make([]byte, ipz.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// One fault each, in bytes of an image whose ECC isn't checked.
func TestIrregularImages(t *testing.T) {
	good, _, err := f.Pack([]byte(`{"format": "ipz", "toc": {"padding": ""}, "records": [{"name": "VINI", "keywords": {"SN": "12"}}], "size": 200}`))
	require.NoError(t, err)
	require.Empty(t, f.Verify(good))
	toc := 55
	record := toc + 4 + 7 + 3 + 14 + 3
	for name, c := range map[string]struct {
		off  int
		to   string
		says string
	}{
		"header's tag":    {11, "\x00", "header at byte 0xb: begins with 00 28 00 and ends with 78"},
		"header's length": {12, "\x29", "begins with 84 29 00"},
		"header's end":    {54, "\x00", "ends with 00"},
		"header's name":   {17, "X", "header at byte 0x11: is of record XHDR, want VHDR"},
		"toc's name":      {29, "X", "points at record XTOC, want VTOC"}, // which the toc itself doesn't say
		"toc outside":     {35, "\xff\x00", "toc at byte 0xff: lies at 255 to 286, and the image has 200 bytes"},
		"toc too short":   {37, "\x03\x00", "toc at byte 0x37: has 3 bytes"},
		"toc's ECC":       {39, "\xf0\x00\x01\x00", "toc: its ECC, at 240 to 241, is not in the image"},
		"PT of 17":        {toc + 3 + 7 + 2, "\x11", "PT has 17 bytes, and an entry has 14"},
		"toc's keywords":  {toc + 3 + 7 + 2, "\xff", "keyword PT has 255 bytes, and 17 are left"},
		"record outside":  {toc + 13 + 6, "\xff", "records[0] VINI: it would lie at 255 to 271"},
		"record short":    {toc + 13 + 8, "\x03\x00", "has 3 bytes"},
		"record's ECC":    {toc + 13 + 10, "\xf0\x00\x01\x00", "records[0] VINI: its ECC, at 240 to 241"},
		"record's tag":    {record, "\x85", "begins with 85 and ends with 78"},
		"record's length": {record + 1, "\x0d", "its length is 13, and in the table of contents 12"},
		"record's name":   {record + 6, "X", "its keyword RT says XINI"},
		"no RT":           {record + 3, "X", "doesn't begin with the keyword RT"},
		"keyword":         {record + 12, "\x03", "its keyword SN has 3 bytes, and 2 are left"},
		"end":             {record + 15, "\x00", "begins with 84 and ends with 00"},
		"overlap":         {toc + 13 + 10, "\x14\x00\x01\x00", "records[0] VINI.ecc at byte 0x14: overlaps header"},
	} {
		t.Run(name, func(t *testing.T) {
			image := bytes.Clone(good)
			copy(image[c.off:], c.to)
			var all []string
			for _, p := range f.Verify(image) {
				all = append(all, p.String())
			}
			require.Contains(t, strings.Join(all, "\n"), c.says)
			formtest.CheckAny(t, f, image)
		})
	}
}

// Many records that are each as long as the image cost no more than it.
func TestHostile(t *testing.T) {
	image := bytes.Repeat([]byte("AB\x00"), ipz.MaxSize/3)
	copy(image, read(t, "without-tags.bin")[:55])
	image[37], image[38] = 0xff, 0xff // the length of the table of contents
	toc := image[55:]
	copy(toc[3:], "RT\x04VTOC#X\x00\x00")
	for pos := 14; pos+3+14*18 < 0xff00; pos += 3 + 14*18 {
		copy(toc[pos:], "PT\xfc")
		for i := range 18 {
			copy(toc[pos+3+14*i:], "REC0\x00\x00\x00\x00\xf0\xff\x00\x00\xf0\xff")
		}
	}
	problems := f.Verify(image)
	require.Contains(t, fmt.Sprint(problems[:4]), "has more than 256 records")
	spec, _, err := f.Parse(image)
	require.NoError(t, err)
	require.Less(t, len(spec), 3*ipz.MaxSize)
	formtest.RoundTrip(t, f, image)
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var list []map[string]any
		for range rapid.IntRange(0, 20).Draw(t, "records") { // more than fit into one PT
			keywords := map[string]any{}
			for _, k := range rapid.SliceOfNDistinct(rapid.StringMatching(`[#A-Z][A-Z0-9]`), 0, 5, rapid.ID[string]).Draw(t, "keywords") {
				if k != "RT" {
					keywords[k] = map[string]any{"type": "hex", "data": fmt.Sprintf("%x", rapid.SliceOfN(rapid.Byte(), 0, 255).Draw(t, "value"))}
				}
			}
			list = append(list, map[string]any{"name": rapid.StringMatching(`[A-Z0-9]{4}`).Draw(t, "name"), "keywords": keywords, "type": rapid.Uint16().Draw(t, "type")})
		}
		spec := map[string]any{"format": "ipz", "size": rapid.IntRange(30000, 31000).Draw(t, "size"), "fill": rapid.Byte().Draw(t, "fill"),
			"gaps": []any{map[string]any{"offset": 29000, "data": "abc"}}}
		if list != nil {
			spec["records"] = list
		}
		text, err := json.Marshal(spec)
		require.NoError(t, err)
		image, warnings, err := f.Pack(text)
		require.NoError(t, err, "%s", text)
		require.Empty(t, warnings)
		formtest.CheckAny(t, f, image)
		parsed, _, err := f.Parse(image)
		require.NoError(t, err)
		require.NotContains(t, string(parsed), `"image"`, "the records are told")
	})
}

func TestDamagedImages(t *testing.T) {
	image, _, err := f.Pack([]byte(`{"format": "ipz", "records": [{"name": "VINI", "keywords": {"SN": "12", "#X": "3"}}, {"name": "VSYS", "offset": 150, "keywords": {}}], "size": 170}`))
	require.NoError(t, err)
	formtest.Damage(t, f, image)
	formtest.Damage(t, f, read(t, "without-tags.bin"))
}

func FuzzIPZ(fz *testing.F) {
	fz.Add(read(fz, "system.dat"))
	fz.Add(read(fz, "without-tags.bin"))
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "planar.ipz.jsonc"))
	fz.Add([]byte(`{"format": "ipz", "records": [{"name": "VINI", "raw": "abcde", "offset": 100, "ecc_offset": 3}], "gaps": [{"offset": 90, "data": "x"}], "size": 300, "fill": 1}`))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
