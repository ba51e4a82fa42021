package luks

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"

	"nvstore.dev/image"
)

const v2Slots = 32

func (v *v2) add(key []byte, o *KeyOptions) (int, error) {
	n := 0
	for slices.ContainsFunc(v.meta.slots, func(s v2Slot) bool { return s.n == n }) {
		n++
	}
	if n == v2Slots {
		return 0, fmt.Errorf("all %d key slots are in use: %w", v2Slots, image.ErrNoSpace)
	}
	off, err := v.freeArea(v2AreaSize(len(key)))
	if err != nil {
		return 0, err
	}
	hash := v.meta.digest.hash
	k, err := fillV2(v.d, off, v.meta.spec, v.meta.encryption, hash, key, o)
	if err != nil {
		return 0, err
	}
	name := strconv.Itoa(n)
	v.root.m["keyslots"].(map[string]any)[name] = k
	digest := v.root.m["digests"].(map[string]any)[v.meta.digest.name].(map[string]any)
	digest["keyslots"] = append(digest["keyslots"].([]any), name)
	return n, v.store()
}

// freeArea returns where n bytes lie between, before or behind the key areas
// in use.
func (v *v2) freeArea(n int64) (int64, error) {
	from := 2 * v.bin.size
	end := min(from+v.meta.areas, v.d.Size())
	list := slices.Clone(v.meta.slots)
	slices.SortFunc(list, func(a, b v2Slot) int { return int(min(max(a.offset-b.offset, -1), 1)) })
	at := from
	for _, s := range list {
		if s.offset-at >= n {
			break
		}
		at = max(at, s.offset+s.size)
	}
	if end-at < n || slices.ContainsFunc(list, func(s v2Slot) bool { return overlap(at, n, s.offset, s.size) }) {
		return 0, fmt.Errorf("no room for a key area of %d bytes: %w", n, image.ErrNoSpace)
	}
	return at, nil
}

func (v *v2) remove(n int) error {
	i := slices.IndexFunc(v.meta.slots, func(s v2Slot) bool { return s.n == n })
	if i < 0 {
		return fmt.Errorf("key slot %d: %w", n, image.ErrNotFound)
	}
	s := v.meta.slots[i]
	usable := 0
	for i := range v.meta.slots {
		if v.meta.slots[i].usable {
			usable++
		}
	}
	if s.usable && usable == 1 {
		return fmt.Errorf("key slot %d: %w", n, ErrLastSlot)
	}
	name := strconv.Itoa(n)
	delete(v.root.m["keyslots"].(map[string]any), name)
	// Digests and tokens refer to it.
	for _, of := range []string{"digests", "tokens"} {
		for _, o := range v.root.m[of].(map[string]any) {
			o, _ := o.(map[string]any)
			if list, ok := o["keyslots"].([]any); ok {
				o["keyslots"] = slices.DeleteFunc(list, func(v any) bool { return v == name })
			}
		}
	}
	if err := v.store(); err != nil {
		return err
	}
	return scrub(v.d, s.offset, s.size)
}

// store writes both headers, after a last check.
func (v *v2) store() error {
	text, err := json.Marshal(v.root.m)
	if err != nil {
		return err
	}
	o, err := parseJSON(text)
	if err != nil {
		return err
	}
	if _, err := readMetadata(o, v.bin.size); err != nil {
		return err
	}
	return writeCopies(v.d, *v.bin, text)
}
