package pci

import (
	"encoding/json"

	"nvstore.dev/vpd/internal/spec"
)

// Adjust keeps RV, RW and tail behind fields that were added, and takes the
// room for a longer field from the free space RW, so that what lies behind
// the area stays where it is.
func (format) Adjust(before, after []byte) ([]byte, error) {
	old, err := spec.ParseObject("", before)
	if err != nil {
		return nil, err
	}
	o, err := spec.ParseObject("", after)
	if err != nil {
		return nil, err
	}
	for i, m := range o {
		var err error
		switch m.Name {
		case "read_only":
			o[i].Value, err = closeLast(m.Value, "RV")
		case "read_write":
			if o[i].Value, err = closeLast(m.Value, "RW"); err == nil {
				was, _ := old.Get(m.Name)
				o[i].Value = keepSize(was, o[i].Value)
			}
		case "resources":
			o[i].Value, err = adjustList(m.Value)
		}
		if err != nil {
			return nil, err
		}
	}
	return o.Text()
}

func adjustList(raw json.RawMessage) (json.RawMessage, error) {
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil {
		return raw, nil // Pack says what is wrong with it
	}
	for i, r := range list {
		o, err := spec.ParseObject("", r)
		if err != nil || len(o) != 1 {
			continue
		}
		if kw := map[string]string{"read_only": "RV", "read_write": "RW"}[o[0].Name]; kw != "" {
			if o[0].Value, err = closeLast(o[0].Value, kw); err != nil {
				return nil, err
			}
			if list[i], err = o.MarshalJSON(); err != nil {
				return nil, err
			}
		}
	}
	return json.Marshal(list)
}

// closeLast moves the closing field and the tail behind the others.
func closeLast(raw json.RawMessage, kw string) (json.RawMessage, error) {
	o, err := spec.ParseObject("", raw)
	if err != nil {
		return raw, nil
	}
	var out, closing, tail spec.Object
	for _, m := range o {
		switch m.Name {
		case kw:
			closing = append(closing, m)
		case "tail":
			tail = append(tail, m)
		default:
			out = append(out, m)
		}
	}
	return append(append(append(spec.Object{}, out...), closing...), tail...).MarshalJSON()
}

// keepSize lets RW give or take what the other fields need or leave, if it is
// free space of a size that wasn't edited, and can.
func keepSize(was, now json.RawMessage) json.RawMessage {
	size := func(raw json.RawMessage) int {
		b := &builder{}
		if b.area("", tagReadWrite, raw) != nil {
			return -1
		}
		return len(b.out) - largeHeader
	}
	old, err := spec.ParseObject("", was)
	if err != nil {
		return now
	}
	o, err := spec.ParseObject("", now)
	if err != nil {
		return now
	}
	rwOld, _ := old.Get("RW")
	for i, m := range o {
		var free sized
		if m.Name != "RW" || string(m.Value) != string(rwOld) || json.Unmarshal(m.Value, &free) != nil || free.Type != "free" || free.Data != "" {
			continue
		}
		var rw spec.Object
		rw.Add("type", "free")
		rw.Add("area_size", size(was))
		if o[i].Value, err = rw.MarshalJSON(); err != nil {
			return now
		}
		if kept, err := o.MarshalJSON(); err == nil && size(kept) >= 0 {
			return kept
		}
	}
	return now
}
