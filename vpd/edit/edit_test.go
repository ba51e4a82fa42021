package edit_test

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/edit"
	"nvstore.dev/vpd/formats"
)

// images returns every image among the fixtures, with its format.
func images(t testing.TB) map[string]vpd.Format {
	all := map[string]vpd.Format{}
	for _, f := range formats.All() {
		paths, err := filepath.Glob("../../fixtures/vpd/" + f.Name() + "/*")
		require.NoError(t, err)
		for _, p := range paths {
			info, err := os.Stat(p)
			require.NoError(t, err)
			large := info.Size() > 4<<10 // takes long, above all under the race detector
			if !strings.HasSuffix(p, ".md") && !strings.HasSuffix(p, ".jsonc") && !(large && testing.Short()) {
				all[p] = f
			}
		}
	}
	require.Greater(t, len(all), 10)
	return all
}

func read(t testing.TB, path string) []byte {
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	return b
}

// leaves lists the paths of everything in a spec, as Diff against nothing
// writes them.
func leaves(t testing.TB, spec []byte) []edit.Difference {
	list, err := edit.Diff([]byte(`{}`), spec)
	require.NoError(t, err)
	for i := 0; i < len(list); i++ {
		d := list[i]
		var o map[string]json.RawMessage
		if json.Unmarshal(d.New, &o) == nil {
			var names []string
			for name := range o {
				names = append(names, name)
			}
			slices.Sort(names)
			for _, name := range names {
				if strings.ContainsAny(name, ".[#") {
					continue
				}
				list = append(list, edit.Difference{Path: d.Path + "." + name, New: o[name]})
			}
		}
		var l []json.RawMessage
		if json.Unmarshal(d.New, &l) == nil {
			for n, v := range l {
				list = append(list, edit.Difference{Path: d.Path + "[" + string(rune('0'+n%10)) + "]", New: v})
				if n == 9 {
					break
				}
			}
		}
	}
	return list
}

// some takes fewer fields of a large image, which takes long to pack.
func some(list []edit.Difference, image []byte) []edit.Difference {
	const few = 6
	if len(image) < 4<<10 || len(list) < few {
		return list
	}
	var out []edit.Difference
	for i := 0; i < len(list); i += len(list) / few {
		out = append(out, list[i])
	}
	return out
}

// Setting a field to what it is, is no change, whatever is irregular about the
// image; and Get returns what the spec has.
func TestSetToItself(t *testing.T) {
	for path, f := range images(t) {
		image := read(t, path)
		spec, _, err := f.Parse(image)
		require.NoError(t, err)
		for _, l := range some(leaves(t, spec), image) {
			v, err := edit.Get(spec, l.Path)
			require.NoError(t, err, "%s %s", path, l.Path)
			require.JSONEq(t, string(l.New), string(v))
			out, _, err := edit.Apply(f, image, []edit.Change{{Path: l.Path, Value: v}})
			require.NoError(t, err, "%s %s", path, l.Path)
			require.Equal(t, image, out, "%s %s", path, l.Path)
		}
	}
}

// A change of one text changes that text and nothing else, or is refused.
func TestSetChangesNothingElse(t *testing.T) {
	changed := map[string]int{}
	for path, f := range images(t) {
		image := read(t, path)
		spec, _, err := f.Parse(image)
		require.NoError(t, err)
		for _, l := range some(leaves(t, spec), image) {
			var s string
			if json.Unmarshal(l.New, &s) != nil || s == "" || l.Path == "format" {
				continue
			}
			if f.Name() == "uefi" && strings.HasSuffix(l.Path, "].name") {
				continue // certdb has the names of variables in its data
			}
			texts := []string{s + "123", s[1:], strings.ToUpper(s), "Q" + s[1:]}
			if len(image) > 64<<10 {
				texts = texts[:1]
			}
			for _, text := range texts {
				v, err := edit.String(text)
				require.NoError(t, err)
				out, _, err := edit.Apply(f, image, []edit.Change{{Path: l.Path, Value: v}})
				if err != nil {
					require.ErrorIs(t, err, vpd.ErrSpec)
					continue
				}
				after, _, err := f.Parse(out)
				require.NoError(t, err)
				diff, err := edit.Diff(spec, after)
				require.NoError(t, err)
				for _, d := range diff {
					own := d.Path == l.Path || strings.HasPrefix(l.Path, d.Path+".") || strings.HasPrefix(l.Path, d.Path+"[")
					if own && d.Path != l.Path && d.New == nil {
						break // the spec has another form now, as where names don't come twice any more
					}
					room := slices.Contains([]string{"size", "fill", "trailing"}, d.Path) || strings.Contains(d.Path, ".RW") || strings.HasSuffix(d.Path, "area_size") ||
						strings.HasSuffix(d.Path, "checksum") && d.New == nil // a wrong one that is right now
					require.True(t, own || room, "%s: %s = %q changed %s", path, l.Path, text, d)
					if own {
						changed[f.Name()]++
					}
				}
				require.LessOrEqual(t, len(f.Verify(out)), len(f.Verify(image))+1, "%s: %s = %q: %v", path, l.Path, text, f.Verify(out))
			}
		}
	}
	for _, name := range []string{"pci", "fru", "tlvinfo", "edid", "hat"} {
		require.Greater(t, changed[name], 5, "%v", changed)
	}
}

// parts are the bytes of an image's fields by name.
func parts(t *testing.T, f vpd.Format, image []byte) map[string]string {
	fields, err := f.Fields(image)
	require.NoError(t, err)
	m := map[string]string{}
	for _, x := range fields {
		m[x.Name] = string(image[x.Off : x.Off+x.Len])
	}
	return m
}

// A longer field takes its room from the free space of its area, and what lies
// behind the area stays.
func TestPCIFreeSpace(t *testing.T) {
	f := formats.ByName("pci")
	image, _, err := f.Pack(read(t, "../../fixtures/vpd/nic.pci.jsonc"))
	require.NoError(t, err)
	long, err := edit.String("ASSET-0042-AND-MUCH-MORE-OF-IT")
	require.NoError(t, err)
	out, warnings, err := edit.Apply(f, image, []edit.Change{
		{Path: "read_write.YA", Value: long}, {Path: "read_write.Y0", Value: long}, {Path: "read_only.V9", Value: long}})
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Empty(t, f.Verify(out))
	require.Len(t, out, len(image))
	spec, _, err := f.Parse(out)
	require.NoError(t, err)
	require.Less(t, strings.Index(string(spec), `"V9"`), strings.Index(string(spec), `"RV"`))
	require.Less(t, strings.Index(string(spec), `"Y0"`), strings.Index(string(spec), `"RW"`))
	// The read-write area still has 112 bytes.
	require.Equal(t, parts(t, f, image)["read_write"], parts(t, f, out)["read_write"])

	// More than the free space: the area grows into the fill behind it.
	v, err := edit.String(strings.Repeat("x", 90))
	require.NoError(t, err)
	out, _, err = edit.Apply(f, image, []edit.Change{{Path: "read_write.Y0", Value: v}})
	require.ErrorIs(t, err, vpd.ErrSpec, "256 bytes have no room for it")
	require.Nil(t, out)
}

// The areas behind one that grows move, byte for byte; one that has room in it
// doesn't grow.
func TestFRUAreasMove(t *testing.T) {
	f := formats.ByName("fru")
	image, _, err := f.Pack(read(t, "../../fixtures/vpd/fru/server.fru.jsonc"))
	require.NoError(t, err)
	area := func(image []byte, i int) []byte {
		off := int(image[i]) * 8
		return image[off : off+int(image[off+1])*8]
	}
	records := func(image []byte) []byte { return image[int(image[5])*8:][:60] }
	set := func(path, text string) []byte {
		v, err := edit.String(text)
		require.NoError(t, err)
		out, _, err := edit.Apply(f, image, []edit.Change{{Path: path, Value: v}})
		require.NoError(t, err)
		require.Empty(t, f.Verify(out))
		require.Len(t, out, len(image))
		return out
	}
	out := set("board.serial_number", strings.Repeat("S", 60))
	require.NotEqual(t, image[4], out[4])
	for _, i := range []int{2, 4} {
		require.Equal(t, area(image, i), area(out, i))
	}
	require.Equal(t, records(image), records(out))
	out = set("product.asset_tag", "a longer tag, for which the area has room")
	require.Equal(t, image[:8], out[:8])
	out = set("product.asset_tag", strings.Repeat("t", 63))
	require.Equal(t, image[:5], out[:5])
	out = set("product.file_id", strings.Repeat("t", 63))
	require.Equal(t, records(image), records(out))
}

// A memory doesn't get smaller.
func TestShorter(t *testing.T) {
	f := formats.ByName("fru")
	image := read(t, "../../fixtures/vpd/fru/board-product.bin")
	spec, _, err := f.Parse(image)
	require.NoError(t, err)
	_, err = edit.Get(spec, "size")
	require.ErrorIs(t, err, edit.ErrNotFound)
	out, _, err := edit.Apply(f, image, []edit.Change{{Path: "product"}})
	require.NoError(t, err)
	require.Len(t, out, len(image))
	require.Equal(t, byte(0xff), out[len(out)-1])
}

func TestPaths(t *testing.T) {
	spec := `{"a": {"b.c": {"d": 1}, "b": {"c": 2}, "": 3, "x[0]": 4}, "l": [10, {"m": 11}, [12]], "/": 5}`
	for path, want := range map[string]string{
		"a.b": `{"c":2}`, "a.b.c.d": "1", `a["b"].c`: "2", `a["b.c"].d`: "1", `a[""]`: "3", "a.x[0]": "4", "l[0]": "10", "l[1].m": "11",
		"l[2][0]": "12", "/a/b/c": "2", "/a/b.c/d": "1", "/l/1/m": "11", "/~1": "5", "/a/": "3",
	} {
		got, err := edit.Get([]byte(spec), path)
		require.NoError(t, err, path)
		require.Equal(t, want, string(got), path)
	}
	for _, missing := range []string{"b", "a.c", "l[3]", "l.a", "a[0]", "l[0].x", "/l/3", "/b", "a.b.c.e", "l[+]"} {
		_, err := edit.Get([]byte(spec), missing)
		require.ErrorIs(t, err, edit.ErrNotFound, missing)
	}
	for _, bad := range []string{"a..b", "a.", ".a", "l[", "l[x]", "l[00]", "l[-1]", `a["b`, `a["b"`, `a["b"]c`, "/l/x", "l[99999999999]"} {
		_, err := edit.Get([]byte(spec), bad)
		require.ErrorIs(t, err, vpd.ErrSpec, bad)
	}
}

func TestChangesRefused(t *testing.T) {
	f := formats.ByName("fru")
	image, _, err := f.Pack(read(t, "../../fixtures/vpd/fru/server.fru.jsonc"))
	require.NoError(t, err)
	one := json.RawMessage(`"one"`)
	for _, c := range []struct {
		path  string
		value json.RawMessage
		want  string
	}{
		{"", one, "empty"}, {"board.custom[7]", one, "has 2 elements"}, {"board.custom.x", one, "in a list"},
		{"board[0]", one, "in an object"}, {"board.file_id.x", one, "has no members"}, {"board.none", one, "unknown"},
		{"board.file_id", json.RawMessage(`{"a"`), "EOF"}, {"board.file_id", json.RawMessage(``), "want a value"},
		{"board.file_id", json.RawMessage(`nul`), "not JSON"}, {"board.file_id", json.RawMessage(strings.Repeat("[", 100) + strings.Repeat("]", 100)), "deep"},
		{"board.file_id", json.RawMessage(`"` + strings.Repeat("x", 64) + `"`), "at most 63"},
		{"format", json.RawMessage(`"pci"`), `want "fru"`},
	} {
		out, _, err := edit.Apply(f, image, []edit.Change{{Path: c.path, Value: c.value}})
		require.ErrorIs(t, err, vpd.ErrSpec, c.path)
		require.ErrorContains(t, err, c.want)
		require.Nil(t, out)
	}
	_, _, err = edit.Apply(f, image, []edit.Change{{Path: "board.none"}})
	require.ErrorIs(t, err, edit.ErrNotFound)
	_, _, err = edit.Apply(f, []byte("no FRU"), nil)
	require.ErrorIs(t, err, vpd.ErrImage)
	_, err = edit.String("a\xffb")
	require.ErrorIs(t, err, vpd.ErrSpec)
}

func TestDiff(t *testing.T) {
	a := `{"x": 1, "same": [1, 2], "v": {"type": "hex", "data": "00"}, "o": {"p": "a  b"}, "l": [1]}`
	b := `{"o": {"p": "a b", "q.r": null}, "v": {"type": "bcd", "data": "1"}, "same": [1, 2], "l": [1, {"z": 1}]}`
	list, err := edit.Diff([]byte(a), []byte(b))
	require.NoError(t, err)
	var got []string
	for _, d := range list {
		got = append(got, d.String())
	}
	require.Equal(t, []string{`- x: 1`, `~ v: hex:00 -> bcd:1`, `~ o.p: "a  b" -> "a b"`, `+ o["q.r"]: null`, `+ l[1]: {"z":1}`}, got)
}

// Two specs that Diff can tell apart, Change makes equal again, along the
// paths that it names.
func TestDiffIsAPatch(t *testing.T) {
	for path, f := range images(t) {
		image := read(t, path)
		fixed, _, err := f.Fix(image)
		require.NoError(t, err)
		a, _, err := f.Parse(fixed)
		require.NoError(t, err)
		b, _, err := f.Parse(image)
		require.NoError(t, err)
		list, err := edit.Diff(a, b)
		require.NoError(t, err)
		var changes []edit.Change
		for _, d := range list {
			changes = append(changes, edit.Change{Path: d.Path, Value: d.New})
		}
		out, _, err := edit.Apply(f, fixed, changes)
		require.NoError(t, err, "%s %v", path, list)
		require.Equal(t, image, out, "%s %v", path, list)
	}
}

// No path or value makes Apply panic, and what comes out of it is an image.
func FuzzApply(fz *testing.F) {
	for _, path := range []string{"board.serial_number", "board.custom[+]", "/board/custom/0", `board["x"]`, "multirecord[1].data", "size", "header.pad"} {
		fz.Add(path, `"text"`, false)
		fz.Add(path, `{"type": "hex", "data": "00ff"}`, true)
	}
	f := formats.ByName("fru")
	image, _, err := f.Pack(read(fz, "../../fixtures/vpd/fru/server.fru.jsonc"))
	require.NoError(fz, err)
	fz.Fuzz(func(t *testing.T, path, value string, remove bool) {
		c := edit.Change{Path: path, Value: json.RawMessage(value)}
		if remove {
			c.Value = nil
		}
		out, _, err := edit.Apply(f, image, []edit.Change{c})
		if err != nil {
			require.True(t, errors.Is(err, vpd.ErrSpec) || errors.Is(err, edit.ErrNotFound), "%v", err)
			require.Nil(t, out)
			return
		}
		spec, _, err := f.Parse(out)
		require.NoError(t, err)
		again, _, err := f.Pack(spec)
		require.NoError(t, err)
		require.Equal(t, out, again)
	})
}
