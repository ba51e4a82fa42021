package swtpm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/swtpm"
)

func le(p []byte, off int, v uint64, n int) []byte {
	p = bytes.Clone(p)
	copy(p[off:], binary.LittleEndian.AppendUint64(nil, v)[:n])
	return p
}

func TestLinear(t *testing.T) {
	l := &swtpm.Linear{Files: [3][]byte{fixture(t), bytes.Repeat([]byte{7}, 9000), nil}}
	p := l.Encode()
	require.Len(t, p, 192+8192+16384)
	got, err := swtpm.ParseLinear(p)
	require.NoError(t, err)
	require.Equal(t, l, got)
	// A block device is larger than what is on it.
	got, err = swtpm.ParseLinear(append(p, make([]byte, 4096)...))
	require.NoError(t, err)
	require.Equal(t, l, got)
	got, err = swtpm.ParseLinear((&swtpm.Linear{}).Encode())
	require.NoError(t, err)
	require.Equal(t, &swtpm.Linear{}, got)
}

// TestLinearFaults has the damages that swtpm answers with a new TPM.
func TestLinearFaults(t *testing.T) {
	good := (&swtpm.Linear{Files: [3][]byte{fixture(t), bytes.Repeat([]byte{7}, 100), bytes.Repeat([]byte{8}, 50)}}).Encode()
	for name, c := range map[string]struct {
		p     []byte
		off   int64
		field string
	}{
		"one byte of the magic":         {le(good, 3, 0, 1), 0, "magic"},
		"cut in the header":             {good[:191], 0, ""},
		"version":                       {le(good, 8, 2, 1), 8, "version"},
		"hdrsize":                       {le(good, 10, 193, 2), 10, "hdrsize"},
		"offset of the first 0":         {le(good, 12, 0, 4), 12, "offset"},
		"a whole entry 0":               {append(append(bytes.Clone(good[:12]), make([]byte, 12)...), good[24:]...), 24, "offset"},
		"offset inside the header":      {le(good, 12, 100, 4), 12, "offset"},
		"offset beyond":                 {le(good, 36, uint64(len(good)), 4), 36, "offset"},
		"offset 2^32-1":                 {le(good, 12, 1<<32-1, 4), 12, "offset"},
		"overlap":                       {le(good, 24, 192, 4), 24, "offset"},
		"data longer than the section":  {le(good, 16, 8193, 4), 16, "data_length"},
		"section no power of two":       {le(good, 20, 8191, 4), 20, "section_length"},
		"section 0":                     {le(le(good, 16, 0, 4), 20, 0, 4), 20, "section_length"},
		"cut in the last section":       {good[:len(good)-1], 36, "offset"},
		"a fourth section":              {le(good, 48, 192, 4), 48, "offset"},
		"length without an offset":      {le(good, 52, 1, 4), 48, "offset"},
		"section length without offset": {le(good, 56, 1, 4), 48, "offset"},
	} {
		_, err := swtpm.ParseLinear(c.p)
		var f *image.FormatError
		require.ErrorIs(t, err, swtpm.ErrFormat, name)
		require.True(t, errors.As(err, &f), name)
		require.Equal(t, c.off, f.Off, "%s: %v", name, err)
		require.Equal(t, c.field, f.Field, "%s: %v", name, err)
		// And a TPM that is to run on it leaves it as it is.
		path := filepath.Join(t.TempDir(), "tpm.lin")
		require.NoError(t, os.WriteFile(path, c.p, 0o600))
		_, err = swtpm.OpenLinear(path, nil)
		require.ErrorIs(t, err, swtpm.ErrFormat, name)
		now, err := os.ReadFile(path)
		require.NoError(t, err)
		require.Equal(t, c.p, now)
	}
}

func FuzzLinear(f *testing.F) {
	f.Add((&swtpm.Linear{}).Encode())
	f.Add((&swtpm.Linear{Files: [3][]byte{[]byte("a"), []byte("bcd"), nil}}).Encode())
	f.Fuzz(func(t *testing.T, p []byte) {
		l, err := swtpm.ParseLinear(p)
		if err != nil {
			require.ErrorIs(t, err, swtpm.ErrFormat)
			return
		}
		again, err := swtpm.ParseLinear(l.Encode())
		if l.Files[0] != nil && len(l.Files[0]) == 0 || l.Files[1] != nil && len(l.Files[1]) == 0 || l.Files[2] != nil && len(l.Files[2]) == 0 {
			return // a file of no bytes has no section of its own
		}
		require.NoError(t, err)
		require.Equal(t, l, again)
	})
}

// TestHomes runs swtpm's homes through what a TPM does.
func TestHomes(t *testing.T) {
	k := key(t, 32)
	for name, open := range map[string]func(dir string) (tpmstate.Home, error){
		"dir":      func(dir string) (tpmstate.Home, error) { return swtpm.OpenDir(dir, nil) },
		"dir, key": func(dir string) (tpmstate.Home, error) { return swtpm.OpenDir(dir, &swtpm.HomeOptions{Key: k}) },
		"linear":   func(dir string) (tpmstate.Home, error) { return swtpm.OpenLinear(dir+"/lin", nil) },
		"linear, 1.2": func(dir string) (tpmstate.Home, error) {
			return swtpm.OpenLinear(dir+"/lin", &swtpm.HomeOptions{Version: tpmstate.TPM12, Key: k})
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			h, err := open(dir)
			require.NoError(t, err)
			_, err = open(dir)
			require.ErrorIs(t, err, image.ErrLocked)
			for k := range tpmstate.Kind(3) {
				_, err := h.Load(k)
				require.ErrorIs(t, err, tpmstate.ErrNotFound)
				require.NoError(t, h.Delete(k))
			}
			require.ErrorIs(t, h.Store(tpmstate.Permanent, nil), tpmstate.ErrNotFound)
			require.ErrorIs(t, h.Store(tpmstate.Permanent, make([]byte, tpmstate.MaxState+1)), tpmstate.ErrTooLarge)
			require.NoError(t, h.Store(tpmstate.Permanent, []byte("one")))
			require.NoError(t, h.Store(tpmstate.Volatile, bytes.Repeat([]byte("two"), 3000)))
			require.NoError(t, h.Store(tpmstate.Permanent, bytes.Repeat([]byte("long"), 5000)))
			require.NoError(t, h.Close())
			h, err = open(dir)
			require.NoError(t, err)
			s, err := tpmstate.LoadAll(h)
			require.NoError(t, err)
			require.Equal(t, tpmstate.State{bytes.Repeat([]byte("long"), 5000), bytes.Repeat([]byte("two"), 3000), nil}, s)
			require.NoError(t, h.Replace(tpmstate.State{[]byte("new"), nil, []byte("save")}))
			s, err = tpmstate.LoadAll(h)
			require.NoError(t, err)
			require.Equal(t, tpmstate.State{[]byte("new"), nil, []byte("save")}, s)
			require.NoError(t, h.Close())
		})
	}
}
