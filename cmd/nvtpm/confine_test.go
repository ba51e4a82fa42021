package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/cmd/nvtpm/internal/sandbox"
)

// TestSandbox: a running nvtpm has given up what it can, on each thread. (All
// other tests run in the sandbox, so what is needed is there.)
func TestSandbox(t *testing.T) {
	key := newStore(t, true)
	p, c := open(t, key, "--sandbox", "require")
	nvDefine(t, c, index, 16)
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.cmd.Process.Pid))
	require.NoError(t, err)
	require.Greater(t, len(tasks), 1)
	for _, task := range tasks {
		status, err := os.ReadFile(task)
		require.NoError(t, err)
		require.Contains(t, string(status), "NoNewPrivs:\t1\n")
		require.Contains(t, string(status), "Seccomp:\t2\n")
	}
	p.stop()

	// What it says of itself, and what it can't do.
	out := shown(t, append(key, "--ctrl", "type=tcp,port=2322")...)
	require.True(t, out.Applied.NoNewPrivs)
	require.Equal(t, sandbox.Kill, out.Applied.Seccomp)
	require.Equal(t, sandbox.Version(), out.Applied.Landlock)
	require.Equal(t, []uint16{2322}, out.Allowed.Bind)
	require.Contains(t, out.Allowed.Write, key[1])
	require.NotContains(t, out.Allowed.Write, filepath.Dir(key[1]))
	t.Log(out.Tried)
	require.Contains(t, out.Tried["open a netlink socket"], "refused")
	if out.Applied.Landlock >= 4 {
		require.Contains(t, out.Tried["open /etc/passwd"], "refused")
		require.Contains(t, out.Tried["listen on a TCP port"], "refused")
	}

	// Switched off, nothing is.
	out = shown(t, append(key, "--sandbox", "off")...)
	require.Equal(t, "done", out.Tried["open /etc/passwd"])
	require.Equal(t, sandbox.None, out.Applied.Seccomp)
	require.NotEmpty(t, out.Applied.Missing)
	out = shown(t, append(key, "--seccomp", "action=none")...)
	require.Equal(t, sandbox.None, out.Applied.Seccomp)

	for _, args := range [][]string{{"--sandbox", "maybe"}, {"--seccomp", "action=shoot"}} {
		p := start(t, "", append(append(key, "--server", "type=unixio,path=DIR/data"), args...)...)
		require.Equal(t, 2, p.code(), "%v: %s", args, &p.out)
	}
}

type shownSandbox struct {
	Applied sandbox.Report
	Allowed sandbox.Plan
	Tried   map[string]string
}

func shown(t *testing.T, args ...string) (out shownSandbox) {
	t.Helper()
	p := start(t, "", append([]string{"--tpm2", "--print-sandbox"}, args...)...)
	require.Zero(t, p.code(), "%s", &p.out)
	require.NoError(t, json.Unmarshal([]byte(p.out.String()), &out), "%s", &p.out)
	return out
}

// TestRunAs: the process is another user's, its files too, and what that user
// can't read it can't.
func TestRunAs(t *testing.T) {
	if os.Geteuid() != 0 {
		p := start(t, "", "--tpm2", "--tpmstate", "backend-uri=memory://", "--server", "type=unixio,path=DIR/data", "--runas", "root")
		require.NotZero(t, p.code())
		require.Contains(t, p.out.String(), "becoming user root")
		return
	}
	// The program and its files, where nobody finds them.
	dir, err := os.MkdirTemp("", "nvtpm")
	require.NoError(t, err)
	defer os.RemoveAll(dir)
	require.NoError(t, os.Chmod(dir, 0o755))
	program := dir + "/nvtpm"
	self, err := os.Executable()
	require.NoError(t, err)
	out, err := exec.Command("install", "-m", "755", self, program).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.NoError(t, os.Mkdir(dir+"/run", 0o755))
	require.NoError(t, os.Chown(dir+"/run", 65534, 65534))
	store := newStore(t, false)[1]
	image := dir + "/run/vm.qcow2"
	out, err = exec.Command("install", "-o", "nobody", "-m", "600", store, image).CombinedOutput()
	require.NoError(t, err, "%s", out)
	p := start(t, program, "--tpm2", "--runas", "nobody", "--store", image, "--server", "type=unixio,path="+dir+"/run/data",
		"--log", "file="+dir+"/log", "--pid", "file="+dir+"/run/pid", "--flags", "startup-clear")
	p.dir = dir + "/run"
	c := &tpm{t, p.dial("data")}
	nvDefine(t, c, index, 16)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	require.NoError(t, err)
	require.Contains(t, string(status), "Uid:\t65534\t65534\t65534\t65534\n")
	require.Contains(t, string(status), "CapEff:\t0000000000000000\n")
	require.Contains(t, string(status), "Groups:\t65534 \n")
	p.stop()
	require.NoFileExists(t, dir+"/run/pid")
	log, err := os.ReadFile(dir + "/log")
	require.NoError(t, err)
	require.Contains(t, string(log), "user: nobody")

	p = start(t, program, "--tpm2", "--runas", "nobody", "--store", store, "--server", "type=unixio,path="+dir+"/run/data")
	require.NotZero(t, p.code())
	require.Contains(t, p.out.String(), "permission denied")
	require.False(t, strings.Contains(p.out.String(), "serving"))
}

// TestFilesOf: the files of a location, and the one that QEMU has at the bottom
// of its node, which is what snapshots lock.
func TestFilesOf(t *testing.T) {
	for location, want := range map[string]struct {
		file string
		all  []string
	}{
		"vm.qcow2": {"vm.qcow2", []string{"vm.qcow2"}},
		"driver=qcow2,file.driver=file,file.filename=a,,b,backing.file.filename=c":           {"a,b", []string{"a,b", "c"}},
		"driver=qcow2,backing.file.filename=c,file.filename=a":                               {"a", []string{"c", "a"}},
		"driver=raw,offset=0,size=4096,file.driver=qcow2,file.file.filename=a":               {"a", []string{"a"}},
		"driver=raw,file.driver=luks,file.key-secret=k,file.file.filename=a,file.detached=0": {"a", []string{"a"}},
		"driver=pebble,dir=d": {"", []string{"d"}},
	} {
		require.Equal(t, want.file, fileOf(location), location)
		require.Equal(t, want.all, filesOf(location), location)
	}
	require.Empty(t, fileOf("pebble:d/uuid"))
}
