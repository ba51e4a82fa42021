package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// A proxy stands between nvtpm and QEMU's NBD server, and can hold what nvtpm
// sends.
type proxy struct {
	l      net.Listener
	server string

	mu   sync.Mutex
	what func(*message) bool // is held, and all behind it
	held chan struct{}       // closed when it is let go; nil: nothing is held
	seen chan struct{}       // closed when something arrives meanwhile
}

// A message is what an NBD client sends at once: its flags, an option, or a
// request (https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md).
type message struct {
	bytes []byte
	write bool
	off   uint64
}

func anything(*message) bool { return true }

// aRoot is the commit's last write: that of one of the two root slots (FORMAT.md).
func aRoot(m *message) bool { return m.write && (m.off == 64<<10 || m.off == 128<<10) }

// body is the write of what a root refers to: of any other than the reserved
// blocks.
func body(m *message) bool { return m.write && (m.off%(64<<10) != 0 || m.off >= 256<<10) }

func newProxy(t testing.TB, path, server string) *proxy {
	t.Helper()
	l, err := net.Listen("unix", path)
	require.NoError(t, err)
	p := &proxy{l: l, server: server}
	t.Cleanup(func() {
		p.release()
		l.Close()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go p.serve(c)
		}
	}()
	return p
}

func (p *proxy) serve(c net.Conn) {
	defer c.Close()
	s, err := net.Dial("unix", p.server)
	if err != nil {
		return
	}
	defer s.Close()
	go func() {
		io.Copy(c, s)
		c.Close()
	}()
	in := bufio.NewReader(c)
	flags := make([]byte, 4)
	if _, err := io.ReadFull(in, flags); err != nil {
		return
	}
	for m := (&message{bytes: flags}); ; {
		p.mu.Lock()
		held := p.held
		if held != nil && p.what(m) {
			select {
			case <-p.seen:
			default:
				close(p.seen)
			}
		} else {
			held = nil
		}
		p.mu.Unlock()
		if held != nil {
			<-held
		}
		if _, err := s.Write(m.bytes); err != nil {
			return
		}
		if m, err = next(in); err != nil {
			return
		}
	}
}

// next reads an option or a request.
func next(in *bufio.Reader) (*message, error) {
	const (
		option, optionLen   = 0x49484156, 16 // "IHAV"
		request, requestLen = 0x25609513, 28
		writeCommand        = 1
	)
	be := binary.BigEndian
	magic, err := in.Peek(4)
	if err != nil {
		return nil, err
	}
	m := &message{}
	n := uint32(0)
	switch be.Uint32(magic) {
	case option:
		m.bytes = make([]byte, optionLen)
		if _, err := io.ReadFull(in, m.bytes); err != nil {
			return nil, err
		}
		n = be.Uint32(m.bytes[12:])
	case request:
		m.bytes = make([]byte, requestLen)
		if _, err := io.ReadFull(in, m.bytes); err != nil {
			return nil, err
		}
		if m.write = be.Uint16(m.bytes[6:]) == writeCommand; m.write {
			m.off, n = be.Uint64(m.bytes[16:]), be.Uint32(m.bytes[24:])
		}
	default:
		return nil, fmt.Errorf("%x is no NBD message", magic)
	}
	data := make([]byte, n)
	_, err = io.ReadFull(in, data)
	m.bytes = append(m.bytes, data...)
	return m, err
}

// hold keeps what comes from now on, from the first message of a kind, and says
// when that has come.
func (p *proxy) hold(what func(*message) bool) (seen <-chan struct{}) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.what, p.held, p.seen = what, make(chan struct{}), make(chan struct{})
	return p.seen
}

func (p *proxy) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held != nil {
		close(p.held)
		p.held = nil
	}
}
