package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
)

// Listen makes the socket for a server. network is "tcp" with HOST:PORT, or
// "unix" with a path, at which the socket appears with permissions 0600 and no
// others before, and which Close removes. A socket that nobody listens on any
// more is replaced; any other file there fails with fs.ErrExist.
func Listen(network, address string) (net.Listener, error) {
	if network == "tcp" {
		return net.Listen(network, address)
	}
	if network != "unix" {
		return nil, fmt.Errorf("%w: network %q", ErrURI, network)
	}
	if strings.HasPrefix(address, "@") {
		return net.Listen(network, address)
	}
	if err := vacant(address); err != nil {
		return nil, err
	}
	return listenUnix(address)
}

// vacant tells whether a socket may be put at a path.
func vacant(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return &fs.PathError{Op: "listen", Path: path, Err: fs.ErrExist}
	}
	c, err := net.Dial("unix", path)
	if err == nil {
		c.Close()
	}
	if errors.Is(err, syscall.ECONNREFUSED) {
		return nil // left behind by a server that was killed
	}
	return &fs.PathError{Op: "listen", Path: path, Err: fs.ErrExist}
}

// listenUnix binds in a folder that nobody else can enter, so that the socket
// has its permissions when it appears under its name.
func listenUnix(path string) (net.Listener, error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), ".nbd-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	hidden := filepath.Join(dir, "s")
	l, err := bind(dir, hidden)
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(hidden, 0o600); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	info, err := os.Lstat(hidden)
	if err == nil {
		err = os.Rename(hidden, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return &unixListener{UnixListener: l, path: path, info: info}, nil
}

// maxSocketPath is what sockaddr_un holds, less the NUL.
const maxSocketPath = 107

// bind listens at a path, which may be longer than a socket's address.
func bind(dir, path string) (*net.UnixListener, error) {
	if len(path) <= maxSocketPath {
		return net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	name := fmt.Sprintf("/proc/self/fd/%d/s", d.Fd())
	return net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
}

// A unixListener removes its socket, unless somebody else's lies there now.
type unixListener struct {
	*net.UnixListener
	path string
	info fs.FileInfo
	once sync.Once
}

func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }

func (l *unixListener) Close() error {
	l.once.Do(func() {
		if info, err := os.Lstat(l.path); err == nil && os.SameFile(info, l.info) {
			_ = os.Remove(l.path)
		}
	})
	return l.UnixListener.Close()
}
