package smbios

import (
	_ "embed"

	"nvstore.dev/vpd/internal/schema"
	"nvstore.dev/vpd/internal/spec"
)

//go:embed schema.json
var ownSchema []byte

// Schema describes a spec.
func (format) Schema() []byte {
	o, err := spec.ParseObject("", ownSchema)
	if err != nil {
		panic("internal error: " + err.Error())
	}
	raw, _ := o.Get("$defs")
	defs, err := spec.ParseObject("", raw)
	if err != nil {
		panic("internal error: " + err.Error())
	}
	kinds := []spec.Object{ref("#/$defs/unknown_structure")}
	for i := range definitions {
		kinds = append(kinds, definitions[i].schema())
	}
	var any spec.Object
	any.Add("anyOf", kinds)
	defs.Add("structure", any)
	for i := range o {
		if o[i].Name == "$defs" {
			if o[i].Value, err = defs.MarshalJSON(); err != nil {
				panic("internal error: " + err.Error())
			}
		}
	}
	text, err := o.Text()
	if err != nil {
		panic("internal error: " + err.Error())
	}
	return schema.Complete(Name, "SMBIOS tables", text)
}

func ref(to string) (o spec.Object) {
	o.Add("$ref", to)
	return o
}

// schema describes the structures of a type.
func (d *definition) schema() spec.Object {
	var typ, properties, o spec.Object
	typ.Add("enum", []any{d.name, d.typ})
	properties.Add("type", typ)
	for _, m := range []struct{ name, to string }{{"handle", "u16"}, {"length", "u8"}, {"extra", "bytes"}, {"strings", "strings"}} {
		properties.Add(m.name, ref("#/$defs/"+m.to))
	}
	for _, f := range d.fields {
		to := map[int]string{1: "u8", 2: "u16", 4: "u32", 8: "u64"}[f.size]
		switch f.kind {
		case text:
			to = "string"
		case uuid:
			to = "uuid"
		case octets:
			to = "text"
		}
		properties.Add(f.name, ref("#/$defs/"+to))
	}
	o.Add("type", "object")
	o.Add("required", []string{"type"})
	o.Add("properties", properties)
	o.Add("additionalProperties", false)
	return o
}
