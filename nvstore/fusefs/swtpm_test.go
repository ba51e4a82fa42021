package fusefs_test

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// swtpm keeps a TPM's state on the mount: its files are blobs, and a TPM that
// is started on them again is the one that it was.
func TestSwtpm(t *testing.T) {
	m := mount(t, nil, nil)
	state := m.path("tpm")
	require.NoError(t, os.Mkdir(state, 0o700))
	out, err := exec.Command("swtpm_setup", "--tpm2", "--tpmstate", "dir://"+state, "--createek", "--overwrite").CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, names(t, m.store), "tpm/tpm2-00.permall")

	short, err := os.MkdirTemp("", "tpm")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(short) })
	write := startSwtpm(t, state, short)
	tpm2(t, short, "tpm2_nvdefine", "0x1500016", "-C", "o", "-s", "8")
	tpm2in(t, short, []byte("remember"), "tpm2_nvwrite", "0x1500016", "-C", "o", "-i", "-")
	stopSwtpm(t, write)

	read := startSwtpm(t, state, short)
	require.Equal(t, "remember", tpm2(t, short, "tpm2_nvread", "0x1500016", "-C", "o"))
	stopSwtpm(t, read)
	require.NotEmpty(t, names(t, m.unmount(t)))
}

func startSwtpm(t *testing.T, state, dir string) *exec.Cmd {
	t.Helper()
	sock := filepath.Join(dir, "tpm")
	cmd := exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+state, "--flags", "startup-clear",
		"--server", "type=unixio,path="+sock, "--ctrl", "type=unixio,path="+sock+".ctrl")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	for begun := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", sock+".ctrl"); err == nil {
			c.Close()
			return cmd
		}
		require.Less(t, time.Since(begun), 20*time.Second, "swtpm doesn't listen")
	}
}

func stopSwtpm(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	_ = cmd.Wait()
}

func tpm2(t *testing.T, dir string, args ...string) string {
	t.Helper()
	return tpm2in(t, dir, nil, args...)
}

func tpm2in(t *testing.T, dir string, in []byte, args ...string) string {
	t.Helper()
	cmd := exec.Command(args[0], append(args[1:], "-T", "swtpm:path="+filepath.Join(dir, "tpm"))...)
	if in != nil {
		r, w, err := os.Pipe()
		require.NoError(t, err)
		_, err = w.Write(in)
		require.NoError(t, err)
		w.Close()
		defer r.Close()
		cmd.Stdin = r
	}
	out, err := cmd.Output()
	require.NoError(t, err, "%v: %s", args, out)
	return string(out)
}
