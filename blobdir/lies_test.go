package blobdir

import (
	"bytes"
	"context"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
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

// A root or settled record whose checksum somebody made right, but who hasn't
// the key, is tampering: not torn, not damage, and not believed.
func TestForgedRoot(t *testing.T) {
	cred, err := keyslot.RawKey(bytes.Repeat([]byte{7}, 32))
	require.NoError(t, err)
	dev := imagetest.NewCrash(1<<20, nil)
	d, err := Create(dev, &CreateOptions{Key: cred})
	require.NoError(t, err)
	require.NoError(t, d.Update(func(tx *Tx) error { return tx.Put("a", []byte("b"), nil) }, nil))
	st := d.st.Load()
	require.NoError(t, d.Close())

	// A macFunc that puts the old MAC under the new body.
	old := func(der []byte) macFunc {
		_, mac := macOf(der)
		return func(string, ...[]byte) []byte { return mac }
	}
	for i, s := range st.slots {
		bad := dev.Reopen()
		forged := *s.root
		forged.maxSize = 1 << 30
		p := make([]byte, maxRoot)
		copy(p, forged.encode(old(s.root.der)))
		_, err := parseRoot(p, i)
		require.NoError(t, err, "it parses")
		keep := dev.Snapshot()
		_, err = bad.WriteAt(p, rootSlots[i])
		require.NoError(t, err)
		_, err = Open(bad, &Options{Key: cred})
		require.ErrorIs(t, err, ErrTampered, "slot %d", i)
		dev.Revert(keep)
	}
	t.Run("settled record", func(t *testing.T) {
		bad := dev.Reopen()
		rec := settles(st.root)
		was := rec.encode(d.keys.sum())
		rec.gen += 5
		p := make([]byte, maxRoot)
		copy(p, rec.encode(old(was)))
		_, err := bad.WriteAt(p, settledOffset)
		require.NoError(t, err)
		_, err = Open(bad, &Options{Key: cred})
		require.ErrorIs(t, err, ErrTampered)
	})
}
