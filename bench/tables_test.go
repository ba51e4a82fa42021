package bench

import (
	"flag"
	"os"
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
