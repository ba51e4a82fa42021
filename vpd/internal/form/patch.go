package form

import (
	"encoding/hex"
	"fmt"
	"slices"

	"nvstore.dev/vpd/internal/spec"
)

const (
	maxPatches = 1 << 14
	maxGap     = 16 // bytes of the base that a patch has in it, at most
)

// A Patch is how bytes are written that have no name.
type Patch struct {
	Offset string `json:"offset"`
	Type   string `json:"type"`
	Data   string `json:"data"`
}

// Patches are what image[off:end] has that base has not. They begin and end at
// multiples of align, if that lies in the range.
func Patches(image, base []byte, off, end, align int) []Patch {
	var list []Patch
	for pos := off; pos < end; pos++ {
		if image[pos] == base[pos] {
			continue
		}
		last := pos
		for i := pos + 1; i < end && i <= last+maxGap; i++ {
			if image[i] != base[i] {
				last = i
			}
		}
		pos = max(off, pos-pos%align)
		last = min(end-1, last-last%align+align-1)
		list = append(list, Patch{fmt.Sprintf("%#x", pos), "hex", hex.EncodeToString(image[pos : last+1])})
		pos = last
	}
	return list
}

// ApplyPatches writes a spec's "patches" to the image.
func ApplyPatches(o spec.Object, image []byte) error {
	list, err := List(o, "", "patches", maxPatches)
	if err != nil {
		return err
	}
	size := len(image)
	patched := make([]bool, size)
	for i, raw := range list {
		path := fmt.Sprintf("patches[%d]", i)
		v, err := spec.ParseValue(path, raw, size, "name", "offset")
		if err != nil {
			return err
		}
		rawOff, ok := v.Attrs.Get("offset")
		if !ok {
			return spec.Errorf(path+".offset", "missing")
		}
		n, err := spec.Uint(path+".offset", rawOff, uint64(size))
		if err != nil {
			return err
		}
		off := int(n)
		if len(v.Bytes) > size-off {
			return spec.Errorf(path, "ends behind the image, which has %d bytes", size)
		}
		if slices.Contains(patched[off:off+len(v.Bytes)], true) {
			return spec.Errorf(path, "overlaps an earlier patch")
		}
		copy(image[off:], v.Bytes)
		for i := range v.Bytes {
			patched[off+i] = true
		}
	}
	return nil
}
