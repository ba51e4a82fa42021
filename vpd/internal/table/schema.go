package table

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"nvstore.dev/vpd/internal/schema"
	"nvstore.dev/vpd/internal/spec"
)

const patchesSchema = `{
  "description": "Bytes that are no field; fields lie over them",
  "type": "array",
  "maxItems": 16384,
  "items": {
    "$ref": "#/$defs/value",
    "required": ["offset"],
    "properties": {"name": {"description": "For people"}, "offset": {"$ref": "#/$defs/u32"}},
    "unevaluatedProperties": false
  }
}`

// Schema describes a spec.
func (f *format) Schema() []byte { return slices.Clone(f.schema()) }

// makeSchema says each layout's members, and that no layout has others.
func (f *format) makeSchema() []byte {
	properties := members{}
	var names []string
	var rules []spec.Object
	for _, l := range f.Layouts {
		names = append(names, l.Name)
		allowed := append([]string{"$schema", "patches", "size", "fill"}, f.head()...)
		for _, m := range l.properties() {
			properties.add(m.Name, m.Value)
			allowed = append(allowed, m.Name)
		}
		rule := object("propertyNames", object("enum", allowed))
		if list := l.required(); len(list) > 0 {
			rule.Add("required", list)
		}
		if f.Member != "" {
			rule = object("if", object("properties", object(f.Member, object("const", l.Name))), "then", rule)
		}
		rules = append(rules, rule)
	}
	all := spec.Object{}
	if f.Member != "" {
		all.Add(f.Member, object("description", "What the image is for", "enum", names))
	}
	all = append(all, properties.object()...)
	all = append(all, spec.Member{Name: "patches", Value: json.RawMessage(patchesSchema)})
	all.Add("size", object("description", "Of the image, in bytes", "$ref", "#/$defs/u32"))
	all.Add("fill", object("description", "Where nothing else is", "$ref", "#/$defs/u8"))
	own, err := object("required", f.head()[1:], "properties", all, "allOf", rules).Text()
	if err != nil {
		panic("internal error: schema of " + f.Def.Name + ": " + err.Error())
	}
	return schema.Complete(f.Def.Name, f.Title, own)
}

// required are the names of fields that a spec must have, outside of groups.
func (l *Layout) required() (list []string) {
	for i := range l.Fields {
		if l.Fields[i].Required {
			list = append(list, l.Fields[i].Name)
		}
	}
	return list
}

// object makes an object of names and values in turn.
func object(pairs ...any) spec.Object {
	var o spec.Object
	for i := 0; i < len(pairs); i += 2 {
		o.Add(pairs[i].(string), pairs[i+1])
	}
	return o
}

// members are schemas by name, in order; layouts may have different ones for
// the same name.
type members []struct {
	name    string
	schemas []string
}

func (m *members) add(name string, raw json.RawMessage) {
	for i := range *m {
		e := &(*m)[i]
		if e.name == name {
			if !slices.Contains(e.schemas, string(raw)) {
				e.schemas = append(e.schemas, string(raw))
			}
			return
		}
	}
	*m = append(*m, struct {
		name    string
		schemas []string
	}{name, []string{string(raw)}})
}

func (m members) object() (o spec.Object) {
	for _, e := range m {
		s := e.schemas[0]
		if len(e.schemas) > 1 {
			s = `{"anyOf": [` + strings.Join(e.schemas, ", ") + `]}`
		}
		o = append(o, spec.Member{Name: e.name, Value: json.RawMessage(s)})
	}
	return o
}

// properties describes the members of a layout's spec.
func (l *Layout) properties() spec.Object {
	var o spec.Object
	groups := map[string]*spec.Object{}
	add := func(name string, s spec.Object) {
		group, member, nested := strings.Cut(name, ".")
		if !nested {
			o.Add(name, s)
			return
		}
		if groups[group] == nil {
			groups[group] = &spec.Object{}
			o.Add(group, nil) // its place
		}
		groups[group].Add(member, s)
	}
	for i := range l.Fields {
		add(l.Fields[i].Name, l.Fields[i].schema())
	}
	for i := range l.Sums {
		s := &l.Sums[i]
		add(s.Name, object("description", s.Title+", computed; here if it is another", "$ref", fmt.Sprintf("#/$defs/u%d", 8*s.Len)))
	}
	for i := range o {
		if g := groups[o[i].Name]; g != nil {
			s := object("type", "object", "properties", *g, "additionalProperties", false)
			o[i].Value = object("", s)[0].Value
		}
	}
	return o
}

func (fd *Field) schema() spec.Object {
	doc := fd.Doc
	if fd.Kind.Schema == nil {
		if fd.At == nil {
			doc = strings.TrimPrefix(fmt.Sprintf("%s; %d bytes", doc, fd.Len), "; ")
		}
		return object("description", doc, "$ref", "#/$defs/typed")
	}
	n := fd.Len
	if fd.At != nil {
		n = 0
	}
	plain := json.RawMessage(fd.Kind.Schema(n))
	o := object("anyOf", []json.RawMessage{plain, json.RawMessage(`{"$ref": "#/$defs/typed"}`)})
	if doc != "" {
		o = append(object("description", doc), o...)
	}
	return o
}
