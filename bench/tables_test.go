package bench

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

var tables = flag.Bool("tables", false, "measure in earnest and print tables; without, a few operations of each")

func TestMain(m *testing.M) {
	if work := os.Getenv(childEnv); work != "" {
		os.Exit(child(work))
	}
	os.Exit(m.Run())
}

// directory returns a new directory on the disk to be measured.
func directory(t *testing.T) string {
	t.Helper()
	top := os.Getenv("NVSTORE_BENCH_DIR")
	if top == "" {
		top = filepath.Join("..", "tmp")
	}
	require.NoError(t, os.MkdirAll(top, 0o755))
	dir, err := os.MkdirTemp(top, "bench")
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	return dir
}

// built builds a program into a folder, as it is shipped, and returns its path.
func built(t *testing.T, dir, program string) string {
	t.Helper()
	path := filepath.Join(dir, program)
	cmd := exec.Command("go", "build", "-trimpath", "-o", path, "../cmd/"+program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return path
}

// scale chooses between measuring in earnest and a look whether it works.
func scale[T any](earnest, quick T) T {
	if *tables {
		return earnest
	}
	return quick
}

// TestTables prints the tables. A subject that fails, fails the test; none does
// by being slow.
func TestTables(t *testing.T) {
	t.Run("Put", putTables)
	t.Run("Commit", commitTable)
	t.Run("Open", openTables)
	t.Run("EEPROM", eepromTable)
	t.Run("Seal", sealTable)
	t.Run("Image", imageTables)
	t.Run("NBD", nbdTables)
	t.Run("Live", liveTables)
	t.Run("LUKS", luksTables)
	t.Run("TPM", tpmTables)
	t.Run("Memory", memoryTables)
}
