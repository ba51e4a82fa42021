package edit_test

import (
	"encoding/json"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/edit"
	"nvstore.dev/vpd/formats"
)

// An element of a list is found by its name, or its type.
func TestNamedElements(t *testing.T) {
	for file, c := range map[string]struct{ path, want, set string }{
		"uefi/small.fd":           {"variables.Timeout.data", `"0500"`, `"0a00"`}, // not the deleted one
		"chrp/slof.bin":           {`partitions["common"].values.load-base`, `"5000"`, `"6000"`},
		"smbios/server32.bin":     {"structures.system.serial_number", `"S-0042"`, `"S-0043"`},
		"ipz/without-tags.bin":    {"records.VINI.keywords.SN", `"NVS42"`, `"NVS0043"`},
		"smbios/laptop.bin":       {"structures.memory_device.part_number", `"M471A4G43MB1-CTD    "`, `"x"`}, // the last
		"uefi/bad-checksums.fd":   {`variables["Serial"].guid`, `"4d1f7f2c-6a0e-4c55-9d34-0a7c1f0be2a1"`, `"4d1f7f2c-6a0e-4c55-9d34-0a7c1f0be2a2"`},
		"uefi/interrupted.fd":     {"variables.Lang.data", `"646500"`, `"656e00"`}, // being replaced by one half written
		"keyword/part.dat":        {"keywords.SN", `"YH30BG78B014"`, `"1"`},
		"uefi/plain.fd":           {"variables.Setup.attr", `3`, `7`},
		"chrp/small.bin":          {"partitions.system.values.a", `"b"`, `"c"`},
		"smbios/tables.bin":       {"structures.oem_strings.strings[1]", `"second"`, `"2nd"`},
		"ipz/system.dat":          {"records.VSYS.type", `255`, ``},
		"smbios/server32.bin\x00": {"structures.end.handle", `"0x7f00"`, `"0x7e00"`},
	} {
		for file[len(file)-1] == 0 {
			file = file[:len(file)-1]
		}
		image, err := os.ReadFile("../../fixtures/vpd/" + file)
		require.NoError(t, err)
		f := formats.Detect(image)
		if f == nil {
			f = formats.ByName("uefi")
		}
		text, _, err := f.Parse(image)
		require.NoError(t, err)
		got, err := edit.Get(text, c.path)
		require.NoError(t, err, "%s %s", file, c.path)
		require.Equal(t, c.want, string(got), "%s %s", file, c.path)
		if c.set == "" { // its ECC can't be made
			_, _, err := edit.Apply(f, image, []edit.Change{{Path: c.path, Value: json.RawMessage("1")}})
			require.ErrorIs(t, err, vpd.ErrSpec)
			require.ErrorContains(t, err, "is not public")
			continue
		}
		edited, _, err := edit.Apply(f, image, []edit.Change{{Path: c.path, Value: json.RawMessage(c.set)}})
		require.NoError(t, err, "%s %s", file, c.path)
		text, _, err = f.Parse(edited)
		require.NoError(t, err)
		got, err = edit.Get(text, c.path)
		require.NoError(t, err)
		require.Equal(t, c.set, string(got), "%s %s", file, c.path)
	}
	image, err := os.ReadFile("../../fixtures/vpd/uefi/small.fd")
	require.NoError(t, err)
	f := formats.ByName("uefi")
	text, _, err := f.Parse(image)
	require.NoError(t, err)
	_, err = edit.Get(text, "variables.None")
	require.ErrorIs(t, err, edit.ErrNotFound)
	_, _, err = edit.Apply(f, image, []edit.Change{{Path: "variables.None.data", Value: json.RawMessage(`"00"`)}})
	require.ErrorContains(t, err, `"None" is looked for in a list, and no element has that name or type; write [+]`)
	edited, _, err := edit.Apply(f, image, []edit.Change{{Path: "variables.Timeout"}})
	require.NoError(t, err)
	text, _, err = f.Parse(edited)
	require.NoError(t, err)
	got, err := edit.Get(text, "variables.Timeout.state")
	require.NoError(t, err)
	require.Equal(t, `"0x3c"`, string(got), "what is left is the deleted one")
}
