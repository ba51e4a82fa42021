package lint_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/format"
	"go/parser"
	"go/token"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

const (
	module      = "nvstore.dev"
	maxLines    = 600 // of a source file that isn't a test
	maxExported = 24  // names in a package
)

// A pkg is what go list says of a package.
type pkg struct {
	ImportPath     string
	Dir            string
	Name           string
	GoFiles        []string
	IgnoredGoFiles []string
	CgoFiles       []string
	TestGoFiles    []string
	XTestGoFiles   []string
	Imports        []string
	Error          *struct{ Err string }
}

// rel is the package's folder in the module.
func (p *pkg) rel() string {
	return strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
}

// sources are the files that aren't tests, for all platforms.
func (p *pkg) sources() []string {
	var list []string
	for _, f := range slices.Concat(p.GoFiles, p.CgoFiles, p.IgnoredGoFiles) {
		if !strings.HasSuffix(f, "_test.go") {
			list = append(list, filepath.Join(p.Dir, f))
		}
	}
	return list
}

var packages = sync.OnceValues(func() ([]*pkg, error) {
	cmd := exec.Command("go", "list", "-e", "-json", module+"/...")
	cmd.Dir = filepath.Join("..", "..")
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	var list []*pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		p := new(pkg)
		if err := dec.Decode(p); errors.Is(err, io.EOF) {
			return list, nil
		} else if err != nil {
			return nil, err
		}
		list = append(list, p)
	}
})

func all(t *testing.T) []*pkg {
	t.Helper()
	list, err := packages()
	require.NoError(t, err)
	require.NotEmpty(t, list)
	return list
}

// files calls f for each Go file in the module.
func files(t *testing.T, f func(path string, test bool)) {
	for _, p := range all(t) {
		for _, path := range p.sources() {
			f(path, false)
		}
		for _, name := range slices.Concat(p.TestGoFiles, p.XTestGoFiles) {
			f(filepath.Join(p.Dir, name), true)
		}
	}
}

// short is a path as one reads it from the top of the tree.
func short(path string) string {
	top, err := filepath.Abs(filepath.Join("..", ".."))
	if err != nil {
		return path
	}
	if rel, err := filepath.Rel(top, path); err == nil {
		return rel
	}
	return path
}

// under tells whether folder rel is one of tops or lies below one.
func under(rel string, tops ...string) bool {
	for _, top := range tops {
		if rel == top || strings.HasPrefix(rel, top+"/") {
			return true
		}
	}
	return false
}

// layers says which of our own packages each may import, apart from those
// below itself, by the first entry that fits. Tests may import anything.
var layers = []struct {
	rel     string
	imports []string
}{
	{"image/chain", []string{"image", "crypto"}},
	{"image/luks", []string{"image", "crypto"}},
	{"image", nil}, // each driver gets the contract below
	{"crypto", []string{"crypto"}},
	{"blobdir", []string{"image", "crypto"}},
	{"nvstore/fusefs", []string{"nvstore", "blobdir", "image"}},
	{"nvstore", []string{"machine", "blobdir", "image", "crypto"}},
	{"machine/live", []string{"machine", "nvstore", "blobdir", "image", "crypto"}},
	{"machine", []string{"image"}},
	{"vpd", nil},
	{"eeprom", []string{"nvstore", "blobdir", "image"}},
	{"tpmstate", []string{"nvstore", "blobdir", "image", "crypto"}},
	{"depot", []string{"nvstore", "blobdir", "image", "crypto"}},
	{"cmd", []string{"machine", "tpmstate", "vpd", "eeprom", "depot", "nvstore", "blobdir", "image", "crypto", "fixtures"}},
	{"fixtures", nil},
	{"bench", nil},
	{"internal", nil},
}

func allowed(from, to string) error {
	if under(to, "internal") && !under(from, "internal") || strings.Contains(to, "/internal/") {
		return nil // the compiler sees to internal packages
	}
	for _, l := range layers {
		if !under(from, l.rel) {
			continue
		}
		switch {
		case under(to, from), under(to, l.imports...), under(from, "image") && to == "image",
			under(from, "vpd") && under(to, "vpd"), under(from, "tpmstate") && under(to, "tpmstate"),
			under(from, "eeprom") && under(to, "eeprom"), under(from, "cmd") && under(to, "cmd"):
		default:
			return fmt.Errorf("%s must not import %s", from, to)
		}
		return drivers(from, to)
	}
	return fmt.Errorf("%s has no place in the layers", from)
}

// drivers: only image/chain imports drivers, and what opens stores. Nobody
// ships the test suite.
func drivers(from, to string) error {
	if to == "image/imagetest" && from != to {
		return fmt.Errorf("%s must not import %s outside of its tests", from, to)
	}
	if under(to, "image") && to != "image" && to != "image/convert" && to != "image/adapt" && to != from && !under(from, "image/chain", "nvstore", "machine/live", "cmd") {
		return fmt.Errorf("%s must not import the driver %s", from, to)
	}
	return nil
}

// owners says which of our packages may import a module of others, for those
// that must not spread. Tests may import anything.
var owners = map[string][]string{
	"github.com/cockroachdb/pebble": {"image/pebbledev"},
	"github.com/spf13/cobra":        {"cmd"},
	"github.com/jedib0t/go-pretty":  {"cmd"},
	"github.com/vbauerster/mpb":     {"cmd"},
	"github.com/hanwen/go-fuse":     {"nvstore/fusefs"},
	"golang.org/x/term":             {"cmd", "crypto/secret"},
	"go.etcd.io/bbolt":              {},
	"pgregory.net/rapid":            {"image/imagetest", "vpd/internal/formtest"},
	"github.com/santhosh-tekuri":    {"vpd/internal/formtest"},
	"github.com/stretchr/testify":   {"image/imagetest", "vpd/internal/formtest"},
	"testing":                       {"image/imagetest", "vpd/internal/formtest"},
	"os/exec":                       {"cmd", "internal"},
	"log":                           {"cmd"},
	"C":                             {},
	"unsafe":                        {"image", "crypto/xts", "cmd/nvtpm/internal/libtpms", "cmd/nvtpm/internal/sandbox"},
	"github.com/ebitengine/purego":  {"cmd/nvtpm/internal/libtpms", "cmd/nvtpm/internal/sandbox"},
}

func TestImports(t *testing.T) {
	for _, p := range all(t) {
		if p.Error != nil && len(p.sources()) > 0 {
			t.Errorf("%s: %s", p.ImportPath, p.Error.Err)
		}
		for _, imp := range p.Imports {
			if under(imp, module) {
				if err := allowed(p.rel(), strings.TrimPrefix(imp, module+"/")); err != nil {
					t.Error(err)
				}
				continue
			}
			for mod, in := range owners {
				if under(imp, mod) && (mod == imp || strings.Contains(mod, ".")) && !under(p.rel(), in...) {
					t.Errorf("%s must not import %s; only %q may", p.rel(), imp, in)
				}
			}
		}
	}
}

// The rules must be able to fail.
func TestLayerRules(t *testing.T) {
	for _, bad := range [][2]string{
		{"image", "image/raw"}, {"image/raw", "image/qcow2"}, {"image/qcow2", "crypto/seal"},
		{"crypto/seal", "image"}, {"blobdir", "nvstore"}, {"blobdir", "image/raw"}, {"blobdir", "image/chain"},
		{"vpd/pci", "nvstore"}, {"nvstore", "cmd/nvtool"}, {"nvstore", "fixtures"}, {"nvstore", "image/imagetest"},
		{"tpmstate", "image/raw"}, {"fixtures", "image"}, {"nvstore", "tpmstate"}, {"newcomer", "image"},
	} {
		require.Error(t, allowed(bad[0], bad[1]), "%v", bad)
	}
	for _, good := range [][2]string{
		{"image/raw", "image"}, {"image/chain", "image/raw"}, {"image/luks", "crypto/xts"}, {"crypto/seal", "crypto/kdf"},
		{"blobdir", "image"}, {"blobdir", "crypto/seal"}, {"nvstore", "image/chain"}, {"cmd/nvtool", "vpd/pci"},
		{"cmd/nvtool", "fixtures"}, {"vpd/pci", "vpd"}, {"vpd", "vpd/pci"}, {"tpmstate", "nvstore"}, {"blobdir", "blobdir/wire"},
	} {
		require.NoError(t, allowed(good[0], good[1]), "%v", good)
	}
}

// manyNames lists packages with more exported names than maxExported, each
// with its limit and a reason.
var manyNames = map[string]struct {
	limit  int
	reason string
}{}

func TestExportedNames(t *testing.T) {
	for _, p := range all(t) {
		if p.Name == "main" || under(p.rel(), "bench", "internal") {
			continue
		}
		limit := maxExported
		if m, ok := manyNames[p.rel()]; ok {
			limit = m.limit
		}
		names := map[string]bool{}
		for _, path := range p.sources() {
			exported(t, path, names)
		}
		if len(names) > limit {
			list := make([]string, 0, len(names))
			for n := range names {
				list = append(list, n)
			}
			slices.Sort(list)
			t.Errorf("%s exports %d names, at most %d: %s", p.rel(), len(names), limit, strings.Join(list, ", "))
		}
	}
}

// exported adds the exported names at a file's top level. A group of constants
// or of variables counts as one: it is read as one.
func exported(t *testing.T, path string, names map[string]bool) {
	for _, decl := range parse(t, path).Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Recv == nil && d.Name.IsExported() {
				names[d.Name.Name] = true
			}
		case *ast.GenDecl:
			group := ""
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					if s.Name.IsExported() {
						names[s.Name.Name] = true
					}
				case *ast.ValueSpec:
					for _, n := range s.Names {
						if n.IsExported() && group == "" {
							group = n.Name
						}
					}
				}
			}
			if group != "" {
				names[group] = true
			}
		}
	}
}

func parse(t *testing.T, path string) *ast.File {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
	require.NoError(t, err)
	return f
}

func TestFileLength(t *testing.T) {
	files(t, func(path string, test bool) {
		if n := bytes.Count(read(t, path), []byte("\n")); !test && n > maxLines {
			t.Errorf("%s has %d lines, at most %d", short(path), n, maxLines)
		}
	})
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	src, err := os.ReadFile(path)
	require.NoError(t, err)
	return src
}

// A file is named after what is in it.
var vagueName = regexp.MustCompile(`(^|[_.-])(utils?|helpers?|common|misc|stuff|base|impl|final|draft|wip|temp|copy|new|old)([_.-]|$)`)

func TestFileNames(t *testing.T) {
	cmd := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	cmd.Dir = filepath.Join("..", "..")
	out, err := cmd.Output()
	require.NoError(t, err)
	for name := range strings.SplitSeq(strings.TrimRight(string(out), "\x00"), "\x00") {
		if strings.Contains(name, "testdata/fuzz/") {
			continue
		}
		for part := range strings.SplitSeq(name, "/") {
			if vagueName.MatchString(part) {
				t.Errorf("%s: %q says nothing about what is in it", name, part)
			}
		}
	}
}

// Work that isn't done belongs in the tracker.
var unfinished = regexp.MustCompile(`\b(TO` + `DO|FIX` + `ME|X` + `XX|HA` + `CK)\b`)

func TestUnfinished(t *testing.T) {
	files(t, func(path string, test bool) {
		for i, line := range strings.Split(string(read(t, path)), "\n") {
			if unfinished.MatchString(line) {
				t.Errorf("%s:%d: %s", short(path), i+1, strings.TrimSpace(line))
			}
		}
	})
}

// TestLibrariesReturnErrors: a library doesn't end the process, write to the
// log or panic, except that a broken invariant of its own code may panic with a
// text that begins with "internal error:".
func TestLibrariesReturnErrors(t *testing.T) {
	for _, p := range all(t) {
		if p.Name == "main" || under(p.rel(), "cmd", "bench", "internal", "image/imagetest") {
			continue
		}
		for _, path := range p.sources() {
			ast.Inspect(parse(t, path), func(n ast.Node) bool {
				if call, ok := n.(*ast.CallExpr); ok {
					if what := ends(call); what != "" {
						t.Errorf("%s calls %s", short(path), what)
					}
				}
				return true
			})
		}
	}
}

func ends(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		if f.Name == "panic" && !strings.HasPrefix(leading(call.Args[0]), "internal error:") {
			return "panic without \"internal error:\""
		}
	case *ast.SelectorExpr:
		if x, ok := f.X.(*ast.Ident); ok {
			switch name := x.Name + "." + f.Sel.Name; {
			case name == "os.Exit", x.Name == "log", name == "fmt.Print", name == "fmt.Println", name == "fmt.Printf":
				return name
			}
		}
	}
	return ""
}

// leading returns the text that an expression begins with, as far as it is
// written there.
func leading(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		s, _ := strconv.Unquote(e.Value)
		return s
	case *ast.BinaryExpr:
		return leading(e.X)
	case *ast.CallExpr: // fmt.Sprintf, errors.New
		if len(e.Args) > 0 {
			return leading(e.Args[0])
		}
	}
	return ""
}

func TestGofmt(t *testing.T) {
	files(t, func(path string, _ bool) {
		src := read(t, path)
		got, err := format.Source(src)
		require.NoError(t, err, path)
		if !bytes.Equal(src, got) {
			t.Errorf("%s isn't gofmt'ed", short(path))
		}
	})
}

func TestVet(t *testing.T) {
	if testing.Short() {
		return
	}
	cmd := exec.Command("go", "vet", "./...")
	cmd.Dir = filepath.Join("..", "..")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
}
