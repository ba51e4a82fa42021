package idprom_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/internal/qtest"
	"nvstore.dev/vpd"
	"nvstore.dev/vpd/idprom"
	"nvstore.dev/vpd/internal/formtest"
)

var f = idprom.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "idprom/"+name) }

// nvram is what a machine of QEMU has at the ID PROM's place.
func nvram(t *testing.T, machine string, base uint64, mac string) []byte {
	m, err := qtest.Start("qemu-system-sparc", "-M", machine, "-nic", "user,mac="+mac)
	require.NoError(t, err)
	defer func() { require.NoError(t, m.Close()) }()
	image, err := m.ReadBytes(base+0x1fd8, 32)
	require.NoError(t, err)
	return image
}

// What QEMU's machines make is good, and its spec with another address packs
// to what they make for that.
func TestQEMUHasOurBytes(t *testing.T) {
	for machine, base := range map[string]uint64{"SS-5": 0x71200000, "LX": 0x71200000, "SS-20": 0xff1200000} {
		image := nvram(t, machine, base, "08:00:20:12:34:56")
		require.Empty(t, f.Verify(image))
		require.True(t, f.Detect(image))
		formtest.CheckAny(t, f, image)
		spec, warnings, err := f.Parse(image)
		require.NoError(t, err)
		require.Empty(t, warnings)
		require.Contains(t, string(spec), "08:00:20:12:34:56")
		other := strings.NewReplacer("08:00:20:12:34:56", "08:00:20:ab:cd:ef", "0x123456", "0xabcdef").Replace(string(spec))
		ours, warnings, err := f.Pack([]byte(other))
		require.NoError(t, err)
		require.Empty(t, warnings)
		require.Equal(t, nvram(t, machine, base, "08:00:20:ab:cd:ef"), ours, machine)
	}
	ours, _, err := f.Pack(read(t, "sparcstation.idprom.jsonc"))
	require.NoError(t, err)
	require.Equal(t, nvram(t, "SS-5", 0x71200000, "08:00:20:12:34:56"), ours)
}

func TestFixtures(t *testing.T) {
	for _, name := range formtest.Images(t, f, "idprom") {
		image := read(t, name)
		if name == "good.bin" {
			require.Empty(t, f.Verify(image))
			require.True(t, f.Detect(image))
			continue
		}
		problems := f.Verify(image)
		require.Len(t, problems, 1)
		require.Equal(t, "checksum at byte 0xf: wrong checksum: got 0xd3, want 0xd2", problems[0].String())
		fixed, changes, err := f.Fix(image)
		require.NoError(t, err)
		require.Len(t, changes, 1)
		require.Empty(t, f.Verify(fixed))
	}
	fields, err := f.Fields(read(t, "good.bin"))
	require.NoError(t, err)
	require.Contains(t, fields, vpd.Field{Off: 1, Len: 1, Name: "machine", Value: "0x72 SPARCstation 10 or 20", CoveredBy: "checksum"})
	require.Contains(t, fields, vpd.Field{Off: 12, Len: 3, Name: "serial_number", Value: "0xc0ffee", CoveredBy: "checksum"})
}

const head = `{"format": "idprom", "machine": "0x80", "mac": "08:00:20:12:34:56", `

func TestSpecsRefused(t *testing.T) {
	formtest.Refused(t, f, head, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "idprom"`},
		{"no machine", `{"format": "idprom", "mac": "08:00:20:12:34:56"}`, "machine: missing"},
		{"no address", `{"format": "idprom", "machine": "0x80"}`, "mac: missing"},
		{"unknown member", `"hostid": 1`, "hostid: unknown"},
		{"serial number of 25 bits", `"serial_number": "0x1000000"`, "from 0 to 16777215"},
		{"date of 33 bits", `"date": 4294967296`, "from 0 to 4294967295"},
		{"too small", `"size": 15`, "size: 15"},
	})
}

func TestImagesRefused(t *testing.T) {
	for _, image := range [][]byte{nil, make([]byte, 15), make([]byte, idprom.MaxSize+1)} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage)
		formtest.CheckAny(t, f, image)
	}
}

func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, head, []formtest.Case{
		{"checksum", `"checksum": 1`, "checksum at byte 0xf: wrong checksum: got 0x01, want 0x"},
		{"version", `"version": 2`, "version at byte 0x0: is not known: got 0x02, want 0x01"},
		{"multicast", `{"format": "idprom", "machine": "0x80", "mac": "09:00:20:12:34:56"}`, "mac at byte 0x2: is a multicast address"},
	})
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		image, warnings, err := f.Pack(fmt.Appendf(nil, `{"format": "idprom", "machine": %d, "mac": "08:00:20:%02x:34:56", "date": %d, "serial_number": %d}`,
			rapid.Byte().Draw(t, "machine"), rapid.Byte().Draw(t, "mac"), rapid.Uint32().Draw(t, "date"), rapid.IntRange(0, 1<<24-1).Draw(t, "serial")))
		require.NoError(t, err)
		require.Empty(t, warnings)
		var xor byte
		for _, c := range image[:16] {
			xor ^= c
		}
		require.Zero(t, xor)
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) { formtest.Damage(t, f, bytes.Clone(read(t, "good.bin"))) }

func FuzzIDPROM(fz *testing.F) {
	fz.Add(read(fz, "good.bin"))
	fz.Add(read(fz, "bad-checksum.bin"))
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "sparcstation.idprom.jsonc"))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
