package nbd

import (
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// A listener looks at a connection that nobody reads.
type listener struct {
	conn syscall.RawConn
	look func(fd uintptr) // made once
	poll [1]unix.PollFd
}

// newListener returns nil if something has to read at all times, as under TLS,
// whose peers send what isn't for us.
func newListener(nc net.Conn) *listener {
	sc, ok := nc.(syscall.Conn)
	if !ok {
		return nil
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil
	}
	l := &listener{conn: raw}
	l.look = func(fd uintptr) {
		l.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLRDHUP}
		_, _ = unix.Poll(l.poll[:], 0) // whatever it can't say, reading will
	}
	return l
}

// check returns an error if the peer has hung up.
func (l *listener) check() error {
	if err := l.conn.Control(l.look); err != nil {
		return err
	}
	if l.poll[0].Revents&(unix.POLLRDHUP|unix.POLLHUP|unix.POLLERR) != 0 {
		return io.EOF
	}
	return nil
}
