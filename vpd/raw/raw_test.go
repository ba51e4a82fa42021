package raw_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/raw"
)

var f = raw.Format()

func TestPack(t *testing.T) {
	for _, c := range []struct {
		name, spec string
		want       []byte
	}{
		{"fill", `{"format": "raw", "size": 3}`, []byte{0xff, 0xff, 0xff}},
		{"other fill", `{"format": "raw", "size": "0x2", "fill": 0}`, []byte{0, 0}},
		{"text", `{"format": "raw", "size": 4, "patches": [{"offset": 1, "type": "text", "data": "ab"}]}`, []byte{0xff, 'a', 'b', 0xff}},
		{"every type", `{"format": "raw", "size": 39, "patches": [
			{"offset": 0, "type": "hex", "data": "01-02:03 04"},
			{"offset": 4, "type": "base64", "data": "BQYH"},
			{"offset": 7, "type": "u8", "data": 255},
			{"offset": 8, "type": "u16le", "data": "0x0102"},
			{"offset": 10, "type": "u16be", "data": "0x0102"},
			{"offset": 12, "type": "u32le", "data": "0xffffffff"},
			{"offset": 16, "type": "u32be", "data": 1},
			{"offset": 20, "type": "u64le", "data": "0xffffffffffffffff"},
			{"offset": 28, "type": "u64be", "data": 1},
			{"offset": 36, "type": "u8", "data": [1, "2", "0x3"]}]}`,
			[]byte{1, 2, 3, 4, 5, 6, 7, 255, 2, 1, 1, 2, 255, 255, 255, 255, 0, 0, 0, 1,
				255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 1, 1, 2, 3}},
		{"count, size and fill", `{"format": "raw", "size": 8, "fill": 0, "patches": [{"offset": 0, "type": "u8", "data": [1, 2], "count": 2, "size": 6, "fill": 9}]}`,
			[]byte{1, 2, 1, 2, 9, 9, 0, 0}},
		{"overwrite", `{"format": "raw", "size": 4, "patches": [{"offset": 0, "type": "u8", "data": 1, "count": 4}, {"offset": 1, "type": "u8", "data": [2, 3], "overwrite": true}]}`,
			[]byte{1, 2, 3, 1}},
		{"side by side", `{"format": "raw", "size": 4, "patches": [{"offset": 2, "type": "u16le", "data": 1}, {"offset": 0, "type": "u16le", "data": 2}]}`,
			[]byte{2, 0, 1, 0}},
		{"empty patch at the end", `{"format": "raw", "size": 1, "patches": [{"offset": 1, "type": "hex", "data": ""}]}`, []byte{0xff}},
	} {
		t.Run(c.name, func(t *testing.T) {
			image, warnings, err := f.Pack([]byte(c.spec))
			require.NoError(t, err)
			require.Empty(t, warnings)
			require.Equal(t, c.want, image)
		})
	}
}

func TestSpecsRefused(t *testing.T) {
	patch := func(p string) string { return `{"format": "raw", "size": 4, "patches": [` + p + `]}` }
	for _, c := range []struct{ name, spec, want string }{
		{"no size", `{"format": "raw"}`, "size: missing"},
		{"no bytes", `{"format": "raw", "size": 0}`, "want 1 or more"},
		{"size above 16 MiB", `{"format": "raw", "size": 16777217}`, "from 0 to 16777216"},
		{"size negative", `{"format": "raw", "size": -1}`, "size: want an integer"},
		{"unknown member", `{"format": "raw", "size": 1, "patch": []}`, "patch: unknown"},
		{"patches an object", `{"format": "raw", "size": 1, "patches": {}}`, "want a list"},
		{"patch a string", patch(`"x"`), "patches[0]: want an object"},
		{"no offset", patch(`{"type": "u8", "data": 1}`), "patches[0].offset: missing"},
		{"offset beyond the end", patch(`{"offset": 5, "type": "hex", "data": ""}`), "from 0 to 4"},
		{"data beyond the end", patch(`{"offset": 3, "type": "u16le", "data": 1}`), "2 bytes, want at most 1"},
		{"count beyond the end", patch(`{"offset": 0, "type": "u16le", "data": 1, "count": 3}`), "3 times 2 bytes"},
		{"count of 2^63", patch(`{"offset": 0, "type": "u16le", "data": 1, "count": "0x7fffffffffffffff"}`), "count: want an integer"},
		{"size beyond the end", patch(`{"offset": 1, "type": "u8", "data": 1, "size": 4}`), "size: want an integer from 0 to 3"},
		{"overlap", patch(`{"offset": 0, "type": "u16le", "data": 1}, {"offset": 1, "type": "u8", "data": 1}`), "patches[1]: bytes 0x1 to 0x1 overlap patches[0]"},
		{"overwrite a word", patch(`{"offset": 0, "type": "u8", "data": 1, "overwrite": "yes"}`), "want true or false"},
		{"u8 of 256", patch(`{"offset": 0, "type": "u8", "data": 256}`), "from 0 to 255"},
		{"u16 of 65536", patch(`{"offset": 0, "type": "u16le", "data": "0x10000"}`), "from 0 to 65535"},
		{"u8 negative", patch(`{"offset": 0, "type": "u8", "data": -1}`), "want an integer"},
		{"u8 a fraction", patch(`{"offset": 0, "type": "u8", "data": 1.0}`), "want an integer"},
		{"u8 in words", patch(`{"offset": 0, "type": "u8", "data": ["one"]}`), "data[0]: want an integer"},
		{"base64 without padding", patch(`{"offset": 0, "type": "base64", "data": "BQ"}`), "base64"},
		{"name a number", patch(`{"offset": 0, "type": "u8", "data": 1, "name": 1}`), "name: want a string"},
		{"file", patch(`{"offset": 0, "type": "file", "data": "/etc/shadow"}`), "unknown type"},
		{"misspelt", patch(`{"offset": 0, "type": "u8", "data": 1, "over": true}`), "over: unknown"},
	} {
		t.Run(c.name, func(t *testing.T) {
			image, _, err := f.Pack([]byte(c.spec))
			require.ErrorIs(t, err, vpd.ErrSpec)
			require.Contains(t, err.Error(), c.want)
			require.Nil(t, image)
		})
	}
}

func TestParse(t *testing.T) {
	image := append([]byte("serial 4711"), bytes.Repeat([]byte{0xff}, 20)...)
	image = append(image, 1, 0xff, 2)
	spec, warnings, err := f.Parse(image)
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, `{
  "format": "raw",
  "size": 34,
  "fill": "0xff",
  "patches": [
    {
      "offset": "0x0",
      "type": "text",
      "data": "serial 4711"
    },
    {
      "offset": "0x1f",
      "type": "hex",
      "data": "01ff02"
    }
  ]
}
`, string(spec))
	require.Empty(t, f.Verify(image))
	fields, err := f.Fields(image)
	require.NoError(t, err)
	require.Equal(t, []vpd.Field{
		{Off: 0, Len: 11, Name: "data@0x0", Value: "serial 4711"},
		{Off: 31, Len: 3, Name: "data@0x1f", Value: "0x01ff02"},
	}, fields)
}

func TestImagesRefused(t *testing.T) {
	for _, image := range [][]byte{nil, make([]byte, raw.MaxSize+1)} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage)
		_, _, err = f.Fix(image)
		require.ErrorIs(t, err, vpd.ErrImage)
		_, err = f.Fields(image)
		require.ErrorIs(t, err, vpd.ErrImage)
		require.Len(t, f.Verify(image), 1)
	}
	require.False(t, f.Detect([]byte("anything")))
}

// An image of nothing but gaps would take a patch for every 9 bytes.
func TestParseIsBounded(t *testing.T) {
	image := bytes.Repeat([]byte{0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, 1<<15)
	spec, _, err := f.Parse(image)
	require.NoError(t, err)
	require.Less(t, len(spec), 3*len(image))
	again, _, err := f.Pack(spec)
	require.NoError(t, err)
	require.True(t, bytes.Equal(image, again))

	many := `{"format": "raw", "size": 99999, "patches": [` + strings.Repeat(`{"offset": 0, "type": "hex", "data": ""},`, 1<<14+1) + `]}`
	_, _, err = f.Pack([]byte(many))
	require.ErrorIs(t, err, vpd.ErrSpec)
}

func TestRandomImages(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var image []byte
		for _, part := range rapid.SliceOfN(rapid.Custom(func(t *rapid.T) []byte {
			if rapid.Bool().Draw(t, "run") {
				return bytes.Repeat([]byte{rapid.SampledFrom([]byte{0, 0x20, 0xff}).Draw(t, "byte")}, rapid.IntRange(1, 40).Draw(t, "n"))
			}
			return rapid.SliceOfN(rapid.Byte(), 1, 20).Draw(t, "bytes")
		}), 1, 20).Draw(t, "parts") {
			image = append(image, part...)
		}
		spec, _, err := f.Parse(image)
		require.NoError(t, err)
		again, _, err := f.Pack(spec)
		require.NoError(t, err)
		require.Equal(t, image, again)
	})
}

func FuzzRaw(fz *testing.F) {
	fz.Add([]byte(`{"format": "raw", "size": 9, "fill": 1, "patches": [{"offset": 0, "type": "u16be", "data": [1, "0x2"], "count": 2, "size": 5, "fill": "0x7"}]}`))
	fz.Fuzz(func(t *testing.T, spec []byte) {
		image, _, err := f.Pack(spec)
		if err != nil {
			require.ErrorIs(t, err, vpd.ErrSpec)
			require.Nil(t, image)
			return
		}
		text, _, err := f.Parse(image)
		require.NoError(t, err)
		again, _, err := f.Pack(text)
		require.NoError(t, err)
		require.True(t, bytes.Equal(image, again))
	})
}
