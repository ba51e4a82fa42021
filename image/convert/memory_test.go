package convert_test

import (
	"fmt"
	"io"
	"math/rand/v2"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/convert"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/image/raw"
)

// words is a disk of text, which takes no memory.
type words struct {
	image.Device
	size int64
	text []byte
}

func (w *words) Size() int64  { return w.size }
func (w *words) Close() error { return nil }

func (w *words) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		if off >= w.size {
			return n, io.EOF
		}
		k := copy(p[n:min(len(p), n+int(w.size-off))], w.text[off%int64(len(w.text)):])
		n, off = n+k, off+int64(k)
	}
	return len(p), nil
}

// TestMemory counts all that a conversion allocates, with no garbage collected, so
// that what it takes is less at any time, and the same however long the disk is.
func TestMemory(t *testing.T) {
	text := make([]byte, 1<<20-4093)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range text {
		text[i] = "etaoin shrdlu\n"[min(rng.IntN(14), rng.IntN(14))]
		if i > 100 && i%8 > 2 {
			text[i] = text[i-i%97-1]
		}
	}
	size := int64(48 << 20)
	if testing.Short() {
		size = 8 << 20
	}
	for _, c := range []struct {
		compression string
		cluster     int
		budget      uint64 // MiB
	}{
		{"", 64 << 10, 20}, {"", 512, 24}, {"deflate", 64 << 10, 20}, {"zstd", 64 << 10, 20}, {"deflate", 2 << 20, 56}, {"zstd", 2 << 20, 56},
	} {
		for _, back := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s%d,back=%t", c.compression, c.cluster, back), func(t *testing.T) {
				f, err := raw.Create(filepath.Join(t.TempDir(), "img"), 0, nil)
				require.NoError(t, err)
				im, err := qcow2.Create(f, &qcow2.CreateOptions{Size: size, ClusterSize: c.cluster, Compression: c.compression})
				require.NoError(t, err)
				defer im.Close()
				var dst, src image.Device = im, &words{size: im.Size(), text: text}
				o := &convert.Options{Cluster: int64(c.cluster), TargetZero: true, Compressed: c.compression != ""}
				if back {
					require.NoError(t, convert.Convert(t.Context(), dst, src, o))
					require.NoError(t, im.Sync())
					o.Compressed = false
					dst, err = raw.Create(filepath.Join(t.TempDir(), "raw"), im.Size(), nil)
					require.NoError(t, err)
					defer dst.Close()
					src = im
				}
				runtime.GC()
				defer debug.SetGCPercent(debug.SetGCPercent(-1))
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				require.NoError(t, convert.Convert(t.Context(), dst, src, o))
				runtime.ReadMemStats(&after)
				n := after.TotalAlloc - before.TotalAlloc
				t.Logf("%d MiB of disk: %.1f MiB", size>>20, float64(n)/(1<<20))
				budget := c.budget
				if raceDetector { // with it, a sync.Pool drops some of what it is given
					budget *= 4
				}
				require.Less(t, n, budget<<20)
			})
		}
	}
}
