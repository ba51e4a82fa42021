package ubootenv_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/internal/spec"
	"nvstore.dev/vpd/ubootenv"
)

var f = ubootenv.Format()

func read(t testing.TB, name string) []byte { return formtest.Read(t, "ubootenv/"+name) }

func pack(t testing.TB, text string) []byte {
	image := formtest.Pack(t, f, []byte(text))
	require.True(t, f.Detect(image))
	return image
}

// mkenvimage makes an image of lines.
func mkenvimage(t testing.TB, lines string, args ...string) []byte {
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "text"), []byte(lines), 0o644))
	c := exec.Command("mkenvimage", append(args, "-o", "image", "text")...)
	c.Dir = dir
	out, err := c.CombinedOutput()
	require.NoError(t, err, "%s", out)
	image, err := os.ReadFile(filepath.Join(dir, "image"))
	require.NoError(t, err)
	return image
}

// fwPrintenv returns the variables of an image as libubootenv reads them, in
// lines. Copies are where the environments lie, as OFFSET SIZE.
func fwPrintenv(t testing.TB, image []byte, copies ...string) ([]string, error) {
	dir := t.TempDir()
	path, cfg := filepath.Join(dir, "image"), filepath.Join(dir, "cfg")
	require.NoError(t, os.WriteFile(path, image, 0o644))
	var lines strings.Builder
	for _, c := range copies {
		fmt.Fprintf(&lines, "%s %s\n", path, c)
	}
	require.NoError(t, os.WriteFile(cfg, []byte(lines.String()), 0o644))
	out, err := exec.Command("fw_printenv", "-c", cfg).Output()
	return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n"), err
}

func TestMkenvimageMakesTheSame(t *testing.T) {
	variables := `"bootdelay": "3", "ethaddr": "52:54:00:12:34:56", "bootcmd": "run a; run b", "opts": "a=b,c"`
	lines := "bootdelay=3\nethaddr=52:54:00:12:34:56\nbootcmd=run a; run b\nopts=a=b,c\n"
	for _, c := range []struct {
		spec string
		args []string
	}{
		{`"env_size": "0x2000"`, []string{"-s", "0x2000"}},
		{`"env_size": 512, "pad": 0`, []string{"-s", "512", "-p", "0"}},
		{`"env_size": "0x4000", "redundant": true`, []string{"-s", "0x4000", "-r"}},
	} {
		theirs := mkenvimage(t, lines, c.args...)
		require.Equal(t, theirs, pack(t, `{"format": "ubootenv", "variables": {`+variables+`}, `+c.spec+`}`))
		text, warnings, err := f.Parse(theirs)
		require.NoError(t, err)
		require.Empty(t, warnings)
		require.Contains(t, string(text), `"opts": "a=b,c"`)
	}
	empty, _, err := f.Pack([]byte(`{"format": "ubootenv", "env_size": 64}`))
	require.NoError(t, err)
	require.Equal(t, mkenvimage(t, "", "-s", "64"), empty)
}

func TestFwPrintenvReadsOurVariables(t *testing.T) {
	image := pack(t, string(read(t, "board.ubootenv.jsonc")))
	lines, err := fwPrintenv(t, image, "0x0 0x2000")
	require.NoError(t, err)
	require.ElementsMatch(t, []string{
		"bootdelay=3", "baudrate=115200", "ethaddr=52:54:00:12:34:56", "serial#=NVS0123456789",
		"bootargs=console=ttyS0,115200 root=/dev/mmcblk0p2 rootwait",
		"bootcmd=load mmc 0:1 ${kernel_addr_r} Image && booti ${kernel_addr_r} - ${fdt_addr_r}",
		"bootmenu_0=Linux=run bootcmd",
	}, lines)
	image = pack(t, string(read(t, "redundant.ubootenv.jsonc")))
	lines, err = fwPrintenv(t, image, "0x0 0x1000", "0x4000 0x1000")
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"bootcount=1", "bootcmd=run boot_b"}, lines)
}

// fw_printenv and we agree on which of two copies counts, whatever the flags
// are and whichever CRC is wrong.
func TestFwPrintenvTakesTheActiveCopy(t *testing.T) {
	for _, c := range []struct {
		flags  [2]int
		crc    [2]string
		active int
	}{
		{[2]int{1, 0}, [2]string{}, 0},
		{[2]int{0, 1}, [2]string{}, 1},
		{[2]int{7, 8}, [2]string{}, 1},
		{[2]int{255, 0}, [2]string{}, 1},
		{[2]int{0, 255}, [2]string{}, 0},
		{[2]int{254, 255}, [2]string{}, 1},
		{[2]int{1, 2}, [2]string{1: `, "crc": 1`}, 0},
		{[2]int{2, 1}, [2]string{0: `, "crc": 1`}, 1},
	} {
		image, _, err := f.Pack(fmt.Appendf(nil, `{"format": "ubootenv", "env_size": 1024, "redundant": true, "copies": [
			{"flag": %d, "variables": {"active": "0"}%s}, {"flag": %d, "variables": {"active": "1"}%s}]}`, c.flags[0], c.crc[0], c.flags[1], c.crc[1]))
		require.NoError(t, err)
		formtest.CheckAny(t, f, image)
		lines, err := fwPrintenv(t, image, "0x0 0x400", "0x400 0x400")
		require.NoError(t, err)
		require.Equal(t, []string{fmt.Sprintf("active=%d", c.active)}, lines, "%v", c)
		fields, err := f.Fields(image)
		require.NoError(t, err)
		for _, fd := range fields {
			if strings.HasSuffix(fd.Name, "].flag") {
				require.Equal(t, fd.Name == fmt.Sprintf("copies[%d].flag", c.active), strings.HasSuffix(fd.Value, " active") && !strings.HasSuffix(fd.Value, "not active"), "%v %v", c, fd)
			}
		}
	}
}

// fw_printenv and Verify agree on the CRC, wherever the fault is, and on what
// Fix makes of it.
func TestFwPrintenvAgreesOnTheCRC(t *testing.T) {
	good := read(t, "plain.env")
	for _, off := range []int{0, 3, 4, 30, 1023} {
		bad := bytes.Clone(good)
		bad[off] ^= 0x01
		_, err := fwPrintenv(t, bad, "0x0 0x400")
		require.Error(t, err)
		problems := f.Verify(bad)
		require.NotEmpty(t, problems)
		require.Equal(t, "crc", problems[0].Area)
		fixed, changes, err := f.Fix(bad)
		require.NoError(t, err)
		require.Len(t, changes, 1)
		_, err = fwPrintenv(t, fixed, "0x0 0x400")
		require.NoError(t, err)
	}
}

func TestFixtures(t *testing.T) {
	want := map[string]string{
		"torn-first.env":  "copies[0].crc at byte 0x0: wrong CRC-32; U-Boot takes copies[1], and this one is not to be fixed: got 0xffffffff",
		"torn-second.env": "copies[1].crc at byte 0x400: wrong CRC-32; U-Boot takes copies[0], and this one is not to be fixed: got 0x",
		"bad-crc.env":     "crc at byte 0x0: wrong CRC-32: got 0x",
		"twice.env":       "entries[2] at byte 0xc: a comes twice",
	}
	for _, name := range formtest.Images(t, f, "ubootenv") {
		image := read(t, name)
		require.Equal(t, name != "twice.env", f.Detect(image), name)
		problems := f.Verify(image)
		switch {
		case name == "both-bad.env":
			require.Len(t, problems, 2)
		case want[name] == "":
			require.Empty(t, problems, name)
		default:
			require.Len(t, problems, 1, name)
			require.Contains(t, problems[0].String(), want[name])
		}
	}
}

// What an interrupted saveenv leaves behind is never made to count.
func TestNeverFixesACopyBesideAnother(t *testing.T) {
	for _, name := range []string{"torn-first.env", "torn-second.env", "both-bad.env"} {
		image := read(t, name)
		fixed, changes, err := f.Fix(image)
		require.NoError(t, err)
		require.Empty(t, changes)
		require.Equal(t, image, fixed)
		for _, p := range f.Verify(image) {
			require.False(t, p.Fixable)
		}
	}
	// What is read is what U-Boot reads.
	lines, err := fwPrintenv(t, read(t, "torn-first.env"), "0x0 0x400", "0x400 0x400")
	require.NoError(t, err)
	require.Contains(t, lines, "bootcmd=run boot_b")
	lines, err = fwPrintenv(t, read(t, "torn-second.env"), "0x0 0x400", "0x400 0x400")
	require.NoError(t, err)
	require.Contains(t, lines, "bootcmd=run boot_a")
}

// The size of the environment is found, wherever in the image it ends.
func TestSizeIsFound(t *testing.T) {
	for _, size := range []int{64, 1000, 4096, 8191, 65536} {
		for _, more := range []int{0, 1, 4096} {
			for _, redundant := range []bool{false, true} {
				text := fmt.Sprintf(`{"format": "ubootenv", "env_size": %d, "redundant": %v, "variables": {"a": "1"}, "size": %d}`, size, redundant, 2*size+more)
				image, _, err := f.Pack([]byte(text))
				require.NoError(t, err)
				spec, warnings, err := f.Parse(image)
				require.NoError(t, err)
				require.Empty(t, warnings)
				require.Contains(t, string(spec), fmt.Sprintf(`"env_size": "%#x"`, size))
			}
		}
	}
}

const tornSpec = `{
  "format": "ubootenv",
  "env_size": "0x400",
  "redundant": true,
  "copies": [
    {
      "flag": 255,
      "variables": {
        "bootcmd": "run boot_a",
        "bootcount": "0",
        "ver": "U-Boot 2024.01"
      },
      "pad": "0x00"
    },
    {
      "flag": 0,
      "variables": {
        "bootcmd": "run boot_b",
        "bootcount": "1",
        "ver": "U-Boot 2024.01"
      },
      "pad": "0x00"
    }
  ]
}
`

func TestParse(t *testing.T) {
	text, warnings, err := f.Parse(read(t, "two-copies.env"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, tornSpec, string(text))
	text, _, err = f.Parse(read(t, "partition.env"))
	require.NoError(t, err)
	require.Contains(t, string(text), `"env_size": "0x400"`)
	require.Contains(t, string(text), `"size": "0x1000"`)
	text, _, err = f.Parse(read(t, "twice.env"))
	require.NoError(t, err)
	require.Contains(t, string(text), `"entries": [
    "a=1",
    "b=2",
    "a=3"
  ]`)
}

func TestFields(t *testing.T) {
	byName := formtest.Fields(t, f, read(t, "two-copies.env"))
	require.Equal(t, vpd.Field{Off: 0x404, Len: 1, Name: "copies[1].flag", Value: "0 active"}, byName["copies[1].flag"])
	require.Equal(t, vpd.Field{Off: 0x418, Len: 12, Name: "copies[1].variables.bootcount", Value: "1", CoveredBy: "copies[1].crc"}, byName["copies[1].variables.bootcount"])
}

func TestSpecsRefused(t *testing.T) {
	formtest.Refused(t, f, `{"format": "ubootenv", "env_size": 128, `, []formtest.Case{
		{"other format", `{"format": "fru"}`, `want "ubootenv"`},
		{"no size", `{"format": "ubootenv"}`, "env_size: missing: U-Boot's CONFIG_ENV_SIZE"},
		{"size 6", `{"format": "ubootenv", "env_size": 6}`, "env_size: 6, want at least 7"},
		{"size large", `{"format": "ubootenv", "env_size": 1048577}`, "from 0 to 1048576"},
		{"unknown member", `"env": {}`, "env: unknown"},
		{"unknown member of a copy", `"redundant": true, "copies": [{"flags": 1}]`, "copies[0].flags: unknown"},
		{"variables a list", `"variables": []`, "variables: want an object"},
		{"value a number", `"variables": {"a": 1}`, "variables.a: want a string"},
		{"name with =", `"variables": {"a=b": "1"}`, "variables.a=b: a variable's name is not empty and has no ="},
		{"name empty", `"variables": {"": "1"}`, "a variable's name is not empty"},
		{"name twice", `"variables": {"a": "1", "a": "2"}`, "variables.a: comes twice"},
		{"value with a zero byte", `"variables": {"a": "1\u0000b=2"}`, "variables.a: is empty, or has a zero byte"},
		{"entry empty", `"entries": [""]`, "entries[0]: is empty"},
		{"entries and variables", `"entries": [], "variables": {}`, "entries: can't be beside variables"},
		{"data and variables", `"data": {"type": "hex", "data": ""}, "variables": {}`, "variables: can't be beside data"},
		{"data short", `"data": {"type": "hex", "data": "00"}`, "data: 1 bytes, want 124"},
		{"too much", `"variables": {"a": "` + strings.Repeat("x", 122) + `"}`, "variables.a: the variables take more than 124 bytes"},
		{"no place for the end", `"variables": {"a": "` + strings.Repeat("x", 121) + `"}`, "the variables take 125 bytes, and the environment has 124 for them"},
		{"rest long", `"rest": {"type": "hex", "data": "00", "count": 124}`, "the variables take 125 bytes"},
		{"copies of a single one", `"copies": []`, `copies: needs "redundant": true`},
		{"no copies", `"redundant": true, "copies": []`, "want a list of one or two"},
		{"three copies", `"redundant": true, "copies": [{}, {}, {}]`, "want a list of one or two"},
		{"copies overlap", `"redundant": true, "copies": [{}, {"offset": 127}]`, "copies[1].offset: 0x7f, want at least 0x80"},
		{"variables that no copy takes", `"redundant": true, "variables": {}, "copies": [{"variables": {}}]`, "variables: belongs into one of the copies"},
		{"CRC of no copy", `"redundant": true, "crc": 1`, "crc: belongs into one of the copies"},
		{"flag of 9 bits", `"redundant": true, "copies": [{"flag": 256}]`, "from 0 to 255"},
		{"redundant a number", `"redundant": 1`, "want true or false"},
		{"image small", `"size": 127`, "size: 127, and the environment ends at 128"},
		{"copy behind the end", `"redundant": true, "copies": [{"offset": 1048576}]`, "size: "},
		{"nothing like it", `"crc": 1, "pad": 1`, "the result would not be an environment"},
		{"patch behind the image", `"size": 256, "patches": [{"offset": 256, "type": "hex", "data": "00"}]`, "patches[0]: ends behind the image"},
	})
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "6 bytes": []byte("abcda="), "zeros": make([]byte, 8192), "erased": bytes.Repeat([]byte{0xff}, 8192),
		"text": bytes.Repeat([]byte("hello, world. "), 100), "too large": append(read(t, "plain.env"), make([]byte, ubootenv.MaxSize)...),
	} {
		_, _, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		formtest.CheckAny(t, f, image)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	formtest.Irregular(t, f, `{"format": "ubootenv", "env_size": 64, `, []formtest.Case{
		{"CRC", `"variables": {"a": "1"}, "crc": 1`, "crc at byte 0x0: wrong CRC-32: got 0x00000001, want 0x"},
		{"CRC of a lone copy", `"redundant": true, "copies": [{"variables": {"a": "1"}, "crc": 1}]`, "copies[0].crc at byte 0x0: wrong CRC-32: got"},
		{"CRC of the first", `"redundant": true, "variables": {"a": "1"}, "copies": [{"crc": 1}, {"flag": 2}]`, "copies[0].crc at byte 0x0: wrong CRC-32; U-Boot takes copies[1]"},
		{"CRC of the second", `"redundant": true, "variables": {"a": "1"}, "copies": [{}, {"flag": 2, "crc": 1}]`, "copies[1].crc at byte 0x40: wrong CRC-32; U-Boot takes copies[0]"},
		{"no end", `"data": {"type": "text", "data": "a=1", "size": 60, "fill": "0x61"}`, "data at byte 0x4: the variables have no end"},
		{"no =", `"entries": ["a=1", "b"]`, "entries[1] at byte 0x8: has no ="},
		{"no name", `"entries": ["=1", "b=2"]`, "entries[0] at byte 0x4: has no name"},
		{"twice", `"entries": ["a=1", "a=1"]`, "entries[1] at byte 0x8: a comes twice"},
	})
	// Not in one place, and no problem: bytes of an older, longer environment.
	image := pack(t, `{"format": "ubootenv", "env_size": 64, "variables": {"a": "1", "b": {"type": "hex", "data": "ff80"}}, "rest": {"type": "text", "data": "old=1"}, "pad": 0}`)
	text, _, err := f.Parse(image)
	require.NoError(t, err)
	require.Contains(t, string(text), `"data": "6f6c643d31"`)
}

func TestRandomSpecs(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		variables := func(name string) spec.Object {
			o := spec.Object{}
			for i := range rapid.IntRange(1, 12).Draw(t, name) {
				o.Add(fmt.Sprintf("%s%d", rapid.StringMatching(`[A-Za-z_.#-]{1,8}`).Draw(t, "name"), i), rapid.StringMatching(`[ -~\t\näß€]{0,30}`).Draw(t, "value"))
			}
			return o
		}
		var o spec.Object
		o.Add("format", "ubootenv")
		size := rapid.IntRange(2048, 9000).Draw(t, "size")
		o.Add("env_size", size)
		if rapid.Bool().Draw(t, "redundant") {
			o.Add("redundant", true)
			list := []spec.Object{{}, {}}
			for i := range list {
				list[i].Add("flag", rapid.Byte().Draw(t, "flag"))
				list[i].Add("variables", variables("copy"))
			}
			if rapid.Bool().Draw(t, "apart") {
				list[1].Add("offset", 3*4096)
			}
			o.Add("copies", list)
		} else {
			o.Add("variables", variables("variables"))
			o.Add("pad", rapid.Byte().Draw(t, "pad"))
		}
		o.Add("size", rapid.IntRange(2*size, 40000).Draw(t, "image")+3*4096)
		text, err := json.Marshal(o)
		require.NoError(t, err)
		image, warnings, err := f.Pack(text)
		require.NoError(t, err, "%s", text)
		require.Empty(t, warnings)
		parsed, _, err := f.Parse(image)
		require.NoError(t, err)
		require.Contains(t, string(parsed), fmt.Sprintf(`"env_size": "%#x"`, size))
		formtest.CheckAny(t, f, image)
	})
}

func TestDamagedImages(t *testing.T) {
	for _, text := range []string{
		`{"format": "ubootenv", "env_size": 64, "variables": {"a": "1", "bootcmd": "run x"}}`,
		`{"format": "ubootenv", "env_size": 48, "redundant": true, "variables": {"a": "1", "b": ""}, "copies": [{}, {"flag": 0}]}`,
	} {
		formtest.Damage(t, f, pack(t, text))
	}
}

func FuzzEnv(fz *testing.F) {
	for _, name := range []string{"plain.env", "two-copies.env", "torn-first.env", "torn-second.env", "both-bad.env", "twice.env", "partition.env"} {
		fz.Add(read(fz, name))
	}
	fz.Fuzz(func(t *testing.T, image []byte) { formtest.CheckAny(t, f, image) })
}

func FuzzPack(fz *testing.F) {
	for _, name := range []string{"board", "redundant"} {
		fz.Add(read(fz, name+".ubootenv.jsonc"))
	}
	fz.Add([]byte(tornSpec))
	fz.Fuzz(func(t *testing.T, spec []byte) { formtest.FuzzPack(t, f, spec) })
}
