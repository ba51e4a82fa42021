package nbd_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/nbd"
	"nvstore.dev/image/raw"
)

// A served server has been started by a test.
type served struct {
	*nbd.Server
	sock string

	mu      sync.Mutex
	reports []error
}

func (s *served) uri(export string) string { return "nbd+unix:///" + export + "?socket=" + s.sock }

func (s *served) told() []error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]error(nil), s.reports...)
}

// first waits for what the server reports first.
func (s *served) first(t *testing.T) error {
	t.Helper()
	require.Eventually(t, func() bool { return len(s.told()) > 0 }, time.Minute, time.Millisecond)
	return s.told()[0]
}

// serve runs a server until the test ends.
func serve(t *testing.T, o *nbd.ServerOptions, exports ...*nbd.Export) *served {
	t.Helper()
	s := &served{sock: socket(t)}
	var opts nbd.ServerOptions
	if o != nil {
		opts = *o
	}
	opts.Report = func(_ string, err error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.reports = append(s.reports, err)
	}
	s.Server = nbd.NewServer(&opts)
	for _, e := range exports {
		require.NoError(t, s.Add(e))
	}
	l, err := nbd.Listen("unix", s.sock)
	require.NoError(t, err)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.NoError(t, <-done)
	})
	return s
}

// slowly takes its time, so that the server leaves requests to workers.
type slowly struct{ image.Device }

func (s slowly) Unwrap() image.Device { return s.Device }

func (s slowly) ReadAt(p []byte, off int64) (int, error) {
	time.Sleep(100 * time.Microsecond)
	return s.Device.ReadAt(p, off)
}

func (s slowly) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(100 * time.Microsecond)
	return s.Device.WriteAt(p, off)
}

func (s slowly) Sync() error {
	time.Sleep(100 * time.Microsecond)
	return s.Device.Sync()
}

// What a server exports is a Device to a client, as good as the one below.
func TestServerConformance(t *testing.T) {
	file := func(t *testing.T, n int64) image.Device {
		d, err := raw.Create(filepath.Join(t.TempDir(), "disk"), n, nil)
		require.NoError(t, err)
		return d
	}
	memory := func(_ *testing.T, n int64) image.Device { return imagetest.NewMemory(n) }
	certs := newCA(t)
	for name, c := range map[string]struct {
		make    func(t *testing.T, n int64) image.Device
		block   int
		server  *nbd.ServerOptions
		client  nbd.Options
		granule int64
	}{
		"memory":         {make: memory},
		"file":           {make: file},
		"slow":           {make: func(t *testing.T, n int64) image.Device { return slowly{memory(t, n)} }},
		"slow file":      {make: func(t *testing.T, n int64) image.Device { return slowly{file(t, n)} }},
		"blocks of 512":  {make: memory, block: 512, granule: 512},
		"blocks of 64 K": {make: memory, block: 64 << 10, granule: 64 << 10},
		"one in flight":  {make: memory, client: nbd.Options{InFlight: 1}},
		"TLS": {make: memory, server: &nbd.ServerOptions{TLS: certs.server(t, true)},
			client: nbd.Options{TLS: certs.client(t, true)}},
		"PSK": {make: memory, server: &nbd.ServerOptions{PSKs: []*nbd.PSK{newPSK(t, "bob", 2), newPSK(t, "alice", 1)}},
			client: nbd.Options{PSK: newPSK(t, "alice", 1)}},
	} {
		t.Run(name, func(t *testing.T) {
			servers := map[image.Device]*served{}
			connect := func(t *testing.T, s *served, o nbd.Options) image.Device {
				d := open(t, s.uri("x"), &o)
				servers[d] = s
				return d
			}
			imagetest.Conformance(t, func(t *testing.T, n int64) image.Device {
				d := c.make(t, n)
				t.Cleanup(func() { d.Close() })
				return connect(t, serve(t, c.server, &nbd.Export{Name: "x", Device: d, MinBlock: c.block}), c.client)
			}, &imagetest.ConformanceOptions{
				Granule: c.granule,
				Reopen: func(t *testing.T, d image.Device) image.Device {
					require.NoError(t, d.Close())
					return connect(t, servers[d], c.client)
				},
				ReadOnly: func(t *testing.T, d image.Device) image.Device {
					require.NoError(t, d.Close())
					o := c.client
					o.ReadOnly = true
					return connect(t, servers[d], o)
				},
			})
		})
	}
}

// Sockets are their owner's from the instant they appear, stale ones are
// replaced, and what is somebody's is left alone.
func TestListen(t *testing.T) {
	path := socket(t)
	l, err := nbd.Listen("unix", path)
	require.NoError(t, err)
	info, err := os.Lstat(path)
	require.NoError(t, err)
	require.Equal(t, os.ModeSocket|0o600, info.Mode())
	require.Equal(t, path, l.Addr().String())

	_, err = nbd.Listen("unix", path)
	require.ErrorIs(t, err, os.ErrExist, "somebody listens")
	require.NoError(t, l.Close())
	require.NoFileExists(t, path)

	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	require.NoError(t, err)
	stale.SetUnlinkOnClose(false)
	require.NoError(t, stale.Close())
	l, err = nbd.Listen("unix", path)
	require.NoError(t, err, "nobody listens on the old one")
	require.NoError(t, os.Remove(path))
	require.NoError(t, os.WriteFile(path, []byte("mine"), 0o600))
	require.NoError(t, l.Close())
	require.FileExists(t, path, "not the listener's")
	_, err = nbd.Listen("unix", path)
	require.ErrorIs(t, err, os.ErrExist)

	deep := filepath.Join(filepath.Dir(path), "a-folder-with-a-name-that-leaves-no-room-for-a-hidden-one-in-a-socket-address")
	require.NoError(t, os.Mkdir(deep, 0o700))
	l, err = nbd.Listen("unix", filepath.Join(deep, "s"))
	require.NoError(t, err)
	c, err := net.Dial("unix", filepath.Join(deep, "s"))
	require.NoError(t, err)
	require.NoError(t, c.Close())
	require.NoError(t, l.Close())
	entries, err := os.ReadDir(deep)
	require.NoError(t, err)
	require.Empty(t, entries)
}

// A shutdown answers what has arrived, and nothing is in use afterwards.
func TestShutdown(t *testing.T) {
	for name, wrap := range map[string]func(image.Device) image.Device{
		"quick": func(d image.Device) image.Device { return d },
		"slow":  func(d image.Device) image.Device { return slowly{d} },
	} {
		t.Run(name, func(t *testing.T) {
			under := imagetest.NewMemory(1 << 20)
			s := serve(t, nil, &nbd.Export{Name: "x", Device: wrap(under)})
			d := open(t, s.uri("x"), &nbd.Options{Reconnect: -1})
			var wg sync.WaitGroup
			var mu sync.Mutex
			acked := map[int64]bool{}
			for i := range int64(8) {
				wg.Go(func() {
					for off := i * 64 << 10; off < (i+1)*64<<10; off++ {
						if _, err := d.WriteAt([]byte{1}, off); err != nil {
							return
						}
						mu.Lock()
						acked[off] = true
						mu.Unlock()
					}
				})
			}
			time.Sleep(20 * time.Millisecond)
			require.NoError(t, s.Shutdown(context.Background()))
			wg.Wait()
			require.NotEmpty(t, acked)
			p := make([]byte, 1<<20)
			require.NoError(t, image.ReadFull(under, p, 0))
			for off := range acked {
				require.EqualValues(t, 1, p[off], "acknowledged byte %d", off)
			}
			require.NoError(t, d.Close())
			require.Zero(t, s.Connections())
			require.ErrorIs(t, s.Serve(&net.UnixListener{}), image.ErrClosed)
		})
	}
}

// A shutdown whose time is up cuts off clients that keep the server busy.
func TestShutdownCuts(t *testing.T) {
	large := &large{Device: imagetest.NewMemory(4096)}
	s := serve(t, nil, &nbd.Export{Name: "x", Device: slowly{large}})
	c := dialRaw(t, s, 3)
	c.enter("x")
	c.request(2, 6, 1, 0, 1<<32-1) // zeroes without a hole: 65536 writes
	for large.writes.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	require.ErrorIs(t, s.Shutdown(ctx), context.DeadlineExceeded)
	c.hungUp()
	require.Zero(t, s.Connections())
	require.Less(t, large.writes.Load(), int64(65536), "it stopped")
}

// large says that it has 4 GiB, and forgets what is written.
type large struct {
	image.Device
	writes atomic.Int64
}

func (*large) Size() int64 { return 1 << 32 }
func (l *large) WriteAt(p []byte, _ int64) (int, error) {
	l.writes.Add(1)
	return len(p), nil
}

// An export that is removed has no user left; others go on.
func TestRemove(t *testing.T) {
	s := serve(t, nil, &nbd.Export{Name: "a", Device: imagetest.NewMemory(4096)}, &nbd.Export{Name: "b", Device: imagetest.NewMemory(8192)})
	a, b := open(t, s.uri("a"), &nbd.Options{Reconnect: -1}), open(t, s.uri("b"), nil)
	defer a.Close()
	defer b.Close()
	require.NoError(t, s.Remove("a"))
	require.ErrorIs(t, s.Remove("a"), image.ErrNotFound)
	_, err := a.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, nbd.ErrDisconnected)
	write(t, b, 0)
	_, err = nbd.Open(context.Background(), s.uri("a"), nil)
	require.ErrorIs(t, err, image.ErrNotFound)
	require.NoError(t, s.Add(&nbd.Export{Name: "a", Device: imagetest.NewMemory(5)}))
	again := open(t, s.uri("a"), nil)
	require.EqualValues(t, 5, again.Size(), "not a multiple of anything")
	require.NoError(t, again.Close())
}

func TestAdd(t *testing.T) {
	s := nbd.NewServer(nil)
	d := imagetest.NewMemory(4096)
	require.NoError(t, s.Add(&nbd.Export{Name: "x", Device: d}))
	require.ErrorIs(t, s.Add(&nbd.Export{Name: "x", Device: d}), image.ErrExist)
	for _, bad := range []nbd.Export{
		{MinBlock: 3}, {MinBlock: 128 << 10}, {MinBlock: -1}, {PreferredBlock: 256}, {MinBlock: 4096, PreferredBlock: 512},
		{PreferredBlock: 5000}, {MaxPayload: 512}, {MaxPayload: 64 << 20}, {Name: "a\x00b"}, {Name: string(make([]byte, 4097))},
	} {
		bad.Device = d
		require.ErrorIs(t, s.Add(&bad), image.ErrOutOfRange, "%+v", bad)
	}
}

// The only export is the default one, too, and by its own name.
func TestDefaultExport(t *testing.T) {
	s := serve(t, nil, &nbd.Export{Name: "uefi/vars", Device: imagetest.NewMemory(1000)})
	d := open(t, s.uri(""), nil)
	require.Equal(t, "uefi/vars", d.Info().Export)
	require.True(t, d.Info().Allocation)
	_, err := d.BlockStatus(0, 1000)
	require.NoError(t, err)
	write(t, d, 0)
	require.NoError(t, d.Close())
	require.NoError(t, s.Add(&nbd.Export{Name: "other", Device: imagetest.NewMemory(1000)}))
	_, err = nbd.Open(context.Background(), s.uri(""), nil)
	require.ErrorIs(t, err, image.ErrNotFound)
}

// What a client learns of exports.
func TestList(t *testing.T) {
	s := serve(t, nil,
		&nbd.Export{Name: "uefi/vars", Description: "variables", Device: imagetest.NewMemory(1000)},
		&nbd.Export{Name: "", Device: imagetest.NewMemory(4096), ReadOnly: true},
		&nbd.Export{Name: "blocks", Device: imagetest.NewMemory(1 << 20), MinBlock: 4096, PreferredBlock: 65536, MaxPayload: 1 << 20})
	list, err := nbd.List(context.Background(), &nbd.Target{Network: "unix", Address: s.sock}, nil)
	require.NoError(t, err)
	all := nbd.Info{Flush: true, FUA: true, Trim: true, WriteZeroes: true, FastZero: true, Cache: true, DontFragment: true, MultiConn: true,
		Structured: true, MinBlock: 1, PreferredBlock: 4096, MaxPayload: 32 << 20}
	none, vars, blocks := all, all, all
	none.Size, none.ReadOnly, none.Trim, none.WriteZeroes, none.FastZero = 4096, true, false, false, false
	vars.Export, vars.Description, vars.Size = "uefi/vars", "variables", 1000
	blocks.Export, blocks.Size, blocks.MinBlock, blocks.PreferredBlock, blocks.MaxPayload = "blocks", 1<<20, 4096, 65536, 1<<20
	require.Equal(t, []nbd.Info{none, blocks, vars}, list)

	d := open(t, s.uri("uefi/vars"), nil)
	vars.Allocation = true
	require.Equal(t, vars, d.Info())
	require.NoError(t, d.Close())

	_, err = nbd.Open(context.Background(), s.uri(""), nil)
	require.ErrorIs(t, err, image.ErrReadOnly)
}
