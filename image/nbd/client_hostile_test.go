package nbd_test

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/nbd"
	"nvstore.dev/image/nbd/internal/tlspsk"
)

// A rawClient says to a server what a test wants.
type rawClient struct {
	net.Conn
	t *testing.T
}

// dialRaw connects and answers the greeting.
func dialRaw(t *testing.T, s *served, flags uint32) *rawClient {
	t.Helper()
	nc, err := net.Dial("unix", s.sock)
	require.NoError(t, err)
	t.Cleanup(func() { nc.Close() })
	require.NoError(t, nc.SetDeadline(time.Now().Add(20*time.Second)))
	c := &rawClient{nc, t}
	require.Equal(t, "NBDMAGICIHAVEOPT\x00\x03", string(c.take(18)))
	c.put(flags)
	return c
}

func (c *rawClient) put(parts ...any) { require.True(c.t, send(c, parts...)) }

func (c *rawClient) take(n int) []byte {
	c.t.Helper()
	p := make([]byte, n)
	_, err := io.ReadFull(c, p)
	require.NoError(c.t, err)
	return p
}

func (c *rawClient) option(opt uint32, parts ...any) {
	c.put(append([]any{optMagic, opt, uint32(length(parts...))}, parts...)...)
}

// reply reads one reply to an option.
func (c *rawClient) reply(opt uint32) (typ uint32, data string) {
	c.t.Helper()
	h := c.take(20)
	require.Equal(c.t, replyMagic, be.Uint64(h))
	require.Equal(c.t, opt, be.Uint32(h[8:]))
	return be.Uint32(h[12:]), string(c.take(int(be.Uint32(h[16:]))))
}

func (c *rawClient) want(opt, typ uint32) {
	c.t.Helper()
	got, text := c.reply(opt)
	require.Equal(c.t, typ, got, "%s", text)
}

// hungUp demands that the server has gone.
func (c *rawClient) hungUp() {
	c.t.Helper()
	_, err := io.Copy(io.Discard, c)
	if ne := net.Error(nil); errors.As(err, &ne) {
		require.False(c.t, ne.Timeout(), "the server still listens")
	}
}

const (
	repPolicy  = uint32(1<<31 + 2)
	repInvalid = uint32(1<<31 + 3)
	repTLSReqd = uint32(1<<31 + 5)
	repUnknown = uint32(1<<31 + 6)
	repSizes   = uint32(1<<31 + 8)
	repTooBig  = uint32(1<<31 + 9)
)

func TestHostileOptions(t *testing.T) {
	s := serve(t, nil, &nbd.Export{Name: "x", Device: imagetest.NewMemory(1 << 20)},
		&nbd.Export{Name: "blocks", Device: imagetest.NewMemory(1 << 20), MinBlock: 4096})
	long := strings.Repeat("n", 4096)
	for name, c := range map[string]struct {
		opt  uint32
		data []any
		want uint32
	}{
		"unknown":                 {77, nil, unsup},
		"unknown of 32 MiB":       {77, []any{make([]byte, 32<<20)}, repTooBig},
		"list with data":          {3, []any{"x"}, repInvalid},
		"structured with data":    {8, []any{"x"}, repInvalid},
		"TLS":                     {5, nil, repPolicy},
		"TLS with data":           {5, []any{"x"}, repInvalid},
		"info of nothing":         {6, nil, repInvalid},
		"info, no export":         {6, []any{uint32(1), "y", uint16(0)}, repUnknown},
		"info, name of 4096":      {6, []any{uint32(4096), long, uint16(0)}, repUnknown},
		"info, name of 4097":      {6, []any{uint32(4097), long, "n", uint16(0)}, repInvalid},
		"info, name of 4 GiB":     {6, []any{^uint32(0), "x", uint16(0)}, repInvalid},
		"info, name past the end": {6, []any{uint32(2), "x", uint16(0)}, repInvalid},
		"info, fewer than said":   {6, []any{uint32(1), "x", uint16(2), uint16(3)}, repInvalid},
		"info, more than said":    {6, []any{uint32(1), "x", uint16(0), uint16(3)}, repInvalid},
		"go, sizes unknown":       {7, []any{uint32(6), "blocks", uint16(0)}, repSizes},
		"go, no export":           {7, []any{uint32(0), uint16(0)}, repUnknown},
		"context first":           {10, []any{uint32(1), "x", uint32(0)}, repInvalid},
	} {
		t.Run(name, func(t *testing.T) {
			c1 := dialRaw(t, s, 3)
			c1.option(c.opt, c.data...)
			c1.want(c.opt, c.want)
			c1.option(3) // the session goes on
			c1.want(3, 2)
			c1.want(3, 2)
			c1.want(3, ack)
			c1.option(2)
			c1.want(2, ack)
			c1.hungUp()
		})
	}
	for name, data := range map[string][]any{
		"no export":         {uint32(1), "y", uint32(0)},
		"queries of 16 GiB": {uint32(1), "x", ^uint32(0)},
		"query past end":    {uint32(1), "x", uint32(1), uint32(9), "base:"},
		"query of 4097":     {uint32(1), "x", uint32(1), uint32(4097), long, "n"},
		"data behind":       {uint32(1), "x", uint32(0), "more"},
		"nothing":           {},
	} {
		t.Run("context, "+name, func(t *testing.T) {
			c := dialRaw(t, s, 3)
			c.option(8)
			c.want(8, ack)
			c.option(10, data...)
			typ, _ := c.reply(10)
			require.Contains(t, []uint32{repInvalid, repUnknown}, typ)
			c.option(9, uint32(1), "x", uint32(0))
			c.want(9, 4)
			c.want(9, ack)
		})
	}
	for name, do := range map[string]func(c *rawClient){
		"option over 32 MiB": func(c *rawClient) { c.put(optMagic, uint32(77), uint32(32<<20+1)) },
		"magic":              func(c *rawClient) { c.put(uint64(1), uint32(3), uint32(0)) },
		"name of 4097":       func(c *rawClient) { c.option(1, long, "n") },
		"name of 70000":      func(c *rawClient) { c.option(1, make([]byte, 70_000)) },
		"no such name":       func(c *rawClient) { c.option(1, "y") },
		"sizes by old name":  func(c *rawClient) { c.option(1, "blocks") },
		"options for ever": func(c *rawClient) {
			go func() { _, _ = io.Copy(io.Discard, c) }()
			for send(c, optMagic, uint32(77), uint32(0)) {
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := dialRaw(t, s, 3)
			do(c)
			c.hungUp()
		})
	}
	dialRaw(t, s, 1<<5).hungUp() // an unknown client flag
	c := dialRaw(t, s, 0)        // not of the fixed newstyle
	c.option(3)
	c.hungUp()
}

// EXPORT_NAME, with the zeros of old, and a simple reply.
func TestOldClient(t *testing.T) {
	d := imagetest.NewMemory(1000)
	_, err := d.WriteAt([]byte("hello"), 995)
	require.NoError(t, err)
	s := serve(t, nil, &nbd.Export{Name: "x", Device: d})
	for _, flags := range []uint32{0, 1, 2, 3} {
		c := dialRaw(t, s, flags)
		c.option(1, "x")
		h := c.take(10)
		require.EqualValues(t, 1000, be.Uint64(h))
		if flags&2 == 0 {
			require.Equal(t, make([]byte, 124), c.take(124))
		}
		c.request(0, 0, 77, 995, 5)
		require.Equal(t, "\x67\x44\x66\x98\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x4dhello", string(c.take(21)))
		c.request(0, 7, 78, 0, 10)
		h = c.take(16)
		require.EqualValues(t, 22, be.Uint32(h[4:]), "no block status without structured replies")
		c.request(0, 2, 0, 0, 0)
		c.hungUp()
	}
}

func (c *rawClient) request(flags, cmd uint16, cookie, off uint64, n uint32, data ...any) {
	c.put(append([]any{uint32(0x25609513), flags, cmd, cookie, off, n}, data...)...)
}

// enter chooses an export with structured replies and base:allocation.
func (c *rawClient) enter(export string) {
	c.option(8)
	c.want(8, ack)
	c.option(10, uint32(len(export)), export, uint32(1), uint32(15), "base:allocation")
	c.want(10, 4)
	c.want(10, ack)
	c.option(7, uint32(len(export)), export, uint16(1), uint16(3))
	for {
		if typ, _ := c.reply(7); typ == ack {
			return
		} else if typ != 3 {
			require.FailNow(c.t, "GO is refused", "%x", typ)
		}
	}
}

// outcome reads the replies to a request and returns its error, or 0.
func (c *rawClient) outcome(cookie uint64) (code uint32) {
	c.t.Helper()
	for {
		h := c.take(16)
		require.Equal(c.t, cookie, be.Uint64(h[8:]))
		if be.Uint32(h) == 0x67446698 {
			return be.Uint32(h[4:])
		}
		p := c.take(int(be.Uint32(c.take(4))))
		if be.Uint16(h[6:])&(1<<15) != 0 {
			code = be.Uint32(p)
		}
		if be.Uint16(h[4:])&1 != 0 {
			return code
		}
	}
}

// What a client may not ask for is refused, and the connection goes on.
func TestHostileRequests(t *testing.T) {
	const n = 1 << 20
	d := imagetest.NewMemory(n)
	s := serve(t, nil, &nbd.Export{Name: "x", Device: d}, &nbd.Export{Name: "ro", Device: d, ReadOnly: true},
		&nbd.Export{Name: "blocks", Device: d, MinBlock: 512, MaxPayload: 64 << 10})
	for name, c := range map[string]struct {
		export     string
		flags, cmd uint16
		off        uint64
		n          uint32
		want       uint32
	}{
		"read past the end":     {"x", 0, 0, n - 1, 2, 22},
		"read behind the end":   {"x", 0, 0, n + 1, 0, 22},
		"read at 2⁶⁴":           {"x", 0, 0, ^uint64(0), 1, 22},
		"read at 2⁶³":           {"x", 0, 0, 1 << 63, 1, 22},
		"read of 4 GiB":         {"x", 0, 0, 0, ^uint32(0), 22},
		"read nothing":          {"x", 0, 0, 5, 0, 0},
		"read, unknown flag":    {"x", 1 << 9, 0, 0, 1, 22},
		"read, a zeroes flag":   {"x", 1 << 4, 0, 0, 1, 22},
		"read, FUA":             {"x", 1, 0, 0, 1, 0},
		"read all":              {"x", 0, 0, 0, n, 0},
		"read all in one":       {"x", 4, 0, 0, n, 0},
		"write past the end":    {"x", 0, 1, n - 1, 2, 28},
		"write at 2⁶⁴":          {"x", 0, 1, ^uint64(0), 4096, 28},
		"write nothing":         {"x", 0, 1, 0, 0, 0},
		"write, unknown flag":   {"x", 1 << 9, 1, 0, 4096, 22},
		"write of 33 MiB":       {"x", 0, 1, 0, 33 << 20, 28},
		"write of all":          {"x", 1, 1, 0, n, 0},
		"flush":                 {"x", 0, 3, 0, 0, 0},
		"trim past the end":     {"x", 0, 4, n - 1, 2, 22},
		"trim":                  {"x", 1, 4, 0, n, 0},
		"cache":                 {"x", 0, 5, 0, n, 0},
		"cache past the end":    {"x", 0, 5, 0, n + 1, 22},
		"zeroes past the end":   {"x", 0, 6, n - 1, 2, 28},
		"zeroes":                {"x", 1, 6, 0, n, 0},
		"zeroes, no hole":       {"x", 2, 6, 0, n, 0},
		"zeroes, fast, no hole": {"x", 2 | 16, 6, 0, n, 95},
		"status":                {"x", 0, 7, 0, n, 0},
		"status past the end":   {"x", 0, 7, 1, n, 22},
		"status of nothing":     {"x", 0, 7, 1, 0, 22},
		"unknown command":       {"x", 0, 8, 0, 1, 22},
		"command 65535":         {"x", 0, 65535, 0, 1, 22},
		"write, read-only":      {"ro", 0, 1, 0, 4096, 1},
		"trim, read-only":       {"ro", 0, 4, 0, 4096, 1},
		"zeroes, read-only":     {"ro", 0, 6, 0, 4096, 1},
		"flush, read-only":      {"ro", 0, 3, 0, 0, 0},
		"read, unaligned":       {"blocks", 0, 0, 1, 512, 22},
		"read, odd length":      {"blocks", 0, 0, 0, 513, 22},
		"write, unaligned":      {"blocks", 0, 1, 1, 512, 22},
		"read, over payload":    {"blocks", 0, 0, 0, 128 << 10, 75},
		"write, over payload":   {"blocks", 0, 1, 0, 128 << 10, 22},
		"trim, over payload":    {"blocks", 0, 4, 0, 128 << 10, 0},
	} {
		t.Run(name, func(t *testing.T) {
			r := dialRaw(t, s, 3)
			r.enter(c.export)
			sent := []any{}
			if c.cmd == 1 {
				sent = append(sent, make([]byte, c.n))
			}
			r.request(c.flags, c.cmd, 7, c.off, c.n, sent...)
			require.Equal(t, c.want, r.outcome(7))
			r.request(0, 0, 8, 0, 512)
			require.Zero(t, r.outcome(8), "the connection goes on")
			r.request(0, 2, 0, 0, 0)
			r.hungUp()
		})
	}
	t.Run("magic", func(t *testing.T) {
		r := dialRaw(t, s, 3)
		r.enter("x")
		r.put(make([]byte, 28))
		r.hungUp()
	})
	t.Run("context of another export", func(t *testing.T) {
		r := dialRaw(t, s, 3)
		r.option(8)
		r.want(8, ack)
		r.option(10, uint32(2), "ro", uint32(1), uint32(15), "base:allocation")
		r.want(10, 4)
		r.want(10, ack)
		r.option(7, uint32(1), "x", uint16(0))
		for typ := uint32(3); typ == 3; {
			typ, _ = r.reply(7)
		}
		r.request(0, 7, 1, 0, 4096)
		require.EqualValues(t, 22, r.outcome(1))
	})
}

// Clients that stall are cut off, and those beyond the cap turned away.
func TestLimits(t *testing.T) {
	for name, do := range map[string]func(c *rawClient){
		"half a payload":    func(c *rawClient) { c.enter("x"); c.request(0, 1, 1, 0, 4096, "half") },
		"half a long one":   func(c *rawClient) { c.enter("x"); c.request(0, 1, 1, 0, 1<<20, make([]byte, 300_000)) },
		"half of a bad one": func(c *rawClient) { c.enter("x"); c.request(9, 1, 1, 0, 1<<20, make([]byte, 300_000)) },
		"reads nothing": func(c *rawClient) {
			c.enter("x")
			for send(c, uint32(0x25609513), uint16(0), uint16(0), uint64(1), uint64(0), uint32(1<<20)) {
			}
		},
		"idle":                     func(c *rawClient) { c.enter("x") },
		"says nothing":             func(*rawClient) {},
		"half an option":           func(c *rawClient) { c.put(optMagic, uint32(7), uint32(1000)) },
		"half an option of 32 MiB": func(c *rawClient) { c.put(optMagic, uint32(7), uint32(32<<20), "x") },
	} {
		t.Run(name, func(t *testing.T) {
			d := imagetest.NewMemory(1 << 20)
			_, err := d.WriteAt(bytes.Repeat([]byte{1}, 1<<20), 0) // no holes
			require.NoError(t, err)
			s := serve(t, &nbd.ServerOptions{HandshakeTimeout: 100 * time.Millisecond, StallTimeout: 100 * time.Millisecond,
				IdleTimeout: 200 * time.Millisecond}, &nbd.Export{Name: "x", Device: d})
			c := dialRaw(t, s, 3)
			do(c)
			c.hungUp()
			require.Error(t, s.first(t))
			require.Eventually(t, func() bool { return s.Connections() == 0 }, time.Minute, time.Millisecond)
		})
	}
	t.Run("connections", func(t *testing.T) {
		s := serve(t, &nbd.ServerOptions{MaxConnections: 2}, &nbd.Export{Name: "x", Device: imagetest.NewMemory(4096)})
		a, b := open(t, s.uri("x"), nil), open(t, s.uri("x"), nil)
		defer b.Close()
		nc, err := net.Dial("unix", s.sock)
		require.NoError(t, err)
		(&rawClient{nc, t}).hungUp()
		require.NoError(t, nc.Close())
		require.ErrorContains(t, s.first(t), "2 connections")
		require.NoError(t, a.Close())
		for s.Connections() > 1 {
			time.Sleep(time.Millisecond)
		}
		require.NoError(t, open(t, s.uri("x"), nil).Close())
	})
}

// Nothing in plain gets behind STARTTLS, and nothing before it counts, whatever
// TLS is by.
func TestStartTLS(t *testing.T) {
	certs, key := newCA(t), newPSK(t, "alice", 1)
	for name, c := range map[string]struct {
		server nbd.ServerOptions
		client func(nc net.Conn) net.Conn
	}{
		"certificates": {nbd.ServerOptions{TLS: certs.server(t, false)}, func(nc net.Conn) net.Conn {
			conf := certs.client(t, false)
			conf.ServerName = "localhost"
			return tls.Client(nc, conf)
		}},
		"PSK": {nbd.ServerOptions{PSKs: []*nbd.PSK{key}}, func(nc net.Conn) net.Conn {
			c := tlspsk.Client(nc, "alice", pskBytes(1))
			require.NoError(t, c.Handshake())
			return c
		}},
		"no PSK": {nbd.ServerOptions{PSKs: []*nbd.PSK{}}, nil},
	} {
		s := serve(t, &c.server, &nbd.Export{Name: "x", Device: imagetest.NewMemory(4096)})
		t.Run(name+", injection", func(t *testing.T) {
			c := dialRaw(t, s, 3)
			c.put(optMagic, uint32(5), uint32(0), optMagic, uint32(8), uint32(0))
			said, err := io.ReadAll(c)
			require.Empty(t, said, "not even the acknowledgement: %v", err)
		})
		t.Run(name+", required", func(t *testing.T) {
			c := dialRaw(t, s, 3)
			for _, opt := range []uint32{3, 6, 7, 8, 9, 10, 77} {
				c.option(opt)
				c.want(opt, repTLSReqd)
			}
			c.option(1, "x")
			c.hungUp()
		})
		t.Run(name+", no going back", func(t *testing.T) {
			c := dialRaw(t, s, 3)
			c.option(5)
			c.want(5, ack)
			c.option(3) // no ClientHello
			c.hungUp()
		})
		if c.client == nil {
			continue
		}
		t.Run(name+", twice", func(t *testing.T) {
			raw := dialRaw(t, s, 3)
			raw.option(5)
			raw.want(5, ack)
			raw.Conn = c.client(raw.Conn)
			raw.option(5)
			raw.want(5, repInvalid)
			raw.option(10, uint32(1), "x", uint32(0))
			raw.want(10, repInvalid)
			raw.enter("x")
		})
	}
}

// What goes wrong in a Device is an error of the request, and no detail of it
// goes to the client.
func TestDeviceErrors(t *testing.T) {
	for name, c := range map[string]struct {
		err  error
		kind error
		says string
	}{
		"plain":     {errors.New("/secret/path: bad sector"), nil, "input/output error"},
		"full":      {fmt.Errorf("/secret/path: %w", image.ErrNoSpace), image.ErrNoSpace, "no space"},
		"poisoned":  {fmt.Errorf("/secret/path: %w", image.ErrPoisoned), nil, "failed earlier"},
		"read-only": {fmt.Errorf("/secret/path: %w", image.ErrReadOnly), image.ErrReadOnly, "not permitted"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, nil, &nbd.Export{Name: "x", Device: failing{imagetest.NewMemory(1 << 20), c.err}})
			for do, fn := range map[string]func(d *nbd.Device) error{
				"read":       func(d *nbd.Device) error { _, err := d.ReadAt(make([]byte, 10), 0); return err },
				"long read":  func(d *nbd.Device) error { _, err := d.ReadAt(make([]byte, 1<<20), 0); return err },
				"write":      func(d *nbd.Device) error { _, err := d.WriteAt(make([]byte, 10), 0); return err },
				"long write": func(d *nbd.Device) error { _, err := d.WriteAt(make([]byte, 1<<20), 0); return err },
				"durable":    func(d *nbd.Device) error { _, err := d.WriteDurable(make([]byte, 10), 0); return err },
				"zeroes":     func(d *nbd.Device) error { return d.WriteZeroes(0, 100_000) },
				"flush":      (*nbd.Device).Sync,
			} {
				d := open(t, s.uri("x"), nil)
				err := fn(d)
				require.ErrorContains(t, err, c.says, do)
				require.NotContains(t, err.Error(), "secret")
				if c.kind != nil {
					require.ErrorIs(t, err, c.kind)
				}
				require.NoError(t, d.Close())
			}
			require.ErrorContains(t, s.first(t), "/secret/path", "who runs the server learns it")
		})
	}
}

type failing struct {
	d   image.Device
	err error
}

func (f failing) Size() int64                        { return f.d.Size() }
func (f failing) ReadAt([]byte, int64) (int, error)  { return 0, f.err }
func (f failing) WriteAt([]byte, int64) (int, error) { return 0, f.err }
func (f failing) Sync() error                        { return f.err }
func (f failing) Close() error                       { return f.d.Close() }
