//go:build linux

package main

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// A screen is a pseudo terminal, and all that was shown on it.
type screen struct {
	t         *testing.T
	ptmx, tty *os.File
	mu        sync.Mutex
	shown     bytes.Buffer
}

func newScreen(t *testing.T) *screen {
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { ptmx.Close() })
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0))
	require.NoError(t, unix.IoctlSetWinsize(int(ptmx.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: 100}))
	tty, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	t.Cleanup(func() { tty.Close() })
	s := &screen{t: t, ptmx: ptmx, tty: tty}
	go func() {
		buf := make([]byte, 4096)
		for {
			k, err := ptmx.Read(buf)
			s.mu.Lock()
			s.shown.Write(buf[:k])
			s.mu.Unlock()
			if err != nil {
				return
			}
		}
	}()
	return s
}

func (s *screen) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.shown.String()
}

// start runs nvtool with the terminal as its controlling one. What of out is
// nil is the terminal.
func (s *screen) start(dir string, args ...string) *exec.Cmd {
	c := exec.Command("nvtool", args...)
	c.Dir = dir
	c.Env = append(os.Environ(), "TERM=xterm-256color")
	c.Stdin, c.Stdout, c.Stderr = s.tty, s.tty, s.tty
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	require.NoError(s.t, c.Start())
	kill := time.AfterFunc(30*time.Second, func() { c.Process.Kill() })
	s.t.Cleanup(func() { kill.Stop() })
	return c
}

func (s *screen) waitFor(text string) {
	require.Eventually(s.t, func() bool { return strings.Contains(s.text(), text) }, 20*time.Second, 2*time.Millisecond, "%q isn't shown", text)
}

func (s *screen) echo() bool {
	a, err := unix.IoctlGetTermios(int(s.tty.Fd()), unix.TCGETS)
	require.NoError(s.t, err)
	return a.Lflag&unix.ECHO != 0
}

// answer types a line once the echo is off.
func (s *screen) answer(prompt, line string) {
	s.waitFor(prompt)
	require.Eventually(s.t, func() bool { return !s.echo() }, 20*time.Second, time.Millisecond)
	_, err := s.ptmx.WriteString(line)
	require.NoError(s.t, err)
}

func exitCode(err error) int {
	if e, ok := err.(*exec.ExitError); ok {
		return e.ExitCode()
	}
	return map[bool]int{true: 0, false: -1}[err == nil]
}

func TestPrompts(t *testing.T) {
	dir := t.TempDir()
	s := newScreen(t)
	c := s.start(dir, "create", "a.qcow2", "--passphrase", "--kdf-memory", "19M", "--kdf-time", "1")
	s.answer("Passphrase: ", "secret words\n")
	s.answer("Again: ", "secret words\n")
	require.NoError(t, c.Wait(), s.text())
	require.NotContains(t, s.text(), "secret words")

	// Asked for without a flag, where the key is needed.
	s = newScreen(t)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "bin"), []byte{0, 1, 2, 0xff}, 0o600))
	c = s.start(dir, "put", "a.qcow2", "bin", "bin")
	s.answer("Passphrase for a.qcow2: ", "secret words\n")
	require.NoError(t, c.Wait(), s.text())

	s = newScreen(t)
	c = s.start(dir, "get", "a.qcow2", "bin")
	s.answer("Passphrase for a.qcow2: ", "wrong words\n")
	require.Equal(t, 11, exitCode(c.Wait()), s.text())

	// What isn't text stays off the terminal.
	s = newScreen(t)
	c = s.start(dir, "get", "a.qcow2", "bin")
	s.answer("Passphrase for a.qcow2: ", "secret words\n")
	require.Equal(t, 2, exitCode(c.Wait()))
	s.waitFor("-o FILE")

	// Tables and colours are for terminals.
	s = newScreen(t)
	require.NoError(t, s.start(dir, "ls", "-l", "a.qcow2").Wait())
	s.waitFor("┌")
	s = newScreen(t)
	require.NoError(t, s.start(dir, "map", "a.qcow2").Wait())
	s.waitFor("\x1b[38;5;160m█\x1b[0m  roots")
	require.NoError(t, s.start(dir, "info", "a.qcow2").Wait())
	require.NoError(t, s.start(dir, "check", "a.qcow2").Wait())

	// key rm asks.
	s = newScreen(t)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "pass"), []byte("secret words\n"), 0o600))
	c = s.start(dir, "key", "rm", "a.qcow2", "0", "--passphrase-file", "pass")
	s.waitFor("Remove key slot 0")
	_, err := s.ptmx.WriteString("n\n")
	require.NoError(t, err)
	require.Equal(t, 1, exitCode(c.Wait()))
	s.waitFor("nothing was removed")
}

func TestInterruptAtPrompt(t *testing.T) {
	dir := t.TempDir()
	s := newScreen(t)
	c := s.start(dir, "create", "a.qcow2", "--passphrase")
	s.answer("Passphrase: ", "half\x03")
	require.Equal(t, 130, exitCode(c.Wait()), s.text())
	require.True(t, s.echo(), "the terminal's echo is still off")
	left, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

// An interrupt in the middle of a put leaves the store as it was.
func TestInterruptPut(t *testing.T) {
	dir := t.TempDir()
	img := filepath.Join(dir, "a.raw")
	require.NoError(t, exec.Command("nvtool", "create", img, "-f", "raw").Run())
	before, err := os.ReadFile(img)
	require.NoError(t, err)
	c := exec.Command("nvtool", "put", img, "x")
	in, err := c.StdinPipe()
	require.NoError(t, err)
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	require.NoError(t, c.Start())
	_, err = in.Write(make([]byte, 3<<20))
	require.NoError(t, err)
	require.NoError(t, c.Process.Signal(os.Interrupt))
	// The read that waits for input goes on until there is some.
	io.WriteString(in, strings.Repeat("more", 1<<19))
	in.Close()
	require.Equal(t, 130, exitCode(c.Wait()), out.String())
	after, err := os.ReadFile(img)
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, after))
	text, err := exec.Command("nvtool", "check", img).CombinedOutput()
	require.NoError(t, err, "%s", text)
}
