package kdf_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/kdf"
)

func TestDeriveMatchesRFC5869(t *testing.T) {
	// RFC 5869 written out with HMAC alone: no salt is 32 zero bytes.
	secret := bytes.Repeat([]byte{0x0b}, 22)
	prk := mac(make([]byte, 32), secret)
	info := append([]byte("purpose\x00"), 0xf0, 0xf1)
	t1 := mac(prk, info, []byte{1})
	t2 := mac(prk, t1, info, []byte{2})

	got, err := kdf.Derive(secret, "purpose", []byte{0xf0, 0xf1}, 42)
	require.NoError(t, err)
	require.Equal(t, append(t1, t2...)[:42], got)
}

func mac(key []byte, parts ...[]byte) []byte {
	h := hmac.New(sha256.New, key)
	for _, p := range parts {
		h.Write(p)
	}
	return h.Sum(nil)
}

func TestDeriveSeparates(t *testing.T) {
	secret := bytes.Repeat([]byte{7}, 32)
	seen := map[string]string{}
	for _, c := range []struct{ label, ctx string }{
		{"a", ""}, {"a", "\x00"}, {"a", "b"}, {"ab", ""}, {"b", ""}, {"b", "a"}, {"a", "b\x00"},
	} {
		k, err := kdf.Derive(secret, c.label, []byte(c.ctx), 32)
		require.NoError(t, err)
		require.NotContains(t, seen, string(k))
		seen[string(k)] = c.label
	}
}

func TestDeriveRefuses(t *testing.T) {
	ok := bytes.Repeat([]byte{7}, 32)
	for name, f := range map[string]func() ([]byte, error){
		"short secret":  func() ([]byte, error) { return kdf.Derive(ok[:15], "l", nil, 32) },
		"empty label":   func() ([]byte, error) { return kdf.Derive(ok, "", nil, 32) },
		"zero in label": func() ([]byte, error) { return kdf.Derive(ok, "a\x00b", nil, 32) },
		"no output":     func() ([]byte, error) { return kdf.Derive(ok, "l", nil, 0) },
		"negative":      func() ([]byte, error) { return kdf.Derive(ok, "l", nil, -1) },
		"too much":      func() ([]byte, error) { return kdf.Derive(ok, "l", nil, 255*32+1) },
	} {
		k, err := f()
		require.ErrorIs(t, err, kdf.ErrParams, name)
		require.Nil(t, k, name)
	}
	k, err := kdf.Derive(ok, "l", nil, 255*32)
	require.NoError(t, err)
	require.Len(t, k, 255*32)
}

// The values were computed with the reference implementation's command
// (Debian package argon2), for instance:
//
//	printf 'correct horse' | argon2 0123456789abcdef -id -t 1 -k 19456 -p 1 -l 32 -r
func TestArgon2idKnownAnswer(t *testing.T) {
	for _, c := range []struct {
		a    kdf.Argon2id
		want string
	}{
		{kdf.MinArgon2id(), "da1f119248558e939c5596fb4499eba8db11b53ed24d852fb521f5236c09fa9d"},
		{kdf.DefaultArgon2id(), "2f56f5363a695288ff28810e46ad69a1fe3068bc6494cd26a8a673b7d9c2b0a2"},
	} {
		k, err := c.a.Key([]byte("correct horse"), []byte("0123456789abcdef"))
		require.NoError(t, err)
		require.Equal(t, c.want, hex.EncodeToString(k))
	}
}

func TestValidate(t *testing.T) {
	gib := uint32(1 << 20)
	for _, c := range []struct {
		name   string
		a      kdf.Argon2id
		budget *kdf.Budget
		want   error
	}{
		{"default", kdf.DefaultArgon2id(), nil, nil},
		{"least", kdf.MinArgon2id(), nil, nil},
		{"one KiB below the least", kdf.Argon2id{kdf.MinMemoryKiB - 1, 1, 1}, nil, kdf.ErrParams},
		{"zero value", kdf.Argon2id{}, nil, kdf.ErrParams},
		{"no passes", kdf.Argon2id{64 << 10, 0, 1}, nil, kdf.ErrParams},
		{"too many passes", kdf.Argon2id{kdf.MinMemoryKiB, kdf.MaxTime + 1, 1}, nil, kdf.ErrParams},
		{"no lanes", kdf.Argon2id{64 << 10, 3, 0}, nil, kdf.ErrParams},
		{"16 lanes", kdf.Argon2id{64 << 10, 3, 16}, nil, nil},
		{"17 lanes", kdf.Argon2id{64 << 10, 3, 17}, nil, kdf.ErrParams},
		{"1 GiB", kdf.Argon2id{gib, 1, 1}, nil, nil},
		{"1 GiB and a KiB", kdf.Argon2id{gib + 1, 1, 1}, nil, kdf.ErrBudget},
		{"1 GiB, 16 passes", kdf.Argon2id{gib, 16, 1}, nil, nil},
		{"1 GiB, 17 passes", kdf.Argon2id{gib, 17, 1}, nil, kdf.ErrBudget},
		{"most memory", kdf.Argon2id{^uint32(0), 1, 1}, nil, kdf.ErrParams},
		{"everything at the most", kdf.Argon2id{^uint32(0), ^uint32(0), 255}, nil, kdf.ErrParams},
		{"larger budget", kdf.Argon2id{2 * gib, 1, 4}, &kdf.Budget{MemoryKiB: 2 * gib}, nil},
		{"smaller budget", kdf.DefaultArgon2id(), &kdf.Budget{MemoryKiB: 32 << 10}, kdf.ErrBudget},
		{"less work", kdf.DefaultArgon2id(), &kdf.Budget{Work: 3*64<<10 - 1}, kdf.ErrBudget},
		{"just the work", kdf.DefaultArgon2id(), &kdf.Budget{Work: 3 * 64 << 10}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			require.ErrorIs(t, c.a.Validate(c.budget), c.want)
		})
	}
}

func TestKeyRefusesBeforeAllocating(t *testing.T) {
	salt := make([]byte, 16)
	allocs := testing.AllocsPerRun(1, func() {
		_, err := kdf.Argon2id{^uint32(0), ^uint32(0), 255}.Key([]byte("x"), salt)
		require.ErrorIs(t, err, kdf.ErrParams)
	})
	require.Less(t, allocs, 100.0)
	for _, pass := range [][]byte{nil, make([]byte, kdf.MaxPassphrase+1)} {
		k, err := kdf.MinArgon2id().Key(pass, salt)
		require.ErrorIs(t, err, kdf.ErrParams)
		require.Nil(t, k)
	}
	_, err := kdf.MinArgon2id().Key([]byte("x"), salt[:15])
	require.ErrorIs(t, err, kdf.ErrParams)
}
