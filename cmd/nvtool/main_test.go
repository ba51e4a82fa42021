package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"

	"nvstore.dev/fixtures"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"nvtool": main}) }

// homes are where a store may lie. A script whose first line is "# homes" runs
// on each of them, with its location in $IMG.
var homes = []struct{ name, location, format string }{
	{"qcow2", "vm.qcow2", "qcow2"},
	{"raw", "vm.raw", "raw"},
	{"pebble", "pebble:machines/6e76746f-6f6c-4000-8000-000000000001", ""},
}

func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/script/*.txtar")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	var all, once []string
	for _, f := range files {
		text, err := os.ReadFile(f)
		require.NoError(t, err)
		if bytes.HasPrefix(text, []byte("# homes\n")) {
			all = append(all, f)
		} else {
			once = append(once, f)
		}
	}
	t.Run("once", func(t *testing.T) { runScripts(t, once, "vm.qcow2", "qcow2") })
	for _, h := range homes {
		t.Run(h.name, func(t *testing.T) { runScripts(t, all, h.location, h.format) })
	}
}

// builtNvtpm is the folder with the program that runs TPMs for nvtool.
var builtNvtpm = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "nvtpm")
	if err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-o", dir, "../nvtpm")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building nvtpm: %w: %s", err, out)
	}
	return dir, nil
})

func runScripts(t *testing.T, files []string, location, format string) {
	testscript.Run(t, testscript.Params{Files: files, RequireExplicitExec: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("IMG", location)
			e.Setenv("FORMAT", format)
			tpm, err := fixtures.FS.ReadFile(fixtures.TPM)
			if err != nil {
				return err
			}
			nvtpm, err := builtNvtpm()
			if err != nil {
				return err
			}
			e.Setenv("PATH", nvtpm+string(filepath.ListSeparator)+e.Getenv("PATH"))
			for name, content := range map[string][]byte{
				"pass": []byte("correct horse\n"), "wrong": []byte("battery staple\n"), "new": []byte("a third one\n"),
				"pass0": []byte("correct horse"), "other0": []byte("yet another"),
				"key": bytes.Repeat([]byte{0x5a}, 32), "key2": []byte(strings.Repeat("a5", 32) + "\n"),
				"tpm.bin": tpm,
			} {
				if err := os.WriteFile(filepath.Join(e.WorkDir, name), content, 0o600); err != nil {
					return err
				}
			}
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exit": cmdExit, "create": cmdCreate, "digest": cmdDigest, "unchanged": cmdUnchanged, "poke": cmdPoke,
			"flip": cmdFlip, "resize": cmdResize, "region": cmdRegion, "waitfor": cmdWaitfor, "random": cmdRandom,
			"json": cmdJSON, "nofiles": cmdNofiles,
			"both": cmdBoth, "disk": cmdDisk, "nothing": cmdNothing, "same": cmdSame, "sound": cmdSound, "samejson": cmdSameJSON,
		}})
}

// exit CODE nvtool ARGS...: nvtool must end with this exit code, and say why
// on standard error in the form that is promised.
func cmdExit(ts *testscript.TestScript, neg bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if e := (*exec.ExitError)(nil); errors.As(err, &e) {
		got = e.ExitCode()
	} else {
		ts.Check(err)
	}
	stderr := ts.ReadFile("stderr")
	if got != want || neg {
		ts.Fatalf("exit code %d, want %d\n%s", got, want, stderr)
	}
	if got != 0 && !strings.Contains(stderr, "nvtool: error: ") && !strings.Contains(stderr, `{"error":`) {
		ts.Fatalf("no error is printed:\n%s", stderr)
	}
}

// create ARGS...: nvtool create $IMG, in its format.
func cmdCreate(ts *testscript.TestScript, _ bool, args []string) {
	args = append([]string{"create", ts.Getenv("IMG")}, args...)
	if f := ts.Getenv("FORMAT"); f != "" {
		args = append(args, "-f", f)
	}
	ts.Check(ts.Exec("nvtool", args...))
}

func digest(ts *testscript.TestScript, file string) string {
	p, err := os.ReadFile(ts.MkAbs(file))
	ts.Check(err)
	sum := sha256.Sum256(p)
	return hex.EncodeToString(sum[:])
}

// digest VAR FILE; unchanged VAR FILE. A Pebble folder has no bytes to compare:
// opening it moves them.
func cmdDigest(ts *testscript.TestScript, _ bool, args []string) {
	if !strings.HasPrefix(args[1], "pebble:") {
		ts.Setenv(args[0], digest(ts, args[1]))
	}
}

func cmdUnchanged(ts *testscript.TestScript, _ bool, args []string) {
	if !strings.HasPrefix(args[1], "pebble:") && ts.Getenv(args[0]) != digest(ts, args[1]) {
		ts.Fatalf("%s was changed", args[1])
	}
}

func number(ts *testscript.TestScript, s string) int64 {
	n, err := strconv.ParseInt(s, 0, 64)
	ts.Check(err)
	return n
}

// poke FILE OFFSET HEX
func cmdPoke(ts *testscript.TestScript, _ bool, args []string) {
	p, err := hex.DecodeString(args[2])
	ts.Check(err)
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	_, err = f.WriteAt(p, number(ts, args[1]))
	ts.Check(err)
}

// flip FILE OFFSET: one bit of that byte.
func cmdFlip(ts *testscript.TestScript, _ bool, args []string) {
	f, err := os.OpenFile(ts.MkAbs(args[0]), os.O_RDWR, 0)
	ts.Check(err)
	defer f.Close()
	p := make([]byte, 1)
	_, err = f.ReadAt(p, number(ts, args[1]))
	ts.Check(err)
	p[0] ^= 0x10
	_, err = f.WriteAt(p, number(ts, args[1]))
	ts.Check(err)
}

// resize FILE SIZE, which makes a FILE that is missing.
func cmdResize(ts *testscript.TestScript, _ bool, args []string) {
	if _, err := os.Stat(ts.MkAbs(args[0])); err != nil {
		ts.Check(os.WriteFile(ts.MkAbs(args[0]), nil, 0o600))
	}
	ts.Check(os.Truncate(ts.MkAbs(args[0]), number(ts, args[1])))
}

// random FILE SIZE: bytes that don't repeat, the same each time.
func cmdRandom(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), derive(1, 1, len(args[0]), number(ts, args[1])), 0o600))
}

// region VAR IMAGE KIND [BLOB]: the byte where the newest region of that kind
// begins.
func cmdRegion(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(ts.Exec("nvtool", "map", "--json", "-q", args[1]))
	var m mapFacts
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &m))
	best := mapRegion{Generation: -1}
	for _, r := range m.Regions {
		if r.Kind == args[2] && (len(args) < 4 || r.Blob == args[3]) && r.Generation > best.Generation {
			best = r
		}
	}
	if best.Generation < 0 {
		ts.Fatalf("no such region")
	}
	ts.Setenv(args[0], strconv.FormatInt(best.Offset, 10))
}

// waitfor FILE: until it is there.
func cmdWaitfor(ts *testscript.TestScript, _ bool, args []string) {
	for range 2000 {
		if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	ts.Fatalf("%s didn't appear", args[0])
}

// json FIELD VALUE: what the last command printed has it. FIELD is a path such
// as key_slots.0.type; len at its end counts.
func cmdJSON(ts *testscript.TestScript, neg bool, args []string) {
	var v any
	ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &v))
	for part := range strings.SplitSeq(args[0], ".") {
		switch x := v.(type) {
		case map[string]any:
			y, ok := x[part]
			if part == "len" {
				y, ok = float64(len(x)), true
			}
			if !ok {
				ts.Fatalf("no %q", part)
			}
			v = y
		case []any:
			if part == "len" {
				v = float64(len(x))
				break
			}
			i, err := strconv.Atoi(part)
			ts.Check(err)
			if i >= len(x) {
				ts.Fatalf("%d elements", len(x))
			}
			v = x[i]
		default:
			ts.Fatalf("%q of what has no fields", part)
		}
	}
	text, err := json.Marshal(v)
	ts.Check(err)
	got := strings.Trim(string(text), `"`)
	if (got == args[1]) == neg {
		ts.Fatalf("%s is %s", args[0], got)
	}
}

// nofiles PATTERN: nothing was left behind.
func cmdNofiles(ts *testscript.TestScript, _ bool, args []string) {
	found, err := filepath.Glob(ts.MkAbs(args[0]))
	ts.Check(err)
	if len(found) > 0 {
		ts.Fatalf("left behind: %v", found)
	}
}
