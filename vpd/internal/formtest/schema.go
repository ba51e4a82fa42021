package formtest

import (
	"bytes"
	"fmt"
	"sync"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/tailscale/hujson"

	"nvstore.dev/vpd"
)

var (
	schemasMu sync.Mutex
	schemas   = map[string]*jsonschema.Schema{}
)

// Schema compiles a format's schema, which must be one of the draft that it
// names.
func Schema(f vpd.Format) (*jsonschema.Schema, error) { return compile(f.Name(), f.Schema()) }

func compile(name string, text []byte) (*jsonschema.Schema, error) {
	schemasMu.Lock()
	defer schemasMu.Unlock()
	if s := schemas[name]; s != nil {
		return s, nil
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	url := "https://nvstore.dev/schema/vpd/" + name + ".json"
	if m, ok := doc.(map[string]any); !ok || m["$id"] != url || m["$schema"] != "https://json-schema.org/draft/2020-12/schema" {
		return nil, fmt.Errorf("the schema of %s doesn't say that it is %s, of draft 2020-12", name, url)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource(url, doc); err != nil {
		return nil, err
	}
	s, err := c.Compile(url)
	if err == nil {
		schemas[name] = s
	}
	return s, err
}

// Validate checks a spec, which may have comments, against its format's
// schema.
func Validate(f vpd.Format, spec []byte) error { return ValidateBy(f.Name(), f.Schema(), spec) }

// ValidateBy checks JSON that may have comments against a schema.
func ValidateBy(name string, schema, spec []byte) error {
	s, err := compile(name, schema)
	if err != nil {
		return err
	}
	std, err := hujson.Standardize(bytes.Clone(spec))
	if err != nil {
		return err
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(std))
	if err != nil {
		return err
	}
	return s.Validate(doc)
}
