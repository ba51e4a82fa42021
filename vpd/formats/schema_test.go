package formats_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"github.com/tailscale/hujson"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/formats"
	"nvstore.dev/vpd/internal/formtest"
	"nvstore.dev/vpd/internal/spec"
)

// specs returns the paths of all fixture specs, by format.
func specs(t *testing.T) map[string][]string {
	byFormat := map[string][]string{}
	for _, pattern := range []string{"*.jsonc", "*/*.jsonc"} {
		paths, err := filepath.Glob(fixtures + pattern)
		require.NoError(t, err)
		for _, path := range paths {
			f, err := formats.OfSpec(read(t, path))
			require.NoError(t, err)
			byFormat[f.Name()] = append(byFormat[f.Name()], path)
		}
	}
	return byFormat
}

// Each format has a schema, which its fixture specs and what Parse makes of
// their images fit. That Parse fits it on any image is in formtest.CheckAny.
func TestSchemas(t *testing.T) {
	all := specs(t)
	for _, f := range formats.All() {
		t.Run(f.Name(), func(t *testing.T) {
			_, err := formtest.Schema(f)
			require.NoError(t, err)
			require.NotEmpty(t, all[f.Name()], "no fixtures/vpd/%s/NAME.%s.jsonc", f.Name(), f.Name())
			for _, path := range all[f.Name()] {
				text := read(t, path)
				require.NoError(t, formtest.Validate(f, text), "%s", path)
				image, _, err := f.Pack(text)
				require.NoError(t, err)
				parsed, _, err := f.Parse(image)
				require.NoError(t, err)
				require.NoError(t, formtest.Validate(f, parsed), "%s", parsed)
			}
			require.Error(t, formtest.Validate(f, []byte(`{"format": "none"}`)))
			require.Error(t, formtest.Validate(f, []byte(`{}`)))
		})
	}
}

// A schema that lets everything pass is of no use to an editor: what Pack
// refuses of members that don't exist, are missing or have values of a wrong
// type, the schema refuses too. What Pack takes, it lets pass.
func TestSchemasFit(t *testing.T) {
	for name, paths := range specs(t) {
		f := formats.ByName(name)
		for _, path := range paths {
			t.Run(filepath.Base(path), func(t *testing.T) {
				std, err := hujson.Standardize(read(t, path))
				require.NoError(t, err)
				n := 0
				for i, m := range mutations(t, "", bytes.TrimSpace(std)) {
					if testing.Short() && i%4 != 0 {
						continue
					}
					_, _, perr := f.Pack(m.spec)
					serr := formtest.Validate(f, m.spec)
					switch {
					case perr == nil:
						require.NoError(t, serr, "%s: Pack takes it", m.what)
					// That the second of two must not be without the first
					// no schema can say.
					case !strings.HasSuffix(m.what, "is left out") || strings.HasSuffix(perr.Error(), "missing"):
						require.Error(t, serr, "%s: Pack says %v, the schema nothing", m.what, perr)
						n++
					}
				}
				require.Positive(t, n)
			})
		}
	}
}

// A mutation is a spec with one change.
type mutation struct {
	spec json.RawMessage
	what string
}

// mutations changes JSON, at path, and keeps the order of members.
func mutations(t *testing.T, path string, raw json.RawMessage) (all []mutation) {
	if path != "" {
		for _, wrong := range []string{`[[]]`, `{}`, `-1000000`, `true`} {
			all = append(all, mutation{json.RawMessage(wrong), path + " is " + wrong})
		}
	}
	marshal := func(v any) json.RawMessage {
		b, err := json.Marshal(v)
		require.NoError(t, err)
		return b
	}
	switch raw[0] {
	case '{':
		o, err := spec.ParseObject("", raw)
		require.NoError(t, err)
		all = append(all, mutation{marshal(append(slices.Clone(o), spec.Member{Name: "no such member", Value: marshal("x")})), path + " has an unknown member"})
		for i, m := range o {
			all = append(all, mutation{marshal(slices.Delete(slices.Clone(o), i, i+1)), path + "." + m.Name + " is left out"})
			for _, sub := range mutations(t, path+"."+m.Name, m.Value) {
				changed := slices.Clone(o)
				changed[i].Value = sub.spec
				all = append(all, mutation{marshal(changed), sub.what})
			}
		}
	case '[':
		var list []json.RawMessage
		require.NoError(t, json.Unmarshal(raw, &list))
		for i, m := range list[:min(len(list), 4)] {
			for _, sub := range mutations(t, fmt.Sprintf("%s[%d]", path, i), m) {
				changed := slices.Clone(list)
				changed[i] = sub.spec
				all = append(all, mutation{marshal(changed), sub.what})
			}
		}
	}
	return all
}

// An editor's note of where the schema is doesn't get into the image.
func TestSchemaMember(t *testing.T) {
	for name, paths := range specs(t) {
		f := formats.ByName(name)
		text := read(t, paths[0])
		want, _, err := f.Pack(text)
		require.NoError(t, err)
		i := slices.Index(text, '{')
		noted := slices.Concat(text[:i+1], []byte(`"$schema": "https://nvstore.dev/schema/vpd/x.json",`), text[i+1:])
		got, _, err := f.Pack(noted)
		require.NoError(t, err)
		require.Equal(t, want, got)
		require.NoError(t, formtest.Validate(f, noted))
	}
	_, _, err := formats.ByName("raw").Pack([]byte(`{"format": "raw", "$schema": 1, "size": 1}`))
	require.ErrorIs(t, err, vpd.ErrSpec)
}
