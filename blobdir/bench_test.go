package blobdir_test

import (
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image/imagetest"
)

// BenchmarkPut is the time of a commit without a medium: what is left is ours.
func BenchmarkPut(b *testing.B) {
	for _, kind := range kinds {
		for _, n := range []int{6000, 143215} {
			b.Run(fmt.Sprintf("%s/%d", kind, n), func(b *testing.B) {
				d, err := blobdir.Create(imagetest.NewMemory(16<<20), createOptions(b, kind))
				require.NoError(b, err)
				for i := range 10 {
					require.NoError(b, put(d, fmt.Sprintf("dev/%d", i), random(3000)))
				}
				data := random(n)
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					for k := 0; k < n; k += 4096 {
						data[k] = byte(i)
					}
					if err := put(d, "tpm/permanent", data); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
