package main

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const sample = `# comment
[one]
rule: a rule
file: a/b.go
test: -run TestX|TestY ./a
-	if bad {
-		return err
-	}
+

[two]
rule: another: with a colon
file: a/b.go
test: ./a
-x := 1
+x := 2
`

func TestParse(t *testing.T) {
	list, err := parse(strings.NewReader(sample))
	require.NoError(t, err)
	require.Equal(t, []mutant{
		{id: "one", rule: "a rule", file: "a/b.go", test: []string{"-run", "TestX|TestY", "./a"},
			old: []string{"\tif bad {", "\t\treturn err", "\t}"}, new: []string{""}},
		{id: "two", rule: "another: with a colon", file: "a/b.go", test: []string{"./a"},
			old: []string{"x := 1"}, new: []string{"x := 2"}},
	}, list)
	for _, bad := range []string{"rule: before any", "[a]\n[a]", "[a]\nwhat: x", "[a]\nno colon", "[a]\nrule: r"} {
		_, err := parse(strings.NewReader(bad))
		require.Error(t, err, bad)
	}
}

func TestApply(t *testing.T) {
	m := mutant{file: "f.go", old: []string{"a", " b"}, new: []string{"c"}}
	got, err := m.apply("x\n\ta\n\tb \ny\n")
	require.NoError(t, err)
	require.Equal(t, "x\nc\ny\n", got)
	_, err = m.apply("a\nx\nb\n")
	require.ErrorContains(t, err, "aren't in f.go")
	_, err = m.apply("a\nb\na\nb\n")
	require.ErrorContains(t, err, "lines 1 and 3")
	_, err = m.apply("a")
	require.Error(t, err)
}
