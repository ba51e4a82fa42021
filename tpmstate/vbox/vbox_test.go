package vbox_test

import (
	"archive/tar"
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/vbox"
)

func TestRoundTrip(t *testing.T) {
	for _, s := range []tpmstate.State{{}, {[]byte("one"), nil, nil}, {[]byte("one"), bytes.Repeat([]byte("two"), 3000), nil}} {
		p, err := vbox.Encode(s)
		require.NoError(t, err)
		got, err := vbox.Parse(p)
		require.NoError(t, err)
		require.Equal(t, s, got)
	}
}

// archive makes a tar of entries.
func archive(t testing.TB, entries ...*tar.Header) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range entries {
		require.NoError(t, w.WriteHeader(h))
		_, err := w.Write(make([]byte, h.Size))
		require.NoError(t, err)
	}
	require.NoError(t, w.Close())
	return b.Bytes()
}

// TestOther: what isn't the TPM's is left alone, and what is damaged refused.
func TestOther(t *testing.T) {
	perm := &tar.Header{Name: "TpmEmuTpms/permall", Mode: 0o600, Size: 5}
	p := archive(t, &tar.Header{Name: "efi/nvram", Mode: 0o600, Size: 600}, perm)
	s, err := vbox.Parse(p)
	require.NoError(t, err)
	require.Equal(t, tpmstate.State{make([]byte, 5), nil, nil}, s)
	_, err = vbox.Parse(archive(t, perm, perm))
	require.ErrorIs(t, err, vbox.ErrFormat)
	_, err = vbox.Parse(p[:len(p)-1024-510])
	require.ErrorIs(t, err, vbox.ErrFormat)
	_, err = vbox.Parse([]byte("hello"))
	require.ErrorIs(t, err, vbox.ErrFormat)
	_, err = vbox.Parse(archive(t, &tar.Header{Name: "permall", Mode: 0o600, Size: tpmstate.MaxState + 1}))
	require.ErrorIs(t, err, tpmstate.ErrTooLarge)
}

func FuzzParse(f *testing.F) {
	f.Add(archive(f, &tar.Header{Name: "TpmEmuTpms/permall", Mode: 0o600, Size: 5}))
	f.Fuzz(func(t *testing.T, p []byte) {
		s, err := vbox.Parse(p)
		if err != nil {
			return
		}
		again, err := vbox.Encode(s)
		require.NoError(t, err)
		got, err := vbox.Parse(again)
		require.NoError(t, err)
		require.Equal(t, s, got)
	})
}
