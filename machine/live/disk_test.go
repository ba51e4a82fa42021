package live_test

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/internal/qmp"
	"nvstore.dev/machine/live"
)

// things are all nodes, objects and devices that a machine has.
func things(t *testing.T, c *qmp.Client) (all []string) {
	t.Helper()
	var nodes []struct {
		Name string `json:"node-name"`
	}
	require.NoError(t, c.Do(ctx, "query-named-block-nodes", map[string]bool{"flat": true}, &nodes))
	for _, n := range nodes {
		all = append(all, "node "+n.Name)
	}
	for _, path := range []string{"/objects", "/machine/peripheral"} {
		var list []struct{ Name string }
		require.NoError(t, c.Do(ctx, "qom-list", map[string]string{"path": path}, &list))
		for _, x := range list {
			all = append(all, path+"/"+x.Name)
		}
	}
	slices.Sort(all)
	return all
}

// proxy passes QMP on, but answers the nth command of those that add something
// with an error.
func proxy(t *testing.T, qemu string, n int) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "p")
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		ours, err := l.Accept()
		if err != nil {
			return
		}
		defer ours.Close()
		theirs, err := net.Dial("unix", qemu)
		if err != nil {
			return
		}
		defer theirs.Close()
		var out sync.Mutex
		go func() {
			answers := bufio.NewReader(theirs)
			for {
				line, err := answers.ReadBytes('\n')
				if err != nil {
					return
				}
				out.Lock()
				ours.Write(line)
				out.Unlock()
			}
		}()
		commands := bufio.NewScanner(ours)
		for seen := 0; commands.Scan(); {
			var c struct {
				Execute string
				ID      json.RawMessage
			}
			_ = json.Unmarshal(commands.Bytes(), &c)
			if strings.HasSuffix(c.Execute, "add") {
				if seen++; seen == n {
					out.Lock()
					fmt.Fprintf(ours, `{"error": {"class": "GenericError", "desc": "injected"}, "id": %s}`+"\n", c.ID)
					out.Unlock()
					continue
				}
			}
			io.WriteString(theirs, commands.Text()+"\n")
		}
	}()
	return path
}

// createTimed makes an encrypted image. On a busy machine, QEMU often can't tell
// how long a key derivation takes.
func createTimed(t *testing.T, args ...string) {
	t.Helper()
	for range 50 {
		out, err := exec.Command("qemu-img", append([]string{"create", "-q"}, args...)...).CombinedOutput()
		if err == nil {
			return
		}
		require.Contains(t, string(out), "Unable to get accurate CPU usage")
	}
	require.Fail(t, "QEMU never can time a key derivation")
}

// An encrypted disk is added whole, with a device, or nothing of it is: a step
// that QEMU refuses, each step in turn, leaves no node, secret or device.
func TestAddDisk(t *testing.T) {
	v := newVM(t)
	pass := filepath.Join(v.dir, "pass")
	require.NoError(t, os.WriteFile(pass, []byte("correct horse"), 0o600))
	disks := map[string]string{"qcow2": filepath.Join(v.dir, "e.qcow2"), "luks": filepath.Join(v.dir, "e.luks")}
	createTimed(t, "-f", "qcow2", "--object", "secret,id=s,file="+pass,
		"-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", disks["qcow2"], "4M")
	createTimed(t, "-f", "luks", "--object", "secret,id=s,file="+pass, "-o", "key-secret=s,iter-time=10", disks["luks"], "4M")
	v.start()
	c := v.monitor(".1")
	before := things(t, c)
	add := func(qmp string, d live.Disk) error {
		m, err := live.Connect(ctx, qmp, nil)
		require.NoError(t, err)
		defer m.Close()
		return m.AddDisk(ctx, &d)
	}
	for format, path := range disks {
		good := live.Disk{Image: path, Format: format, Node: "extra-" + format, Secret: []byte("correct horse"), Device: map[string]any{"driver": "virtio-blk-pci", "share-rw": true}}
		for n := range 4 {
			require.ErrorContains(t, add(proxy(t, v.qmp+".2", n+1), good), "injected", "step %d", n+1)
			require.Equal(t, before, things(t, c), "%s: step %d failed", format, n+1)
		}
		for name, change := range map[string]func(*live.Disk){
			"WrongKey":   func(d *live.Disk) { d.Secret = []byte("battery staple") },
			"NoFile":     func(d *live.Disk) { d.Image += ".none" },
			"NoDevice":   func(d *live.Disk) { d.Device = map[string]any{"driver": "no-such-device"} },
			"NameTaken":  func(d *live.Disk) { d.Node = "guest" },
			"BadName":    func(d *live.Disk) { d.Node = "0 0" },
			"Locked":     func(d *live.Disk) { d.Image, d.Format, d.Secret = v.disk, "qcow2", nil },
			"OtherForm":  func(d *live.Disk) { d.Format = map[string]string{"qcow2": "luks", "luks": "qcow2"}[format] },
			"PlainAsked": func(d *live.Disk) { d.Format, d.Secret = "luks", nil },
		} {
			if format == "luks" && name != "WrongKey" {
				continue // nothing of it is about the format
			}
			d := good
			change(&d)
			require.Error(t, add(v.qmp, d), name)
			require.Equal(t, before, things(t, c), "%s: %s", format, name)
		}
		bad := good
		bad.Format = "vmdk"
		require.ErrorIs(t, add(v.qmp, bad), image.ErrUnsupported)
		require.NoError(t, add(v.qmp, good))
		now := things(t, c)
		for _, thing := range []string{"node extra-" + format, "/objects/extra-" + format + "-secret", "/machine/peripheral/extra-" + format} {
			require.Contains(t, now, thing)
		}
		var said string
		require.NoError(t, c.Do(ctx, "human-monitor-command", map[string]string{"command-line": `qemu-io extra-` + format + ` "write -P 7 0 64k"`}, &said))
		before = now
	}
	v.quit()
	run(t, "qemu-io", "--object", "secret,id=s,file="+pass, "--image-opts", "-c", "read -P 7 0 64k",
		"driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename="+disks["qcow2"])
}
