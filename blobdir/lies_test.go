package blobdir

import (
	"bytes"
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
)

// A free node that calls used blocks free, with all checksums right, is not
// believed.
func TestFreeNodeLies(t *testing.T) {
	dev := imagetest.NewCrash(1<<20, nil)
	d, err := Create(dev, nil)
	require.NoError(t, err)
	data := bytes.Repeat([]byte("precious"), 2000)
	put := func(name string, p []byte) {
		require.NoError(t, d.Update(func(tx *Tx) error { return tx.Put(name, p, nil) }, nil))
	}
	put("victim", data)
	var at int64
	require.NoError(t, d.Regions(func(r Region) error {
		if r.Kind == RegionChunk {
			at = r.Offset
		}
		return nil
	}))
	lie := *d.st.Load()
	free := *lie.free
	free.extents = append([]freeExtent(nil), free.extents...)
	free.insert(freeExtent{off: at, length: BlockSize, freed: lie.root.gen})
	lie.free = &free
	d.st.Store(&lie)
	require.NoError(t, d.Update(func(tx *Tx) error { return tx.Create("liar", nil) }, nil))
	require.NoError(t, d.Close())

	d, err = Open(dev.Reopen(), &Options{ReadOnly: true})
	require.NoError(t, err)
	rep, err := d.Check(context.Background(), nil)
	require.NoError(t, err)
	require.NotEmpty(t, rep.Errors, "check sees it")
	require.Equal(t, "R53", rep.Errors[0].Code)

	d, err = Open(dev.Reopen(), nil)
	require.NoError(t, err)
	in, err := d.Info()
	require.NoError(t, err)
	require.NotEmpty(t, in.Status.FreeRebuilt)
	for i := range 30 {
		put("other", bytes.Repeat([]byte{byte(i)}, 30000))
	}
	require.NoError(t, d.View(func(tx *Tx) error {
		got, err := tx.Get("victim", 0)
		require.Equal(t, data, got)
		return err
	}))
	rep, err = d.Check(context.Background(), nil)
	require.NoError(t, err)
	require.True(t, rep.Clean(), "%+v", rep)
}
