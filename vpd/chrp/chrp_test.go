package chrp_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/internal/console"
	"nvstore.dev/vpd"
	"nvstore.dev/vpd/chrp"
	"nvstore.dev/vpd/internal/formtest"
)

var f = chrp.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "chrp/"+name) }

func TestSample(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "pseries.chrp.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 65536)
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	formtest.CheckAny(t, f, image)
	// As SLOF wrote them, but for the size of what is free.
	slof := read(t, "slof.bin")
	require.Equal(t, slof[:0x2810], image[:0x2810])
	require.Equal(t, "\x7f\xdd\x0c\x80free space\x00\x00", string(image[0x3800:0x3810]))
}

func TestSLOFsOwn(t *testing.T) {
	image := read(t, "slof.bin")
	require.True(t, f.Detect(image))
	require.Empty(t, f.Verify(image))
	text, _, err := f.Parse(image)
	require.NoError(t, err)
	var spec struct {
		Partitions []struct {
			Name   string
			Size   int
			Values map[string]string
		}
	}
	require.NoError(t, json.Unmarshal(text, &spec))
	require.Len(t, spec.Partitions, 4)
	common := spec.Partitions[2]
	require.Equal(t, "common", common.Name)
	require.Equal(t, 4096, common.Size)
	require.Equal(t, "5000", common.Values["load-base"])
	require.Equal(t, "false", common.Values["auto-boot?"])
	require.Len(t, common.Values, 25)
}

// pseries boots SLOF with NVRAM, and returns what printenv says of load-base,
// in hexadecimal; in NVRAM it is decimal.
func pseries(t *testing.T, image []byte) string {
	path := filepath.Join(t.TempDir(), "nvram.bin")
	require.NoError(t, os.WriteFile(path, image, 0o600))
	c, err := console.Start("qemu-system-ppc64", "-M", "pseries", "-display", "none", "-nodefaults", "-serial", "stdio", "-monitor", "none",
		"-drive", "if=pflash,format=raw,file="+path)
	require.NoError(t, err)
	defer c.Close()
	require.NoError(t, c.WaitFor("0 > "))
	out, err := c.Run("printenv load-base", "0 > ")
	require.NoError(t, err)
	line := regexp.MustCompile(`(?m)^Current: ([0-9a-f]+) `).FindStringSubmatch(out)
	require.NotNil(t, line, "%s", out)
	return line[1]
}

// SLOF reads what we set, in an image that we packed and in one of its own
// that we edited. It believes no partition with a wrong checksum, and does once
// Fix has mended it.
func TestSLOFReadsOurs(t *testing.T) {
	image, _, err := f.Pack(read(t, "pseries.chrp.jsonc"))
	require.NoError(t, err)
	require.Equal(t, "1388", pseries(t, image))
	if testing.Short() {
		return
	}
	spec, _, err := f.Parse(read(t, "slof.bin"))
	require.NoError(t, err)
	edited, _, err := f.Pack(bytes.Replace(spec, []byte(`"load-base": "5000"`), []byte(`"load-base": "6000"`), 1))
	require.NoError(t, err)
	edited[0x2801] ^= 1
	fixed, changes, err := f.Fix(edited)
	require.NoError(t, err)
	require.Len(t, changes, 1)
	require.Equal(t, "4000", pseries(t, edited))
	require.Equal(t, "1770", pseries(t, fixed))
}

func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "chrp") {
		require.Equal(t, name != "bad.bin", f.Detect(read(t, name)))
	}
	require.Empty(t, f.Verify(read(t, "small.bin")))
	var got []string
	for _, p := range f.Verify(read(t, "bad.bin")) {
		got = append(got, p.String())
	}
	require.Equal(t, []string{
		"partitions[0] common at byte 0x1: wrong checksum: got 0x1c, want 0x0c",
		"partitions[0] common at byte 0x10: boot-device disk is no variable: it has no equals sign",
		"partitions[1] system at byte 0x111: bytes behind the variables are not zero",
		"partitions[2] lnx,oops-log at byte 0x181: wrong checksum: got 0x56, want 0x57",
	}, got)
	fixed, changes, err := f.Fix(read(t, "bad.bin"))
	require.NoError(t, err)
	require.Len(t, changes, 2)
	require.Equal(t, read(t, "small.bin")[1], fixed[1])
	require.Len(t, f.Verify(fixed), 2)
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "small.bin"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 0, Len: 1, Name: "partitions[0] common.signature", Value: "0x70 system", CoveredBy: "partitions[0] common.checksum"},
		byName["partitions[0] common.signature"])
	require.Equal(t, vpd.Field{Off: 0x21, Len: 16, Name: "partitions[0] common.values.auto-boot?", Value: "true"}, byName["partitions[0] common.values.auto-boot?"])
	require.Equal(t, "0x010203", byName["partitions[2] lnx,oops-log.data"].Value)
}

func TestSpecsRefused(t *testing.T) {
	p := func(members string) string {
		return `"partitions": [{"signature": "0x70", "name": "common", ` + members + `}]`
	}
	formtest.Refused(t, f, `{"format": "chrp", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "chrp"`},
		{"unknown member", `"partition": []`, "partition: unknown"},
		{"none", `"partitions": []`, "begins with no partition"},
		{"no signature", `"partitions": [{"name": "x"}]`, "signature: missing"},
		{"signature 256", `"partitions": [{"signature": 256, "name": "x"}]`, "from 0 to 255"},
		{"no name", `"partitions": [{"signature": 112}]`, "name: missing"},
		{"name of 13", `"partitions": [{"signature": 112, "name": "0123456789abc"}]`, "at most 12"},
		{"name not ASCII", `"partitions": [{"signature": 112, "name": "é"}]`, "not printable ASCII"},
		{"size of 17", p(`"size": 17`), "17, want a multiple of 16"},
		{"size too small", p(`"size": 16, "values": {}`), "16, and header and data take 17 bytes"},
		{"size of 1 MiB", p(`"size": 1048576`), "from 0 to 1048560"},
		{"values and data", p(`"values": {}, "data": ""`), "can't stand beside values"},
		{"rest alone", p(`"rest": "x"`), "rest: needs values"},
		{"values elsewhere", `"partitions": [{"signature": "0x51", "name": "x", "values": {}}]`, "belong to partitions of signature 0x70"},
		{"values a list", p(`"values": []`), "values: want an object"},
		{"value a number", p(`"values": {"a": 1}`), "values.a: want a string"},
		{"variable twice", p(`"values": {"a": "", "a": ""}`), "values.a: comes twice"},
		{"variable without a name", p(`"values": {"": ""}`), "without an equals sign"},
		{"variable with an equals sign", p(`"values": {"a=": ""}`), "without an equals sign"},
		{"value with a zero", p(`"values": {"a": {"type": "u8", "data": 0}}`), "would end it"},
		{"value not ASCII", p(`"values": {"a": "é"}`), "not printable ASCII"},
		{"too many bytes", p(`"values": {"a": {"type": "u8", "data": 1, "count": 1048544}}`), "take more than"},
		{"two of 1 MiB", `"partitions": [{"signature": 81, "name": "a", "size": 1048560}, {"signature": 81, "name": "b", "size": 32}]`, "take more than 1048576"},
		{"trailing a partition", p(`"size": 16`) + `, "trailing": {"type": "hex", "data": "7fdd0001667265652073706163650000"}`, "begins with a partition"},
		{"image too small", p(`"size": 64`) + `, "size": 32`, "the data takes 64"},
	})
}

func TestImagesRefused(t *testing.T) {
	good := read(t, "small.bin")
	for name, image := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 256), "erased": bytes.Repeat([]byte{0xff}, 4096), "cut off": good[:255],
		"unknown signature, wrong checksum": append([]byte{0x33, 0xff}, good[2:]...), "too long": append(bytes.Clone(good), make([]byte, chrp.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	p := func(members string) string {
		return `"partitions": [{"signature": "0x70", "name": "common", ` + members + `}]`
	}
	formtest.Irregular(t, f, `{"format": "chrp", `, []formtest.Case{
		{"checksum", p(`"values": {}, "checksum": 0`), "common at byte 0x1: wrong checksum: got 0x00"},
		{"name in hex", `"partitions": [{"signature": "0x51", "name": {"type": "hex", "data": "00610000"}}]`, "partitions[0] at byte 0x4: its name is not"},
		{"rest", p(`"values": {"a": "b"}, "rest": "x"`), "common at byte 0x15: bytes behind the variables"},
		{"no end", p(`"data": "a=bcdefghijklmno"`), "at byte 0x10: its variables end without"},
		{"no equals sign", p(`"data": {"type": "hex", "data": "613d62006300"}`), "at byte 0x14: c is no variable"},
		{"no name", p(`"data": {"type": "hex", "data": "3d6200"}`), "is not a variable's name"},
		{"name not ASCII", p(`"data": {"type": "hex", "data": "ff3d6200"}`), "0xff is not a variable's name"},
		{"twice", p(`"data": {"type": "hex", "data": "613d6200613d6300"}`), "the variable a comes more than once"},
		{"trailing", p(`"values": {}`) + `, "trailing": {"type": "hex", "data": "0102"}`, "trailing at byte 0x20: 2 bytes belong to no partition"},
		{"zeros behind", p(`"values": {}, "size": 32`) + `, "trailing": "", "size": 48, "fill": 0`, "16 bytes belong to no partition"},
	})
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var list []map[string]any
		for range rapid.IntRange(1, 5).Draw(t, "partitions") {
			p := map[string]any{"signature": 0x70, "name": rapid.StringMatching(`[ -~]{0,12}`).Draw(t, "name")}
			switch rapid.IntRange(0, 2).Draw(t, "kind") {
			case 0:
				p["signature"] = rapid.SampledFrom([]int{0x02, 0x51, 0x7f, 0xa0}).Draw(t, "signature")
				p["data"] = map[string]any{"type": "hex", "data": fmt.Sprintf("%x", rapid.SliceOfN(rapid.Byte(), 0, 100).Draw(t, "data"))}
			case 1:
				p["size"] = 16 * rapid.IntRange(40, 100).Draw(t, "size")
				fallthrough
			default:
				p["values"] = rapid.MapOfN(rapid.StringMatching(`[ -<>-~]{1,15}`), rapid.StringMatching(`[ -~\n]{0,30}`), 0, 8).Draw(t, "values")
			}
			list = append(list, p)
		}
		text, err := json.Marshal(map[string]any{"format": "chrp", "partitions": list, "size": 16 * rapid.IntRange(500, 600).Draw(t, "total")})
		require.NoError(t, err)
		image, warnings, err := f.Pack(text)
		require.NoError(t, err, "%s", text)
		if _, sized := list[len(list)-1]["size"]; !sized {
			require.Empty(t, warnings)
		}
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, read(t, "small.bin"))
}

func FuzzCHRP(fz *testing.F) {
	fz.Add(read(fz, "small.bin"))
	fz.Add(read(fz, "bad.bin"))
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "pseries.chrp.jsonc"))
	fz.Add([]byte(strings.ReplaceAll(`{"format": "chrp", "partitions": [{"signature": 112, "name": {"type": "hex", "data": "00ff"}, "checksum": 1, "values": {"a": {"type": "hex", "data": "ff"}}, "rest": "x"},
		{"signature": 127, "name": "w", "data": "x"}], "trailing": "abc", "size": 300, "fill": 1}`, "\n", "")))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
