package chassis_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/internal/qtest"
	"nvstore.dev/vpd"
	"nvstore.dev/vpd/chassis"
	"nvstore.dev/vpd/internal/formtest"
)

var f = chassis.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "chassis/"+name) }

// QEMU shows what we pack in the register that a driver reads.
func TestQEMUHasOurNumber(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "expansion.chassis.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Empty(t, f.Verify(image))
	require.False(t, f.Detect(image))
	for _, image := range [][]byte{image, read(t, "seven.bin"), {255}} {
		require.Equal(t, image[0], register(t, image[0]))
	}
}

// register is the Chassis Number register of a bridge in QEMU.
func register(t *testing.T, number byte) byte {
	m, err := qtest.Start("qemu-system-x86_64", "-M", "pc", "-nodefaults", "-device", fmt.Sprintf("pci-bridge,addr=5,chassis_nr=%d", number))
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	bridge := m.PCI(5, 0)
	v, err := bridge.Config(0x34)
	require.NoError(t, err)
	for off := uint8(v); off != 0; off = uint8(v >> 8) {
		v, err = bridge.Config(off)
		require.NoError(t, err)
		if v&0xff == 0x04 { // Slot Numbering
			return byte(v >> 24)
		}
	}
	require.FailNow(t, "the bridge has no Slot Numbering capability")
	return 0
}

func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "chassis") {
		problems := f.Verify(read(t, name))
		require.Equal(t, name == "unset.bin", len(problems) > 0)
	}
	spec, warnings, err := f.Parse(read(t, "unset.bin"))
	require.NoError(t, err)
	require.Len(t, warnings, 1)
	require.Equal(t, "{\n  \"format\": \"chassis\",\n  \"number\": 0\n}\n", string(spec))
	fields, err := f.Fields(read(t, "seven.bin"))
	require.NoError(t, err)
	require.Equal(t, []vpd.Field{{Off: 0, Len: 1, Name: "number", Value: "7"}}, fields)
}

func TestSpecsRefused(t *testing.T) {
	formtest.Refused(t, f, `{"format": "chassis", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "chassis"`},
		{"no number", `{"format": "chassis"}`, "number: missing"},
		{"256", `"number": 256`, "from 0 to 255"},
		{"a word", `"number": "three"`, "want an integer"},
		{"unknown member", `"number": 1, "slots": 4`, "slots: unknown; want one of format, number, patches, size, fill"},
		{"no byte", `"number": 1, "size": 0`, "size: 0"},
		{"too large", `"number": 1, "size": 4097`, "from 0 to 4096"},
	})
}

func TestImagesRefused(t *testing.T) {
	for _, image := range [][]byte{nil, make([]byte, chassis.MaxSize+1)} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage)
		formtest.CheckAny(t, f, image)
	}
}

func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "chassis", `, []formtest.Case{
		{"the host's", `"number": 0`, "number at byte 0x0: is 0, which is the chassis that the host is in"},
	})
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.ByteRange(1, 255).Draw(t, "number")
		size := rapid.IntRange(1, 128).Draw(t, "size")
		image, warnings, err := f.Pack(fmt.Appendf(nil, `{"format": "chassis", "number": %d, "size": %d, "fill": %d}`, n, size, rapid.Byte().Draw(t, "fill")))
		require.NoError(t, err)
		require.Empty(t, warnings)
		require.Len(t, image, size)
		require.Equal(t, n, image[0])
		formtest.CheckAny(t, f, image)
	})
}

func FuzzChassis(fz *testing.F) {
	fz.Add([]byte{7})
	fz.Add([]byte{0, 0xff, 1})
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "expansion.chassis.jsonc"))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
