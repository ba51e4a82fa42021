package nvstore_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/nvstore"
)

// chain knows a store's raw image by bytes that blobdir decides on.
func TestMagic(t *testing.T) {
	require.Equal(t, string(blobdir.Magic), chain.Magic)
	for _, k := range kinds {
		path := filepath.Join(t.TempDir(), "x")
		o := &nvstore.CreateOptions{Format: "raw", SealNames: k.names}
		if k.sealed {
			o.Key = rawKey(t, theKey)
		}
		s, err := nvstore.Create(path, o)
		require.NoError(t, err)
		require.NoError(t, s.Close())
		format, err := chain.Detect(path)
		require.NoError(t, err)
		require.Equal(t, chain.Raw, format)
	}
}

// Images of others open by an explicit format only, and a raw one that was
// given a store is ours from then on.
func TestForeignImages(t *testing.T) {
	for _, format := range []string{"raw", "qcow2"} {
		t.Run(format, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x")
			out, err := exec.Command("qemu-img", "create", "-f", format, path, "8M").CombinedOutput()
			require.NoError(t, err, "%s", out)
			before, err := os.ReadFile(path)
			require.NoError(t, err)
			s, err := nvstore.Create(path, &nvstore.CreateOptions{Existing: true})
			mustFail(t, s, err, image.ErrFormat)
			s, err = nvstore.Open(path, nil)
			mustFail(t, s, err, image.ErrFormat)
			s, err = nvstore.Open(path, &nvstore.Options{Format: format})
			mustFail(t, s, err, nvstore.ErrFormat)
			after, err := os.ReadFile(path)
			require.NoError(t, err)
			require.Equal(t, before, after)

			s, err = nvstore.Create(path, &nvstore.CreateOptions{Existing: true, Format: format})
			require.NoError(t, err)
			require.NoError(t, s.Put("x", []byte("x"), nil))
			require.NoError(t, s.Close())
			s, err = nvstore.Open(path, &nvstore.Options{Format: format})
			require.NoError(t, err)
			get(t, s, "x", []byte("x"))
			require.NoError(t, s.Close())
			s, err = nvstore.Open(path, nil)
			if format == "raw" {
				require.NoError(t, err)
				require.NoError(t, s.Close())
			} else {
				mustFail(t, s, err, image.ErrFormat)
			}
		})
	}
}

// An image that a running QEMU holds is refused, and QEMU refuses one that is
// open here.
func TestQEMUsLocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	s, err := nvstore.Create(path, nil)
	require.NoError(t, err)
	out, err := exec.Command("qemu-img", "snapshot", "-c", "s", path).CombinedOutput()
	require.Error(t, err)
	require.Contains(t, string(out), "lock")
	require.NoError(t, s.Close())

	cmd := exec.Command("qemu-io", "-f", "qcow2", path)
	in, err := cmd.StdinPipe()
	require.NoError(t, err)
	pipe, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	_, err = in.Write([]byte("length\n"))
	require.NoError(t, err)
	_, err = pipe.Read(make([]byte, 100)) // it has opened the image
	require.NoError(t, err)
	s, err = nvstore.Open(path, nil)
	mustFail(t, s, err, nvstore.ErrLocked)
	require.NoError(t, in.Close())
	_, _ = pipe.Read(make([]byte, 100))
	require.NoError(t, cmd.Wait())
	s, err = nvstore.Open(path, nil)
	require.NoError(t, err)
	require.NoError(t, s.Close())
}

// Many machines in one folder, each with its own store and key.
func TestMachines(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "nv")
	_, err := nvstore.Machines(dir)
	require.ErrorIs(t, err, os.ErrNotExist)
	var stores []*nvstore.Store
	var uuids []string
	for i := range 3 {
		key := make([]byte, 32)
		key[0] = byte(i + 1)
		s, err := nvstore.Create("pebble:"+dir, &nvstore.CreateOptions{Key: rawKey(t, key)})
		require.NoError(t, err)
		stores = append(stores, s)
		uuids = append(uuids, s.Location()[len(s.Location())-36:])
		require.NoError(t, s.Put("tpm/permanent", []byte{byte(i)}, nil))
	}
	list, err := nvstore.Machines(dir)
	require.NoError(t, err)
	require.ElementsMatch(t, uuids, list)
	for i, s := range stores {
		get(t, s, "tpm/permanent", []byte{byte(i)})
		require.NoError(t, s.Close())
	}
	key := make([]byte, 32)
	key[0] = 2
	s, err := nvstore.Open("pebble:"+dir+"/"+uuids[0], &nvstore.Options{Key: rawKey(t, key)})
	mustFail(t, s, err, nvstore.ErrKey)
	s, err = nvstore.Open("pebble:"+dir+"/"+uuids[1], &nvstore.Options{Key: rawKey(t, key)})
	require.NoError(t, err)
	get(t, s, "tpm/permanent", []byte{1})
	require.NoError(t, s.Close())
	s, err = nvstore.Open("pebble:"+dir, nil)
	mustFail(t, s, err, chain.ErrLocation)
	_, err = nvstore.Create("pebble:"+dir+"/"+uuids[0], nil)
	require.ErrorIs(t, err, nvstore.ErrExist)
}

func TestCanonical(t *testing.T) {
	for in, want := range map[string]string{
		"tpm-permanent-state": nvstore.TPMPermanent, "tpm-volatile-state": nvstore.TPMVolatile,
		"tpm-savestate-state": nvstore.TPMSavestate, "tpm/permanent": nvstore.TPMPermanent, "x": "x", "": "",
	} {
		require.Equal(t, want, nvstore.Canonical(in), in)
	}
}
