// Package formtest holds what is true of every format of package vpd, for the
// formats' tests.
package formtest

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd"
)

// Read returns a file of fixtures/vpd, from a package two folders below the
// module's root.
func Read(t testing.TB, name string) []byte {
	b, err := os.ReadFile("../../fixtures/vpd/" + name)
	require.NoError(t, err)
	return b
}

// Partition requires that fields cover the image without gap or overlap, and
// that what covers a field is one of them.
func Partition(t require.TestingT, image []byte, fields []vpd.Field) {
	off := int64(0)
	names := map[string]bool{"": true}
	for _, f := range fields {
		require.Equal(t, off, f.Off, "%s", f.Name)
		require.Positive(t, f.Len, "%s", f.Name)
		require.NotEmpty(t, f.Name)
		off += f.Len
		names[f.Name] = true
	}
	require.Equal(t, int64(len(image)), off)
	for _, f := range fields {
		require.True(t, names[f.CoveredBy], "%s is covered by %s", f.Name, f.CoveredBy)
	}
}

// RoundTrip requires that packing what was parsed is the identical image.
func RoundTrip(t require.TestingT, f vpd.Format, image []byte) {
	spec, _, err := f.Parse(image)
	require.NoError(t, err)
	require.True(t, json.Valid(spec))
	again, _, err := f.Pack(spec)
	require.NoError(t, err, "image %x\n%s", image, spec)
	require.True(t, bytes.Equal(image, again), "image %x\nagain %x\n%s", image, again, spec)
	spec2, _, err := f.Parse(again)
	require.NoError(t, err)
	require.Equal(t, string(spec), string(spec2))
}

// CheckAny requires what holds for every image, good, bad or hostile.
func CheckAny(t require.TestingT, f vpd.Format, image []byte) {
	before := bytes.Clone(image)
	spec, warnings, err := f.Parse(image)
	fields, ferr := f.Fields(image)
	fixed, changes, xerr := f.Fix(image)
	problems := f.Verify(image)
	detected := f.Detect(image)
	require.True(t, bytes.Equal(before, image), "the argument was changed")
	if err != nil {
		require.ErrorIs(t, err, vpd.ErrImage)
		require.ErrorIs(t, ferr, vpd.ErrImage)
		require.ErrorIs(t, xerr, vpd.ErrImage)
		require.Nil(t, spec)
		require.Nil(t, warnings)
		require.Nil(t, fields)
		require.Nil(t, fixed)
		require.Nil(t, changes)
		require.NotEmpty(t, problems)
		require.False(t, detected)
		return
	}
	require.NoError(t, ferr)
	require.NoError(t, xerr)
	require.NoError(t, Validate(f, spec), "%s", spec)
	require.Len(t, warnings, len(problems))
	Partition(t, image, fields)
	RoundTrip(t, f, image)
	require.Len(t, fixed, len(image))
	differ := 0
	for i := range fixed {
		if fixed[i] != image[i] {
			differ++
		}
	}
	require.Equal(t, len(changes) > 0, differ > 0)
	fixable := false
	for _, p := range problems {
		fixable = fixable || p.Fixable
	}
	require.Equal(t, fixable, len(changes) > 0, "%v %v", problems, changes)
	for _, p := range f.Verify(fixed) {
		require.False(t, p.Fixable, "%s", p)
	}
}

// Damage checks an image with each byte changed in several ways, and cut at
// every length. At most 1024 offsets are tried, the first and spread ones; in
// short tests, in fewer ways.
func Damage(t require.TestingT, f vpd.Format, good []byte) {
	image := bytes.Clone(good)
	step := 1
	if len(image) > 1024 {
		step = len(image) / 512
	}
	for off := 0; off < len(image); off++ {
		if off > 512 && off%step != 0 {
			continue
		}
		ways := []byte{image[off] ^ 1, 0xff, 0x00, 0x01, 0x80, 0xc1}
		if testing.Short() {
			ways = ways[:2]
		}
		for _, b := range ways {
			image[off] = b
			CheckAny(t, f, image)
		}
		image[off] = good[off]
		CheckAny(t, f, image[:off])
	}
}

// A Case is a name, a spec or members of one, and part of what is said about
// it.
type Case [3]string

// Refused requires that no spec packs, and the reason. A spec without
// "format" is put between head and "}".
func Refused(t *testing.T, f vpd.Format, head string, cases []Case) {
	for _, c := range cases {
		t.Run(c[0], func(t *testing.T) {
			image, warnings, err := f.Pack([]byte(whole(head, c[1])))
			require.ErrorIs(t, err, vpd.ErrSpec)
			require.Contains(t, err.Error(), c[2])
			require.Nil(t, image)
			require.Nil(t, warnings)
		})
	}
}

// Irregular requires that each spec packs with one problem, which Verify
// names, and which the spec that Parse makes keeps.
func Irregular(t *testing.T, f vpd.Format, head string, cases []Case) {
	for _, c := range cases {
		t.Run(c[0], func(t *testing.T) {
			image, warnings, err := f.Pack([]byte(whole(head, c[1])))
			require.NoError(t, err)
			problems := f.Verify(image)
			require.Len(t, problems, 1, "%v", problems)
			require.Len(t, warnings, 1)
			require.Contains(t, problems[0].String(), c[2])
			CheckAny(t, f, image)
		})
	}
}

func whole(head, spec string) string {
	if strings.Contains(spec, `"format"`) {
		return spec
	}
	return head + spec + "}"
}

// FuzzPack requires that a spec is refused, or gives an image that survives
// the round trip.
func FuzzPack(t require.TestingT, f vpd.Format, spec []byte) {
	image, _, err := f.Pack(spec)
	if err != nil {
		require.ErrorIs(t, err, vpd.ErrSpec)
		require.Nil(t, image)
		return
	}
	CheckAny(t, f, image)
}

// Pack packs a spec that gives a good image, without a warning.
func Pack(t require.TestingT, f vpd.Format, spec []byte) []byte {
	image, warnings, err := f.Pack(spec)
	require.NoError(t, err)
	require.Empty(t, warnings)
	require.Empty(t, f.Verify(image))
	CheckAny(t, f, image)
	return image
}

// Fields returns an image's fields by their names.
func Fields(t require.TestingT, f vpd.Format, image []byte) map[string]vpd.Field {
	list, err := f.Fields(image)
	require.NoError(t, err)
	byName := map[string]vpd.Field{}
	for _, fd := range list {
		byName[fd.Name] = fd
	}
	return byName
}

// Images checks each image under a folder of fixtures/vpd, and returns their
// names.
func Images(t *testing.T, f vpd.Format, dir string) []string {
	list, err := os.ReadDir("../../fixtures/vpd/" + dir)
	require.NoError(t, err)
	var names []string
	for _, e := range list {
		if strings.HasSuffix(e.Name(), ".md") || strings.HasSuffix(e.Name(), ".jsonc") {
			continue
		}
		CheckAny(t, f, Read(t, dir+"/"+e.Name()))
		names = append(names, e.Name())
	}
	require.NotEmpty(t, names)
	return names
}
