package fru

import (
	"slices"

	"nvstore.dev/vpd/internal/spec"
)

// Adjust drops the "area_size" of an area that has outgrown it; the areas
// behind it move.
func (format) Adjust(before, after []byte) ([]byte, error) {
	o, err := spec.ParseObject("", after)
	if err != nil {
		return nil, err
	}
	for i, m := range o {
		k := slices.IndexFunc(kinds[:], func(k kind) bool { return k.header > 0 && k.name == m.Name })
		if k < 0 {
			continue
		}
		area, err := spec.ParseObject(m.Name, m.Value)
		if err != nil {
			continue // Pack says so
		}
		if _, ok := area.Get("area_size"); !ok {
			continue
		}
		if _, err := buildInfo(m.Name, k, area); err == nil {
			continue
		}
		area = slices.DeleteFunc(area, func(m spec.Member) bool { return m.Name == "area_size" })
		if _, err := buildInfo(m.Name, k, area); err == nil {
			if o[i].Value, err = area.MarshalJSON(); err != nil {
				return nil, err
			}
		}
	}
	return o.Text()
}
