package main

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestStream: the runtime's poller doesn't know the data channel, and what
// arrived before the end is read.
func TestStream(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	f := os.NewFile(uintptr(fds[0]), "data")
	conn, err := net.FileConn(f)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	var at unix.Stat_t
	peer := os.NewFile(uintptr(fds[1]), "peer")
	defer peer.Close()

	raw, err := conn.(*net.UnixConn).SyscallConn()
	require.NoError(t, err)
	require.NoError(t, raw.Control(func(fd uintptr) { require.NoError(t, unix.Fstat(int(fd), &at)) }))
	require.True(t, polled(t, at.Ino), "this test doesn't see what the poller has")
	s, err := newStream(conn)
	require.NoError(t, err)
	defer s.close()
	require.False(t, polled(t, at.Ino))

	_, err = peer.WriteString("command")
	require.NoError(t, err)
	s.closeRead()
	got, err := io.ReadAll(s)
	require.NoError(t, err)
	require.Equal(t, "command", string(got))
	_, err = s.Write([]byte("response"))
	require.NoError(t, err)
	_, err = io.ReadFull(peer, make([]byte, len("response")))
	require.NoError(t, err)
}

// TestLocality: a PCR that locality 2 may reset is reset with it alone, given
// with the command or with one before. Commands may be sent together.
func TestLocality(t *testing.T) {
	p, c := open(t, newStore(t, false))
	const refused = 0x907
	reset := "\x80\x02\x00\x00\x00\x1b\x00\x00\x01\x3d\x00\x00\x00\x14\x00\x00\x00\x09\x40\x00\x00\x09\x00\x00\x00\x00\x00"
	at := func(locality string) string { return "\x00\x00\x00\x08" + locality + "\x00\x00\x00\x1b" + reset }
	for _, step := range []struct {
		sent  string
		codes []uint32
	}{
		{reset, []uint32{refused}},
		{at("\x02"), []uint32{0}},
		{reset, []uint32{0}},
		{at("\x03") + at("\x02") + reset, []uint32{refused, 0, 0}},
		{at("\x05") + reset + at("\x00") + reset, []uint32{refused, 0, refused, refused}},
	} {
		_, err := c.conn.Write([]byte(step.sent))
		require.NoError(t, err)
		for n, want := range step.codes {
			require.Equal(t, want, code(c.response()), "%q, response %d", step.sent, n)
		}
	}
	p.stop()
}

// response reads one, and takes what is around it off if the command had swtpm's
// header.
func (c *tpm) response() []byte {
	head := make([]byte, 6)
	_, err := io.ReadFull(c.conn, head)
	require.NoError(c.t, err)
	end, framed := int(binary.BigEndian.Uint32(head[2:])), head[0] == 0
	if framed {
		end = int(binary.BigEndian.Uint32(head)) + 8
	}
	rsp := append(head, make([]byte, end-len(head))...)
	_, err = io.ReadFull(c.conn, rsp[len(head):])
	require.NoError(c.t, err)
	if framed {
		return rsp[4 : end-4]
	}
	return rsp
}

// polled tells whether one of this process's epoll instances has a socket.
func polled(t *testing.T, inode uint64) bool {
	links, err := filepath.Glob("/proc/self/fd/*")
	require.NoError(t, err)
	for _, l := range links {
		if to, err := os.Readlink(l); err != nil || to != "anon_inode:[eventpoll]" {
			continue
		}
		text, err := os.ReadFile("/proc/self/fdinfo/" + filepath.Base(l))
		require.NoError(t, err)
		if strings.Contains(string(text), fmt.Sprintf(" ino:%x ", inode)) {
			return true
		}
	}
	return false
}
