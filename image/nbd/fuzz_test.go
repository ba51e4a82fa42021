package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/nbd"
)

// A canned connection is a peer that says what it says whatever it hears.
type canned struct {
	in    io.Reader
	mu    sync.Mutex
	out   int64
	keep  *bytes.Buffer
	ended chan struct{}
	once  sync.Once
}

func newCanned(data []byte) *canned {
	return &canned{in: bytes.NewReader(data), ended: make(chan struct{})}
}

func (c *canned) Read(p []byte) (int, error) {
	select {
	case <-c.ended:
		return 0, net.ErrClosed
	default:
		return c.in.Read(p)
	}
}

func (c *canned) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.out += int64(len(p))
	if c.keep != nil {
		c.keep.Write(p)
	}
	return len(p), nil
}

func (c *canned) Close() error {
	c.once.Do(func() { close(c.ended) })
	return nil
}

func (c *canned) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "fuzz", Net: "unix"} }
func (c *canned) RemoteAddr() net.Addr             { return c.LocalAddr() }
func (c *canned) SetDeadline(time.Time) error      { return nil }
func (c *canned) SetReadDeadline(time.Time) error  { return nil }
func (c *canned) SetWriteDeadline(time.Time) error { return nil }

// record is what a good server says in the handshake.
func record(t testing.TB, size uint64) []byte {
	var p bytes.Buffer
	sink := &canned{in: bytes.NewReader(nil), keep: &p, ended: make(chan struct{})}
	send(sink, "NBDMAGIC", optMagic, uint16(3))
	optReply(sink, 8, ack)
	optReply(sink, 10, 4, uint32(7), "base:allocation")
	optReply(sink, 10, ack)
	optReply(sink, 7, 3, uint16(0), size, allFlags)
	optReply(sink, 7, 3, uint16(3), uint32(1), uint32(4096), uint32(32<<20))
	optReply(sink, 7, ack)
	require.NotEmpty(t, p.Bytes())
	return p.Bytes()
}

// Whatever a server says, the client neither panics nor hangs, and what it
// takes for content lies where it was asked for.
func FuzzClient(f *testing.F) {
	head := record(f, 1<<20)
	f.Add(head, false)
	f.Add([]byte("NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53"), false)
	var p bytes.Buffer
	sink := &canned{in: bytes.NewReader(nil), keep: &p, ended: make(chan struct{})}
	chunk(sink, 0, 1, 1<<32, uint64(100), "some data")
	chunk(sink, 0, 2, 1<<32, uint64(109), uint32(991))
	chunk(sink, 1, 0, 1<<32)
	chunk(sink, 1, 5, 2<<32, uint32(7), uint32(4096), uint32(3))
	simple(sink, 0, 3<<32)
	chunk(sink, 1, 1<<15+1, 4<<32, uint32(5), uint16(4), "nope")
	f.Add(p.Bytes(), true)
	f.Fuzz(func(t *testing.T, data []byte, entered bool) {
		if entered {
			data = append(bytes.Clone(head), data...)
		}
		d, err := dialFake(&nbd.Options{Reconnect: -1, InFlight: 1, RequestTimeout: -1,
			Dial: func(context.Context) (net.Conn, error) { return newCanned(data), nil }})
		if err != nil {
			require.Nil(t, d)
			return
		}
		guard := bytes.Repeat([]byte{0xA5}, 3000)
		n := min(1000, max(d.Size()-100, 0))
		if n > 0 {
			_, err = d.ReadAt(guard[1000:1000+n], 100)
			require.Equal(t, bytes.Repeat([]byte{0xA5}, 1000), guard[:1000])
			require.Equal(t, bytes.Repeat([]byte{0xA5}, int(2000-n)), guard[1000+n:])
		}
		if e, err := d.BlockStatus(0, 4096); err == nil {
			require.Zero(t, e.Start)
			require.True(t, e.Length >= 1 && e.Length <= 4096)
		}
		if _, err = d.WriteAt([]byte("x"), 0); err == nil {
			err = d.Sync()
		}
		_ = err
		require.NoError(t, d.Close())
	})
}

// A single listens for one connection.
type single struct {
	conns chan net.Conn
	once  sync.Once
}

func (l *single) Accept() (net.Conn, error) {
	if c, ok := <-l.conns; ok {
		return c, nil
	}
	return nil, net.ErrClosed
}
func (l *single) Close() error   { l.once.Do(func() { close(l.conns) }); return nil }
func (l *single) Addr() net.Addr { return &net.UnixAddr{Name: "fuzz", Net: "unix"} }

// Whatever a client says, the server neither panics nor hangs, nor says more
// than what was asked for, and a read-only export stays as it is.
func FuzzServer(f *testing.F) {
	var p bytes.Buffer
	sink := &canned{in: bytes.NewReader(nil), keep: &p, ended: make(chan struct{})}
	c := &rawClient{Conn: sink}
	option := func(opt uint32, parts ...any) {
		send(sink, append([]any{optMagic, opt, uint32(length(parts...))}, parts...)...)
	}
	send(c, uint32(3))
	option(8)
	option(10, uint32(1), "x", uint32(1), uint32(15), "base:allocation")
	option(7, uint32(1), "x", uint16(1), uint16(3))
	head := bytes.Clone(p.Bytes())
	f.Add(head, uint8(0))
	f.Add(append(be.AppendUint32(nil, 3), "IHAVEOPT\x00\x00\x00\x03\x00\x00\x00\x00"...), uint8(0))
	p.Reset()
	for cmd := range uint16(9) {
		send(sink, uint32(0x25609513), uint16(0), cmd, uint64(cmd), uint64(0), uint32(4096))
		if cmd == 1 {
			send(sink, make([]byte, 4096))
		}
	}
	f.Add(p.Bytes(), uint8(1))
	f.Add(p.Bytes(), uint8(2))
	f.Fuzz(func(t *testing.T, data []byte, mode uint8) {
		const n = 64 << 10
		if len(data) > 1<<16 {
			return
		}
		before := noise(n)
		d := imagetest.NewMemory(n)
		_, err := d.WriteAt(before, 0)
		require.NoError(t, err)
		e := &nbd.Export{Name: "x", Device: d, ReadOnly: mode == 2}
		if mode > 0 {
			data = append(bytes.Clone(head), data...)
		}
		s := nbd.NewServer(&nbd.ServerOptions{Report: func(_ string, err error) { require.Error(t, err) }})
		require.NoError(t, s.Add(e))
		nc := newCanned(data)
		l := &single{conns: make(chan net.Conn, 1)}
		l.conns <- nc
		done := make(chan error)
		go func() { done <- s.Serve(l) }()
		<-nc.ended
		require.NoError(t, s.Close())
		if err := <-done; err != nil {
			require.True(t, errors.Is(err, net.ErrClosed))
		}
		// 28 bytes ask for 64 KiB at most, and an option of 16 for a few
		// replies.
		require.LessOrEqual(t, nc.out, int64(len(data)/28+1)*(n+1024)+int64(len(data)/16+1)*1024+8192)
		if e.ReadOnly {
			after := make([]byte, n)
			require.NoError(t, image.ReadFull(d, after, 0))
			require.True(t, bytes.Equal(before, after))
		}
	})
}

// What parses is written so that it parses to the same.
func FuzzURI(f *testing.F) {
	for _, s := range []string{
		"nbd://localhost", "nbd://[::1]:10810/a%20b//c", "nbd+unix:///x?socket=/run/s", "nbds+unix:///?socket=%00abstract",
		"nbds://h/x?tls-hostname=y&tls-certificates=/etc/pki&tls-verify-peer=0", "nbds://h/?tls-type=x509", "nbds://al%20ice@h:1/x?tls-psk-file=/k", "nbds+unix://alice@//x?socket=/s&tls-psk-file=k&tls-type=psk",
		"nbd+unix:////x?socket=s",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		one, err := nbd.ParseURI(s)
		if err != nil {
			require.Nil(t, one)
			return
		}
		two, err := nbd.ParseURI(one.String())
		require.NoError(t, err, one.String())
		require.Equal(t, one, two, one.String())
	})
}
