package nbd_test

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/nbd"
)

// A server is killed and comes back. Nothing is at stake, so nobody notices.
func TestReconnect(t *testing.T) {
	file := blank(t, 1<<20)
	p := qemuNBD(t, file)
	d := open(t, p.uri(""), nil)
	defer func() { require.NoError(t, d.Close()) }()
	want := bytes.Repeat([]byte("nvstore."), 1000)
	for round := range 3 {
		off := int64(round * 10_000)
		_, err := d.WriteAt(want, off)
		require.NoError(t, err)
		require.NoError(t, d.Sync())
		p.kill()
		restarted := make(chan struct{})
		go func() {
			defer close(restarted)
			time.Sleep(20 * time.Millisecond)
			require.NoError(t, os.Remove(p.sock))
			p = start(t, p.sock, "qemu-nbd", "-t", "-f", "raw", "-k", p.sock, file)
		}()
		got := make([]byte, len(want))
		switch round {
		case 0:
			require.NoError(t, image.ReadFull(d, got, off))
			require.Equal(t, want, got)
		case 1:
			require.NoError(t, d.Sync())
		case 2:
			_, err := d.BlockStatus(0, 4096)
			require.NoError(t, err)
		}
		<-restarted
	}
}

// What was written and not synced is lost with the server, or not: the handle
// never acknowledges it.
func TestReconnectPoisons(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(t *testing.T, d *nbd.Device)
		lost    bool
	}{
		"written":          {func(t *testing.T, d *nbd.Device) { write(t, d, 0) }, true},
		"written, durable": {func(t *testing.T, d *nbd.Device) { _, err := d.WriteDurable([]byte("x"), 5); require.NoError(t, err) }, false},
		"synced":           {func(t *testing.T, d *nbd.Device) { write(t, d, 0); require.NoError(t, d.Sync()) }, false},
		"written again":    {func(t *testing.T, d *nbd.Device) { write(t, d, 0); require.NoError(t, d.Sync()); write(t, d, 0) }, true},
		"zeroed":           {func(t *testing.T, d *nbd.Device) { require.NoError(t, d.WriteZeroes(0, 4096)) }, true},
		"trimmed":          {func(t *testing.T, d *nbd.Device) { require.NoError(t, d.Discard(0, 4096)) }, true},
		"read": {func(t *testing.T, d *nbd.Device) {
			require.NoError(t, image.ReadFull(d, make([]byte, 10), 0))
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			file := blank(t, 1<<20)
			p := nbdkit(t, "file", file)
			d := open(t, p.uri(""), nil)
			defer d.Close()
			c.prepare(t, d)
			p.kill()
			require.NoError(t, os.Remove(p.sock))
			start(t, p.sock, "nbdkit", "-f", "-U", p.sock, "file", file)
			if !c.lost {
				write(t, d, 0)
				require.NoError(t, d.Sync())
				return
			}
			for range 2 {
				_, err := d.WriteAt([]byte("x"), 0)
				require.ErrorIs(t, err, image.ErrPoisoned)
				require.ErrorContains(t, err, "may be lost")
				require.ErrorIs(t, d.Sync(), image.ErrPoisoned)
				_, err = d.ReadAt(make([]byte, 10), 0)
				require.ErrorIs(t, err, image.ErrPoisoned, "a read would show what was there before")
			}
		})
	}
}

func write(t *testing.T, d *nbd.Device, off int64) {
	t.Helper()
	_, err := d.WriteAt([]byte("some bytes"), off)
	require.NoError(t, err)
}

// A write that was sent and not answered when the server went poisons, too.
func TestLostInFlight(t *testing.T) {
	d, err := dialFake(func() *nbd.Options {
		o := fake(t, func(_ *testing.T, c net.Conn) { _ = negotiate(c, 1<<20, allFlags) && discard(c, 28+100) })
		o.Reconnect = time.Second
		return o
	}())
	require.NoError(t, err)
	defer d.Close()
	_, err = d.WriteAt(make([]byte, 100), 0)
	require.ErrorIs(t, err, image.ErrPoisoned)
	require.ErrorIs(t, err, nbd.ErrDisconnected)
}

// A flush covers what was answered before it was sent, and no more.
func TestFlushCovers(t *testing.T) {
	var mu sync.Mutex
	var held *command
	serve := func(_ *testing.T, c net.Conn) {
		if !negotiate(c, 1<<20, allFlags) {
			return
		}
		for {
			r, ok := nextCommand(c)
			if !ok {
				return
			}
			mu.Lock()
			switch {
			case r.typ == 3 && held == nil:
				held = &r // until a write has come
			case r.typ == 1 && held != nil:
				simple(c, 0, r.cookie)
				simple(c, 0, held.cookie)
				mu.Unlock()
				discard(c, 28) // the next request finds nobody
				return
			default:
				simple(c, 0, r.cookie)
			}
			mu.Unlock()
		}
	}
	o := fake(t, serve)
	d, err := dialFake(o)
	require.NoError(t, err)
	defer d.Close()
	synced := make(chan error)
	go func() { synced <- d.Sync() }()
	for {
		mu.Lock()
		is := held != nil
		mu.Unlock()
		if is {
			break
		}
		time.Sleep(time.Millisecond)
	}
	write(t, d, 0)
	require.NoError(t, <-synced)
	_, err = d.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, image.ErrPoisoned, "the write came after the flush was sent")
}

// After reconnecting, the export is another: nothing goes on.
func TestReconnectOther(t *testing.T) {
	serve := func(size uint64, flags uint16) script {
		return func(_ *testing.T, c net.Conn) { _ = negotiate(c, size, flags) && discard(c, 28) }
	}
	for name, other := range map[string]script{
		"size":      serve(2<<20, allFlags),
		"read-only": serve(1<<20, allFlags|2),
		"no flush":  serve(1<<20, allFlags&^(1<<2)),
	} {
		t.Run(name, func(t *testing.T) {
			o := fake(t, serve(1<<20, allFlags), other)
			o.Reconnect = time.Second
			d, err := dialFake(o)
			require.NoError(t, err)
			defer d.Close()
			_, err = d.ReadAt(make([]byte, 10), 0)
			require.ErrorIs(t, err, image.ErrPoisoned)
			require.ErrorContains(t, err, "another")
		})
	}
}

// A server that always hangs up doesn't keep the client busy for ever, and no
// server is waited for only so long.
func TestReconnectGivesUp(t *testing.T) {
	o := fake(t, func(_ *testing.T, c net.Conn) { _ = negotiate(c, 1<<20, allFlags) && discard(c, 28) })
	o.Reconnect = time.Minute
	d, err := dialFake(o)
	require.NoError(t, err)
	_, err = d.ReadAt(make([]byte, 10), 0)
	require.ErrorIs(t, err, nbd.ErrDisconnected)
	require.NoError(t, d.Close())

	p := nbdkit(t, "memory", "1M")
	d = open(t, p.uri(""), &nbd.Options{Reconnect: 30 * time.Millisecond})
	p.kill()
	_, err = d.ReadAt(make([]byte, 10), 0)
	require.ErrorIs(t, err, nbd.ErrDisconnected)
	require.NoError(t, d.Close())
}

// Close doesn't wait for a reconnection that is under way.
func TestCloseWhileReconnecting(t *testing.T) {
	p := nbdkit(t, "memory", "1M")
	d := open(t, p.uri(""), &nbd.Options{Reconnect: time.Hour})
	p.kill()
	failed := make(chan error)
	go func() {
		_, err := d.ReadAt(make([]byte, 10), 0)
		failed <- err
	}()
	time.Sleep(20 * time.Millisecond)
	require.NoError(t, d.Close())
	require.ErrorIs(t, <-failed, image.ErrClosed)
}

// Many goroutines lose their connection at once; one of them dials.
func TestReconnectMany(t *testing.T) {
	good := func(_ *testing.T, c net.Conn) {
		for ok := negotiate(c, 1<<20, allFlags); ok; {
			var r command
			if r, ok = nextCommand(c); ok && r.typ == 0 {
				ok = chunk(c, 1, 2, r.cookie, r.off, r.n)
			}
		}
	}
	scripts := []script{func(_ *testing.T, c net.Conn) {
		if negotiate(c, 1<<20, allFlags) {
			for range 16 {
				nextCommand(c)
			}
		}
	}, good}
	o := fake(t, scripts...)
	var dials int
	var mu sync.Mutex
	inner := o.Dial
	o.Dial = func(ctx context.Context) (net.Conn, error) {
		mu.Lock()
		defer mu.Unlock()
		dials++
		return inner(ctx)
	}
	o.Reconnect = 10 * time.Second
	d, err := dialFake(o)
	require.NoError(t, err)
	defer d.Close()
	var wg sync.WaitGroup
	errs := make(chan error, 16)
	for i := range int64(16) {
		wg.Go(func() {
			_, err := d.ReadAt(make([]byte, 512), i*512)
			errs <- err
		})
	}
	wg.Wait()
	for range 16 {
		require.NoError(t, <-errs)
	}
	require.Equal(t, 2, dials)
}

// Errors of the medium reach the caller by name, and end what must end.
func TestErrorFilter(t *testing.T) {
	serve := func(t *testing.T, args ...string) *nbd.Device {
		p := nbdkit(t, append([]string{"--filter=error", "memory", "1M"}, args...)...)
		d := open(t, p.uri(""), nil)
		t.Cleanup(func() { d.Close() })
		return d
	}
	t.Run("read", func(t *testing.T) {
		d := serve(t, "error-pread-rate=100%")
		_, err := d.ReadAt(make([]byte, 10), 5)
		require.ErrorContains(t, err, "read of 10 bytes at 5")
		require.ErrorContains(t, err, "input/output error")
		write(t, d, 0)
		require.NoError(t, d.Sync(), "a failed read is no reason to stop")
	})
	t.Run("write", func(t *testing.T) {
		d := serve(t, "error-pwrite-rate=100%")
		_, err := d.WriteAt(make([]byte, 10), 5)
		require.ErrorContains(t, err, "input/output error")
		require.ErrorIs(t, d.Sync(), image.ErrPoisoned)
		require.NoError(t, image.ReadFull(d, make([]byte, 10), 5), "reading goes on")
	})
	t.Run("no space", func(t *testing.T) {
		d := serve(t, "error-pwrite-rate=100%", "error=ENOSPC")
		_, err := d.WriteAt(make([]byte, 10), 5)
		require.ErrorIs(t, err, image.ErrNoSpace)
	})
	t.Run("zeroes refused", func(t *testing.T) {
		d := serve(t, "error-zero-rate=100%", "error=EINVAL")
		require.Error(t, d.WriteZeroes(0, 10))
		require.NoError(t, d.Sync(), "the server didn't want it, and did nothing")
	})
	t.Run("block status", func(t *testing.T) {
		d := serve(t, "error-extents-rate=100%")
		_, err := d.BlockStatus(0, 4096)
		require.ErrorContains(t, err, "block status of 4096 bytes at 0")
	})
	t.Run("some of many", func(t *testing.T) {
		d := serve(t, "error-pread-rate=20%")
		_, err := d.ReadAt(make([]byte, 1<<20), 0)
		for range 50 {
			if _, again := d.ReadAt(make([]byte, 4096), 0); again != nil {
				err = again
			}
		}
		require.ErrorContains(t, err, "input/output error")
	})
}

// A failed flush is final, even if the next would succeed.
func TestFlushFails(t *testing.T) {
	flushes := 0
	d, err := dialFake(fake(t, func(_ *testing.T, c net.Conn) {
		for ok := negotiate(c, 1<<20, allFlags); ok; {
			var r command
			if r, ok = nextCommand(c); ok && r.typ == 3 && flushes == 0 {
				flushes++
				ok = simple(c, 5, r.cookie)
			} else if ok {
				ok = simple(c, 0, r.cookie)
			}
		}
	}))
	require.NoError(t, err)
	defer d.Close()
	write(t, d, 0)
	require.ErrorContains(t, d.Sync(), "flush")
	require.ErrorIs(t, d.Sync(), image.ErrPoisoned)
	_, err = d.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, image.ErrPoisoned)
	require.NotErrorIs(t, err, io.EOF)
}
