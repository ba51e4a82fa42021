package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/nvstore"
)

// The test binary is nvtpm too, so that tests have processes to kill.
func TestMain(m *testing.M) {
	if os.Getenv("NVTPM_BE_NVTPM") != "" {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Setenv("NVTPM_BE_NVTPM", "1") // for what the tests start
	os.Exit(testMain(m))
}

// shared is a folder for what several tests use.
var shared string

func testMain(m *testing.M) int {
	var err error
	if shared, err = os.MkdirTemp("", "nvtpm"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(shared)
	return m.Run()
}

var rawKey = bytes.Repeat([]byte{0x5a}, 32)

// newStore makes a store, sealed with rawKey if asked, and returns its path
// and the options that open it.
func newStore(t testing.TB, sealed bool) []string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "vm.qcow2")
	o := &nvstore.CreateOptions{}
	if sealed {
		var err error
		o.Key, err = keyslot.RawKey(rawKey)
		require.NoError(t, err)
	}
	s, err := nvstore.Create(path, o)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	if !sealed {
		return []string{"--store", path}
	}
	key := filepath.Join(dir, "key")
	require.NoError(t, os.WriteFile(key, rawKey, 0o600))
	return []string{"--store", path, "--key-file", key}
}

// A process is an nvtpm, or a swtpm.
type process struct {
	t    testing.TB
	cmd  *exec.Cmd
	out  syncBuffer
	dir  string // of its sockets
	done chan struct{}
	err  error
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// start runs "PROGRAM socket ARGS" with DIR in them replaced by a new folder.
// A program "" is nvtpm.
func start(t testing.TB, program string, args ...string) *process {
	t.Helper()
	// Not t.TempDir: the path of a socket is short.
	dir, err := os.MkdirTemp("", "nvtpm")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &process{t: t, dir: dir, done: make(chan struct{})}
	if program == "" {
		program, err = os.Executable()
		require.NoError(t, err)
	}
	full := []string{"socket"}
	for _, a := range args {
		full = append(full, strings.ReplaceAll(a, "DIR", dir))
	}
	p.cmd = exec.Command(program, full...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	require.NoError(t, p.cmd.Start())
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(p.kill)
	return p
}

func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// stop ends it as a host does.
func (p *process) stop() {
	p.t.Helper()
	p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		require.NoError(p.t, p.err, "%s", &p.out)
	case <-time.After(20 * time.Second):
		p.t.Fatalf("it doesn't end: %s", &p.out)
	}
}

// code waits for the end and returns the exit code.
func (p *process) code() int {
	p.t.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(20 * time.Second):
		p.t.Fatalf("it doesn't end: %s", &p.out)
		return 0
	}
}

// dial connects to a unix socket in its folder, once that is there.
func (p *process) dial(name string) net.Conn {
	p.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		conn, err := net.Dial("unix", filepath.Join(p.dir, name))
		if err == nil {
			conn.SetDeadline(time.Now().Add(60 * time.Second))
			return conn
		}
		select {
		case <-p.done:
			p.t.Fatalf("it ended: %v\n%s", p.err, &p.out)
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			p.t.Fatalf("%v\n%s", err, &p.out)
		}
	}
}

// tpm sends commands to a data channel.
type tpm struct {
	t    testing.TB
	conn net.Conn
}

// raw executes a command.
func (c *tpm) raw(cmd []byte) ([]byte, error) {
	if _, err := c.conn.Write(cmd); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	n, err := c.conn.Read(b)
	if err != nil {
		return nil, err
	}
	if n < headerLen {
		return nil, fmt.Errorf("a response of %d bytes", n)
	}
	return b[:n], nil
}

// Send makes tpm a transport of go-tpm, which has no TPM_RC_RETRY.
func (c *tpm) Send(cmd []byte) ([]byte, error) {
	for {
		rsp, err := c.raw(cmd)
		if err != nil || code(rsp) != 0x922 {
			return rsp, err
		}
	}
}

func code(rsp []byte) uint32 {
	return uint32(rsp[6])<<24 | uint32(rsp[7])<<16 | uint32(rsp[8])<<8 | uint32(rsp[9])
}

// open starts nvtpm on a store, with a running TPM 2.0, and connects.
func open(t testing.TB, store []string, more ...string) (*process, *tpm) {
	t.Helper()
	args := append([]string{"--tpm2", "--server", "type=unixio,path=DIR/data", "--flags", "startup-clear"}, store...)
	p := start(t, "", append(args, more...)...)
	return p, &tpm{t, p.dial("data")}
}

// tool runs one of tpm2-tools.
func tool(t testing.TB, tcti, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI="+tcti, "TSS2_LOG=all+NONE")
	cmd.Dir = t.TempDir()
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s %s: %s", name, strings.Join(args, " "), out)
	return string(out)
}

// freePort finds two ports in a row.
func freePort(t testing.TB) int {
	t.Helper()
	for range 100 {
		a, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		port := a.Addr().(*net.TCPAddr).Port
		b, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port+1))
		a.Close()
		if err == nil {
			b.Close()
			return port
		}
	}
	t.Fatal("no two free ports in a row")
	return 0
}

const (
	waitLong  = 20 * time.Second
	waitShort = 10 * time.Millisecond
)
