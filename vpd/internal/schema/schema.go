// Package schema completes the JSON Schemas (2020-12) of the formats' specs.
//
// A format writes down what is its own; the types of values that all specs
// share come from here, for "$ref": "#/$defs/NAME":
//
//	u8 u16 u24 u32 u64   a number, or one as a string: 42, "0x2a"
//	text bytes           a string, or a typed value; text is printable ASCII
//	hex typed            a typed value, of type hex or any
//	value                a typed value that may have further members
//	digits mac uuid      strings of hexadecimal digits
package schema

import (
	_ "embed"
	"encoding/json"
	"regexp"

	"nvstore.dev/vpd/internal/spec"
)

// Draft is the dialect, and Base what the format's name and ".json" follow in
// a schema's identifier.
const (
	Draft = "https://json-schema.org/draft/2020-12/schema"
	Base  = "https://nvstore.dev/schema/vpd/"
)

//go:embed defs.json
var shared []byte

var reference = regexp.MustCompile(`"#/\$defs/([a-z0-9_]+)"`)

// Complete returns the whole schema of a format's spec. Own is an object of
// which the members describe the spec's, without "format"; it may have $defs.
func Complete(name, title string, own []byte) []byte {
	o := object(own)
	defs := spec.Object{}
	if raw, ok := o.Get("$defs"); ok {
		defs = object(raw)
	}
	properties := spec.Object{}
	if raw, ok := o.Get("properties"); ok {
		properties = object(raw)
	}
	var whole spec.Object
	whole.Add("$schema", Draft)
	whole.Add("$id", Base+name+".json")
	whole.Add("title", title)
	whole.Add("type", "object")
	required := []string{"format"}
	if raw, ok := o.Get("required"); ok {
		var more []string
		if err := json.Unmarshal(raw, &more); err != nil {
			panic("internal error: schema of " + name + ": " + err.Error())
		}
		required = append(required, more...)
	}
	whole.Add("required", required)
	members := spec.Object{
		{Name: "$schema", Value: json.RawMessage(`{"description": "Where this schema is, for editors", "type": "string"}`)},
		{Name: "format", Value: json.RawMessage(`{"const": "` + name + `"}`)},
	}
	whole.Add("properties", append(members, properties...))
	for _, m := range o {
		switch m.Name {
		case "$defs", "properties", "required":
		default:
			whole.Add(m.Name, m.Value)
		}
	}
	whole.Add("additionalProperties", false)
	whole.Add("$defs", used(own, defs))
	text, err := whole.Text()
	if err != nil {
		panic("internal error: schema of " + name + ": " + err.Error())
	}
	return text
}

// used adds to defs what is referred to, and what that refers to.
func used(text []byte, defs spec.Object) spec.Object {
	all := object(shared)
	for todo := [][]byte{text}; len(todo) > 0; todo = todo[1:] {
		for _, m := range reference.FindAllSubmatch(todo[0], -1) {
			name := string(m[1])
			if _, ok := defs.Get(name); ok {
				continue
			}
			raw, ok := all.Get(name)
			if !ok {
				panic("internal error: schema refers to the unknown $defs/" + name)
			}
			defs.Add(name, raw)
			todo = append(todo, raw)
		}
	}
	return defs
}

func object(text []byte) spec.Object {
	o, err := spec.ParseObject("", text)
	if err != nil {
		panic("internal error: schema: " + err.Error())
	}
	return o
}
