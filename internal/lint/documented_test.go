package lint_test

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var (
	testNames   = regexp.MustCompile("`((?:Test|Fuzz|Benchmark)[A-Z]\\w*)`")
	scriptNames = regexp.MustCompile("[Ss]cripts? `([\\w-]+)`")
	testFunc    = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)[A-Z]\w*)\(`)
)

// TestDocumentedTests: a test that the documents name exists, and a table that
// promises what shows a row's claim has it in each row.
func TestDocumentedTests(t *testing.T) {
	known := map[string]bool{}
	files(t, func(path string, test bool) {
		for _, m := range testFunc.FindAllSubmatch(read(t, path), -1) {
			known[string(m[1])] = known[string(m[1])] || test
		}
	})
	scripts, err := filepath.Glob("../../cmd/nvtool/testdata/script/*.txtar")
	require.NoError(t, err)
	for _, s := range scripts {
		known["script "+strings.TrimSuffix(filepath.Base(s), ".txtar")] = true
	}
	documents, err := filepath.Glob("../../*.md")
	require.NoError(t, err)
	named, rows := 0, 0
	for _, path := range documents {
		shown := false // in a table whose last column is "shown by"
		for i, line := range strings.Split(string(read(t, path)), "\n") {
			for _, m := range testNames.FindAllStringSubmatch(line, -1) {
				if named++; !known[m[1]] {
					t.Errorf("%s:%d: there is no %s", filepath.Base(path), i+1, m[1])
				}
			}
			for _, m := range scriptNames.FindAllStringSubmatch(line, -1) {
				if named++; !known["script "+m[1]] {
					t.Errorf("%s:%d: there is no script %s", filepath.Base(path), i+1, m[1])
				}
			}
			if !strings.HasPrefix(line, "|") {
				shown = false
				continue
			}
			cells := strings.Split(strings.TrimSuffix(strings.TrimSpace(line), "|"), "|")
			last := strings.TrimSpace(cells[len(cells)-1])
			if last == "shown by" {
				shown = true
			} else if shown {
				if rows++; last == "" || last == "-" {
					t.Errorf("%s:%d: nothing shows this row", filepath.Base(path), i+1)
				}
			}
		}
	}
	t.Logf("%d names, %d rows", named, rows)
	require.Greater(t, named, 50)
	require.Greater(t, rows, 40)
}
