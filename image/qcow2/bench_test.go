package qcow2_test

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

const benchSize = 256 << 20

func benchImage(b *testing.B, cs int, fill bool) *qcow2.Image {
	im, err := qcow2.Create(imagetest.NewMemory(0), &qcow2.CreateOptions{Size: benchSize, ClusterSize: cs})
	require.NoError(b, err)
	if fill {
		p := make([]byte, 1<<20)
		for off := int64(0); off < benchSize; off += 1 << 20 {
			_, err := im.WriteAt(p, off)
			require.NoError(b, err)
		}
		require.NoError(b, im.Sync())
	}
	b.Cleanup(func() { im.Close() })
	b.ReportAllocs()
	return im
}

func benchRandom(b *testing.B, op func(im *qcow2.Image, p []byte, off int64) error) {
	for _, cs := range []int{4096, 65536} {
		b.Run(fmt.Sprint(cs), func(b *testing.B) {
			im := benchImage(b, cs, true)
			rng := rand.New(rand.NewPCG(1, 2))
			p := make([]byte, 4096)
			b.SetBytes(4096)
			for b.Loop() {
				if err := op(im, p, rng.Int64N(benchSize/4096)*4096); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkRead4K(b *testing.B) {
	benchRandom(b, func(im *qcow2.Image, p []byte, off int64) error { _, err := im.ReadAt(p, off); return err })
}

func BenchmarkWrite4K(b *testing.B) {
	benchRandom(b, func(im *qcow2.Image, p []byte, off int64) error { _, err := im.WriteAt(p, off); return err })
}

func BenchmarkWriteSync4K(b *testing.B) {
	benchRandom(b, func(im *qcow2.Image, p []byte, off int64) error {
		if _, err := im.WriteAt(p, off); err != nil {
			return err
		}
		return im.Sync()
	})
}

// benchParallel has 16 requests in flight.
func benchParallel(b *testing.B, op func(im *qcow2.Image, p []byte, off int64) error) {
	for _, cs := range []int{4096, 65536} {
		b.Run(fmt.Sprint(cs), func(b *testing.B) {
			im := benchImage(b, cs, true)
			b.SetParallelism(16 / runtime.GOMAXPROCS(0))
			b.SetBytes(4096)
			var n atomic.Uint64
			b.ResetTimer()
			b.RunParallel(func(pb *testing.PB) {
				rng := rand.New(rand.NewPCG(n.Add(1), 2))
				p := make([]byte, 4096)
				for pb.Next() {
					if err := op(im, p, rng.Int64N(benchSize/4096)*4096); err != nil {
						b.Error(err)
						return
					}
				}
			})
		})
	}
}

func BenchmarkRead4K16(b *testing.B) {
	benchParallel(b, func(im *qcow2.Image, p []byte, off int64) error { _, err := im.ReadAt(p, off); return err })
}

func BenchmarkWrite4K16(b *testing.B) {
	benchParallel(b, func(im *qcow2.Image, p []byte, off int64) error { _, err := im.WriteAt(p, off); return err })
}

// BenchmarkOpen opens an image of 1 TiB whose clusters all have a place.
func BenchmarkOpen(b *testing.B) {
	for _, mode := range []qcow2.Preallocation{qcow2.PreallocOff, qcow2.PreallocMetadata} {
		b.Run(fmt.Sprint("prealloc", mode), func(b *testing.B) {
			d := &keep{imagetest.NewMemory(0)}
			im, err := qcow2.Create(d, &qcow2.CreateOptions{Size: 1 << 40, Preallocation: mode})
			require.NoError(b, err)
			require.NoError(b, im.Close())
			b.ReportAllocs()
			for b.Loop() {
				if _, err := qcow2.Open(d, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// BenchmarkAllocate writes 4 KiB to new clusters, with a Sync after every one,
// or after every 64.
func BenchmarkAllocate(b *testing.B) {
	for _, cs := range []int{4096, 65536} {
		for _, batch := range []int{1, 64} {
			b.Run(fmt.Sprintf("%d-batch%d", cs, batch), func(b *testing.B) {
				im := benchImage(b, cs, false)
				p := make([]byte, 4096)
				b.SetBytes(4096)
				off := int64(0)
				for i := 0; b.Loop(); i++ {
					if _, err := im.WriteAt(p, off); err != nil {
						b.Fatal(err)
					}
					if i%batch == 0 {
						if err := im.Sync(); err != nil {
							b.Fatal(err)
						}
					}
					if off += int64(cs); off >= benchSize {
						off = 0
						if err := im.Discard(0, benchSize); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}

// BenchmarkSnapshot takes and deletes a snapshot of 256 MiB.
func BenchmarkSnapshot(b *testing.B) {
	for _, cs := range []int{4096, 65536} {
		b.Run(fmt.Sprint(cs), func(b *testing.B) {
			im := benchImage(b, cs, true)
			for b.Loop() {
				require.NoError(b, im.Snapshots().Create("s"))
				require.NoError(b, im.Snapshots().Delete("s"))
			}
		})
	}
}
