package seal_test

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/seal"
)

func TestMACIsHMAC(t *testing.T) {
	k := bytes.Repeat([]byte{3}, 32)
	m, err := seal.NewMAC(k)
	require.NoError(t, err)
	for range 3 { // the second and third use take the cached states
		for _, parts := range [][][]byte{nil, {nil}, {[]byte("a")}, {[]byte("ab"), []byte("c")}, {make([]byte, 5000)}} {
			h := hmac.New(sha256.New, k)
			for _, p := range parts {
				h.Write(p)
			}
			want := h.Sum(nil)
			require.Equal(t, want, m.Sum(nil, parts...))
			require.Equal(t, append([]byte("dst"), want...), m.Sum([]byte("dst"), parts...))
			require.True(t, m.Verify(want, parts...))
		}
	}
}

func TestMACVerifyRefuses(t *testing.T) {
	m, err := seal.NewMAC(bytes.Repeat([]byte{3}, 32))
	require.NoError(t, err)
	sum := m.Sum(nil, []byte("root"))
	for i := range len(sum) * 8 {
		sum[i/8] ^= 1 << (i % 8)
		require.False(t, m.Verify(sum, []byte("root")), "bit %d", i)
		sum[i/8] ^= 1 << (i % 8)
	}
	require.True(t, m.Verify(sum, []byte("root")))
	require.True(t, m.Verify(sum, []byte("ro"), []byte("ot")), "parts are concatenated")
	require.False(t, m.Verify(sum[:31], []byte("root")))
	require.False(t, m.Verify(append(sum, 0), []byte("root")))
	require.False(t, m.Verify(nil, []byte("root")))
	other, err := seal.NewMAC(bytes.Repeat([]byte{4}, 32))
	require.NoError(t, err)
	require.False(t, other.Verify(sum, []byte("root")))
	for _, n := range []int{0, 31, 33} {
		m, err := seal.NewMAC(make([]byte, n))
		require.ErrorIs(t, err, seal.ErrKeySize)
		require.Nil(t, m)
	}
}

func TestMACConcurrentUse(t *testing.T) {
	m, err := seal.NewMAC(bytes.Repeat([]byte{3}, 32))
	require.NoError(t, err)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			p := []byte{byte(g)}
			want := m.Sum(nil, p)
			for range 1000 {
				if !m.Verify(want, p) {
					t.Error("sum changed under concurrent use")
					return
				}
			}
		})
	}
	wg.Wait()
}
