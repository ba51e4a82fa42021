//go:build (amd64 || arm64) && !purego

package xts_test

import (
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/xts"
)

// TestKernelIsTested fails on a machine without AES instructions, where the
// other tests would be of the generic code alone.
func TestKernelIsTested(t *testing.T) {
	require.True(t, xts.Accelerated())
}
