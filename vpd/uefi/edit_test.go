package uefi_test

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/uefi"
)

// Set writes into free space and clears bits, as flash allows, and nothing
// else.
func TestSet(t *testing.T) {
	before := read(t, "small.fd")
	after, changes, err := uefi.Set(before, uefi.Variable{Name: "Timeout", GUID: global, Attr: 7, Data: []byte{9, 0}})
	require.NoError(t, err)
	require.Equal(t, read(t, "small.fd"), before)
	require.Len(t, changes, 2)
	require.Equal(t, "Timeout at byte 0x10a: marked deleted: 0x3f -> 0x3c", changes[0].String())
	require.Equal(t, "written", changes[1].Msg)
	for i := range after {
		require.Equal(t, after[i], after[i]&before[i], "bit set at %#x", i)
	}
	require.Empty(t, f.Verify(after))
	formtest.CheckAny(t, f, after)
	list, err := uefi.Variables(after)
	require.NoError(t, err)
	require.Equal(t, uefi.Variable{Name: "Timeout", GUID: global, Attr: 7, Data: []byte{9, 0}}, list[len(list)-1])

	// The time of an authenticated variable stays.
	after, _, err = uefi.Set(before, uefi.Variable{Name: "Private", GUID: ours, Attr: 0x27, Data: []byte("new")})
	require.NoError(t, err)
	spec, _, err := f.Parse(after)
	require.NoError(t, err)
	require.Equal(t, 3, bytes.Count(spec, []byte("e80703050e1e00000000000000000000")))
}

func TestDelete(t *testing.T) {
	before := read(t, "small.fd")
	after, changes, err := uefi.Delete(before, "Lang", global) // which was being replaced
	require.NoError(t, err)
	require.Len(t, changes, 1)
	require.Equal(t, "marked deleted", changes[0].Msg)
	require.Equal(t, [2]string{"0x3e", "0x3c"}, [2]string{changes[0].Old, changes[0].New})
	formtest.CheckAny(t, f, after)
	_, _, err = uefi.Delete(after, "Lang", global)
	require.ErrorIs(t, err, uefi.ErrNotFound)
	_, _, err = uefi.Delete(before, "Timeout", ours)
	require.ErrorIs(t, err, uefi.ErrNotFound)
}

func TestEditRefused(t *testing.T) {
	small := read(t, "small.fd")
	damaged := bytes.Clone(small)
	damaged[0x7f0] = 0
	v := uefi.Variable{Name: "x", GUID: ours, Attr: 3, Data: []byte{1}}
	for name, c := range map[string]struct {
		image []byte
		v     uefi.Variable
		want  error
	}{
		"no image":        {nil, v, vpd.ErrImage},
		"damaged":         {damaged, v, uefi.ErrInvalid},
		"cut":             {small[:4000], v, uefi.ErrInvalid},
		"no name":         {small, uefi.Variable{GUID: ours, Attr: 3, Data: []byte{1}}, uefi.ErrInvalid},
		"no GUID":         {small, uefi.Variable{Name: "x", Attr: 3, Data: []byte{1}}, uefi.ErrInvalid},
		"no data":         {small, uefi.Variable{Name: "x", GUID: ours, Attr: 3}, uefi.ErrInvalid},
		"volatile":        {small, uefi.Variable{Name: "x", GUID: ours, Attr: 6, Data: []byte{1}}, uefi.ErrInvalid},
		"larger than all": {small, uefi.Variable{Name: "x", GUID: ours, Attr: 3, Data: make([]byte, 2000)}, uefi.ErrNoSpace},
	} {
		image, changes, err := uefi.Set(c.image, c.v)
		require.ErrorIs(t, err, c.want, name)
		require.Nil(t, image)
		require.Nil(t, changes)
	}
}

// What is set and deleted in a random order is what Variables lists, with
// reclaims in between, and the image stays one that Verify calls good.
func TestRandomEdits(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		image, _, err := f.Pack([]byte(`{"format": "uefi", "layout": {"volume_size": 4096, "block_size": 1024, "store_size": 1000,
			"work_offset": 2048, "work_size": 1024, "authenticated": ` + fmt.Sprint(rapid.Bool().Draw(t, "authenticated")) + `}}`))
		require.NoError(t, err)
		model := map[string]string{}
		reclaims := 0
		for range rapid.IntRange(1, 40).Draw(t, "operations") {
			name := rapid.SampledFrom([]string{"a", "b", "c", "d"}).Draw(t, "name")
			if rapid.IntRange(0, 3).Draw(t, "delete") == 0 {
				next, _, err := uefi.Delete(image, name, ours)
				if _, ok := model[name]; !ok {
					require.ErrorIs(t, err, uefi.ErrNotFound)
					continue
				}
				require.NoError(t, err)
				delete(model, name)
				image = next
			} else {
				data := rapid.SliceOfN(rapid.Byte(), 1, 200).Draw(t, "data")
				next, changes, err := uefi.Set(image, uefi.Variable{Name: name, GUID: ours, Attr: 7, Data: data})
				if errors.Is(err, uefi.ErrNoSpace) {
					continue
				}
				require.NoError(t, err)
				if len(changes) == 1 && changes[0].Area == "variables" {
					reclaims++
				}
				model[name] = string(data)
				image = next
			}
			require.Empty(t, f.Verify(image))
			list, err := uefi.Variables(image)
			require.NoError(t, err)
			got := map[string]string{}
			for _, v := range list {
				got[v.Name] = string(v.Data)
			}
			require.Equal(t, model, got)
		}
		formtest.RoundTrip(t, f, image)
	})
}
