package uefi_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/uefi"
)

var f = uefi.Format()

const (
	global = "8be4df61-93ca-11d2-aa0d-00e098032b8c"
	ours   = "4d1f7f2c-6a0e-4c55-9d34-0a7c1f0be2a1"
)

func read(t testing.TB, name string) []byte { return formtest.Read(t, "uefi/"+name) }

func readFile(t testing.TB, path string) []byte {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// small makes a spec of a store of 1876 bytes.
func small(members string) string {
	return `{"format": "uefi", "layout": {"volume_size": 4096, "block_size": 1024, "store_size": 1976, "work_offset": 2048, "work_size": 1024}, ` + members + `}`
}

func TestSample(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "machine.uefi.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 0x84000)
	require.Empty(t, f.Verify(image))
	require.True(t, f.Detect(image))
	formtest.RoundTrip(t, f, image)
	list, err := uefi.Variables(image)
	require.NoError(t, err)
	require.Len(t, list, 6)
	require.Equal(t, uefi.Variable{Name: "Serial", GUID: ours, Attr: 3, Data: []byte("NVS-0001")}, list[3])
	// The digest is in certdb, as the firmware keeps it.
	require.Equal(t, "certdb", list[5].Name)
	require.Len(t, list[5].Data, 4+28+2*len("Private")+32)
	require.Contains(t, string(read(t, "small.fd")), string(list[5].Data))
}

// The empty stores that come with OVMF and for Arm are what we make of a
// layout's name; those with Microsoft's keys keep every byte.
func TestOVMF(t *testing.T) {
	for layout, name := range map[string]string{"ovmf-4m": "OVMF_VARS_4M.fd", "ovmf-2m": "OVMF_VARS.fd"} {
		image, warnings, err := f.Pack([]byte(`{"format": "uefi", "layout": "` + layout + `"}`))
		require.NoError(t, err)
		require.Empty(t, warnings)
		require.True(t, bytes.Equal(readFile(t, "/usr/share/OVMF/"+name), image), name)
	}
	for _, name := range []string{"OVMF_VARS.ms.fd", "OVMF_VARS_4M.ms.fd", "OVMF_VARS_4M.snakeoil.fd"} {
		image := readFile(t, "/usr/share/OVMF/"+name)
		require.True(t, f.Detect(image))
		require.Empty(t, f.Verify(image), name)
		formtest.RoundTrip(t, f, image)
		fields, err := f.Fields(image)
		require.NoError(t, err)
		formtest.Partition(t, image, fields)
		list, err := uefi.Variables(image)
		require.NoError(t, err)
		names := map[string]int{}
		for _, v := range list {
			names[v.Name]++
		}
		for _, key := range []string{"PK", "KEK", "db", "certdb"} {
			require.Equal(t, 1, names[key], "%s in %s", key, name)
		}
	}
	// ArmVirtPkg/VarStore.fdf.inc: the checksum and the CRC.
	image, _, err := f.Pack([]byte(`{"format": "uefi", "layout": "arm-virt", "size": 67108864, "fill": 0}`))
	require.NoError(t, err)
	require.Len(t, image, uefi.MaxSize)
	require.Equal(t, []byte{0x28, 0x09}, image[0x32:0x34])
	require.Equal(t, "5be7c686fefffffff0"[:16], fmt.Sprintf("%x", image[0x40010:0x40018]))
	formtest.RoundTrip(t, f, image)
}

func TestFixtures(t *testing.T) {
	want := map[string][]string{
		"bad-checksums.fd": {"volume at byte 0x32: wrong checksum: got 0xf527, want 0xf537",
			"work at byte 0x810: wrong CRC-32 of the FTW block: got 0xa38cc559, want 0xa38cc558"},
		"interrupted.fd": {"work at byte 0x800: a write was interrupted; when the firmware starts, it copies the spare area over what it was to change"},
	}
	for _, name := range formtest.Images(t, f, "uefi") {
		image := read(t, name)
		require.True(t, f.Detect(image))
		var got []string
		for _, p := range f.Verify(image) {
			got = append(got, p.String())
		}
		require.Equal(t, want[name], got)
	}
	fixed, changes, err := f.Fix(read(t, "bad-checksums.fd"))
	require.NoError(t, err)
	require.Len(t, changes, 2)
	require.Equal(t, read(t, "small.fd"), fixed)
}

// What remains of a spec without our own members is what QEMU's uefi-vars
// device reads and writes (qapi/uefi.json).
func TestJSONVersion2(t *testing.T) {
	text, _, err := f.Parse(read(t, "small.fd"))
	require.NoError(t, err)
	var store struct {
		Version   int
		Variables []struct {
			GUID, Name, Data, Time, Digest, State string
			Attr                                  int
		}
	}
	require.NoError(t, json.Unmarshal(text, &store))
	require.Equal(t, 2, store.Version)
	v := store.Variables[4]
	require.Equal(t, []any{ours, "Private", "010203", "e80703050e1e00000000000000000000", "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f", 0x27},
		[]any{v.GUID, v.Name, v.Data, v.Time, v.Digest, v.Attr})
	require.Equal(t, "0x3c", store.Variables[0].State)

	// And such JSON packs as it is, but for the format's name.
	image, warnings, err := f.Pack([]byte(`{"format": "uefi", "version": 2, "variables": [
		{"name": "Timeout", "guid": "8BE4DF61-93CA-11D2-AA0D-00E098032B8C", "attr": 7, "data": "0500"}]}`))
	require.NoError(t, err)
	require.Empty(t, warnings)
	list, err := uefi.Variables(image)
	require.NoError(t, err)
	require.Equal(t, []uefi.Variable{{"Timeout", global, 7, []byte{5, 0}}}, list)
}

func variable(name, more string) string {
	return `{"name": "` + name + `", "guid": "` + ours + `", "attr": 3` + more + `}`
}

func TestSpecsRefused(t *testing.T) {
	v := func(more string) string { return `"variables": [{"name": "x", "guid": "` + ours + `"` + more + `}]` }
	formtest.Refused(t, f, `{"format": "uefi", `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "uefi"`},
		{"unknown member", `"vars": []`, "vars: unknown"},
		{"version 1", `"version": 1`, "version: 1, want 2"},
		{"unknown layout", `"layout": "ovmf"`, `unknown "ovmf"; want one of ovmf-4m, ovmf-2m, arm-virt`},
		{"layout too large", `"layout": {"volume_size": 67112960, "store_size": 1000}`, "from 0 to 67108864"},
		{"volume too large", `"layout": {"volume_size": 4194304, "store_size": 1000}`, "more than 3 MiB"},
		{"store larger than the volume", `"layout": {"volume_size": 4096, "store_size": 4096}`, "larger than the volume"},
		{"blocks of 0", `"layout": {"volume_size": 4096, "block_size": 0, "store_size": 1000}`, "block_size is 0"},
		{"half a block", `"layout": {"volume_size": 4097, "store_size": 1000}`, "not a multiple"},
		{"work inside the store", `"layout": {"volume_size": 4096, "store_size": 3000, "work_offset": 2048, "work_size": 1024}`, "not those of an FTW block"},
		{"work without offset", `"layout": {"volume_size": 4096, "store_size": 1000, "work_size": 1024}`, "not those of an FTW block"},
		{"variables an object", `"variables": {}`, "want a list"},
		{"no name", `"variables": [{"guid": "` + ours + `", "attr": 7, "data": ""}]`, "name: missing"},
		{"empty name", `"variables": [` + `{"name": "", "guid": "` + ours + `", "attr": 7, "data": ""}]`, "want 1 to 2047 characters"},
		{"name with a zero", `"variables": [` + `{"name": "a\u0000b", "guid": "` + ours + `", "attr": 7, "data": ""}]`, "none of them 0"},
		{"name as typed text", `"variables": [{"name": {"type": "text", "data": "x"}, "guid": "` + ours + `", "attr": 7, "data": ""}]`, "text is a plain string"},
		{"no guid", `"variables": [{"name": "x", "attr": 7, "data": ""}]`, "guid: want a string"},
		{"guid without dashes", `"variables": [{"name": "x", "guid": "4d1f7f2c6a0e4c559d340a7c1f0be2a1", "attr": 7, "data": ""}]`, "is not one such as"},
		{"no attr", v(`, "data": ""`), "attr: missing"},
		{"attr a word", v(`, "attr": "NV", "data": ""`), "want an integer"},
		{"no data", v(`, "attr": 7`), "data: missing"},
		{"data not hex", v(`, "attr": 7, "data": "xy"`), "want hexadecimal digits"},
		{"time of 15", v(`, "attr": 39, "data": "", "time": "000000000000000000000000000000"`), "has 15 bytes, want 16"},
		{"digest of 20", v(`, "attr": 39, "data": "", "digest": "000102"`), "has 3 bytes, want the 32"},
		{"digest without time", v(`, "attr": 7, "data": "", "digest": {"type": "hex", "data": "00", "count": 32}`), "belongs to variables whose"},
		{"state 256", v(`, "attr": 7, "data": "", "state": 256`), "from 0 to 255"},
		{"half written with data", v(`, "attr": 7, "data": "00", "state": 255`), "its header gives name and data 0 and 0"},
		{"sizes of one", v(`, "attr": 7, "data": "00", "sizes": [1]`), "want two numbers"},
		{"sizes that are wrong", v(`, "attr": 7, "data": "00", "sizes": [4, 2]`), "gives name and data 4 and 2 bytes, and they have 4 and 1"},
		{"twice", `"variables": [` + variable("x", `, "data": "00"`) + "," + variable("x", `, "data": "01"`) + `]`, "x comes more than once"},
		{"two digests", `"variables": [{"name": "certdb", "guid": "d9bee56e-75dc-49d9-b4d7-b534210f637a", "attr": 39, "data": "0400"},
			{"name": "x", "guid": "` + ours + `", "attr": 39, "data": "00", "digest": {"type": "u8", "data": 1, "count": 32}}]`, "certdb, which is damaged"},
		{"padding too long", `"variables": [` + variable("x", `, "data": "00", "padding": "abcd"`) + `]`, "at most 3"},
		{"padding too short", `"variables": [` + variable("x", `, "data": "00", "padding": ""`) + "," + variable("y", `, "data": "00"`) + `]`, "has 0 bytes, want 3"},
		{"too much", `"layout": "ovmf-2m", "variables": [` + variable("x", `, "data": {"type": "hex", "data": "00", "count": 57181}`) + `]`, "take 57248 bytes, and the store has room for 57244"},
		{"free a variable", small(`"free": {"type": "hex", "data": "aa553f0003000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"}`), "begins with a variable"},
		{"work in the store", `"work": [{"offset": 100, "data": "00"}]`, "are not behind the store"},
		{"work behind the volume", `"work": [{"offset": "0x83fff", "data": "0000"}]`, "are not behind the store"},
		{"cut in the variables", small(`"cut": 110, "variables": [` + variable("x", `, "data": "00"`) + `]`), "and the variables end at"},
		{"cut and size", small(`"cut": 2000, "size": 2000`), "can't stand beside cut"},
		{"header and layout", `"layout": "ovmf-2m", "header": {"type": "hex", "data": "00"}`, "header: at byte 0x0: is shorter"},
		{"time without authentication", `"layout": {"volume_size": 4096, "store_size": 1000, "authenticated": false}, ` + v(`, "attr": 7, "data": "", "count": 1`), "keeps none"},
		{"size too small", `"size": 4096`, "the data takes 540672"},
	})
}

func TestImagesRefused(t *testing.T) {
	good := read(t, "small.fd")
	for name, change := range map[string]func(b []byte) []byte{
		"nothing": func([]byte) []byte { return nil }, "erased": func([]byte) []byte { return bytes.Repeat([]byte{0xff}, 4096) },
		"cut in the header":  func(b []byte) []byte { return b[:0x63] },
		"signature":          func(b []byte) []byte { b[0x28] ^= 1; return b },
		"volume GUID":        func(b []byte) []byte { b[0x10] ^= 1; return b },
		"store GUID":         func(b []byte) []byte { b[0x48] ^= 1; return b },
		"header of 0 bytes":  func(b []byte) []byte { b[0x30] = 0; return b },
		"header of 64 KiB":   func(b []byte) []byte { b[0x31] = 0xff; return b },
		"volume of 2^63":     func(b []byte) []byte { b[0x27] = 0x80; return b },
		"volume of 64 bytes": func(b []byte) []byte { binary.LittleEndian.PutUint64(b[0x20:], 64); return b },
		"store of 1 byte":    func(b []byte) []byte { binary.LittleEndian.PutUint32(b[0x58:], 1); return b },
		"volume of 4 MiB":    func(b []byte) []byte { b[0x22] = 0x40; return b },
		"trailing 5 MiB":     func(b []byte) []byte { return append(append(b, make([]byte, 5<<20)...), 1) },
		"too long":           func(b []byte) []byte { return append(b, make([]byte, uefi.MaxSize)...) },
	} {
		image := change(bytes.Clone(good))
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// The largest spec that an image of the largest size can give packs again.
func TestLargestSpec(t *testing.T) {
	if testing.Short() {
		t.Skip("64 MiB")
	}
	image, _, err := f.Pack([]byte(`{"format": "uefi", "layout": {"volume_size": 3145728, "store_size": 3145656, "authenticated": false}}`))
	require.NoError(t, err)
	for off := 0x64; off+32 <= len(image); off += 32 {
		copy(image[off:], "\xaa\x55\xfe\x01\xff\xff\xff\xff\x00\x00\x00\xff\x00\x00\x00\xff")
	}
	image = append(image, bytes.Repeat([]byte{1, 2, 3, 4}, 1<<20)...)
	image = append(image, make([]byte, uefi.MaxSize-len(image))...)
	spec, _, err := f.Parse(image)
	require.NoError(t, err)
	require.Greater(t, len(spec), 35<<20)
	again, _, err := f.Pack(spec)
	require.NoError(t, err)
	require.True(t, bytes.Equal(image, again))
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	header := fmt.Sprintf(`"header": {"type": "hex", "data": "%x"}`, read(t, "small.fd")[:0x64])
	change := func(off int, to string) string {
		i := len(`"header": {"type": "hex", "data": "`) + 2*off
		return header[:i] + to + header[i+len(to):]
	}
	formtest.Irregular(t, f, `{"format": "uefi", `, []formtest.Case{
		{"checksum", small(`"volume_checksum": 0`), "volume at byte 0x32: wrong checksum: got 0x0000"},
		{"block map", small(`"variables": []`)[:0] + `{"format": "uefi", "layout": {"volume_size": 4096, "block_size": 1024, "blocks": 2, "store_size": 1976}}`, "its block map adds up to 2048 bytes, and it has 4096"},
		{"volume cut", small(`"cut": 4095`), "volume at byte 0xfff: 1 bytes are missing"},
		{"store formatted", change(0x48+20, "5b"), "not formatted and healthy (5b fe"},
		{"store healthy", change(0x48+21, "ff"), "not formatted and healthy (5a ff"},
		{"store too large", change(0x48+18, "01"), "its size is 67512, and the volume has room for 4024"},
		{"free", small(`"free": {"type": "hex", "data": "ffff00"}`), "free at byte 0x64: bytes behind the variables are not erased"},
		{"garbage", small(`"free": {"type": "hex", "data": "1234"}`), "free at byte 0x64: the variables end here, and not in free space: no variable begins with 0x3412"},
		{"header at the end", small(`"variables": [` + variable("x", `, "data": {"type": "u8", "data": 0, "count": 1876}`) + `], "free": {"type": "hex", "data": "aa553f00"}`), "header has 60 bytes, and 8 are left"},
		{"volatile", small(`"variables": [{"name": "x", "guid": "` + ours + `", "attr": 6, "data": "00"}]`), "variables[0] x at byte 0x64: its attributes 0x6 say that it is volatile"},
		{"not at boot", small(`"variables": [{"name": "x", "guid": "` + ours + `", "attr": 5, "data": "00"}]`), "at run time and not at boot"},
		{"unknown attribute", small(`"variables": [{"name": "x", "guid": "` + ours + `", "attr": 259, "data": "00"}]`), "have unknown bits"},
		{"unknown state", small(`"variables": [` + variable("x", `, "data": "00", "state": 1`) + `]`), "unknown state 0x01"},
		{"name without a zero", small(`"variables": [{"name": {"type": "hex", "data": "7800"}, "guid": "` + ours + `", "attr": 3, "data": "00"}]`), "not UTF-16 with a zero"},
		{"name of half a surrogate", small(`"variables": [{"name": {"type": "hex", "data": "00d80000"}, "guid": "` + ours + `", "attr": 3, "data": "00"}]`), "not UTF-16 with a zero"},
		{"twice", small(`"variables": [` + variable("x", `, "data": "00"`) + "," + variable("x", `, "data": "01", "state": "0x3f"`) + `]`), "variables[1] x at byte 0xa8: comes more than once"},
		{"CRC", small(fmt.Sprintf(`"work": [{"offset": 2048, "data": "%x"}]`, append(bytes.Clone(read(t, "small.fd")[0x800:0x810]), 0, 0, 0, 0, 0xfe, 0xff, 0xff, 0xff, 0xe0, 3, 0, 0, 0, 0, 0, 0))), "work at byte 0x810: wrong CRC-32 of the FTW block: got 0x00000000"},
	})
}

// A variable that was deleted, or is being replaced, is not one twice.
func TestStates(t *testing.T) {
	image, warnings, err := f.Pack([]byte(small(`"variables": [` + variable("x", `, "data": "00", "state": "0x3c"`) + "," +
		variable("x", `, "data": "01", "state": "0x3e"`) + "," + variable("x", `, "data": "02"`) + "," + variable("x", `, "data": "03", "state": "0x7f"`) + `]`)))
	require.NoError(t, err)
	require.Empty(t, warnings)
	formtest.CheckAny(t, f, image)
	list, err := uefi.Variables(image)
	require.NoError(t, err)
	require.Equal(t, []uefi.Variable{{"x", ours, 3, []byte{2}}}, list)
}

// Pack drops what is deleted only when it must, and says so.
func TestPackReclaims(t *testing.T) {
	dead := variable("old", `, "data": {"type": "u8", "data": 1, "count": 900}, "state": "0x3c"`)
	image, warnings, err := f.Pack([]byte(small(`"variables": [` + dead + "," + variable("new", `, "data": {"type": "u8", "data": 2, "count": 700}`) + `]`)))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Contains(t, string(image), "\x01\x01\x01\x01")
	image, warnings, err = f.Pack([]byte(small(`"variables": [` + dead + "," + variable("new", `, "data": {"type": "u8", "data": 2, "count": 1000}`) + `]`)))
	require.NoError(t, err)
	require.Len(t, warnings, 1)
	require.Equal(t, "variables: reclaimed 968 bytes: 1 deleted or unfinished variables are left out, since all would not fit", warnings[0].String())
	require.NotContains(t, string(image), "\x01\x01\x01\x01")
	require.Empty(t, f.Verify(image))
}

func TestFields(t *testing.T) {
	fields, err := f.Fields(read(t, "small.fd"))
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 0x32, Len: 2, Name: "volume.checksum", Value: "0xf537", CoveredBy: "volume.checksum"}, byName["volume.checksum"])
	require.Equal(t, "(deleted) 0x0300", byName["variables[0] Timeout"].Value)
	require.Equal(t, "NVS-0001", byName["variables[3] Serial"].Value)
	require.Equal(t, "work.crc", byName["work.queue_size"].CoveredBy)
	require.EqualValues(t, 0xc00, byName["spare"].Off)
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		list := []map[string]any{}
		for _, name := range rapid.SliceOfNDistinct(rapid.StringMatching(`[A-Za-z0-9é€𐍈 ]{1,20}`), 0, 8, rapid.ID[string]).Draw(t, "names") {
			v := map[string]any{"name": name, "guid": rapid.SampledFrom([]string{global, ours}).Draw(t, "guid"),
				"attr": rapid.SampledFrom([]int{3, 7, 0x27}).Draw(t, "attr"), "data": fmt.Sprintf("%x", rapid.SliceOfN(rapid.Byte(), 0, 60).Draw(t, "data"))}
			if v["attr"] == 0x27 {
				v["time"] = fmt.Sprintf("%x", rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "time"))
				v["digest"] = fmt.Sprintf("%x", rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "digest"))
			}
			if rapid.Bool().Draw(t, "dead") && v["digest"] == nil {
				v["state"] = rapid.SampledFrom([]string{"0x3c", "0x3d", "0x7f"}).Draw(t, "state")
			}
			list = append(list, v)
		}
		text, err := json.Marshal(map[string]any{"format": "uefi", "variables": list, "size": rapid.IntRange(4096, 5000).Draw(t, "size"),
			"layout": map[string]any{"volume_size": 4096, "block_size": 512, "store_size": 2488, "work_offset": 3072, "work_size": 256}})
		require.NoError(t, err)
		image, warnings, err := f.Pack(text)
		require.NoError(t, err, "%s", text)
		require.Empty(t, warnings)
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	formtest.Damage(t, f, read(t, "plain.fd"))
	if !testing.Short() {
		formtest.Damage(t, f, read(t, "small.fd"))
	}
}

func FuzzUEFI(fz *testing.F) {
	for _, name := range []string{"small.fd", "plain.fd", "interrupted.fd"} {
		fz.Add(read(fz, name))
	}
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	spec, _, err := f.Parse(read(fz, "interrupted.fd"))
	require.NoError(fz, err)
	fz.Add(spec)
	fz.Add([]byte(small(`"variables": [{"name": {"type": "hex", "data": "78"}, "guid": "` + ours + `", "attr": 1, "data": "00", "sizes": [1, 1], "padding": "ab"}], "free": "x", "cut": 4000`)))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
