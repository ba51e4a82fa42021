package pci_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/pci"
)

var f = pci.Format()

const fixtures = "../../fixtures/vpd/"

func read(t testing.TB, name string) []byte {
	b, err := os.ReadFile(fixtures + name)
	require.NoError(t, err)
	return b
}

// lspci shows an image the way a host would, from a made-up sysfs.
func lspci(t testing.TB, image []byte) string {
	root := t.TempDir()
	dev := filepath.Join(root, "devices", "0000:00:01.0")
	require.NoError(t, os.MkdirAll(dev, 0o755))
	config := make([]byte, 256)
	copy(config, []byte{0x86, 0x80, 0x0e, 0x10})
	config[0x06] = 0x10 // status: has a list of capabilities
	config[0x0b] = 0x02 // network controller
	config[0x34] = 0xe0
	config[0xe0] = 0x03 // VPD
	for name, b := range map[string][]byte{
		"config": config, "vpd": image, "vendor": []byte("0x8086\n"), "device": []byte("0x100e\n"),
		"class": []byte("0x020000\n"), "irq": []byte("0\n"),
		"resource": []byte(strings.Repeat("0x0000000000000000 0x0000000000000000 0x0000000000000000\n", 13)),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dev, name), b, 0o644))
	}
	out, err := exec.Command("lspci", "-A", "linux-sysfs", "-O", "sysfs.path="+root, "-vv").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return string(out)
}

func TestLspciReadsOurFields(t *testing.T) {
	image, warnings, err := f.Pack(read(t, "nic.pci.jsonc"))
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Len(t, image, 256)
	require.Empty(t, f.Verify(image))
	out := lspci(t, image)
	for _, line := range []string{
		"Product Name: nvstore Demo 10G Ethernet Adapter",
		"[PN] Part number: NVS-10G-2P",
		"[EC] Engineering changes: A-03",
		"[SN] Serial number: NVS0123456789",
		"[MN] Manufacture ID: 1028",
		"[V0] Vendor specific: FFV1.2.3",
		"[RV] Reserved: checksum good, 0 byte(s) reserved",
		"[YA] Asset tag: ASSET-0042",
		"[V0] Vendor specific: rack 12, slot 3",
		"[RW] Read-write area: 72 byte(s) free",
	} {
		require.Contains(t, out, line)
	}
	require.NotContains(t, out, "No end tag")
}

// lspci and Verify agree on the checksum, whichever bit is wrong.
func TestLspciAgreesOnTheChecksum(t *testing.T) {
	image := bytes.Clone(read(t, "pci/good.vpd"))
	require.Contains(t, lspci(t, image), "checksum good")
	for _, off := range []int{3, 0x20, 0x30, 0x4e} {
		image[off] ^= 0x10
		require.Contains(t, lspci(t, image), "checksum bad", "byte %#x", off)
		problems := f.Verify(image)
		require.Len(t, problems, 1)
		require.True(t, problems[0].Fixable)
		require.Equal(t, "read_only.RV", problems[0].Area)

		fixed, changes, err := f.Fix(image)
		require.NoError(t, err)
		require.Len(t, changes, 1)
		require.Contains(t, lspci(t, fixed), "checksum good")
		image[off] ^= 0x10
	}
}

const goodSpec = `{
  "format": "pci",
  "identifier": "ACME Virtual NIC",
  "read_only": {
    "PN": "ACME-100",
    "EC": "A-01",
    "SN": "SN123456",
    "MN": "1028",
    "V0": "vendor0",
    "CP": {
      "type": "hex",
      "data": "03100000"
    },
    "RV": {
      "type": "checksum",
      "size": 1
    }
  },
  "read_write": {
    "YA": "ASSET-7",
    "V1": "rw",
    "RW": {
      "type": "free",
      "size": 46
    }
  },
  "size": 256,
  "fill": "0xff"
}
`

func TestGoodFixture(t *testing.T) {
	image := read(t, "pci/good.vpd")
	require.True(t, f.Detect(image))
	require.Empty(t, f.Verify(image))
	spec, warnings, err := f.Parse(image)
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, goodSpec, string(spec))
	again, warnings, err := f.Pack(spec)
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Equal(t, image, again)
	fixed, changes, err := f.Fix(image)
	require.NoError(t, err)
	require.Empty(t, changes)
	require.Equal(t, image, fixed)
}

// A card as it comes from the field is read, and every fault named.
func TestFieldFixture(t *testing.T) {
	image := read(t, "pci/field.vpd")
	spec, warnings, err := f.Parse(image)
	require.NoError(t, err)
	var got []string
	for _, w := range warnings {
		got = append(got, w.String())
	}
	require.Equal(t, []string{
		"read_only.RV at byte 0x63: wrong checksum: got 0x20, want 0xff",
		"read_write.YA at byte 0x75: holds nothing but 0xff: it was never written",
		"end_tag at byte 0x85: no end tag: 0xff stands where a tag should be",
	}, got)
	again, _, err := f.Pack(spec)
	require.NoError(t, err)
	require.Equal(t, image, again)

	// Fix changes the checksum, and says so, and nothing else.
	fixed, changes, err := f.Fix(image)
	require.NoError(t, err)
	require.Len(t, changes, 1)
	require.Equal(t, "read_only.RV at byte 0x63: checksum: 0x20 -> 0xff", changes[0].String())
	require.Equal(t, 1, differences(image, fixed))
	for _, p := range f.Verify(fixed) {
		require.False(t, p.Fixable)
	}
}

func differences(a, b []byte) (n int) {
	for i := range a {
		if a[i] != b[i] {
			n++
		}
	}
	return n
}

func TestFields(t *testing.T) {
	image := read(t, "pci/good.vpd")
	fields, err := f.Fields(image)
	require.NoError(t, err)
	requirePartition(t, image, fields)
	byName := map[string]vpd.Field{}
	for _, fd := range fields {
		byName[fd.Name] = fd
	}
	require.Equal(t, vpd.Field{Off: 0x2c, Len: 11, Name: "read_only.SN", Value: "SN123456", CoveredBy: "read_only.RV"}, withOff(byName["read_only.SN"], 0x2c))
	require.Equal(t, "read_only.RV", byName["identifier"].CoveredBy)
	require.Equal(t, "read_only.RV", byName["read_only.RV"].CoveredBy)
	require.Empty(t, byName["read_write.YA"].CoveredBy)
	require.Equal(t, "0x03100000", byName["read_only.CP"].Value)
	require.Contains(t, byName, "trailing")
}

func withOff(fd vpd.Field, off int64) vpd.Field { fd.Off = off; return fd }

func requirePartition(t require.TestingT, image []byte, fields []vpd.Field) {
	off := int64(0)
	for _, fd := range fields {
		require.Equal(t, off, fd.Off, "%s", fd.Name)
		require.Positive(t, fd.Len, "%s", fd.Name)
		off += fd.Len
	}
	require.Equal(t, int64(len(image)), off)
}

// Every spec has one fault.
func TestSpecsRefused(t *testing.T) {
	long := strings.Repeat("x", 256)
	for _, c := range []struct{ name, spec, want string }{
		{"not JSON", `{"format": "pci"`, "spec: line 1"},
		{"not an object", `["pci"]`, "want an object"},
		{"no format", `{"identifier": "x"}`, "format: missing"},
		{"other format", `{"format": "fru"}`, `format: "fru", want "pci"`},
		{"nothing in it", `{"format": "pci"}`, "would not be VPD"},
		{"misspelt member", `{"format": "pci", "read-only": {}}`, "read-only: unknown"},
		{"member twice", `{"format": "pci", "identifier": "a", "identifier": "b"}`, "identifier: comes twice"},
		{"identifier not ASCII", `{"format": "pci", "identifier": "é"}`, "identifier: holds characters"},
		{"identifier a number", `{"format": "pci", "identifier": 5}`, "identifier: want a string"},
		{"area a list", `{"format": "pci", "read_only": []}`, "read_only: want an object"},
		{"field twice", `{"format": "pci", "read_only": {"PN": "a", "PN": "b"}}`, "read_only.PN: comes twice"},
		{"second field, wrong number", `{"format": "pci", "read_only": {"PN": "a", "PN#3": "b"}}`, "named PN#2"},
		{"first field with a number", `{"format": "pci", "read_only": {"PN#1": "a"}}`, "write PN instead"},
		{"number without a first", `{"format": "pci", "read_only": {"PN#2": "a"}}`, "named PN"},
		{"keyword of one character", `{"format": "pci", "read_only": {"P": "a"}}`, "two characters"},
		{"keyword of three", `{"format": "pci", "read_only": {"PNX": "a"}}`, "two characters"},
		{"keyword of one rune and two bytes", `{"format": "pci", "read_only": {"é": "a"}}`, "write 0xc3a9 instead"},
		{"keyword in hex for nothing", `{"format": "pci", "read_only": {"0x504e": "a"}}`, "write PN instead"},
		{"keyword in bad hex", `{"format": "pci", "read_only": {"0xzzzz": "a"}}`, "0x and four digits"},
		{"field of 256 bytes", `{"format": "pci", "read_only": {"SN": "` + long + `"}}`, "want at most 255"},
		{"field in hex of 256 bytes", `{"format": "pci", "read_only": {"SN": {"type": "hex", "data": "` + strings.Repeat("00", 256) + `"}}}`, "want at most 255"},
		{"newline in a field", `{"format": "pci", "read_only": {"SN": "a\n"}}`, "read_only.SN: holds characters"},
		{"field null", `{"format": "pci", "read_only": {"SN": null}}`, "read_only.SN: want a string"},
		{"bad hex", `{"format": "pci", "read_only": {"V0": {"type": "hex", "data": "0"}}}`, "pairs of hexadecimal digits"},
		{"split hex pair", `{"format": "pci", "read_only": {"V0": {"type": "hex", "data": "0 1"}}}`, "pairs of hexadecimal digits"},
		{"unknown type", `{"format": "pci", "read_only": {"V0": {"type": "bcd", "data": "0"}}}`, "unknown type"},
		{"no type", `{"format": "pci", "read_only": {"V0": {"data": "0"}}}`, "V0.type: missing"},
		{"no data", `{"format": "pci", "read_only": {"V0": {"type": "hex"}}}`, "V0.data: missing"},
		{"text of no room", `{"format": "pci", "read_only": {"V0": {"type": "text", "data": "abc", "size": 2}}}`, "don't fit"},
		{"fill without size", `{"format": "pci", "read_only": {"V0": {"type": "text", "data": "abc", "fill": 0}}}`, "needs a size"},
		{"RV as text", `{"format": "pci", "read_only": {"RV": "x"}}`, "read_only.RV: is computed"},
		{"RV of no size", `{"format": "pci", "read_only": {"RV": {"type": "checksum", "size": 0}}}`, "want 1 or more"},
		{"RV of 256", `{"format": "pci", "read_only": {"RV": {"type": "checksum", "size": 256}}}`, "RV.size: want an integer from 0 to 255"},
		{"RV of wrong type", `{"format": "pci", "read_only": {"RV": {"type": "free"}}}`, `want "checksum"`},
		{"RV with data of wrong length", `{"format": "pci", "read_only": {"RV": {"type": "checksum", "size": 3, "data": "00"}}}`, "want 2 bytes in hex"},
		{"RV in the writable area", `{"format": "pci", "read_write": {"RV": {"type": "checksum"}}}`, "does not belong"},
		{"RW in the read-only area", `{"format": "pci", "read_only": {"RW": {"type": "free"}}}`, "does not belong"},
		{"RW null in the read-only area", `{"format": "pci", "read_only": {"RW": null}}`, "RW: is computed"},
		{"RW by size and area", `{"format": "pci", "read_write": {"RW": {"type": "free", "size": 1, "area_size": 9}}}`, "both size and area_size"},
		{"RW area too small", `{"format": "pci", "read_write": {"YA": "x", "RW": {"type": "free", "area_size": 6}}}`, "want 7 to 262"},
		{"RW area too large", `{"format": "pci", "read_write": {"YA": "x", "RW": {"type": "free", "area_size": 263}}}`, "want 7 to 262"},
		{"RW misspelt", `{"format": "pci", "read_write": {"RW": {"type": "free", "length": 1}}}`, "RW.length: unknown"},
		{"tail in the middle", `{"format": "pci", "read_only": {"tail": {"type": "hex", "data": "00"}, "PN": "x"}}`, "must be the last"},
		{"size too small", `{"format": "pci", "identifier": "x", "size": 4}`, "size: 4, and the data takes 5"},
		{"size of more than 32 KiB", `{"format": "pci", "identifier": "x", "size": 32769}`, "from 0 to 32768"},
		{"fill of nothing", `{"format": "pci", "identifier": "x", "fill": 0}`, "fill: needs a size"},
		{"fill of 256", `{"format": "pci", "identifier": "x", "size": 9, "fill": 256}`, "from 0 to 255"},
		{"size negative", `{"format": "pci", "identifier": "x", "size": -1}`, "size: want an integer"},
		{"size a fraction", `{"format": "pci", "identifier": "x", "size": 64.5}`, "size: want an integer"},
		{"resources and identifier", `{"format": "pci", "identifier": "x", "resources": []}`, "can't stand beside"},
		{"resources null", `{"format": "pci", "resources": null}`, "want a list"},
		{"two members in a resource", `{"format": "pci", "resources": [{"identifier": "x", "read_only": {}}]}`, "want one member"},
		{"known tag as unknown", `{"format": "pci", "resources": [{"tag": "0x82", "data": "x"}]}`, "write identifier instead"},
		{"end tag in the list", `{"format": "pci", "resources": [{"tag": "0x78", "data": ""}]}`, "can't stand here"},
		{"erased tag in the list", `{"format": "pci", "resources": [{"tag": "0xff", "data": ""}]}`, "can't stand here"},
		{"small tag of another length", `{"format": "pci", "resources": [{"identifier": "x"}, {"tag": "0x09", "data": ""}]}`, "the tag says 1"},
		{"end tag of 8 bytes", `{"format": "pci", "identifier": "x", "end_tag": {"type": "hex", "data": "0000000000000000"}}`, "want at most 7"},
		{"nested too deep", `{"format": "pci", "identifier": ` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + `}`, "nested more than 32"},
		{"32 KiB exceeded", `{"format": "pci", "identifier": {"type": "hex", "data": "00", "count": 32768}}`, "would exceed 32768 bytes"},
		{"does not begin as VPD", `{"format": "pci", "resources": [{"tag": "0x84", "data": "x"}]}`, "would not be VPD"},
	} {
		t.Run(c.name, func(t *testing.T) {
			image, warnings, err := f.Pack([]byte(c.spec))
			require.ErrorIs(t, err, vpd.ErrSpec)
			require.Contains(t, err.Error(), c.want)
			require.Nil(t, image)
			require.Nil(t, warnings)
		})
	}
}

func TestImagesRefused(t *testing.T) {
	for name, image := range map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 256), "erased": bytes.Repeat([]byte{0xff}, 256),
		"text": []byte("#!/bin/sh"), "only an end tag": {0x78}, "header cut off": {0x82, 1},
		"length beyond the end": {0x82, 2, 0, 'x'}, "FRU": {1, 0, 0, 1, 0, 0, 0, 0xfe},
		"more than 32 KiB": append(bytes.Clone(read(t, "pci/good.vpd")), make([]byte, 1<<15)...),
	} {
		spec, warnings, err := f.Parse(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		require.Nil(t, spec, name)
		require.Nil(t, warnings, name)
		require.Len(t, f.Verify(image), 1, name)
		require.False(t, f.Detect(image), name)
		_, _, err = f.Fix(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
		_, err = f.Fields(image)
		require.ErrorIs(t, err, vpd.ErrImage, name)
	}
}

// Each image has one irregularity, which Verify names and the spec preserves.
func TestIrregularImages(t *testing.T) {
	for _, c := range []struct{ name, spec, problem string }{
		{"no RV", `"read_only": {"PN": "x", "RV": null}`, "read_only.RV: is missing"},
		{"RV without a byte", `"read_only": {"RV": {"type": "hex", "data": ""}}`, "has no checksum byte"},
		{"RV wrong", `"read_only": {"RV": {"type": "hex", "data": "99"}}`, "wrong checksum: got 0x99"},
		{"RV not last", `"read_only": {"RV": {"type": "checksum"}, "PN": "x"}`, "is not the area's last field"},
		{"RV twice", `"read_only": {"RV": {"type": "checksum"}, "RV#2": {"type": "checksum"}}`, "more than once"},
		{"RV in W", `"read_only": {}, "read_write": {"RV": {"type": "hex", "data": "00"}}`, "read_write.RV at byte 0xf: does not belong"},
		{"RW in R", `"read_only": {"RW": {"type": "hex", "data": "00"}}`, "read_only.RW at byte 0x8: does not belong"},
		{"no RW", `"read_only": {}, "read_write": {"YA": "x", "RW": null}`, "read_write.RW: is missing"},
		{"lower-case keyword", `"read_only": {"pn": "x"}`, "not two upper-case"},
		{"binary keyword", `"read_only": {"0xff00": "x"}`, "not two upper-case"},
		{"keyword twice", `"read_only": {"V0": "x", "V0#2": "y"}`, "more than once"},
		{"0xff for a serial number", `"read_only": {"SN": {"type": "hex", "data": "ffff"}}`, "never written"},
		{"NUL in a serial number", `"read_only": {"SN": {"type": "hex", "data": "4100"}}`, "not printable"},
		{"tail", `"read_only": {"tail": {"type": "hex", "data": "5344ff"}}`, "3 bytes at the area's end"},
		{"no end tag", `"read_only": {}, "end_tag": false`, "no end tag: the image ends"},
		{"no end tag, zeros", `"read_only": {}, "end_tag": false, "size": 64, "fill": 0`, "no end tag: 0x00 stands"},
		{"no end tag, erased", `"read_only": {}, "end_tag": false, "size": 64`, "no end tag: 0xff stands"},
		{"end tag with a checksum", `"read_only": {}, "end_tag": {"type": "hex", "data": "12"}`, "has 1 bytes of data"},
		{"two read-only areas", `"resources": [{"identifier": "x"}, {"read_only": {}}, {"read_only": {"PN": "y"}}]`, "not one each"},
		{"writable area first", `"resources": [{"identifier": "x"}, {"read_write": {}}, {"read_only": {}}]`, "not one each"},
		{"unknown large resource", `"resources": [{"identifier": "x"}, {"tag": "0x84", "data": "RT"}, {"read_only": {}}]`, "not one each"},
		{"unknown small resource", `"resources": [{"identifier": "x"}, {"tag": "0x0a", "data": "ab"}, {"read_only": {}}]`, "not one each"},
		{"no identifier", `"read_only": {}`, "identifier at byte 0x0: is missing"},
		{"no read-only area", `"identifier": "x"`, "read_only: is missing"},
		{"binary identifier", `"identifier": {"type": "hex", "data": "00"}, "read_only": {}`, "not printable"},
	} {
		t.Run(c.name, func(t *testing.T) {
			spec := `{"format": "pci", ` + c.spec + `}`
			if !strings.Contains(c.spec, "identifier") && c.name != "no identifier" {
				spec = `{"format": "pci", "identifier": "ab", ` + c.spec + `}`
			}
			image, warnings, err := f.Pack([]byte(spec))
			require.NoError(t, err)
			var all []string
			for _, p := range f.Verify(image) {
				all = append(all, p.String())
			}
			require.Len(t, all, len(warnings))
			require.Contains(t, strings.Join(all, "\n"), c.problem)
			roundTrip(t, image)
		})
	}
}

func roundTrip(t require.TestingT, image []byte) {
	spec, _, err := f.Parse(image)
	require.NoError(t, err)
	require.True(t, json.Valid(spec))
	again, _, err := f.Pack(spec)
	require.NoError(t, err, "%s", spec)
	require.True(t, bytes.Equal(image, again), "image %x\nagain %x\n%s", image, again, spec)
	spec2, _, err := f.Parse(again)
	require.NoError(t, err)
	require.Equal(t, string(spec), string(spec2))
}

// Packing random specs: the checksum is right, lspci's rules hold, and parsing
// gives the same image again.
func TestRandomSpecs(t *testing.T) {
	text := rapid.StringMatching(`[ -~]{0,40}`)
	value := rapid.OneOf(
		rapid.Map(text, func(s string) any { return s }),
		rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 60), func(b []byte) any {
			return map[string]string{"type": "hex", "data": fmt.Sprintf("%x", b)}
		}))
	area := func(t *rapid.T, label, closing string, closed any) json.RawMessage {
		kws := rapid.SliceOfNDistinct(rapid.StringMatching(`[A-QS-Z][A-Z0-9]`), 0, 12, rapid.ID[string]).Draw(t, label)
		var b strings.Builder
		b.WriteByte('{')
		for _, kw := range kws {
			v, err := json.Marshal(value.Draw(t, kw))
			require.NoError(t, err)
			fmt.Fprintf(&b, "%q: %s, // %s\n", kw, v, kw)
		}
		if closed != nil {
			v, err := json.Marshal(closed)
			require.NoError(t, err)
			fmt.Fprintf(&b, "%q: %s,", closing, v)
		}
		b.WriteByte('}')
		return json.RawMessage(b.String())
	}
	rapid.Check(t, func(t *rapid.T) {
		ident, err := json.Marshal(text.Draw(t, "identifier"))
		require.NoError(t, err)
		var rv, rw any
		if n := rapid.IntRange(0, 20).Draw(t, "RV"); n > 0 {
			rv = map[string]any{"type": "checksum", "size": n}
		}
		if n := rapid.IntRange(0, 255).Draw(t, "RW"); n > 0 {
			rw = map[string]any{"type": "free", "size": n}
		}
		spec := fmt.Sprintf(`{"format": "pci", "identifier": %s, "read_only": %s, "read_write": %s, "size": %d, "fill": "%#02x"}`,
			ident, area(t, "read_only", "RV", rv), area(t, "read_write", "RW", rw),
			rapid.IntRange(4096, 32768).Draw(t, "size"), rapid.Byte().Draw(t, "fill"))
		image, _, err := f.Pack([]byte(spec))
		require.NoError(t, err, "%s", spec)
		for _, p := range f.Verify(image) {
			require.False(t, p.Fixable, "%s", p)
			require.NotContains(t, p.Msg, "end tag")
		}
		fixed, changes, err := f.Fix(image)
		require.NoError(t, err)
		require.Empty(t, changes)
		require.Equal(t, image, fixed)
		fields, err := f.Fields(image)
		require.NoError(t, err)
		requirePartition(t, image, fields)
		roundTrip(t, image)
	})
}

// Damaging a good image anywhere never breaks the rules for any image.
func TestDamagedImages(t *testing.T) {
	good := read(t, "pci/good.vpd")
	image := bytes.Clone(good)
	for off := range image {
		for _, b := range []byte{0x00, 0x78, 0x82, 0x84, 0x90, 0xff, image[off] ^ 1} {
			image[off] = b
			checkAny(t, image)
		}
		image[off] = good[off]
	}
	for n := range image {
		checkAny(t, image[:n])
	}
}

// checkAny is what holds for every image.
func checkAny(t require.TestingT, image []byte) {
	before := bytes.Clone(image)
	spec, _, err := f.Parse(image)
	fields, ferr := f.Fields(image)
	fixed, _, xerr := f.Fix(image)
	problems := f.Verify(image)
	require.Equal(t, before, bytes.Clone(image), "the argument was changed")
	if err != nil {
		require.True(t, errors.Is(err, vpd.ErrImage) && spec == nil)
		require.ErrorIs(t, ferr, vpd.ErrImage)
		require.ErrorIs(t, xerr, vpd.ErrImage)
		require.NotEmpty(t, problems)
		return
	}
	require.NoError(t, ferr)
	require.NoError(t, xerr)
	requirePartition(t, image, fields)
	roundTrip(t, image)
	require.Len(t, fixed, len(image))
	for _, p := range f.Verify(fixed) {
		require.False(t, p.Fixable, "%s", p)
	}
}

func FuzzPCI(f *testing.F) {
	for _, name := range []string{"pci/good.vpd", "pci/field.vpd"} {
		f.Add(read(f, name))
	}
	f.Add([]byte("\x82\x02\x00ab\x84\x01\x00x\x90\x04\x00RV\x01\x00\x79\x01\xff\xff\x00"))
	f.Add([]byte("\x91\x05\x00RW\x01\x00\x01\x90\x08\x00RV\x01\x00RV\x01\x00\x0a12"))
	f.Fuzz(func(t *testing.T, image []byte) { checkAny(t, image) })
}

func FuzzPack(fz *testing.F) {
	fz.Add(read(fz, "nic.pci.jsonc"))
	fz.Add([]byte(goodSpec))
	fz.Add([]byte(`{"format": "pci", "resources": [{"identifier": "x"}, {"tag": "0x84", "data": {"type": "u16be", "data": [1, "0x2"], "count": 3}}], "trailing": "abc", "end_tag": false, "size": 100}`))
	fz.Fuzz(func(t *testing.T, spec []byte) {
		image, _, err := f.Pack(spec)
		if err != nil {
			require.ErrorIs(t, err, vpd.ErrSpec)
			require.Nil(t, image)
			return
		}
		checkAny(t, image)
	})
}
