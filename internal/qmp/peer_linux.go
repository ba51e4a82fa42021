package qmp

import (
	"net"

	"golang.org/x/sys/unix"
)

// PeerPID returns the process that listened on the monitor's socket, which is
// QEMU unless somebody else made the socket for it; 0 if that isn't known.
func (c *Client) PeerPID() int {
	u, ok := c.conn.(*net.UnixConn)
	if !ok {
		return 0
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return 0
	}
	var cred *unix.Ucred
	if cerr := raw.Control(func(fd uintptr) {
		cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); cerr != nil || err != nil {
		return 0
	}
	return int(cred.Pid)
}
