package blobdir_test

import (
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
)

// These tests hold single lines of the commit protocol, where the exhaustive
// ones would not say which line is missing.

var slotOffsets = []int64{64 << 10, 128 << 10}

const settledOffset = 192 << 10

func openStore(t testing.TB, dev image.Device, kind string) *blobdir.Dir {
	d, err := blobdir.Open(dev, openOptions(t, kind))
	require.NoError(t, err)
	return d
}

func info(t testing.TB, d *blobdir.Dir) *blobdir.Info {
	in, err := d.Info()
	require.NoError(t, err)
	return in
}

// liveSlot returns the slot that was written last, by looking at what a
// commit would overwrite next.
func slotBytes(t testing.TB, dev image.Device, slot int) []byte {
	p := make([]byte, 512)
	require.NoError(t, image.ReadFull(dev, p, slotOffsets[slot]))
	return p
}

func damage(t testing.TB, dev image.Device, off int64, n int) {
	p := make([]byte, n)
	require.NoError(t, image.ReadFull(dev, p, off))
	for i := range p {
		p[i] ^= 0xa5
	}
	_, err := dev.WriteAt(p, off)
	require.NoError(t, err)
}

// regions returns what the newest generation uses.
func regions(t testing.TB, d *blobdir.Dir) []blobdir.Region {
	var all []blobdir.Region
	require.NoError(t, d.Regions(func(r blobdir.Region) error { all = append(all, r); return nil }))
	return all
}

// liveRoot tells which slot holds the newest root.
func liveRoot(t testing.TB, d *blobdir.Dir) int {
	slot, gen := -1, int64(0)
	for _, r := range regions(t, d) {
		if r.Kind == blobdir.RegionRoot && r.Generation > gen {
			gen = r.Generation
			slot = int(r.Offset/slotOffsets[0]) - 1
		}
	}
	return slot
}

// A commit must go to the slot that isn't live, above any generation seen,
// even after a torn commit, when parity would say otherwise.
func TestCommitAfterTornGeneration(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, want := populate(t, kind, rawStack)
		d := openStore(t, dev, kind)
		live, gen := liveRoot(t, d), info(t, d).Generation
		for round := range 3 {
			// Tear a commit: everything but its content arrives.
			h := &hook{Device: dev}
			d = openStore(t, h, kind)
			before := dev.Fork()
			require.NoError(t, put(d, "torn", random(900)))
			torn := info(t, d).Generation
			for _, r := range regions(t, d) {
				if r.Kind == blobdir.RegionChunk && r.Generation == torn {
					old := make([]byte, 4096)
					require.NoError(t, image.ReadFull(before, old, r.Offset))
					_, err := dev.WriteAt(old, r.Offset)
					require.NoError(t, err)
				}
			}
			dev = dev.Reopen()
			keep := slotBytes(t, dev, live)
			d = openStore(t, dev, kind)
			require.NotEmpty(t, info(t, d).Status.Recovered, "round %d", round)
			require.Equal(t, gen, info(t, d).Generation)
			require.NoError(t, put(d, "after", []byte{byte(round)}))
			require.Equal(t, keep, slotBytes(t, dev, live), "the live root stays")
			require.Greater(t, info(t, d).Generation, torn)
			want["after"] = string([]byte{byte(round)})
			got, err := contentOf(d)
			require.NoError(t, err)
			require.True(t, maps.Equal(want, got))
			live, gen = 1-live, info(t, d).Generation
			require.NoError(t, d.Close())
			dev = dev.Reopen()
		}
	})
}

// A generation that is settled is never rolled back: damage there is damage.
func TestSettledIsNeverRolledBack(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		for _, how := range []string{"by the record", "by its child"} {
			t.Run(how, func(t *testing.T) {
				dev, _ := populate(t, kind, rawStack)
				d := openStore(t, dev, kind)
				require.NoError(t, put(d, "victim", random(900)))
				gen := info(t, d).Generation
				var at int64
				for _, r := range regions(t, d) {
					if r.Kind == blobdir.RegionChunk && r.Generation == gen {
						at = r.Offset
					}
				}
				if how == "by its child" {
					require.NoError(t, put(d, "child", random(900)))
				} else {
					require.NoError(t, d.Close())
					dev = dev.Reopen()
				}
				damage(t, dev, at, 1)
				d = openStore(t, dev.Reopen(), kind)
				require.Empty(t, info(t, d).Status.Recovered)
				require.GreaterOrEqual(t, info(t, d).Generation, gen)
				err := d.View(func(tx *blobdir.Tx) error { _, err := tx.Get("victim", 0); return err })
				require.ErrorIs(t, err, blobdir.ErrCorrupt)
				require.ErrorContains(t, err, "victim")
			})
		}
		t.Run("its root", func(t *testing.T) {
			dev, want := populate(t, kind, rawStack)
			d := openStore(t, dev, kind)
			require.NoError(t, put(d, "last", random(900)))
			live := liveRoot(t, d)
			require.NoError(t, d.Close())
			dev = dev.Reopen()
			damage(t, dev, slotOffsets[live], 4)
			_, err := blobdir.Open(dev, openOptions(t, kind))
			require.ErrorIs(t, err, blobdir.ErrCorrupt)
			o := openOptions(t, kind)
			o.Previous = true
			d, err = blobdir.Open(dev, o)
			require.NoError(t, err)
			got, err := contentOf(d)
			require.NoError(t, err)
			require.True(t, maps.Equal(want, got), "the generation before is there for rescue")
			require.ErrorIs(t, put(d, "x", nil), blobdir.ErrReadOnly)
		})
	})
}

// An unsettled root that is lost is one that may never have been: the other
// counts, and opening says so where it can know.
func TestUnsettledRootLost(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, want := populate(t, kind, rawStack)
		d := openStore(t, dev, kind)
		require.NoError(t, put(d, "last", random(900)))
		live := liveRoot(t, d)
		dev = dev.Reopen()
		damage(t, dev, slotOffsets[live], 4)
		d = openStore(t, dev, kind)
		require.NotEmpty(t, info(t, d).Status.Recovered)
		got, err := contentOf(d)
		require.NoError(t, err)
		require.True(t, maps.Equal(want, got))
	})
}

// The settled record lies in a block of its own.
func TestSettlingTouchesNoRoot(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, _ := populate(t, kind, rawStack)
		d := openStore(t, dev, kind)
		require.NoError(t, put(d, "x", []byte("y")))
		from := dev.Len()
		require.NoError(t, d.Close())
		writes := 0
		for _, op := range dev.Log()[from:] {
			if op.Kind == imagetest.OpWrite {
				require.EqualValues(t, settledOffset, op.Off)
				writes++
			}
		}
		require.Equal(t, 1, writes)
	})
}

// At any time the generation before the newest is whole, and stays so while
// the next is written.
func TestFallbackIsWhole(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, c := populate(t, kind, rawStack)
		h := &hook{Device: dev}
		d := openStore(t, h, kind)
		var before content
		for i := range 12 {
			a := actions(byte(i))[i%len(actions(0))]
			live, gen := liveRoot(t, d), info(t, d).Generation
			h.before = func(int) {
				if before == nil || i < 2 {
					return
				}
				// The newest root rots in the middle of a commit.
				rot := dev.Fork()
				damage(t, rot, slotOffsets[live], 8)
				damage(t, rot, settledOffset, 8)
				if gone(t, rot, kind, before, gen) {
					t.Errorf("commit %d: the fallback is damaged", i)
				}
			}
			require.NoError(t, d.Update(a.tx, nil))
			h.before = nil
			before = c
			c = c.with(a.model)
		}
	})
}

// gone tells whether opening finds anything but want, or what the commit that
// follows generation gen made of it.
func gone(t testing.TB, dev *imagetest.CrashDevice, kind string, want content, gen int64) bool {
	d, err := blobdir.Open(dev, openOptions(t, kind))
	if err != nil {
		return true
	}
	got, err := contentOf(d)
	if err != nil {
		return true
	}
	return !maps.Equal(got, want) && info(t, d).Generation <= gen
}

// What a generation frees isn't written before two further generations are
// durable.
func TestQuarantine(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, _ := populate(t, kind, rawStack)
		h := &record{Device: dev}
		d := openStore(t, h, kind)
		used := func() map[int64]bool {
			m := map[int64]bool{}
			for _, r := range regions(t, d) {
				if r.Kind == blobdir.RegionFree || r.Kind == blobdir.RegionRoot {
					continue
				}
				for b := r.Offset / 4096; b*4096 < r.Offset+r.Length; b++ {
					m[b] = true
				}
			}
			return m
		}
		freedAt := map[int64]int{} // block → commit that freed it
		before := used()
		reused := 0
		for i := range 60 {
			h.off = nil
			require.NoError(t, d.Update(actions(byte(i))[i%len(actions(0))].tx, nil))
			for _, b := range h.off {
				if f, ok := freedAt[b]; ok {
					require.Greater(t, i, f+2, "block %d was freed by commit %d and written by commit %d", b, f, i)
					delete(freedAt, b)
					reused++
				}
			}
			now := used()
			for b := range before {
				if !now[b] {
					freedAt[b] = i
				}
			}
			before = now
		}
		require.Greater(t, reused, 50)
	})
}

// record keeps the numbers of the blocks written.
type record struct {
	image.Device
	off []int64
}

func (r *record) WriteAt(p []byte, off int64) (int, error) {
	if len(p) >= 4096 {
		for b := off / 4096; b*4096 < off+int64(len(p)); b++ {
			r.off = append(r.off, b)
		}
	}
	return r.Device.WriteAt(p, off)
}

func (r *record) Unwrap() image.Device { return r.Device }

// Discards come in bulk, leave a reserve, and not at all once the image was
// changed underneath.
func TestTrim(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		for _, reverted := range []bool{false, true} {
			dev := imagetest.NewCrash(16<<20, nil)
			d, err := blobdir.Create(dev, createOptions(t, kind))
			require.NoError(t, err)
			require.NoError(t, put(d, "keep", random(5000)))
			snap := dev.Snapshot()
			require.NoError(t, put(d, "large", random(9<<20)))
			before := dev.Trace()
			// While a reader holds the space back, settling leaves only
			// the discards to do.
			release, held := make(chan struct{}), make(chan struct{})
			go func() { _ = d.View(func(*blobdir.Tx) error { close(held); <-release; return nil }) }()
			<-held
			require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.Delete("large") }, nil))
			for i := range 4 {
				require.NoError(t, put(d, "keep", random(5000+i)))
			}
			require.Zero(t, dev.Trace().Sub(before).Discards, "not with the commit")
			want := get(t, d, "keep")
			if !reverted {
				close(release)
				require.Eventually(t, func() bool { return d.Oldest() > 1<<60 }, time.Minute, time.Millisecond)
			}
			if reverted {
				require.NoError(t, d.Settle())
				require.Zero(t, dev.Trace().Sub(before).Discards, "a reader needs it")
				close(release)
				require.Eventually(t, func() bool { return d.Oldest() > 1<<60 }, time.Minute, time.Millisecond)
				dev.Revert(snap)
				require.ErrorIs(t, d.Close(), blobdir.ErrReverted)
				require.Zero(t, dev.Trace().Sub(before).Discards)
				continue
			}
			require.NoError(t, d.Close())
			diff := dev.Trace().Sub(before)
			require.Positive(t, diff.Discards)
			require.Less(t, diff.Discards, int64(20))
			require.Greater(t, diff.BytesDiscarded, int64(7<<20))
			d = openStore(t, dev.Reopen(), kind)
			require.Equal(t, want, get(t, d, "keep"))
			requireClean(t, d)
		}
	})
}

// Two writers on one image, which no lock kept apart: the second to commit is
// told, and nothing of the first is lost.
func TestTwoWriters(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, _ := populate(t, kind, rawStack)
		a, b := openStore(t, &record{Device: dev}, kind), openStore(t, &record{Device: dev}, kind)
		require.NoError(t, put(a, "a", []byte("1")))
		require.ErrorIs(t, put(b, "b", []byte("2")), blobdir.ErrReverted)
		require.NoError(t, put(b, "b", []byte("2")), "on the new state")
		runs := 0
		err := a.Update(func(tx *blobdir.Tx) error {
			runs++
			return tx.Put("c", []byte("3"), nil)
		}, &blobdir.TxOptions{Rerun: true})
		require.NoError(t, err)
		require.Equal(t, 2, runs)
		got, err := contentOf(a)
		require.NoError(t, err)
		require.Equal(t, []string{"1", "2", "3"}, []string{got["a"], got["b"], got["c"]})
		requireClean(t, a)
	})
}

// A reader keeps its generation while the writer goes on.
func TestReadersStandStill(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, want := populate(t, kind, rawStack)
		d := openStore(t, dev, kind)
		err := d.View(func(tx *blobdir.Tx) error {
			for i := range 30 {
				if err := d.Update(actions(byte(i))[i%len(actions(0))].tx, nil); err != nil {
					return err
				}
			}
			for name, data := range want {
				p, err := tx.Get(name, 0)
				require.NoError(t, err)
				require.Equal(t, data, string(p))
			}
			return nil
		})
		require.NoError(t, err)
		requireClean(t, d)
	})
}

// Damage to the free node costs nothing: it is made anew.
func TestFreeNodeIsAHint(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, want := populate(t, kind, rawStack)
		d := openStore(t, dev, kind)
		for _, r := range regions(t, d) {
			if r.Kind == blobdir.RegionFreeNode {
				damage(t, dev, r.Offset, 10)
			}
		}
		d = openStore(t, dev.Reopen(), kind)
		require.NotEmpty(t, info(t, d).Status.FreeRebuilt)
		require.NoError(t, put(d, "x", random(20000)))
		got, err := contentOf(d)
		require.NoError(t, err)
		delete(got, "x")
		require.True(t, maps.Equal(want, got))
		requireClean(t, d)
	})
}

// A full image of fixed size says how much is missing, changes nothing, and
// works on.
func TestNoSpace(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(512<<10, &imagetest.CrashOptions{Fixed: true})
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		require.NoError(t, put(d, "a", random(50000)))
		before, err := contentOf(d)
		require.NoError(t, err)
		gen := info(t, d).Generation
		err = put(d, "b", random(600000))
		require.ErrorIs(t, err, blobdir.ErrNoSpace)
		var short *blobdir.SpaceError
		require.ErrorAs(t, err, &short)
		require.Positive(t, short.Missing)
		require.Equal(t, gen, info(t, d).Generation)
		for i := range 100 {
			require.NoError(t, put(d, "a", random(50000+i)))
		}
		require.Equal(t, len(before), 1)
		requireClean(t, d)
	})
}

// Fragmented free space spills into its tree and comes back.
func TestFreeTree(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(1<<20, nil)
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		name := func(i int) string {
			return string(rune('a'+i%26)) + "/" + string(rune('a'+i/26%26)) + string(rune('a'+i/676))
		}
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			for i := range 4000 {
				if err := tx.Put(name(i), []byte{byte(i), byte(i >> 8)}, nil); err != nil {
					return err
				}
			}
			return nil
		}, nil))
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			for i := range 4000 {
				if i%2 == 0 {
					if err := tx.Delete(name(i)); err != nil {
						return err
					}
				}
			}
			return nil
		}, nil))
		trees := func() (n int) {
			for _, r := range regions(t, d) {
				if r.Kind == blobdir.RegionFreeTree {
					n++
				}
			}
			return n
		}
		require.Positive(t, trees())
		requireClean(t, d)
		dev.Settle()
		size := dev.Size()
		for i := range 1500 {
			require.NoError(t, put(d, name(i*2), random(2000)))
			dev.Settle()
		}
		requireClean(t, d)
		require.LessOrEqual(t, dev.Size(), size+(4<<20), "the holes are used again")
		for i := range 2000 {
			require.Equal(t, []byte{byte(2*i + 1), byte((2*i + 1) >> 8)}, get(t, d, name(2*i+1)))
		}
	})
}

// After a failed write or Sync nothing is written any more, whatever the
// medium says then.
func TestPoisoned(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		for _, ops := range []imagetest.OpKind{imagetest.OpWrite, imagetest.OpSync} {
			dev, want := populate(t, kind, rawStack)
			before := dev.Trace()
			fd := imagetest.NewFault(dev, imagetest.Fault{Mode: imagetest.Fail, Ops: ops})
			d := openStore(t, fd, kind)
			require.ErrorIs(t, put(d, "x", random(100)), blobdir.ErrPoisoned)
			writes := dev.Trace().Sub(before).Writes
			require.ErrorIs(t, put(d, "y", random(100)), blobdir.ErrPoisoned)
			require.ErrorIs(t, d.View(func(*blobdir.Tx) error { return nil }), blobdir.ErrPoisoned)
			require.ErrorIs(t, d.Settle(), blobdir.ErrPoisoned)
			require.NoError(t, d.Close())
			require.Equal(t, writes, dev.Trace().Sub(before).Writes)
			got, err := contentOf(openStore(t, dev.Reopen(), kind))
			require.NoError(t, err)
			require.True(t, maps.Equal(want, got))
		}
	})
}

// Settling obeys the rules of a commit: after a revert underneath nothing is
// written.
func TestSettleAfterRevert(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev, _ := populate(t, kind, rawStack)
		snap := dev.Snapshot()
		d := openStore(t, dev, kind)
		require.NoError(t, put(d, "x", []byte("y")))
		dev.Revert(snap)
		before := dev.Trace()
		require.ErrorIs(t, d.Settle(), blobdir.ErrReverted)
		require.Zero(t, dev.Trace().Sub(before).Writes)
	})
}

// One transaction may delete very many blobs.
func TestDeleteAll(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		n := 20000
		if testing.Short() {
			n = 2000
		}
		dev := imagetest.NewMemory(1 << 20)
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		name := func(i int) string { return fmt.Sprintf("vm-%d/eeprom", i) }
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			for i := range n {
				if err := tx.Put(name(i), []byte{1}, nil); err != nil {
					return err
				}
			}
			return nil
		}, nil))
		requireClean(t, d)
		// In two goes, so that what is freed has gaps.
		for odd := range 2 {
			require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
				for i := odd; i < n; i += 2 {
					if err := tx.Delete(name(i)); err != nil {
						return err
					}
				}
				return nil
			}, nil))
			requireClean(t, d)
		}
		require.Zero(t, info(t, d).Blobs)
		size := dev.Size()
		for i := range 20 {
			require.NoError(t, put(d, name(i), random(n*20)))
		}
		requireClean(t, d)
		require.Equal(t, size, dev.Size(), "what was freed bit by bit is whole again")
	})
}

// batches keeps what is asked for together, and counts what is asked for alone.
type batches struct {
	image.Device
	alone                int
	reads, writes, syncs [][]image.Request
}

func (b *batches) ReadAt(p []byte, off int64) (int, error) {
	b.alone++
	return b.Device.ReadAt(p, off)
}

func (b *batches) WriteAt(p []byte, off int64) (int, error) {
	b.alone++
	return b.Device.WriteAt(p, off)
}

func (b *batches) Sync() error {
	b.alone++
	return b.Device.Sync()
}

func (b *batches) ReadBatch(reads []image.Request) error {
	b.reads = append(b.reads, slices.Clone(reads))
	return image.BatcherOf(b.Device).ReadBatch(reads)
}

func (b *batches) WriteBatch(writes []image.Request) error {
	b.writes = append(b.writes, slices.Clone(writes))
	return image.BatcherOf(b.Device).WriteBatch(writes)
}

func (b *batches) SyncBatch(reads []image.Request) error {
	b.syncs = append(b.syncs, slices.Clone(reads))
	return image.BatcherOf(b.Device).SyncBatch(reads)
}

// A commit waits three times: for both slots, for all that it writes, the root
// last, and for the Sync with the slots and all that it wrote read anew. A large
// one waits for further writes and reads.
func TestThreeWaits(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		b := &batches{Device: imagetest.NewCrash(16<<20, nil)}
		d, err := blobdir.Create(b, createOptions(t, kind))
		require.NoError(t, err)
		for i, size := range []int{100, 6000, 6000, 200_000, 900_000, 3_000_000} {
			b.alone, b.reads, b.writes, b.syncs = 0, nil, nil, nil
			require.NoError(t, put(d, fmt.Sprint("blob", i), random(size)))
			require.Zero(t, b.alone)
			require.Len(t, b.syncs, 1)
			require.NotEmpty(t, b.reads)
			require.Equal(t, slotOffsets, offsets(b.reads[0]), "before")
			require.Equal(t, slotOffsets, offsets(b.syncs[0])[:2], "after")
			if size <= 200_000 {
				require.Len(t, b.reads, 1)
				require.Len(t, b.writes, 1)
			}
			wrote, read := map[int64]int{}, map[int64]int{}
			for k, batch := range b.writes {
				if k == len(b.writes)-1 {
					root := batch[len(batch)-1]
					require.Contains(t, slotOffsets, root.Off, "the root comes last")
					require.Len(t, root.P, 512)
					batch = batch[:len(batch)-1]
				}
				count(wrote, batch)
			}
			count(read, b.syncs[0][2:])
			for _, batch := range b.reads[1:] {
				count(read, batch)
			}
			require.Equal(t, wrote, read, "put %d", i)
		}
		require.NoError(t, d.Close())
	})
}

func offsets(batch []image.Request) (list []int64) {
	for _, r := range batch {
		list = append(list, r.Off)
	}
	return list
}

// count counts how often each block is asked for.
func count(blocks map[int64]int, batch []image.Request) {
	for _, r := range batch {
		for off := r.Off; off < r.Off+int64(len(r.P)); off += 4096 {
			blocks[off]++
		}
	}
}
