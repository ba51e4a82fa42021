package main

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"nvstore.dev/image"
)

// listenUnix makes a socket of its owner's. One that is left of a process that
// was killed is replaced; one that somebody serves isn't.
func listenUnix(c *channel) (net.Listener, error) {
	if info, err := os.Lstat(c.addr); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("%s is there, and is no socket", c.addr)
		}
		if conn, err := net.Dial("unix", c.addr); err == nil {
			conn.Close()
			return nil, fmt.Errorf("%s: %w", c.addr, image.ErrLocked)
		}
		if err := os.Remove(c.addr); err != nil {
			return nil, err
		}
	}
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", c.addr)
	unix.Umask(old)
	if err != nil {
		return nil, err
	}
	err = os.Chmod(c.addr, c.mode)
	if err == nil && (c.uid >= 0 || c.gid >= 0) {
		err = os.Chown(c.addr, c.uid, c.gid)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}
