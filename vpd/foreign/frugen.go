package foreign

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"

	"nvstore.dev/vpd/internal/spec"
)

// fruDate is a date in a spec of package fru.
const fruDate = "2006-01-02T15:04Z"

// typedValue is a field's typed form.
type typedValue struct {
	Type     string `json:"type"`
	Data     string `json:"data"`
	Encoding string `json:"encoding,omitempty"`
}

// frugen reads the JSON of frugen, versions 1 and 2 (its example.json and the
// members that its README names).
func frugen(text []byte, _ *Options) (*result, error) {
	o, err := spec.Read(text)
	if err != nil {
		return nil, err
	}
	if err := o.Only("", "internal", "chassis", "board", "product", "multirecord"); err != nil {
		return nil, err
	}
	r := &result{}
	r.spec.Add("format", "fru")
	for _, m := range o {
		var v any
		switch m.Name {
		case "internal":
			v, err = frugenInternal(m.Value)
		case "multirecord":
			v, err = frugenRecords(m.Value)
		default:
			v, err = frugenArea(r, m.Name, m.Value)
		}
		if err != nil {
			return nil, err
		}
		r.spec.Add(m.Name, v)
	}
	return r, nil
}

// frugenInternal: hexadecimal digits, or typed.
func frugenInternal(raw json.RawMessage) (any, error) {
	if len(raw) > 0 && raw[0] == '"' {
		return hexString("internal", raw)
	}
	o, err := spec.ParseObject("internal", raw)
	if err != nil {
		return nil, err
	}
	data, ok := o.Get("data")
	if !ok {
		return nil, spec.Errorf("internal.data", "missing")
	}
	if t, ok := o.Get("type"); ok && string(t) == `"text"` {
		s, err := spec.String("internal.data", data)
		return s, err
	}
	return hexString("internal.data", data)
}

func hexString(path string, raw json.RawMessage) (any, error) {
	s, err := spec.String(path, raw)
	if err != nil {
		return nil, err
	}
	b, err := spec.Hex(s)
	if err != nil {
		return nil, spec.Errorf(path, "want pairs of hexadecimal digits")
	}
	return typedValue{Type: "hex", Data: hex.EncodeToString(b)}, nil
}

// frugenNames maps frugen's names to those of a spec.
var frugenNames = map[string][][2]string{
	"chassis": {{"pn", "part_number"}, {"serial", "serial_number"}},
	"board":   {{"mfg", "manufacturer"}, {"pname", "product_name"}, {"serial", "serial_number"}, {"pn", "part_number"}, {"file", "file_id"}},
	"product": {{"mfg", "manufacturer"}, {"pname", "product_name"}, {"pn", "part_number"}, {"ver", "version"}, {"serial", "serial_number"}, {"atag", "asset_tag"}, {"file", "file_id"}},
}

func frugenArea(r *result, name string, raw json.RawMessage) (any, error) {
	o, err := spec.ParseObject(name, raw)
	if err != nil {
		return nil, err
	}
	s := &set{path: name, from: o, to: spec.Object{}}
	number := func(path string, raw json.RawMessage) (any, error) {
		n, err := spec.Uint(path, raw, 0xff)
		return n, err
	}
	code := [2]string{"lang", "language"}
	if name == "chassis" {
		code = [2]string{"type", "type"}
	}
	if err := s.value(code[0], code[1], number); err != nil {
		return nil, err
	}
	if name == "board" {
		err := s.value("date", "date", func(path string, raw json.RawMessage) (any, error) { return frugenDate(r, path, raw) })
		if err != nil {
			return nil, err
		}
		if _, ok := s.to.Get("date"); !ok {
			r.notef("board.date: frugen takes the time of the day; here it is unspecified")
		}
	}
	for _, n := range frugenNames[name] {
		if err := s.value(n[0], n[1], frugenField); err != nil {
			return nil, err
		}
	}
	custom := func(path string, raw json.RawMessage) (any, error) {
		var list []json.RawMessage
		if json.Unmarshal(raw, &list) != nil {
			return nil, spec.Errorf(path, "want a list")
		}
		out := []any{}
		for i, e := range list {
			v, err := frugenField(fmt.Sprintf("%s[%d]", path, i), e)
			if err != nil {
				return nil, err
			}
			out = append(out, v)
		}
		return out, nil
	}
	if err := s.value("custom", "custom", custom); err != nil {
		return nil, err
	}
	return s.to, s.rest()
}

// frugenDate: days before months, and local time.
func frugenDate(r *result, path string, raw json.RawMessage) (any, error) {
	text, err := spec.String(path, raw)
	if err != nil {
		return nil, err
	}
	if text == "" || strings.EqualFold(text, "unspecified") {
		return nil, nil
	}
	for _, layout := range []string{"2/1/2006 15:04:05", "2/1/2006 15:04"} {
		if t, err := time.Parse(layout, text); err == nil {
			r.notef("%s: taken as UTC; frugen takes it as local time", path)
			return t.Format(fruDate), nil
		}
	}
	return nil, spec.Errorf(path, "%q, want DD/MM/YYYY HH:MM:SS", text)
}

// frugenField: a string, or typed.
func frugenField(path string, raw json.RawMessage) (any, error) {
	if len(raw) > 0 && raw[0] == '"' {
		s, err := spec.String(path, raw)
		return s, err
	}
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, spec.Errorf(path, "want a string, or an object with type and data")
	}
	if err := o.Only(path, "type", "data"); err != nil {
		return nil, err
	}
	typ := "auto"
	if t, ok := o.Get("type"); ok {
		if typ, err = spec.String(path+".type", t); err != nil {
			return nil, err
		}
	}
	d, ok := o.Get("data")
	if !ok {
		return nil, spec.Errorf(path+".data", "missing")
	}
	switch typ {
	case "binary":
		return hexString(path+".data", d)
	case "auto", "text", "bcdplus", "6bitascii":
	default:
		return nil, spec.Errorf(path+".type", "unknown type %q; want auto, binary, bcdplus, 6bitascii or text", typ)
	}
	s, err := spec.String(path+".data", d)
	if err != nil {
		return nil, err
	}
	switch {
	case typ == "bcdplus" && len(s)%2 != 0:
		s += " " // as frugen fills it up
		fallthrough
	case typ == "bcdplus":
		return typedValue{Type: "bcd", Data: s}, nil
	case typ == "6bitascii":
		return typedValue{Type: "6bit", Data: s}, nil
	}
	return s, nil
}

// subtypes of the management access record (table 18-6 of the FRU document),
// by frugen's names.
var subtypes = map[string]byte{"surl": 1, "sname": 2, "spingaddr": 3, "curl": 4, "cname": 5, "cpingaddr": 6, "uuid": 7}

func frugenRecords(raw json.RawMessage) (any, error) {
	var list []json.RawMessage
	if json.Unmarshal(raw, &list) != nil {
		return nil, spec.Errorf("multirecord", "want a list")
	}
	out := []spec.Object{}
	for i, e := range list {
		path := fmt.Sprintf("multirecord[%d]", i)
		o, err := spec.ParseObject(path, e)
		if err != nil {
			return nil, err
		}
		rec, err := frugenRecord(path, o)
		if err != nil {
			return nil, err
		}
		out = append(out, rec)
	}
	return out, nil
}

func frugenRecord(path string, o spec.Object) (spec.Object, error) {
	str := func(name string) (string, error) {
		raw, ok := o.Get(name)
		if !ok {
			return "", spec.Errorf(spec.Join(path, name), "missing")
		}
		return spec.String(spec.Join(path, name), raw)
	}
	typ, err := str("type")
	if err != nil {
		return nil, err
	}
	var rec spec.Object
	switch typ {
	case "management":
		sub, err := str("subtype")
		if err != nil {
			return nil, err
		}
		code, ok := subtypes[sub]
		if !ok {
			return nil, spec.Errorf(path+".subtype", "unknown subtype %q", sub)
		}
		if err := o.Only(path, "type", "subtype", sub); err != nil {
			return nil, err
		}
		text, err := str(sub)
		if err != nil {
			return nil, err
		}
		rec.Add("type", "0x03")
		rec.Add("subtype", spec.Byte(code))
		if sub != "uuid" {
			rec.Add("data", text)
			return rec, nil
		}
		id, err := spec.Hex(text)
		if err != nil || len(id) != 16 {
			return nil, spec.Errorf(path+".uuid", "want a UUID")
		}
		// As in SMBIOS: the first three numbers are little-endian.
		for _, p := range [][]byte{id[0:4], id[4:6], id[6:8]} {
			for a, b := 0, len(p)-1; a < b; a, b = a+1, b-1 {
				p[a], p[b] = p[b], p[a]
			}
		}
		rec.Add("data", typedValue{Type: "hex", Data: hex.EncodeToString(id)})
		return rec, nil
	case "custom":
		if err := o.Only(path, "type", "custom_type", "data"); err != nil {
			return nil, err
		}
		return customRecord(path, o)
	}
	return nil, spec.Errorf(path+".type", "%q, want management or custom", typ)
}

// customRecord: a type in hexadecimal, and data.
func customRecord(path string, o spec.Object) (rec spec.Object, err error) {
	raw, ok := o.Get("custom_type")
	if !ok {
		return nil, spec.Errorf(path+".custom_type", "missing")
	}
	n, err := spec.Uint(path+".custom_type", raw, 0xff)
	if len(raw) > 0 && raw[0] == '"' { // hexadecimal, with 0x or without
		s, serr := spec.String("", raw)
		if n, err = strconv.ParseUint(strings.TrimPrefix(strings.ToLower(s), "0x"), 16, 8); serr != nil {
			err = serr
		}
	}
	if err != nil {
		return nil, spec.Errorf(path+".custom_type", "want a number up to 255, or hexadecimal digits")
	}
	data, ok := o.Get("data")
	if !ok {
		return nil, spec.Errorf(path+".data", "missing")
	}
	v, err := hexString(path+".data", data)
	if err != nil {
		return nil, err
	}
	rec.Add("type", spec.Byte(byte(n)))
	rec.Add("data", v)
	return rec, nil
}
