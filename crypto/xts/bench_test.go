package xts_test

import (
	"crypto/aes"
	"fmt"
	"testing"

	peer "golang.org/x/crypto/xts"
)

// benchBuffer is small enough for a second-level cache, as the buffer of
// `openssl speed` is.
const benchBuffer = 64 << 10

func BenchmarkAES256(b *testing.B) {
	key := random(1, 64)
	p := make([]byte, benchBuffer)
	for name, newCipher := range makers() {
		c, err := newCipher(key)
		if err != nil {
			b.Fatal(err)
		}
		for _, size := range []int{512, 1024, 2048, 4096} {
			b.Run(fmt.Sprintf("%s/encrypt/%d", name, size), func(b *testing.B) {
				b.SetBytes(benchBuffer)
				for b.Loop() {
					c.EncryptSectors(p, p, 1, size)
				}
			})
			b.Run(fmt.Sprintf("%s/decrypt/%d", name, size), func(b *testing.B) {
				b.SetBytes(benchBuffer)
				for b.Loop() {
					c.DecryptSectors(p, p, 1, size)
				}
			})
		}
	}
	c, err := peer.NewCipher(aes.NewCipher, key)
	if err != nil {
		b.Fatal(err)
	}
	for _, size := range []int{512, 4096} {
		b.Run(fmt.Sprintf("x-crypto/encrypt/%d", size), func(b *testing.B) {
			b.SetBytes(benchBuffer)
			for b.Loop() {
				for i := 0; i < benchBuffer; i += size {
					c.Encrypt(p[i:i+size], p[i:i+size], uint64(i))
				}
			}
		})
		b.Run(fmt.Sprintf("x-crypto/decrypt/%d", size), func(b *testing.B) {
			b.SetBytes(benchBuffer)
			for b.Loop() {
				for i := 0; i < benchBuffer; i += size {
					c.Decrypt(p[i:i+size], p[i:i+size], uint64(i))
				}
			}
		})
	}
}
