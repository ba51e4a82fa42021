package swtpm_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/swtpm"
)

// fixture is a TPM 2.0's permanent state as swtpm 0.7.1 wrote it.
func fixture(t testing.TB) []byte {
	p, err := os.ReadFile("../../fixtures/tpm/tpm2-00.permall")
	require.NoError(t, err)
	return p
}

func key(t testing.TB, n int) *swtpm.Key {
	p := make([]byte, n)
	rand.Read(p)
	k, err := swtpm.NewKey(p)
	require.NoError(t, err)
	return k
}

func TestPlainIsTheSameBytes(t *testing.T) {
	p := fixture(t)
	state, err := swtpm.OpenFile(p, nil)
	require.NoError(t, err)
	require.Len(t, state, len(p)-16)
	again, err := swtpm.SealFile(state, nil)
	require.NoError(t, err)
	require.Equal(t, p, again)
}

func TestKeys(t *testing.T) {
	for _, n := range []int{16, 32} {
		for _, size := range []int{1, 15, 16, 17, 31, 32, 33, 6009, tpmstate.MaxState} {
			state := make([]byte, size)
			rand.Read(state)
			k := key(t, n)
			p, err := swtpm.SealFile(state, k)
			require.NoError(t, err)
			got, err := swtpm.OpenFile(p, k)
			require.NoError(t, err)
			require.True(t, bytes.Equal(state, got))
			if size >= 16 {
				require.NotContains(t, string(p), string(state[:16]))
			}
			_, err = swtpm.OpenFile(p, key(t, n))
			require.ErrorIs(t, err, swtpm.ErrKey)
			_, err = swtpm.OpenFile(p, key(t, 48-n))
			require.ErrorIs(t, err, swtpm.ErrKey)
			require.ErrorContains(t, err, fmt.Sprintf("takes one of %d bits", n*8))
			_, err = swtpm.OpenFile(p, nil)
			require.ErrorIs(t, err, swtpm.ErrNoKey)
		}
	}
	plain, err := swtpm.SealFile([]byte("state"), nil)
	require.NoError(t, err)
	_, err = swtpm.OpenFile(plain, key(t, 16))
	require.ErrorIs(t, err, swtpm.ErrPlain)
	_, err = swtpm.SealFile(make([]byte, tpmstate.MaxState+1), nil)
	require.ErrorIs(t, err, tpmstate.ErrTooLarge)
}

func TestParseKey(t *testing.T) {
	for _, text := range []string{"00112233445566778899aabbccddeeff", "0x00112233445566778899AABBCCDDEEFF\n", "00112233445566778899aabbccddeeff rest"} {
		k, err := swtpm.ParseKey([]byte(text))
		require.NoError(t, err, text)
		require.Equal(t, 128, k.Bits())
	}
	for _, text := range []string{"", "0x", "0011", "zz112233445566778899aabbccddeeff", "00112233445566778899aabbccddeeff00"} {
		_, err := swtpm.ParseKey([]byte(text))
		require.ErrorIs(t, err, swtpm.ErrKeyFormat, text)
		if len(text) > 2 {
			require.NotContains(t, err.Error(), text, "the error has the key in it")
		}
	}
}

func TestMigrationBlobs(t *testing.T) {
	state := []byte("a state")
	file, mig := key(t, 32), key(t, 16)
	for _, keys := range []swtpm.MigrationKeys{{}, {File: file}, {Migration: mig}, {File: file, Migration: mig}} {
		p, err := swtpm.SealBlob(state, keys)
		require.NoError(t, err)
		b, err := swtpm.Parse(p)
		require.NoError(t, err)
		require.Equal(t, keys.File != nil || keys.Migration != nil, b.Encrypted())
		require.Equal(t, p, b.Encode())
		got, err := swtpm.OpenBlob(p, keys)
		require.NoError(t, err)
		require.Equal(t, state, got)
		// Who has all keys reads all, as a host that was told to encrypt
		// must read what one that wasn't sends.
		got, err = swtpm.OpenBlob(p, swtpm.MigrationKeys{File: file, Migration: mig})
		require.NoError(t, err)
		require.Equal(t, state, got)
		if keys.Migration != nil || keys.File != nil {
			_, err = swtpm.OpenBlob(p, swtpm.MigrationKeys{})
			require.ErrorIs(t, err, swtpm.ErrNoKey)
		}
		_, err = swtpm.OpenFile(p, keys.File)
		require.ErrorIs(t, err, swtpm.ErrFormat, "a blob of the control channel isn't a file")
	}
	p, err := swtpm.SealFile(state, nil)
	require.NoError(t, err)
	_, err = swtpm.OpenBlob(p, swtpm.MigrationKeys{})
	require.ErrorIs(t, err, swtpm.ErrFormat, "nor the reverse")
}

// put returns p with a number in it.
func put(p []byte, off int, v uint64, n int) []byte {
	p = bytes.Clone(p)
	b := binary.BigEndian.AppendUint64(nil, v)
	copy(p[off:], b[8-n:])
	return p
}

// TestBlobFaults: each fault alone is found, and its place is named.
func TestBlobFaults(t *testing.T) {
	good := fixture(t)
	n := uint64(len(good))
	k := key(t, 32)
	sealed, err := swtpm.SealFile([]byte("state"), k)
	require.NoError(t, err)
	for name, c := range map[string]struct {
		p     []byte
		k     *swtpm.Key
		off   int64
		field string
	}{
		"empty":                 {nil, nil, 0, ""},
		"nine bytes":            {good[:9], nil, 0, ""},
		"truncated":             {good[:len(good)-1], nil, 6, "totlen"},
		"trailing byte":         {append(bytes.Clone(good), 0), nil, 6, "totlen"},
		"zeros":                 {make([]byte, 4096), nil, 0, "version"},
		"version 3":             {put(good, 0, 3, 1), nil, 0, "version"},
		"min_version 0":         {put(good, 1, 0, 1), nil, 1, "min_version"},
		"min_version 3":         {put(good, 1, 3, 1), nil, 1, "min_version"},
		"hdrsize":               {put(good, 2, 11, 2), nil, 2, "hdrsize"},
		"unknown flag":          {put(good, 4, 0x20, 2), nil, 4, "flags"},
		"migration flag":        {put(good, 4, 4, 2), nil, 4, "flags"},
		"length flag alone":     {put(good, 4, 8, 2), nil, 4, "flags"},
		"totlen":                {put(good, 6, n+1, 4), nil, 6, "totlen"},
		"totlen 2^32-1":         {put(good, 6, 1<<32-1, 4), nil, 6, "totlen"},
		"tag 0":                 {put(good, 10, 0, 2), nil, 10, "tag"},
		"tag 8":                 {put(good, 10, 8, 2), nil, 10, "tag"},
		"tag of another flag":   {put(good, 10, 4, 2), nil, 10, "tag"},
		"length beyond":         {put(good, 12, n, 4), nil, 12, "length"},
		"length 2^32-1":         {put(good, 12, 1<<32-1, 4), nil, 12, "length"},
		"length short":          {put(good, 12, n-17, 4), nil, int64(n - 1), ""},
		"no fields":             {put(good[:10], 6, 10, 4), nil, 10, "tag"},
		"field twice":           {put(append(bytes.Clone(good), 0, 1, 0, 0, 0, 0), 6, n+6, 4), nil, int64(n), "tag"},
		"encrypted, says plain": {put(sealed, 4, 0, 2), nil, 10, "tag"},
		"plain, says encrypted": {put(good, 4, 9, 2), k, 10, "tag"},
	} {
		_, err := swtpm.OpenFile(c.p, c.k)
		var f *image.FormatError
		require.ErrorIs(t, err, swtpm.ErrFormat, name)
		require.True(t, errors.As(err, &f), name)
		require.Equal(t, c.off, f.Off, "%s: %v", name, err)
		require.Equal(t, c.field, f.Field, "%s: %v", name, err)
	}
}

// TestSealedFlips: with a key, no byte of a file can change unnoticed.
func TestSealedFlips(t *testing.T) {
	k := key(t, 32)
	p, err := swtpm.SealFile(fixture(t)[16:400], k)
	require.NoError(t, err)
	for i := range p {
		p[i] ^= 0x10
		_, err := swtpm.OpenFile(p, k)
		require.Error(t, err, "byte %d", i)
		p[i] ^= 0x10
	}
}

func FuzzBlob(f *testing.F) {
	f.Add(fixture(f))
	k, err := swtpm.NewKey(make([]byte, 32))
	require.NoError(f, err)
	for _, keys := range []swtpm.MigrationKeys{{}, {File: k}, {Migration: k}, {File: k, Migration: k}} {
		p, err := swtpm.SealBlob([]byte("state"), keys)
		require.NoError(f, err)
		f.Add(p)
	}
	f.Add([]byte("\x01\x01\x00\x0a\x00\x00\x00\x00\x00\x0estat"))
	f.Fuzz(func(t *testing.T, p []byte) {
		b, err := swtpm.Parse(p)
		if err != nil {
			require.ErrorIs(t, err, swtpm.ErrFormat)
			return
		}
		require.Equal(t, p, b.Encode())
		if state, err := swtpm.OpenFile(p, nil); err == nil && b.Version == 2 {
			again, err := swtpm.SealFile(state, nil)
			require.NoError(t, err)
			want := bytes.Clone(p)
			want[1] = 1 // min_version
			require.Equal(t, want, again)
		}
		swtpm.OpenFile(p, k)
		swtpm.OpenBlob(p, swtpm.MigrationKeys{File: k, Migration: k})
	})
}
