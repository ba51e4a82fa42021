package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/console"
	"nvstore.dev/internal/qmp"
	"nvstore.dev/machine"
	"nvstore.dev/vpd/uefi"
)

// A firmwareRun is a machine whose firmware has its variables in a live extent
// in the tail of the machine's disk.
type firmwareRun struct {
	t    *testing.T
	disk string
	con  *console.Console
	qmp  *qmp.Client
}

// nvtool runs a command line, which must succeed.
func (r *firmwareRun) nvtool(args ...string) []byte {
	r.t.Helper()
	var out, errs bytes.Buffer
	require.Zero(r.t, run(args, &out, &errs), "nvtool %q: %s", args, &errs)
	return out.Bytes()
}

// boot starts the machine with what nvtool vm args prints, and waits for the
// firmware's shell.
func (r *firmwareRun) boot() {
	r.t.Helper()
	var m struct{ Args []string }
	require.NoError(r.t, json.Unmarshal(r.nvtool("vm", "args", r.disk, "--json"), &m))
	con, err := console.Start("qemu-system-x86_64", append([]string{"-machine", "q35,accel=tcg", "-m", "128", "-display", "none",
		"-nodefaults", "-net", "none", "-serial", "stdio", "-qmp", "unix:" + r.disk + ".qmp2,server=on,wait=off"}, m.Args...)...)
	require.NoError(r.t, err)
	r.t.Cleanup(con.Close)
	r.con = con
	require.NoError(r.t, con.WaitFor("or any other key to continue"))
	require.NoError(r.t, con.Type("\r"))
	require.NoError(r.t, con.WaitFor("Shell> "))
	r.qmp, err = qmp.Dial(context.Background(), "unix:"+r.disk+".qmp", nil)
	require.NoError(r.t, err)
	r.t.Cleanup(func() { _ = r.qmp.Close() })
}

func (r *firmwareRun) shell(command string) string {
	r.t.Helper()
	text, err := r.con.Run(command, "Shell> ")
	require.NoError(r.t, err)
	return text
}

const runGUID = "6e767374-6f72-4520-8067-6f6c64656e31"

func (r *firmwareRun) set(name, value string) {
	r.t.Helper()
	r.shell("setvar " + name + " -guid " + runGUID + ` -nv -bs =S"` + value + `"`)
}

// vm takes or loads a snapshot of the machine as it runs.
func (r *firmwareRun) vm(verb, tag string) {
	r.t.Helper()
	r.nvtool("vm", verb, r.disk, tag, "--qmp", r.disk+".qmp2")
}

func (r *firmwareRun) quit() {
	r.t.Helper()
	require.NoError(r.t, r.qmp.Do(context.Background(), "quit", nil, nil))
	require.NoError(r.t, r.con.Wait())
}

// export has QEMU export the state over NBD, and returns the URI.
func (r *firmwareRun) export() string {
	r.t.Helper()
	sock := r.disk + ".nbd"
	require.NoError(r.t, r.qmp.Do(context.Background(), "nbd-server-start", map[string]any{
		"addr": map[string]any{"type": "unix", "data": map[string]any{"path": sock}}, "max-connections": 1}, nil))
	require.NoError(r.t, r.qmp.Do(context.Background(), "block-export-add", map[string]any{
		"type": "nbd", "id": "e", "node-name": machine.StateNode, "name": machine.StateNode, "writable": true}, nil))
	return "nbd+unix:///" + machine.StateNode + "?socket=" + sock
}

// running reads the blob while the machine has it.
func (r *firmwareRun) running(uri string) map[string]string {
	r.t.Helper()
	return r.parse(r.nvtool("get", uri, "uefi/vars", "--unverified"))
}

func (r *firmwareRun) parse(image []byte) map[string]string {
	r.t.Helper()
	list, err := uefi.Variables(image)
	require.NoError(r.t, err)
	vars := make(map[string]string)
	for _, v := range list {
		vars[v.Name] = string(v.Data)
	}
	return vars
}

// variables takes the blob back from the machine, and reads it.
func (r *firmwareRun) variables() map[string]string {
	r.t.Helper()
	r.nvtool("live", "detach", r.disk)
	r.nvtool("check", r.disk)
	r.nvtool("vpd", "inspect", r.disk, "uefi/vars")
	return r.parse(r.nvtool("get", r.disk, "uefi/vars"))
}

// OVMF boots from pflash whose variables are a live extent in the tail of the
// machine's disk. What it stores is in the blob, and is reverted with the
// machine: by loading a snapshot while it runs, which brings back pflash's own
// copy with the memory, and by reverting the disk while it is off.
func TestOVMFOnLiveExtent(t *testing.T) {
	if testing.Short() {
		return // two boots of a firmware, of which the race detector learns nothing
	}
	dir, err := os.MkdirTemp("", "ovmf") // a socket's path must be short
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &firmwareRun{t: t, disk: filepath.Join(dir, "vm.qcow2")}
	r.nvtool("vm", "create", r.disk, "--disk", "1M", "--max-disk", "1T", "--state", "16M")
	r.nvtool("put", r.disk, "tpm/permanent", filepath.Join("..", "..", "fixtures", "tpm", "tpm2-00.permall"))
	r.nvtool("put", r.disk, "uefi/vars", "/usr/share/OVMF/OVMF_VARS_4M.fd", "--live")
	r.nvtool("live", "attach", r.disk)

	r.boot()
	r.set("NvOne", "first")
	// Other blobs, through QEMU, beside the firmware that writes to its own.
	uri := r.export()
	r.nvtool("put", uri, "net0/nvm", "liveovmf_test.go")
	require.Equal(t, "first", r.running(uri)["NvOne"], "the blob as the firmware has it at this moment")
	r.vm("snapshot", "a")
	r.nvtool("rm", uri, "net0/nvm")
	r.set("NvOne", "second")
	r.set("NvTwo", "new")
	shown := r.shell("dmpstore -guid " + runGUID)
	require.Contains(t, shown, "NvTwo")
	require.Contains(t, shown, "second")
	require.Equal(t, "second", r.running(uri)["NvOne"])
	r.vm("revert", "a")
	r.nvtool("get", uri, "net0/nvm")
	require.Equal(t, "first", r.running(uri)["NvOne"], "the image has them, too")
	shown = r.shell("dmpstore -guid " + runGUID)
	require.NotContains(t, shown, "NvTwo", "the firmware has the variables of the snapshot")
	require.Contains(t, shown, "first")
	r.set("NvThree", "later")
	r.quit()
	require.Contains(t, string(r.nvtool("live", "ls", r.disk)), "attached", "the machine is gone, and nobody has taken the blob back")
	got := r.variables()
	require.Equal(t, []string{"first", "", "later"}, []string{got["NvOne"], got["NvTwo"], got["NvThree"]})
	require.NotEmpty(t, got["BootOrder"], "the firmware's own are there")

	// The machine is off: the snapshot is of a time when it ran.
	r.nvtool("vm", "revert", r.disk, "a")
	require.Contains(t, string(r.nvtool("live", "ls", r.disk)), "attached")
	got = r.variables()
	require.Equal(t, []string{"first", "", ""}, []string{got["NvOne"], got["NvTwo"], got["NvThree"]})
	r.nvtool("live", "attach", r.disk)
	r.boot()
	shown = r.shell("dmpstore -guid " + runGUID)
	require.Contains(t, shown, "first")
	require.NotContains(t, shown, "NvThree")
	r.set("NvOne", "third")
	r.quit()
	require.Equal(t, "third", strings.TrimRight(r.variables()["NvOne"], "\x00"))
}
