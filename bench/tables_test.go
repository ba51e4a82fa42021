package bench

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

var tables = flag.Bool("tables", false, "measure in earnest and print tables; without, a few operations of each")

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

// ops is how many operations a table takes of each subject.
func ops(n int) int {
	if *tables {
		return n
	}
	return 10
}

// TestTables prints the tables. A subject that fails, fails the test; none does
// by being slow.
func TestTables(t *testing.T) {
	for _, size := range []struct {
		name  string
		bytes int
	}{
		{"6 KiB, a TPM's permanent state", 6 << 10},
		{"143 KiB, a TPM with its NV memory full", 143 << 10},
	} {
		rows := measure(t, directory(t), peers, newWorkload(size.bytes, ops(400)))
		if *tables {
			print(os.Stdout, fmt.Sprintf("Durable put of %s", size.name), rows)
		}
	}
}
