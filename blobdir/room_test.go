package blobdir_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	mrand "math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image/imagetest"
)

// fragmented fills an image that can't grow, and frees a part of it in pieces
// that don't touch.
func fragmented(t *testing.T, kind string, rng *mrand.Rand) (*imagetest.CrashDevice, *blobdir.Dir, content) {
	dev := imagetest.NewCrash(2<<20, &imagetest.CrashOptions{Fixed: true})
	d, err := blobdir.Create(dev, createOptions(t, kind))
	require.NoError(t, err)
	c := content{"mapped": blobOf(1, 60000), "live": blobOf(2, 9000)}
	require.NoError(t, d.Update(func(tx *blobdir.Tx) error {
		return tx.Put("mapped", []byte(c["mapped"]), &blobdir.Meta{ChunkSize: 4096})
	}, nil))
	for i := 0; ; i++ {
		name := fmt.Sprintf("b/%03d", i)
		data := blobOf(byte(i), 1+rng.IntN(12000))
		if err := put(d, name, []byte(data)); err != nil {
			require.ErrorIs(t, err, blobdir.ErrNoSpace)
			break
		}
		c[name] = data
		if i == 40 {
			require.NoError(t, putLive(d, "live", []byte(c["live"])))
		}
	}
	for i, name := range slices.Sorted(maps.Keys(c)) {
		if name[0] == 'b' && i%2 == 0 {
			require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.Delete(name) }, nil))
			delete(c, name)
		}
	}
	for range 3 {
		require.NoError(t, put(d, "last", []byte(blobOf(byte(rng.IntN(256)), 10))))
	}
	require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.Delete("last") }, nil))
	return dev, d, c
}

// What is free in many pieces becomes room for a live extent, and every blob
// stays as it is.
func TestMakeRoom(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		rng := mrand.New(mrand.NewPCG(seedFor(t), 5))
		dev, d, c := fragmented(t, kind, rng)
		const size = 400 << 10
		require.ErrorIs(t, putLive(d, "flash", random(size)), blobdir.ErrNoSpace)
		before := map[string]blobdir.Entry{}
		for name := range c {
			before[name] = stat(t, d, name)
		}
		require.NoError(t, d.MakeRoom(size))
		got, err := contentOf(d)
		require.NoError(t, err)
		require.True(t, maps.Equal(c, got))
		for name, e := range before {
			now := stat(t, d, name)
			require.Equal(t, []any{e.ID, e.Size, e.Type, e.Created, e.Modified, e.Live, e.ChunkSize},
				[]any{now.ID, now.Size, now.Type, now.Created, now.Modified, now.Live, now.ChunkSize})
		}
		requireClean(t, d)
		gen, err := d.Info()
		require.NoError(t, err)
		require.NoError(t, d.MakeRoom(size), "there is room")
		again, err := d.Info()
		require.NoError(t, err)
		require.Equal(t, gen.Generation, again.Generation)
		flash := blobOf(9, size)
		require.NoError(t, putLive(d, "flash", []byte(flash)))
		requireClean(t, d)
		require.ErrorIs(t, d.MakeRoom(2<<20), blobdir.ErrNoSpace)
		require.ErrorIs(t, d.MakeRoom(0), blobdir.ErrInvalid)
		require.NoError(t, d.Close())
		d, err = blobdir.Open(dev.Reopen(), openOptions(t, kind))
		require.NoError(t, err)
		got, err = contentOf(d)
		require.NoError(t, err)
		require.True(t, maps.Equal(c.with(func(c content) { c["flash"] = flash }), got))
	})
}

// An attached extent stays where it is, also where it is all that is in the
// way.
func TestMakeRoomAroundAttached(t *testing.T) {
	dev := imagetest.NewCrash(2<<20, &imagetest.CrashOptions{Fixed: true})
	d, err := blobdir.Create(dev, nil)
	require.NoError(t, err)
	require.NoError(t, put(d, "before", random(300<<10)))
	require.NoError(t, putLive(d, "live", random(4096)))
	require.NoError(t, put(d, "behind", random(300<<10)))
	for i := 0; ; i++ {
		require.NoError(t, put(d, fmt.Sprint("full/", i), random(8192)))
		if info, err := d.Info(); err != nil || info.Free < 150<<10 {
			require.NoError(t, err)
			break
		}
	}
	require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return errors.Join(tx.Delete("before"), tx.Delete("behind")) }, nil))
	for range 3 {
		require.NoError(t, put(d, "x", random(10)))
	}
	at := stat(t, d, "live").Offset
	require.NoError(t, d.Attach("live"))
	if err := d.MakeRoom(500 << 10); err != nil {
		require.ErrorIs(t, err, blobdir.ErrNoSpace)
	}
	require.Equal(t, at, stat(t, d, "live").Offset)
	requireClean(t, d)
	require.NoError(t, d.Detach("live"))
	require.NoError(t, d.MakeRoom(540<<10))
	require.NotEqual(t, at, stat(t, d, "live").Offset)
	require.NoError(t, putLive(d, "flash", random(540<<10)))
	requireClean(t, d)
}

// The power is cut while room is made: every blob is there, and no space is
// lost.
func TestMakeRoomCrash(t *testing.T) {
	for _, kind := range []string{"plain", "sealed"} {
		t.Run(kind, func(t *testing.T) {
			share := scale() // of 24 states one by default
			if testing.Short() {
				if share = 0; kind == "plain" {
					return
				}
			}
			rng := mrand.New(mrand.NewPCG(seedFor(t), 7))
			dev, d, c := fragmented(t, kind, rng)
			require.NoError(t, d.Close())
			dev = dev.Reopen()
			dev.Settle()
			d, err := blobdir.Open(dev, openOptions(t, kind))
			require.NoError(t, err)
			start := dev.Len()
			require.NoError(t, d.MakeRoom(400<<10))
			states := 0
			for at := start; at <= dev.Len(); at++ {
				for st := range dev.CrashStates(at, &imagetest.StateConfig{Exhaustive: -1, Samples: 2, Seed: rng.Uint64()}) {
					if rng.IntN(24) >= share && states > at-start {
						continue
					}
					states++
					d, err := blobdir.Open(st.Open(), openOptions(t, kind))
					require.NoError(t, err, "%v", st)
					got, err := contentOf(d)
					require.NoError(t, err, "%v", st)
					require.True(t, maps.Equal(c, got), "%v", st)
					rep, err := d.Check(context.Background(), nil)
					require.NoError(t, err)
					require.Empty(t, slices.DeleteFunc(rep.Errors, rootProblem), "%v", st)
					require.Empty(t, rep.Leaks, "%v", st)
				}
			}
			t.Logf("%d operations, %d crash states", dev.Len()-start, states)
		})
	}
}
