package spec_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/spec"
)

func TestOrderIsKept(t *testing.T) {
	o, err := spec.Parse([]byte(`{
		"zebra": 1, // comment
		/* and */ "format": "x",
		"apple": {"b": "<&>", "a": [1, 2]},
	}`), "x")
	require.NoError(t, err)
	text, err := o.Text()
	require.NoError(t, err)
	require.Equal(t, `{
  "zebra": 1,
  "format": "x",
  "apple": {
    "b": "<&>",
    "a": [
      1,
      2
    ]
  }
}
`, string(text))
}

func TestRefused(t *testing.T) {
	for _, c := range []struct{ text, want string }{
		{`{"format": "x", "a": 1, "a": 2}`, "a: comes twice"},
		{`{"format": "x", "a": 1, "\u0061": 2}`, "a: comes twice"},
		{`{"format": "y"}`, `format: "y", want "x"`},
		{`{"format": "x"} {}`, "after top-level value"},
		{`{"format": "\ud800"}`, "not valid Unicode"},
		{"{\"format\": \"\xff\"}", "spec:"},
		{`null`, "want an object"},
		{strings.Repeat(" ", spec.MaxSize+1), "want at most"},
	} {
		_, err := spec.Parse([]byte(c.text), "x")
		require.ErrorIs(t, err, vpd.ErrSpec)
		require.Contains(t, err.Error(), c.want)
		var se *vpd.SpecError
		require.True(t, errors.As(err, &se))
	}
}

// The JSON parser recurses: without a limit in front of it, a few megabytes
// of brackets end the process.
func TestDepth(t *testing.T) {
	nested := func(n int) string {
		return `{"format": "x", "a": ` + strings.Repeat("[", n) + strings.Repeat("]", n) + `}`
	}
	_, err := spec.Parse([]byte(nested(31)), "x")
	require.NoError(t, err)
	many := strings.Repeat("[", 16<<20)
	for _, text := range []string{
		nested(32), many, strings.Repeat(`{"a":`, 4<<20),
		"// ]]]\n" + many, "/* ]]] */" + many, `["]]]\"]]]", ` + many, "// \" \n" + many, `/* " */` + many, "/*/ */" + many,
	} {
		_, err := spec.Parse([]byte(text), "x")
		require.ErrorIs(t, err, vpd.ErrSpec)
		require.Contains(t, err.Error(), "nested more than 32 deep")
	}
	// Brackets in strings and comments are no nesting.
	quiet := strings.Repeat("[", 100)
	_, err = spec.Parse([]byte(`{"format": "x", "a": "\"`+quiet+`", /* `+quiet+` */ // `+quiet+"\n}"), "x")
	require.NoError(t, err)
}
