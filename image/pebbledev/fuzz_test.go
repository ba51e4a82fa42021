package pebbledev_test

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/pebbledev"
)

// FuzzStored puts any key of a machine, with any value, beside its size and one
// block. Whatever it is, the folder opens, and what it can't make sense of is
// image.ErrCorrupt.
func FuzzStored(f *testing.F) {
	be := func(n uint64) []byte { return binary.BigEndian.AppendUint64(nil, n) }
	for _, n := range []uint64{0, 1, 3, 9, 10, 1 << 38, 1 << 63} {
		f.Add(append([]byte("/b/"), be(n)...), make([]byte, 4096))
		f.Add(append([]byte("/b/"), be(n)...), []byte("short"))
		f.Add([]byte("/size"), be(n<<12))
	}
	f.Add([]byte("/size"), []byte("short"))
	f.Add([]byte(""), []byte("x"))
	f.Add([]byte("/"), []byte(strings.Repeat("x", 5000)))
	f.Fuzz(func(t *testing.T, key, val []byte) {
		mem := vfs.NewMem()
		folder := openFolder(t, "dir", &pebbledev.Options{Create: true, FS: mem})
		d, err := folder.Create(machineA, 10*bs)
		require.NoError(t, err)
		_, err = d.WriteAt([]byte("three"), 3*bs)
		require.NoError(t, err)
		require.NoError(t, d.Close())
		require.NoError(t, folder.Close())
		raw(t, mem, func(db *pebble.DB) {
			require.NoError(t, db.Set(append([]byte("m/"+string(machineA[:])), key...), val, pebble.Sync))
		})
		folder = openFolder(t, "dir", &pebbledev.Options{FS: mem})
		_, err = folder.Machines()
		if d, oerr := folder.Open(machineA); oerr != nil {
			err = errors.Join(err, oerr)
		} else {
			p := make([]byte, min(d.Size(), 20*bs))
			err = errors.Join(err, image.ReadFull(d, p, 0))
			if len(p) > 0 {
				_, serr := d.BlockStatus(0, d.Size())
				err = errors.Join(err, serr)
			}
			require.NoError(t, d.Close())
		}
		if err != nil {
			require.ErrorIs(t, err, image.ErrCorrupt)
		}
		require.NoError(t, folder.Close())
	})
}
