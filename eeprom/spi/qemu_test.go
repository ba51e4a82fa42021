package spi_test

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/eeprom/spi"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/internal/qtest"
)

// theirSize is how large QEMU's at25256a-nonjedec is: its table has the chip's
// bits as bytes.
const theirSize = 256 << 10

// m25p80 starts a board whose firmware's flash is an EEPROM of QEMU's, on an
// erased image.
func m25p80(t *testing.T) (*qtest.AspeedSPI, string) {
	path := filepath.Join(t.TempDir(), "eeprom")
	require.NoError(t, os.WriteFile(path, bytes.Repeat([]byte{0xff}, theirSize), 0o600))
	m, err := qtest.Start("qemu-system-arm", "-M", "ast2600-evb,fmc-model=at25256a-nonjedec", "-nodefaults",
		"-drive", "if=mtd,format=raw,file="+path)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, m.Close()) })
	s, err := m.AspeedFMC()
	require.NoError(t, err)
	return s, path
}

// A selection sends bytes, and takes n more.
type exchange struct {
	out []byte
	n   int
}

func theirs(t *testing.T, s *qtest.AspeedSPI, x exchange) []byte {
	in, err := s.Transfer(x.out, x.n)
	require.NoError(t, err)
	return in
}

func our(t *testing.T, c *spi.Chip, x exchange) []byte {
	in, err := send(c, append(bytes.Clone(x.out), make([]byte, x.n)...)...)
	require.NoError(t, err)
	return in[len(x.out):]
}

// A driver that enables each write and keeps within pages sees the same of
// QEMU's AT25256A and of ours, and both store the same bytes.
func TestQEMUAgrees(t *testing.T) {
	rng := rand.New(rand.NewPCG(imagetest.Seed(t), 0))
	s, path := m25p80(t)
	c, mem := chip(t, "25256", nil)
	both := func(n int, out ...byte) {
		x := exchange{out, n}
		require.Equal(t, theirs(t, s, x), our(t, c, x), "% x", out)
	}
	n := imagetest.Scale(200)
	for range n {
		at := rng.IntN(32 << 10)
		switch rng.IntN(6) {
		case 0, 1, 2:
			both(0, 6)
			both(1, 5)
			data := make([]byte, 1+rng.IntN(64-at%64))
			for i := range data {
				data[i] = byte(rng.Uint32())
			}
			both(0, append([]byte{2, byte(at >> 8), byte(at)}, data...)...)
			both(0, 4) // QEMU keeps WEL
		case 3:
			both(0, 2, byte(at>>8), byte(at), 0) // not enabled
		case 4:
			both(0, 6)
			both(0, 4)
			both(3, 5)
		default:
			both(min(1+rng.IntN(100), 32<<10-at), 3, byte(at>>8), byte(at))
		}
	}
	stored, err := os.ReadFile(path)
	require.NoError(t, err)
	require.True(t, bytes.Equal(stored[:32<<10], mem.Data))
	t.Logf("%d accesses alike", n)
}

// Where QEMU's model and the data sheet differ, ours is with the data sheet. If
// one of these fails, QEMU has changed.
func TestQEMUDiffers(t *testing.T) {
	for _, d := range []struct {
		name         string
		do           []exchange
		see          exchange
		theirs, ours []byte
	}{
		{"a page's end doesn't wrap", []exchange{{out: []byte{6}}, {out: []byte{2, 0, 63, 1, 2}}}, exchange{[]byte{3, 0, 63}, 2},
			[]byte{1, 2}, []byte{1, 0xff}},
		{"the end of a write leaves WEL set", []exchange{{out: []byte{6}}, {out: []byte{2, 0, 0, 1}}}, exchange{[]byte{5}, 1},
			[]byte{2}, []byte{0}},
		{"no block protection", []exchange{{out: []byte{6}}, {out: []byte{1, 0x0c}}, {out: []byte{6}}, {out: []byte{2, 0, 0, 1}}},
			exchange{[]byte{3, 0, 0}, 1}, []byte{1}, []byte{0xff}},
		{"the memory goes on behind 32 KiB", []exchange{{out: []byte{6}}, {out: []byte{2, 0, 0, 7}}}, exchange{[]byte{3, 0x7f, 0xff}, 2},
			[]byte{0xff, 0xff}, []byte{0xff, 7}},
	} {
		t.Run(d.name, func(t *testing.T) {
			s, _ := m25p80(t)
			c, _ := chip(t, "25256", nil)
			for _, x := range d.do {
				theirs(t, s, x)
				our(t, c, x)
			}
			require.Equal(t, fmt.Sprintf("% x", d.theirs), fmt.Sprintf("% x", theirs(t, s, d.see)), "QEMU")
			require.Equal(t, fmt.Sprintf("% x", d.ours), fmt.Sprintf("% x", our(t, c, d.see)), "ours")
		})
	}
}
