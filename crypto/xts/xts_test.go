package xts_test

import (
	"bufio"
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/cast5"
	"golang.org/x/crypto/twofish"
	peer "golang.org/x/crypto/xts"

	"nvstore.dev/crypto/xts"
)

// makers are the implementations that are on this machine.
func makers() map[string]func([]byte) (*xts.Cipher, error) {
	m := map[string]func([]byte) (*xts.Cipher, error){"generic": xts.NewGeneric}
	if xts.Accelerated() {
		m["kernel"] = xts.New
	}
	return m
}

func random(seed uint64, n int) []byte {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(key).Read(p)
	return p
}

// expect encrypts with golang.org/x/crypto/xts.
func expect(t testing.TB, key, plain []byte, sector uint64, size int, step uint64) []byte {
	t.Helper()
	c, err := peer.NewCipher(aes.NewCipher, key)
	require.NoError(t, err)
	out := make([]byte, len(plain))
	for i := 0; i < len(plain); i += size {
		c.Encrypt(out[i:i+size], plain[i:i+size], sector)
		sector += step
	}
	return out
}

func TestVectors(t *testing.T) {
	f, err := os.Open("testdata/ieee1619.txt")
	require.NoError(t, err)
	defer f.Close()
	n := 0
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if strings.HasPrefix(sc.Text(), "#") {
			continue
		}
		n++
		w := strings.Fields(sc.Text())
		require.Len(t, w, 5)
		key, plain, want := unhex(t, w[1]), unhex(t, w[3]), unhex(t, w[4])
		sector, err := strconv.ParseUint(w[2], 0, 64)
		require.NoError(t, err)
		for name, newCipher := range makers() {
			c, err := newCipher(key)
			require.NoError(t, err)
			got := make([]byte, len(plain))
			c.EncryptSectors(got, plain, sector, len(plain))
			require.Equal(t, want, got, "vector %s, %s", w[0], name)
			c.DecryptSectors(got, got, sector, len(plain))
			require.Equal(t, plain, got, "vector %s, %s", w[0], name)
		}
	}
	require.Equal(t, 6, n)
}

func unhex(t *testing.T, s string) []byte {
	t.Helper()
	p, err := hex.DecodeString(s)
	require.NoError(t, err)
	return p
}

// TestEverySize has every sector size to 8 KiB and a little.
func TestEverySize(t *testing.T) {
	for _, keySize := range []int{32, 48, 64} {
		key := random(uint64(keySize), keySize)
		for name, newCipher := range makers() {
			c, err := newCipher(key)
			require.NoError(t, err)
			for size := 16; size <= 8192+32; size += 16 {
				n := 1 + (size/16)%3
				checkAgainstPeer(t, c, name, key, size, n, uint64(size)<<40, 1)
			}
		}
	}
}

func TestSectorCounts(t *testing.T) {
	for _, keySize := range []int{32, 48, 64} {
		key := random(uint64(keySize), keySize)
		for name, newCipher := range makers() {
			c, err := newCipher(key)
			require.NoError(t, err)
			for n := 1; n < 20; n++ {
				checkAgainstPeer(t, c, name, key, 512, n, ^uint64(0)-3, 1)
				checkAgainstPeer(t, c, name, key, 208, n, 5, 8)
				checkAgainstPeer(t, c, name, key, 4096, n, 1<<63-17, 8)
			}
		}
	}
}

func checkAgainstPeer(t testing.TB, c *xts.Cipher, name string, key []byte, size, n int, sector, step uint64) {
	t.Helper()
	plain := random(sector+uint64(size), size*n)
	want := expect(t, key, plain, sector, size, step)
	msg := fmt.Sprintf("%s, %d-bit key, %d sectors of %d from %#x by %d", name, len(key)*4, n, size, sector, step)
	// A frame around the output, to see what is written that shouldn't be.
	out := bytes.Repeat([]byte{0xA5}, len(plain)+64)
	c.EncryptSectorsStep(out[32:32+len(plain)], plain, sector, size, step)
	requireFrame(t, out, msg)
	requireSame(t, want, out[32:32+len(plain)], msg)
	c.DecryptSectorsStep(out[32:32+len(plain)], want, sector, size, step)
	requireFrame(t, out, msg)
	requireSame(t, plain, out[32:32+len(plain)], msg)
	in := bytes.Clone(plain)
	c.EncryptSectorsStep(in, in, sector, size, step)
	requireSame(t, want, in, msg+", in place")
	c.DecryptSectorsStep(in, in, sector, size, step)
	requireSame(t, plain, in, msg+", in place")
}

func requireSame(t testing.TB, want, got []byte, msg string) {
	t.Helper()
	if bytes.Equal(want, got) {
		return
	}
	i := 0
	for want[i] == got[i] {
		i++
	}
	t.Fatalf("bytes differ from %d on: %s", i, msg)
}

func requireFrame(t testing.TB, out []byte, msg string) {
	t.Helper()
	frame := bytes.Repeat([]byte{0xA5}, 32)
	if !bytes.Equal(frame, out[:32]) || !bytes.Equal(frame, out[len(out)-32:]) {
		t.Fatalf("wrote outside of the output: %s", msg)
	}
}

// TestAlignment shifts both buffers through every place in a cache line.
func TestAlignment(t *testing.T) {
	key := random(1, 64)
	plain := random(2, 3*512+48)
	for _, size := range []int{512, 48} {
		n := len(plain) / size * size
		want := expect(t, key, plain[:n], 7, size, 1)
		for name, newCipher := range makers() {
			c, err := newCipher(key)
			require.NoError(t, err)
			for i := range 64 {
				src, dst := make([]byte, n+64), make([]byte, n+64)
				j := (i * 29) % 64
				copy(src[i:], plain[:n])
				c.EncryptSectors(dst[j:j+n], src[i:i+n], 7, size)
				requireSame(t, want, dst[j:j+n], fmt.Sprintf("%s, offsets %d and %d", name, i, j))
			}
		}
	}
}

func TestOutputMayBeLonger(t *testing.T) {
	key := random(1, 32)
	for name, newCipher := range makers() {
		c, err := newCipher(key)
		require.NoError(t, err)
		plain := random(2, 1024)
		out := make([]byte, 2048)
		c.EncryptSectors(out, plain, 0, 512)
		requireSame(t, expect(t, key, plain, 0, 512, 1), out[:1024], name)
		requireSame(t, make([]byte, 1024), out[1024:], name)
		c.EncryptSectors(nil, nil, 0, 512)
	}
}

// TestUnit takes the tweak as bytes: those of a sector's number give the
// sector, and the upper half counts.
func TestUnit(t *testing.T) {
	key := random(5, 64)
	for name, newCipher := range makers() {
		c, err := newCipher(key)
		require.NoError(t, err)
		for _, size := range []int{16, 112, 128, 144, 512, 4096} {
			plain := random(6, size)
			tweak := [16]byte{0x34, 0x12, 7: 0x80}
			want := expect(t, key, plain, 0x80<<56|0x1234, size, 1)
			got := make([]byte, size)
			c.EncryptUnit(got, plain, &tweak)
			requireSame(t, want, got, name)
			tweak[15] = 1
			c.EncryptUnit(got, plain, &tweak)
			require.NotEqual(t, want[:16], got[:16])
			c.DecryptUnit(got, got, &tweak)
			requireSame(t, plain, got, name)
			require.EqualValues(t, [16]byte{0x34, 0x12, 7: 0x80, 15: 1}, tweak)
		}
		require.Panics(t, func() { c.EncryptUnit(nil, nil, new([16]byte)) })
	}
}

func TestMisusePanics(t *testing.T) {
	p := make([]byte, 4096)
	for name, newCipher := range makers() {
		c, err := newCipher(make([]byte, 64))
		require.NoError(t, err)
		for what, f := range map[string]func(){
			"no sector size":       func() { c.EncryptSectors(p, p, 0, 0) },
			"negative sector size": func() { c.DecryptSectors(p, p, 0, -512) },
			"odd sector size":      func() { c.EncryptSectors(p[:24], p[:24], 0, 24) },
			"part of a sector":     func() { c.EncryptSectors(p[:1000], p[:1000], 0, 512) },
			"short output":         func() { c.DecryptSectors(p[:512], p[:1024], 0, 512) },
			"overlap ahead":        func() { c.DecryptSectors(p[16:1040], p[:1024], 0, 512) },
			"overlap behind":       func() { c.EncryptSectors(p[:1024], p[1023:2047], 0, 512) },
		} {
			require.Panics(t, f, "%s: %s", name, what)
		}
		require.NotPanics(t, func() { c.EncryptSectors(p[:512], p[512:1024], 0, 512) }, "neighbours")
	}
}

func TestKeySizes(t *testing.T) {
	for n := range 130 {
		c, err := xts.New(make([]byte, n))
		if n == 32 || n == 48 || n == 64 {
			require.NoError(t, err)
			continue
		}
		require.Equal(t, xts.KeySizeError(n), err)
		require.Nil(t, c)
	}
}

func TestNoAllocation(t *testing.T) {
	p := make([]byte, 64<<10)
	for name, newCipher := range makers() {
		c, err := newCipher(make([]byte, 64))
		require.NoError(t, err)
		allocs := testing.AllocsPerRun(20, func() {
			c.EncryptSectors(p, p, 1, 512)
			c.DecryptSectors(p, p, 1, 4096)
			c.EncryptSectors(p[:4800], p[:4800], 1, 48)
		})
		require.Less(t, allocs, 1.0, name)
	}
}

func TestConcurrentUse(t *testing.T) {
	key := random(3, 64)
	plain := random(4, 16<<10)
	want := expect(t, key, plain, 9, 512, 1)
	for name, newCipher := range makers() {
		c, err := newCipher(key)
		require.NoError(t, err)
		done := make(chan bool)
		for range 4 {
			go func() {
				ok := true
				out := make([]byte, len(plain))
				for range 50 {
					c.EncryptSectors(out, plain, 9, 512)
					ok = ok && bytes.Equal(out, want)
				}
				done <- ok
			}()
		}
		for range 4 {
			require.True(t, <-done, name)
		}
	}
}

// FuzzAgainstPeer compares with golang.org/x/crypto/xts.
func FuzzAgainstPeer(f *testing.F) {
	f.Add(uint64(1), uint64(0), uint64(1), byte(0), uint16(32), byte(8))
	f.Add(uint64(2), uint64(1)<<63, uint64(8), byte(1), uint16(256), byte(3))
	f.Add(uint64(3), ^uint64(0), uint64(3), byte(2), uint16(9), byte(17))
	f.Fuzz(func(t *testing.T, seed, sector, step uint64, kind byte, blocks uint16, n byte) {
		key := random(seed, []int{32, 48, 64}[kind%3])
		size := 16 * (1 + int(blocks)%600)
		for name, newCipher := range makers() {
			c, err := newCipher(key)
			require.NoError(t, err)
			checkAgainstPeer(t, c, name, key, size, 1+int(n)%20, sector, step)
		}
	})
}

// TestBlocks compares XTS of another cipher with golang.org/x/crypto's.
func TestBlocks(t *testing.T) {
	newBlock := func(key []byte) (cipher.Block, error) { return twofish.NewCipher(key) }
	key := random(9, 64)
	p, err := peer.NewCipher(newBlock, key)
	require.NoError(t, err)
	data, err := newBlock(key[:32])
	require.NoError(t, err)
	tweak, err := newBlock(key[32:])
	require.NoError(t, err)
	c, err := xts.NewBlocks(data, tweak)
	require.NoError(t, err)
	plain := random(10, 8192)
	want, got := make([]byte, len(plain)), make([]byte, len(plain))
	for i := range len(plain) / 512 {
		p.Encrypt(want[i*512:], plain[i*512:][:512], 1<<33+uint64(i))
	}
	c.EncryptSectors(got, plain, 1<<33, 512)
	require.Equal(t, want, got)
	c.DecryptSectors(got, got, 1<<33, 512)
	require.Equal(t, plain, got)

	short, err := cast5.NewCipher(key[:16])
	require.NoError(t, err)
	_, err = xts.NewBlocks(data, short)
	require.Error(t, err)
}
