package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// An epoch is what the image may hold between two changes of its structure.
// Each sector holds what was durable, or any later version.
type epoch struct {
	durable  []byte
	versions [][]byte // of the whole disk, after each change
	snaps    map[string][]byte
}

// allows tells whether the disk got may be there after a crash.
func (e *epoch) allows(got []byte) error {
	if len(got) != len(e.durable) {
		return fmt.Errorf("size %d, want %d", len(got), len(e.durable))
	}
next:
	for off := 0; off < len(got); off += 512 {
		s := got[off : off+512]
		if bytes.Equal(s, e.durable[off:off+512]) {
			continue
		}
		for _, v := range e.versions {
			if bytes.Equal(s, v[off:off+512]) {
				continue next
			}
		}
		return fmt.Errorf("sector %#x is %x..., durable is %x..., %d versions", off, s[:4], e.durable[off:off+4], len(e.versions))
	}
	return nil
}

// A crasher runs a history and looks at what every power cut leaves.
type crasher struct {
	t         *testing.T
	rng       *rand.Rand
	cs        int
	file      *imagetest.CrashDevice
	im        *qcow2.Image
	rig       func(image.Device) (*qcow2.Image, error) // opens an image that isn't just a file
	plain     bool                                     // nothing compressed
	fix       bool                                     // no changes of structure
	noDiscard bool
	now       epoch // versions' last is the present, or durable
	disk      []byte
	seen      map[uint64]bool
	at        int // log position up to which cuts were looked at
	next      int
	lazy      bool // refcounts are wrong until a repair

	states, qemu, reverts int
}

var crashConfigs = []struct {
	cs, version, refBits int
	size                 int64
	steps                int
	cache                int64 // 1 keeps two tables of each kind only
	lazy                 bool
}{
	{512, 3, 16, 40 << 10, 40, 0, false},
	{512, 3, 16, 200 << 10, 25, 1, false}, // an L2 table maps 32 KiB
	{512, 3, 64, 60 << 10, 40, 1, false},  // a refcount block counts 32 KiB
	{512, 2, 16, 20 << 10, 40, 0, false},
	{4096, 3, 16, 160 << 10, 40, 0, false},
	{4096, 2, 16, 100 << 10, 30, 0, false},
	{65536, 3, 16, 700 << 10, 25, 0, false},
	{512, 3, 16, 60 << 10, 40, 1, true},
	{4096, 3, 16, 160 << 10, 40, 0, true},
}

// TestCrash cuts the power at every write of random histories. The image must
// open, have no errors, and hold what was synced.
func TestCrash(t *testing.T) {
	s := seed(t)
	for i, cfg := range crashConfigs {
		t.Run(fmt.Sprintf("%d-v%d-r%d-%dK-%t", cfg.cs, cfg.version, cfg.refBits, cfg.size>>10, cfg.lazy), func(t *testing.T) {
			c := &crasher{t: t, cs: cfg.cs, lazy: cfg.lazy}
			for round := range scale(2) {
				c.rng = rand.New(rand.NewPCG(s, uint64(i<<32+round)))
				c.history(cfg.version, cfg.refBits, cfg.size, cfg.steps, cfg.cache)
			}
			t.Logf("%d states, %d of them checked by qemu-img, %d snapshots read back", c.states, c.qemu, c.reverts)
		})
	}
}

func (c *crasher) history(version, refBits int, size int64, steps int, cache int64) {
	c.file = imagetest.NewCrash(0, &imagetest.CrashOptions{Discard: imagetest.DiscardGarbage})
	im, err := qcow2.Create(c.file, &qcow2.CreateOptions{Size: size, ClusterSize: c.cs, Version: version,
		RefcountBits: refBits})
	require.NoError(c.t, err)
	require.NoError(c.t, im.Amend(c.t.Context(), &qcow2.AmendOptions{LazyRefcounts: &c.lazy}))
	require.NoError(c.t, im.Close())
	c.file = c.file.Reopen()
	im, err = qcow2.Open(c.file, &qcow2.OpenOptions{CacheSize: cache})
	require.NoError(c.t, err)
	c.run(im, make([]byte, size), version, steps)
}

// open opens the image that a crash left.
func (c *crasher) open(d image.Device) (*qcow2.Image, error) {
	if c.rig != nil {
		return c.rig(d)
	}
	return qcow2.Open(d, nil)
}

// run makes a history from an image on c.file that reads as disk.
func (c *crasher) run(im *qcow2.Image, disk []byte, version, steps int) {
	c.im, c.disk = im, disk
	c.file.Settle()
	c.at, c.next, c.seen = 0, 0, map[uint64]bool{}
	c.now = epoch{durable: bytes.Clone(c.disk), snaps: map[string][]byte{}}
	for range steps {
		c.step(version)
		if c.t.Failed() {
			return
		}
	}
	require.NoError(c.t, im.Close())
	c.cuts(c.now)
}

func (c *crasher) step(version int) {
	switch p := c.rng.IntN(100); {
	case p < 45:
		off, n := c.span(3*c.cs + 700)
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(c.rng.Uint32()) // sectors of the same bytes would hide mistakes
		}
		if cs := int64(c.cs); !c.plain && c.rng.IntN(3) == 0 {
			// Whole clusters, which get smaller.
			off &^= cs - 1
			b = make([]byte, min(int64(1+c.rng.IntN(3))*cs, int64(len(c.disk))-off))
			for i := 0; i < len(b); i += 64 {
				b[i] = byte(c.rng.Uint32())
			}
			copy(c.disk[off:], b)
			c.change(func() error { _, err := c.im.WriteCompressed(b, off); return err })
			break
		}
		copy(c.disk[off:], b)
		c.change(func() error { _, err := c.im.WriteAt(b, off); return err })
	case p < 55:
		off, n := c.span(4 * c.cs)
		first, last := (off+int64(c.cs)-1)/int64(c.cs)*int64(c.cs), (off+n)/int64(c.cs)*int64(c.cs)
		if first < last && !c.noDiscard {
			clear(c.disk[first:last])
			c.change(func() error { return c.im.Discard(first, last-first) })
		}
	case p < 62:
		off, n := c.span(4 * c.cs)
		clear(c.disk[off : off+n])
		c.change(func() error { return c.im.WriteZeroes(off, n) })
	case p < 80:
		require.NoError(c.t, c.im.Sync())
		c.cuts(c.now)
		c.acknowledge(bytes.Clone(c.disk))
	case c.fix:
	case p < 87:
		if len(c.now.snaps) < 3 {
			c.next++
			name := fmt.Sprint("s", c.next)
			c.structure(func(e *epoch) { e.snaps[name] = bytes.Clone(c.disk) },
				func() error { return c.im.Snapshots().Create(name) })
		}
	case p < 91:
		if name := c.anySnap(); name != "" {
			c.structure(func(*epoch) { c.disk = bytes.Clone(c.now.snaps[name]) },
				func() error { return c.im.Snapshots().Revert(name) })
		}
	case p < 95:
		if name := c.anySnap(); name != "" {
			c.structure(func(e *epoch) { delete(e.snaps, name) },
				func() error { return c.im.Snapshots().Delete(name) })
		}
	case version > 2 || len(c.now.snaps) == 0:
		more := make([]byte, 512*c.rng.IntN(3*c.cs))
		if c.cs == 65536 {
			more = more[:len(more)/64/512*512]
		}
		disk := append(c.disk, more...)
		if c.rng.IntN(3) == 0 {
			disk = c.disk[:min(len(c.disk), 512*(8+c.rng.IntN(len(c.disk)/512)))]
		}
		if len(disk) == len(c.disk) {
			return // nothing would be made durable
		}
		c.structure(func(*epoch) { c.disk = slices.Clone(disk) },
			func() error { return c.im.Resize(int64(len(c.disk))) })
	}
}

func (c *crasher) span(longest int) (off, n int64) {
	size := int64(len(c.disk)) / 512
	off = c.rng.Int64N(size)
	n = 1 + c.rng.Int64N(min(int64(longest)/512, size-off))
	return off * 512, n * 512
}

func (c *crasher) anySnap() string {
	names := slices.Sorted(maps.Keys(c.now.snaps))
	if len(names) == 0 {
		return ""
	}
	return names[c.rng.IntN(len(names))]
}

// change runs an operation that isn't durable. c.disk is what it makes.
func (c *crasher) change(op func() error) {
	c.now.versions = append(c.now.versions, bytes.Clone(c.disk))
	require.NoError(c.t, op())
	c.cuts(c.now)
}

// structure runs an operation that takes the image from one epoch to the next.
func (c *crasher) structure(change func(*epoch), op func() error) {
	old := c.now
	next := epoch{snaps: maps.Clone(old.snaps)}
	change(&next)
	next.durable = bytes.Clone(c.disk)
	require.NoError(c.t, op())
	c.cuts(old, next)
	c.now = next
	c.seen = map[uint64]bool{}
	c.verify(c.file.PowerCut(nil), "after", []epoch{next}, true)
}

func (c *crasher) acknowledge(disk []byte) {
	c.now.durable, c.now.versions = disk, nil
	c.seen = map[uint64]bool{}
	c.verify(c.file.PowerCut(nil), "after Sync", []epoch{c.now}, false)
}

// cuts looks at the states of all power cuts since the last call.
func (c *crasher) cuts(allowed ...epoch) {
	for ; c.at < c.file.Len(); c.at++ {
		cfg := &imagetest.StateConfig{Exhaustive: 5, Samples: 6, Seed: c.rng.Uint64(), Seen: c.seen}
		for s := range c.file.CrashStates(c.at+1, cfg) {
			c.states++
			c.verify(s.Open(), s.String(), allowed, c.states%40 == 0)
			if c.t.Failed() {
				return
			}
		}
	}
}

// verify opens what a power cut left.
func (c *crasher) verify(d *imagetest.CrashDevice, how string, allowed []epoch, deep bool) {
	if deep && !c.lazy {
		c.qemuCheck(d, how)
	}
	im, err := c.open(d)
	require.NoError(c.t, err, "%s", how)
	r, err := im.Check(c.t.Context(), nil)
	require.NoError(c.t, err)
	require.Zero(c.t, r.Errors, "%s: %+v\n%v", how, r.Findings, c.file.Log())
	if deep && c.lazy {
		c.qemuCheck(d, how) // opening has repaired it
	}
	got := contents(c.t, im)
	list, err := im.Snapshots().List()
	require.NoError(c.t, err)
	var names []string
	for _, s := range list {
		names = append(names, s.Name)
	}
	var why []error
	for _, e := range allowed {
		err := e.allows(got)
		if want := slices.Sorted(maps.Keys(e.snaps)); err == nil && !slices.Equal(want, slices.Sorted(slices.Values(names))) {
			err = fmt.Errorf("snapshots %q, want %q", names, want)
		}
		if err == nil {
			if deep {
				c.goOn(im, d, e.snaps, how)
			}
			return
		}
		why = append(why, err)
	}
	require.Fail(c.t, "not a state that a crash may leave", "%s: %v\n%v", how, errors.Join(why...), c.file.Log())
}

// goOn reads the snapshots back and writes to the image that was recovered.
func (c *crasher) goOn(im *qcow2.Image, d *imagetest.CrashDevice, snaps map[string][]byte, how string) {
	for name, want := range snaps {
		require.NoError(c.t, im.Snapshots().Revert(name))
		require.True(c.t, bytes.Equal(want, contents(c.t, im)), "%s: snapshot %s", how, name)
		c.reverts++
		_, err := im.WriteAt(make([]byte, 3000), 512)
		require.NoError(c.t, err)
	}
	noErrors(c.t, im, true)
	_, err := im.RepairLeaks(c.t.Context())
	require.NoError(c.t, err)
	again := d.Fork()
	require.NoError(c.t, im.Close())
	im, err = c.open(again)
	require.NoError(c.t, err)
	noErrors(c.t, im, false)
}

func (c *crasher) qemuCheck(d image.Device, how string) {
	if c.rig != nil || c.qemu >= scale(60) {
		return
	}
	c.qemu++
	path := filepath.Join(c.t.TempDir(), "img")
	dump(c.t, d, path)
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() == 3) {
		require.NoError(c.t, err, "%s: %s\n%v", how, out, c.file.Log())
	}
	os.Remove(path)
}

// TestCrashCreate cuts the power while an image is made over an older one:
// there is a whole one, the old or the new, or none.
func TestCrashCreate(t *testing.T) {
	for _, o := range []*imagetest.CrashOptions{nil, {Fixed: true}} {
		file := imagetest.NewCrash(2<<20, o)
		for _, size := range []int64{1 << 20, 4 << 20} {
			im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: size, ClusterSize: 4096})
			require.NoError(t, err)
			require.NoError(t, im.Close())
			var whole, none int
			for at := range file.Len() + 1 {
				for s := range file.CrashStates(at, &imagetest.StateConfig{Exhaustive: 4, Samples: 4, Seed: 1}) {
					im, err := qcow2.Open(s.Open(), nil)
					if err != nil {
						require.ErrorIs(t, err, image.ErrFormat, "%v", s)
						none++
						continue
					}
					noErrors(t, im, false)
					whole++
				}
			}
			require.Positive(t, whole)
			require.Positive(t, none)
			file = file.Reopen()
		}
	}
}

// TestCrashReftable cuts the power while writes make the refcount table longer.
func TestCrashReftable(t *testing.T) {
	file := imagetest.NewCrash(0, nil)
	// The first refcount table is for 2 MiB, the second for 4 MiB.
	im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: 8 << 20, ClusterSize: 512, RefcountBits: 64})
	require.NoError(t, err)
	header := func() [12]byte {
		var b [12]byte
		require.NoError(t, image.ReadFull(file, b[:], 48))
		return b
	}
	disk := make([]byte, 8<<20)
	var grown, states int
	for off := int64(0); off < 7<<20 && grown < 2; off += 20_000 {
		require.NoError(t, im.Sync())
		file.Settle()
		before, p := header(), bytes.Repeat([]byte{byte(off>>8 | 1)}, 20_000)
		_, err := im.WriteAt(p, off)
		require.NoError(t, err)
		if header() != before {
			grown++
			require.NoError(t, im.Sync())
			for at := range file.Len() + 1 {
				for s := range file.CrashStates(at, &imagetest.StateConfig{Exhaustive: 2, Samples: 1, Seed: uint64(at)}) {
					if states++; states%5 == 0 {
						lookAt(t, s, disk, p, off)
					}
				}
			}
		}
		copy(disk[off:], p)
	}
	require.Equal(t, 2, grown)
	t.Logf("%d states", states)
}

// lookAt opens a crash state, in which disk is durable and p at off perhaps.
func lookAt(t *testing.T, s *imagetest.State, disk, p []byte, off int64) {
	im, err := qcow2.Open(s.Open(), nil)
	require.NoError(t, err, "%v", s)
	noErrors(t, im, true)
	got := contents(t, im)
	require.True(t, bytes.Equal(disk[:off], got[:off]), "%v", s)
	for i, b := range got[off:][:len(p)] {
		require.True(t, b == 0 || b == p[i], "%v", s)
	}
}
