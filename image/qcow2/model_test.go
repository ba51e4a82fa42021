package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// modelOps is how many operations TestModel does on all images together.
func modelOps() int {
	if n, err := strconv.Atoi(os.Getenv("NVSTORE_QCOW2_OPS")); err == nil {
		return n
	}
	if testing.Short() {
		return 10_000
	}
	return scale(100_000)
}

type modelConfig struct {
	cs, version, refBits int
	size, max            int64
}

var modelConfigs = []modelConfig{
	{512, 3, 16, 200 << 10, 700 << 10},
	{512, 2, 16, 200 << 10, 700 << 10},
	{512, 3, 64, 1200 << 10, 2 << 20}, // the refcount table grows beyond 2 MiB of file
	{512, 3, 2, 100 << 10, 300 << 10},
	{4096, 3, 16, 1 << 20, 3 << 20},
	{4096, 2, 16, 1<<20 + 512, 3 << 20},
	{4096, 3, 8, 1 << 20, 3 << 20},
	{4096, 3, 1, 1 << 20, 3 << 20},
	{65536, 3, 16, 3<<20 + 1536, 6 << 20},
	{65536, 2, 16, 3 << 20, 6 << 20},
	{2 << 20, 3, 16, 9<<20 + 512, 20 << 20},
	{2 << 20, 2, 16, 9 << 20, 20 << 20},
}

// A model is an image and what it must contain.
type model struct {
	t     *testing.T
	rng   *rand.Rand
	cfg   modelConfig
	dev   *keep
	rig   *rig // of an image of more than one file, or an encrypted one
	im    *qcow2.Image
	disk  []byte
	snaps map[string][]byte
	next  int
	ops   int
}

// TestModel runs random operations on images and on plain bytes, and has
// qemu-img look at the images now and then.
func TestModel(t *testing.T) {
	s := seed(t)
	for i, cfg := range modelConfigs {
		n := modelOps() / len(modelConfigs)
		if cfg.cs == 2<<20 {
			n /= 8 // each copy is 2 MiB
		}
		t.Run(fmt.Sprintf("%d-v%d-r%d", cfg.cs, cfg.version, cfg.refBits), func(t *testing.T) {
			runModel(t, cfg, rand.New(rand.NewPCG(s, uint64(i))), n)
		})
	}
}

func runModel(t *testing.T, cfg modelConfig, rng *rand.Rand, ops int) {
	m := &model{t: t, rng: rng, cfg: cfg, snaps: map[string][]byte{}, disk: make([]byte, cfg.size)}
	m.dev = &keep{imagetest.NewMemory(0)}
	var err error
	m.im, err = qcow2.Create(m.dev, &qcow2.CreateOptions{Size: cfg.size, ClusterSize: cfg.cs,
		Version: cfg.version, RefcountBits: cfg.refBits})
	require.NoError(t, err)
	for m.ops = range ops {
		m.step()
		if m.ops%2000 == 1999 {
			noErrors(t, m.im, false)
		}
	}
	m.reopen()
	m.qemu()
}

func (m *model) step() {
	switch p := m.rng.IntN(1000); {
	case p < 600:
		m.write()
	case p < 780:
		m.read()
	case p < 830:
		m.discard()
	case p < 880:
		m.zero()
	case p < 960:
		require.NoError(m.t, m.im.Sync())
	case p < 972:
		m.snapshot()
	case p < 980:
		m.revert()
	case p < 990:
		m.delete()
	case p < 993:
		m.resize()
	case p < 999:
		m.reopen()
	case m.rng.IntN(4) == 0:
		m.reopen()
		m.qemu()
	}
}

// span picks a range, often at cluster borders.
func (m *model) span(longest int) (off, n int64) {
	size := int64(len(m.disk))
	off = m.rng.Int64N(size)
	n = 1 + m.rng.Int64N(min(int64(longest), size-off))
	if m.rng.IntN(3) == 0 {
		cs := int64(m.cfg.cs)
		off = off / cs * cs
		n = min((n+cs-1)/cs*cs, size-off)
	}
	return off, n
}

func (m *model) write() {
	longest := 20 << 10
	if m.rng.IntN(10) == 0 {
		longest = 8 * m.cfg.cs
	}
	off, n := m.span(min(longest, 4<<20))
	p := make([]byte, n)
	v := byte(m.rng.Uint32())
	for i := range p {
		p[i] = v + byte(i>>7)
	}
	write := m.im.WriteAt
	cs := int64(m.cfg.cs)
	if off%cs == 0 && (n%cs == 0 || off+n == int64(len(m.disk))) && m.rng.IntN(2) == 0 &&
		(m.rig == nil || m.rig.data == nil && !m.rig.crypt) {
		write = m.im.WriteCompressed
	}
	k, err := write(p, off)
	require.NoError(m.t, err, "op %d", m.ops)
	require.Equal(m.t, len(p), k)
	copy(m.disk[off:], p)
}

func (m *model) read() {
	off, n := m.span(256 << 10)
	m.compare(off, n)
}

func (m *model) compare(off, n int64) {
	p := make([]byte, n)
	require.NoError(m.t, image.ReadFull(m.im, p, off), "op %d", m.ops)
	if want := m.disk[off:][:n]; !bytes.Equal(want, p) {
		m.t.Fatalf("op %d: read [%#x, +%#x)%s", m.ops, off, n, firstDiff(want, p))
	}
}

func (m *model) discard() {
	off, n := m.span(6 * m.cfg.cs)
	err := m.im.Discard(off, n)
	if m.rig != nil && m.rig.backing != nil && m.cfg.version == 2 {
		require.ErrorIs(m.t, err, image.ErrUnsupported)
		return
	}
	require.NoError(m.t, err, "op %d", m.ops)
	cs, end := int64(m.cfg.cs), off+n
	off = (off + cs - 1) / cs * cs
	if end < int64(len(m.disk)) {
		end = end / cs * cs
	}
	if off < end {
		clear(m.disk[off:end])
	}
}

func (m *model) zero() {
	off, n := m.span(6 * m.cfg.cs)
	require.NoError(m.t, m.im.WriteZeroes(off, n), "op %d", m.ops)
	clear(m.disk[off : off+n])
}

func (m *model) snapshot() {
	if len(m.snaps) >= 4 {
		return
	}
	m.next++
	name := fmt.Sprintf("snap-%d", m.next)
	err := m.im.Snapshots().Create(name)
	if (m.cfg.refBits < 8 || m.rig != nil && m.rig.data != nil) && errors.Is(err, image.ErrUnsupported) {
		return
	}
	require.NoError(m.t, err, "op %d", m.ops)
	m.snaps[name] = bytes.Clone(m.disk)
}

// any picks a snapshot by the generator, not by the map's order.
func (m *model) any() string {
	list, err := m.im.Snapshots().List()
	require.NoError(m.t, err)
	require.Len(m.t, list, len(m.snaps))
	if len(list) == 0 {
		return ""
	}
	s := list[m.rng.IntN(len(list))]
	require.Equal(m.t, int64(len(m.snaps[s.Name])), s.DiskSize)
	return s.Name
}

func (m *model) revert() {
	if name := m.any(); name != "" {
		err := m.im.Snapshots().Revert(name)
		if m.cfg.refBits < 8 && errors.Is(err, image.ErrUnsupported) {
			return
		}
		require.NoError(m.t, err, "op %d", m.ops)
		m.disk = bytes.Clone(m.snaps[name])
		m.compare(0, int64(len(m.disk)))
	}
}

func (m *model) delete() {
	if name := m.any(); name != "" {
		require.NoError(m.t, m.im.Snapshots().Delete(name), "op %d", m.ops)
		delete(m.snaps, name)
	}
}

func (m *model) resize() {
	if m.cfg.version == 2 && len(m.snaps) > 0 {
		require.ErrorIs(m.t, m.im.Resize(m.cfg.max*2), image.ErrUnsupported)
		return
	}
	old := int64(len(m.disk))
	size := old + 512*m.rng.Int64N(200)
	if m.rng.IntN(3) == 0 {
		size = 512 + m.rng.Int64N(old/512)*512
	}
	if size > m.cfg.max {
		return
	}
	require.NoError(m.t, m.im.Resize(size), "op %d", m.ops)
	m.disk = append(m.disk[:min(old, size):min(old, size)], make([]byte, max(0, size-old))...)
	require.Equal(m.t, size, m.im.Size())
}

func (m *model) reopen() {
	require.NoError(m.t, m.im.Close())
	var err error
	o := qcow2.OpenOptions{CacheSize: int64(m.rng.IntN(2)), Verify: m.rng.IntN(8) == 0}
	if m.rig != nil {
		m.im = m.rig.open(m.t, o)
	} else {
		m.im, err = qcow2.Open(m.dev, &o)
	}
	require.NoError(m.t, err, "op %d", m.ops)
	m.compare(0, int64(len(m.disk)))
}

// qemu has qemu-img check the image and read it and all its snapshots.
func (m *model) qemu() {
	dir := tempDir(m.t)
	path := filepath.Join(dir, "img")
	dump(m.t, m.dev, path)
	if r := m.rig; r != nil {
		if r.crypt {
			return // QEMU doesn't know the toy
		}
		r.dump(m.t, dir)
	}
	qemuCheck(m.t, path, false)
	got := qemuRaw(m.t, path, "")
	require.True(m.t, bytes.Equal(m.disk, got), "op %d: the disk%s", m.ops, firstDiff(m.disk, got))
	for name, want := range m.snaps {
		got := qemuRaw(m.t, path, "snapshot.name="+name)
		// qemu-img reads a snapshot with the size of the disk.
		n := min(len(want), len(got))
		require.True(m.t, bytes.Equal(want[:n], got[:n]), "op %d: snapshot %s%s", m.ops, name, firstDiff(want, got))
	}
	os.Remove(path)
}
