package seal_test

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"testing"

	"nvstore.dev/crypto/seal"
)

var sizes = []int{4 << 10, 6 << 10, 16 << 10, 64 << 10, 143 << 10}

// context has the length of what a store binds a chunk to.
var context = bytes.Repeat([]byte{9}, 72)

func each(b *testing.B, f func(b *testing.B, n int)) {
	for _, n := range sizes {
		b.Run(fmt.Sprintf("%dKiB", n>>10), func(b *testing.B) {
			b.SetBytes(int64(n))
			b.ReportAllocs()
			f(b, n)
		})
	}
}

func gcm(b *testing.B) cipher.AEAD {
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		b.Fatal(err)
	}
	g, err := cipher.NewGCM(block)
	if err != nil {
		b.Fatal(err)
	}
	return g
}

// The yardstick: crypto/cipher's GCM with one key for everything.
func BenchmarkPlainGCMSeal(b *testing.B) {
	each(b, func(b *testing.B, n int) {
		g, buf, nonce := gcm(b), make([]byte, n+16), make([]byte, 12)
		for b.Loop() {
			g.Seal(buf[:0], nonce, buf[:n], nil)
		}
	})
}

func BenchmarkPlainGCMOpen(b *testing.B) {
	each(b, func(b *testing.B, n int) {
		g, nonce := gcm(b), make([]byte, 12)
		ct, dst := g.Seal(nil, nonce, make([]byte, n), nil), make([]byte, n)
		for b.Loop() {
			if _, err := g.Open(dst[:0], nonce, ct, nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSealInPlace(b *testing.B) {
	each(b, func(b *testing.B, n int) {
		k, buf := key(b, 1), make([]byte, n+16)
		for b.Loop() {
			if _, err := k.SealInPlace(buf, context); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkSeal(b *testing.B) {
	each(b, func(b *testing.B, n int) {
		k, buf, dst := key(b, 1), make([]byte, n), make([]byte, n)
		for b.Loop() {
			if _, _, err := k.Seal(dst[:0], buf, context); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkOpen(b *testing.B) {
	each(b, func(b *testing.B, n int) {
		k, dst := key(b, 1), make([]byte, n)
		ct, box, err := k.Seal(nil, make([]byte, n), context)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			if _, err := k.Open(dst[:0], ct, &box, context); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkOpenInPlace(b *testing.B) {
	each(b, func(b *testing.B, n int) {
		k, buf := key(b, 1), make([]byte, n+16)
		ct, box, err := k.Seal(nil, make([]byte, n), context)
		if err != nil {
			b.Fatal(err)
		}
		for b.Loop() {
			copy(buf, ct)
			if _, err := k.OpenInPlace(buf, &box, context); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// What a derivation and a new AES key cost beside an empty message.
func BenchmarkOverhead(b *testing.B) {
	k, buf := key(b, 1), make([]byte, 16)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := k.SealInPlace(buf, context); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkMAC(b *testing.B) {
	m, err := seal.NewMAC(make([]byte, 32))
	if err != nil {
		b.Fatal(err)
	}
	p, sum := make([]byte, 512), make([]byte, 0, 32)
	b.SetBytes(512)
	b.ReportAllocs()
	for b.Loop() {
		sum = m.Sum(sum[:0], p)
	}
}
