package luks_test

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/raw"
)

// run runs a peer (Debian packages qemu-utils, cryptsetup-bin).
func run(t testing.TB, name string, args ...string) {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.NoError(t, err, "%s %q: %s", name, args, out)
}

// fails runs a peer that should refuse.
func fails(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	require.Error(t, err, "%s %q: %s", name, args, out)
	return string(out)
}

func openFile(t testing.TB, path string) image.Device {
	t.Helper()
	d, err := raw.Open(path, nil)
	require.NoError(t, err)
	return d
}

// newFile makes an empty file and opens it.
func newFile(t testing.TB, path string) image.Device {
	t.Helper()
	require.NoError(t, os.WriteFile(path, nil, 0o600))
	return openFile(t, path)
}

func qemuLUKS(path string) string { return "driver=luks,key-secret=s,file.filename=" + path }

func qemuSecret() string { return "secret,id=s,data=" + string(pass) }

// readAll reads the payload of the image at path with this package.
func readAll(t testing.TB, path string, o luks.Options) []byte {
	t.Helper()
	o.Passphrase = pass
	d, err := luks.Open(openFile(t, path), &o)
	require.NoError(t, err)
	defer d.Close()
	p := make([]byte, d.Size())
	require.NoError(t, image.ReadFull(d, p, 0))
	return p
}

// requirePlain compares without printing megabytes.
func requirePlain(t testing.TB, want, got []byte) {
	t.Helper()
	require.Equal(t, len(want), len(got))
	require.True(t, bytes.Equal(want, got), "payloads differ")
}

const payload = 200 << 10

// qemuMeasuring runs qemu-img, again if QEMU finds that its clock is too
// coarse to measure itself by.
func qemuMeasuring(t testing.TB, verb string, args ...string) {
	t.Helper()
	for range 50 {
		out, err := exec.Command("qemu-img", append([]string{verb, "-q"}, args...)...).CombinedOutput()
		if err == nil {
			return
		}
		require.Contains(t, string(out), "accurate CPU usage")
	}
	t.Fatal("QEMU can't measure its speed here")
}

// A kind is a cipher, mode, IV, hash and key size that QEMU has too.
type kind struct {
	cipher, mode, iv, ivHash, hash string
	bits                           int
}

func (k kind) encryption() string {
	iv := k.iv
	if k.ivHash != "" {
		iv += ":" + k.ivHash
	}
	return fmt.Sprintf("%s-%s-%s", k.cipher, k.mode, iv)
}

func (k kind) keySize() int {
	if k.mode == "xts" {
		return k.bits / 4
	}
	return k.bits / 8
}

// qemuOptions are for a new image.
func (k kind) qemuOptions() string {
	o := fmt.Sprintf("key-secret=s,cipher-alg=%s-%d,cipher-mode=%s,ivgen-alg=%s,hash-alg=%s,iter-time=10",
		k.cipher, k.bits, k.mode, k.iv, k.hash)
	if k.ivHash != "" {
		o += ",ivgen-hash-alg=" + k.ivHash
	}
	return o
}

// qemuKinds are all ciphers with all modes, IVs and key sizes, and each hash
// once, but for those that make QEMU 7.2 abort or that it refuses.
func qemuKinds() []kind {
	var kinds []kind
	for _, cipher := range []string{"aes", "serpent", "twofish", "cast5"} {
		for _, bits := range []int{128, 192, 256} {
			if cipher == "cast5" && bits != 128 {
				continue
			}
			for _, iv := range [][2]string{{"plain64", ""}, {"plain", ""}, {"essiv", "sha256"}, {"essiv", "md5"}} {
				if cipher == "cast5" && iv[0] == "essiv" {
					continue // QEMU has none
				}
				for _, mode := range []string{"xts", "cbc", "ctr"} {
					if mode == "xts" && cipher == "cast5" || mode != "xts" && bits == 192 {
						continue // blocks too short; abort
					}
					kinds = append(kinds, kind{cipher, mode, iv[0], iv[1], "sha256", bits})
				}
			}
			if bits != 192 {
				kinds = append(kinds, kind{cipher, "ecb", "plain64", "", "sha512", bits})
			}
		}
	}
	for _, hash := range []string{"sha1", "sha224", "sha384", "sha512", "md5", "ripemd160"} {
		kinds = append(kinds, kind{"aes", "xts", "plain64", "", hash, 256})
	}
	return kinds
}

// TestQEMU has QEMU open what Format makes, for each kind that both have, with
// the passphrase of the second of two key slots, and compares every byte. The
// reverse costs QEMU a second of measuring its own speed each, so it is for one
// in sixteen of them, or all with NVSTORE_SCALE.
func TestQEMU(t *testing.T) {
	for i, k := range qemuKinds() {
		t.Run(fmt.Sprintf("%s-%d-%s", k.encryption(), k.bits, k.hash), func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			path := func(name string) string { return filepath.Join(dir, name) }
			want := pattern(payload, byte(k.bits)^k.mode[0])
			require.NoError(t, os.WriteFile(path("plain"), want, 0o600))
			if i%16 == 0 || imagetest.Scale(1) > 1 {
				qemuMeasuring(t, "create", "--object", qemuSecret(), "-f", "luks", "-o", k.qemuOptions(), path("q"), fmt.Sprint(payload))
				run(t, "qemu-img", "convert", "--object", qemuSecret(), "-n", "-f", "raw", path("plain"),
					"--target-image-opts", qemuLUKS(path("q")))
				requirePlain(t, want, readAll(t, path("q"), luks.Options{}))
			}

			f := newFile(t, path("n"))
			d, err := luks.Format(shared{f}, cheap(luks.FormatOptions{Passphrase: []byte("first"),
				Version: 1, Encryption: k.encryption(), KeySize: k.keySize(), Hash: k.hash, Size: payload,
			}))
			require.NoError(t, err)
			_, err = luks.AddKey(f, keyOptions("first", string(pass)))
			require.NoError(t, err)
			_, err = d.WriteAt(want[1000:], 1000)
			require.NoError(t, err)
			_, err = d.WriteAt(want[:1000], 0)
			require.NoError(t, err)
			require.NoError(t, f.Close())
			run(t, "qemu-img", "convert", "--object", qemuSecret(), "--image-opts", qemuLUKS(path("n")), "-O", "raw", path("back"))
			got, err := os.ReadFile(path("back"))
			require.NoError(t, err)
			requirePlain(t, want, got)
		})
	}
}

// TestQEMUKeySlots opens an image with a passphrase that QEMU added.
func TestQEMUKeySlots(t *testing.T) {
	path := filepath.Join(t.TempDir(), "i")
	d, err := luks.Format(newFile(t, path), cheap(luks.FormatOptions{Version: 1, Size: 1 << 20}))
	require.NoError(t, err)
	require.NoError(t, d.Close())
	for _, add := range []string{"second", "third"} {
		qemuMeasuring(t, "amend", "--object", qemuSecret(), "--object", "secret,id=n,data="+add, "--image-opts",
			qemuLUKS(path), "-o", "state=active,new-secret=n,iter-time=10")
	}
	f := openFile(t, path)
	defer f.Close()
	for n, p := range []string{string(pass), "second", "third"} {
		d, err := luks.Open(shared{f}, &luks.Options{Passphrase: []byte(p)})
		require.NoError(t, err)
		require.Equal(t, n, d.Slot())
		require.Len(t, d.Info().Slots, 3)
		_, err = luks.Open(shared{f}, &luks.Options{Passphrase: []byte(p), Slots: []int{(n + 1) % 3}})
		require.ErrorIs(t, err, luks.ErrPassphrase)
	}
}
