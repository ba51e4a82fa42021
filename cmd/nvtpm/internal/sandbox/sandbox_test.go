package sandbox_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"nvstore.dev/cmd/nvtpm/internal/sandbox"
)

// The test binary is also the program that goes into the sandbox.
func TestMain(m *testing.M) {
	if text := os.Getenv("SANDBOX_TEST"); text != "" {
		os.Exit(confined(text))
	}
	os.Exit(m.Run())
}

// An order says what the program in the sandbox does.
type order struct {
	Plan   sandbox.Plan
	Action string
	Dir    string
	Port   int
	Fatal  string
}

// tried is what came of what it tried: "" is success.
type tried struct {
	Report *sandbox.Report
	Errors map[string]string
}

func confined(text string) int {
	var o order
	if err := json.Unmarshal([]byte(text), &o); err != nil {
		fmt.Println(err)
		return 1
	}
	r := sandbox.Entered()
	if r == nil {
		fmt.Println(sandbox.Enter(&o.Plan))
		return 1
	}
	if err := sandbox.Filter(o.Action, r); err != nil {
		fmt.Println(err)
		return 1
	}
	out := tried{r, map[string]string{}}
	try := func(what string, fn func() error) {
		// On another thread than the one that Enter and Filter ran on.
		done := make(chan error)
		go func() {
			runtime.LockOSThread()
			done <- fn()
		}()
		out.Errors[what] = ""
		if err := <-done; err != nil {
			out.Errors[what] = err.Error()
		}
	}
	file := func(name string, flag int) func() error {
		return func() error {
			f, err := os.OpenFile(filepath.Join(o.Dir, name), flag, 0o600)
			if err == nil {
				f.Close()
			}
			return err
		}
	}
	try("read what may be read", file("readable", os.O_RDONLY))
	try("write what may be read", file("readable", os.O_WRONLY))
	try("write what may be written", file("writable", os.O_RDWR))
	try("truncate what may be written", func() error { return os.Truncate(filepath.Join(o.Dir, "writable"), 1) })
	try("read another", file("other", os.O_RDONLY))
	try("make a file", file("new", os.O_WRONLY|os.O_CREATE))
	try("make a socket", func() error {
		l, err := net.Listen("unix", filepath.Join(o.Dir, "sockets/s"))
		if err == nil {
			err = l.Close()
		}
		return err
	})
	try("remove a file there", func() error { return os.Remove(filepath.Join(o.Dir, "sockets/old")) })
	try("make a file there", file("sockets/new", os.O_WRONLY|os.O_CREATE))
	try("listen on the port", func() error {
		l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(o.Port)))
		if err == nil {
			err = l.Close()
		}
		return err
	})
	try("listen on another", func() error {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err == nil {
			err = l.Close()
		}
		return err
	})
	try("signal the parent", func() error { return syscall.Kill(os.Getppid(), 0) })
	try("a netlink socket", func() error {
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, 0)
		if err == nil {
			unix.Close(fd)
		}
		return err
	})
	try("user", func() error { return errors.New(fmt.Sprint(os.Getuid(), os.Geteuid(), os.Getgid())) })
	switch o.Fatal {
	case "exec":
		try("exec", func() error { return exec.Command("/bin/true").Run() })
	case "ptrace":
		try("ptrace", func() error { return unix.PtraceAttach(os.Getppid()) })
	case "unshare":
		try("unshare", func() error { return unix.Unshare(unix.CLONE_NEWUTS) })
	}
	p, err := json.Marshal(&out)
	fmt.Println(string(p))
	if err != nil {
		return 1
	}
	return 0
}

// run has the program try.
func run(t *testing.T, o *order) (*tried, error) {
	t.Helper()
	// Where another user finds it too, other than t.TempDir.
	dir, err := os.MkdirTemp("", "sandbox")
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	require.NoError(t, os.Chmod(dir, 0o755))
	o.Dir = dir
	for _, name := range []string{"readable", "writable", "other", "sockets/old"} {
		path := filepath.Join(o.Dir, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o755))
		require.NoError(t, os.WriteFile(path, []byte("x"), 0o644))
	}
	exe := filepath.Join(o.Dir, "program")
	self, err := os.Executable()
	require.NoError(t, err)
	p, err := os.ReadFile(self)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(exe, p, 0o755))
	o.Plan.Exec = []string{"/usr", "/lib", "/lib64", "/bin", exe}
	o.Plan.Read = append(o.Plan.Read, filepath.Join(o.Dir, "readable"), "/proc/self", filepath.Join(o.Dir, "isn't there"))
	o.Plan.Write = append(o.Plan.Write, filepath.Join(o.Dir, "writable"), "/dev/null")
	o.Plan.Make = append(o.Plan.Make, filepath.Join(o.Dir, "sockets"))
	text, err := json.Marshal(o)
	require.NoError(t, err)
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), "SANDBOX_TEST="+string(text))
	p, err = cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%w: %s", err, p)
	}
	out := new(tried)
	require.NoError(t, json.Unmarshal(p, out), "%s", p)
	return out, nil
}

// TestSandbox tries what may and what may not be done, as far as this kernel
// has the means.
func TestSandbox(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := l.Addr().(*net.TCPAddr).Port
	require.NoError(t, l.Close())
	got, err := run(t, &order{Plan: sandbox.Plan{Bind: []uint16{uint16(port)}}, Action: sandbox.Kill, Port: port})
	require.NoError(t, err)
	t.Logf("%+v", *got.Report)
	require.True(t, got.Report.NoNewPrivs)
	require.Equal(t, sandbox.Kill, got.Report.Seccomp)
	abi := sandbox.Version()
	require.Equal(t, abi, got.Report.Landlock)
	for what, needs := range map[string]int{
		"read what may be read": 0, "write what may be written": 0, "truncate what may be written": 0, "make a socket": 0,
		"remove a file there": 0, "listen on the port": 0, // allowed
		"write what may be read": 1, "read another": 1, "make a file": 1, "make a file there": 1, "listen on another": 4, "signal the parent": 6,
	} {
		if needs > 0 && abi >= needs {
			require.Regexp(t, "permission denied|not permitted", got.Errors[what], what)
		} else {
			require.Empty(t, got.Errors[what], what)
		}
	}
	require.Contains(t, got.Errors["a netlink socket"], "not supported")
}

// TestKills: what the filter forbids ends the process, on whatever thread.
func TestKills(t *testing.T) {
	for _, fatal := range []string{"exec", "ptrace", "unshare"} {
		_, err := run(t, &order{Action: sandbox.Kill, Fatal: fatal})
		require.ErrorContains(t, err, "bad system call", fatal)
		_, err = run(t, &order{Action: sandbox.None, Fatal: fatal})
		require.NoError(t, err, fatal)
	}
}

// TestRunAs: the user is another, for all threads, and can't come back.
func TestRunAs(t *testing.T) {
	if os.Geteuid() != 0 {
		_, err := run(t, &order{Plan: sandbox.Plan{RunAs: "root"}, Action: sandbox.None})
		require.ErrorContains(t, err, "becoming user root")
		return
	}
	got, err := run(t, &order{Plan: sandbox.Plan{RunAs: "nobody", Read: []string{"/"}}, Action: sandbox.Kill})
	require.NoError(t, err)
	require.Equal(t, "65534 65534 65534", got.Errors["user"])
	require.Equal(t, "nobody", got.Report.User)
	_, err = run(t, &order{Plan: sandbox.Plan{RunAs: "nobody-of-that-name"}, Action: sandbox.None})
	require.ErrorContains(t, err, "unknown user")
}

func TestActions(t *testing.T) {
	require.ErrorContains(t, sandbox.Filter("maybe", new(sandbox.Report)), "none, log or kill")
	require.NoError(t, sandbox.Filter(sandbox.None, new(sandbox.Report)))
}
