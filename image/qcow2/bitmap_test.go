package qcow2_test

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// dirtyOf returns the granules of a bitmap as this driver has them.
func dirtyOf(t testing.TB, im *qcow2.Image, name string, granularity int64) []bool {
	out := make([]bool, (im.Size()+granularity-1)/granularity)
	for off := int64(0); off < im.Size(); {
		set, n, err := im.BitmapStatus(name, off, im.Size()-off)
		require.NoError(t, err)
		for g := off / granularity; set && g <= (off+n-1)/granularity; g++ {
			out[g] = true
		}
		off += n
	}
	return out
}

// plain names an image to QEMU's programs.
func plain(path string) []string { return []string{"-f", "qcow2", path} }

// qemuDirty returns the granules of a bitmap as qemu-nbd exports them.
func qemuDirty(t testing.TB, target []string, name string, granularity, size int64) []bool {
	var list []struct {
		Offset, Length int64
		Type           int
	}
	out := tool(t, "nbdinfo", slices.Concat([]string{"--json", "--map=qemu:dirty-bitmap:" + name, "--", "[", "qemu-nbd", "-r", "-B", name}, target, []string{"]"})...)
	require.NoError(t, json.Unmarshal([]byte(out), &list), out)
	dirty := make([]bool, (size+granularity-1)/granularity)
	for _, x := range list {
		for g := x.Offset / granularity; x.Type != 0 && x.Length > 0 && g <= (x.Offset+x.Length-1)/granularity; g++ {
			dirty[g] = true
		}
	}
	return dirty
}

func mark(dirty []bool, granularity, off, n int64) {
	for g := off / granularity; n > 0 && g <= (off+n-1)/granularity; g++ {
		dirty[g] = true
	}
}

// TestBitmaps records writes, zeros and discards in bitmaps of several
// granularities, in turns with QEMU.
func TestBitmaps(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 11))
	for _, cs := range []int{512, 4096, 65536} {
		t.Run(fmt.Sprint(cs), func(t *testing.T) {
			path := filepath.Join(tempDir(t), "img")
			size := int64(9<<20 + 512)
			qemuCreate(t, path, fmt.Sprint("cluster_size=", cs), size)
			want := map[string][]bool{}
			gran := map[string]int64{"fine": 512, "mid": 65536, "coarse": 4 << 20}
			d := &keep{load(t, path)}
			im := open(t, d)
			for name, g := range gran {
				require.NoError(t, im.AddBitmap(name, &qcow2.BitmapOptions{Granularity: g}))
				want[name] = make([]bool, (size+g-1)/g)
			}
			require.NoError(t, im.AddBitmap("off", &qcow2.BitmapOptions{Disabled: true}))
			require.ErrorIs(t, im.AddBitmap("off", nil), image.ErrExist)
			require.NoError(t, im.Close())
			dump(t, d, path)
			for round := range 4 {
				if round%2 == 0 {
					var cmds []string
					for range 4 {
						off, n := rng.Int64N(size/512-200)*512, (1+rng.Int64N(200))*512
						for name, g := range gran {
							mark(want[name], g, off, n)
						}
						cmds = append(cmds, fmt.Sprintf([]string{"write %d %d", "write -z %d %d"}[rng.IntN(2)], off, n))
					}
					qemuIO(t, path, cmds...)
				} else {
					d = &keep{load(t, path)}
					im = open(t, d)
					for k := range 6 {
						off, n := rng.Int64N(size-100000), 1+rng.Int64N(100000)
						for name, g := range gran {
							mark(want[name], g, off, n)
						}
						var err error
						switch k % 3 {
						case 0:
							_, err = im.WriteAt(make([]byte, n), off)
						case 1:
							err = im.WriteZeroes(off, n)
						case 2:
							err = im.Discard(off, n)
						}
						require.NoError(t, err)
					}
					require.NoError(t, im.Close())
					dump(t, d, path)
				}
				qemuCheck(t, path, false)
				im := open(t, load(t, path))
				noErrors(t, im, false)
				for name, g := range gran {
					require.Equal(t, want[name], dirtyOf(t, im, name, g), name)
					require.Equal(t, want[name], qemuDirty(t, plain(path), name, g, size), "%s, as qemu-nbd has it", name)
				}
				require.NotContains(t, dirtyOf(t, im, "off", 512), true)
			}
		})
	}
}

// bitmapInfo is what qemu-img info says of bitmaps.
func bitmapInfo(t testing.TB, path string) any {
	data := qemuInfo(t, path)["format-specific"].(map[string]any)["data"].(map[string]any)
	return data["bitmaps"]
}

// TestBitmapVerbs does what qemu-img bitmap does, to two copies of an image.
func TestBitmapVerbs(t *testing.T) {
	dir := tempDir(t)
	theirs, ours := filepath.Join(dir, "theirs"), filepath.Join(dir, "ours")
	qemuCreate(t, theirs, "cluster_size=65536", 8<<20)
	b, err := os.ReadFile(theirs)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(ours, b, 0o600))
	type step struct {
		args []string
		op   func(im *qcow2.Image) error
	}
	write := func(off int64) step {
		return step{[]string{"", fmt.Sprintf("write %d 100k", off)}, func(im *qcow2.Image) error {
			_, err := im.WriteAt(make([]byte, 100<<10), off)
			return err
		}}
	}
	for _, s := range []step{
		{[]string{"--add", "a"}, func(im *qcow2.Image) error { return im.AddBitmap("a", nil) }},
		{[]string{"--add", "--disable", "-g", "1M", "b"}, func(im *qcow2.Image) error {
			return im.AddBitmap("b", &qcow2.BitmapOptions{Granularity: 1 << 20, Disabled: true})
		}},
		write(1 << 20),
		{[]string{"--enable", "b"}, func(im *qcow2.Image) error { return im.EnableBitmap("b", true) }},
		write(5 << 20),
		{[]string{"--disable", "a"}, func(im *qcow2.Image) error { return im.EnableBitmap("a", false) }},
		write(3 << 20),
		{[]string{"--add", "c"}, func(im *qcow2.Image) error { return im.AddBitmap("c", nil) }},
		{[]string{"--merge", "b", "c"}, func(im *qcow2.Image) error { return im.MergeBitmap("c", im, "b") }},
		{[]string{"--clear", "b"}, func(im *qcow2.Image) error { return im.ClearBitmap("b") }},
		{[]string{"resize"}, func(im *qcow2.Image) error { return im.Resize(20 << 20) }},
		write(15 << 20),
		{[]string{"--remove", "a"}, func(im *qcow2.Image) error { return im.RemoveBitmap("a") }},
	} {
		switch s.args[0] {
		case "":
			qemuIO(t, theirs, s.args[1])
		case "resize":
			tool(t, "qemu-img", "resize", "-q", "-f", "qcow2", theirs, "20M")
		default:
			n := len(s.args) - 1
			tool(t, "qemu-img", slices.Concat([]string{"bitmap", "-f", "qcow2"}, s.args[:n], []string{theirs}, s.args[n:])...)
		}
		d := &keep{load(t, ours)}
		im := open(t, d)
		require.NoError(t, s.op(im), s.args)
		require.NoError(t, im.Close())
		dump(t, d, ours)
		qemuCheck(t, ours, false)
		require.ElementsMatch(t, bitmapInfo(t, theirs), bitmapInfo(t, ours), s.args)
		im = open(t, load(t, ours))
		list, err := im.Bitmaps()
		require.NoError(t, err)
		for _, b := range list {
			got := qemuDirty(t, plain(ours), b.Name, b.Granularity, im.Size())
			require.Equal(t, qemuDirty(t, plain(theirs), b.Name, b.Granularity, im.Size()), got, "%s after %q", b.Name, s.args)
			require.Equal(t, got, dirtyOf(t, im, b.Name, b.Granularity))
		}
	}
	d := &keep{load(t, ours)}
	im := open(t, d)
	for _, name := range []string{"b", "c"} {
		require.NoError(t, im.RemoveBitmap(name))
	}
	require.ErrorIs(t, im.RemoveBitmap("b"), image.ErrNotFound)
	require.NoError(t, im.Close())
	dump(t, d, ours)
	qemuCheck(t, ours, false)
	require.Nil(t, bitmapInfo(t, ours))
}

// TestBitmapCrash cuts the power at every write of a history with bitmaps. Each
// is in use then, or true: what was written since it was clean is dirty in it.
func TestBitmapCrash(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 12))
	states, inUse := 0, 0
	for _, cs := range []int{4096, 65536} {
		file := imagetest.NewCrash(0, nil)
		im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: 4 << 20, ClusterSize: cs})
		require.NoError(t, err)
		require.NoError(t, im.AddBitmap("b", &qcow2.BitmapOptions{Granularity: 4096}))
		var durable, pending []bool // what must be dirty
		pending = make([]bool, 1024)
		look := func(from int) {
			for at := from; at <= file.Len(); at++ {
				for s := range file.CrashStates(at, &imagetest.StateConfig{Exhaustive: 3, Samples: 3, Seed: rng.Uint64()}) {
					states++
					ro, err := qcow2.Open(s.Open(), &qcow2.OpenOptions{ReadOnly: true})
					require.NoError(t, err, "%s", s)
					noErrors(t, ro, true)
					list, err := ro.Bitmaps()
					require.NoError(t, err, "%s", s)
					require.Len(t, list, 1, "%s", s)
					if slices.Contains(list[0].Flags, "in-use") {
						inUse++
						continue
					}
					got := dirtyOf(t, ro, "b", 4096)
					data := contents(t, ro)
					for g := range got {
						if durable[g] {
							require.True(t, got[g], "granule %d, %s", g, s)
						}
						// What isn't dirty doesn't show a write.
						require.True(t, got[g] || data[g*4096] == 0, "granule %d was written, %s", g, s)
					}
				}
			}
		}
		for range 4 {
			durable = slices.Clone(pending)
			file.Settle()
			for range 3 {
				off := rng.Int64N(1000) * 4096
				_, err := im.WriteAt([]byte{7}, off)
				require.NoError(t, err)
				pending[off/4096] = true
				if rng.IntN(2) == 0 {
					require.NoError(t, im.Sync())
				}
			}
			require.NoError(t, im.Close())
			look(0)
			file = file.Reopen()
			require.NoError(t, file.Sync())
			im, err = qcow2.Open(file, nil)
			require.NoError(t, err)
		}
		require.NoError(t, im.Close())
	}
	t.Logf("%d states, in %d of them the bitmap is in use", states, inUse)
	require.Positive(t, inUse)
	require.Greater(t, states, 2*inUse/2)
}

// TestBitmapInUse doesn't use what wasn't saved, and removes it.
func TestBitmapInUse(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 1 << 20})
	require.NoError(t, im.AddBitmap("b", nil))
	_, err := im.WriteAt([]byte("x"), 0)
	require.NoError(t, err)
	require.NoError(t, im.Sync())
	crashed := &keep{memory(t, bytesOf(t, d))}
	path := filepath.Join(tempDir(t), "img")
	dump(t, crashed, path)
	flags := bitmapInfo(t, path).([]any)[0].(map[string]any)["flags"]
	require.ElementsMatch(t, []any{"in-use", "auto"}, flags)

	im = open(t, crashed)
	_, _, err = im.BitmapStatus("b", 0, 1)
	require.ErrorIs(t, err, image.ErrCorrupt)
	require.ErrorIs(t, im.ClearBitmap("b"), image.ErrCorrupt)
	require.ErrorIs(t, im.MergeBitmap("b", im, "b"), image.ErrCorrupt)
	_, err = im.WriteAt([]byte("y"), 0)
	require.NoError(t, err, "the disk can be used")
	require.NoError(t, im.RemoveBitmap("b"))
	require.NoError(t, im.Close())
	checkDevice(t, crashed, nil)
}

// TestBitmapSnapshots: a revert makes all dirty, and resizes.
func TestBitmapSnapshots(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: 4096})
	require.NoError(t, im.Snapshots().Create("s"))
	require.NoError(t, im.AddBitmap("on", &qcow2.BitmapOptions{Granularity: 65536}))
	require.NoError(t, im.AddBitmap("off", &qcow2.BitmapOptions{Granularity: 65536, Disabled: true}))
	require.NoError(t, im.Resize(3<<20))
	_, err := im.WriteAt([]byte("x"), 2<<20)
	require.NoError(t, err)
	require.NoError(t, im.Snapshots().Revert("s"))
	require.NotContains(t, dirtyOf(t, im, "on", 65536), false)
	require.NotContains(t, dirtyOf(t, im, "off", 65536), true)
	noErrors(t, im, false)
	require.NoError(t, im.Close())
	checkDevice(t, d, make([]byte, 1<<20))
}

// TestHeaderCrash cuts the power while header extensions are rewritten that
// reach beyond the first sector: all of them are there, old or new.
func TestHeaderCrash(t *testing.T) {
	states, aside := 0, 0
	for _, cs := range []int{4096, 65536} {
		file := imagetest.NewCrash(0, nil)
		mark := qcow2.Extension{Type: 0x12345678, Data: make([]byte, 700)}
		fill(mark.Data, 1, 2, 3, 4, 5)
		im, err := qcow2.Create(file, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cs,
			Extensions: []qcow2.Extension{mark}, BackingFile: "below", BackingFormat: "raw", Backing: imagetest.NewMemory(1 << 20)})
		require.NoError(t, err)
		require.NoError(t, im.Close())
		for _, op := range []func(im *qcow2.Image) error{
			func(im *qcow2.Image) error { return im.AddBitmap("a", nil) },
			func(im *qcow2.Image) error { return im.AddBitmap("b", nil) },
			func(im *qcow2.Image) error { return im.RemoveBitmap("a") },
			func(im *qcow2.Image) error { return im.RemoveBitmap("b") },
		} {
			file = file.Reopen()
			require.NoError(t, file.Sync())
			file.Settle()
			im, err := qcow2.Open(file, &qcow2.OpenOptions{Backing: imagetest.NewMemory(1 << 20)})
			require.NoError(t, err)
			before, err := im.Bitmaps()
			require.NoError(t, err)
			require.NoError(t, op(im))
			after, err := im.Bitmaps()
			require.NoError(t, err)
			require.NoError(t, im.Close())
			for at := range file.Len() + 1 {
				for s := range file.CrashStates(at, &imagetest.StateConfig{Exhaustive: 6, Samples: 6, Seed: uint64(at)}) {
					states++
					d := s.Open()
					im, err := qcow2.Open(d, &qcow2.OpenOptions{NoBacking: true, ReadOnly: true})
					require.NoError(t, err, "%s", s)
					noErrors(t, im, true)
					list, err := im.Bitmaps()
					require.NoError(t, err, "%s", s)
					if len(list) != len(before) || len(list) > 0 && list[0].Name != before[0].Name {
						require.Equal(t, after, list, "%s", s)
					}
					info, err := im.Info()
					require.NoError(t, err)
					require.Equal(t, "below", info.BackingFile, "%s", s)
					require.Equal(t, "raw", info.BackingFormat, "%s", s)
					i := slices.IndexFunc(info.Extensions, func(x qcow2.Extension) bool { return x.Type == mark.Type })
					require.GreaterOrEqual(t, i, 0, "%s", s)
					require.Equal(t, mark.Data, info.Extensions[i].Data, "%s", s)
					var b [4]byte
					_, err = d.ReadAt(b[:], 100)
					require.NoError(t, err)
					if b[2] > 0 || b[3] > 112 {
						aside++
						// The next rewrite puts it right.
						d2 := s.Open()
						im, err := qcow2.Open(d2, &qcow2.OpenOptions{NoBacking: true})
						require.NoError(t, err)
						require.NoError(t, im.AddBitmap("z", nil))
						require.NoError(t, im.Close())
						d2 = d2.Reopen()
						_, err = d2.ReadAt(b[:], 100)
						require.NoError(t, err)
						require.Equal(t, [4]byte{0, 0, 0, 112}, b)
					}
				}
			}
		}
	}
	t.Logf("%d states, in %d of them the extensions are aside", states, aside)
	require.Positive(t, aside)
}

// TestBitmapConcurrent records many writers at once, with lazy refcounts, while
// bitmaps are asked and changed.
func TestBitmapConcurrent(t *testing.T) {
	im, d := create(t, &qcow2.CreateOptions{Size: 8 << 20, ClusterSize: 4096})
	require.NoError(t, im.Amend(t.Context(), &qcow2.AmendOptions{LazyRefcounts: yes()}))
	require.NoError(t, im.AddBitmap("b", &qcow2.BitmapOptions{Granularity: 4096}))
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for k := range 100 {
				off := int64((k*4+w)*5) * 4096
				if _, err := im.WriteAt([]byte{byte(w + 1)}, off); err != nil {
					t.Error(err)
				}
				if k%20 == w {
					if err := im.Sync(); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	for k := range 10 {
		_, _, err := im.BitmapStatus("b", 0, im.Size())
		require.NoError(t, err)
		require.NoError(t, im.AddBitmap(fmt.Sprint(k), nil))
	}
	wg.Wait()
	data, dirty := contents(t, im), dirtyOf(t, im, "b", 4096)
	for g, set := range dirty {
		require.Equal(t, data[g*4096] != 0, set, "granule %d", g)
	}
	noErrors(t, im, false)
	require.NoError(t, im.Close())
	checkDevice(t, d, data)
}
