package nbd_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/nbd"
)

// answer is a structured reply with the data of a read: bytes of the value
// that is its offset's in blocks.
func answer(c net.Conn, r command) bool {
	p := make([]byte, r.n)
	for i := range p {
		p[i] = byte((r.off + uint64(i)) / 4096)
	}
	return chunk(c, 1, 1, r.cookie, r.off, p)
}

func batchOf(n int) []image.Request {
	reads := make([]image.Request, n)
	for i := range reads {
		reads[i] = image.Request{P: make([]byte, 512), Off: int64(i) * 4096}
	}
	return reads
}

// A batch's requests are all under way before the first is answered, and may
// be answered in any order.
func TestBatchTogether(t *testing.T) {
	const n = 12
	d, err := dialFake(fake(t, func(t *testing.T, c net.Conn) {
		if !negotiate(c, 1<<20, allFlags) {
			return
		}
		var rs []command
		for range n {
			r, ok := nextCommand(c)
			if !ok {
				return
			}
			rs = append(rs, r)
		}
		for i := range rs {
			if !answer(c, rs[n-1-i]) {
				return
			}
		}
		_, _ = nextCommand(c)
	}))
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	reads := batchOf(n)
	require.NoError(t, d.ReadBatch(reads))
	for i, r := range reads {
		require.Equal(t, byte(i), r.P[0], "read %d", i)
		require.Equal(t, byte(i), r.P[511], "read %d", i)
	}
}

// What the server refuses is that read's error alone.
func TestBatchRefused(t *testing.T) {
	d, err := dialFake(fake(t, func(t *testing.T, c net.Conn) {
		if !negotiate(c, 1<<20, allFlags) {
			return
		}
		for {
			r, ok := nextCommand(c)
			switch {
			case !ok || r.typ != 0:
				return
			case r.off == 2*4096:
				ok = chunk(c, 1, 1<<15+1, r.cookie, uint32(5), uint16(0))
			default:
				ok = answer(c, r)
			}
			if !ok {
				return
			}
		}
	}))
	require.NoError(t, err)
	defer func() { require.NoError(t, d.Close()) }()
	reads := batchOf(4)
	remote := (*nbd.RemoteError)(nil)
	require.ErrorAs(t, d.ReadBatch(reads), &remote)
	require.EqualValues(t, 2*4096, remote.Off)
	for i, r := range reads {
		if i == 2 {
			require.ErrorAs(t, r.Err, &remote)
			continue
		}
		require.NoError(t, r.Err)
		require.Equal(t, byte(i), r.P[0], "read %d", i)
	}
}

// A batch that a lost connection cuts short is read again on the next one, and
// without a next one fails as a whole.
func TestBatchReconnects(t *testing.T) {
	for _, n := range []int{12, -12, 40, -40} { // by one write, and by more; negative: in vain
		again := n > 0
		cut := func(t *testing.T, c net.Conn) {
			if !negotiate(c, 1<<20, allFlags) {
				return
			}
			for range 2 {
				if r, ok := nextCommand(c); !ok || !answer(c, r) {
					return
				}
			}
		}
		o := fake(t, cut, func(t *testing.T, c net.Conn) {
			for ok := negotiate(c, 1<<20, allFlags); ok; {
				var r command
				if r, ok = nextCommand(c); ok {
					ok = r.typ == 0 && answer(c, r)
				}
			}
		})
		if again {
			o.Reconnect = 0
		}
		d, err := dialFake(o)
		require.NoError(t, err)
		reads := batchOf(max(n, -n))
		err = d.ReadBatch(reads)
		for i, r := range reads {
			if again {
				require.NoError(t, r.Err)
				require.Equal(t, byte(i), r.P[0], "read %d", i)
				continue
			}
			require.True(t, errors.Is(r.Err, nbd.ErrDisconnected), "read %d: %v", i, r.Err)
		}
		require.Equal(t, again, err == nil)
		require.NoError(t, d.Close())
	}
}

// writesOf are writes of a block each.
func writesOf(n int) []image.Request {
	writes := make([]image.Request, n)
	for i := range writes {
		writes[i] = image.Request{P: bytes.Repeat([]byte{byte(i)}, 4096), Off: int64(n-i) * 8192}
	}
	return writes
}

// A batch of writes goes out in order, and as a whole before the first answer
// where Ordered says that this will do. Otherwise each waits for the one before.
func TestWriteBatch(t *testing.T) {
	for _, ordered := range []bool{true, false} {
		const n = 20 // more than go out by one write
		var got []command
		o := fake(t, func(t *testing.T, c net.Conn) {
			ok := negotiate(c, 1<<20, allFlags)
			for ok && len(got) < n {
				first := len(got)
				for ok && len(got) < min(first+16, n) {
					var r command
					if r, ok = nextCommand(c); ok {
						got = append(got, r)
					}
					if !ordered {
						require.NoError(t, c.SetReadDeadline(time.Now().Add(3*time.Millisecond)))
						_, err := c.Read(make([]byte, 1))
						require.ErrorIs(t, err, os.ErrDeadlineExceeded, "the next one waits")
						require.NoError(t, c.SetReadDeadline(time.Time{}))
						break
					}
				}
				for i := len(got) - 1; ok && i >= first; i-- {
					ok = chunk(c, 1, 0, got[i].cookie)
				}
			}
			_, _ = nextCommand(c)
		})
		o.Ordered = ordered
		d, err := dialFake(o)
		require.NoError(t, err)
		writes := writesOf(n)
		require.NoError(t, d.WriteBatch(writes))
		require.Len(t, got, n)
		for i, r := range got {
			require.Equal(t, writes[i].Off, int64(r.off))
			require.Equal(t, writes[i].P, r.data)
		}
		require.NoError(t, d.Close())
	}
}

// What fails of a batch of writes fails all of it, and poisons.
func TestWriteBatchFails(t *testing.T) {
	for _, cut := range []bool{false, true} {
		o := fake(t, func(t *testing.T, c net.Conn) {
			var rs []command
			for ok := negotiate(c, 1<<20, allFlags); ok && len(rs) < 4; {
				var r command
				if r, ok = nextCommand(c); ok {
					rs = append(rs, r)
				}
			}
			for i, r := range rs {
				switch {
				case i != 2:
					chunk(c, 1, 0, r.cookie)
				case cut:
					return
				default:
					chunk(c, 1, 1<<15+1, r.cookie, uint32(5), uint16(0))
				}
			}
			_, _ = nextCommand(c)
		})
		o.Ordered, o.Reconnect = true, time.Second
		d, err := dialFake(o)
		require.NoError(t, err)
		err = d.WriteBatch(writesOf(4))
		if cut {
			require.ErrorIs(t, err, image.ErrPoisoned)
		} else {
			remote := (*nbd.RemoteError)(nil)
			require.ErrorAs(t, err, &remote)
			require.EqualValues(t, writesOf(4)[2].Off, remote.Off)
		}
		require.ErrorIs(t, d.SyncBatch(nil), image.ErrPoisoned)
		require.ErrorIs(t, d.WriteBatch(writesOf(1)), image.ErrPoisoned)
		require.NoError(t, d.Close())
	}
}

// A SyncBatch has the FLUSH and the reads under way at once, and each fails on
// its own.
func TestSyncBatch(t *testing.T) {
	for _, fail := range []int{-1, 0, 2} { // nothing, the FLUSH, a read
		d, err := dialFake(fake(t, func(t *testing.T, c net.Conn) {
			var rs []command
			for ok := negotiate(c, 1<<20, allFlags); ok && len(rs) < 4; {
				var r command
				if r, ok = nextCommand(c); ok {
					rs = append(rs, r)
				}
			}
			for i, r := range rs {
				switch {
				case i == fail:
					chunk(c, 1, 1<<15+1, r.cookie, uint32(5), uint16(0))
				case r.typ == 0:
					answer(c, r)
				default:
					require.EqualValues(t, 3, r.typ)
					chunk(c, 1, 0, r.cookie)
				}
			}
			_, _ = nextCommand(c)
		}))
		require.NoError(t, err)
		reads := batchOf(3)
		err = d.SyncBatch(reads)
		remote := (*nbd.RemoteError)(nil)
		if fail == 0 {
			require.ErrorAs(t, err, &remote)
			require.ErrorIs(t, d.Sync(), image.ErrPoisoned)
		} else {
			require.NoError(t, err)
			for i, r := range reads {
				if i+1 == fail {
					require.ErrorAs(t, r.Err, &remote)
					continue
				}
				require.NoError(t, r.Err)
				require.Equal(t, byte(i), r.P[0])
			}
		}
		require.NoError(t, d.Close())
	}
}

// A server that hung up while nothing was under way is noticed before a write
// is sent to it: the next connection takes the write, and nothing is poisoned.
func TestHungUpWhileIdle(t *testing.T) {
	gone := make(chan struct{})
	o := fake(t, func(t *testing.T, c net.Conn) {
		if negotiate(c, 1<<20, allFlags) {
			if r, ok := nextCommand(c); ok {
				answer(c, r)
			}
		}
		// As a server on another machine that ends: requests would still be
		// accepted, by nobody.
		_ = c.(interface{ CloseWrite() error }).CloseWrite()
		close(gone)
		_, _ = nextCommand(c)
	}, func(t *testing.T, c net.Conn) {
		for ok := negotiate(c, 1<<20, allFlags); ok; {
			var r command
			if r, ok = nextCommand(c); ok && r.typ != 2 {
				ok = chunk(c, 1, 0, r.cookie)
			}
		}
	})
	o.Reconnect = 10 * time.Second
	d, err := dialFake(o)
	require.NoError(t, err)
	_, err = d.ReadAt(make([]byte, 4096), 8192)
	require.NoError(t, err)
	<-gone
	_, err = d.WriteAt(make([]byte, 4096), 0)
	require.NoError(t, err)
	require.NoError(t, d.Sync())
	require.NoError(t, d.Close())
}

// A dull connection is nothing but that, and takes n bytes more if n isn't
// negative.
type dull struct {
	net.Conn
	left *atomic.Int64
}

func (d dull) Write(p []byte) (int, error) {
	n := d.left.Load()
	if n < 0 {
		return d.Conn.Write(p)
	}
	n = min(n, int64(len(p)))
	if _, err := d.Conn.Write(p[:n]); err != nil {
		return 0, err
	}
	d.left.Store(0)
	return int(n), syscall.EPIPE
}

// A request of which nothing went out is sent again on the next connection. One
// of which a part did may have arrived.
func TestUnsent(t *testing.T) {
	for _, n := range []int64{0, 1, 28} {
		for _, batch := range []bool{false, true} {
			o := fake(t, func(t *testing.T, c net.Conn) {
				for ok := negotiate(c, 1<<20, allFlags); ok; {
					var r command
					if r, ok = nextCommand(c); ok && r.typ != 2 {
						ok = chunk(c, 1, 0, r.cookie)
					}
				}
			})
			var left atomic.Int64
			left.Store(-1)
			dial, dialled := o.Dial, 0
			o.Dial = func(ctx context.Context) (net.Conn, error) {
				c, err := dial(ctx)
				if dialled++; dialled == 1 {
					return dull{c, &left}, err
				}
				return c, err
			}
			o.Ordered, o.Reconnect = true, 10*time.Second
			d, err := dialFake(o)
			require.NoError(t, err)
			left.Store(n)
			if batch {
				err = d.WriteBatch(writesOf(3))
			} else {
				_, err = d.WriteAt(make([]byte, 4096), 0)
			}
			if n == 0 {
				require.NoError(t, err)
				require.NoError(t, d.Sync())
			} else {
				require.ErrorIs(t, err, image.ErrPoisoned)
			}
			require.NoError(t, d.Close())
		}
	}
}

// TestTurns: whoever waits finds somebody who reads, though requests of others
// end just then, and no more come.
func TestTurns(t *testing.T) {
	s := serve(t, nil, &nbd.Export{Name: "x", Device: imagetest.NewMemory(1 << 20)})
	d := open(t, s.uri("x"), nil)
	for range imagetest.Scale(20_000) {
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				_, err := d.ReadAt(make([]byte, 512), 4096)
				assert.NoError(t, err)
			})
		}
		wg.Wait()
	}
	require.NoError(t, d.Close())
}
