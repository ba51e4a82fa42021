package qcow2

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	kflate "github.com/klauspost/compress/flate"
	"github.com/stretchr/testify/require"
)

// samples are texts that make all kinds of blocks and codes.
func samples(n int) [][]byte {
	rng := rand.New(rand.NewPCG(1, 2))
	random := make([]byte, n)
	for i := range random {
		random[i] = byte(rng.Uint32())
	}
	words := make([]byte, 0, n+16)
	for len(words) < n {
		words = append(words, [...]string{"the ", "qcow2 ", "cluster ", "is ", "0x%08x\n", "\x00\x00\x00\x00"}[rng.IntN(6)]...)
	}
	skewed := make([]byte, n) // code lengths up to the longest
	for i := range skewed {
		skewed[i] = byte(int(rng.ExpFloat64() * 12))
	}
	mixed := bytes.Clone(words[:n])
	copy(mixed[n/2:], random[:n/4])
	return [][]byte{make([]byte, n), random, words[:n], skewed, mixed, bytes.Repeat([]byte{1, 2, 3}, n/3+1)[:n]}
}

func deflated(t testing.TB, p []byte, level int) []byte {
	var b bytes.Buffer
	w, err := flate.NewWriter(&b, level)
	require.NoError(t, err)
	_, err = w.Write(p)
	require.NoError(t, err)
	require.NoError(t, w.Close())
	return b.Bytes()
}

// TestInflate reads what encoders write, whole, with garbage behind it, with a
// shorter output, and cut off.
func TestInflate(t *testing.T) {
	f := new(inflater)
	for _, n := range []int{1, 512, 65536, 200_001} {
		for i, p := range samples(n) {
			for _, level := range []int{flate.HuffmanOnly, 0, 1, 6, 9} {
				z := deflated(t, p, level)
				got := make([]byte, n)
				require.NoError(t, f.inflate(got, z), "sample %d, level %d", i, level)
				require.True(t, bytes.Equal(p, got))
				clear(got)
				require.NoError(t, f.inflate(got, append(bytes.Clone(z), 0xff, 0, 0xaa)))
				require.True(t, bytes.Equal(p, got))
				require.NoError(t, f.inflate(got[:n/2], z))
				require.Error(t, f.inflate(make([]byte, n+1), z))
				if n > 1 {
					require.Error(t, f.inflate(got, z[:len(z)/2]))
				}
			}
		}
	}
}

// FuzzInflate compares with the standard library.
func FuzzInflate(f *testing.F) {
	for _, p := range samples(600) {
		for _, level := range []int{flate.HuffmanOnly, 0, 1, 9} {
			f.Add(deflated(f, p, level), uint16(600))
		}
	}
	f.Add([]byte{0x05, 0xe0, 0x81, 0x08}, uint16(8))
	z := new(inflater)
	f.Fuzz(func(t *testing.T, src []byte, n uint16) {
		want, got := make([]byte, n), make([]byte, n)
		_, err := io.ReadFull(flate.NewReader(bytes.NewReader(src)), want)
		mine := z.inflate(got, src)
		if err == nil {
			require.NoError(t, mine)
			require.True(t, bytes.Equal(want, got))
		} else if mine == nil {
			// The standard library looks at more than it hands out.
			require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		}
	})
}

func BenchmarkInflate(b *testing.B) {
	for i, p := range samples(65536) {
		z := deflated(b, p, 6)
		b.Run(fmt.Sprintf("sample%d/own", i), func(b *testing.B) {
			b.SetBytes(65536)
			f, dst := new(inflater), make([]byte, 65536)
			for b.Loop() {
				if err := f.inflate(dst, z); err != nil {
					b.Fatal(err)
				}
			}
		})
		for name, r := range map[string]io.Reader{"std": flate.NewReader(bytes.NewReader(nil)), "klauspost": kflate.NewReader(bytes.NewReader(nil))} {
			b.Run(fmt.Sprintf("sample%d/%s", i, name), func(b *testing.B) {
				b.SetBytes(65536)
				dst := make([]byte, 65536)
				for b.Loop() {
					_ = r.(flate.Resetter).Reset(bytes.NewReader(z), nil)
					if _, err := io.ReadFull(r, dst); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// A slowInflater decodes bit by bit, as RFC 1951 explains it, and remembers the
// largest distance.
type slowInflater struct {
	src []byte
	bit int
	out []byte
	far int
}

func (s *slowInflater) bits(n int) (v int) {
	for i := range n {
		v |= int(s.src[s.bit>>3]>>(s.bit&7)&1) << i
		s.bit++
	}
	return v
}

func (s *slowInflater) symbol(lens []int) int {
	for code, n := 0, 1; n < 16; n++ {
		code = code<<1 | s.bits(1)
		next := 0
		for l := 1; l <= n; l++ {
			for i, have := range lens {
				if have != l {
					continue
				}
				if l == n && next == code {
					return i
				}
				next++
			}
			next <<= 1
		}
	}
	panic("no such code")
}

func (s *slowInflater) run() {
	for last := false; !last; {
		last = s.bits(1) == 1
		var lit, dist []int
		switch s.bits(2) {
		case 0:
			s.bit = (s.bit + 7) &^ 7
			n := s.bits(16)
			s.bits(16)
			s.out = append(s.out, s.src[s.bit/8:][:n]...)
			s.bit += n * 8
			continue
		case 1:
			lit = append(append(append(repeat(8, 144), repeat(9, 112)...), repeat(7, 24)...), repeat(8, 8)...)
			dist = repeat(5, 30)
		case 2:
			nl, nd, nc := s.bits(5)+257, s.bits(5)+1, s.bits(4)+4
			cl := make([]int, 19)
			for i := range nc {
				cl[codeOrder[i]] = s.bits(3)
			}
			var all []int
			for len(all) < nl+nd {
				switch v := s.symbol(cl); v {
				case 16:
					all = append(all, repeat(all[len(all)-1], 3+s.bits(2))...)
				case 17:
					all = append(all, repeat(0, 3+s.bits(3))...)
				case 18:
					all = append(all, repeat(0, 11+s.bits(7))...)
				default:
					all = append(all, v)
				}
			}
			lit, dist = all[:nl], all[nl:]
		}
		for {
			v := s.symbol(lit)
			if v == 256 {
				break
			}
			if v < 256 {
				s.out = append(s.out, byte(v))
				continue
			}
			length, base := 258, 3
			for i := 257; i <= v && v < 285; i++ {
				extra := max(0, (i-257)/4-1)
				if i == v {
					length = base + s.bits(extra)
				}
				base += 1 << extra
			}
			d, back := s.symbol(dist), 1
			for i := range d + 1 {
				extra := max(0, i/2-1)
				if i == d {
					back += s.bits(extra)
				} else {
					back += 1 << extra
				}
			}
			s.far = max(s.far, back)
			for range length {
				s.out = append(s.out, s.out[len(s.out)-back])
			}
		}
	}
}

func repeat(v, n int) (out []int) {
	for range n {
		out = append(out, v)
	}
	return out
}

// TestDeflateWindow: no distance is larger than the window that QEMU reads with,
// though the text asks for it.
func TestDeflateWindow(t *testing.T) {
	for _, n := range []int{512, 20_000, 65536} {
		for i, p := range samples(n) {
			// What repeats only beyond the window.
			for off := 0; off+9100 < n; off += 9000 {
				copy(p[off+8192:off+8192+64], p[off:])
			}
			z, err := pack(0, p, nil)
			require.NoError(t, err)
			if z == nil {
				continue
			}
			s := slowInflater{src: append(z, 0, 0)}
			s.run()
			require.True(t, bytes.Equal(p, s.out), "sample %d", i)
			require.LessOrEqual(t, s.far, deflateWindow)
			long := slowInflater{src: append(deflated(t, p, 9), 0, 0)}
			long.run()
			require.True(t, bytes.Equal(p, long.out))
			if n == 65536 && i == 4 {
				require.Greater(t, s.far, deflateWindow/2)
				require.Greater(t, long.far, deflateWindow) // the test can fail
			}
		}
	}
}

// TestUnpackZstd: several frames, garbage behind them, an output that ends
// early, and what is cut.
func TestUnpackZstd(t *testing.T) {
	p := samples(65536)[2]
	a, err := pack(1, p[:30_000], nil)
	require.NoError(t, err)
	b, err := pack(1, p[30_000:], nil)
	require.NoError(t, err)
	z := append(bytes.Clone(a), b...)
	got := make([]byte, len(p))
	require.NoError(t, unpack(1, got, z))
	require.True(t, bytes.Equal(p, got))
	clear(got)
	require.NoError(t, unpack(1, got, append(bytes.Clone(z), 1, 2, 3, 4, 5)))
	require.True(t, bytes.Equal(p, got))
	require.NoError(t, unpack(1, got[:1000], z))
	require.Error(t, unpack(1, got, z[:len(z)/2]))
	require.Error(t, unpack(1, got, a))
	require.Error(t, unpack(1, got, append(bytes.Clone(a), make([]byte, 500)...)))
}
