package nbd_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"nvstore.dev/image/nbd"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A peer is a server of somebody else's.
type peer struct {
	cmd  *exec.Cmd
	sock string
	out  bytes.Buffer

	ended <-chan struct{}
}

func (p *peer) uri(export string) string { return "nbd+unix:///" + export + "?socket=" + p.sock }

// start runs a server that listens on a unix socket, and waits for it.
func start(t *testing.T, sock, name string, args ...string) *peer {
	t.Helper()
	p := &peer{cmd: exec.Command(name, args...), sock: sock}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(t, p.cmd.Start(), name)
	ended := make(chan struct{})
	go func() {
		_ = p.cmd.Wait()
		close(ended)
	}()
	p.ended = ended
	t.Cleanup(p.kill)
	for begun := time.Now(); ; time.Sleep(2 * time.Millisecond) {
		select {
		case <-ended:
			require.FailNow(t, name+" ended", "%s", p.out.Bytes())
		default:
		}
		network, addr := "unix", sock
		if tcp, ok := strings.CutPrefix(sock, "tcp:"); ok {
			network, addr = "tcp", tcp
		}
		c, err := net.Dial(network, addr)
		if err == nil {
			c.Close()
			return p
		}
		require.Less(t, time.Since(begun), 20*time.Second, "%s doesn't listen", name)
	}
}

func (p *peer) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// socket returns a path short enough for a unix socket.
func socket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

func qemuNBD(t *testing.T, file string, args ...string) *peer {
	t.Helper()
	sock := socket(t)
	return start(t, sock, "qemu-nbd", append([]string{"-t", "-f", "raw", "-k", sock, "-e", "16", file}, args...)...)
}

func nbdkit(t *testing.T, args ...string) *peer {
	t.Helper()
	sock := socket(t)
	return start(t, sock, "nbdkit", append([]string{"-f", "-U", sock}, args...)...)
}

// blank makes a file of n zero bytes.
func blank(t *testing.T, n int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk")
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	require.NoError(t, os.Truncate(path, n))
	return path
}

func open(t *testing.T, uri string, o *nbd.Options) *nbd.Device {
	t.Helper()
	d, err := nbd.Open(context.Background(), uri, o)
	require.NoError(t, err)
	return d
}

func size(n int64) string { return strconv.FormatInt(n, 10) }
