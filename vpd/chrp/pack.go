package chrp

import (
	"encoding/binary"
	"encoding/json"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "partitions", "trailing", "size", "fill"); err != nil {
		return nil, nil, err
	}
	list, err := form.List(o, "", "partitions", MaxSize/unit)
	if err != nil {
		return nil, nil, err
	}
	total, err := form.Uint(o, "", "size", MaxSize, 0)
	if err != nil {
		return nil, nil, err
	}
	_, trailing := o.Get("trailing")
	var out []byte
	for i, raw := range list {
		room := 0 // that the last partition is to take
		if i == len(list)-1 && !trailing {
			room = int(total) - len(out)
		}
		p, err := packPartition(fmt.Sprintf("partitions[%d]", i), raw, room)
		if err != nil {
			return nil, nil, err
		}
		if out = append(out, p...); len(out) > MaxSize {
			return nil, nil, spec.Errorf("partitions", "take more than %d bytes", MaxSize)
		}
	}
	if out, err = form.Pad(o, out, MaxSize); err != nil {
		return nil, nil, err
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("partitions", "the result would not be NVRAM: %v", err)
	}
	if len(l.parts) != len(list) {
		return nil, nil, spec.Errorf("trailing", "begins with a partition")
	}
	return out, form.Warnings(l.problems()), nil
}

func packPartition(path string, raw json.RawMessage, room int) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	if err := o.Only(path, "signature", "name", "size", "checksum", "values", "rest", "data"); err != nil {
		return nil, err
	}
	if _, ok := o.Get("signature"); !ok {
		return nil, spec.Errorf(path+".signature", "missing")
	}
	signature, err := form.Uint(o, path, "signature", 0xff, 0)
	if err != nil {
		return nil, err
	}
	out := append(make([]byte, 0, unit), byte(signature), 0, 0, 0)
	name, err := readName(o, path)
	if err != nil {
		return nil, err
	}
	out = append(append(out, name...), make([]byte, nameSize-len(name))...)
	data, err := readData(o, path, byte(signature))
	if err != nil {
		return nil, err
	}
	out = append(out, data...)
	size, err := partitionSize(o, path, len(out), room)
	if err != nil {
		return nil, err
	}
	out = append(out, make([]byte, size-len(out))...)
	binary.BigEndian.PutUint16(out[2:], uint16(size/unit))
	sum, err := form.Uint(o, path, "checksum", 0xff, uint64(checksum(out)))
	out[1] = byte(sum)
	return out, err
}

func readName(o spec.Object, path string) ([]byte, error) {
	raw, ok := o.Get("name")
	path += ".name"
	if !ok {
		return nil, spec.Errorf(path, "missing")
	}
	return form.Text(path, raw, nameSize)
}

func readData(o spec.Object, path string, signature byte) ([]byte, error) {
	raw, ok := o.Get("values")
	if !ok {
		if _, ok := o.Get("rest"); ok {
			return nil, spec.Errorf(path+".rest", "needs values")
		}
		return form.Bytes(o, path, "data", unit*maxUnits-headerSize)
	}
	if signature != sigSystem {
		return nil, spec.Errorf(path+".values", "belong to partitions of signature %#x", sigSystem)
	}
	if _, ok := o.Get("data"); ok {
		return nil, spec.Errorf(path+".data", "can't stand beside values")
	}
	values, err := encodeVariables(path+".values", raw, unit*maxUnits-headerSize)
	if err != nil {
		return nil, err
	}
	rest, err := form.Bytes(o, path, "rest", unit*maxUnits-headerSize)
	return append(values, rest...), err
}

// partitionSize is what a partition takes: what it says, what is left of the
// image, or what it needs.
func partitionSize(o spec.Object, path string, used, room int) (int, error) {
	size := (used + unit - 1) / unit * unit
	if raw, ok := o.Get("size"); ok {
		n, err := spec.Uint(path+".size", raw, unit*maxUnits)
		switch {
		case err != nil:
			return 0, err
		case n%unit != 0:
			return 0, spec.Errorf(path+".size", "%d, want a multiple of %d", n, unit)
		case int(n) < used:
			return 0, spec.Errorf(path+".size", "%d, and header and data take %d bytes", n, used)
		}
		return int(n), nil
	}
	if room > size && room%unit == 0 {
		size = room
	}
	if size > unit*maxUnits {
		return 0, spec.Errorf(path, "would have %d bytes, want at most %d", size, unit*maxUnits)
	}
	return size, nil
}

// Parse makes a spec of an image.
func (format) Parse(image []byte) ([]byte, []vpd.Warning, error) {
	l, err := scan(image)
	if err != nil {
		return nil, nil, err
	}
	var o spec.Object
	o.Add("format", Name)
	var list []spec.Object
	for i := range l.parts {
		list = append(list, l.parts[i].form())
	}
	o.Add("partitions", list)
	form.AddRest(&o, l.rest, len(image))
	text, err := o.Text()
	if err != nil {
		return nil, nil, err
	}
	return text, form.Warnings(l.problems()), nil
}

func (p *partition) form() spec.Object {
	var o spec.Object
	o.Add("signature", spec.Byte(p.signature()))
	if name, ok := p.text(); ok {
		o.Add("name", name)
	} else {
		o.Add("name", form.Hex(p.name()))
	}
	o.Add("size", len(p.raw))
	if p.checksum() != p.sum() {
		o.Add("checksum", spec.Byte(p.checksum()))
	}
	if v := readVariables(p.data()); p.signature() == sigSystem && v.fault == "" {
		values := spec.Object{}
		for _, e := range v.list {
			values.Add(e.name, show(e.value))
		}
		o.Add("values", values)
		if rest := trimZeros(p.data()[v.end:]); len(rest) > 0 {
			o.Add("rest", form.Hex(rest))
		}
	} else if data := trimZeros(p.data()); len(data) > 0 {
		o.Add("data", form.Hex(data))
	}
	return o
}
