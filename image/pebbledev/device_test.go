package pebbledev_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/pebbledev"
)

func TestMain(m *testing.M) {
	if dir := os.Getenv("PEBBLEDEV_HOLD"); dir != "" {
		hold(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

func rng(t *testing.T) *rand.Rand {
	return rand.New(rand.NewPCG(imagetest.Seed(t), 0))
}

func random(r *rand.Rand, n int) []byte {
	p := make([]byte, (n+7)&^7)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(p[i:], r.Uint64())
	}
	return p[:n]
}

var machineA = pebbledev.UUID{0xa0, 15: 1}

func openFolder(t *testing.T, dir string, o *pebbledev.Options) *pebbledev.Folder {
	t.Helper()
	f, err := pebbledev.OpenFolder(dir, o)
	require.NoError(t, err)
	return f
}

// newDevice makes a device in a new folder in memory.
func newDevice(t *testing.T, size int64) *pebbledev.Device {
	t.Helper()
	f := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: vfs.NewMem()})
	d, err := f.Create(machineA, size)
	require.NoError(t, err)
	require.NoError(t, f.Close())
	return d
}

func readAll(t *testing.T, d image.Device) []byte {
	t.Helper()
	p := make([]byte, d.Size())
	require.NoError(t, image.ReadFull(d, p, 0))
	return p
}

func TestConformance(t *testing.T) {
	dirs := map[image.Device]string{}
	reopen := func(o *pebbledev.Options) func(*testing.T, image.Device) image.Device {
		return func(t *testing.T, d image.Device) image.Device {
			dir := dirs[d]
			_ = d.Close() // the suite may have closed it
			f := openFolder(t, dir, o)
			again, err := f.Open(machineA)
			require.NoError(t, err)
			require.NoError(t, f.Close())
			dirs[again] = dir
			return again
		}
	}
	imagetest.Conformance(t, func(t *testing.T, size int64) image.Device {
		dir := filepath.Join(t.TempDir(), "home")
		f := openFolder(t, dir, &pebbledev.Options{Create: true})
		d, err := f.Create(machineA, size)
		require.NoError(t, err)
		require.NoError(t, f.Close()) // the device keeps it open
		dirs[d] = dir
		return d
	}, &imagetest.ConformanceOptions{
		Reopen:   reopen(nil),
		ReadOnly: reopen(&pebbledev.Options{ReadOnly: true}),
	})
}

// A model is what a device must look like.
type model struct{ bytes []byte }

func (m *model) resize(n int) {
	if n <= len(m.bytes) {
		m.bytes = bytes.Clone(m.bytes[:n])
		return
	}
	m.bytes = append(m.bytes, make([]byte, n-len(m.bytes))...)
}

// step does one random operation on both and returns its name.
func (m *model) step(t *testing.T, r *rand.Rand, d *pebbledev.Device) string {
	size := len(m.bytes)
	off := r.IntN(size + 1)
	n := r.IntN(size - off + 1)
	if r.IntN(4) > 0 {
		n = min(n, r.IntN(3*pebbledev.BlockSize))
	}
	if r.IntN(3) == 0 {
		off = off / pebbledev.BlockSize * pebbledev.BlockSize
	}
	switch op := r.IntN(20); {
	case op < 10:
		p := random(r, n)
		_, err := d.WriteAt(p, int64(off))
		require.NoError(t, err)
		copy(m.bytes[off:], p)
		return fmt.Sprintf("write %d+%d", off, n)
	case op < 13:
		require.NoError(t, d.WriteZeroes(int64(off), int64(n)))
		clear(m.bytes[off : off+n])
		return fmt.Sprintf("zero %d+%d", off, n)
	case op < 15:
		require.NoError(t, d.Discard(int64(off), int64(n)))
		// Undefined by the contract; learn it.
		p := make([]byte, n)
		require.NoError(t, image.ReadFull(d, p, int64(off)))
		copy(m.bytes[off:], p)
		return fmt.Sprintf("discard %d+%d", off, n)
	case op < 17:
		to := r.IntN(4 << 20)
		if r.IntN(2) == 0 {
			to = max(0, size+r.IntN(20000)-10000)
		}
		require.NoError(t, d.Resize(int64(to)))
		m.resize(to)
		return fmt.Sprintf("resize %d", to)
	default:
		require.NoError(t, d.Sync())
		return "sync"
	}
}

// check compares everything that can be read.
func (m *model) check(t *testing.T, d *pebbledev.Device, what string) {
	require.EqualValues(t, len(m.bytes), d.Size(), what)
	if got := readAll(t, d); !bytes.Equal(got, m.bytes) {
		t.Fatalf("content differs after %s", what)
	}
	for off := int64(0); off < d.Size(); {
		e, err := d.BlockStatus(off, d.Size()-off)
		require.NoError(t, err, what)
		require.Equal(t, off, e.Start, what)
		require.Positive(t, e.Length, what)
		require.Equal(t, e.Allocated, !e.Zero, what)
		if e.Zero {
			hole := m.bytes[off : off+e.Length]
			require.Equal(t, len(hole), bytes.Count(hole, []byte{0}), "%s: hole at %d", what, off)
		}
		off += e.Length
	}
}

func TestModel(t *testing.T) {
	r := rng(t)
	fsys := vfs.NewMem()
	f := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: fsys})
	d, err := f.Create(machineA, 300_001)
	require.NoError(t, err)
	m := &model{make([]byte, 300_001)}
	for i := range imagetest.Scale(1000) {
		what := fmt.Sprintf("step %d: %s", i, m.step(t, r, d))
		if i%10 == 0 {
			m.check(t, d, what)
		}
		if r.IntN(100) == 0 { // reopen all
			require.NoError(t, d.Sync())
			require.NoError(t, d.Close())
			require.NoError(t, f.Close())
			f = openFolder(t, "dir", &pebbledev.Options{FS: fsys})
			d, err = f.Open(machineA)
			require.NoError(t, err)
			m.check(t, d, "reopen after "+what)
		}
	}
	require.NoError(t, d.Close())
	require.NoError(t, f.Close())
}

func TestBlockStatusRuns(t *testing.T) {
	const bs = pebbledev.BlockSize
	d := newDevice(t, 100*bs+7)
	write := func(block, n int64) {
		_, err := d.WriteAt(bytes.Repeat([]byte{1}, int(n*bs)), block*bs)
		require.NoError(t, err)
	}
	write(10, 10) // 10..19 stored
	write(30, 2)
	require.NoError(t, d.Sync())
	write(20, 5)                                   // 20..24 pending, joins
	require.NoError(t, d.WriteZeroes(12*bs, 2*bs)) // pending hole
	want := []image.Extent{
		{Start: 5, Length: 10*bs - 5, Zero: true},
		{Start: 10 * bs, Length: 2 * bs, Allocated: true},
		{Start: 12 * bs, Length: 2 * bs, Zero: true},
		{Start: 14 * bs, Length: 11 * bs, Allocated: true},
		{Start: 25 * bs, Length: 5 * bs, Zero: true},
		{Start: 30 * bs, Length: 2 * bs, Allocated: true},
		{Start: 32 * bs, Length: 68*bs + 7, Zero: true},
	}
	off := int64(5)
	for _, w := range want {
		w.Offset = -1
		e, err := d.BlockStatus(off, d.Size()-off)
		require.NoError(t, err)
		require.Equal(t, w, e)
		off += e.Length
	}
	require.Equal(t, d.Size(), off)
	e, err := d.BlockStatus(11*bs+1, 9)
	require.NoError(t, err)
	require.EqualValues(t, 9, e.Length)
	for _, bad := range [][2]int64{{0, 0}, {-1, 1}, {d.Size(), 1}, {1, d.Size()}} {
		_, err := d.BlockStatus(bad[0], bad[1])
		require.ErrorIs(t, err, image.ErrOutOfRange, "%v", bad)
	}
	require.NoError(t, d.Close())
}

func TestRanges(t *testing.T) {
	d := newDevice(t, 10_000)
	_, err := d.WriteAt([]byte("x"), 10_000)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	_, err = d.WriteAt([]byte("xy"), 9_999)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	_, err = d.WriteAt([]byte("x"), -1)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	_, err = d.ReadAt(make([]byte, 1), -1)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	n, err := d.ReadAt(make([]byte, 2), 9_999)
	require.Equal(t, 1, n)
	require.Equal(t, io.EOF, err)
	require.ErrorIs(t, d.Discard(1, 10_000), image.ErrOutOfRange)
	require.ErrorIs(t, d.WriteZeroes(1, 10_000), image.ErrOutOfRange)
	require.ErrorIs(t, d.Resize(-1), image.ErrOutOfRange)
	require.ErrorIs(t, d.Resize(pebbledev.MaxSize+1), image.ErrOutOfRange)
	require.Equal(t, make([]byte, 10_000), readAll(t, d))
	require.NoError(t, d.Resize(pebbledev.MaxSize))
	_, err = d.WriteAt([]byte("end"), pebbledev.MaxSize-3)
	require.NoError(t, err)
	require.NoError(t, d.WriteZeroes(5, pebbledev.MaxSize-5)) // by size, not by n
	require.NoError(t, d.Close())
	require.ErrorIs(t, d.Close(), image.ErrClosed)
	_, err = d.ReadAt(make([]byte, 1), 0)
	require.ErrorIs(t, err, image.ErrClosed)
	require.ErrorIs(t, d.Sync(), image.ErrClosed)
}

func TestMachines(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "home")
	_, err := pebbledev.OpenFolder(dir, nil)
	require.ErrorIs(t, err, fs.ErrNotExist)
	f := openFolder(t, dir, &pebbledev.Options{Create: true})
	r := rng(t)
	want := map[pebbledev.UUID][]byte{}
	for i := range 5 {
		u := pebbledev.UUID(random(r, 16))
		if i == 0 {
			u = pebbledev.UUID(bytes.Repeat([]byte{0xff}, 16))
		}
		d, err := f.Create(u, 20_000)
		require.NoError(t, err)
		want[u] = random(r, 20_000)
		_, err = d.WriteAt(want[u], 0)
		require.NoError(t, err)
		require.NoError(t, d.Sync())
		require.NoError(t, d.Close())
		_, err = f.Create(u, 5)
		require.ErrorIs(t, err, image.ErrExist)
	}
	list, err := f.Machines()
	require.NoError(t, err)
	require.Len(t, list, 5)

	gone := list[2]
	require.NoError(t, f.Delete(gone))
	require.ErrorIs(t, f.Delete(gone), image.ErrNotFound)
	_, err = f.Open(gone)
	require.ErrorIs(t, err, image.ErrNotFound)
	delete(want, gone)

	// A second Folder of the same path shares the first one's database.
	g := openFolder(t, filepath.Join(dir, "..", "home"), nil)
	require.NoError(t, f.Close())
	require.ErrorIs(t, f.Close(), image.ErrClosed)
	_, err = f.Machines()
	require.ErrorIs(t, err, image.ErrClosed)
	_, err = pebbledev.OpenFolder(dir, &pebbledev.Options{ReadOnly: true})
	require.ErrorIs(t, err, image.ErrLocked)
	var open []*pebbledev.Device
	for u, content := range want {
		d, err := g.Open(u)
		require.NoError(t, err)
		require.Equal(t, content, readAll(t, d))
		_, err = g.Open(u)
		require.ErrorIs(t, err, image.ErrLocked)
		require.ErrorIs(t, g.Delete(u), image.ErrLocked)
		open = append(open, d)
	}
	require.NoError(t, g.Close())
	for _, d := range open { // they outlive their Folder
		_, err := d.WriteAt([]byte("more"), 0)
		require.NoError(t, err)
		require.NoError(t, d.Sync())
		require.NoError(t, d.Close())
	}

	ro := openFolder(t, dir, &pebbledev.Options{ReadOnly: true})
	_, err = ro.Create(gone, 1)
	require.ErrorIs(t, err, image.ErrReadOnly)
	require.ErrorIs(t, ro.Delete(list[0]), image.ErrReadOnly)
	d, err := ro.Open(list[0])
	require.NoError(t, err)
	require.Equal(t, "more", string(readAll(t, d)[:4]))
	_, err = d.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, image.ErrReadOnly)
	require.ErrorIs(t, d.Resize(1), image.ErrReadOnly)
	require.NoError(t, d.Sync())
	require.NoError(t, d.Close())
	require.NoError(t, ro.Close())
}

func TestConcurrent(t *testing.T) {
	f := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: vfs.NewMem()})
	var wg sync.WaitGroup
	for m := range 3 {
		d, err := f.Create(pebbledev.UUID{byte(m)}, 8<<20)
		require.NoError(t, err)
		var mine sync.WaitGroup
		for w := range 4 {
			mine.Add(1)
			go func() { // each in its own 2 MiB
				defer mine.Done()
				base := int64(w) * 2 << 20
				for i := range 60 {
					p := bytes.Repeat([]byte{byte(i)}, 30_000)
					off := base + int64(i)*33_333
					_, err := d.WriteAt(p, off)
					require.NoError(t, err)
					if i%7 == 0 {
						require.NoError(t, d.Sync())
					}
					got := make([]byte, len(p))
					require.NoError(t, image.ReadFull(d, got, off))
					require.True(t, bytes.Equal(p, got))
				}
			}()
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			mine.Wait()
			require.NoError(t, d.Close())
		}()
	}
	wg.Wait()
	require.NoError(t, f.Close())
}

// hold opens a folder in a process of its own until its standard input ends.
func hold(dir string) {
	f, err := pebbledev.OpenFolder(dir, nil)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println("held")
	io.Copy(io.Discard, os.Stdin)
	f.Close()
}

func TestLockedByProcess(t *testing.T) {
	dir := t.TempDir()
	require.NoError(t, openFolder(t, dir, &pebbledev.Options{Create: true}).Close())
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "PEBBLEDEV_HOLD="+dir)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	out, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	line := make([]byte, 5)
	_, err = io.ReadFull(out, line)
	require.NoError(t, err)
	require.Equal(t, "held\n", string(line))
	for _, o := range []*pebbledev.Options{nil, {ReadOnly: true}, {Create: true}} {
		_, err = pebbledev.OpenFolder(dir, o)
		require.ErrorIs(t, err, image.ErrLocked)
	}
	require.NoError(t, in.Close())
	require.NoError(t, cmd.Wait())
	require.NoError(t, openFolder(t, dir, nil).Close())
}

// A folder that isn't ours is refused, and not a byte of it changes.
func TestForeignFolder(t *testing.T) {
	dir := t.TempDir()
	db, err := pebble.Open(dir, &pebble.Options{Logger: quiet{}})
	require.NoError(t, err)
	require.NoError(t, db.Set([]byte("k"), []byte("v"), pebble.Sync))
	require.NoError(t, db.Close())
	before := listing(t, dir)
	for _, o := range []*pebbledev.Options{nil, {Create: true}, {ReadOnly: true}} {
		_, err := pebbledev.OpenFolder(dir, o)
		require.ErrorIs(t, err, image.ErrFormat)
	}
	require.Equal(t, before, listing(t, dir))

	empty := t.TempDir()
	_, err = pebbledev.OpenFolder(empty, nil)
	require.ErrorIs(t, err, image.ErrFormat)
	require.Empty(t, listing(t, empty))
	require.NoError(t, openFolder(t, empty, &pebbledev.Options{Create: true}).Close())

	require.NoError(t, os.WriteFile(filepath.Join(empty, "NVSTORE"), []byte("nvstore pebble folder, version 2\n"), 0o600))
	_, err = pebbledev.OpenFolder(empty, nil)
	require.ErrorIs(t, err, image.ErrFormat)
}

func listing(t *testing.T, dir string) map[string]time.Time {
	t.Helper()
	list := map[string]time.Time{}
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	for _, e := range entries {
		info, err := e.Info()
		require.NoError(t, err)
		list[e.Name()] = info.ModTime()
	}
	return list
}

func TestUUID(t *testing.T) {
	const text = "00112233-4455-6677-8899-aabbccddeeff"
	u, err := pebbledev.ParseUUID("00112233-4455-6677-8899-AABBCCDDEEFF")
	require.NoError(t, err)
	require.Equal(t, text, u.String())
	for _, bad := range []string{"", "0", text + "0", text[1:], "00112233445566778899aabbccddeeff",
		"{" + text + "}", "0011223-34455-6677-8899-aabbccddeeff", "g" + text[1:], text[:35] + "é", text[:23] + "0" + text[24:]} {
		_, err := pebbledev.ParseUUID(bad)
		require.Error(t, err, bad)
	}
}
