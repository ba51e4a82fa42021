package tlspsk

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
)

// pair returns two ends of a stream that ends with the test.
func pair(t testing.TB) (client, server net.Conn) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	require.NoError(t, err)
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		ends[i], err = net.FileConn(f)
		require.NoError(t, err)
		require.NoError(t, f.Close())
		require.NoError(t, ends[i].SetDeadline(time.Now().Add(15*time.Second)))
		t.Cleanup(func() { ends[i].Close() })
	}
	return ends[0], ends[1]
}

var testKeys = map[string][]byte{"zoe": bytes.Repeat([]byte{9}, 32), "alice": testKey}

// connect makes both ends of a connection.
func connect(t testing.TB, client, server net.Conn) (*Conn, *Conn) {
	t.Helper()
	c, s := Client(client, "alice", testKey), Server(server, testKeys)
	done := make(chan error, 1)
	go func() { done <- s.Handshake() }()
	require.NoError(t, c.Handshake())
	require.NoError(t, <-done)
	return c, s
}

func linked(t testing.TB) (c, s *Conn) {
	one, two := pair(t)
	return connect(t, one, two)
}

func noise(n int) []byte {
	p := make([]byte, n)
	rand.Read(p)
	return p
}

// crumbs are read and written in small pieces.
type crumbs struct {
	net.Conn
	r io.Reader
}

func (c crumbs) Read(p []byte) (int, error) { return c.r.Read(p) }

func (c crumbs) Write(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = c.Conn.Write(p[n:min(n+1+n%7, len(p))])
		n += m
	}
	return n, err
}

// What one end writes, the other reads, in both directions at once.
func TestContent(t *testing.T) {
	var around []int
	for _, n := range []int{1, 2, 100, maxPlain, 2 * maxPlain, flushAt, 2 * flushAt} {
		around = append(around, n-1, n, n+1)
	}
	for name, sizes := range map[string][]int{"whole": around, "crumbs": {1, 100, maxPlain + 1, 7}} {
		t.Run(name, func(t *testing.T) {
			one, two := pair(t)
			if name == "crumbs" {
				one, two = crumbs{one, iotest.OneByteReader(one)}, crumbs{two, iotest.OneByteReader(two)}
			}
			c, s := connect(t, one, two)
			var all sync.WaitGroup
			for _, ends := range [][2]*Conn{{c, s}, {s, c}} {
				var sent [][]byte
				for _, n := range sizes {
					sent = append(sent, noise(n))
				}
				all.Go(func() {
					for _, p := range sent {
						n, err := ends[0].Write(p)
						if n != len(p) || err != nil {
							t.Error(n, err)
						}
					}
				})
				all.Go(func() {
					want := bytes.Join(sent, nil)
					got := make([]byte, len(want))
					if _, err := io.ReadFull(ends[1], got); err != nil || !bytes.Equal(want, got) {
						t.Error("other bytes arrived", err)
					}
				})
			}
			all.Wait()
		})
	}
}

// A request on its own allocates nothing.
func TestAllocations(t *testing.T) {
	c, s := linked(t)
	p := make([]byte, 4096)
	n := testing.AllocsPerRun(100, func() {
		_, err := c.Write(p)
		if err == nil {
			_, err = io.ReadFull(s, p)
		}
		if err != nil {
			t.Error(err)
		}
	})
	require.Zero(t, n)
}

// An end is an end only if the peer says so, and closes one direction.
func TestClose(t *testing.T) {
	t.Run("said", func(t *testing.T) {
		c, s := linked(t)
		_, err := c.Write([]byte("last words"))
		require.NoError(t, err)
		require.NoError(t, c.Close())
		got, err := io.ReadAll(s)
		require.NoError(t, err)
		require.Equal(t, "last words", string(got))
		_, err = s.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err)
		_, err = c.Write([]byte("x"))
		require.ErrorIs(t, err, net.ErrClosed)
	})
	t.Run("cut off", func(t *testing.T) {
		for _, after := range []int{0, 3, headerLen, 20} {
			one, two := pair(t)
			c, s := connect(t, one, two)
			c.protect(typeData, []byte("lost words"))
			_, err := one.Write(c.obuf[:after])
			require.NoError(t, err)
			require.NoError(t, one.Close())
			_, err = s.Read(make([]byte, 1))
			require.Equal(t, io.ErrUnexpectedEOF, err)
			_, err = s.Read(make([]byte, 1))
			require.Equal(t, io.ErrUnexpectedEOF, err)
		}
	})
	t.Run("one direction", func(t *testing.T) {
		c, s := linked(t)
		c.protect(typeAlert, []byte{1, byte(closeNotify)})
		require.NoError(t, c.flush())
		_, err := s.Read(make([]byte, 1))
		require.Equal(t, io.EOF, err)
		_, err = s.Write([]byte("still here"))
		require.NoError(t, err)
		got := make([]byte, 10)
		_, err = io.ReadFull(c, got)
		require.NoError(t, err)
		require.Equal(t, "still here", string(got))
	})
}

// Reading goes on after a timeout, wherever it hit.
func TestReadTimeout(t *testing.T) {
	one, two := pair(t)
	c, s := connect(t, one, two)
	c.protect(typeData, []byte("slow"))
	for _, b := range c.obuf {
		require.NoError(t, s.SetReadDeadline(time.Now().Add(-time.Second)))
		_, err := s.Read(make([]byte, 4))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		_, err = one.Write([]byte{b})
		require.NoError(t, err)
		require.NoError(t, s.SetReadDeadline(time.Now().Add(time.Millisecond)))
		got := make([]byte, 4)
		if n, err := s.Read(got); err == nil {
			require.Equal(t, "slow", string(got[:n]))
			return
		}
	}
	require.NoError(t, s.SetReadDeadline(time.Now().Add(timeout)))
	got := make([]byte, 4)
	_, err := io.ReadFull(s, got)
	require.NoError(t, err)
	require.Equal(t, "slow", string(got))
}

// A peer that says nothing, or too little, is given up at the deadline.
func TestHandshakeTimeout(t *testing.T) {
	for _, said := range []string{"", "\x16\x03\x01\x01"} {
		for _, end := range []func(net.Conn) *Conn{
			func(nc net.Conn) *Conn { return Client(nc, "alice", testKey) },
			func(nc net.Conn) *Conn { return Server(nc, testKeys) },
		} {
			one, two := pair(t)
			_, err := two.Write([]byte(said))
			require.NoError(t, err)
			require.NoError(t, one.SetDeadline(time.Now().Add(10*time.Millisecond)))
			c := end(one)
			require.ErrorIs(t, c.Handshake(), os.ErrDeadlineExceeded)
			require.ErrorIs(t, c.Handshake(), os.ErrDeadlineExceeded)
			_, err = c.Write([]byte("x"))
			require.Error(t, err)
			_, err = c.Read([]byte("x"))
			require.Error(t, err)
		}
	}
}

// A Write that fails is the last one: part of a record may be out.
func TestWriteFails(t *testing.T) {
	one, two := pair(t)
	c, _ := connect(t, one, two)
	require.NoError(t, c.SetWriteDeadline(time.Now().Add(10*time.Millisecond)))
	var err error
	for err == nil {
		_, err = c.Write(make([]byte, 1<<20))
	}
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, c.SetWriteDeadline(time.Time{}))
	_, err = c.Write([]byte("x"))
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.NoError(t, c.Close())
}

// Keys change in both directions: before there are too many records, and when
// the peer asks for it; and the reader doesn't wait for that.
func TestKeyUpdate(t *testing.T) {
	c, s := linked(t)
	echo := func() {
		t.Helper()
		for _, ends := range [][2]*Conn{{c, s}, {s, c}} {
			want, got := noise(100), make([]byte, 100)
			_, err := ends[0].Write(want)
			require.NoError(t, err)
			_, err = io.ReadFull(ends[1], got)
			require.NoError(t, err)
			require.Equal(t, want, got)
		}
	}
	echo()
	of := func() [4]string {
		return [4]string{string(c.out.secret), string(c.in.secret), string(s.out.secret), string(s.in.secret)}
	}
	before := of()
	c.out.seq, s.in.seq = rekeyAfter, rekeyAfter
	echo()
	after := of()
	require.NotEqual(t, before[0], after[0])
	require.Equal(t, after[0], after[3])
	require.Equal(t, before[1], after[1])

	c.protect(typeHandshake, []byte{typeKeyUpdate, 0, 0, 1, 1})
	c.out.update()
	echo()
	last := of()
	require.NotEqual(t, after[0], last[0])
	require.NotEqual(t, after[1], last[1], "who is asked answers")
	require.Equal(t, last[0], last[3])
	require.Equal(t, last[1], last[2])
	require.False(t, s.owed.Load())
	require.EqualValues(t, 1, s.out.seq)
}

// Who doesn't have the key gets nowhere, and doesn't learn whether there is
// such an identity.
func TestWrongKey(t *testing.T) {
	said := map[string]bool{}
	for name, c := range map[string]func(net.Conn) *Conn{
		"other key": func(nc net.Conn) *Conn { return Client(nc, "alice", testKey[:31]) },
		"unknown":   func(nc net.Conn) *Conn { return Client(nc, "bob", testKey) },
		"zoe's key": func(nc net.Conn) *Conn { return Client(nc, "alice", testKeys["zoe"]) },
		"no name":   func(nc net.Conn) *Conn { return Client(nc, "alicf", testKey) },
	} {
		t.Run(name, func(t *testing.T) {
			one, two := pair(t)
			s, log := Server(two, testKeys), &tap{Conn: one}
			done := make(chan error, 1)
			go func() { done <- s.Handshake() }()
			err := c(log).Handshake()
			require.EqualError(t, err, "the peer sent decrypt_error: it may not know the identity, or have another key for it")
			f := (*Error)(nil)
			require.ErrorAs(t, <-done, &f)
			require.Equal(t, decryptError, f.Alert)
			said[string(log.got)] = true
		})
	}
	require.Len(t, said, 1, "all answers are the same")
	t.Run("server", func(t *testing.T) {
		// One that takes a binder on trust doesn't get past its Finished.
		one, two := pair(t)
		c := Client(one, "alice", testKey)
		go func() {
			s := Server(two, nil)
			hello, raw, err := s.clientHello()
			if err != nil {
				return
			}
			seen := newTranscript()
			seen.Write(raw)
			private, _ := curve(groupX25519).GenerateKey(rand.Reader)
			shared, _ := exchange(private, hello.shares[0])
			s.sendServerHello(&serverHello{random: noise(32), suite: suites[0].id,
				share: keyShare{groupX25519, private.PublicKey().Bytes()}}, seen, false)
			_ = s.serverFinish(suites[0], earlySecret(testKey[1:]).next(shared), seen)
		}()
		f := (*Error)(nil)
		require.ErrorAs(t, c.Handshake(), &f)
		require.Equal(t, badRecordMAC, f.Alert)
	})
}

// A tap keeps what was read.
type tap struct {
	net.Conn
	got []byte
}

func (c *tap) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.got = append(c.got, p[:n]...)
	return n, err
}

// Two handshakes have no key in common: (EC)DHE and the randoms see to it.
func TestForwardSecrecy(t *testing.T) {
	one, _ := linked(t)
	two, _ := linked(t)
	require.NotEqual(t, one.out.secret, two.out.secret)
	require.NotEqual(t, one.in.secret, two.in.secret)
	require.NotEqual(t, one.in.secret, one.out.secret)
}

// What was changed on the way, or comes twice, isn't taken.
func TestTampering(t *testing.T) {
	const record = headerLen + 4 + 1 + tagLen
	for i := range record {
		one, two := pair(t)
		c, s := connect(t, one, two)
		c.protect(typeData, []byte("text"))
		require.Len(t, c.obuf, record)
		c.obuf[i] ^= 1
		// A longer record than there is would be waited for.
		c.obuf = append(c.obuf, make([]byte, 300)...)
		require.NoError(t, c.flush())
		n, err := s.Read(make([]byte, 4))
		require.Zero(t, n)
		require.ErrorAs(t, err, new(*Error), "byte %d", i)
	}
	one, two := pair(t)
	c, s := connect(t, one, two)
	c.protect(typeData, []byte("text"))
	c.obuf = append(c.obuf, c.obuf...)
	require.NoError(t, c.flush())
	_, err := io.ReadFull(s, make([]byte, 4))
	require.NoError(t, err)
	_, err = s.Read(make([]byte, 4))
	f := (*Error)(nil)
	require.True(t, errors.As(err, &f) && f.Alert == badRecordMAC, "%v", err)
}
