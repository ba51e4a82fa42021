package tlspsk

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const timeout = 60 * time.Second

var testKey = bytes.Repeat([]byte{0x5a, 0xc3}, 16)

// program starts a program that ends with the test, and returns its ends.
func program(t *testing.T, name string, args ...string) (stdin io.WriteCloser, stdout *output) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := cmd.StdinPipe()
	require.NoError(t, err)
	stdout = &output{grown: make(chan struct{}, 1)}
	cmd.Stdout, cmd.Stderr = stdout, stdout
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%s said:\n%s", name, stdout.String())
		}
	})
	return stdin, stdout
}

// An output is what a program printed so far.
type output struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	grown chan struct{}
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case o.grown <- struct{}{}:
	default:
	}
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// has waits until the program has printed something.
func (o *output) has(t *testing.T, text string) {
	t.Helper()
	late := time.After(timeout)
	for !strings.Contains(o.String(), text) {
		select {
		case <-o.grown:
		case <-late:
			require.Fail(t, "not printed", "%q", text)
		}
	}
}

// keyFile is the file that psktool would make.
func keyFile(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "keys.psk")
	require.NoError(t, os.WriteFile(path, fmt.Appendf(nil, "alice:%x\n", testKey), 0o600))
	return path
}

// freePort returns a port that nobody listens on.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	return port
}

func dial(t *testing.T, port string) net.Conn {
	t.Helper()
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		nc, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			t.Cleanup(func() { nc.Close() })
			require.NoError(t, nc.SetDeadline(time.Now().Add(timeout)))
			return nc
		}
		require.Less(t, time.Since(begun), timeout)
	}
}

// gnutls is a priority string with PSK by (EC)DHE and more.
const gnutls = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+ECDHE-PSK:+PSK"

// Our client with the servers of others. GnuTLS' echoes lines.
func TestServersOfOthers(t *testing.T) {
	openssl := []string{"openssl", "s_server", "-quiet", "-nocert", "-tls1_3", "-psk_identity", "alice", "-psk", hex.EncodeToString(testKey), "-accept"}
	gnutlsServ := []string{"gnutls-serv", "--quiet", "--echo", "--pskpasswd", keyFile(t), "--port"}
	for name, c := range map[string]struct {
		command, more []string
		retries       bool
	}{
		"OpenSSL":                {command: openssl},
		"OpenSSL, ChaCha20":      {command: openssl, more: []string{"-ciphersuites", "TLS_CHACHA20_POLY1305_SHA256"}},
		"OpenSSL, retry":         {command: openssl, more: []string{"-groups", "P-256"}, retries: true},
		"OpenSSL, no middlebox":  {command: openssl, more: []string{"-no_middlebox"}},
		"GnuTLS":                 {command: gnutlsServ, more: []string{"--priority", gnutls}},
		"GnuTLS, retry":          {command: gnutlsServ, more: []string{"--priority", gnutls + ":-GROUP-ALL:+GROUP-SECP256R1"}, retries: true},
		"GnuTLS, ChaCha20":       {command: gnutlsServ, more: []string{"--priority", gnutls + ":-CIPHER-ALL:+CHACHA20-POLY1305"}},
		"GnuTLS, as nbdkit":      {command: gnutlsServ, more: []string{"--priority", "NORMAL:+ECDHE-PSK:+DHE-PSK:+PSK"}},
		"GnuTLS, server prefers": {command: gnutlsServ, more: []string{"--priority", gnutls + ":%SERVER_PRECEDENCE"}, retries: true}, // P-256
	} {
		t.Run(name, func(t *testing.T) {
			port := freePort(t)
			args := append(append([]string{}, c.command...), port)
			stdin, stdout := program(t, args[0], append(args[1:], c.more...)...)
			log := &tap{Conn: dial(t, port)}
			conn := Client(log, "alice", testKey)
			require.NoError(t, conn.Handshake())
			require.Equal(t, c.retries, bytes.Contains(log.got, []byte(retryRandom)))
			r := bufio.NewReader(conn)
			for i := range 3 {
				hello := fmt.Sprintf("hello %d\n", i)
				_, err := conn.Write([]byte(hello))
				require.NoError(t, err)
				if args[0] == "openssl" {
					stdout.has(t, hello)
					_, err = io.WriteString(stdin, hello)
					require.NoError(t, err)
				}
				line, err := r.ReadString('\n')
				require.NoError(t, err)
				require.Equal(t, hello, line)
				conn.rekey()
			}
			require.NoError(t, conn.Close())

			for _, other := range []*Conn{Client(dial(t, port), "alice", testKey[1:]), Client(dial(t, port), "bob", testKey)} {
				require.ErrorContains(t, other.Handshake(), "it may not know the identity, or have another key for it")
			}
		})
	}
}

// Our server with the clients of others.
func TestClientsOfOthers(t *testing.T) {
	openssl := []string{"openssl", "s_client", "-tls1_3", "-psk_identity", "alice", "-psk", hex.EncodeToString(testKey), "-connect"}
	gnutlsCli := []string{"gnutls-cli", "--pskusername", "alice", "--pskkey", hex.EncodeToString(testKey), "--inline-commands"}
	for name, c := range map[string]struct {
		command, more []string
		retries       bool
		rekey         string
	}{
		"OpenSSL":           {command: openssl, rekey: "K\n"},
		"OpenSSL, ChaCha20": {command: openssl, more: []string{"-ciphersuites", "TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256"}, rekey: "k\n"},
		"OpenSSL, retry":    {command: openssl, more: []string{"-groups", "P-521:P-256"}, retries: true},
		"OpenSSL, P-256":    {command: openssl, more: []string{"-groups", "P-256"}},
		"OpenSSL, bare":     {command: openssl, more: []string{"-no_middlebox"}},
		"GnuTLS":            {command: gnutlsCli, more: []string{"--priority", gnutls}, rekey: "^rekey^\n"},
		"GnuTLS, retry": {command: gnutlsCli, more: []string{"--single-key-share", "--priority", gnutls + ":-GROUP-ALL:+GROUP-SECP521R1:+GROUP-X25519"},
			retries: true},
		"GnuTLS, ChaCha20":   {command: gnutlsCli, more: []string{"--priority", gnutls + ":-CIPHER-ALL:+CHACHA20-POLY1305"}, rekey: "^rekey1^\n"},
		"GnuTLS, as libnbd":  {command: gnutlsCli, more: []string{"--priority", "NORMAL:-KX-ALL:+ECDHE-PSK:+DHE-PSK:+PSK"}},
		"GnuTLS, no 128 bit": {command: gnutlsCli, more: []string{"--priority", gnutls + ":-AES-128-GCM"}},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(t, err)
			defer l.Close()
			accept := func() (nc net.Conn, stdin io.Writer, stdout *output) {
				_, port, err := net.SplitHostPort(l.Addr().String())
				require.NoError(t, err)
				args := append(c.command[1:len(c.command):len(c.command)], c.more...)
				if c.command[0] == "openssl" {
					args = append(append(c.command[1:len(c.command):len(c.command)], "127.0.0.1:"+port), c.more...)
				} else {
					args = append(args, "--port", port, "127.0.0.1")
				}
				stdin, stdout = program(t, c.command[0], args...)
				nc, err = l.Accept()
				require.NoError(t, err)
				t.Cleanup(func() { nc.Close() })
				require.NoError(t, nc.SetDeadline(time.Now().Add(timeout)))
				return nc, stdin, stdout
			}
			nc, stdin, stdout := accept()
			log := &tap{Conn: nc}
			conn := Server(log, testKeys)
			require.NoError(t, conn.Handshake())
			r := bufio.NewReader(conn)
			ask := func() {
				_, err := io.WriteString(stdin, "hello server\n")
				require.NoError(t, err)
				line, err := r.ReadString('\n')
				require.NoError(t, err)
				require.Equal(t, "hello server\n", line)
				_, err = conn.Write([]byte("hello client\n"))
				require.NoError(t, err)
				stdout.has(t, "hello client\n")
			}
			ask()
			if c.rekey != "" {
				before := conn.in.secret
				_, err = io.WriteString(stdin, c.rekey)
				require.NoError(t, err)
				time.Sleep(100 * time.Millisecond) // commands are such only at the begin of what is read
				ask()
				require.NotEqual(t, before, conn.in.secret)
			}
			require.NoError(t, conn.Close())

			for _, keys := range []map[string][]byte{{"alice": testKey[1:]}, {"bob": testKey}} {
				nc, _, _ := accept()
				require.EqualError(t, Server(nc, keys).Handshake(), "decrypt_error: the client has no key of ours by the identity that it gives")
			}
		})
	}
}
