package formats_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/formats"
)

const fixtures = "../../fixtures/vpd/"

func read(t *testing.T, path string) []byte {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

func TestTable(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range formats.All() {
		require.False(t, seen[f.Name()])
		seen[f.Name()] = true
		require.Equal(t, f, formats.ByName(f.Name()))
		got, err := formats.OfSpec([]byte(`{"format": "` + f.Name() + `", } /* comment */`))
		require.NoError(t, err)
		require.Equal(t, f, got)
	}
	require.Nil(t, formats.ByName("none"))
	for _, bad := range []string{``, `{}`, `{"format": "none"}`, `{"format": 1}`, `[]`, strings.Repeat("[", 1<<20)} {
		f, err := formats.OfSpec([]byte(bad))
		require.ErrorIs(t, err, vpd.ErrSpec)
		require.Nil(t, f)
	}
}

// Every fixture NAME.FORMAT.jsonc packs without a warning, is good, is
// detected as its format if as any (raw can be all), and survives the round
// trip.
func TestSpecFixtures(t *testing.T) {
	paths, err := filepath.Glob(fixtures + "*.jsonc")
	require.NoError(t, err)
	require.NotEmpty(t, paths)
	for _, path := range paths {
		t.Run(filepath.Base(path), func(t *testing.T) {
			text := read(t, path)
			f, err := formats.OfSpec(text)
			require.NoError(t, err)
			require.Equal(t, f.Name(), strings.Split(filepath.Base(path), ".")[1])
			image, warnings, err := f.Pack(text)
			require.NoError(t, err)
			require.Empty(t, warnings)
			require.Empty(t, f.Verify(image))
			if d := formats.Detect(image); d != nil && f.Name() != "raw" {
				require.Equal(t, f.Name(), d.Name())
			}
			spec, warnings, err := f.Parse(image)
			require.NoError(t, err)
			require.Empty(t, warnings)
			again, _, err := f.Pack(spec)
			require.NoError(t, err)
			require.Equal(t, image, again)
		})
	}
}

func TestDetect(t *testing.T) {
	require.Equal(t, "pci", formats.Detect(read(t, fixtures+"pci/good.vpd")).Name())
	require.Equal(t, "pci", formats.Detect(read(t, fixtures+"pci/field.vpd")).Name())
	require.Nil(t, formats.Detect([]byte("\x82\x00\x00\x84\x00\x00\x78")))
	require.Nil(t, formats.Detect(nil))
}

// The checksum in the spec of the network card's EEPROM is a number that
// someone computed.
func TestNICChecksum(t *testing.T) {
	image, _, err := formats.ByName("raw").Pack(read(t, fixtures+"nic-eeprom.raw.jsonc"))
	require.NoError(t, err)
	require.Len(t, image, 128)
	var sum uint16
	for i := 0; i < 128; i += 2 {
		sum += binary.LittleEndian.Uint16(image[i:])
	}
	require.Equal(t, uint16(0xbaba), sum)
	require.Equal(t, []byte{0x52, 0x54, 0, 0x12, 0x34, 0x56}, image[:6])
}
