//go:build linux && amd64

package xts_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestARM64UnderQEMU runs this package's tests, built for arm64, in QEMU's
// user-mode emulator (Debian package qemu-user-static).
func TestARM64UnderQEMU(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "xts.test")
	build := exec.Command("go", "test", "-c", "-o", bin, ".")
	build.Env = append(os.Environ(), "GOARCH=arm64", "CGO_ENABLED=0")
	out, err := build.CombinedOutput()
	require.NoError(t, err, "%s", out)
	out, err = exec.Command("qemu-aarch64-static", bin, "-test.v", "-test.run",
		"TestKernelIsTested|TestVectors|TestSectorCounts|TestAlignment|TestMisusePanics|FuzzAgainstPeer").CombinedOutput()
	require.NoError(t, err, "%s", out)
	for _, name := range []string{"TestKernelIsTested", "TestVectors", "TestSectorCounts", "FuzzAgainstPeer"} {
		require.Contains(t, string(out), "--- PASS: "+name)
	}
}
