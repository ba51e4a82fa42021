// Mutate proves that tests fail when they must. It takes rules out of the code
// one at a time, as scripts/mutants.txt says, in a copy of the tree, and
// demands that the test named beside each fails.
//
//	go run ./internal/mutate [-list FILE] [-run REGEXP] [-j N] [-v]
//
// It prints a line for each mutant and exits with 1 if one survives, doesn't
// compile, or isn't found in the source exactly once.
package main

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"time"
)

func main() {
	list := flag.String("list", "scripts/mutants.txt", "the `file` of mutants")
	run := flag.String("run", "", "only mutants whose ID matches this `regexp`")
	jobs := flag.Int("j", 2, "mutants to test at a time")
	timeout := flag.Duration("timeout", 2*time.Minute, "for one test run; a run cut short counts as killed")
	verbose := flag.Bool("v", false, "print what the tests print")
	flag.Parse()
	bad, err := mutate(*list, *run, &runner{jobs: max(1, *jobs), timeout: *timeout, verbose: *verbose})
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutate:", err)
		os.Exit(2)
	}
	if bad > 0 {
		fmt.Printf("FAIL: %d mutants weren't killed\n", bad)
		os.Exit(1)
	}
}

func mutate(list, run string, r *runner) (bad int, err error) {
	f, err := os.Open(list)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	all, err := parse(f)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", list, err)
	}
	re, err := regexp.Compile(run)
	if err != nil {
		return 0, err
	}
	var chosen []mutant
	for _, m := range all {
		if re.MatchString(m.id) {
			chosen = append(chosen, m)
		}
	}
	if len(chosen) == 0 {
		return 0, fmt.Errorf("no mutant in %s matches %q", list, run)
	}
	return r.run(chosen)
}
