package nbd_test

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/nbd"
)

var be = binary.BigEndian

// A script is a server that says what a test wants it to say. It runs until it
// returns, and then hangs up.
type script func(t *testing.T, c net.Conn)

// fake serves each connection by the next script, the last one again and
// again, and returns options that dial it.
func fake(t *testing.T, scripts ...script) *nbd.Options {
	t.Helper()
	next := make(chan script, len(scripts))
	for _, s := range scripts {
		next <- s
	}
	last := scripts[len(scripts)-1]
	dial := func(context.Context) (net.Conn, error) {
		s := last
		select {
		case s = <-next:
		default:
		}
		client, server := pair(t)
		done := make(chan struct{})
		t.Cleanup(func() { client.Close(); server.Close(); <-done })
		go func() {
			defer close(done)
			defer server.Close()
			s(t, server)
		}()
		return client, nil
	}
	return &nbd.Options{Dial: dial, Reconnect: -1, RequestTimeout: 20 * time.Second}
}

// pair returns the two ends of a unix socket.
func pair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	l, err := net.Listen("unix", socket(t))
	require.NoError(t, err)
	defer l.Close()
	client, err = net.Dial("unix", l.Addr().String())
	require.NoError(t, err)
	server, err = l.Accept()
	require.NoError(t, err)
	return client, server
}

func dialFake(o *nbd.Options) (*nbd.Device, error) {
	return nbd.OpenTarget(context.Background(), &nbd.Target{Network: "unix", Address: "fake", Export: "x"}, o)
}

// send writes numbers in network order, bytes and strings.
func send(c io.Writer, parts ...any) bool {
	var p []byte
	for _, part := range parts {
		switch v := part.(type) {
		case string:
			p = append(p, v...)
		case []byte:
			p = append(p, v...)
		default:
			p, _ = binary.Append(p, be, v)
		}
	}
	_, err := c.Write(p)
	return err == nil
}

const (
	optMagic   = uint64(0x49484156454F5054)
	replyMagic = uint64(0x3e889045565a9)
	ack        = uint32(1)
	unsup      = uint32(1<<31 + 1)

	// All that a server can do, apart from being read-only.
	allFlags = uint16(1 | 1<<2 | 1<<3 | 1<<5 | 1<<6 | 1<<7 | 1<<8 | 1<<10 | 1<<11)
)

func hello(c net.Conn) bool {
	return send(c, "NBDMAGIC", optMagic, uint16(3)) && discard(c, 4)
}

func discard(c io.Reader, n int64) bool {
	_, err := io.CopyN(io.Discard, c, n)
	return err == nil
}

// nextOption reads an option.
func nextOption(c net.Conn) (opt uint32, data []byte, ok bool) {
	var h [16]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		return 0, nil, false
	}
	data = make([]byte, be.Uint32(h[12:]))
	_, err := io.ReadFull(c, data)
	return be.Uint32(h[8:]), data, err == nil
}

func optReply(c net.Conn, opt, typ uint32, data ...any) bool {
	return send(c, replyMagic, opt, typ, uint32(length(data...))) && send(c, data...)
}

func length(parts ...any) (n int) {
	for _, part := range parts {
		switch v := part.(type) {
		case string:
			n += len(v)
		case []byte:
			n += len(v)
		default:
			n += binary.Size(v)
		}
	}
	return n
}

// negotiate is a good server up to transmission, with structured replies and
// base:allocation as context 7.
func negotiate(c net.Conn, size uint64, flags uint16) bool {
	if !hello(c) {
		return false
	}
	for {
		opt, _, ok := nextOption(c)
		if !ok {
			return false
		}
		switch opt {
		case 8: // STRUCTURED_REPLY
			ok = optReply(c, opt, ack)
		case 10: // SET_META_CONTEXT
			ok = optReply(c, opt, 4, uint32(7), "base:allocation") && optReply(c, opt, ack)
		case 7: // GO
			return optReply(c, opt, 3, uint16(0), size, flags) &&
				optReply(c, opt, 3, uint16(3), uint32(1), uint32(4096), uint32(32<<20)) && optReply(c, opt, ack)
		default:
			ok = optReply(c, opt, unsup)
		}
		if !ok {
			return false
		}
	}
}

// A command is a request as a server sees it.
type command struct {
	flags, typ uint16
	cookie     uint64
	off        uint64
	n          uint32
	data       []byte
}

func nextCommand(c net.Conn) (command, bool) {
	var h [28]byte
	if _, err := io.ReadFull(c, h[:]); err != nil {
		return command{}, false
	}
	r := command{be.Uint16(h[4:]), be.Uint16(h[6:]), be.Uint64(h[8:]), be.Uint64(h[16:]), be.Uint32(h[24:]), nil}
	if r.typ == 1 {
		r.data = make([]byte, r.n)
		if _, err := io.ReadFull(c, r.data); err != nil {
			return command{}, false
		}
	}
	return r, true
}

// chunk sends a chunk of a structured reply.
func chunk(c net.Conn, flags, typ uint16, cookie uint64, parts ...any) bool {
	return send(c, uint32(0x668e33ef), flags, typ, cookie, uint32(length(parts...))) && send(c, parts...)
}

func simple(c net.Conn, code uint32, cookie uint64) bool {
	return send(c, uint32(0x67446698), code, cookie)
}
