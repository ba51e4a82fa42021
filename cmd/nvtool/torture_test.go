package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func envInt(name string, otherwise int) int {
	if n, err := strconv.Atoi(os.Getenv(name)); err == nil && n > 0 {
		return n
	}
	return otherwise
}

// TestTortureKill kills a process in the middle of its transactions, again and
// again, and demands each time that nothing that was acknowledged is lost.
func TestTortureKill(t *testing.T) {
	kills := envInt("NVSTORE_KILLS", 50)
	seed := uint64(envInt("NVSTORE_SEED", int(time.Now().UnixNano()>>10)))
	t.Logf("%d kills, seed %d: NVSTORE_SEED=%d NVSTORE_KILLS=%d go test -run TestTortureKill ./cmd/nvtool", kills, seed, seed, kills)
	for i, h := range homes {
		t.Run(h.name, func(t *testing.T) {
			n := kills * 2 / 5 // of raw and of qcow2
			if h.format == "" {
				n = kills - 2*n
			}
			tortureKill(t, h.location, h.format, n, rand.New(rand.NewPCG(seed, uint64(i))))
		})
	}
}

func tortureKill(t *testing.T, location, format string, kills int, rng *rand.Rand) {
	dir := t.TempDir()
	nvtool := func(args ...string) *exec.Cmd {
		c := exec.Command("nvtool", append(args, "--key-file", "key")...)
		c.Dir = dir
		return c
	}
	must := func(args ...string) string {
		out, err := nvtool(args...).CombinedOutput()
		require.NoError(t, err, "nvtool %v: %s", args, out)
		return string(out)
	}
	require.NoError(t, os.WriteFile(filepath.Join(dir, "key"), bytes.Repeat([]byte{7}, 32), 0o600))
	create := []string{"create", location}
	if format != "" {
		create = append(create, "-f", format)
	}
	must(create...)
	for i := range kills {
		c := nvtool("torture", location, "--seconds", "60", "--record", "rec", "--seed", fmt.Sprint(rng.Uint64()))
		var out bytes.Buffer
		c.Stdout, c.Stderr = &out, &out
		require.NoError(t, c.Start())
		// Some die while they open the store.
		time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
		require.NoError(t, c.Process.Kill())
		require.EqualError(t, c.Wait(), "signal: killed", "kill %d: %s", i, &out)
		if _, err := os.Stat(filepath.Join(dir, "rec")); err == nil {
			must("torture", location, "--verify", "--record", "rec")
		}
	}
	check := []string{"check", location}
	if format == "qcow2" {
		check = append(check, "--repair-leaks") // a kill may leave some
	}
	must(check...)
	must("check", location)
	t.Logf("%d kills: %s", kills, must("torture", location, "--verify", "--record", "rec"))
	if format == "qcow2" {
		out, err := exec.Command("qemu-img", "check", filepath.Join(dir, location)).CombinedOutput()
		require.NoError(t, err, "qemu-img check: %s", out)
	}
}

// A record whose content doesn't fit is found out, whatever is wrong.
func TestVerifyNotices(t *testing.T) {
	dir := t.TempDir()
	img, rec := filepath.Join(dir, "a.raw"), filepath.Join(dir, "rec")
	nvtool := func(args ...string) (int, string) {
		var out bytes.Buffer
		code := run(args, &out, &out)
		return code, out.String()
	}
	var code int
	var out string
	var lines [][]byte
	for len(lines) < 40 { // a busy disk does few in that time
		code, out = nvtool("torture", img, "--record", rec, "--create", "-f", "raw", "--seconds", "0.1", "--seed", "3")
		require.Zero(t, code, out)
		text, err := os.ReadFile(rec)
		require.NoError(t, err)
		lines = bytes.SplitAfter(text, []byte("\n"))
	}
	// As if the last acknowledged transaction had been lost: find one that
	// shows by itself.
	for cut := len(lines) - 3; cut > 10; cut -= 2 {
		short := bytes.Join(lines[:cut], nil)
		require.NoError(t, os.WriteFile(rec+"-short", short, 0o600))
		if code, out = nvtool("torture", img, "--record", rec+"-short", "--verify"); code == 26 {
			require.Contains(t, out, "after transaction")
			return
		}
		require.Zero(t, code, out)
	}
	t.Fatal("a store that is ahead of its record wasn't noticed")
}

// FuzzRecord: a record may be cut and damaged by the crash that it is for.
func FuzzRecord(f *testing.F) {
	f.Add([]byte("nvstore-torture 1 5\nbegin 1 put torture/1 100; write torture/1 50 100\nack 1\nbegin 2 delete torture/1\nvoid 2\nbegin 3 truncate torture/1 5; rename torture/1 torture/2\nack 3\n"))
	f.Add([]byte("nvstore-torture 1 5\nbegin 1 put a 1\n"))
	f.Add([]byte("nvstore-torture 1 x\n"))
	f.Fuzz(func(t *testing.T, p []byte) {
		r := &record{}
		if r.replay(bytes.NewReader(p)) != nil {
			return
		}
		require.LessOrEqual(t, r.whole, int64(len(p)))
		for _, b := range r.state {
			require.LessOrEqual(t, b.size, int64(2<<20))
		}
	})
}
