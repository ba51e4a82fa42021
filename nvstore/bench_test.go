package nvstore_test

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/nvstore"
)

// populated makes a store of n blobs in a raw file, and returns its path.
func populated(b *testing.B, k kind, n int) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), "x")
	o := &nvstore.CreateOptions{Idle: -1}
	if k.sealed {
		o.Key = rawKey(b, theKey)
	}
	s, err := nvstore.CreateDevice(counted(b, path), o)
	require.NoError(b, err)
	populate(b, s, n)
	require.NoError(b, s.Close())
	return path
}

func openKind(b *testing.B, path string, k kind) *nvstore.Store {
	b.Helper()
	o := &nvstore.Options{Idle: -1}
	if k.sealed {
		o.Key = rawKey(b, theKey)
	}
	s, err := nvstore.Open(path, o)
	require.NoError(b, err)
	return s
}

// BenchmarkOpen opens a settled store for writing, and closes it again.
func BenchmarkOpen(b *testing.B) {
	for _, k := range kinds[:2] {
		for _, n := range []int{10, 10_000, 100_000} {
			b.Run(fmt.Sprintf("%s/blobs=%d", k.name, n), func(b *testing.B) {
				path := populated(b, k, n)
				for b.Loop() {
					require.NoError(b, openKind(b, path, k).Close())
				}
			})
		}
	}
}

// BenchmarkPut overwrites random blobs in a large store, durably, and tells
// how much of the heap is live after it, and the process's peak.
func BenchmarkPut(b *testing.B) {
	for _, k := range kinds[:2] {
		for _, n := range []int{10, 100_000} {
			for _, size := range []int{6 << 10, 143 << 10} {
				b.Run(fmt.Sprintf("%s/blobs=%d/%dKiB", k.name, n, size>>10), func(b *testing.B) {
					s := openKind(b, populated(b, k, n), k)
					rng := newRand(b)
					data := fill(size, "bench")
					b.SetBytes(int64(size))
					i := 0
					for b.Loop() {
						i++
						data[0], data[1] = byte(i), byte(i>>8)
						require.NoError(b, s.Put(blobName(rng.IntN(n)), data, nil))
					}
					reportMemory(b)
					require.NoError(b, s.Close())
				})
			}
		}
	}
}

func reportMemory(b *testing.B) {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	b.ReportMetric(float64(m.HeapInuse)/(1<<20), "MiB-heap")
	b.ReportMetric(float64(peak(b))/(1<<20), "MiB-peak")
}

// peak is the most memory the process ever had resident, in bytes.
func peak(t testing.TB) int64 {
	t.Helper()
	p, err := os.ReadFile("/proc/self/status")
	require.NoError(t, err)
	for line := range strings.Lines(string(p)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "VmHWM: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	t.Fatal("no VmHWM in /proc/self/status")
	return 0
}
