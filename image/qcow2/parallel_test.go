package qcow2_test

import (
	"bytes"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// A gate is a device on which a chosen request waits.
type gate struct {
	image.Device
	mu   sync.Mutex
	hold func(what string, off int64, n int) bool
	in   chan struct{} // one for each that waits
	open chan struct{}
}

func newGate(d image.Device) *gate {
	return &gate{Device: d, in: make(chan struct{}, 64), open: make(chan struct{})}
}

// shut makes the first request that hold picks wait, until the function that it
// returns is called.
func (g *gate) shut(hold func(what string, off int64, n int) bool) (release func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hold = hold
	return sync.OnceFunc(func() {
		g.mu.Lock()
		g.hold = nil
		g.mu.Unlock()
		close(g.open)
	})
}

func (g *gate) pass(what string, off int64, n int) {
	g.mu.Lock()
	held := g.hold != nil && g.hold(what, off, n)
	if held {
		g.hold = nil
	}
	g.mu.Unlock()
	if held {
		g.in <- struct{}{}
		<-g.open
	}
}

func (g *gate) ReadAt(p []byte, off int64) (int, error) {
	g.pass("read", off, len(p))
	return g.Device.ReadAt(p, off)
}

func (g *gate) WriteAt(p []byte, off int64) (int, error) {
	g.pass("write", off, len(p))
	return g.Device.WriteAt(p, off)
}

func (g *gate) Sync() error {
	g.pass("sync", 0, 0)
	return g.Device.Sync()
}

func (g *gate) Unwrap() image.Device { return g.Device }

// inTime fails if f doesn't return though something else waits.
func inTime(t *testing.T, what string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		require.NoError(t, err, what)
	case <-time.After(30 * time.Second):
		require.Fail(t, "waits for another request", what)
	}
}

// TestNoWaiting has one request that doesn't come back from the file, and others
// that must not care.
func TestNoWaiting(t *testing.T) {
	const cs = 65536
	for _, c := range []struct {
		name  string
		stuck func(im *qcow2.Image) error
		hold  func(what string, off int64, n int) bool
		alloc bool // others can allocate meanwhile
	}{
		{"a read", func(im *qcow2.Image) error { _, err := im.ReadAt(make([]byte, 100), 0); return err },
			func(what string, _ int64, n int) bool { return what == "read" && n == 100 }, true},
		{"a read of an L2 table", func(im *qcow2.Image) error { _, err := im.ReadAt(make([]byte, 100), 3<<29); return err },
			func(what string, _ int64, n int) bool { return what == "read" && n == cs }, true},
		{"a write in place", func(im *qcow2.Image) error { _, err := im.WriteAt(make([]byte, 100), 10); return err },
			func(what string, _ int64, n int) bool { return what == "write" && n == 100 }, true},
		{"a write that allocates", func(im *qcow2.Image) error { _, err := im.WriteAt(make([]byte, 100), 40*cs); return err },
			func(what string, _ int64, n int) bool { return what == "write" && n >= 100 }, true},
		{"a sync", func(im *qcow2.Image) error { return im.Sync() },
			func(what string, _ int64, _ int) bool { return what == "sync" }, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem := &keep{imagetest.NewMemory(0)}
			im, err := qcow2.Create(mem, &qcow2.CreateOptions{Size: 4 << 30})
			require.NoError(t, err)
			for _, off := range []int64{0, cs, 2 * cs, 3 << 29} {
				_, err = im.WriteAt(bytes.Repeat([]byte{byte(off>>16) + 1}, cs), off)
				require.NoError(t, err)
			}
			require.NoError(t, im.Close())
			g := newGate(mem)
			im, err = qcow2.Open(g, nil)
			require.NoError(t, err)
			_, err = im.ReadAt(make([]byte, 512), cs) // the L2 table is known
			require.NoError(t, err)
			_, err = im.WriteAt(make([]byte, 512), 60*cs) // and there is a new mapping
			require.NoError(t, err)
			release := g.shut(c.hold)
			defer release()
			stuck := make(chan error, 1)
			go func() { stuck <- c.stuck(im) }()
			<-g.in

			inTime(t, "read", func() error { _, err := im.ReadAt(make([]byte, 512), cs); return err })
			inTime(t, "status", func() error { _, err := im.BlockStatus(0, cs); return err })
			inTime(t, "write in place", func() error { _, err := im.WriteAt(make([]byte, 50), 2*cs); return err })
			if c.alloc {
				inTime(t, "write that allocates", func() error { _, err := im.WriteAt(make([]byte, 50), 50*cs+10); return err })
				inTime(t, "zero", func() error { return im.WriteZeroes(2*cs, cs) })
			}
			select {
			case err := <-stuck:
				require.Fail(t, "the request came back", "%v", err)
			default:
			}
			release()
			require.NoError(t, <-stuck)
			noErrors(t, im, false)
			require.NoError(t, im.Close())
		})
	}
}

// TestReuseWaits: a cluster that a request is still reading isn't given to
// another one.
func TestReuseWaits(t *testing.T) {
	const cs = 4096
	mem := &keep{imagetest.NewMemory(0)}
	im, err := qcow2.Create(mem, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs})
	require.NoError(t, err)
	want := bytes.Repeat([]byte("mine"), cs/4)
	_, err = im.WriteAt(want, 0)
	require.NoError(t, err)
	require.NoError(t, im.Close())
	g := newGate(mem)
	im, err = qcow2.Open(g, nil)
	require.NoError(t, err)
	release := g.shut(func(what string, _ int64, n int) bool { return what == "read" && n == 1000 })
	defer release()
	got := make([]byte, 1000)
	done := make(chan error, 1)
	go func() { _, err := im.ReadAt(got, 0); done <- err }()
	<-g.in
	require.NoError(t, im.Discard(0, cs))
	require.NoError(t, im.Sync())
	for off := int64(cs); off < 1<<20; off += cs {
		_, err := im.WriteAt(bytes.Repeat([]byte("his "), cs/4), off)
		require.NoError(t, err)
	}
	require.NoError(t, im.Sync())
	release()
	require.NoError(t, <-done)
	require.Equal(t, want[:1000], got)
	require.NoError(t, im.Sync())
	noErrors(t, im, false)
	require.NoError(t, im.Close())
}

// TestParallel has many writers and readers at once, on an image with each
// feature, and two writers in each cluster.
func TestParallel(t *testing.T) {
	s := seed(t)
	const size, writers = 1 << 20, 8
	for i, v := range variants(size) {
		t.Run(v.name, func(t *testing.T) {
			r, im, want := v.build(t, imagetest.NewMemory(0), size, rand.New(rand.NewPCG(s, uint64(i))))
			var wg sync.WaitGroup
			var failed atomic.Pointer[error]
			for w := range writers {
				wg.Go(func() {
					rng := rand.New(rand.NewPCG(s, uint64(i<<8+w)))
					for range scale(150) {
						// Every writer has its bytes in each kilobyte.
						at := rng.Int64N(size/1024)*1024 + int64(w)*128
						var err error
						switch rng.IntN(12) {
						case 0:
							err = im.Sync()
						case 1:
							_, err = im.ReadAt(make([]byte, 70_000), min(at, size-70_000))
						default:
							p := bytes.Repeat([]byte{byte(rng.Uint32())}, 1+rng.IntN(128))
							_, err = im.WriteAt(p, at)
							copy(want[at:], p)
						}
						if err != nil {
							failed.Store(&err)
							return
						}
					}
				})
			}
			wg.Wait()
			if err := failed.Load(); err != nil {
				require.NoError(t, *err)
			}
			got := contents(t, im)
			require.True(t, bytes.Equal(want, got), "%s", firstDiff(want, got))
			noErrors(t, im, false)
			require.NoError(t, im.Close())
			im = r.open(t, qcow2.OpenOptions{})
			require.True(t, bytes.Equal(want, contents(t, im)))
			require.NoError(t, im.Close())
		})
	}
}
