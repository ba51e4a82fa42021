package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// readyFD is the environment variable by which a daemon knows its parent's
// pipe. It says nothing secret.
const readyFD = "NVTPM_READY_FD"

// daemonize starts the program once more, in the background, and waits until
// it is ready. It says true in the parent. Descriptors that were inherited
// keep their numbers.
func daemonize() (parent bool, err error) {
	if os.Getenv(readyFD) != "" {
		return false, nil
	}
	exe, err := os.Executable()
	if err != nil {
		return false, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return false, err
	}
	defer r.Close()
	files := inherited()
	files = append(files, w)
	p, err := os.StartProcess(exe, os.Args, &os.ProcAttr{
		Files: files,
		Env:   append(os.Environ(), readyFD+"="+strconv.Itoa(len(files)-1)),
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	w.Close()
	if err != nil {
		return false, err
	}
	if got, _ := io.ReadAll(r); len(got) > 0 {
		return true, p.Release()
	}
	state, err := p.Wait()
	if err != nil {
		return false, err
	}
	if state.Success() {
		return true, nil
	}
	return false, daemonError(state.ExitCode())
}

// A daemonError is a daemon that ended before it was ready, and said why on the
// same standard error. Its exit code is the parent's.
type daemonError int

func (e daemonError) Error() string {
	return fmt.Sprintf("the daemon ended at once, exit code %d", int(e))
}

// inherited returns the descriptors that this process was started with, at
// their numbers.
func inherited() []*os.File {
	files := []*os.File{os.Stdin, os.Stdout, os.Stderr}
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return files
	}
	for _, e := range list {
		fd, err := strconv.Atoi(e.Name())
		if err != nil || fd < 3 {
			continue
		}
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC != 0 {
			continue
		}
		for len(files) <= fd {
			files = append(files, nil)
		}
		files[fd] = os.NewFile(uintptr(fd), e.Name())
	}
	return files
}

// ready tells the parent, if there is one waiting.
func ready() error {
	v := os.Getenv(readyFD)
	if v == "" {
		return nil
	}
	fd, err := strconv.Atoi(v)
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), "ready")
	defer f.Close()
	// Whoever started it waits for the end of what it was given for output.
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for std := range 3 {
		if err := unix.Dup3(int(null.Fd()), std, 0); err != nil {
			return err
		}
	}
	_, err = f.Write([]byte{1})
	return err
}

// conns is the control channel's connection, to be closed at the end.
type conns struct {
	mu   sync.Mutex
	conn net.Conn
}

func (c *conns) set(conn net.Conn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conn = conn
}

func (c *conns) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.conn != nil {
		c.conn.Close()
	}
}
