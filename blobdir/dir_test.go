package blobdir_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	mrand "math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
)

var rawKey = bytes.Repeat([]byte{0x5a}, 32)

func credential(t testing.TB) *keyslot.Credential {
	c, err := keyslot.RawKey(bytes.Clone(rawKey))
	require.NoError(t, err)
	return c
}

// kinds are the three ways a store can be made.
var kinds = []string{"plain", "sealed", "sealed-names"}

func createOptions(t testing.TB, kind string) *blobdir.CreateOptions {
	o := &blobdir.CreateOptions{}
	if kind != "plain" {
		o.Key = credential(t)
		o.SealNames = kind == "sealed-names"
	}
	return o
}

func openOptions(t testing.TB, kind string) *blobdir.Options {
	o := &blobdir.Options{}
	if kind != "plain" {
		o.Key = credential(t)
	}
	return o
}

func eachKind(t *testing.T, fn func(t *testing.T, kind string)) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) { fn(t, kind) })
	}
}

func random(n int) []byte {
	p := make([]byte, n)
	rand.Read(p)
	return p
}

func put(d *blobdir.Dir, name string, data []byte) error {
	return d.Update(func(tx *blobdir.Tx) error { return tx.Put(name, data, nil) }, nil)
}

func get(t testing.TB, d *blobdir.Dir, name string) []byte {
	var p []byte
	require.NoError(t, d.View(func(tx *blobdir.Tx) (err error) { p, err = tx.Get(name, 0); return err }))
	return p
}

func requireClean(t testing.TB, d *blobdir.Dir) *blobdir.Report {
	rep, err := d.Check(context.Background(), nil)
	require.NoError(t, err)
	require.Empty(t, rep.Errors)
	require.Empty(t, rep.Leaks)
	return rep
}

func TestPutGetReopen(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(1<<20, nil)
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		want := map[string][]byte{}
		for i, n := range []int{0, 1, 511, 4095, 4096, 4097, 8192, 8193, 40000, 143215, 600000} {
			name := fmt.Sprintf("dir/blob-%d", i)
			want[name] = random(n)
			require.NoError(t, put(d, name, want[name]))
			requireClean(t, d)
		}
		for name, data := range want {
			require.Equal(t, data, get(t, d, name))
		}
		require.NoError(t, d.Close())

		d, err = blobdir.Open(dev.Reopen(), openOptions(t, kind))
		require.NoError(t, err)
		rep := requireClean(t, d)
		require.Empty(t, rep.Warnings)
		require.EqualValues(t, len(want), rep.Blobs)
		for name, data := range want {
			require.Equal(t, data, get(t, d, name))
		}
	})
}

// The model test runs random transactions against a map.
func TestModel(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		seed := seedFor(t)
		rng := mrand.New(mrand.NewPCG(seed, 1))
		dev := imagetest.NewCrash(1<<20, nil)
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		m := newModel(rng)
		for i := range 300 * scale() {
			require.NoError(t, m.step(d))
			dev.Settle()
			if i%50 == 49 {
				requireClean(t, d)
				require.NoError(t, m.compare(d))
			}
			if rng.IntN(40) == 0 {
				require.NoError(t, d.Close())
				d, err = blobdir.Open(dev.Reopen(), openOptions(t, kind))
				require.NoError(t, err)
				dev = d.Device().(*imagetest.CrashDevice)
			}
		}
		requireClean(t, d)
		require.NoError(t, m.compare(d))
	})
}

func TestOneSyncACommit(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(1<<20, nil)
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		for i := range 20 {
			before := dev.Trace()
			require.NoError(t, put(d, "tpm/permanent", random(6000)))
			diff := dev.Trace().Sub(before)
			require.EqualValues(t, 1, diff.Syncs, "commit %d", i)
			if i > 5 {
				t.Logf("%+v", diff)
			}
		}
	})
}

func TestIdenticalPutWritesNothing(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		dev := imagetest.NewCrash(1<<20, nil)
		d, err := blobdir.Create(dev, createOptions(t, kind))
		require.NoError(t, err)
		data := random(143000)
		require.NoError(t, put(d, "a", data))
		before := dev.Trace()
		require.NoError(t, put(d, "a", data))
		require.Zero(t, dev.Trace().Sub(before).Writes)
		data[70000] ^= 1
		require.NoError(t, put(d, "a", data))
		diff := dev.Trace().Sub(before)
		require.Less(t, diff.BytesWritten, int64(32<<10), "one chunk, its map, the directory, the free node and the root")
		require.Equal(t, data, get(t, d, "a"))
	})
}

var _ image.Device = (*imagetest.CrashDevice)(nil)
