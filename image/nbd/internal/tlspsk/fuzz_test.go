package tlspsk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// canned is a peer that says what it says whatever it hears.
type canned struct {
	net.Conn
	in  *bytes.Reader
	out int
}

func (c *canned) Read(p []byte) (int, error)       { return c.in.Read(p) }
func (c *canned) Write(p []byte) (int, error)      { c.out += len(p); return len(p), nil }
func (c *canned) Close() error                     { return nil }
func (c *canned) SetWriteDeadline(time.Time) error { return nil }

// script takes data apart into records: a type, a length of 16 bits, and as
// many bytes.
func script(data []byte, record func(typ byte, body []byte)) {
	for len(data) >= 3 {
		n := min(int(binary.BigEndian.Uint16(data[1:])), len(data)-3)
		record(data[0], data[3:3+n])
		data = data[3+n:]
	}
}

func line(typ byte, body []byte) []byte {
	return append(binary.BigEndian.AppendUint16([]byte{typ}, uint16(len(body))), body...)
}

const (
	rawToServer = iota
	rawToClient
	finishToServer
	finishToClient
	afterToServer
	afterToClient
	modes
)

// Whatever a peer says, with the keys or without, neither end panics, hangs,
// or takes more memory than a message does; and what is read was sent.
func FuzzPeer(f *testing.F) {
	hello, _, err := (&clientSide{identity: "alice", key: testKey}).hello()
	require.NoError(f, err)
	raw := hello.bound(earlySecret(testKey), newTranscript())
	f.Add((&half{}).seal(nil, typeHandshake, raw), uint8(rawToServer))
	sh := &serverHello{random: noise(32), suite: suites[0].id, share: hello.shares[0]}
	f.Add((&half{}).seal(nil, typeHandshake, sh.marshal()), uint8(rawToClient))
	sh.random, sh.cookie = []byte(retryRandom), []byte("x")
	sh.share = keyShare{group: groupP256}
	f.Add((&half{}).seal(nil, typeHandshake, sh.marshal()), uint8(rawToClient))
	finished := line(typeHandshake, framed(typeFinished, make([]byte, 32)))
	f.Add(finished, uint8(finishToServer))
	f.Add(append(line(typeHandshake, framed(typeEncryptedExtensions, []byte{0, 0})), finished...), uint8(finishToClient))
	late := line(typeData, []byte("content"))
	late = append(late, line(typeHandshake, []byte{typeKeyUpdate, 0, 0, 1, 1})...)
	late = append(late, line(typeData, []byte("more"))...)
	late = append(late, line(typeHandshake, framed(typeNewSessionTicket, make([]byte, 40)))...)
	late = append(late, line(typeAlert, []byte{1, 0})...)
	f.Add(late, uint8(afterToServer))
	f.Add(late, uint8(afterToClient))

	f.Fuzz(func(t *testing.T, data []byte, mode uint8) {
		if len(data) > 1<<17 {
			return
		}
		nc := &canned{in: bytes.NewReader(data)}
		c := Client(nc, "alice", testKey)
		if mode%2 == 0 {
			c = Server(nc, testKeys)
		}
		secret := bytes.Repeat([]byte{mode}, hashLen)
		var peer half
		switch mode % modes {
		case finishToServer, finishToClient:
			client, server := schedule{secret}.traffic("hs", newTranscript().sum())
			peer.use(suites[0], client)
			if mode%2 == 1 {
				peer.use(suites[0], server)
			}
			finish := c.serverFinish
			if mode%2 == 1 {
				finish = c.clientFinish
			}
			c.shake = func() error { return finish(suites[0], schedule{secret}, newTranscript()) }
		case afterToServer, afterToClient:
			peer.use(suites[1], secret)
			c.in.use(suites[1], secret)
			c.out.use(suites[1], secret)
			c.established.Store(true)
		}
		var sent []byte
		if peer.aead != nil {
			var wire []byte
			script(data, func(typ byte, body []byte) {
				wire = peer.seal(wire, typ, body)
				if whole := bytes.TrimRight(append(bytes.Clone(body), typ), "\x00"); len(whole) > 0 {
					body, typ = whole[:len(whole)-1], whole[len(whole)-1] // the rest is padding
				}
				if typ == typeData {
					sent = append(sent, body...)
				}
				if typ == typeHandshake && len(body) == 5 && body[0] == typeKeyUpdate {
					peer.update()
				}
			})
			nc.in.Reset(wire)
		}
		drive(t, c, sent)
		require.LessOrEqual(t, len(c.hand), maxMessage+maxPlain)
		require.LessOrEqual(t, nc.out, 2048)
	})
}

// drive has an end hear all there is.
func drive(t *testing.T, c *Conn, sent []byte) {
	if !c.established.Load() {
		err := c.Handshake()
		require.Error(t, err, "without keys nobody finishes")
		require.False(t, c.established.Load())
		return
	}
	got, err := io.ReadAll(c)
	require.True(t, bytes.HasPrefix(sent, got))
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		require.ErrorAs(t, err, new(*Error))
	}
	if _, err := c.Write([]byte("answer")); err == nil {
		require.False(t, c.owed.Load())
	}
	require.NoError(t, c.Close())
}

// A hello that is taken says the same when it is written anew.
func FuzzHello(f *testing.F) {
	hello, _, err := (&clientSide{identity: "alice", key: testKey}).hello()
	require.NoError(f, err)
	hello.cookie = []byte("x")
	f.Add(hello.marshal()[4:], true)
	sh := &serverHello{random: noise(32), sessionID: noise(32), suite: suites[0].id, share: hello.shares[0]}
	f.Add(sh.marshal()[4:], false)
	sh.random, sh.cookie = []byte(retryRandom), []byte("x")
	f.Add(sh.marshal()[4:], false)
	f.Fuzz(func(t *testing.T, data []byte, client bool) {
		if len(data) > maxMessage {
			return
		}
		if !client {
			one, err := parseServerHello(framed(typeServerHello, data))
			if err != nil {
				require.Nil(t, one)
				return
			}
			if !one.seen[extKeyShare] || !one.retry() && !one.seen[extPreSharedKey] {
				return // refused later
			}
			two, err := parseServerHello(one.marshal())
			require.NoError(t, err)
			require.Equal(t, one, two)
			return
		}
		one, err := parseClientHello(framed(typeClientHello, data))
		if err != nil {
			require.Nil(t, one)
			return
		}
		if !one.seen[extPSKModes] || !one.seen[extSupportedGroups] || !one.seen[extKeyShare] || !one.seen[extPreSharedKey] {
			return // refused later
		}
		require.LessOrEqual(t, len(one.identities)*39, len(data))
		two, err := parseClientHello(one.marshal())
		require.NoError(t, err)
		require.Equal(t, len(one.marshal())-2-len(bytes.Join(one.binders, []byte{0}))-1, two.head)
		one.head, one.seen, one.earlyData = two.head, two.seen, false
		require.Equal(t, one, two)
	})
}
