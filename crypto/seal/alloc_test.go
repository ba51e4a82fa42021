//go:build !race

package seal_test

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/seal"
)

// Under the race detector a sync.Pool drops items at random.

func TestMACDoesNotAllocate(t *testing.T) {
	m, err := seal.NewMAC(bytes.Repeat([]byte{3}, 32))
	require.NoError(t, err)
	p, sum := make([]byte, 300), make([]byte, 0, 32)
	parts := [][]byte{p, p}
	require.LessOrEqual(t, testing.AllocsPerRun(200, func() {
		sum = m.Sum(sum[:0], parts...)
		m.Verify(sum, parts...)
	}), 1.0)
}
