package luks_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
)

// TestMatrix makes LUKS2 images of each cipher, key size, sector size and hash
// that cryptsetup has without the kernel, here and with cryptsetup; each program
// adds a key slot to the image, this one writes, and cryptsetup decrypts. TestQEMU
// is the same for LUKS1. Without NVSTORE_SCALE it takes one in nine.
func TestMatrix(t *testing.T) {
	type kind struct {
		encryption   string
		bits, sector int
		hash         string
		byCryptsetup bool
		kdf          string
	}
	var kinds []kind
	for i, enc := range []string{"aes-xts-plain64", "aes-xts-plain", "aes-cbc-plain64", "aes-cbc-essiv:sha256", "aes-ctr-plain64"} {
		for j, bits := range []int{128, 192, 256} {
			if enc[4:7] == "xts" {
				if bits *= 2; bits == 384 {
					continue // OpenSSL has no such XTS
				}
			}
			for k, sector := range []int{512, 1024, 2048, 4096} {
				hash := []string{"sha256", "sha512", "sha1", "ripemd160", "sha224", "sha384"}[(i+j+k)%6]
				kinds = append(kinds, kind{enc, bits, sector, hash, (i+j+k)%2 == 0, []string{"pbkdf2", "argon2id", "argon2i"}[(i+k)%3]})
			}
		}
	}
	for i, k := range kinds {
		if i%9 != 0 && imagetest.Scale(1) == 1 {
			continue
		}
		t.Run(fmt.Sprintf("%s-%d-%d-%s-%t", k.encryption, k.bits, k.sector, k.hash, k.byCryptsetup), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path, key, second := filepath.Join(dir, "i"), keyFile(t, dir), filepath.Join(dir, "second")
			require.NoError(t, os.WriteFile(second, []byte("second"), 0o600))
			const size = 256 << 10
			slot := []string{"--pbkdf", k.kdf, "--pbkdf-force-iterations", "4"}
			if k.kdf == "pbkdf2" {
				slot[3] = "1000"
			} else {
				slot = append(slot, "--pbkdf-memory", "64", "--pbkdf-parallel", "1")
			}
			if k.byCryptsetup {
				run(t, "truncate", "-s", fmt.Sprint(16<<20+size), path)
				run(t, "cryptsetup", append([]string{"luksFormat", "-q", "--type", "luks2", "-c", k.encryption, "-s", fmt.Sprint(k.bits),
					"--hash", k.hash, "--sector-size", fmt.Sprint(k.sector), path, key}, slot...)...)
			} else {
				d, err := luks.Format(newFile(t, path), cheap(luks.FormatOptions{Encryption: k.encryption, KeySize: k.bits / 8,
					Hash: k.hash, SectorSize: k.sector, Size: size}))
				require.NoError(t, err)
				require.NoError(t, d.Close())
			}
			run(t, "cryptsetup", append([]string{"luksAddKey", "-q", "-d", key, path, second}, slot...)...)
			f := openFile(t, path)
			_, err := luks.AddKey(f, keyOptions("second", "third"))
			require.NoError(t, err)
			want := pattern(size, byte(i))
			for n, p := range []string{string(pass), "second", "third"} {
				d, err := luks.Open(shared{f}, &luks.Options{Passphrase: []byte(p)})
				require.NoError(t, err, p)
				require.Equal(t, n, d.Slot())
				require.Equal(t, k.encryption, d.Info().Encryption)
				_, err = d.WriteAt(want[n*1000:], int64(n)*1000)
				require.NoError(t, err)
			}
			require.NoError(t, f.Sync())
			require.NoError(t, f.Close())
			require.NoError(t, os.WriteFile(second, []byte("third"), 0o600))
			run(t, "cryptsetup", "reencrypt", "--decrypt", "--force-offline-reencrypt", "-q",
				"--header", filepath.Join(dir, "header"), path, "-d", second)
			got, err := os.ReadFile(path)
			require.NoError(t, err)
			requirePlain(t, want, got[:size])
		})
	}
}
