package qcow2_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/qcow2"
)

// A victim is a valid image of 4 KiB clusters with a snapshot, and where its
// parts are.
type victim struct {
	b                       []byte
	l1, l2, rt, rb, st, sl1 uint64
	data, shared            uint64 // entries of the L2 table: owned, and shared with the snapshot
}

func newVictim(t testing.TB) *victim {
	im, d := create(t, &qcow2.CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	_, err := im.WriteAt([]byte("shared with the snapshot"), 8*4096)
	require.NoError(t, err)
	require.NoError(t, im.Snapshots().Create("s"))
	_, err = im.WriteAt([]byte("the disk's own"), 4*4096)
	require.NoError(t, err)
	require.NoError(t, im.Close())
	v := &victim{b: make([]byte, d.Size())}
	require.NoError(t, image.ReadFull(d, v.b, 0))
	v.l1, v.rt, v.st = v.get(40), v.get(48), v.get(64)
	v.rb, v.l2, v.sl1 = v.get(v.rt), v.get(v.l1)&^(1<<63), v.get(v.st)
	v.data, v.shared = v.l2+4*8, v.l2+8*8
	return v
}

func (v *victim) get(off uint64) uint64 { return binary.BigEndian.Uint64(v.b[off:]) }

func (v *victim) put(off, x uint64) { binary.BigEndian.PutUint64(v.b[off:], x) }

func (v *victim) put32(off uint64, x uint32) { binary.BigEndian.PutUint32(v.b[off:], x) }

func (v *victim) refcount(cluster uint64, n uint16) {
	binary.BigEndian.PutUint16(v.b[v.rb+cluster*2:], n)
}

// extension adds a header extension, behind the header of 112 bytes.
func (v *victim) extension(typ, n uint32, data string) {
	v.put32(112, typ)
	v.put32(116, n)
	copy(v.b[120:], data)
}

// atOpen has one fault each, which opening finds. Kind and place are those of
// the FormatError.
var atOpen = []struct {
	name  string
	fault func(v *victim)
	ro    bool // opening for reading fails too
	kind  error
	off   func(v *victim) uint64
	field string
}{
	{"magic", func(v *victim) { v.b[3] = 0xfa }, true, image.ErrFormat, at(0), "magic"},
	{"version 1", func(v *victim) { v.put32(4, 1) }, true, image.ErrUnsupported, at(4), "version"},
	{"version 4", func(v *victim) { v.put32(4, 4) }, true, image.ErrUnsupported, at(4), "version"},
	{"backing file", func(v *victim) { v.put(8, 4000); v.put32(16, 4) }, true, image.ErrUnsupported, at(8), "backing_file_offset"},
	{"backing file outside", func(v *victim) { v.put(8, 1<<40) }, true, image.ErrFormat, at(8), "backing_file_offset"},
	{"backing file in the header", func(v *victim) { v.put(8, 8) }, true, image.ErrFormat, at(8), "backing_file_offset"},
	{"backing name of 1024", func(v *victim) { v.put(8, 1024); v.put32(16, 1024) }, true, image.ErrFormat, at(16), "backing_file_size"},
	{"backing name past the cluster", func(v *victim) { v.put(8, 4090); v.put32(16, 7) }, true, image.ErrFormat, at(16), "backing_file_size"},
	{"clusters of 256", func(v *victim) { v.put32(20, 8) }, true, image.ErrFormat, at(20), "cluster_bits"},
	{"clusters of 4 MiB", func(v *victim) { v.put32(20, 22) }, true, image.ErrFormat, at(20), "cluster_bits"},
	{"clusters of 2^(2^32-1)", func(v *victim) { v.put32(20, 1<<32-1) }, true, image.ErrFormat, at(20), "cluster_bits"},
	{"odd size", func(v *victim) { v.put(24, 4<<20-1) }, false, image.ErrCorrupt, at(24), "size"},
	{"size 2^63", func(v *victim) { v.put(24, 1<<63) }, true, image.ErrFormat, at(24), "size"},
	{"size above the L1 table", func(v *victim) { v.put(24, 4<<20+512) }, true, image.ErrCorrupt, at(36), "l1_size"},
	{"AES", func(v *victim) { v.put32(32, 1) }, true, image.ErrUnsupported, at(32), "crypt_method"},
	{"LUKS", func(v *victim) { v.put32(32, 2) }, true, image.ErrUnsupported, at(32), "crypt_method"},
	{"encryption 3", func(v *victim) { v.put32(32, 3) }, true, image.ErrFormat, at(32), "crypt_method"},
	{"L1 table above 32 MiB", func(v *victim) { v.put32(36, 4<<20+1) }, true, image.ErrFormat, at(36), "l1_size"},
	{"L1 table of 2^35 bytes", func(v *victim) { v.put32(36, 1<<32-1) }, true, image.ErrFormat, at(36), "l1_size"},
	{"no L1 table", func(v *victim) { v.put32(36, 0) }, true, image.ErrCorrupt, at(36), "l1_size"},
	{"L1 table unaligned", func(v *victim) { v.put(40, v.l1+8) }, true, image.ErrCorrupt, at(40), "l1_table_offset"},
	{"L1 table in the header", func(v *victim) { v.put(40, 0) }, true, image.ErrCorrupt, at(40), "l1_table_offset"},
	{"L1 table at 2^56", func(v *victim) { v.put(40, 1<<56) }, true, image.ErrCorrupt, at(40), "l1_table_offset"},
	{"L1 table behind the file", func(v *victim) { v.put(40, 1<<40) }, true, image.ErrCorrupt, at(40), "l1_table_offset"},
	{"refcount table behind the file", func(v *victim) { v.put(48, 1<<40) }, true, image.ErrCorrupt, at(48), "refcount_table_offset"},
	{"L1 table wraps", func(v *victim) { v.put(40, 1<<64-4096); v.put32(36, 4<<20) }, true, image.ErrCorrupt, at(40), "l1_table_offset"},
	{"L1 table on the refcount table", func(v *victim) { v.put(40, v.rt) }, false, image.ErrCorrupt, at(40), "l1_table_offset"},
	{"refcount table unaligned", func(v *victim) { v.put(48, v.rt+512) }, true, image.ErrCorrupt, at(48), "refcount_table_offset"},
	{"refcount table in the header", func(v *victim) { v.put(48, 0) }, true, image.ErrCorrupt, at(48), "refcount_table_offset"},
	{"refcount table at 2^63", func(v *victim) { v.put(48, 1<<63) }, true, image.ErrCorrupt, at(48), "refcount_table_offset"},
	{"no refcount table", func(v *victim) { v.put32(56, 0) }, true, image.ErrFormat, at(56), "refcount_table_clusters"},
	{"refcount table above 8 MiB", func(v *victim) { v.put32(56, 2049) }, true, image.ErrFormat, at(56), "refcount_table_clusters"},
	{"refcount table of 2^44 bytes", func(v *victim) { v.put32(56, 1<<32-1) }, true, image.ErrFormat, at(56), "refcount_table_clusters"},
	{"too many snapshots", func(v *victim) { v.put32(60, 65537) }, true, image.ErrFormat, at(60), "nb_snapshots"},
	{"more snapshots than the file holds", func(v *victim) { v.put32(60, 65536) }, true, image.ErrCorrupt, nil, ""},
	{"snapshots unaligned", func(v *victim) { v.put(64, v.st+8) }, true, image.ErrCorrupt, at(64), "snapshots_offset"},
	{"snapshots in the header", func(v *victim) { v.put(64, 0) }, true, image.ErrCorrupt, at(64), "snapshots_offset"},
	{"snapshots outside", func(v *victim) { v.put(64, 1<<40) }, true, image.ErrCorrupt, at(1 << 40), ""},
	{"snapshots on the L1 table", func(v *victim) { v.put(64, v.l1) }, false, nil, nil, ""},
	{"corrupt", func(v *victim) { v.b[79] |= 2 }, false, image.ErrCorrupt, at(72), "incompatible_features"},
	{"data file", func(v *victim) { v.b[79] |= 4 }, true, image.ErrUnsupported, at(72), "incompatible_features"},
	{"compression type without one", func(v *victim) { v.b[79] |= 8 }, true, image.ErrFormat, at(104), "compression_type"},
	{"a type without the bit", func(v *victim) { v.b[104] = 1 }, true, image.ErrFormat, at(104), "compression_type"},
	{"compression type 2", func(v *victim) { v.b[79] |= 8; v.b[104] = 2 }, true, image.ErrUnsupported, at(104), "compression_type"},
	{"extended L2 with small clusters", func(v *victim) { v.b[79] |= 16 }, true, image.ErrFormat, at(20), "cluster_bits"},
	{"unknown feature", func(v *victim) { v.b[72] |= 0x80 }, true, image.ErrUnsupported, at(72), "incompatible_features"},
	{"refcount order 7", func(v *victim) { v.put32(96, 7) }, true, image.ErrFormat, at(96), "refcount_order"},
	{"refcount order 2^32-1", func(v *victim) { v.put32(96, 1<<32-1) }, true, image.ErrFormat, at(96), "refcount_order"},
	{"header of 103", func(v *victim) { v.put32(100, 103) }, true, image.ErrFormat, at(100), "header_length"},
	{"header of 105", func(v *victim) { v.put32(100, 105) }, false, image.ErrCorrupt, at(100), "header_length"},
	{"header past the cluster", func(v *victim) { v.put32(100, 4097) }, true, image.ErrFormat, at(100), "header_length"},
	{"header of 2^32-1", func(v *victim) { v.put32(100, 1<<32-1) }, true, image.ErrFormat, at(100), "header_length"},
	{"extension too long", func(v *victim) { v.extension(0xabc, 4000, "") }, true, image.ErrFormat, at(116), "length"},
	{"extension of 2^32-1", func(v *victim) { v.extension(0xabc, 1<<32-1, "") }, true, image.ErrFormat, at(116), "length"},
	{"bitmaps of 23 bytes", func(v *victim) { v.extension(0x23852875, 23, "") }, true, image.ErrFormat, at(116), "length"},
	{"encryption header of 8 bytes", func(v *victim) { v.extension(0x0537be77, 8, "") }, true, image.ErrFormat, at(116), "length"},
	{"two feature tables", func(v *victim) {
		v.extension(0x6803f857, 0, "\x68\x03\xf8\x57")
	}, true, image.ErrCorrupt, at(120), "type"},
	{"bitmaps bit without bitmaps", func(v *victim) { v.b[95] |= 1 }, false, image.ErrCorrupt, at(88), "autoclear_features"},

	{"refcount block unaligned", func(v *victim) { v.put(v.rt, v.rb+512) }, false, image.ErrCorrupt, atRT, ""},
	{"refcount table reserved bits", func(v *victim) { v.put(v.rt, v.rb|1) }, false, image.ErrCorrupt, atRT, ""},
	{"refcount block outside", func(v *victim) { v.put(v.rt, 1<<40) }, false, image.ErrCorrupt, atRT, ""},
	{"refcount block at 2^63", func(v *victim) { v.put(v.rt, 1<<63) }, false, image.ErrCorrupt, atRT, ""},
	{"refcount block in the L1 table", func(v *victim) { v.put(v.rt, v.l1) }, false, image.ErrCorrupt, atRT, ""},
	{"refcount block twice", func(v *victim) { v.put(v.rt+8, v.rb) }, false, image.ErrCorrupt, func(v *victim) uint64 { return v.rt + 8 }, ""},
	{"L2 table unaligned", func(v *victim) { v.put(v.l1, v.l2+512) }, false, image.ErrCorrupt, atL1, ""},
	{"L2 table outside", func(v *victim) { v.put(v.l1, 1<<40) }, false, image.ErrCorrupt, atL1, ""},
	{"L1 reserved bits", func(v *victim) { v.put(v.l1, v.get(v.l1)|1) }, false, image.ErrCorrupt, atL1, ""},
	{"L1 reserved top bits", func(v *victim) { v.put(v.l1, v.get(v.l1)|1<<57) }, false, image.ErrCorrupt, atL1, ""},
	{"copied without an L2 table", func(v *victim) { v.put(v.l1, 1<<63) }, false, image.ErrCorrupt, atL1, ""},
	{"L2 table is the header", func(v *victim) { v.put(v.l1, 512) }, false, image.ErrCorrupt, atL1, ""},
	{"L2 table is the refcount block", func(v *victim) { v.put(v.l1, v.rb) }, false, image.ErrCorrupt, atL1, ""},
	{"L2 table is the refcount table", func(v *victim) { v.put(v.l1, v.rt) }, false, image.ErrCorrupt, atL1, ""},
	{"L2 table is the L1 table", func(v *victim) { v.put(v.l1, v.l1|1<<63) }, false, image.ErrCorrupt, atL1, ""},
	{"L2 table is the snapshot table", func(v *victim) { v.put(v.l1, v.st) }, false, image.ErrCorrupt, atL1, ""},
	{"L2 table is the snapshot's L1 table", func(v *victim) { v.put(v.l1, v.sl1) }, false, image.ErrCorrupt, atL1, ""},
	{"L2 table twice", func(v *victim) { v.put(v.l1+8, v.l2) }, false, image.ErrCorrupt, func(v *victim) uint64 { return v.l1 + 8 }, ""},

	{"snapshot L1 unaligned", func(v *victim) { v.put(v.st, v.sl1+8) }, false, image.ErrCorrupt, atST, "l1_table_offset"},
	{"snapshot L1 outside", func(v *victim) { v.put(v.st, 1<<40) }, false, image.ErrCorrupt, atST, "l1_table_offset"},
	{"snapshot L1 at 2^63", func(v *victim) { v.put(v.st, 1<<63) }, false, image.ErrCorrupt, atST, "l1_table_offset"},
	{"snapshot L1 is the L1 table", func(v *victim) { v.put(v.st, v.l1) }, false, image.ErrCorrupt, atST, "l1_table_offset"},
	{"snapshot L1 above 32 MiB", func(v *victim) { v.put32(v.st+8, 4<<20+1) }, false, image.ErrCorrupt, func(v *victim) uint64 { return v.st + 8 }, "l1_size"},
	{"snapshot L1 past the file", func(v *victim) { v.put32(v.st+8, 4<<20) }, false, image.ErrCorrupt, atST, "l1_table_offset"},
	{"snapshot extra data", func(v *victim) { v.put32(v.st+36, 1025) }, true, image.ErrFormat, func(v *victim) uint64 { return v.st + 36 }, "extra_data_size"},
	{"snapshot extra data of 2^32-1", func(v *victim) { v.put32(v.st+36, 1<<32-1) }, true, image.ErrFormat, func(v *victim) uint64 { return v.st + 36 }, "extra_data_size"},
}

func at(off uint64) func(*victim) uint64 { return func(*victim) uint64 { return off } }
func atRT(v *victim) uint64              { return v.rt }
func atL1(v *victim) uint64              { return v.l1 }
func atST(v *victim) uint64              { return v.st }

func TestHostileOpen(t *testing.T) {
	for _, c := range atOpen {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t)
			c.fault(v)
			d := memory(t, v.b)
			im, err := qcow2.Open(d, &qcow2.OpenOptions{Path: "victim"})
			require.Nil(t, im)
			var fe *image.FormatError
			require.ErrorAs(t, err, &fe)
			require.Equal(t, "victim", fe.Path)
			if c.kind != nil {
				require.ErrorIs(t, err, c.kind)
			}
			if c.off != nil {
				require.Equal(t, int64(c.off(v)), fe.Off, "%v", err)
				require.Equal(t, c.field, fe.Field, "%v", err)
			}
			after := make([]byte, len(v.b))
			require.NoError(t, image.ReadFull(d, after, 0))
			require.True(t, bytes.Equal(v.b, after), "nothing is written")

			im, err = qcow2.Open(d, &qcow2.OpenOptions{ReadOnly: true})
			require.Equal(t, c.ro, err != nil, "opening for reading: %v", err)
			if err == nil {
				exercise(im)
				r, err := im.Check(t.Context(), nil)
				require.NoError(t, err)
				require.Positive(t, r.Errors, "Check finds it too")
			}
		})
	}
}

// exercise does a little of everything. What it returns is of no concern.
func exercise(im *qcow2.Image) {
	p := make([]byte, 70000)
	for _, off := range []int64{0, 4 * 4096, 8*4096 - 1000, im.Size() - 70000} {
		_, _ = im.ReadAt(p, off)
		_, _ = im.BlockStatus(off, 4096)
		_, _ = im.WriteAt(p[:9000], off)
	}
	_ = im.Snapshots().Create("x")
	_ = im.Snapshots().Revert("s")
	_ = im.WriteZeroes(100, 90000)
	_ = im.Discard(0, im.Size()/2)
	_ = im.Sync()
	_ = im.Resize(im.Size() + 1<<20)
	_ = im.Snapshots().Delete("s")
}

// later has one fault each that shows when the place is used. Then it is an
// image.ErrCorrupt, and nothing is written to data or metadata of others.
var later = []struct {
	name  string
	fault func(v *victim)
	op    func(im *qcow2.Image) error
	off   func(v *victim) uint64
	code  string // of Check
}{
	{"data unaligned", func(v *victim) { v.put(v.data, v.get(v.data)|512) }, readData, atData, "l2-entry"},
	{"data unaligned, written", func(v *victim) { v.put(v.data, v.get(v.data)|512) }, writeData, atData, "l2-entry"},
	{"data reserved bits", func(v *victim) { v.put(v.data, v.get(v.data)|2) }, writeShort, atData, "l2-entry"},
	{"data reserved bits, zeroed", func(v *victim) { v.put(v.data, v.get(v.data)|1<<57) }, zeroData, atData, "l2-entry"},
	{"copied without a cluster", func(v *victim) { v.put(v.data, 1<<63) }, writeShort, atData, "l2-entry"},
	{"data behind the file", func(v *victim) { v.put(v.data, 1<<63|1<<40) }, readData, at(1 << 40), "outside"},
	{"data behind the file, written", func(v *victim) { v.put(v.data, 1<<63|1<<40) }, writeData, at(1 << 40), "outside"},
	{"shared data behind the file", func(v *victim) { v.put(v.shared, 1<<40) }, writeShared, at(1 << 40), "outside"},
	{"data is the header", func(v *victim) { v.put(v.data, 1<<63|512) }, writeData, atData, "l2-entry"},
	{"data is the L1 table", func(v *victim) { v.put(v.data, 1<<63|v.l1) }, writeData, atThe("l1"), "overlap"},
	{"data is its own L2 table", func(v *victim) { v.put(v.data, 1<<63|v.l2) }, writeData, atThe("l2"), "overlap"},
	{"data is the refcount block", func(v *victim) { v.put(v.data, 1<<63|v.rb) }, writeData, atThe("rb"), "overlap"},
	{"data is the refcount table", func(v *victim) { v.put(v.data, 1<<63|v.rt) }, writeData, atThe("rt"), "overlap"},
	{"data is the snapshot table", func(v *victim) { v.put(v.data, 1<<63|v.st) }, writeData, atThe("st"), "overlap"},
	{"data is the snapshot's L1 table", func(v *victim) { v.put(v.data, 1<<63|v.sl1) }, writeData, atThe("sl1"), "overlap"},
	{"copied flag on shared data", func(v *victim) { v.put(v.shared, v.get(v.shared)|1<<63) }, writeShared, atShared, "copied"},
	{"refcount 0 on data", func(v *victim) { v.refcount(v.cluster(v.data), 0) }, writeData, atOwn, "refcount"},
	{"refcount 2 on data", func(v *victim) { v.refcount(v.cluster(v.data), 2) }, writeData, atOwn, "copied"},
	{"refcount 0 on shared data", func(v *victim) { v.refcount(v.cluster(v.shared), 0) }, writeShared, atShared, "refcount"},
	{"refcount 0 on shared data, discarded", func(v *victim) { v.refcount(v.cluster(v.shared), 0) }, discardAll, atShared, "refcount"},
	{"refcount 0 on the L2 table", func(v *victim) { v.refcount(v.l2/4096, 0) }, zeroData, atThe("l2"), "refcount"},
	{"refcount 0 on the L1 table", func(v *victim) { v.refcount(v.l1/4096, 0) }, writeNew, atThe("l1"), "refcount"},
	{"refcount 0 on the refcount table", func(v *victim) { v.refcount(v.rt/4096, 0) }, writeNew, atThe("rt"), "refcount"},
	{"refcount 0 on the refcount block", func(v *victim) { v.refcount(v.rb/4096, 0) }, writeNew, atThe("rb"), "refcount"},
	{"refcount 0 on the header", func(v *victim) { v.refcount(0, 0) }, writeNew, at(0), "refcount"},
	{"refcount 0 on the snapshot table", func(v *victim) { v.refcount(v.st/4096, 0) }, writeNew, atThe("st"), "refcount"},
	{"refcount 0 on the snapshot's L1 table", func(v *victim) { v.refcount(v.sl1/4096, 0) }, writeNew, atThe("sl1"), "refcount"},
	{"refcount 1 on shared data, snapshot deleted", func(v *victim) { v.refcount(v.cluster(v.shared), 1) }, deleteSnap, atShared, "refcount"},
	{"refcount 0 on shared data, snapshot taken", func(v *victim) { v.refcount(v.cluster(v.shared), 0) }, createSnap, atShared, "refcount"},
	{"refcount 0 on shared data, reverted", func(v *victim) { v.refcount(v.cluster(v.shared), 0) }, revertSnap, atShared, "refcount"},
	{"compressed past the file", func(v *victim) { v.put(v.shared, 1<<62|1<<40) }, readShared, at(1 << 40), "outside"},
	{"compressed at 2^57", func(v *victim) { v.put(v.shared, 1<<62|1<<57) }, readShared, atSharedEntry, "l2-entry"},
	{"compressed in the header", func(v *victim) { v.put(v.shared, 1<<62|8) }, readShared, atSharedEntry, "l2-entry"},
	{"compressed junk", func(v *victim) { v.put(v.shared, 1<<62|v.l2) }, readShared, atThe("l2"), "overlap"},
	{"compressed and copied", func(v *victim) { v.put(v.shared, 3<<62|v.l2) }, zeroShared, atSharedEntry, "l2-entry"},
}

// cluster returns the cluster that the L2 entry at off maps.
func (v *victim) cluster(off uint64) uint64 { return v.get(off) << 8 >> 8 / 4096 }

func atData(v *victim) uint64        { return v.data }
func atSharedEntry(v *victim) uint64 { return v.shared }
func atOwn(v *victim) uint64         { return v.cluster(v.data) * 4096 }
func atShared(v *victim) uint64      { return v.cluster(v.shared) * 4096 }

func atThe(part string) func(v *victim) uint64 {
	return func(v *victim) uint64 {
		return map[string]uint64{"l1": v.l1, "l2": v.l2, "rt": v.rt, "rb": v.rb, "st": v.st, "sl1": v.sl1}[part]
	}
}

func readAt(off int64) func(im *qcow2.Image) error {
	return func(im *qcow2.Image) error { _, err := im.ReadAt(make([]byte, 10), off); return err }
}

func writeAt(off int64, n int) func(im *qcow2.Image) error {
	return func(im *qcow2.Image) error {
		if _, err := im.WriteAt(make([]byte, n), off); err != nil {
			return err
		}
		return im.Sync()
	}
}

var (
	readData    = readAt(4 * 4096)
	readShared  = readAt(8 * 4096)
	writeData   = writeAt(4*4096, 4096)
	writeShort  = writeAt(4*4096+7, 10)
	writeShared = writeAt(8*4096, 10)
)

// writeNew fills the disk, so that all clusters that look free are taken.
func writeNew(im *qcow2.Image) error { return writeAt(100*4096, 300*4096)(im) }

func zeroData(im *qcow2.Image) error   { return im.WriteZeroes(4*4096, 4096) }
func zeroShared(im *qcow2.Image) error { return im.WriteZeroes(8*4096, 4096) }
func deleteSnap(im *qcow2.Image) error { return im.Snapshots().Delete("s") }
func createSnap(im *qcow2.Image) error { return im.Snapshots().Create("x") }
func revertSnap(im *qcow2.Image) error { return im.Snapshots().Revert("s") }
func discardAll(im *qcow2.Image) error { return im.Discard(0, im.Size()) }

// TestUnreadable writes to a part of a cluster whose rest can't be read. The new
// cluster isn't leaked.
func TestUnreadable(t *testing.T) {
	path := filepath.Join(tempDir(t), "img")
	qemuCreate(t, path, "cluster_size=4096", 1<<20)
	qemuIO(t, path, "write -c -P 5 64k 4k")
	b, err := os.ReadFile(path)
	require.NoError(t, err)
	l2 := binary.BigEndian.Uint64(b[binary.BigEndian.Uint64(b[40:]):]) << 1 >> 1
	data := binary.BigEndian.Uint64(b[l2+16*8:]) & (1<<58 - 1)
	copy(b[data:], bytes.Repeat([]byte{0xff}, 64))
	d := &keep{memory(t, b)}
	im := open(t, d)
	_, err = im.WriteAt([]byte("x"), 64<<10)
	require.ErrorIs(t, err, image.ErrCorrupt)
	noErrors(t, im, false)
	r, err := im.Check(t.Context(), &qcow2.CheckOptions{Data: true})
	require.NoError(t, err)
	require.Equal(t, "compressed", r.Findings[0].Code)
	_, err = im.WriteAt(make([]byte, 4096), 64<<10)
	require.NoError(t, err, "all of it can be written")
	require.NoError(t, im.Close())
	checkDevice(t, d, make([]byte, 1<<20))
}

func TestHostileUse(t *testing.T) {
	for _, c := range later {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t)
			c.fault(v)
			im, err := qcow2.Open(memory(t, v.b), &qcow2.OpenOptions{ReadOnly: true, Path: "victim"})
			require.NoError(t, err)
			r, err := im.Check(t.Context(), nil)
			require.NoError(t, err)
			var codes []string
			for _, f := range r.Findings {
				codes = append(codes, f.Code)
			}
			require.Contains(t, codes, c.code, "%+v", r.Findings)
			require.NotZero(t, r.Errors)

			d := memory(t, v.b)
			_, err = qcow2.Open(d, &qcow2.OpenOptions{Verify: true})
			require.ErrorIs(t, err, image.ErrCorrupt, "Verify")
			im, err = qcow2.Open(d, &qcow2.OpenOptions{Path: "victim"})
			require.NoError(t, err)
			err = c.op(im)
			require.ErrorIs(t, err, image.ErrCorrupt)
			var fe *image.FormatError
			require.ErrorAs(t, err, &fe)
			require.Equal(t, "victim", fe.Path)
			if c.off != nil {
				require.Equal(t, int64(c.off(v)), fe.Off, "%v", err)
			}
			for _, part := range []string{"l1", "l2", "rt", "rb", "st", "sl1"} {
				off := int(atThe(part)(v))
				b := make([]byte, 4096)
				require.NoError(t, image.ReadFull(d, b, int64(off)))
				require.True(t, bytes.Equal(v.b[off:off+4096], b), "the %s table was written%s", part, firstDiff(v.b[off:off+4096], b))
			}
			exercise(im)
			_ = im.Close()
		})
	}
}

// TestAutoclear keeps known bits of an image that is only read, and clears
// unknown ones before it writes.
func TestAutoclear(t *testing.T) {
	v := newVictim(t)
	v.b[88] = 0x80
	d := memory(t, v.b)
	im, err := qcow2.Open(d, &qcow2.OpenOptions{ReadOnly: true})
	require.NoError(t, err)
	info, err := im.Info()
	require.NoError(t, err)
	require.Equal(t, []qcow2.Feature{{Kind: "autoclear", Bit: 63}}, info.Features)
	im, err = qcow2.Open(d, nil)
	require.NoError(t, err)
	info, err = im.Info()
	require.NoError(t, err)
	require.Empty(t, info.Features)
	b := make([]byte, 8)
	require.NoError(t, image.ReadFull(d, b, 88))
	require.Equal(t, make([]byte, 8), b)
}

// TestFeatureName names an unknown feature by the image's own table.
func TestFeatureName(t *testing.T) {
	v := newVictim(t)
	v.b[72] = 0x40
	v.extension(0x6803f857, 48, "\x00\x3esparkling clusters")
	_, err := qcow2.Open(memory(t, v.b), nil)
	require.ErrorContains(t, err, `bit 62 "sparkling clusters"`)
}

// TestSharedTable has two entries of the L1 table name one L2 table, with
// refcounts that fit. qemu-img finds nothing in that; what is written through
// one entry would be seen through the other.
func TestSharedTable(t *testing.T) {
	v := newVictim(t)
	l2, data, shared := v.l2>>12, v.get(v.data)&(1<<56-1)>>12, v.get(v.shared)&(1<<56-1)>>12
	v.put(v.l1, v.l2)
	v.put(v.l1+8, v.l2)
	v.put(v.data, data<<12)
	v.refcount(l2, 2)
	v.refcount(data, 2)
	v.refcount(shared, 3)
	path := filepath.Join(tempDir(t), "img")
	require.NoError(t, os.WriteFile(path, v.b, 0o600))
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	require.NoError(t, err, "%s", out)

	d := memory(t, v.b)
	_, err = qcow2.Open(d, nil)
	require.ErrorIs(t, err, image.ErrCorrupt)
	im, err := qcow2.Open(d, &qcow2.OpenOptions{ReadOnly: true})
	require.NoError(t, err)
	r, err := im.Check(t.Context(), nil)
	require.NoError(t, err)
	require.Len(t, r.Findings, 1)
	require.Equal(t, "overlap", r.Findings[0].Code)
	require.Equal(t, int64(v.l1+8), r.Findings[0].Where)
}
