package nvstore_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

func liveStore(t *testing.T) (*imagetest.CrashDevice, *nvstore.Store, []byte) {
	dev := imagetest.NewCrash(1<<20, nil)
	s, err := nvstore.CreateDevice(dev, &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	vars := bytes.Repeat([]byte("uefi"), 3000)
	require.NoError(t, s.Update(func(tx *nvstore.Tx) error {
		if err := tx.CreateLive("uefi/vars", 12000, nil); err != nil {
			return err
		}
		return tx.Put("uefi/vars", vars, nil)
	}))
	return dev, s, vars
}

// A Blob works on a detached live extent as on any blob.
func TestBlobOnLiveExtent(t *testing.T) {
	dev, s, want := liveStore(t)
	b, err := s.Blob("uefi/vars", nil)
	require.NoError(t, err)
	check := func() {
		t.Helper()
		require.NoError(t, b.Sync())
		require.EqualValues(t, len(want), b.Size())
		got, err := io.ReadAll(io.NewSectionReader(b, 0, b.Size()))
		require.NoError(t, err)
		require.Equal(t, want, got)
		got, err = s.Get("uefi/vars")
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	write := func(p string, off int) {
		_, err := b.WriteAt([]byte(p), int64(off))
		require.NoError(t, err)
		want = append(want, make([]byte, max(0, off+len(p)-len(want)))...)
		copy(want[off:], p)
	}
	check()
	write("here", 4094)
	check()
	write("longer than before", 11999)
	check()
	// Cut off and written again, as by a program that truncates a file.
	for _, size := range []int{0, 1, 5000} {
		require.NoError(t, b.Truncate(int64(size)))
		want = want[:size:size]
		write("new content", 9000)
		check()
	}
	require.NoError(t, b.Truncate(0))
	require.ErrorIs(t, b.Sync(), nvstore.ErrInvalid, "a live extent isn't empty")
	require.NoError(t, b.Truncate(9011))
	want = make([]byte, 9011)
	check()
	require.NoError(t, b.Close())
	require.NoError(t, s.Close())
	s, err = nvstore.OpenDevice(dev.Reopen(), nil)
	require.NoError(t, err)
	got, err := s.Get("uefi/vars")
	require.NoError(t, err)
	require.Equal(t, want, got)
}

// While the extent is attached it is the emulator's, and after a revert to
// such a time, too.
func TestBlobAttached(t *testing.T) {
	dev, s, want := liveStore(t)
	detached := dev.Snapshot()
	require.NoError(t, s.Attach())
	attached := dev.Snapshot()
	_, err := s.Blob("uefi/vars", nil)
	require.ErrorIs(t, err, nvstore.ErrAttached)
	_, err = s.Blob("uefi/vars", &nvstore.Meta{})
	require.ErrorIs(t, err, nvstore.ErrAttached)
	require.NoError(t, s.Detach("uefi/vars"))
	b, err := s.Blob("uefi/vars", nil)
	require.NoError(t, err)
	_, err = b.WriteAt([]byte("lost"), 0)
	require.NoError(t, err)
	dev.Revert(attached)
	require.ErrorIs(t, b.Sync(), nvstore.ErrReverted)
	_, err = b.ReadAt(make([]byte, 10), 0)
	require.ErrorIs(t, err, nvstore.ErrAttached)
	_, err = b.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, nvstore.ErrAttached)
	dev.Revert(detached)
	require.ErrorIs(t, s.Put("x", []byte("notices it"), nil), nvstore.ErrReverted)
	p := make([]byte, len(want))
	_, err = b.ReadAt(p, 0)
	require.NoError(t, err)
	require.Equal(t, want, p)
	// Attached under an open Blob.
	require.NoError(t, s.Attach())
	_, err = b.ReadAt(p, 0)
	require.ErrorIs(t, err, nvstore.ErrAttached)
	_, err = b.WriteAt(p[:10], 3)
	require.ErrorIs(t, err, nvstore.ErrAttached)
	require.NoError(t, s.Detach())
	_, err = b.ReadAt(p, 0)
	require.NoError(t, err)
	require.NoError(t, b.Close())
}
