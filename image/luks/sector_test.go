package luks_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
)

// qcow2Cluster returns where the guest's first cluster lies in a qcow2.
func qcow2Cluster(t testing.TB, f image.Device) int64 {
	t.Helper()
	at := int64(40) // l1_table_offset, to the L2 table, to the cluster
	for range 3 {
		p := make([]byte, 8)
		require.NoError(t, image.ReadFull(f, p, at))
		at = int64(binary.BigEndian.Uint64(p) & 0x00fffffffffffe00)
	}
	return at
}

// TestCipherIsQEMUs decrypts what QEMU encrypted in a qcow2, of both kinds: the
// sector's number is the host's for LUKS, and the guest's for legacy AES.
func TestCipherIsQEMUs(t *testing.T) {
	want := pattern(64<<10, 7)
	for _, format := range []string{"luks", "aes"} {
		path := filepath.Join(t.TempDir(), "i")
		args := []string{"--object", qemuSecret(), "-f", "qcow2", "-o", "encrypt.format=" + format + ",encrypt.key-secret=s"}
		if format == "luks" {
			args[len(args)-1] += ",encrypt.iter-time=10"
		}
		qemuMeasuring(t, "create", append(args, path, "1M")...)
		opts := "driver=qcow2,encrypt.format=" + format + ",encrypt.key-secret=s,file.filename=" + path
		require.NoError(t, os.WriteFile(path+".raw", want, 0o600))
		run(t, "qemu-io", "--object", qemuSecret(), "--image-opts", opts, "-c", "write -s "+path+".raw 0 64k")
		f := openFile(t, path)
		at := qcow2Cluster(t, f)
		var c *luks.Cipher
		sector := uint64(0)
		var err error
		if format == "luks" {
			// QEMU puts the header right behind its own tables.
			p := make([]byte, 1<<20)
			_, err = f.ReadAt(p, 0)
			require.NoError(t, err)
			off := bytes.Index(p, []byte("LUKS\xba\xbe"))
			require.Positive(t, off)
			size, err := luks.HeaderSize(&luks.FormatOptions{Passphrase: pass})
			require.NoError(t, err)
			require.EqualValues(t, 2068480, size, "QEMU's")
			w, err := image.Window(f, int64(off), size)
			require.NoError(t, err)
			_, err = luks.OpenCipher(w, &luks.Options{Passphrase: []byte("wrong")})
			require.ErrorIs(t, err, luks.ErrPassphrase)
			c, err = luks.OpenCipher(w, &luks.Options{Passphrase: pass})
			require.NoError(t, err)
			require.Equal(t, "aes-xts-plain64", c.Info().Encryption)
			sector = uint64(at / 512)
		} else {
			c, err = luks.LegacyAES(pass)
			require.NoError(t, err)
			require.Nil(t, c.Info())
		}
		got := make([]byte, len(want))
		require.NoError(t, image.ReadFull(f, got, at))
		require.False(t, bytes.Equal(want, got))
		require.NoError(t, c.Decrypt(got, sector), format)
		requirePlain(t, want, got)
		require.NoError(t, f.Close())
	}
}

// TestFormatCipher: what FormatCipher made opens again, and has room for
// further key slots, which end where the header ends.
func TestFormatCipher(t *testing.T) {
	for _, o := range []luks.FormatOptions{{}, {Encryption: "twofish-cbc-essiv:sha256", Hash: "sha1"}, {Encryption: "aes-xts-plain64", KeySize: 48}} {
		size, err := luks.HeaderSize(cheap(o))
		require.NoError(t, err)
		m := imagetest.NewMemory(size)
		c, err := luks.FormatCipher(m, cheap(o))
		require.NoError(t, err)
		p := pattern(600<<10, 1)
		want := bytes.Clone(p)
		require.NoError(t, c.Encrypt(p, 77))
		require.False(t, bytes.Equal(want[len(p)-16:], p[len(p)-16:]))
		for n := range 7 {
			_, err = luks.AddKey(m, keyOptions(string(pass), fmt.Sprint("pass ", n)))
			require.NoError(t, err)
		}
		c, err = luks.OpenCipher(m, &luks.Options{Passphrase: []byte("pass 6")})
		require.NoError(t, err)
		require.NoError(t, c.Decrypt(p, 77))
		requirePlain(t, want, p)
		require.NoError(t, c.Decrypt(nil, 0))
		require.ErrorIs(t, c.Encrypt(p[:511], 0), image.ErrOutOfRange)

		_, err = luks.FormatCipher(imagetest.NewMemory(size-1), cheap(o))
		require.ErrorIs(t, err, image.ErrNoSpace)
	}
	for _, o := range []luks.FormatOptions{{Version: 2}, {Size: 512}, {Encryption: "x"}} {
		_, err := luks.FormatCipher(imagetest.NewMemory(4<<20), cheap(o))
		require.Error(t, err)
	}
	_, err := luks.OpenCipher(memory(t, sound2(t)), &luks.Options{Passphrase: pass})
	require.ErrorIs(t, err, image.ErrUnsupported)
	_, err = luks.LegacyAES(nil)
	require.Error(t, err)
}
