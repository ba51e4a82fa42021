package hat

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"slices"

	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

const (
	vendorHeader = 22
	maxString    = 0xff
)

// vendor is the text form of the first atom.
type vendor struct {
	UUID    string `json:"uuid"`
	ID      string `json:"product_id"`
	Version string `json:"product_version"`
	Vendor  string `json:"vendor"`
	Product string `json:"product"`
}

// vendor reads a vendor atom, if it is one, and its strings are text that fills
// it.
func (a *atom) vendor() (v vendor, ok bool) {
	d := a.data
	if a.typ != typeVendor || len(d) < vendorHeader {
		return v, false
	}
	n, m := int(d[20]), int(d[21])
	if len(d) != vendorHeader+n+m || !spec.IsText(d[vendorHeader:]) {
		return v, false
	}
	return vendor{uuid(d), hex16(binary.LittleEndian.Uint16(d[16:])), hex16(binary.LittleEndian.Uint16(d[18:])),
		string(d[vendorHeader : vendorHeader+n]), string(d[vendorHeader+n:])}, true
}

// uuid: its last byte comes first.
func uuid(d []byte) string {
	b := bytes.Clone(d[:16])
	slices.Reverse(b)
	s := hex.EncodeToString(b)
	return s[:8] + "-" + s[8:12] + "-" + s[12:16] + "-" + s[16:20] + "-" + s[20:]
}

func buildVendor(path string, raw json.RawMessage) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	if err := o.Only(path, "uuid", "product_id", "product_version", "vendor", "product"); err != nil {
		return nil, err
	}
	rawID, ok := o.Get("uuid")
	if !ok {
		return nil, spec.Errorf(path+".uuid", "missing: each board has one of its own")
	}
	s, err := spec.String(path+".uuid", rawID)
	if err != nil {
		return nil, err
	}
	id, err := spec.Hex(s)
	if err != nil || len(id) != 16 {
		return nil, spec.Errorf(path+".uuid", "want a UUID such as 01234567-89ab-4def-8123-456789abcdef")
	}
	slices.Reverse(id)
	for _, name := range []string{"product_id", "product_version"} {
		n, err := form.Uint(o, path, name, 0xffff, 0)
		if err != nil {
			return nil, err
		}
		id = binary.LittleEndian.AppendUint16(id, uint16(n))
	}
	var text [2][]byte
	for i, name := range []string{"vendor", "product"} {
		raw, ok := o.Get(name)
		if !ok {
			return nil, spec.Errorf(spec.Join(path, name), "missing")
		}
		if text[i], err = form.Text(spec.Join(path, name), raw, maxString); err != nil {
			return nil, err
		}
		id = append(id, byte(len(text[i])))
	}
	return append(append(id, text[0]...), text[1]...), nil
}

// spec is an atom's text form, and the same bytes come of it.
func (a *atom) spec(i int) spec.Object {
	var o spec.Object
	v, isVendor := a.vendor()
	_, fixed := dataSizes[a.typ]
	switch {
	case isVendor:
		o.Add("vendor", v)
	case a.typ == typePower && len(a.data) == 4:
		o.Add("power_supply_ma", binary.LittleEndian.Uint32(a.data))
	case a.typ != typeVendor && int(a.typ) < len(typeNames) && a.typ > 0 && (!fixed || len(a.data) == dataSizes[a.typ]):
		o.Add(typeNames[a.typ], spec.Show(a.data))
	default:
		o.Add("type", hex16(a.typ))
		o.Add("data", spec.Show(a.data))
	}
	if a.count != uint16(i) {
		o.Add("count", a.count)
	}
	if a.crc != a.want {
		o.Add("crc", hex16(a.crc))
	}
	return o
}

// buildAtom makes atom number i.
func buildAtom(path string, raw json.RawMessage, i int) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	typ, data, err := buildData(path, o)
	if err != nil {
		return nil, err
	}
	count, err := form.Uint(o, path, "count", 0xffff, uint64(i))
	if err != nil {
		return nil, err
	}
	out := binary.LittleEndian.AppendUint16(nil, typ)
	out = binary.LittleEndian.AppendUint16(out, uint16(count))
	out = binary.LittleEndian.AppendUint32(out, uint32(len(data)+crcSize))
	out = append(out, data...)
	crc, err := form.Uint(o, path, "crc", 0xffff, uint64(crc16(out)))
	return binary.LittleEndian.AppendUint16(out, uint16(crc)), err
}

func buildData(path string, o spec.Object) (uint16, []byte, error) {
	var own spec.Object
	for _, m := range o {
		if m.Name != "count" && m.Name != "crc" {
			own = append(own, m)
		}
	}
	if rawType, ok := own.Get("type"); ok {
		if err := own.Only(path, "type", "data"); err != nil {
			return 0, nil, err
		}
		typ, err := spec.Uint(path+".type", rawType, 0xffff)
		if err != nil {
			return 0, nil, err
		}
		raw, ok := own.Get("data")
		if !ok {
			return 0, nil, spec.Errorf(path+".data", "missing")
		}
		data, err := form.Text(path+".data", raw, MaxSize)
		return uint16(typ), data, err
	}
	if len(own) != 1 {
		return 0, nil, spec.Errorf(path, "want one member: vendor, gpio_bank0, device_tree, custom, gpio_bank1 or power_supply_ma; or type and data")
	}
	typ := slices.Index(typeNames, own[0].Name)
	if typ < 1 {
		return 0, nil, spec.Errorf(spec.Join(path, own[0].Name), "unknown; want vendor, gpio_bank0, device_tree, custom, gpio_bank1 or power_supply_ma; or type and data")
	}
	data, err := buildKnown(spec.Join(path, own[0].Name), uint16(typ), own[0].Value)
	return uint16(typ), data, err
}

func buildKnown(path string, typ uint16, raw json.RawMessage) ([]byte, error) {
	switch typ {
	case typeVendor:
		return buildVendor(path, raw)
	case typePower:
		n, err := spec.Uint(path, raw, 1<<32-1)
		return binary.LittleEndian.AppendUint32(nil, uint32(n)), err
	case typeGPIO0, typeGPIO1:
		v, err := spec.ParseValue(path, raw, dataSizes[typ])
		if err == nil && len(v.Bytes) != dataSizes[typ] {
			err = spec.Errorf(path, "%d bytes, want %d", len(v.Bytes), dataSizes[typ])
		}
		return v.Bytes, err
	}
	// Newlines and UTF-8 are as good as anything in custom data.
	v, err := spec.ParseValue(path, raw, MaxSize)
	return v.Bytes, err
}
