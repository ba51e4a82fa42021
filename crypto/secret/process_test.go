package secret_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"nvstore.dev/crypto/secret"
)

// The tests below need a process of their own: one without a core limit that
// could be raised again, and one with a terminal.
func TestMain(m *testing.M) {
	switch os.Getenv("SECRET_TEST_CHILD") {
	case "harden":
		childHarden()
	case "prompt":
		s, err := secret.Prompt("Passphrase: ", os.Getenv("CONFIRM") != "")
		if err != nil {
			fmt.Printf("error: %v\n", err)
			os.Exit(0)
		}
		fmt.Printf("got %s\n", s.Bytes())
	default:
		os.Exit(m.Run())
	}
	os.Exit(0)
}

func childHarden() {
	if err := secret.Harden(); err != nil {
		fmt.Println("error:", err)
		return
	}
	var l unix.Rlimit
	unix.Getrlimit(unix.RLIMIT_CORE, &l)
	d, _ := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	fmt.Printf("core %d/%d dumpable %d\n", l.Cur, l.Max, d)
}

func TestHarden(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SECRET_TEST_CHILD=harden")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err)
	require.Equal(t, "core 0/0 dumpable 0\n", string(out))
}

// onTerminal runs the prompt in a session whose controlling terminal is a new
// pseudo terminal, types the lines, and returns the process's standard output
// and what the terminal showed.
func onTerminal(t *testing.T, confirm string, lines ...string) (stdout, screen string) {
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	defer ptmx.Close()
	n, err := unix.IoctlGetInt(int(ptmx.Fd()), unix.TIOCGPTN)
	require.NoError(t, err)
	require.NoError(t, unix.IoctlSetPointerInt(int(ptmx.Fd()), unix.TIOCSPTLCK, 0))
	tty, err := os.OpenFile("/dev/pts/"+strconv.Itoa(n), os.O_RDWR|unix.O_NOCTTY, 0)
	require.NoError(t, err)
	defer tty.Close()

	var out bytes.Buffer
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SECRET_TEST_CHILD=prompt", "CONFIRM="+confirm)
	cmd.Stdin, cmd.Stdout = tty, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	require.NoError(t, cmd.Start())
	kill := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer kill.Stop()

	var shown bytes.Buffer
	buf := make([]byte, 256)
	for _, line := range lines {
		for !bytes.HasSuffix(shown.Bytes(), []byte(": ")) {
			k, err := ptmx.Read(buf)
			require.NoError(t, err)
			shown.Write(buf[:k])
		}
		shown.WriteByte('|')
		// The echo goes off after the prompt is written.
		require.Eventually(t, func() bool {
			a, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
			return err == nil && a.Lflag&unix.ECHO == 0
		}, 10*time.Second, time.Millisecond)
		_, err = ptmx.WriteString(line)
		require.NoError(t, err)
	}
	require.NoError(t, cmd.Wait())
	k, err := ptmx.Read(buf)
	require.NoError(t, err)
	shown.Write(buf[:k])
	a, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	require.NoError(t, err)
	require.NotZero(t, a.Lflag&unix.ECHO, "echo was not restored")
	return out.String(), shown.String()
}

func TestPrompt(t *testing.T) {
	out, screen := onTerminal(t, "", "hunter2\n")
	require.Equal(t, "got hunter2\n", out)
	require.Equal(t, "Passphrase: |\r\n", screen)

	out, screen = onTerminal(t, "1", "hunter2\n", "hunter2\n")
	require.Equal(t, "got hunter2\n", out)
	require.Equal(t, "Passphrase: |\r\nAgain: |\r\n", screen)

	out, _ = onTerminal(t, "1", "hunter2\n", "hunter3\n")
	require.Equal(t, "error: the two entries differ\n", out)

	out, _ = onTerminal(t, "", "\n")
	require.Equal(t, "error: secret is empty\n", out)
}

func TestPromptWithoutATerminal(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "SECRET_TEST_CHILD=prompt")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	out, err := cmd.CombinedOutput()
	require.NoError(t, err)
	require.Contains(t, string(out), "error: no terminal to ask on")
}
