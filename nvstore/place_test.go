package nvstore_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/chain"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

// A store is found where the mark says; without one, only if there is no doubt.
func TestLocate(t *testing.T) {
	im, err := qcow2.Create(held{imagetest.NewMemory(0)}, &qcow2.CreateOptions{Size: adoptDisk})
	require.NoError(t, err)
	at := func(place nvstore.Place) (offset int64, err error) {
		on, err := nvstore.Locate(im, place)
		if err != nil {
			return 0, err
		}
		if d, ok := machine.Of(on); ok {
			return d.Layout().StateOffset, nil
		}
		require.Equal(t, im.Size(), on.Size())
		return 0, nil
	}
	is := func(place nvstore.Place, want int64) {
		t.Helper()
		got, err := at(place)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	is(nvstore.Found, 0)
	_, err = at(nvstore.Tail)
	require.ErrorIs(t, err, machine.ErrNoLayout)
	d, err := nvstore.Adopt(im, &nvstore.AdoptOptions{State: adoptState})
	require.NoError(t, err)
	tail := d.Layout().StateOffset
	guest, err := d.Guest()
	require.NoError(t, err)
	is(nvstore.Found, tail)

	// The guest makes a store on its disk.
	s, err := nvstore.CreateDevice(held{guest}, &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	is(nvstore.Found, tail)
	require.NoError(t, chain.SetMark(im, chain.Unmarked))
	_, err = at(nvstore.Found)
	require.ErrorIs(t, err, nvstore.ErrAmbiguous)
	is(nvstore.Tail, tail)
	is(nvstore.Whole, 0)
	require.NoError(t, chain.SetMark(im, chain.MarkStore))
	is(nvstore.Found, 0)
	// Each of header and roots is enough.
	require.NoError(t, chain.SetMark(im, chain.Unmarked))
	for _, off := range []int64{0, 65536, 131072} {
		_, err = at(nvstore.Found)
		require.ErrorIs(t, err, nvstore.ErrAmbiguous, "%d", off)
		_, err = guest.WriteAt(make([]byte, 4096), off)
		require.NoError(t, err)
	}
	is(nvstore.Found, tail)
	// What can't be read is no reason to take the other.
	fault := imagetest.NewFault(im, imagetest.Fault{Mode: imagetest.Fail, Ops: imagetest.OpRead, At: 2, Forever: true})
	_, err = nvstore.Locate(fault, nvstore.Found)
	require.ErrorIs(t, err, imagetest.ErrInjected)
	require.NoError(t, im.Close())
	_, err = nvstore.Locate(imagetest.NewMemory(0), nvstore.Found)
	require.NoError(t, err)
}
