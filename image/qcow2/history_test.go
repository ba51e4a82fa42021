package qcow2_test

import (
	"bytes"
	"errors"
	"fmt"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

// What went wrong in QEMU and other drivers, once each. Commits are QEMU's.

// refusals are images that opening for writing, or the first use, refuses.
var refusals = []struct {
	name  string
	fault func(v *victim)
	op    func(im *qcow2.Image) error // nil: opening
	part  string                      // of the FormatError: structure
	field string
}{
	{"CVE-2014-0142 clusters of 2^0 bytes, a divisor", func(v *victim) { v.put32(20, 0) }, nil, "header", "cluster_bits"},
	{"CVE-2014-0142 refcounts of 2^64 bits", func(v *victim) { v.put32(96, 64) }, nil, "header", "refcount_order"},
	{"CVE-2014-0143 L1 size overflows", func(v *victim) { v.put32(36, 0x7fffffff) }, nil, "header", "l1_size"},
	{"CVE-2014-0143 snapshot L1 size overflows", func(v *victim) { v.put32(v.st+8, 0xffffffff) }, nil, "snapshot table", "l1_size"},
	{"CVE-2014-0143 refcount block at 2^63", func(v *victim) { v.put(v.rt, 1<<63) }, nil, "refcount table", ""},
	{"CVE-2014-0144 header_length past the cluster", func(v *victim) { v.put32(100, 0xffffff00) }, nil, "header", "header_length"},
	{"CVE-2014-0144 backing_file_offset past the cluster", func(v *victim) { v.put(8, 1<<62) }, nil, "header", "backing_file_offset"},
	{"CVE-2014-0144 backing name past the cluster", func(v *victim) { v.put(8, 4095); v.put32(16, 1023) }, nil, "header", "backing_file_size"},
	{"CVE-2014-0144 refcount table of 2^44 bytes", func(v *victim) { v.put32(56, 0xffffffff) }, nil, "header", "refcount_table_clusters"},
	{"CVE-2014-0144 refcount table offset", func(v *victim) { v.put(48, 1<<63-4096) }, nil, "header", "refcount_table_offset"},
	{"CVE-2014-0144 snapshot table past 2^56", func(v *victim) { v.put(64, 1<<63-4096) }, nil, "header", "snapshots_offset"},
	{"CVE-2014-0144 snapshots without number", func(v *victim) { v.put32(60, 0xffffffff) }, nil, "header", "nb_snapshots"},
	{"CVE-2014-0144 L1 table past 2^56", func(v *victim) { v.put(40, 1<<63-4096) }, nil, "header", "l1_table_offset"},
	{"CVE-2014-0144 extension longer than the header", func(v *victim) { v.extension(0xe2792aca, 1<<31, "") }, nil, "header extension", "length"},
	{"CVE-2014-0145 snapshot L1 shorter than the disk", func(v *victim) { v.put32(v.st+8, 0) }, revertSnap, "snapshot table", "disk_size"},
	{"CVE-2014-0145 extra data overruns the entry", func(v *victim) { v.put32(v.st+36, 1<<31) }, nil, "snapshot table", "extra_data_size"},
	{"CVE-2014-0146 an error path after the L1 table", func(v *victim) { v.put(64, 1<<40) }, nil, "snapshot table", ""},
	{"CVE-2014-0147 no refcounts: the next block overwrites what is there", func(v *victim) { clear(v.b[v.rb : v.rb+4096]) }, writeNew, "cluster", "refcount"},
	{"CVE-2014-0223 a size above 2^63", func(v *victim) { v.put(24, 1<<63+512) }, nil, "header", "size"},
	{"CVE-2024-4467 data file json:{}", func(v *victim) { v.b[79] |= 4; v.extension(0x44415441, 16, `json:{"driver":1`) }, nil, "header", "incompatible_features"},
	{"CVE-2008-2004 a backing file of the guest's choice", func(v *victim) { v.put(8, 2048); v.put32(16, 11); copy(v.b[2048:], "/etc/shadow") }, nil, "header", "backing_file_offset"},
	{"6bf45d59f9 a refcount block at 0", func(v *victim) { v.refcount(0, 0) }, writeNew, "cluster", "refcount"},
	{"9883975050 an L2 table at 0", func(v *victim) { v.refcount(0, 0) }, writeAt(3<<20, 10), "cluster", "refcount"},
	{"77d6a21558 a cluster past 2^56", func(v *victim) { v.put(v.shared, 1<<62|1<<57) }, readShared, "L2 table", ""},
	{"99febf3ac extra data of 1025", func(v *victim) { v.put32(v.st+36, 1025) }, nil, "snapshot table", "extra_data_size"},
	{"7eb24009db bitmaps past the file", func(v *victim) { v.bitmaps(1, 4096, 1<<40) }, nil, "bitmaps extension", "bitmap_directory_offset"},
	{"7eb24009db a directory without end", func(v *victim) { v.bitmaps(1, 1<<40, 4096*4) }, nil, "bitmaps extension", "bitmap_directory_size"},
	{"b03dd9613b bitmaps in the header", func(v *victim) { v.bitmaps(1, 4096, 0) }, nil, "bitmaps extension", "bitmap_directory_offset"},
	{"b03dd9613b no bitmaps in the extension", func(v *victim) { v.bitmaps(0, 4096, 4096*4) }, nil, "bitmaps extension", "nb_bitmaps"},
	{"cloud-hypervisor 8008 data over the L1 table", func(v *victim) { v.put(v.data, 1<<63|v.l1) }, writeData, "cluster", ""},

	// QEMU takes these without a word.
	{"silent header_length of 105", func(v *victim) { v.put32(100, 105) }, nil, "header", "header_length"},
	{"silent odd size", func(v *victim) { v.put(24, 4<<20-1) }, nil, "header", "size"},
	{"silent L1 table at 0", func(v *victim) { v.put(40, 0) }, nil, "header", "l1_table_offset"},
	{"silent reserved bits in L1", func(v *victim) { v.put(v.l1, v.get(v.l1)|1<<56) }, nil, "L1 table", ""},
	{"silent reserved bits in L2", func(v *victim) { v.put(v.data, v.get(v.data)|1<<56) }, writeData, "L2 table", ""},
	{"silent copied flag on nothing", func(v *victim) { v.put(v.data, 1<<63) }, writeData, "L2 table", ""},
	{"silent refcount 0 on a live cluster", func(v *victim) { v.refcount(v.cluster(v.data), 0) }, writeData, "cluster", "refcount"},
	{"silent garbage in a compressed cluster", func(v *victim) {
		v.put(v.shared, 1<<62|v.cluster(v.shared)*4096)
	}, readShared, "compressed cluster", ""},
	{"silent corrupt bit", func(v *victim) { v.b[79] |= 2 }, nil, "header", "incompatible_features"},
	{"silent encryption header of 2^62 bytes", func(v *victim) {
		v.put32(32, 2)
		v.extension(0x0537be77, 16, "\x00\x00\x00\x00\x00\x00\x40\x00\x40\x00\x00\x00\x00\x00\x00\x00")
	}, nil, "encryption header pointer", "length"},
}

// TestHistory: each is an error that names structure, field and byte, writes
// nothing, and asks for little memory.
func TestHistory(t *testing.T) {
	for _, c := range refusals {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t)
			c.fault(v)
			d := memory(t, v.b)
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			o := &qcow2.OpenOptions{}
			if v.b[35] == 2 {
				o.Unlock = func(image.Device, int) (image.SectorCipher, error) { return nil, errors.New("not reached") }
			}
			im, err := qcow2.Open(d, o)
			if c.op != nil {
				require.NoError(t, err)
				err = c.op(im)
			} else {
				require.Nil(t, im)
				require.Equal(t, v.b, bytesOf(t, d), "nothing is written")
			}
			runtime.ReadMemStats(&after)
			require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(48<<20))
			var fe *image.FormatError
			require.ErrorAs(t, err, &fe)
			require.Equal(t, "qcow2 "+c.part, fe.Struct, "%v", err)
			require.Equal(t, c.field, fe.Field, "%v", err)
			require.NotEmpty(t, fe.Want)
		})
	}
}

// TestHistoryNames: what an image names is a string, and Inspect opens nothing
// (CVE-2024-4467, CVE-2022-47951, CVE-2024-32498).
func TestHistoryNames(t *testing.T) {
	v := newVictim(t)
	v.b[79] |= 4
	name := `json:{"driver":"nbd","host":"x"}`
	v.extension(0x44415441, uint32(len(name)), name)
	info, err := qcow2.Inspect(memory(t, v.b), "")
	require.NoError(t, err)
	require.Equal(t, name, info.DataFile)
}

// TestHistoryRequests: no request reaches past the disk (CVE-2008-0928).
func TestHistoryRequests(t *testing.T) {
	im, _ := create(t, &qcow2.CreateOptions{Size: 1 << 20})
	p := make([]byte, 1024)
	for _, off := range []int64{-1, 1<<20 - 512, 1 << 20, 1<<63 - 512, -1 << 63} {
		_, err := im.WriteAt(p, off)
		require.ErrorIs(t, err, image.ErrOutOfRange, "%d", off)
		require.ErrorIs(t, im.Discard(off, 1024), image.ErrOutOfRange)
		require.ErrorIs(t, im.WriteZeroes(off, 1024), image.ErrOutOfRange)
		_, err = im.BlockStatus(off, 1024)
		require.ErrorIs(t, err, image.ErrOutOfRange)
	}
	_, err := im.WriteVMState(p, -1)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	_, err = im.WriteVMState(p, 1<<62)
	require.ErrorIs(t, err, image.ErrOutOfRange)
	noErrors(t, im, false)
}

// TestHistoryZeroes: writing zeros over a shared cluster with leave to unmap it
// loses nothing of the snapshot (c8bf9a9169).
func TestHistoryZeroes(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	want := bytes.Repeat([]byte("keep"), 16384)
	_, err := im.WriteAt(want, 0)
	require.NoError(t, err)
	require.NoError(t, im.Snapshots().Create("s"))
	require.NoError(t, im.WriteZeroes(0, 65536))
	require.NoError(t, im.Discard(0, 65536))
	require.NoError(t, im.Snapshots().Revert("s"))
	require.Equal(t, want, contents(t, im)[:65536])
	require.NoError(t, im.Close())
	checkDevice(t, d, nil)
}

// TestHistoryAllocator: after resizes and compressed clusters, the allocator
// gives out nothing that is in use (cloud-hypervisor issue 8606).
func TestHistoryAllocator(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 2 << 20, ClusterSize: 4096})
	var want []byte
	for round := range 6 {
		size := int64(2+round*3%5) << 20
		require.NoError(t, im.Resize(size))
		want = append(want[:min(int64(len(want)), size)], make([]byte, max(0, size-int64(len(want))))...)
		for off := int64(round) * 4096; off+8192 <= size; off += 7 * 4096 {
			p := want[off : off+8192]
			fill(p, byte(round), byte(off>>12), 7)
			var err error
			if off%3 == 0 {
				_, err = im.WriteCompressed(p, off)
			} else {
				_, err = im.WriteAt(p, off)
			}
			require.NoError(t, err)
		}
		noErrors(t, im, false)
		require.True(t, bytes.Equal(want, contents(t, im)))
	}
	require.NoError(t, im.Close())
	checkDevice(t, d, want)
}

// TestOverlap: no way of writing gets to metadata that a data entry refers to,
// whatever refcounts say (cloud-hypervisor issue 8008).
func TestOverlap(t *testing.T) {
	ops := map[string]func(im *qcow2.Image) error{
		"write":      writeData,
		"part":       writeShort,
		"zeros":      func(im *qcow2.Image) error { return im.WriteZeroes(4*4096+100, 1000) },
		"zero all":   zeroData,
		"discard":    func(im *qcow2.Image) error { return errors.Join(im.Discard(4*4096, 4096), writeNew(im)) },
		"compressed": func(im *qcow2.Image) error { _, err := im.WriteCompressed(make([]byte, 4096), 4*4096); return err },
		"snapshot":   func(im *qcow2.Image) error { return errors.Join(im.Snapshots().Create("x"), writeShort(im)) },
		"shrink":     func(im *qcow2.Image) error { return errors.Join(im.Resize(3*4096), writeAt(0, 3*4096)(im)) },
		"grow": func(im *qcow2.Image) error {
			return errors.Join(im.Resize(4*4096+512), im.Resize(4<<20), writeNew(im))
		},
		"revert": func(im *qcow2.Image) error { return errors.Join(im.Snapshots().Revert("s"), writeNew(im)) },
	}
	for _, part := range []string{"l1", "l2", "rt", "rb", "st", "sl1"} {
		for name, op := range ops {
			for _, flag := range []uint64{1 << 63, 0, 1<<63 | 1} {
				t.Run(fmt.Sprintf("%s %s %#x", part, name, flag), func(t *testing.T) {
					v := newVictim(t)
					at := atThe(part)(v)
					v.put(v.data, at|flag)
					d := memory(t, v.b)
					im, err := qcow2.Open(d, nil)
					require.NoError(t, err)
					opErr := op(im)
					_ = im.Sync()
					got := make([]byte, 4096)
					require.NoError(t, image.ReadFull(d, got, int64(at)))
					// Tables may change for good reason. They don't
					// become data, and aren't discarded, unless
					// they are elsewhere now.
					if part == "rt" && opErr == nil {
						return
					}
					require.False(t, bytes.Equal(got, make([]byte, 4096)), "%v", opErr)
					if name == "write" || name == "part" || name == "compressed" {
						require.Error(t, opErr)
					}
					if opErr != nil {
						require.ErrorIs(t, opErr, image.ErrCorrupt)
					}
				})
			}
		}
	}
}
