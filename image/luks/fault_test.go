package luks_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/aead/serpent"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/cast5"
	"golang.org/x/crypto/twofish"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
)

// TestReadErrors fails each read of an open in turn. A medium's fault is never
// taken for a wrong passphrase, and where LUKS2's other header can be read, it
// opens.
func TestReadErrors(t *testing.T) {
	for _, version := range []int{1, 2} {
		m := imagetest.NewMemory(0)
		_, err := luks.Format(m, cheap(luks.FormatOptions{Version: version, Size: 4096}))
		require.NoError(t, err)
		opened := 0
		n := imagetest.EachFault(imagetest.Fault{Mode: imagetest.Fail, Ops: imagetest.OpRead}, func(f imagetest.Fault) int {
			d := imagetest.NewFault(m, f)
			v, err := luks.Open(d, &luks.Options{Passphrase: pass})
			switch {
			case d.Hits() == 0:
				require.NoError(t, err)
			case err == nil:
				require.Equal(t, 2, version)
				opened++
			default:
				require.ErrorIs(t, err, imagetest.ErrInjected)
				require.Nil(t, v)
			}
			return d.Hits()
		})
		require.GreaterOrEqual(t, n, 3)
		if version == 2 {
			require.GreaterOrEqual(t, opened, 4, "either header's parts")
		}
	}
}

// TestWriteErrors has each write and Sync of Format and WriteAt fail.
func TestWriteErrors(t *testing.T) {
	for _, version := range []int{1, 2} {
		n := imagetest.EachFault(imagetest.Fault{Mode: imagetest.Fail, Ops: imagetest.OpChange | imagetest.OpSync}, func(f imagetest.Fault) int {
			d := imagetest.NewFault(imagetest.NewMemory(0), f)
			v, err := luks.Format(d, cheap(luks.FormatOptions{Version: version, Size: 1 << 20}))
			if err == nil {
				_, err = v.WriteAt(pattern(600_000, 1), 300)
			}
			if err == nil {
				err = v.Sync()
			}
			if d.Hits() > 0 {
				require.ErrorIs(t, err, imagetest.ErrInjected)
			} else {
				require.NoError(t, err)
			}
			return d.Hits()
		})
		require.GreaterOrEqual(t, n, 8)
	}
}

// TestShortWrite: the number tells how much is whole.
func TestShortWrite(t *testing.T) {
	m := imagetest.NewMemory(0)
	v, err := luks.Format(shared{m}, cheap(luks.FormatOptions{Version: 1, Size: 4 << 20}))
	require.NoError(t, err)
	require.NoError(t, v.Close())
	want := pattern(3<<20, 3)
	for at := range 20 {
		d := imagetest.NewFault(shared{m}, imagetest.Fault{Mode: imagetest.Fail, Ops: imagetest.OpWrite, At: at, Forever: true})
		v, err := luks.Open(d, &luks.Options{Passphrase: pass})
		require.NoError(t, err)
		n, err := v.WriteAt(want, 100)
		require.ErrorIs(t, err, imagetest.ErrInjected)
		require.Less(t, n, len(want))
		got := make([]byte, n)
		_, err = v.ReadAt(got, 100)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want[:n], got))
	}
}

// blocks makes block ciphers, by dm-crypt's names.
var blocks = map[string]func(key []byte) (cipher.Block, error){
	"aes":     aes.NewCipher,
	"serpent": serpent.NewCipher,
	"twofish": func(key []byte) (cipher.Block, error) { return twofish.NewCipher(key) },
	"cast5":   func(key []byte) (cipher.Block, error) { return cast5.NewCipher(key) },
}

// TestModes compares sectors with what crypto/cipher makes of them.
func TestModes(t *testing.T) {
	for name, make := range blocks {
		key := pattern(32, 5)
		if name == "cast5" {
			key = key[:16]
		}
		b, err := make(key)
		require.NoError(t, err)
		for _, size := range []int{512, 4096} {
			for _, sector := range []uint64{0, 7, 1<<32 - 2, 1 << 40, 1<<64 - 1} {
				for _, mode := range []string{"cbc-plain64", "cbc-plain", "ctr-plain64", "ecb-plain"} {
					checkMode(t, b, name+"-"+mode, key, size, sector)
				}
			}
		}
	}
}

func checkMode(t *testing.T, b cipher.Block, kind string, key []byte, size int, sector uint64) {
	plain := pattern(3*size, 9)
	want := make([]byte, len(plain))
	for i := range 3 {
		n := sector + uint64(i*size/512)
		if strings.HasSuffix(kind, "-plain") {
			n &= 1<<32 - 1
		}
		iv := make([]byte, b.BlockSize())
		binary.LittleEndian.PutUint64(iv, n)
		src, dst := plain[i*size:(i+1)*size], want[i*size:]
		switch {
		case strings.Contains(kind, "-ctr-"):
			cipher.NewCTR(b, iv).XORKeyStream(dst, src)
		case strings.Contains(kind, "-ecb-"):
			for j := 0; j < size; j += b.BlockSize() {
				b.Encrypt(dst[j:], src[j:])
			}
		default:
			cipher.NewCBCEncrypter(b, iv).CryptBlocks(dst, src)
		}
	}
	got := bytes.Clone(plain)
	require.NoError(t, luks.Crypt(kind, key, got, size, sector, false))
	require.Equal(t, want, got, "%s, sector %d of %d", kind, sector, size)
	require.NoError(t, luks.Crypt(kind, key, got, size, sector, true))
	require.Equal(t, plain, got, "%s, sector %d of %d", kind, sector, size)
}
