package fru

import (
	"encoding/json"
	"fmt"

	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

// Types of records with members of their own (table 16-2).
const (
	managementAccess = 0x03
	firstOEM         = 0xc0

	maxData = 0xff
)

// dataSizes: the records of a fixed size (section 18).
var dataSizes = map[byte]int{0x00: 24, 0x01: 13, 0x02: 13, 0x09: 15, 0x0a: 15}

var typeNames = map[byte]string{
	0x00: "power supply", 0x01: "DC output", 0x02: "DC load", managementAccess: "management access",
	0x04: "base compatibility", 0x05: "extended compatibility", 0x06: "ASF fixed SMBus device",
	0x07: "ASF legacy-device alerts", 0x08: "ASF remote control", 0x09: "extended DC output", 0x0a: "extended DC load",
}

// buildRecords takes a list of records, or an object with "records".
func buildRecords(path string, raw json.RawMessage, object bool, o spec.Object) ([]byte, error) {
	name := "records"
	if object {
		if err := o.Only(path, "before", name); err != nil {
			return nil, err
		}
		path += ".records"
	} else {
		name = path
		o = spec.Object{{Name: path, Value: raw}}
	}
	list, err := form.List(o, "", name, MaxSize/recordHeader)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, spec.Errorf(path, "want at least one record")
	}
	var out []byte
	for i, raw := range list {
		path := fmt.Sprintf("%s[%d]", path, i)
		ro, err := spec.ParseObject(path, raw)
		if err != nil {
			return nil, err
		}
		b, err := buildRecord(path, ro, i == len(list)-1)
		if err != nil {
			return nil, err
		}
		out = append(out, b...)
		if len(out) > MaxSize {
			return nil, spec.Errorf(path, "the image would exceed %d bytes", MaxSize)
		}
	}
	return out, nil
}

func buildRecord(path string, o spec.Object, last bool) ([]byte, error) {
	if _, ok := o.Get("raw"); ok {
		return rawRecord(path, o, last)
	}
	if err := o.Only(path, "type", "subtype", "manufacturer_id", "data", "fields", "version", "last", "checksum", "header_checksum"); err != nil {
		return nil, err
	}
	if _, ok := o.Get("type"); !ok {
		return nil, spec.Errorf(path+".type", "missing")
	}
	typ, err := form.Uint(o, path, "type", 0xff, 0)
	if err != nil {
		return nil, err
	}
	data, err := recordData(path, byte(typ), o)
	if err != nil {
		return nil, err
	}
	version, err := form.Uint(o, path, "version", endOfList-1, recordFormat)
	if err != nil {
		return nil, err
	}
	if raw, ok := o.Get("last"); ok {
		if string(raw) != "false" || !last {
			return nil, spec.Errorf(path+".last", "is only to say false, of the last record")
		}
		last = false
	}
	if last {
		version |= endOfList
	}
	check, err := form.Uint(o, path, "checksum", 0xff, uint64(-sum(data)))
	if err != nil {
		return nil, err
	}
	head := []byte{byte(typ), byte(version), byte(len(data)), byte(check)}
	if check, err = form.Uint(o, path, "header_checksum", 0xff, uint64(-sum(head))); err != nil {
		return nil, err
	}
	return append(append(head, byte(check)), data...), nil
}

func rawRecord(path string, o spec.Object, last bool) ([]byte, error) {
	if err := o.Only(path, "raw"); err != nil {
		return nil, err
	}
	b, err := form.Bytes(o, path, "raw", recordHeader+maxData)
	if err != nil {
		return nil, err
	}
	if len(b) < recordHeader || len(b) != recordHeader+int(b[2]) || !last && b[1]&endOfList != 0 {
		return nil, spec.Errorf(path+".raw", "want a header of 5 bytes and as much data as its third byte says; only the last may be marked as that")
	}
	return b, nil
}

// recordData puts what the type has in front of the data.
func recordData(path string, typ byte, o spec.Object) ([]byte, error) {
	var front []byte
	_, sub := o.Get("subtype")
	_, id := o.Get("manufacturer_id")
	switch {
	case sub && typ != managementAccess:
		return nil, spec.Errorf(path+".subtype", "only type 0x03 has one")
	case id && typ < firstOEM:
		return nil, spec.Errorf(path+".manufacturer_id", "only types 0xc0 to 0xff have one")
	case sub:
		n, err := form.Uint(o, path, "subtype", 0xff, 0)
		if err != nil {
			return nil, err
		}
		front = []byte{byte(n)}
	case id:
		n, err := form.Uint(o, path, "manufacturer_id", 1<<24-1, 0)
		if err != nil {
			return nil, err
		}
		front = []byte{byte(n), byte(n >> 8), byte(n >> 16)}
	}
	raw, ok := o.Get("data")
	if fields, known := o.Get("fields"); known {
		if ok {
			return nil, spec.Errorf(path+".fields", "can't stand beside data")
		}
		return buildNumbers(path+".fields", typ, fields)
	}
	if !ok {
		return nil, spec.Errorf(path+".data", "missing")
	}
	data, err := form.Text(path+".data", raw, maxData-len(front))
	return append(front, data...), err
}

// spec is the record's text form.
func (r *record) spec(last bool) spec.Object {
	var o spec.Object
	o.Add("type", spec.Byte(r.typ()))
	data := r.data
	list := known[r.typ()]
	if list != nil && len(data) == dataSizes[r.typ()] {
		o.Add("fields", numbers(list, data))
		return r.rest(o, last)
	}
	switch {
	case r.typ() == managementAccess && len(data) > 0:
		o.Add("subtype", spec.Byte(data[0]))
		data = data[1:]
	case r.typ() >= firstOEM && len(data) >= 3:
		o.Add("manufacturer_id", fmt.Sprintf("0x%06x", manufacturer(data)))
		data = data[3:]
	}
	o.Add("data", spec.Show(data))
	return r.rest(o, last)
}

// rest adds what is irregular about a record.
func (r *record) rest(o spec.Object, last bool) spec.Object {
	if v := r.head[1] &^ endOfList; v != recordFormat {
		o.Add("version", v)
	}
	if last && !r.last() {
		o.Add("last", false)
	}
	if sum(r.data)+r.head[3] != 0 {
		o.Add("checksum", spec.Byte(r.head[3]))
	}
	if sum(r.head) != 0 {
		o.Add("header_checksum", spec.Byte(r.head[4]))
	}
	return o
}

func manufacturer(data []byte) int { return int(data[0]) | int(data[1])<<8 | int(data[2])<<16 }

// brief shows a record to people.
func (r *record) brief() string {
	name := typeNames[r.typ()]
	switch {
	case r.typ() >= firstOEM && len(r.data) >= 3:
		name = fmt.Sprintf("OEM %d", manufacturer(r.data))
	case name == "":
		name = "type " + spec.Byte(r.typ())
	}
	return fmt.Sprintf("%s, %d bytes", name, len(r.data))
}
