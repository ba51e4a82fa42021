package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
)

// Commands of the img scripts, beside those of runScripts.

// both [-KEY...] PEER -- ARGS: PEER ARGS and nvtool img ARGS print the same
// JSON, apart from these keys. PEER is a program and its first arguments.
func cmdBoth(ts *testscript.TestScript, neg bool, args []string) {
	var drop []string
	for len(args) > 0 && strings.HasPrefix(args[0], "-") {
		drop = append(drop, args[0][1:])
		args = args[1:]
	}
	i := slices.Index(args, "--")
	if i < 0 {
		ts.Fatalf("no --")
	}
	own := append([]string{"img"}, args[i+1:]...)
	peer := slices.Concat(args[:i], args[i+1:])
	want := runJSON(ts, drop, peer[0], peer[1:]...)
	got := runJSON(ts, drop, "nvtool", own...)
	same := reflect.DeepEqual(want, got)
	if same == neg {
		w, _ := json.MarshalIndent(want, "", " ")
		g, _ := json.MarshalIndent(got, "", " ")
		ts.Fatalf("the same: %t\n%s\n%s\n%s\n%s", same, strings.Join(peer, " "), w, strings.Join(own, " "), g)
	}
}

func runJSON(ts *testscript.TestScript, drop []string, name string, args ...string) any {
	// An exit code that isn't 0 may be what a check has found.
	if err := ts.Exec(name, args...); err != nil {
		if e := (*exec.ExitError)(nil); !asExit(err, &e) {
			ts.Check(err)
		}
	}
	var v any
	out := ts.ReadFile("stdout")
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		ts.Fatalf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, ts.ReadFile("stderr"))
	}
	return without(v, drop)
}

func asExit(err error, e **exec.ExitError) bool {
	x, ok := err.(*exec.ExitError)
	*e = x
	return ok
}

// without drops keys at any depth.
func without(v any, keys []string) any {
	switch v := v.(type) {
	case map[string]any:
		for _, k := range keys {
			delete(v, k)
		}
		for k := range v {
			v[k] = without(v[k], keys)
		}
	case []any:
		for i := range v {
			v[i] = without(v[i], keys)
		}
	}
	return v
}

// disk FILE SIZE: bytes with runs of data and zeros, the same each time.
func cmdDisk(ts *testscript.TestScript, _ bool, args []string) {
	size := number(ts, args[1])
	p := derive(7, 7, len(args[0]), size)
	for off := int64(0); off < size; {
		n := min(int64(p[off])<<9+1000, size-off)
		if p[off]&1 == 0 {
			clear(p[off : off+n])
		}
		off += n
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), p, 0o600))
}

// nothing FOLDER: no temporary file is left in it.
func cmdNothing(ts *testscript.TestScript, _ bool, args []string) {
	found, err := filepath.Glob(ts.MkAbs(filepath.Join(args[0], ".*")))
	ts.Check(err)
	for _, f := range found {
		if b := filepath.Base(f); b != ".tmp" { // that one is the script's
			ts.Fatalf("left behind: %s", f)
		}
	}
}

// same NEW PEERS: nvtool's image is as qemu-img made one, for qemu-img.
func cmdSame(ts *testscript.TestScript, _ bool, args []string) {
	drop := []string{"filename", "actual-size"}
	info := func(file string) any {
		return runJSON(ts, drop, "qemu-img", "info", "-f", "qcow2", "--output=json", file)
	}
	if want, got := info(args[1]), info(args[0]); !reflect.DeepEqual(want, got) {
		ts.Fatalf("want %v\ngot  %v", want, got)
	}
	ts.Check(ts.Exec("qemu-img", "check", "-f", "qcow2", args[0]))
	ts.Check(ts.Exec("qemu-img", "compare", "-s", "-f", "qcow2", "-F", "qcow2", args[0], args[1]))
}

// sound QCOW2 RAW: the image has the content, and nothing is wrong with it.
func cmdSound(ts *testscript.TestScript, _ bool, args []string) {
	ts.Check(ts.Exec("qemu-img", "check", "-f", "qcow2", args[0]))
	ts.Check(ts.Exec("qemu-img", "compare", "-f", "qcow2", "-F", "raw", args[0], args[1]))
	ts.Check(ts.Exec("nvtool", "img", "compare", "-f", "qcow2", "-F", "raw", args[0], args[1]))
}

// samejson A B [KEY...]: two files hold the same JSON, apart from these keys.
func cmdSameJSON(ts *testscript.TestScript, _ bool, args []string) {
	var v [2]any
	for i := range v {
		ts.Check(json.Unmarshal([]byte(ts.ReadFile(args[i])), &v[i]))
		v[i] = without(v[i], args[2:])
	}
	if !reflect.DeepEqual(v[0], v[1]) {
		a, _ := json.Marshal(v[0])
		b, _ := json.Marshal(v[1])
		ts.Fatalf("%s\n%s\n%s\n%s", args[0], a, args[1], b)
	}
}
