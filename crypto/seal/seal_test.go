package seal_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/seal"
)

func key(t testing.TB, b byte) *seal.Key {
	k, err := seal.NewKey(bytes.Repeat([]byte{b}, 32))
	require.NoError(t, err)
	return k
}

func scale() int {
	if n, err := strconv.Atoi(os.Getenv("NVSTORE_SCALE")); err == nil && n > 0 {
		return n
	}
	return 1
}

// sealByHand writes the construction out with the standard library alone, as
// the package comment gives it.
func sealByHand(t *testing.T, key, salt, context, plaintext []byte) (ct []byte, box seal.Box) {
	info := "nvstore.dev/seal@v1+AEAD_AES_256_GCM\x00" + string(salt) + string(context)
	okm, err := hkdf.Expand(sha256.New, key, info, 32+12+32)
	require.NoError(t, err)
	block, err := aes.NewCipher(okm[:32])
	require.NoError(t, err)
	gcm, err := cipher.NewGCM(block)
	require.NoError(t, err)
	out := gcm.Seal(nil, okm[32:44], plaintext, nil)
	copy(box.Salt[:], salt)
	copy(box.Commitment[:], okm[44:])
	copy(box.Tag[:], out[len(plaintext):])
	return out[:len(plaintext)], box
}

// The pinned bytes, which were computed with Python's hmac and cryptography
// modules, are the format. If this test fails, every sealed store that
// exists has become unreadable.
func TestKnownAnswer(t *testing.T) {
	salt := make([]byte, 24)
	for i := range salt {
		salt[i] = byte(i)
	}
	for _, c := range []struct{ context, plaintext, ct, commitment, tag string }{
		{"", "", "", "f8c65267c3adf5cd5ca4cef10d9a29555c5953358b12e9d93a373bb715976240", "e450528606980a9b1c2f589c58ff8f7e"},
		{"context", "TPM state, sixteen bytes and more", "1353a5a4de7a79f1a5839d460dcc2d2ee96827b37ad1f5f0980be4e55856087e3b", "7768d02f7ea0bd68aff3c31f5d039f999bcacdf2d6c3b8ec7b0f1d9443017ab5", "d07e207074e45834d1b886495390158f"},
	} {
		restore := seal.SetRand(bytes.NewReader(salt))
		ct, box, err := key(t, 0x42).Seal(nil, []byte(c.plaintext), []byte(c.context))
		restore()
		require.NoError(t, err)

		wantCT, wantBox := sealByHand(t, bytes.Repeat([]byte{0x42}, 32), salt, []byte(c.context), []byte(c.plaintext))
		require.Equal(t, hex.EncodeToString(wantCT), hex.EncodeToString(ct))
		require.Equal(t, wantBox, box)

		require.Equal(t, c.ct, hex.EncodeToString(ct))
		require.Equal(t, c.commitment, hex.EncodeToString(box.Commitment[:]))
		require.Equal(t, c.tag, hex.EncodeToString(box.Tag[:]))

		plain, err := key(t, 0x42).Open(nil, ct, &box, []byte(c.context))
		require.NoError(t, err)
		require.Equal(t, c.plaintext, string(plain))
	}
}

func TestRoundTripAndDst(t *testing.T) {
	k := key(t, 1)
	ctx := []byte("ctx")
	for _, n := range []int{0, 1, 15, 16, 17, 31, 4095, 4096, 4097, 6 << 10, 64 << 10, 143 << 10, 1<<20 + 1} {
		plain := make([]byte, n)
		rand.Read(plain)
		for _, spare := range []int{-1, 0, 1, 15, 16, 100} {
			t.Run(fmt.Sprintf("%d bytes, spare %d", n, spare), func(t *testing.T) {
				var dst []byte
				guard := []byte{}
				if spare >= 0 {
					buf := bytes.Repeat([]byte{0xA5}, 3+n+spare)
					dst, guard = buf[:3], buf[3+n:]
				}
				ct, box, err := k.Seal(dst, plain, ctx)
				require.NoError(t, err)
				require.Len(t, ct, len(dst)+n)
				require.True(t, bytes.Equal(dst, ct[:len(dst)]))
				require.Equal(t, bytes.Repeat([]byte{0xA5}, len(guard)), guard, "wrote past the result")

				ct = ct[len(dst):]
				if spare >= 0 {
					buf := bytes.Repeat([]byte{0x5A}, 3+n+spare)
					dst, guard = buf[:3], buf[3+n:]
				}
				got, err := k.Open(dst, ct, &box, ctx)
				require.NoError(t, err)
				require.True(t, bytes.Equal(plain, got[len(dst):]))
				require.Equal(t, bytes.Repeat([]byte{0x5A}, len(guard)), guard, "wrote past the result")
			})
		}
	}
}

func TestInPlace(t *testing.T) {
	k := key(t, 1)
	plain := bytes.Repeat([]byte("nvram "), 1000)

	// Append form over the same storage, with other bytes right behind.
	buf := append(bytes.Clone(plain), "the next chunk's"...)
	ct, box, err := k.Seal(buf[:0], buf[:len(plain)], nil)
	require.NoError(t, err)
	require.Same(t, &buf[0], &ct[0])
	require.Equal(t, "the next chunk's", string(buf[len(plain):]))
	got, err := k.Open(ct[:0], ct, &box, nil)
	require.NoError(t, err)
	require.Equal(t, plain, got)
	require.Equal(t, "the next chunk's", string(buf[len(plain):]))

	// Form without a copy.
	buf = append(bytes.Clone(plain), make([]byte, seal.TagSize)...)
	box, err = k.SealInPlace(buf, nil)
	require.NoError(t, err)
	require.Equal(t, box.Tag[:], buf[len(plain):])
	clear(buf[len(plain):]) // a reader only has the ciphertext
	got, err = k.OpenInPlace(buf, &box, nil)
	require.NoError(t, err)
	require.Equal(t, plain, got)

	for n := range seal.TagSize {
		_, err = k.SealInPlace(make([]byte, n), nil)
		require.ErrorIs(t, err, seal.ErrTooLong)
		got, err = k.OpenInPlace(make([]byte, n), &box, nil)
		require.Equal(t, seal.ErrAuth, err)
		require.Nil(t, got)
	}
}

// Every single bit of what a reader is given counts.
func TestEveryBitCounts(t *testing.T) {
	k := key(t, 1)
	plain, context := []byte("forty-one bytes of TPM permanent state..."), []byte("uuid, blob, chunk")
	ct, box, err := k.Seal(nil, plain, context)
	require.NoError(t, err)

	flip := func(name string, b []byte) {
		for i := range len(b) * 8 {
			b[i/8] ^= 1 << (i % 8)
			dst := bytes.Repeat([]byte{0xEE}, len(plain))
			got, err := k.Open(dst[:0], ct, &box, context)
			require.Equal(t, seal.ErrAuth, err, "%s bit %d", name, i)
			require.Nil(t, got, "%s bit %d", name, i)
			require.Equal(t, bytes.Repeat([]byte{0xEE}, len(plain)), dst, "dst touched")
			b[i/8] ^= 1 << (i % 8)
		}
	}
	flip("ciphertext", ct)
	flip("salt", box.Salt[:])
	flip("commitment", box.Commitment[:])
	flip("tag", box.Tag[:])
	flip("context", context)

	got, err := k.Open(nil, ct, &box, context)
	require.NoError(t, err, "the flips were not undone")
	require.Equal(t, plain, got)
}

func TestMismatches(t *testing.T) {
	k := key(t, 1)
	ct, box, err := k.Seal(nil, []byte("A's state"), []byte("blob A"))
	require.NoError(t, err)
	ctB, boxB, err := k.Seal(nil, []byte("B's state"), []byte("blob B"))
	require.NoError(t, err)

	mixed := box
	mixed.Tag = boxB.Tag
	for name, f := range map[string]func() ([]byte, error){
		"wrong key":         func() ([]byte, error) { return key(t, 2).Open(nil, ct, &box, []byte("blob A")) },
		"context of B":      func() ([]byte, error) { return k.Open(nil, ct, &box, []byte("blob B")) },
		"blob moved":        func() ([]byte, error) { return k.Open(nil, ctB, &boxB, []byte("blob A")) },
		"box of B":          func() ([]byte, error) { return k.Open(nil, ct, &boxB, []byte("blob A")) },
		"ciphertext of B":   func() ([]byte, error) { return k.Open(nil, ctB, &box, []byte("blob A")) },
		"tag of B":          func() ([]byte, error) { return k.Open(nil, ct, &mixed, []byte("blob A")) },
		"no context":        func() ([]byte, error) { return k.Open(nil, ct, &box, nil) },
		"longer context":    func() ([]byte, error) { return k.Open(nil, ct, &box, []byte("blob A\x00")) },
		"one byte short":    func() ([]byte, error) { return k.Open(nil, ct[:len(ct)-1], &box, []byte("blob A")) },
		"one byte more":     func() ([]byte, error) { return k.Open(nil, append(ct[:len(ct):len(ct)], 0), &box, []byte("blob A")) },
		"nothing":           func() ([]byte, error) { return k.Open(nil, nil, &box, []byte("blob A")) },
		"no box":            func() ([]byte, error) { return k.Open(nil, ct, nil, []byte("blob A")) },
		"zero box":          func() ([]byte, error) { return k.Open(nil, ct, &seal.Box{}, []byte("blob A")) },
		"in place, short":   func() ([]byte, error) { return k.OpenInPlace(bytes.Clone(ct), &box, []byte("blob A")) },
		"in place, context": func() ([]byte, error) { return k.OpenInPlace(append(bytes.Clone(ct), make([]byte, 16)...), &box, nil) },
	} {
		got, err := f()
		require.Equal(t, seal.ErrAuth, err, name)
		require.Nil(t, got, name)
	}
}

// A ciphertext that opens under two keys is what a commitment prevents: with
// GCM alone one can be made. Here the commitment is the other key's, and the
// rest untouched.
func TestCommitmentIsChecked(t *testing.T) {
	salt := make([]byte, 24)
	ct, box := sealByHand(t, bytes.Repeat([]byte{1}, 32), salt, nil, []byte("plain"))
	_, other := sealByHand(t, bytes.Repeat([]byte{2}, 32), salt, nil, []byte("plain"))
	got, err := key(t, 1).Open(nil, ct, &box, nil)
	require.NoError(t, err)
	require.Equal(t, "plain", string(got))

	box.Commitment = other.Commitment
	for b := byte(1); b <= 2; b++ {
		got, err = key(t, b).Open(nil, ct, &box, nil)
		require.Equal(t, seal.ErrAuth, err)
		require.Nil(t, got)
	}
}

func TestKeySize(t *testing.T) {
	for _, n := range []int{0, 16, 31, 33, 64} {
		k, err := seal.NewKey(make([]byte, n))
		require.ErrorIs(t, err, seal.ErrKeySize)
		require.Nil(t, k)
	}
}

func TestNoRandomness(t *testing.T) {
	broken := errors.New("no entropy")
	for _, r := range []*failing{{err: broken}, {left: 23, err: broken}} {
		restore := seal.SetRand(r)
		buf := []byte("plain")
		ct, box, err := key(t, 1).Seal(nil, buf, nil)
		restore()
		require.ErrorIs(t, err, broken)
		require.Nil(t, ct)
		require.Zero(t, box)
		require.Equal(t, "plain", string(buf))
	}
}

type failing struct {
	left int
	err  error
}

func (f *failing) Read(p []byte) (int, error) {
	if f.left == 0 {
		return 0, f.err
	}
	n := min(f.left, len(p))
	f.left -= n
	return n, nil
}

// A repeated salt would be a repeated key and nonce.
func TestSaltsDoNotRepeat(t *testing.T) {
	k := key(t, 1)
	n := 200_000 * scale()
	seen := make(map[[seal.SaltSize]byte]struct{}, n)
	for range n {
		_, box, err := k.Seal(nil, nil, nil)
		require.NoError(t, err)
		seen[box.Salt] = struct{}{}
	}
	require.Len(t, seen, n)
}

func TestConcurrentUse(t *testing.T) {
	k := key(t, 1)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			plain := bytes.Repeat([]byte{byte(g)}, 1000+g)
			for i := range 200 {
				ctx := []byte{byte(g), byte(i)}
				ct, box, err := k.Seal(nil, plain, ctx)
				if err != nil {
					t.Error(err)
					return
				}
				got, err := k.Open(nil, ct, &box, ctx)
				if err != nil || !bytes.Equal(got, plain) {
					t.Errorf("goroutine %d, round %d: %v", g, i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestKeysDoNotPrint(t *testing.T) {
	raw := []byte("0123456789abcdefFEDCBA9876543210")
	k, err := seal.NewKey(raw)
	require.NoError(t, err)
	m, err := seal.NewMAC(raw)
	require.NoError(t, err)
	k.Seal(nil, nil, nil)
	m.Sum(nil)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%d"} {
		require.Equal(t, "seal.Key(redacted)", fmt.Sprintf(verb, k))
		require.Equal(t, "seal.MAC(redacted)", fmt.Sprintf(verb, m))
	}
}
