//go:build unix

package qmp

import (
	"net"
	"os"
	"syscall"
)

// writeRights sends bytes and, with them, a file (SCM_RIGHTS).
func (c *Client) writeRights(p []byte, f *os.File) (int, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	n := 0
	if cerr := raw.Control(func(fd uintptr) {
		n, _, err = c.conn.(*net.UnixConn).WriteMsgUnix(p, syscall.UnixRights(int(fd)), nil)
	}); cerr != nil {
		return 0, cerr
	}
	return n, err
}
