package eeprom_test

import (
	"testing"

	"github.com/stretchr/testify/require"
)

// What a byte of a sequential read costs beside the bus.
func BenchmarkReadByte(b *testing.B) {
	s, _ := store(b)
	c := newI2C(b, open(b, s, "x", 32<<10), nil)
	require.NoError(b, c.Start(0x50, true))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := c.ReadByte(); err != nil {
			b.Fatal(err)
		}
	}
}

// What a page write costs beside the medium.
func BenchmarkPageWrite(b *testing.B) {
	s, _ := store(b)
	c := newI2C(b, open(b, s, "x", 32<<10), nil)
	p := make([]byte, 64)
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		p[0], p[1] = byte(i), byte(i>>8)
		i2cWrite(b, c, i*64%(32<<10), p)
	}
}
