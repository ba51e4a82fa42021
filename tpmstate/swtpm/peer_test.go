package swtpm_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/swtpm"
)

// A peer is a swtpm process.
type peer struct {
	t    *testing.T
	cmd  *exec.Cmd
	sock string
	out  bytes.Buffer
}

// startPeer starts swtpm on a place and sends Startup.
func startPeer(t *testing.T, dir string, args ...string) *peer {
	t.Helper()
	p := &peer{t: t, sock: filepath.Join(dir, "data.sock")}
	p.cmd = exec.Command("swtpm", append([]string{"socket", "--server", "type=unixio,path=" + p.sock,
		"--ctrl", "type=unixio,path=" + p.sock + ".ctrl", "--flags", "not-need-init,startup-clear"}, args...)...)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	require.NoError(t, p.cmd.Start())
	t.Cleanup(func() { p.cmd.Process.Kill(); p.cmd.Wait() })
	return p
}

// do sends a command and returns the response's code. TPM_RC_RETRY is what it
// says: the first command that needs the lockout's state gets it.
func (p *peer) do(cmd []byte) uint32 {
	p.t.Helper()
	for range 10 {
		if r := p.once(cmd); r != 0x922 {
			return r
		}
	}
	return 0x922
}

func (p *peer) once(cmd []byte) uint32 {
	p.t.Helper()
	var conn net.Conn
	require.Eventually(p.t, func() (ok bool) {
		var err error
		conn, err = net.Dial("unix", p.sock)
		return err == nil
	}, 10*time.Second, 10*time.Millisecond, "swtpm doesn't answer: %s", &p.out)
	defer conn.Close()
	_, err := conn.Write(cmd)
	require.NoError(p.t, err)
	rsp := make([]byte, 4096)
	n, err := conn.Read(rsp)
	require.NoError(p.t, err)
	require.GreaterOrEqual(p.t, n, 10)
	return uint32(rsp[6])<<24 | uint32(rsp[7])<<16 | uint32(rsp[8])<<8 | uint32(rsp[9])
}

func (p *peer) stop() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, "swtpm_ioctl", "-s", "--unix", p.sock+".ctrl").CombinedOutput()
	require.NoError(p.t, err, "%s%s", out, &p.out)
	p.cmd.Wait()
}

// NV commands (TPM 2.0 Library, part 3, 31), for owner auth and an index of 8
// bytes.
var (
	nvDefine = []byte{0x80, 2, 0, 0, 0, 45, 0, 0, 1, 0x2a, 0x40, 0, 0, 1, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0,
		0, 0, 0, 14, 1, 0x50, 0, 0x16, 0, 11, 0, 4, 0, 4, 0, 0, 0, 8}
	nvWrite = append([]byte{0x80, 2, 0, 0, 0, 45, 0, 0, 1, 0x37, 1, 0x50, 0, 0x16, 1, 0x50, 0, 0x16, 0, 0, 0, 9,
		0x40, 0, 0, 9, 0, 0, 0, 0, 0, 0, 8}, "NVSTORE!\x00\x00"...)
	nvReadPublic = []byte{0x80, 1, 0, 0, 0, 14, 0, 0, 1, 0x69, 1, 0x50, 0, 0x16}
)

func init() {
	nvWrite[5] = byte(len(nvWrite))
}

// TestPeer: states that swtpm makes, in both backends and under each kind of
// key, are read; what is written from them is what swtpm goes on with.
func TestPeer(t *testing.T) {
	hex := "00112233445566778899aabbccddeeff"
	for name, c := range map[string]struct {
		opt, secret string
		key         func() (*swtpm.Key, error)
	}{
		"plain": {key: func() (*swtpm.Key, error) { return nil, nil }},
		"aes-128-hex": {"file=%s,mode=aes-cbc,format=hex", hex, func() (*swtpm.Key, error) {
			return swtpm.ParseKey([]byte(hex))
		}},
		"aes-256-binary": {"file=%s,mode=aes-256-cbc,format=binary", hex, func() (*swtpm.Key, error) {
			return swtpm.NewKey([]byte(hex))
		}},
		"pbkdf2": {"pwdfile=%s,mode=aes-256-cbc", "secret\n", func() (*swtpm.Key, error) {
			return swtpm.KeyOfPassphrase([]byte("secret\n"), swtpm.PBKDF2, 32)
		}},
		"sha512": {"pwdfile=%s,mode=aes-cbc,kdf=sha512", "secret", func() (*swtpm.Key, error) {
			return swtpm.KeyOfPassphrase([]byte("secret"), swtpm.SHA512, 16)
		}},
	} {
		for _, backend := range []string{"dir", "file"} {
			t.Run(name+"-"+backend, func(t *testing.T) {
				testPeer(t, backend, c.opt, c.secret, c.key)
			})
		}
	}
}

func testPeer(t *testing.T, backend, opt, secret string, makeKey func() (*swtpm.Key, error)) {
	dir := t.TempDir()
	path := filepath.Join(dir, "lin")
	args := []string{"--tpm2", "--tpmstate", "dir=" + dir}
	if backend == "file" {
		args[2] = "backend-uri=file://" + path
	}
	if opt != "" {
		require.NoError(t, os.WriteFile(filepath.Join(dir, "key"), []byte(secret), 0o600))
		args = append(args, "--key", fmt.Sprintf(opt, filepath.Join(dir, "key")))
	}
	k, err := makeKey()
	require.NoError(t, err)
	p := startPeer(t, dir, args...)
	require.Zero(t, p.do(nvDefine))
	require.Zero(t, p.do(nvWrite))
	p.stop()

	open := func(key *swtpm.Key) (tpmstate.Home, error) {
		if backend == "file" {
			return swtpm.OpenLinear(path, &swtpm.HomeOptions{Key: key})
		}
		return swtpm.OpenDir(dir, &swtpm.HomeOptions{Key: key})
	}
	file := filepath.Join(dir, swtpm.FileName(tpmstate.TPM20, tpmstate.Permanent))
	if backend == "file" {
		file = path
	}
	before, err := os.ReadFile(file)
	require.NoError(t, err)
	h, err := open(k)
	require.NoError(t, err)
	state, err := h.Load(tpmstate.Permanent)
	require.NoError(t, err)
	require.Contains(t, string(state), "NVSTORE!")
	require.Equal(t, opt == "", strings.Contains(string(before), "NVSTORE!"))

	// The same state, written by us: of a plain one each byte is the same.
	require.NoError(t, h.Store(tpmstate.Permanent, state))
	after, err := os.ReadFile(file)
	require.NoError(t, err)
	if opt == "" && backend == "dir" {
		require.Equal(t, before, after)
	}
	if opt == "" && backend == "file" {
		// swtpm leaves old bytes behind the data in a section.
		a, err := swtpm.ParseLinear(before)
		require.NoError(t, err)
		b, err := swtpm.ParseLinear(after)
		require.NoError(t, err)
		require.Equal(t, a, b)
	}
	if opt != "" {
		checkSameBytes(t, h, state, before, file, backend)
	}
	require.NoError(t, h.Close())
	p = startPeer(t, dir, args...)
	require.Zero(t, p.do(nvReadPublic), "swtpm lost the index: %s", &p.out)
	p.stop()
}

// checkSameBytes: with the IV that swtpm took, an encrypted state is written byte
// for byte as swtpm did.
func checkSameBytes(t *testing.T, h tpmstate.Home, state, before []byte, file, backend string) {
	t.Helper()
	stateOf := func(p []byte) []byte {
		if backend == "dir" {
			return p
		}
		l, err := swtpm.ParseLinear(p)
		require.NoError(t, err)
		return l.Files[0] // the permanent state
	}
	b, err := swtpm.Parse(stateOf(before))
	require.NoError(t, err)
	swtpm.WithIVOf(t, b, func() { require.NoError(t, h.Store(tpmstate.Permanent, state)) })
	after, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, stateOf(before), stateOf(after))
}

// TestHeaderFlips: no byte of what swtpm puts in front of a state can change
// unnoticed.
func TestHeaderFlips(t *testing.T) {
	dir := t.TempDir()
	p := startPeer(t, dir, "--tpm2", "--tpmstate", "dir="+dir)
	require.Zero(t, p.do(nvDefine))
	p.stop()
	name := filepath.Join(dir, swtpm.FileName(tpmstate.TPM20, tpmstate.Permanent))
	good, err := os.ReadFile(name)
	require.NoError(t, err)
	for off := range 16 {
		bad := bytes.Clone(good)
		bad[off] ^= 0x40
		_, ours := swtpm.OpenFile(bad, nil)
		require.Error(t, ours, "byte %d", off)
	}
}
