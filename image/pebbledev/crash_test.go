package pebbledev_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/pebbledev"
)

const (
	bs        = pebbledev.BlockSize
	numBlocks = 400 // more than fit in what may be pending
)

// A history is what each block may hold after a crash: its content at the last
// Sync, and everything written since.
type history [numBlocks][][]byte

func (h *history) write(d image.Device, b int, p []byte) error {
	h[b] = append(h[b], p) // legal even if the write fails half way
	_, err := d.WriteAt(p, int64(b)*bs)
	return err
}

func (h *history) synced() {
	for b := range h {
		h[b] = h[b][len(h[b])-1:]
	}
}

// match fails unless each block is, as a whole, one of those it may be.
func (h *history) match(t *testing.T, d image.Device, what string) {
	t.Helper()
	got := readAll(t, d)
	require.Len(t, got, numBlocks*bs)
next:
	for b := range h {
		for _, p := range h[b] {
			if bytes.Equal(p, got[b*bs:(b+1)*bs]) {
				continue next
			}
		}
		t.Fatalf("%s: block %d is none of the %d contents it may have", what, b, len(h[b]))
	}
}

func newHistory() *history {
	h := &history{}
	for b := range h {
		h[b] = [][]byte{make([]byte, bs)}
	}
	return h
}

// TestCrash cuts the power at random moments, and again while the folder is
// being recovered. The clone is taken while no call into the device is under
// way: in Pebble 2.1.7 CrashClone may deadlock with a log being recycled.
// Background flushes go on, which recycle nothing.
func TestCrash(t *testing.T) {
	r := rng(t)
	states := 0
	for range imagetest.Scale(3) {
		mem := vfs.NewCrashableMem()
		h := newHistory()
		f := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: mem})
		d, err := f.Create(machineA, numBlocks*bs)
		require.NoError(t, err)
		for step := range 25 {
			for range r.IntN(200) {
				require.NoError(t, h.write(d, r.IntN(numBlocks), random(r, bs)))
			}
			if r.IntN(3) == 0 {
				require.NoError(t, d.Sync())
				h.synced()
			}
			crash := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: r.IntN(101), RNG: r})
			recoverTwice(t, r, h, crash, fmt.Sprintf("step %d", step))
			states += 2
		}
		require.NoError(t, d.Close())
		require.NoError(t, f.Close())
	}
	t.Logf("%d crash states", states)
}

// recoverTwice opens a crashed folder, crashes it again at once, and opens that.
func recoverTwice(t *testing.T, r *rand.Rand, h *history, crash *vfs.MemFS, what string) {
	t.Helper()
	for i := range 2 {
		f := openFolder(t, "dir", &pebbledev.Options{FS: crash})
		d, err := f.Open(machineA)
		require.NoError(t, err)
		h.match(t, d, fmt.Sprintf("%s, recovery %d", what, i))
		var next *vfs.MemFS
		if i == 0 {
			next = crash.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: r.IntN(101), RNG: r})
		}
		require.NoError(t, d.Close())
		require.NoError(t, f.Close())
		crash = next
	}
}

// TestKilledBeforeSync kills the process instead of the machine: what the
// device handed over lies in the page cache. What the next process reads and
// Syncs must then survive a power cut, even though it wrote none of it.
func TestKilledBeforeSync(t *testing.T) {
	r := rng(t)
	mem := vfs.NewCrashableMem()
	f := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: mem})
	d, err := f.Create(machineA, numBlocks*bs)
	require.NoError(t, err)
	p := random(r, numBlocks*bs)
	_, err = d.WriteAt(p, 0)
	require.NoError(t, err)
	require.NoError(t, d.Close())
	require.NoError(t, f.Close())

	f = openFolder(t, "dir", &pebbledev.Options{FS: mem})
	d, err = f.Open(machineA)
	require.NoError(t, err)
	seen := readAll(t, d)
	require.NotEqual(t, make([]byte, len(seen)), seen, "nothing was handed over")
	require.NoError(t, d.Sync())
	crash := mem.CrashClone(vfs.CrashCloneCfg{})
	require.NoError(t, d.Close())
	require.NoError(t, f.Close())

	f = openFolder(t, "dir", &pebbledev.Options{FS: crash})
	d, err = f.Open(machineA)
	require.NoError(t, err)
	require.True(t, bytes.Equal(seen, readAll(t, d)))
	require.NoError(t, d.Close())
	require.NoError(t, f.Close())
}

// TestOneSync counts: one Sync of the device is one of the medium, and none if
// there is nothing to be made durable.
func TestOneSync(t *testing.T) {
	var syncs atomic.Int32
	count := errorfs.InjectorFunc(func(op errorfs.Op) error {
		if op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData || op.Kind == errorfs.OpFileSyncTo {
			syncs.Add(1)
		}
		return nil
	})
	f := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: errorfs.Wrap(vfs.NewMem(), count)})
	d, err := f.Create(machineA, 1<<20)
	require.NoError(t, err)
	require.NoError(t, d.Sync())
	for i := range 10 { // too little for a memtable to be flushed
		before := syncs.Load()
		_, err := d.WriteAt(make([]byte, 6_000), int64(i)*4096)
		require.NoError(t, err)
		require.Equal(t, before, syncs.Load())
		require.NoError(t, d.Sync())
		require.Equal(t, before+1, syncs.Load())
		require.NoError(t, d.Sync())
		require.Equal(t, before+1, syncs.Load())
	}
	require.NoError(t, d.Close())
	require.NoError(t, f.Close())
}

// failing makes every change from the n-th on fail, or the n-th alone.
type failing struct {
	n       int64
	forever bool
	err     error
	count   atomic.Int64
}

func (x *failing) String() string { return "failing" }

func (x *failing) MaybeError(op errorfs.Op) error {
	if op.Kind.ReadOrWrite() != errorfs.OpIsWrite || path.Base(op.Path) == "LOCK" {
		return nil
	}
	if n := x.count.Add(1); n == x.n || x.forever && n > x.n {
		return x.err
	}
	return nil
}

// TestFaults fails each change of the medium in turn. Whatever fails, nothing
// panics or hangs, the failure surfaces at the latest with the next Sync that
// matters, the device stays poisoned, and after a power cut the folder opens
// with everything that was acknowledged.
func TestFaults(t *testing.T) {
	r := rng(t)
	for _, forever := range []bool{false, true} {
		surfaced, runs := 0, 0
		for n := int64(1); ; n += 1 + r.Int64N(20)/int64(imagetest.Scale(1)) {
			inj := &failing{n: n, forever: forever, err: syscall.EIO}
			if n%2 == 0 {
				inj.err = syscall.ENOSPC
			}
			runs++
			done := make(chan bool)
			go func() {
				defer close(done)
				if faultRun(t, r, inj) {
					surfaced++
				}
			}()
			select {
			case <-done:
			case <-time.After(60 * time.Second):
				t.Fatalf("hangs with change %d failing", n)
			}
			if t.Failed() || inj.count.Load() < n {
				break // never reached: all were tried
			}
		}
		t.Logf("forever=%v: %d runs, %d failures surfaced", forever, runs, surfaced)
		require.Greater(t, surfaced, 20)
	}
}

// faultRun reports whether the failure came up.
func faultRun(t *testing.T, r *rand.Rand, inj *failing) bool {
	mem := vfs.NewCrashableMem()
	fsys := errorfs.Wrap(mem, inj)
	h := newHistory()
	f, err := pebbledev.OpenFolder("dir", &pebbledev.Options{Create: true, FS: fsys})
	if err != nil {
		require.ErrorIs(t, err, inj.err)
		return true
	}
	created := false
	d, err := f.Create(machineA, numBlocks*bs)
	if err == nil {
		created = true
		// Enough for memtables to be flushed and logs to be recycled.
		for range 6 {
			for range 200 {
				if err = h.write(d, r.IntN(numBlocks), random(r, bs)); err != nil {
					break
				}
			}
			if err == nil {
				err = d.Sync()
			}
			if err != nil {
				break
			}
			h.synced()
		}
		if err != nil {
			_, rerr := d.ReadAt(make([]byte, 1), 0)
			require.ErrorIs(t, rerr, image.ErrPoisoned)
			_, werr := d.WriteAt(make([]byte, 1), 0)
			require.ErrorIs(t, werr, image.ErrPoisoned)
			require.ErrorIs(t, d.Sync(), image.ErrPoisoned)
		}
		_ = d.Close()
	}
	if err != nil {
		require.ErrorIs(t, err, inj.err)
		if errors.Is(inj.err, syscall.ENOSPC) {
			require.ErrorIs(t, err, image.ErrNoSpace)
		}
		_, merr := f.Machines()
		require.ErrorIs(t, merr, image.ErrPoisoned)
	}
	_ = f.Close()

	crash := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: r.IntN(101), RNG: r})
	g, oerr := pebbledev.OpenFolder("dir", &pebbledev.Options{Create: true, FS: crash})
	require.NoError(t, oerr)
	e, oerr := g.Open(machineA)
	if !created && errors.Is(oerr, image.ErrNotFound) {
		require.NoError(t, g.Close())
		return err != nil
	}
	require.NoError(t, oerr)
	h.match(t, e, fmt.Sprintf("change %d failed with %v", inj.n, inj.err))
	require.NoError(t, e.Close())
	require.NoError(t, g.Close())
	return err != nil
}

// raw opens the database behind a folder's back.
func raw(t *testing.T, fsys vfs.FS, f func(db *pebble.DB)) {
	t.Helper()
	db, err := pebble.Open("dir", &pebble.Options{FS: fsys, Logger: quiet{}, FormatMajorVersion: pebble.FormatWALSyncChunks})
	require.NoError(t, err)
	f(db)
	require.NoError(t, db.Close())
}

type quiet struct{}

func (quiet) Infof(string, ...any)  {}
func (quiet) Errorf(string, ...any) {}
func (quiet) Fatalf(string, ...any) {}

func TestHostileKeys(t *testing.T) {
	prefix := "m/" + string(machineA[:])
	block := func(n uint64) string {
		return prefix + "/b/" + string([]byte{byte(n >> 56), byte(n >> 48), 0, 0, 0, 0, byte(n >> 8), byte(n)})
	}
	full := strings.Repeat("x", bs)
	for name, kv := range map[string][2]string{
		"short block":          {block(0), full[1:]},
		"long block":           {block(1), full + "x"},
		"empty block":          {block(2), ""},
		"block past the size":  {block(10), full},
		"block at 2^63":        {block(1 << 63), full},
		"odd block key":        {block(1) + "x", full},
		"short size":           {prefix + "/size", "\x00\x00\x00\x01"},
		"huge size":            {prefix + "/size", "\xff\xff\xff\xff\xff\xff\xff\xff"},
		"size above the limit": {prefix + "/size", "\x00\x04\x00\x00\x00\x00\x00\x01"},
		"no machine":           {"m/short", "x"},
		"no slash":             {"m/0123456789abcdefX", "x"},
	} {
		t.Run(name, func(t *testing.T) {
			mem := vfs.NewMem()
			f := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: mem})
			d, err := f.Create(machineA, 10*bs)
			require.NoError(t, err)
			_, err = d.WriteAt([]byte(full), 5*bs)
			require.NoError(t, err)
			require.NoError(t, d.Sync())
			require.NoError(t, d.Close())
			require.NoError(t, f.Close())
			raw(t, mem, func(db *pebble.DB) {
				require.NoError(t, db.Set([]byte(kv[0]), []byte(kv[1]), pebble.Sync))
			})
			f = openFolder(t, "dir", &pebbledev.Options{FS: mem})
			_, lerr := f.Machines()
			d, err = f.Open(machineA)
			if err == nil {
				_, err = d.ReadAt(make([]byte, 3*bs), 0)    // one by one
				_, err2 := d.ReadAt(make([]byte, 10*bs), 0) // as a run
				_, err3 := d.BlockStatus(0, 10*bs)
				err = errors.Join(err, err2, err3)
				require.NoError(t, d.Close())
			}
			err = errors.Join(err, lerr)
			require.ErrorIs(t, err, image.ErrCorrupt)
			var fe *image.FormatError
			require.ErrorAs(t, err, &fe)
			if name != "no machine" && name != "no slash" {
				require.NoError(t, f.Delete(machineA), "what is damaged can be deleted")
			}
			require.NoError(t, f.Close())
		})
	}
}

// TestDamagedFiles flips bytes in every file of a folder. Opening and reading
// it gives the right content or an error, and never a panic: but for the very
// end of a log, which can't be told from a write that was cut short.
func TestDamagedFiles(t *testing.T) {
	r := rng(t)
	mem := vfs.NewCrashableMem()
	f := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: mem})
	d, err := f.Create(machineA, numBlocks*bs)
	require.NoError(t, err)
	h := newHistory()
	for range 5 {
		for range 250 {
			require.NoError(t, h.write(d, r.IntN(numBlocks), random(r, bs)))
		}
		require.NoError(t, d.Sync())
	}
	require.NoError(t, d.Close())
	require.NoError(t, f.Close())
	names, err := mem.List("dir")
	require.NoError(t, err)
	var detected, harmless int
	for _, name := range names {
		for range imagetest.Scale(8) {
			c := mem.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: 100, RNG: r})
			if !flip(t, r, c, "dir/"+name) {
				continue
			}
			if readDamaged(t, c, h, name) {
				harmless++
			} else {
				detected++
			}
		}
	}
	t.Logf("%d flips detected, %d harmless", detected, harmless)
	require.Positive(t, detected)
}

func flip(t *testing.T, r *rand.Rand, fsys *vfs.MemFS, name string) bool {
	t.Helper()
	info, err := fsys.Stat(name)
	require.NoError(t, err)
	if info.IsDir() || info.Size() == 0 {
		return false
	}
	file, err := fsys.OpenReadWrite(name, vfs.WriteCategoryUnspecified)
	require.NoError(t, err)
	defer file.Close()
	b, off := make([]byte, 1), r.Int64N(info.Size())
	_, err = file.ReadAt(b, off)
	require.NoError(t, err)
	b[0] ^= 1 << r.IntN(8)
	_, err = file.WriteAt(b, off)
	require.NoError(t, err)
	return true
}

// readDamaged reports whether all could be read. What was read is content that
// was there once: Pebble's checksums see to that.
func readDamaged(t *testing.T, fsys vfs.FS, h *history, what string) bool {
	t.Helper()
	f, err := pebbledev.OpenFolder("dir", &pebbledev.Options{FS: fsys})
	if err != nil {
		return false
	}
	defer f.Close()
	d, err := f.Open(machineA)
	if err != nil {
		return false
	}
	defer d.Close()
	if image.ReadFull(d, make([]byte, numBlocks*bs), 0) != nil {
		return false
	}
	h.match(t, d, "flip in "+what)
	return true
}
