package main

import (
	"bufio"
	"fmt"
	"io"
	"strings"
)

// A mutant is one change to the source, and the test that must notice it.
type mutant struct {
	id, rule, file string
	test           []string // arguments of go test
	old, new       []string // lines
}

// parse reads a list: for each mutant a line [ID], then "rule:", "file:" and
// "test:", then the lines to take out, each after a "-", and those to put in,
// each after a "+". Empty lines, and lines that start with "#", are skipped.
func parse(r io.Reader) ([]mutant, error) {
	var list []mutant
	seen := map[string]bool{}
	in := bufio.NewScanner(r)
	for n := 1; in.Scan(); n++ {
		line := in.Text()
		if strings.TrimSpace(line) == "" || line[0] == '#' {
			continue
		}
		if id, ok := strings.CutPrefix(line, "["); ok {
			id = strings.TrimSuffix(id, "]")
			if seen[id] {
				return nil, fmt.Errorf("line %d: %s is there twice", n, id)
			}
			seen[id] = true
			list = append(list, mutant{id: id})
			continue
		}
		if len(list) == 0 || !list[len(list)-1].add(line) {
			return nil, fmt.Errorf("line %d: can't read %q", n, line)
		}
	}
	for _, m := range list {
		if m.rule == "" || m.file == "" || len(m.test) == 0 || len(m.old) == 0 {
			return nil, fmt.Errorf("[%s] lacks rule, file, test or old lines", m.id)
		}
	}
	return list, in.Err()
}

func (m *mutant) add(line string) bool {
	switch {
	case line[0] == '-':
		m.old = append(m.old, line[1:])
		return true
	case line[0] == '+':
		m.new = append(m.new, line[1:])
		return true
	}
	key, val, ok := strings.Cut(line, ":")
	val = strings.TrimSpace(val)
	switch {
	case !ok:
		return false
	case key == "rule":
		m.rule = val
	case key == "file":
		m.file = val
	case key == "test":
		m.test = strings.Fields(val)
	default:
		return false
	}
	return true
}

// apply returns the source with the mutant in it. White space at both ends of
// a line doesn't count, so that reformatting the source is harmless.
func (m *mutant) apply(src string) (string, error) {
	lines := strings.Split(src, "\n")
	at := -1
	for i := 0; i+len(m.old) <= len(lines); i++ {
		if !sameLines(lines[i:i+len(m.old)], m.old) {
			continue
		}
		if at >= 0 {
			return "", fmt.Errorf("the old lines are in %s more than once, at lines %d and %d", m.file, at+1, i+1)
		}
		at = i
	}
	if at < 0 {
		return "", fmt.Errorf("the old lines aren't in %s", m.file)
	}
	out := append([]string{}, lines[:at]...)
	out = append(out, m.new...)
	out = append(out, lines[at+len(m.old):]...)
	return strings.Join(out, "\n"), nil
}

func sameLines(a, b []string) bool {
	for i := range a {
		if strings.TrimSpace(a[i]) != strings.TrimSpace(b[i]) {
			return false
		}
	}
	return true
}
