package blobdir_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
)

func stat(t testing.TB, d *blobdir.Dir, name string) (e blobdir.Entry) {
	require.NoError(t, d.View(func(tx *blobdir.Tx) (err error) {
		e, err = tx.Stat(name)
		return err
	}))
	return e
}

func tryGet(d *blobdir.Dir, name string) (p []byte, err error) {
	err = d.View(func(tx *blobdir.Tx) (err error) {
		p, err = tx.Get(name, 0)
		return err
	})
	return p, err
}

func peek(d *blobdir.Dir, name string, n int) (p []byte, err error) {
	p = make([]byte, n)
	err = d.View(func(tx *blobdir.Tx) error {
		_, err := tx.Peek(name, p, 0)
		return err
	})
	return p, err
}

// putLive makes a live extent with this content.
func putLive(d *blobdir.Dir, name string, data []byte) error {
	return d.Update(func(tx *blobdir.Tx) error {
		if err := tx.CreateLive(name, int64(len(data)), &blobdir.Meta{Type: "flash"}); err != nil {
			return err
		}
		return tx.Put(name, data, nil)
	}, nil)
}

// newStore makes a store with a live extent, and puts fragments around it.
func newStore(t testing.TB, kind string, dev image.Device) *blobdir.Dir {
	d, err := blobdir.Create(dev, createOptions(t, kind))
	require.NoError(t, err)
	require.NoError(t, put(d, "net0/nvm", random(9000)))
	return d
}

func TestLiveExtent(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(256<<10, nil)
		d := newStore(t, kind, dev)
		data := random(30000)
		require.NoError(t, putLive(d, "uefi/vars", data))
		e := stat(t, d, "uefi/vars")
		require.True(t, e.Live && !e.Attached)
		require.Zero(t, e.Offset%4096)
		require.EqualValues(t, 30000, e.Size)
		raw := make([]byte, 32768)
		require.NoError(t, image.ReadFull(dev, raw, e.Offset))
		require.Equal(t, append(bytes.Clone(data), make([]byte, 32768-30000)...), raw, "content lies there in one piece, in clear, and zeros behind it")
		got, err := tryGet(d, "uefi/vars")
		require.NoError(t, err)
		require.Equal(t, data, got)
		requireClean(t, d)

		// A change writes all of it elsewhere, once, however many there are.
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			for _, off := range []int64{0, 5000, 29999} {
				if _, err := tx.WriteAt("uefi/vars", []byte{data[off] + 1}, off); err != nil {
					return err
				}
				data[off]++
			}
			_, err := tx.WriteAt("uefi/vars", data[100:200], 100)
			return err
		}, nil))
		moved := stat(t, d, "uefi/vars")
		require.NotEqual(t, e.Offset, moved.Offset)
		again := make([]byte, 32768)
		require.NoError(t, image.ReadFull(dev, again, e.Offset))
		require.Equal(t, raw, again, "the old extent is as it was")
		part := make([]byte, 100)
		require.NoError(t, d.View(func(tx *blobdir.Tx) error {
			n, err := tx.ReadAt("uefi/vars", part, 29950)
			require.Equal(t, 50, n)
			require.ErrorIs(t, err, io.EOF)
			return nil
		}))
		require.Equal(t, data[29950:], part[:50])

		// The same bytes again are no change.
		gen := moved.Generation
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			_, err := tx.WriteAt("uefi/vars", data[7:5000], 7)
			return errors.Join(err, tx.Put("uefi/vars", data, nil), tx.SetLive("uefi/vars", true))
		}, nil))
		require.Equal(t, gen, stat(t, d, "uefi/vars").Generation)

		// Its size is fixed, except by Truncate.
		for _, change := range []func(tx *blobdir.Tx) error{
			func(tx *blobdir.Tx) error { return tx.Put("uefi/vars", data[:29999], nil) },
			func(tx *blobdir.Tx) error { return tx.Put("uefi/vars", append(bytes.Clone(data), 1), nil) },
			func(tx *blobdir.Tx) error { _, err := tx.WriteAt("uefi/vars", []byte{1, 2}, 29999); return err },
			func(tx *blobdir.Tx) error { return tx.Truncate("uefi/vars", 0) },
			func(tx *blobdir.Tx) error { return tx.CreateLive("x", 0, nil) },
			func(tx *blobdir.Tx) error { return tx.CreateLive("x", 1<<30+1, nil) },
			func(tx *blobdir.Tx) error { return errors.Join(tx.Create("x", nil), tx.SetLive("x", true)) },
		} {
			require.ErrorIs(t, d.Update(change, nil), blobdir.ErrInvalid)
		}
		for _, size := range []int64{40000, 20000, 20001} {
			require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.Truncate("uefi/vars", size) }, nil))
			want := make([]byte, size)
			copy(want, data)
			data = want
			got, err = tryGet(d, "uefi/vars")
			require.NoError(t, err)
			require.Equal(t, data, got)
		}
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			return errors.Join(tx.Rename("uefi/vars", "flash"), tx.SetMeta("flash", &blobdir.Meta{Type: "other", ChunkSize: 4096}))
		}, nil))
		requireClean(t, d)
		require.NoError(t, d.Close())

		d, err = blobdir.Open(dev.Reopen(), openOptions(t, kind))
		require.NoError(t, err)
		got, err = tryGet(d, "flash")
		require.NoError(t, err)
		require.Equal(t, data, got)
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.Delete("flash") }, nil))
		requireClean(t, d)
	})
}

// While it is attached, the extent is the emulator's.
func TestAttach(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(256<<10, nil)
		d := newStore(t, kind, dev)
		data := random(8192)
		require.NoError(t, putLive(d, "uefi/vars", data))
		require.NoError(t, putLive(d, "spi/0", random(5000)))
		require.ErrorIs(t, d.Attach("net0/nvm"), blobdir.ErrInvalid)
		require.ErrorIs(t, d.Attach("uefi/vars", "no"), blobdir.ErrNotFound)
		require.False(t, stat(t, d, "uefi/vars").Attached, "all or none")
		require.NoError(t, d.Attach())
		e := stat(t, d, "uefi/vars")
		require.True(t, e.Attached && stat(t, d, "spi/0").Attached)
		gen := e.Generation
		require.NoError(t, d.Attach(), "once more changes nothing")
		require.Equal(t, gen, stat(t, d, "uefi/vars").Generation)

		older, err := blobdir.Open(dev.Share(), &blobdir.Options{Previous: true, Key: openOptions(t, kind).Key})
		require.NoError(t, err)
		require.True(t, stat(t, older, "uefi/vars").Attached, "the generation before promises nothing either")

		flash := bytes.Clone(data)
		copy(flash[4000:], "written by the machine")
		_, err = dev.WriteAt(flash[4000:4022], e.Offset+4000)
		require.NoError(t, err)
		_, err = tryGet(d, "uefi/vars")
		require.ErrorIs(t, err, blobdir.ErrAttached)
		got, err := peek(d, "uefi/vars", 8192)
		require.NoError(t, err)
		require.Equal(t, flash, got)
		for _, change := range []func(tx *blobdir.Tx) error{
			func(tx *blobdir.Tx) error { return tx.Put("uefi/vars", data, nil) },
			func(tx *blobdir.Tx) error { return tx.Delete("uefi/vars") },
			func(tx *blobdir.Tx) error { return tx.Truncate("uefi/vars", 1) },
			func(tx *blobdir.Tx) error { return tx.SetLive("uefi/vars", false) },
			func(tx *blobdir.Tx) error { _, err := tx.WriteAt("uefi/vars", []byte("x"), 0); return err },
			func(tx *blobdir.Tx) error { return tx.Put("uefi/vars", data[1:], nil) },
		} {
			require.ErrorIs(t, d.Update(change, nil), blobdir.ErrAttached)
		}
		// A refusal doesn't spoil the transaction.
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
			require.ErrorIs(t, tx.Delete("uefi/vars"), blobdir.ErrAttached)
			require.ErrorIs(t, tx.Put("uefi/vars", data, nil), blobdir.ErrAttached)
			return errors.Join(tx.Put("net0/nvm", []byte("beside it"), nil), tx.Rename("uefi/vars", "uefi/vars2"), tx.Rename("uefi/vars2", "uefi/vars"))
		}, nil))
		rep := requireClean(t, d)
		require.Len(t, rep.Warnings, 2, "%v", rep.Warnings)
		require.NoError(t, d.Close())

		// A crash of the machine: the mark is there, and Detach recovers.
		dev = dev.Reopen()
		d, err = blobdir.Open(dev, openOptions(t, kind))
		require.NoError(t, err)
		require.True(t, stat(t, d, "uefi/vars").Attached)
		snap := dev.Snapshot() // of the machine as it runs
		require.NoError(t, d.Detach("uefi/vars"))
		got, err = tryGet(d, "uefi/vars")
		require.NoError(t, err)
		require.Equal(t, flash, got)
		require.True(t, stat(t, d, "spi/0").Attached)
		require.NoError(t, d.Detach())
		require.NoError(t, d.Detach())
		require.Empty(t, requireClean(t, d).Warnings)
		require.NoError(t, put(d, "uefi/vars", data))

		// A revert to the snapshot brings mark and bytes back.
		dev.Revert(snap)
		require.ErrorIs(t, d.Detach(), blobdir.ErrReverted)
		require.True(t, stat(t, d, "uefi/vars").Attached)
		require.NoError(t, d.Detach())
		got, err = tryGet(d, "uefi/vars")
		require.NoError(t, err)
		require.Equal(t, flash, got)
		requireClean(t, d)
	})
}

// What writes to an extent that isn't attached does damage, which shows, and
// which Accept takes for good.
func TestWrittenUnattached(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(256<<10, nil)
		d := newStore(t, kind, dev)
		data := random(8192)
		require.NoError(t, putLive(d, "uefi/vars", data))
		at := stat(t, d, "uefi/vars").Offset
		data[77] ^= 4
		_, err := dev.WriteAt(data[77:78], at+77)
		require.NoError(t, err)
		_, err = tryGet(d, "uefi/vars")
		require.ErrorIs(t, err, blobdir.ErrCorrupt)
		require.ErrorContains(t, err, `blob "uefi/vars"`)
		require.ErrorIs(t, d.View(func(tx *blobdir.Tx) error {
			_, err := tx.ReadAt("uefi/vars", make([]byte, 10), 5000)
			return err
		}), blobdir.ErrCorrupt, "a part that is right, of an extent that isn't")
		require.ErrorIs(t, d.Attach(), blobdir.ErrCorrupt)
		require.ErrorIs(t, d.Update(func(tx *blobdir.Tx) error { _, err := tx.WriteAt("uefi/vars", []byte("x"), 0); return err }, nil), blobdir.ErrCorrupt)
		require.NoError(t, d.Detach(), "it isn't attached")
		rep, err := d.Check(context.Background(), nil)
		require.NoError(t, err)
		require.Len(t, rep.Errors, 1)
		require.Equal(t, "R23", rep.Errors[0].Code)
		require.Contains(t, rep.Errors[0].Where, "uefi/vars")
		require.NoError(t, d.Accept())
		got, err := tryGet(d, "uefi/vars")
		require.NoError(t, err)
		require.Equal(t, data, got)
		requireClean(t, d)
		// Put heals, too.
		_, err = dev.WriteAt([]byte{^data[0]}, at)
		require.NoError(t, err)
		require.NoError(t, put(d, "uefi/vars", data))
		requireClean(t, d)
	})
}

// Blobs become live extents and blobs in chunks again.
func TestSetLive(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(256<<10, nil)
		d := newStore(t, kind, dev)
		for _, n := range []int{1, 4096, 9000, 300000} {
			data := random(n)
			require.NoError(t, put(d, "b", data))
			require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
				if _, err := tx.WriteAt("b", []byte{1}, 0); err != nil { // a chunk that waits for the commit
					return err
				}
				return tx.SetLive("b", true)
			}, nil))
			data[0] = 1
			got, err := tryGet(d, "b")
			require.NoError(t, err)
			require.Equal(t, data, got)
			e := stat(t, d, "b")
			require.True(t, e.Live)
			raw := make([]byte, n)
			require.NoError(t, image.ReadFull(dev, raw, e.Offset))
			require.Equal(t, data, raw)
			requireClean(t, d)
			require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.SetLive("b", false) }, nil))
			require.False(t, stat(t, d, "b").Live)
			require.Zero(t, stat(t, d, "b").Offset)
			got, err = tryGet(d, "b")
			require.NoError(t, err)
			require.Equal(t, data, got)
			requireClean(t, d)
			require.NoError(t, d.Update(func(tx *blobdir.Tx) error { // there and back
				return errors.Join(tx.SetLive("b", true), tx.SetLive("b", false), tx.Delete("b"))
			}, nil))
			requireClean(t, d)
		}
	})
}

// Space in pieces of many ages, some in the free node and some in its tree,
// makes one extent if the pieces are neighbours.
func TestLiveSpaceIsContiguous(t *testing.T) {
	dev := imagetest.NewCrash(4<<20, &imagetest.CrashOptions{Fixed: true})
	d, err := blobdir.Create(dev, nil)
	require.NoError(t, err)
	name := func(i int) string { return fmt.Sprintf("b/%d", i) }
	n := 0
	for ; ; n++ {
		if err := put(d, name(n), bytes.Repeat([]byte{byte(n)}, 4096)); err != nil {
			require.ErrorIs(t, err, blobdir.ErrNoSpace)
			break
		}
	}
	require.Greater(t, n, 700)
	step := 7 // pieces of many ages, in an order of their own
	for i := range n {
		require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.Delete(name(i * step % n)) }, nil))
	}
	for range 3 { // until the quarantine is over
		require.NoError(t, put(d, "x", random(10)))
	}
	info, err := d.Info()
	require.NoError(t, err)
	require.NoError(t, putLive(d, "flash", random(3<<20)), "of %d bytes free", info.Free)
	requireClean(t, d)
}

// A live extent that the image has no room for is refused, and nothing is
// lost.
func TestLiveWithoutSpace(t *testing.T) {
	dev := imagetest.NewCrash(1<<20, &imagetest.CrashOptions{Fixed: true})
	d := newStore(t, "plain", dev)
	space := (*blobdir.SpaceError)(nil)
	require.ErrorAs(t, putLive(d, "flash", random(1<<20)), &space)
	require.Positive(t, space.Missing)
	require.NoError(t, putLive(d, "flash", random(600<<10)))
	require.ErrorIs(t, put(d, "flash", random(600<<10)), blobdir.ErrNoSpace, "a change needs room beside the old")
	_, err := tryGet(d, "flash")
	require.NoError(t, err)
	requireClean(t, d)
}

// liveStep is one transaction of a machine's life.
type liveStep struct {
	name string
	do   func(d *blobdir.Dir, dev image.Device) error
}

// TestLiveCrash cuts the power at every write of a live extent's life: made,
// changed, attached, written by the emulator, detached, removed. Each other
// blob is whole at any instant; the extent is one of its contents while it is
// detached, and of old and new bytes, as an in-place write leaves them, while
// it is attached and not flushed.
func TestLiveCrash(t *testing.T) {
	for _, run := range []struct {
		kind    string
		stack   stack
		samples int
	}{{"plain", rawStack, 20}, {"sealed", rawStack, 20}, {"plain", qcow2Stack(4096), 3}} {
		kind := run.kind
		t.Run(run.stack.name+"/"+kind, func(t *testing.T) {
			base, start := populate(t, kind, run.stack)
			one, two, three, four := []byte(blobOf(1, 9000)), []byte(blobOf(2, 9000)), []byte(blobOf(3, 9000)), []byte(blobOf(4, 9000))
			emulator := func(p []byte) func(*blobdir.Dir, image.Device) error {
				return func(d *blobdir.Dir, dev image.Device) error {
					_, err := dev.WriteAt(p, stat(t, d, "flash").Offset)
					return err
				}
			}
			steps := []struct {
				liveStep
				legal [][]byte // contents of the extent; none while there is no extent, or it is attached
			}{
				{liveStep{"create", func(d *blobdir.Dir, _ image.Device) error { return putLive(d, "flash", one) }}, [][]byte{one}},
				{liveStep{"change", func(d *blobdir.Dir, _ image.Device) error { return put(d, "flash", two) }}, [][]byte{two}},
				{liveStep{"attach", func(d *blobdir.Dir, _ image.Device) error { return d.Attach() }}, nil},
				{liveStep{"emulator", emulator(three)}, nil},
				{liveStep{"beside", func(d *blobdir.Dir, _ image.Device) error { return put(d, "beside", random(5000)) }}, nil},
				{liveStep{"emulator, not synced", emulator(four)}, nil},
				{liveStep{"detach", func(d *blobdir.Dir, _ image.Device) error { return d.Detach() }}, [][]byte{four}},
				{liveStep{"delete", func(d *blobdir.Dir, _ image.Device) error {
					return d.Update(func(tx *blobdir.Tx) error { return tx.Delete("flash") }, nil)
				}}, nil},
			}
			dev := base.Fork()
			top, err := run.stack.open(dev)
			require.NoError(t, err)
			d, err := blobdir.Open(top, openOptions(t, kind))
			require.NoError(t, err)
			states, at := 0, 0
			var before [][]byte
			for i, s := range steps {
				require.NoError(t, s.do(d, top), s.name)
				end := dev.Len()
				for ; at <= end; at++ {
					legal := slices.Concat(before, s.legal)
					if at == end {
						legal = s.legal
					}
					for st := range dev.CrashStates(at, &imagetest.StateConfig{Exhaustive: 8, Samples: run.samples * scale(), Seed: uint64(i)}) {
						states++
						liveState(t, run.stack, kind, st, start, legal, at == end)
					}
				}
				before = s.legal
				at = end
			}
			t.Logf("%d crash states", states)
		})
	}
}

func liveState(t *testing.T, on stack, kind string, st *imagetest.State, start content, legal [][]byte, done bool) {
	top, err := on.open(st.Open())
	require.NoError(t, err, "%v", st)
	d, err := blobdir.Open(top, openOptions(t, kind))
	require.NoError(t, err, "%v", st)
	for name, want := range start {
		got, err := tryGet(d, name)
		require.NoError(t, err, "%v", st)
		require.Equal(t, want, string(got), "%v", st)
	}
	got, err := tryGet(d, "flash")
	switch {
	case errors.Is(err, blobdir.ErrNotFound):
	case errors.Is(err, blobdir.ErrAttached):
		require.NoError(t, d.Detach())
		_, err := tryGet(d, "flash")
		require.NoError(t, err)
	default:
		require.NoError(t, err, "%v", st)
		require.True(t, slices.ContainsFunc(legal, func(p []byte) bool { return bytes.Equal(p, got) }), "%v", st)
	}
	if done && len(legal) > 0 {
		require.NoError(t, err, "what was acknowledged is there: %v", st)
	}
	rep, err := d.Check(context.Background(), nil)
	require.NoError(t, err)
	require.Empty(t, slices.DeleteFunc(rep.Errors, rootProblem), "%v", st)
	require.Empty(t, rep.Leaks, "%v", st)
}

// TestLiveEveryOperationFails breaks each operation of a live extent's life
// once, and for ever: the error surfaces, and what is found afterwards is one
// of two states that follow each other.
func TestLiveEveryOperationFails(t *testing.T) {
	base, _ := populate(t, "sealed", rawStack)
	one, two := []byte(blobOf(1, 9000)), []byte(blobOf(2, 9000))
	steps := []func(d *blobdir.Dir) error{
		func(d *blobdir.Dir) error { return putLive(d, "flash", one) },
		func(d *blobdir.Dir) error { return put(d, "flash", two) },
		func(d *blobdir.Dir) error { return d.Attach() },
		func(d *blobdir.Dir) error { return d.Detach() },
		func(d *blobdir.Dir) error { return d.MakeRoom(1 << 20) },
		func(d *blobdir.Dir) error {
			return d.Update(func(tx *blobdir.Tx) error { return tx.SetLive("flash", false) }, nil)
		},
	}
	shown := func(d *blobdir.Dir) string {
		p, err := tryGet(d, "flash")
		switch {
		case errors.Is(err, blobdir.ErrNotFound), errors.Is(err, blobdir.ErrAttached):
			return err.Error()
		}
		require.NoError(t, err)
		return fmt.Sprintf("%x, live %v", p[:8], stat(t, d, "flash").Live)
	}
	// What is shown after each step.
	dev := base.Fork()
	d, err := blobdir.Open(dev, openOptions(t, "sealed"))
	require.NoError(t, err)
	after := []string{shown(d)}
	for _, s := range steps {
		require.NoError(t, s(d))
		after = append(after, shown(d))
	}
	for _, f := range []imagetest.Fault{{Mode: imagetest.Fail}, {Mode: imagetest.Fail, Forever: true}, {Mode: imagetest.FailAfter}, {Mode: imagetest.Short}} {
		n := imagetest.EachFault(f, func(f imagetest.Fault) int {
			dev := base.Fork()
			fd := imagetest.NewFault(dev, f)
			done := 0
			d, err := blobdir.Open(fd, openOptions(t, "sealed"))
			for ; err == nil && done < len(steps); done++ {
				if err = steps[done](d); err != nil {
					break
				}
			}
			if done < len(steps) {
				require.Positive(t, fd.Hits(), "step %d without a fault: %v", done, err)
			}
			d, err = blobdir.Open(dev.Reopen(), openOptions(t, "sealed"))
			require.NoError(t, err, "%+v", f)
			require.Contains(t, after[done:min(done+2, len(after))], shown(d), "%+v, step %d", f, done)
			return fd.Hits()
		})
		t.Logf("%+v: %d operations", f, n)
		require.Greater(t, n, 20)
	}
}
