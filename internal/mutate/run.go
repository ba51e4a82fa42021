package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"
)

type runner struct {
	jobs    int
	timeout time.Duration
	verbose bool

	mu sync.Mutex // of the output
}

// An outcome is what became of a mutant.
type outcome struct {
	m      mutant
	killed bool
	by     string // the test that noticed it, or what is wrong
	took   time.Duration
}

// run tests the mutants in copies of the tree, one copy a job, and returns how
// many weren't killed.
func (r *runner) run(list []mutant) (bad int, err error) {
	tmp, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(tmp)
	var trees []string
	for i := range min(r.jobs, len(list)) {
		tree := filepath.Join(tmp, fmt.Sprint(i))
		if err := copyTree(tree); err != nil {
			return 0, err
		}
		trees = append(trees, tree)
	}
	if err := r.baseline(trees[0], list); err != nil {
		return 0, err
	}
	todo := make(chan mutant)
	done := make(chan outcome)
	for _, tree := range trees {
		go func() {
			for m := range todo {
				done <- r.try(tree, m)
			}
		}()
	}
	go func() {
		for _, m := range list {
			todo <- m
		}
		close(todo)
	}()
	for range list {
		o := <-done
		if !o.killed {
			bad++
		}
		r.report(o)
	}
	fmt.Printf("%d of %d mutants killed\n", len(list)-bad, len(list))
	return bad, nil
}

func (r *runner) report(o outcome) {
	word := "killed"
	if !o.killed {
		word = "ALIVE "
	}
	fmt.Printf("%s %-28s %5.1fs  %s\n       %s\n", word, o.m.id, o.took.Seconds(), o.by, o.m.rule)
}

// baseline demands that the tests pass while nothing is taken out: a test that
// fails anyway proves nothing.
func (r *runner) baseline(tree string, list []mutant) error {
	ran := map[string]bool{}
	for _, m := range list {
		key := strings.Join(m.test, " ")
		if ran[key] {
			continue
		}
		ran[key] = true
		out, ok := r.test(tree, m.test)
		if !ok || noTests.Match(out) {
			return fmt.Errorf("go test %s must pass on the source as it is:\n%s", key, out)
		}
	}
	return nil
}

var (
	failedTest  = regexp.MustCompile(`(?m)^\s*--- FAIL: (\S+)`)
	failedBuild = regexp.MustCompile(`(?m)\[(build|setup) failed\]`)
	timedOut    = regexp.MustCompile(`(?m)^panic: test timed out`)
	panicked    = regexp.MustCompile(`(?m)^(panic|fatal error): .*`)
	noTests     = regexp.MustCompile(`(?m)\[no tests to run\]|\[no test files\]`)
)

func (r *runner) try(tree string, m mutant) outcome {
	start := time.Now()
	o := outcome{m: m}
	o.killed, o.by = r.verdict(tree, m)
	o.took = time.Since(start)
	return o
}

func (r *runner) verdict(tree string, m mutant) (killed bool, by string) {
	path := filepath.Join(tree, m.file)
	src, err := os.ReadFile(path)
	if err != nil {
		return false, err.Error()
	}
	mutated, err := m.apply(string(src))
	if err != nil {
		return false, err.Error()
	}
	if err := os.WriteFile(path, []byte(mutated), 0o644); err != nil {
		return false, err.Error()
	}
	out, passed := r.test(tree, m.test)
	if err := os.WriteFile(path, src, 0o644); err != nil {
		return false, err.Error()
	}
	switch {
	case passed:
		return false, "go test " + strings.Join(m.test, " ") + " passes all the same"
	case failedBuild.Match(out):
		return false, "doesn't compile:\n" + string(out)
	case timedOut.Match(out):
		return true, "timeout"
	}
	if f := failedTest.FindSubmatch(out); f != nil {
		return true, string(f[1])
	}
	if p := panicked.Find(out); p != nil {
		return true, string(p)
	}
	return false, "go test failed, but no test did:\n" + string(out)
}

func (r *runner) test(tree string, args []string) (out []byte, passed bool) {
	args = append([]string{"test", "-count=1", "-timeout", r.timeout.String()}, args...)
	cmd := exec.Command("go", args...)
	cmd.Dir = tree
	out, err := cmd.CombinedOutput()
	if r.verbose {
		r.mu.Lock()
		defer r.mu.Unlock()
		fmt.Printf("go %s\n%s", strings.Join(args, " "), out)
	}
	return out, err == nil
}

// copyTree copies what git knows or would add, as it is in the work tree.
func copyTree(to string) error {
	out, err := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard").Output()
	if err != nil {
		return fmt.Errorf("git ls-files: %w", err)
	}
	for name := range bytes.SplitSeq(bytes.TrimRight(out, "\x00"), []byte{0}) {
		if err := copyFile(string(name), filepath.Join(to, string(name))); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	info, err := os.Lstat(from)
	if os.IsNotExist(err) || err == nil && !info.Mode().IsRegular() {
		return nil // deleted in the work tree, or a link
	}
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, info.Mode().Perm())
	if err != nil {
		return err
	}
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		return err
	}
	return dst.Close()
}
