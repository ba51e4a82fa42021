package luks_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/image"
	"nvstore.dev/image/luks"
)

// keyFile writes the passphrase for cryptsetup.
func keyFile(t testing.TB, dir string) string {
	t.Helper()
	path := filepath.Join(dir, "key")
	require.NoError(t, os.WriteFile(path, pass, 0o600))
	return path
}

// TestCryptsetupOpens has cryptsetup open what Format makes. It checks the
// passphrase and the volume key's digest, and takes the header apart.
func TestCryptsetupOpens(t *testing.T) {
	for _, o := range []luks.FormatOptions{
		{Version: 1},
		{Version: 1, Encryption: "aes-cbc-essiv:sha256", Hash: "sha1"},
		{Version: 1, Encryption: "aes-cbc-plain64", KeySize: 24, Hash: "sha512"},
		{Version: 1, Encryption: "aes-ctr-plain64", KeySize: 16, Hash: "ripemd160"},
		{Version: 2},
		{Version: 2, SectorSize: 4096, Hash: "sha512"},
		{Version: 2, Encryption: "aes-cbc-essiv:sha256", KeySize: 32},
		{Version: 2, Argon2id: kdf.MinArgon2id()},
	} {
		t.Run(fmt.Sprintf("v%d %s %d", o.Version, o.Encryption, o.SectorSize), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path, key := filepath.Join(dir, "i"), keyFile(t, dir)
			o.Size = 1 << 20
			d, err := luks.Format(newFile(t, path), cheap(o))
			require.NoError(t, err)
			require.NoError(t, d.Close())
			run(t, "cryptsetup", "open", "--test-passphrase", path, "-d", key)
			require.NoError(t, os.WriteFile(key, []byte("wrong"), 0o600))
			require.Contains(t, fails(t, "cryptsetup", "open", "--test-passphrase", path, "-d", key), "No key available")
			run(t, "cryptsetup", "luksDump", path)
		})
	}
}

// TestOpensCryptsetup opens what cryptsetup makes.
func TestOpensCryptsetup(t *testing.T) {
	for _, args := range []string{
		"--type luks1 -c aes-xts-plain64 -s 512 -h sha256",
		"--type luks1 -c aes-xts-plain64 -s 256 -h sha512",
		"--type luks1 -c aes-cbc-essiv:sha256 -s 256 -h sha1",
		"--type luks1 -c aes-cbc-plain64 -s 192 -h sha256", // makes QEMU 7.2 abort
		"--type luks1 -c aes-cbc-plain -s 128 -h ripemd160",
		"--type luks1 -c aes-ctr-plain64 -s 256 -h sha224",
		"--type luks2 --pbkdf pbkdf2 -c aes-xts-plain64 -s 512 --sector-size 512",
		"--type luks2 --pbkdf pbkdf2 -c aes-xts-plain64 -s 256 --sector-size 4096 -h sha512",
		"--type luks2 --pbkdf pbkdf2 -c aes-cbc-essiv:sha256 -s 256 --sector-size 2048",
		"--type luks2 --pbkdf argon2i --pbkdf-memory 40 --pbkdf-parallel 1",
		"--type luks2 --pbkdf argon2id --pbkdf-memory 65 --pbkdf-parallel 2",
		"--type luks2 --pbkdf argon2id --pbkdf-memory 8192 --pbkdf-parallel 4 --luks2-metadata-size 128k",
	} {
		t.Run(args, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path, key := filepath.Join(dir, "i"), keyFile(t, dir)
			require.NoError(t, os.WriteFile(path, nil, 0o600))
			require.NoError(t, os.Truncate(path, 20<<20))
			n := "1000"
			if strings.Contains(args, "argon2") {
				n = "4"
			}
			all := append([]string{"luksFormat", "-q", "--pbkdf-force-iterations", n}, strings.Fields(args)...)
			run(t, "cryptsetup", append(all, path, key)...)
			f := openFile(t, path)
			defer f.Close()
			d, err := luks.Open(shared{f}, &luks.Options{Passphrase: pass})
			require.NoError(t, err)
			require.NoError(t, d.Info().Damaged)
			require.Len(t, d.Info().Slots, 1)
			require.EqualValues(t, 20<<20, d.Size()+d.Info().PayloadOffset)
			_, err = luks.Open(shared{f}, &luks.Options{Passphrase: []byte("wrong")})
			require.ErrorIs(t, err, luks.ErrPassphrase)
		})
	}
}

// TestCryptsetupPayload compares LUKS2 payloads: cryptsetup decrypts the image
// in place, with its own code and without the kernel. It moves the payload to
// where the header was.
func TestCryptsetupPayload(t *testing.T) {
	for _, o := range []luks.FormatOptions{
		{SectorSize: 512},
		{SectorSize: 4096},
		{SectorSize: 2048, Encryption: "aes-cbc-essiv:sha256"},
	} {
		t.Run(fmt.Sprintf("%s %d", o.Encryption, o.SectorSize), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path, key := filepath.Join(dir, "i"), keyFile(t, dir)
			o.Size = 1 << 20
			d, err := luks.Format(newFile(t, path), cheap(o))
			require.NoError(t, err)
			want := pattern(1<<20, 9)
			_, err = d.WriteAt(want, 0)
			require.NoError(t, err)
			require.NoError(t, d.Sync())
			require.NoError(t, d.Close())
			run(t, "cryptsetup", "reencrypt", "--decrypt", "--force-offline-reencrypt", "-q",
				"--header", filepath.Join(dir, "header"), path, "-d", key)
			got, err := os.ReadFile(path)
			require.NoError(t, err)
			requirePlain(t, want, got[:1<<20])
		})
	}
}

// TestCryptsetupDetached has headers of each in a file of their own.
func TestCryptsetupDetached(t *testing.T) {
	for _, version := range []int{1, 2} {
		dir := t.TempDir()
		data, head, key := filepath.Join(dir, "data"), filepath.Join(dir, "head"), keyFile(t, dir)
		require.NoError(t, os.WriteFile(data, make([]byte, 1<<20), 0o600))
		args := []string{"luksFormat", "-q", "--type", fmt.Sprintf("luks%d", version), "--pbkdf-force-iterations", "1000", "--header", head}
		if version == 2 {
			args = append(args, "--pbkdf", "pbkdf2")
		}
		run(t, "cryptsetup", append(args, data, key)...)
		h := openFile(t, head)
		d, err := luks.Open(openFile(t, data), &luks.Options{Passphrase: pass, Header: h})
		require.NoError(t, err)
		require.EqualValues(t, 1<<20, d.Size())
		require.NoError(t, d.Close())
		require.NoError(t, h.Close())

		h2 := newFile(t, head+"2")
		d, err = luks.Format(openFile(t, data), cheap(luks.FormatOptions{Version: version, Header: h2}))
		require.NoError(t, err)
		require.NoError(t, d.Close())
		require.NoError(t, h2.Close())
		run(t, "cryptsetup", "open", "--test-passphrase", "--header", head+"2", data, "-d", key)
	}
}

// TestCryptsetupRepairs damages each of the two headers that Format makes:
// this package reads on and says so, and cryptsetup restores the damaged one.
func TestCryptsetupRepairs(t *testing.T) {
	for _, at := range []int64{0, 16 << 10} {
		dir := t.TempDir()
		path, key := filepath.Join(dir, "i"), keyFile(t, dir)
		d, err := luks.Format(newFile(t, path), cheap(luks.FormatOptions{Size: 1 << 20}))
		require.NoError(t, err)
		require.NoError(t, d.Close())
		f := openFile(t, path)
		_, err = f.WriteAt([]byte("damage"), at+5000)
		require.NoError(t, err)
		d, err = luks.Open(shared{f}, &luks.Options{Passphrase: pass})
		require.NoError(t, err)
		require.ErrorIs(t, d.Info().Damaged, image.ErrCorrupt)
		require.NoError(t, f.Close())

		run(t, "cryptsetup", "open", "--test-passphrase", path, "-d", key)
		d, err = luks.Open(openFile(t, path), &luks.Options{Passphrase: pass})
		require.NoError(t, err)
		require.NoError(t, d.Info().Damaged, "cryptsetup repaired it")
		require.NoError(t, d.Close())
	}
}

// TestReencryption refuses an image that cryptsetup has begun to reencrypt.
func TestReencryption(t *testing.T) {
	dir := t.TempDir()
	path, key := filepath.Join(dir, "i"), keyFile(t, dir)
	d, err := luks.Format(newFile(t, path), cheap(luks.FormatOptions{Size: 1 << 20}))
	require.NoError(t, err)
	require.NoError(t, d.Close())
	run(t, "cryptsetup", "reencrypt", "-q", "--init-only", "--force-offline-reencrypt",
		"--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", path, "-d", key)
	f := openFile(t, path)
	defer f.Close()
	_, err = luks.Open(shared{f}, &luks.Options{Passphrase: pass})
	require.ErrorIs(t, err, image.ErrUnsupported)
	require.ErrorContains(t, err, "reencrypt")
}

// TestTokens keeps what cryptsetup stores beside key slots visible.
func TestTokens(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "i")
	d, err := luks.Format(newFile(t, path), cheap(luks.FormatOptions{Size: 1 << 20}))
	require.NoError(t, err)
	require.NoError(t, d.Close())
	token := filepath.Join(dir, "token")
	require.NoError(t, os.WriteFile(token, []byte(`{"type":"test-kind","keyslots":["0"],"more":{"a":[1,2]}}`), 0o600))
	run(t, "cryptsetup", "token", "import", "--json-file", token, path)
	f := openFile(t, path)
	defer f.Close()
	i, err := luks.Inspect(f)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"0": "test-kind"}, i.Tokens)
}
