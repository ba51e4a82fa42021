package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The guest: Debian's kernel, and as its only program testdata/guest, which
// does what lines on a serial port say.

// guestFiles are the kernel and the initramfs, which is made once.
var guestFiles = sync.OnceValues(func() (files [2]string, err error) {
	kernels, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil || len(kernels) == 0 {
		return files, errors.Join(err, errors.New("no kernel of linux-image-cloud-amd64; scripts/setup-debian.sh installs it"))
	}
	kernel := slices.Max(kernels)
	version := strings.TrimPrefix(kernel, "/boot/vmlinuz-")
	program := filepath.Join(shared, "init")
	build := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "./testdata/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		return files, fmt.Errorf("%w: %s", err, out)
	}
	var b bytes.Buffer
	add := func(name string, mode uint32, path string) {
		var p []byte
		if path != "" {
			var e error
			p, e = os.ReadFile(path)
			err = errors.Join(err, e)
		}
		cpio(&b, name, mode, p)
	}
	add("init", 0o100755, program)
	add("modules", 0o40755, "")
	list, err := modulesOf(version, "virtio_pci", "virtio_blk", "efivarfs")
	if err != nil {
		return files, err
	}
	for i, path := range list {
		add(fmt.Sprintf("modules/%02d-%s", i, filepath.Base(path)), 0o100644, path)
	}
	cpio(&b, "TRAILER!!!", 0, nil)
	if err != nil {
		return files, err
	}
	files = [2]string{kernel, filepath.Join(shared, "initrd")}
	return files, os.WriteFile(files[1], b.Bytes(), 0o600)
})

// cpio adds a file to an archive as the kernel unpacks it
// (Documentation/driver-api/early-userspace/buffer-format.rst).
func cpio(b *bytes.Buffer, name string, mode uint32, p []byte) {
	pad := func() { b.Write(make([]byte, -b.Len()&3)) }
	b.WriteString("070701")
	for _, v := range []uint32{0, mode, 0, 0, 1, 0, uint32(len(p)), 0, 0, 0, 0, uint32(len(name) + 1), 0} {
		fmt.Fprintf(b, "%08x", v)
	}
	b.WriteString(name + "\x00")
	pad()
	b.Write(p)
	pad()
}

// modulesOf returns the files of modules and of what they need, in the order
// in which they load.
func modulesOf(version string, names ...string) ([]string, error) {
	top := "/lib/modules/" + version
	p, err := os.ReadFile(top + "/modules.dep")
	if err != nil {
		return nil, err
	}
	var list []string
	for _, name := range names {
		found := false
		for line := range strings.Lines(string(p)) {
			file, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
			if filepath.Base(file) != name+".ko" {
				continue
			}
			found = true
			need := strings.Fields(deps)
			slices.Reverse(need)
			for _, f := range append(need, file) {
				if f = top + "/" + f; !slices.Contains(list, f) {
					list = append(list, f)
				}
			}
		}
		if !found {
			return nil, fmt.Errorf("%s has no module %s", top, name)
		}
	}
	return list, nil
}

// A guest is the program in the machine.
type guest struct {
	t    testing.TB
	m    *machine
	conn net.Conn
	in   *bufio.Reader
}

// guestArgs are those of a machine with the guest.
func guestArgs(t testing.TB, dir string) []string {
	t.Helper()
	files, err := guestFiles()
	require.NoError(t, err)
	return []string{"-m", "192", "-kernel", files[0], "-initrd", files[1], "-append", "console=ttyS0 quiet panic=-1 no_timer_check",
		"-serial", "file:" + dir + "/console",
		"-chardev", "socket,id=guest,path=" + dir + "/guest,server=on,wait=off", "-serial", "chardev:guest"}
}

// meet connects to the guest of a machine. Booting says that it is ready.
func meet(t testing.TB, m *machine) *guest {
	t.Helper()
	conn := m.dial("guest")
	return &guest{t, m, conn, bufio.NewReader(conn)}
}

// text waits for a line from the guest.
func (g *guest) text() (string, error) {
	g.conn.SetDeadline(time.Now().Add(2 * time.Minute))
	s, err := g.in.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("%w; QEMU: %s; console: %s", err, &g.m.out, g.console())
	}
	return strings.TrimSpace(s), nil
}

// console is what the kernel, and the guest, have said.
func (g *guest) console() []byte {
	p, _ := os.ReadFile(g.m.dir + "/console")
	return p
}

// line waits for what came of a command.
func (g *guest) line() (string, error) {
	s, err := g.text()
	if err != nil {
		return "", err
	}
	if out, ok := strings.CutPrefix(s, "ok"); ok {
		return strings.TrimSpace(out), nil
	}
	return "", fmt.Errorf("the guest says: %s", s)
}

// ready waits until it has booted. Firmware may write to the same port.
func (g *guest) ready() {
	g.t.Helper()
	for {
		s, err := g.text()
		require.NoError(g.t, err)
		if strings.HasSuffix(s, "ok ready") {
			return
		}
		require.NotContains(g.t, s, "error ")
	}
}

// try has the guest do something.
func (g *guest) try(command string) (string, error) {
	if _, err := fmt.Fprintln(g.conn, command); err != nil {
		return "", err
	}
	return g.line()
}

// do has the guest do what can't fail.
func (g *guest) do(format string, args ...any) string {
	g.t.Helper()
	out, err := g.try(fmt.Sprintf(format, args...))
	require.NoError(g.t, err, format, args)
	return out
}

// reboot has it boot once more.
func (g *guest) reboot() {
	g.t.Helper()
	_, err := fmt.Fprintln(g.conn, "reboot")
	require.NoError(g.t, err)
	g.ready()
}

// TestGuest: Linux finds what it wrote to the TPM's NV memory after a reboot,
// a revert, and a migration.
func TestGuest(t *testing.T) {
	store := newStore(t, true)
	ours := func(more ...string) *process {
		p := start(t, "", append(append([]string{"--tpm2", "--ctrl", "type=unixio,path=DIR/ctrl", "--migration", "release-lock-outgoing"}, store...), more...)...)
		p.dial("ctrl").Close()
		return p
	}
	p := ours()
	m := launch(t, &config{ctrl: p.dir + "/ctrl", frontend: "tpm-crb", guest: true})
	g := meet(t, m)
	g.ready()
	g.do("define 16")
	g.do("write %x", "written before   "[:16])
	g.do("extend 16")
	want, measured := g.do("read 16"), g.do("pcr 16")
	require.Equal(t, fmt.Sprintf("%x", "written before   "[:16]), want)

	// Back to a snapshot.
	m.hmp("savevm s")
	g.do("write %x", "written after    "[:16])
	g.do("extend 16")
	require.NotEqual(t, want, g.do("read 16"))
	require.NotEqual(t, measured, g.do("pcr 16"))
	m.hmp("loadvm s")
	require.Equal(t, want, g.do("read 16"))
	require.Equal(t, measured, g.do("pcr 16"))

	// Another boot.
	g.reboot()
	require.Equal(t, want, g.do("read 16"))
	require.Equal(t, zeroPCR, g.do("pcr 16"))

	// To another host, which has the image next.
	g.do("extend 16")
	stream := filepath.Join(t.TempDir(), "stream")
	m.migrate(stream)
	require.Zero(t, p.code(), "%s", &p.out)
	p = ours("--migration", "incoming,release-lock-outgoing")
	m = arrive(t, &config{ctrl: p.dir + "/ctrl", frontend: "tpm-crb", disk: m.disk, guest: true}, stream)
	g = meet(t, m)
	require.Equal(t, want, g.do("read 16"))
	require.Equal(t, measured, g.do("pcr 16"))
	g.do("write %x", "migrated         "[:16])
	m.quit()
	require.Zero(t, p.code(), "%s", &p.out)
	p, c := open(t, store)
	require.Equal(t, "migrated         "[:16], string(nvRead(t, c, guestIndex, 16)))
	p.stop()
}

const guestIndex = 0x01500010
