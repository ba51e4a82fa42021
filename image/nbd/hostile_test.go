package nbd_test

import (
	"bytes"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
)

// Each server breaks one rule of the handshake, and the client says which.
func TestHostileHandshake(t *testing.T) {
	// until answers options with nothing up to opt, and that one by say.
	until := func(opt uint32, say func(c net.Conn)) script {
		return func(_ *testing.T, c net.Conn) {
			for ok := hello(c); ok; {
				var got uint32
				if got, _, ok = nextOption(c); !ok {
					return
				}
				switch {
				case got == opt:
					say(c)
					discard(c, 1<<40)
					return
				case got == 8 || got == 10:
					ok = optReply(c, got, ack)
				default:
					ok = optReply(c, got, unsup)
				}
			}
		}
	}
	export := func(size uint64, flags uint16) script {
		return until(7, func(c net.Conn) { optReply(c, 7, 3, uint16(0), size, flags); optReply(c, 7, ack) })
	}
	blocks := func(lo, pref, hi uint32) script {
		return until(7, func(c net.Conn) {
			optReply(c, 7, 3, uint16(0), uint64(1<<20), allFlags)
			optReply(c, 7, 3, uint16(3), lo, pref, hi)
			optReply(c, 7, ack)
		})
	}
	for name, c := range map[string]struct {
		serve script
		kind  error
		says  string
	}{
		"silent":            {func(_ *testing.T, c net.Conn) { discard(c, 1<<40) }, nbd.ErrTimeout, "handshake"},
		"gone":              {func(*testing.T, net.Conn) {}, nbd.ErrDisconnected, "hung up"},
		"half a greeting":   {func(_ *testing.T, c net.Conn) { send(c, "NBDMAG") }, nbd.ErrDisconnected, "hung up"},
		"no NBD":            {func(_ *testing.T, c net.Conn) { send(c, "SSH-2.0-OpenSSH_9.2 and more") }, nbd.ErrProtocol, "no NBD server"},
		"oldstyle":          {func(_ *testing.T, c net.Conn) { send(c, "NBDMAGIC", uint64(0x00420281861253), "xx") }, image.ErrUnsupported, "oldstyle"},
		"other magic":       {func(_ *testing.T, c net.Conn) { send(c, "NBDMAGIC", uint64(1), "xx") }, nbd.ErrProtocol, "IHAVEOPT"},
		"reply to another":  {until(7, func(c net.Conn) { optReply(c, 6, ack) }), nbd.ErrProtocol, "option reply.option"},
		"reply magic":       {until(7, func(c net.Conn) { send(c, uint64(1), uint32(7), ack, uint32(0)) }), nbd.ErrProtocol, "magic"},
		"reply of 4 GiB":    {until(7, func(c net.Conn) { send(c, replyMagic, uint32(7), uint32(3), ^uint32(0)) }), nbd.ErrProtocol, "length"},
		"error of 4 GiB":    {until(7, func(c net.Conn) { send(c, replyMagic, uint32(7), unsup, ^uint32(0)) }), nbd.ErrProtocol, "length"},
		"ack with data":     {until(8, func(c net.Conn) { optReply(c, 8, ack, "x") }), nbd.ErrProtocol, "acknowledgement"},
		"no export":         {until(7, func(c net.Conn) { optReply(c, 7, ack) }), nbd.ErrProtocol, "size and flags"},
		"short export":      {until(7, func(c net.Conn) { optReply(c, 7, 3, uint16(0), uint64(1)) }), nbd.ErrProtocol, "10 bytes"},
		"info of one byte":  {until(7, func(c net.Conn) { optReply(c, 7, 3, "x") }), nbd.ErrProtocol, "INFO"},
		"size of 2⁶³":       {export(1<<63, allFlags), nbd.ErrProtocol, "size"},
		"no flags":          {export(4096, 0), nbd.ErrProtocol, "HAS_FLAGS"},
		"block size 0":      {blocks(0, 4096, 1<<20), nbd.ErrProtocol, "minimum"},
		"block size 3":      {blocks(3, 4096, 1<<20), nbd.ErrProtocol, "minimum"},
		"block size 128 Ki": {blocks(128<<10, 128<<10, 1<<20), nbd.ErrProtocol, "minimum"},
		"preferred 256":     {blocks(1, 256, 1<<20), nbd.ErrProtocol, "preferred"},
		"maximum 512":       {blocks(1, 4096, 512), nbd.ErrProtocol, "maximum"},
		"other context":     {until(10, func(c net.Conn) { optReply(c, 10, 4, uint32(1), "base:other") }), nbd.ErrProtocol, "base:allocation"},
		"no context ID":     {until(10, func(c net.Conn) { optReply(c, 10, 4, "x") }), nbd.ErrProtocol, "base:allocation"},
		"infos for ever": {until(7, func(c net.Conn) {
			for optReply(c, 7, 3, uint16(99), strings.Repeat("x", 4096)) {
			}
		}), nbd.ErrProtocol, "32 MiB"},
		"small infos for ever": {until(7, func(c net.Conn) {
			for optReply(c, 7, 3, uint16(99)) {
			}
		}), nbd.ErrProtocol, "fewer"},
		"unknown export":   {until(7, func(c net.Conn) { optReply(c, 7, 1<<31+6, "no \x1b[31m such") }), image.ErrNotFound, `no \x1b[31m such`},
		"TLS required":     {until(8, func(c net.Conn) { optReply(c, 8, 1<<31+5) }), nbd.ErrTLSRequired, "TLS"},
		"TLS required, go": {until(7, func(c net.Conn) { optReply(c, 7, 1<<31+5) }), nbd.ErrTLSRequired, "TLS"},
		"shutting down":    {until(7, func(c net.Conn) { optReply(c, 7, 1<<31+7) }), nbd.ErrRefused, "shutting down"},
		"policy":           {until(7, func(c net.Conn) { optReply(c, 7, 1<<31+2, "go away") }), nbd.ErrRefused, "go away"},
		"read-only":        {export(4096, allFlags|2), image.ErrReadOnly, "read-only"},
		"nothing durable":  {export(4096, 1), image.ErrUnsupported, "neither FLUSH nor FUA"},
		"old and gone":     {until(1, func(c net.Conn) { c.Close() }), nbd.ErrRefused, `"x"`},
	} {
		t.Run(name, func(t *testing.T) {
			o := fake(t, c.serve)
			o.HandshakeTimeout = 10 * time.Second
			if c.kind == nbd.ErrTimeout {
				o.HandshakeTimeout = 50 * time.Millisecond
			}
			d, err := dialFake(o)
			require.ErrorIs(t, err, c.kind)
			require.Nil(t, d)
			require.Contains(t, err.Error(), c.says)
			require.Less(t, len(err.Error()), 8<<10)
			require.NotContains(t, err.Error(), "\x1b")
		})
	}
}

// Each server breaks one rule of transmission.
func TestHostileReplies(t *testing.T) {
	const n = 8192
	read := func(d *nbd.Device) error { return image.ReadFull(d, make([]byte, n), 4096) }
	status := func(d *nbd.Device) error { _, err := d.BlockStatus(4096, n); return err }
	block := bytes.Repeat([]byte{7}, n)
	var none string
	for name, c := range map[string]struct {
		do    func(d *nbd.Device) error
		serve func(c net.Conn, r command)
		kind  error
		says  string
	}{
		"gone":          {read, func(net.Conn, command) {}, nbd.ErrDisconnected, "hung up"},
		"half a header": {read, func(c net.Conn, _ command) { send(c, uint32(0x668e33ef), uint16(1)) }, nbd.ErrDisconnected, "hung up"},
		"magic":         {read, func(c net.Conn, r command) { send(c, uint32(1), uint32(0), r.cookie) }, nbd.ErrProtocol, "magic"},
		"simple":        {read, func(c net.Conn, r command) { simple(c, 0, r.cookie); send(c, block) }, nbd.ErrProtocol, "structured reply to read"},
		"simple error":  {read, func(c net.Conn, r command) { simple(c, 5, r.cookie) }, nbd.ErrProtocol, "structured reply to read"},
		"cookie":        {read, func(c net.Conn, r command) { chunk(c, 1, 0, r.cookie+1<<32) }, nbd.ErrProtocol, "cookie"},
		"huge cookie":   {read, func(c net.Conn, _ command) { chunk(c, 1, 0, ^uint64(0)) }, nbd.ErrProtocol, "cookie"},
		"no data":       {read, func(c net.Conn, r command) { chunk(c, 1, 0, r.cookie) }, nbd.ErrProtocol, "all that was asked for"},
		"half the data": {read, func(c net.Conn, r command) { chunk(c, 1, 1, r.cookie, r.off, block[1:]) }, nbd.ErrProtocol, "all that was asked for"},
		"data before":   {read, func(c net.Conn, r command) { chunk(c, 1, 1, r.cookie, r.off-1, block) }, nbd.ErrProtocol, "range"},
		"data behind":   {read, func(c net.Conn, r command) { chunk(c, 1, 1, r.cookie, r.off+1, block) }, nbd.ErrProtocol, "range"},
		"data at 2⁶⁴":   {read, func(c net.Conn, r command) { chunk(c, 1, 1, r.cookie, ^uint64(0), block) }, nbd.ErrProtocol, "range"},
		"too much data": {read, func(c net.Conn, r command) { chunk(c, 1, 1, r.cookie, r.off, block, "x") }, nbd.ErrProtocol, "range"},
		"data of 4 GiB": {read, func(c net.Conn, r command) {
			send(c, uint32(0x668e33ef), uint16(1), uint16(1), r.cookie, ^uint32(0), r.off)
		}, nbd.ErrProtocol, "range"},
		"empty data": {read, func(c net.Conn, r command) { chunk(c, 0, 1, r.cookie, r.off) }, nbd.ErrProtocol, "at least 9"},
		"data twice": {read, func(c net.Conn, r command) {
			chunk(c, 0, 1, r.cookie, r.off, block[:100])
			chunk(c, 1, 1, r.cookie, r.off+99, block[99:])
		}, nbd.ErrProtocol, "wasn't sent before"},
		"hole over data": {read, func(c net.Conn, r command) {
			chunk(c, 0, 1, r.cookie, r.off+50, block[:100])
			chunk(c, 1, 2, r.cookie, r.off, uint32(n))
		}, nbd.ErrProtocol, "wasn't sent before"},
		"empty hole":        {read, func(c net.Conn, r command) { chunk(c, 0, 2, r.cookie, r.off, uint32(0)) }, nbd.ErrProtocol, "range"},
		"huge hole":         {read, func(c net.Conn, r command) { chunk(c, 0, 2, r.cookie, r.off, ^uint32(0)) }, nbd.ErrProtocol, "range"},
		"long hole":         {read, func(c net.Conn, r command) { chunk(c, 0, 2, r.cookie, r.off, uint32(1), "x") }, nbd.ErrProtocol, "12 of a hole"},
		"none that goes on": {read, func(c net.Conn, r command) { chunk(c, 0, 0, r.cookie) }, nbd.ErrProtocol, "NONE"},
		"none with data":    {read, func(c net.Conn, r command) { chunk(c, 1, 0, r.cookie, "x") }, nbd.ErrProtocol, "NONE"},
		"unknown chunk":     {read, func(c net.Conn, r command) { chunk(c, 1, 77, r.cookie) }, nbd.ErrProtocol, "negotiated"},
		"status of a read":  {read, func(c net.Conn, r command) { chunk(c, 1, 5, r.cookie, uint32(7), uint32(n), uint32(0)) }, nbd.ErrProtocol, "block status"},
		"one byte a chunk": {read, func(c net.Conn, r command) {
			for i := range uint64(n) {
				chunk(c, 0, 1, r.cookie, r.off+i, "x")
			}
		}, nbd.ErrProtocol, "fewer"},
		"errors for ever": {read, func(c net.Conn, r command) {
			for chunk(c, 0, 1<<15+1, r.cookie, uint32(5), uint16(0)) {
			}
		}, nbd.ErrProtocol, "fewer"},
		"error 0":     {read, func(c net.Conn, r command) { chunk(c, 1, 1<<15+1, r.cookie, uint32(0), uint16(0)) }, nbd.ErrProtocol, "error"},
		"short error": {read, func(c net.Conn, r command) { chunk(c, 1, 1<<15+1, r.cookie, uint32(5)) }, nbd.ErrProtocol, "length"},
		"error of 4 GiB": {read, func(c net.Conn, r command) {
			send(c, uint32(0x668e33ef), uint16(1), uint16(1<<15+1), r.cookie, ^uint32(0))
		}, nbd.ErrProtocol, "length"},
		"message too long": {read, func(c net.Conn, r command) { chunk(c, 1, 1<<15+1, r.cookie, uint32(5), uint16(9), "xx") }, nbd.ErrProtocol, "message length"},
		"message over limit": {read, func(c net.Conn, r command) {
			chunk(c, 1, 1<<15+1, r.cookie, uint32(5), uint16(4097), strings.Repeat("x", 4097))
		}, nbd.ErrProtocol, "message length"},
		"no status":     {status, func(c net.Conn, r command) { chunk(c, 1, 0, r.cookie) }, nbd.ErrProtocol, "base:allocation"},
		"simple status": {status, func(c net.Conn, r command) { simple(c, 0, r.cookie) }, nbd.ErrProtocol, "structured reply to block status"},
		"other context": {status, func(c net.Conn, r command) { chunk(c, 1, 5, r.cookie, uint32(8), uint32(n), uint32(0)) }, nbd.ErrProtocol, "context"},
		"empty extent":  {status, func(c net.Conn, r command) { chunk(c, 1, 5, r.cookie, uint32(7), uint32(0), uint32(0)) }, nbd.ErrProtocol, "extent"},
		"long extent":   {status, func(c net.Conn, r command) { chunk(c, 1, 5, r.cookie, uint32(7), uint32(n+1), uint32(0)) }, nbd.ErrProtocol, "extent"},
		"two extents": {status, func(c net.Conn, r command) {
			chunk(c, 1, 5, r.cookie, uint32(7), uint32(1), uint32(0), uint32(1), uint32(0))
		}, nbd.ErrProtocol, "one extent"},
		"status twice": {status, func(c net.Conn, r command) {
			for range 2 {
				chunk(c, 0, 5, r.cookie, uint32(7), uint32(1), uint32(0))
			}
		}, nbd.ErrProtocol, "one extent"},
		"data of a flush": {(*nbd.Device).Sync, func(c net.Conn, r command) { chunk(c, 1, 1, r.cookie, uint64(0), "x") }, nbd.ErrProtocol, "range"},
		"unasked": {read, func(c net.Conn, r command) {
			chunk(c, 1, 2, r.cookie, r.off, uint32(n))
			chunk(c, 1, 2, r.cookie, r.off, uint32(n))
		}, nil, none},
		"holes and data": {read, func(c net.Conn, r command) {
			chunk(c, 0, 2, r.cookie, r.off+100, uint32(4000))
			chunk(c, 0, 1, r.cookie, r.off, block[:100])
			chunk(c, 0, 1, r.cookie, r.off+4100, block[4100:])
			chunk(c, 1, 0, r.cookie)
		}, nil, none},
		"unknown error type": {read, func(c net.Conn, r command) { chunk(c, 1, 1<<15+99, r.cookie, uint32(5), uint16(2), "hm", uint64(0)) }, nil, `"hm"`},
		"error with text":    {read, func(c net.Conn, r command) { chunk(c, 1, 1<<15+2, r.cookie, uint32(5), uint16(5), "\x1b[31m", r.off) }, nil, `\x1b[31m`},
	} {
		t.Run(name, func(t *testing.T) {
			d, err := dialFake(fake(t, func(_ *testing.T, conn net.Conn) {
				if negotiate(conn, 1<<20, allFlags) {
					if r, ok := nextCommand(conn); ok {
						c.serve(conn, r)
					}
				}
			}))
			require.NoError(t, err)
			defer d.Close()
			err = c.do(d)
			if c.says == none {
				require.NoError(t, err)
				return
			}
			require.Contains(t, err.Error(), c.says)
			require.Less(t, len(err.Error()), 8<<10)
			require.NotContains(t, err.Error(), "\x1b")
			if c.kind != nil {
				require.ErrorIs(t, err, c.kind)
				require.ErrorIs(t, read(d), nbd.ErrDisconnected, "the connection is closed")
			} else {
				remote := (*nbd.RemoteError)(nil)
				require.ErrorAs(t, err, &remote)
				require.EqualValues(t, 5, remote.Code)
			}
		})
	}
}

// A server that takes requests and never answers, or doesn't even take them.
func TestStall(t *testing.T) {
	given := make(chan struct{}) // the write's error
	for name, serve := range map[string]script{
		"no answer": func(_ *testing.T, c net.Conn) { _ = negotiate(c, 8<<20, allFlags) && discard(c, 1<<40) },
		"no reader": func(_ *testing.T, c net.Conn) {
			if negotiate(c, 8<<20, allFlags) {
				nextCommand(c)
				<-given
			}
		},
		"one byte at a time": func(_ *testing.T, c net.Conn) {
			if !negotiate(c, 8<<20, allFlags) {
				return
			}
			r, ok := nextCommand(c)
			ok = ok && send(c, uint32(0x668e33ef), uint16(1), uint16(1), r.cookie, uint32(1<<20+8), r.off)
			for ; ok; time.Sleep(time.Millisecond) {
				ok = send(c, "x")
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := fake(t, serve)
			o.RequestTimeout = 50 * time.Millisecond
			d, err := dialFake(o)
			require.NoError(t, err)
			defer d.Close()
			if name == "one byte at a time" {
				_, err = d.ReadAt(make([]byte, 1<<20), 0)
			} else {
				_, err = d.WriteAt(make([]byte, 8<<20), 0)
				if name == "no reader" {
					close(given)
				}
				require.ErrorIs(t, err, image.ErrPoisoned, "nobody knows what arrived")
			}
			require.ErrorIs(t, err, nbd.ErrTimeout)
		})
	}
}
