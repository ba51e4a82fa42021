package nvstore_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/nvstore"
)

func seededImage(t *testing.T, format string, seed string) (path string, content []byte) {
	path = filepath.Join(t.TempDir(), "image")
	s, err := nvstore.Create(path, &nvstore.CreateOptions{Format: format, Seed: []byte(seed), Time: time.Unix(1700000000, 0), Idle: -1})
	require.NoError(t, err)
	for i := range 3 {
		require.NoError(t, s.Update(func(tx *nvstore.Tx) error {
			for n := range 60 {
				data := bytes.Repeat([]byte{byte(i), byte(n)}, 50+400*n)
				if err := tx.Put(fmt.Sprintf("blob/%d", n), data, &nvstore.Meta{Type: "test"}); err != nil {
					return err
				}
			}
			return nil
		}))
	}
	require.NoError(t, s.Delete("blob/7", "blob/8"))
	require.NoError(t, s.Close())
	content, err = os.ReadFile(path)
	require.NoError(t, err)
	return path, content
}

// The same seed, time and calls give the same bytes; another seed doesn't, nor
// does what is written after the store was opened again.
func TestSeed(t *testing.T) {
	for _, format := range []string{"qcow2", "raw"} {
		t.Run(format, func(t *testing.T) {
			path, a := seededImage(t, format, "one")
			again, b := seededImage(t, format, "one")
			require.True(t, bytes.Equal(a, b))
			_, c := seededImage(t, format, "two")
			require.False(t, bytes.Equal(a, c))

			var ids [2][16]byte
			for i, p := range []string{path, again} {
				s, err := nvstore.Open(p, nil)
				require.NoError(t, err)
				e, err := s.Stat("blob/1")
				require.NoError(t, err)
				require.Equal(t, int64(1700000000), e.Created.Unix())
				require.NoError(t, s.Put("later", []byte("x"), nil))
				e, err = s.Stat("later")
				require.NoError(t, err)
				require.WithinDuration(t, time.Now(), e.Created, time.Hour)
				ids[i] = e.ID
				require.NoError(t, s.Close())
			}
			require.NotEqual(t, ids[0], ids[1])
		})
	}
}

// Keys and nonces must never repeat.
func TestSeedRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "image")
	key, err := keyslot.RawKey(bytes.Repeat([]byte{7}, 32))
	require.NoError(t, err)
	_, err = nvstore.Create(path, &nvstore.CreateOptions{Seed: []byte("x"), Time: time.Unix(1700000000, 0), Key: key})
	require.ErrorIs(t, err, nvstore.ErrInvalid)
	_, err = nvstore.Create(path, &nvstore.CreateOptions{Seed: []byte("x")})
	require.ErrorIs(t, err, nvstore.ErrInvalid)
	require.NoFileExists(t, path)
}
