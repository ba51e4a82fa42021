package luks_test

import (
	"fmt"
	"testing"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/luks"
)

func BenchmarkDevice(b *testing.B) {
	const size = 8 << 20
	for _, o := range []luks.FormatOptions{
		{Version: 1}, {Version: 2, SectorSize: 4096}, {Version: 1, Encryption: "aes-cbc-essiv:sha256"},
	} {
		o.Size = size
		d, err := luks.Format(imagetest.NewMemory(0), cheap(o))
		if err != nil {
			b.Fatal(err)
		}
		for _, n := range []int{4096, 1 << 20} {
			p := make([]byte, n)
			name := fmt.Sprintf("%s-%d/%d", d.Info().Encryption, d.Info().SectorSize, n)
			b.Run("write/"+name, func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for i := int64(0); b.Loop(); i++ {
					if _, err := d.WriteAt(p, i*int64(n)%size); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("read/"+name, func(b *testing.B) {
				b.SetBytes(int64(n))
				b.ReportAllocs()
				for i := int64(0); b.Loop(); i++ {
					if _, err := d.ReadAt(p, i*int64(n)%size); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
