package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/internal/qtest"
)

// A nvDevice is a device of QEMU's that keeps bytes in a drive, by how a guest
// reads and writes them.
type nvDevice struct {
	name, binary string
	blob         string
	size         int64
	args         func(drive string) []string // drive is an option of -drive, without if=
	board        []string                    // the same without the drive
	open         func(t *testing.T, m *qtest.Machine) guest
	background   string // the drive, if a write goes on behind the guest's back
}

// guest is what runs on a machine, if there were one.
type guest interface {
	read(off, n int) ([]byte, error)
	write(off int, p []byte) error
}

var nvDevices = []nvDevice{
	{"at24c-eeprom", "qemu-system-arm", "i2c/3-0050/eeprom", 8192,
		func(drive string) []string {
			return []string{"-M", "ast2600-evb", "-drive", "if=none,id=nv," + drive,
				"-device", "at24c-eeprom,bus=aspeed.i2c.bus.3,address=0x50,drive=nv,rom-size=8192,id=nvdevice"}
		},
		[]string{"-M", "ast2600-evb"},
		func(t *testing.T, m *qtest.Machine) guest {
			b, err := m.AspeedI2C(3)
			require.NoError(t, err)
			return i2cGuest{b}
		}, ""},
	{"m25p80", "qemu-system-arm", "spi/0/flash", 128 << 10,
		func(drive string) []string {
			return []string{"-M", "ast2600-evb,fmc-model=m25p10", "-drive", "if=mtd," + drive}
		},
		[]string{"-M", "ast2600-evb,fmc-model=m25p10"},
		func(t *testing.T, m *qtest.Machine) guest {
			s, err := m.AspeedFMC()
			require.NoError(t, err)
			return flashGuest{s}
		}, "mtd0"},
	{"spapr-nvram", "qemu-system-ppc64", "spapr/nvram", 64 << 10,
		func(drive string) []string {
			return []string{"-M", "pseries", "-m", "256", "-drive", "if=pflash," + drive}
		},
		[]string{"-M", "pseries", "-m", "256"},
		func(_ *testing.T, m *qtest.Machine) guest { return rtasGuest{m} }, ""},
}

// i2cGuest is a driver of an EEPROM with two bytes of address.
type i2cGuest struct{ b *qtest.AspeedI2C }

func (g i2cGuest) read(off, n int) ([]byte, error) {
	return g.b.Read(0x50, []byte{byte(off >> 8), byte(off)}, n)
}

func (g i2cGuest) write(off int, p []byte) error {
	return g.b.Write(0x50, append([]byte{byte(off >> 8), byte(off)}, p...))
}

// flashGuest is a driver of a flash: writes clear bits.
type flashGuest struct{ s *qtest.AspeedSPI }

func (g flashGuest) read(off, n int) ([]byte, error) {
	return g.s.Transfer([]byte{3, byte(off >> 16), byte(off >> 8), byte(off)}, n)
}

func (g flashGuest) write(off int, p []byte) error {
	if _, err := g.s.Transfer([]byte{6}, 0); err != nil {
		return err
	}
	_, err := g.s.Transfer(append([]byte{2, byte(off >> 16), byte(off >> 8), byte(off)}, p...), 0)
	return err
}

// rtasGuest is a kernel on pseries, which has its NVRAM by calls to the firmware
// (PAPR+, nvram-fetch and nvram-store).
type rtasGuest struct{ m *qtest.Machine }

const (
	rtasArgs, rtasRets, rtasBuffer = 0x10000, 0x11000, 0x12000
)

func (g rtasGuest) call(name string, off, n int) error {
	for i, v := range []uint64{uint64(off), rtasBuffer, uint64(n)} {
		if err := g.m.WriteBytes(rtasArgs+4*uint64(i), []byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}); err != nil {
			return err
		}
	}
	if _, err := g.m.Do("rtas %s 3 %#x 2 %#x", name, rtasArgs, rtasRets); err != nil {
		return err
	}
	rets, err := g.m.ReadBytes(rtasRets, 8)
	if err != nil {
		return err
	}
	if want := []byte{0, 0, 0, 0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)}; !bytes.Equal(want, rets) {
		return fmt.Errorf("%s: % x", name, rets)
	}
	return nil
}

func (g rtasGuest) read(off, n int) ([]byte, error) {
	if err := g.call("nvram-fetch", off, n); err != nil {
		return nil, err
	}
	return g.m.ReadBytes(rtasBuffer, n)
}

func (g rtasGuest) write(off int, p []byte) error {
	if err := g.m.WriteBytes(rtasBuffer, p); err != nil {
		return err
	}
	return g.call("nvram-store", off, len(p))
}

// A server is a nvtool serve nbd.
type server struct {
	cmd *exec.Cmd
	err bytes.Buffer
}

// serve exports blobs of an image at a socket, until the test's end.
func serve(t *testing.T, img, sock string, args ...string) *server {
	pid := sock + ".pid"
	_ = os.Remove(pid)
	s := &server{cmd: exec.Command("nvtool", append([]string{"serve", "nbd", img, "--socket", sock, "--pid-file", pid, "-q"}, args...)...)}
	s.cmd.Stderr = &s.err
	require.NoError(t, s.cmd.Start())
	t.Cleanup(s.kill)
	require.Eventually(t, func() bool { _, err := os.Stat(pid); return err == nil }, 30*time.Second, time.Millisecond)
	return s
}

func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

func (s *server) stop(t *testing.T) {
	require.NoError(t, s.cmd.Process.Signal(os.Interrupt))
	require.NoError(t, s.cmd.Wait(), "%s", &s.err)
}

// shortDir is one whose name is short, for sockets.
func shortDir(t *testing.T) string {
	dir, err := os.MkdirTemp("", "nv")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func startDevice(t *testing.T, d nvDevice, drive string) (*qtest.Machine, guest) {
	m, err := qtest.Start(d.binary, append([]string{"-nodefaults"}, d.args(drive)...)...)
	require.NoError(t, err)
	t.Cleanup(func() { _ = m.Close() })
	return m, d.open(t, m)
}

func mustRead(t *testing.T, g guest, off int, want string) {
	t.Helper()
	got, err := g.read(off, len(want))
	require.NoError(t, err)
	require.Equal(t, want, string(got))
}

// A device of QEMU's over NBD, on a blob of a store that nvtool owns: it reads
// what nvtool put there, and writes through. With cache=writethrough what the
// guest wrote is durable when the device has answered: the server is killed
// then. Without, it is when QEMU flushes, as at its end. An m25p80 answers at
// once in any case.
func TestQEMUDevicesOverNBD(t *testing.T) {
	for _, d := range nvDevices {
		t.Run(d.name, func(t *testing.T) {
			dir := shortDir(t)
			img, sock := filepath.Join(dir, "vm.qcow2"), filepath.Join(dir, "s")
			content := bytes.Repeat([]byte{0xff}, int(d.size))
			copy(content[0x100:], "packed by nvtool")
			file := filepath.Join(dir, "content")
			require.NoError(t, os.WriteFile(file, content, 0o600))
			nvtool(t, "create", img)
			nvtool(t, "put", img, d.blob, file)
			drive := "format=raw,file.driver=nbd,file.server.type=unix,file.server.path=" + sock + ",file.export=" + d.blob

			// Killed right after the guest's write.
			s := serve(t, img, sock, "--blob", d.blob)
			m, g := startDevice(t, d, drive+",cache=writethrough")
			mustRead(t, g, 0x100, "packed by nvtool")
			require.NoError(t, g.write(0x200, []byte("by the guest")))
			mustRead(t, g, 0x200, "by the guest")
			if d.background != "" {
				_, err := m.HMP("qemu-io " + d.background + " flush")
				require.NoError(t, err)
			}
			s.kill()
			require.NoError(t, m.Close())
			copy(content[0x200:], "by the guest")
			require.True(t, bytes.Equal(content, nvtool(t, "get", img, d.blob)), "durable, and nothing else changed")

			// The same without cache=writethrough: the write is gone.
			s = serve(t, img, sock, "--blob", d.blob)
			m, g = startDevice(t, d, drive)
			require.NoError(t, g.write(0x300, []byte("not flushed")))
			s.kill()
			require.NoError(t, m.Close())
			require.True(t, bytes.Equal(content, nvtool(t, "get", img, d.blob)))

			// A new machine, which ends as it should.
			s = serve(t, img, sock, "--blob", d.blob)
			m, g = startDevice(t, d, drive)
			mustRead(t, g, 0x200, "by the guest")
			require.NoError(t, g.write(0x300, []byte("and again")))
			require.NoError(t, m.Quit())
			s.kill() // QEMU has flushed
			copy(content[0x300:], "and again")
			require.True(t, bytes.Equal(content, nvtool(t, "get", img, d.blob)))

			s = serve(t, img, sock, "--blob", d.blob)
			m, g = startDevice(t, d, drive)
			mustRead(t, g, 0x300, "and again")
			_, err := m.QMP("device_del", map[string]any{"id": "nvdevice"})
			require.Error(t, err, "it can't be unplugged")
			require.NoError(t, m.Quit())
			s.stop(t)
			nvtool(t, "check", img)
		})
	}
}
