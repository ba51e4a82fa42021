package nbd_test

import (
	"io"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/nbd"
)

// A request costs the server no allocation, and the client none.
func TestNoAllocation(t *testing.T) {
	if raceEnabled {
		return
	}
	const n = 1 << 20
	s := serve(t, nil, &nbd.Export{Name: "x", Device: flat(make([]byte, n))})
	c := dialRaw(t, s, 3)
	c.enter("x")
	var requests [64 * 28]byte
	for i := range 64 {
		h := requests[28*i:]
		be.PutUint32(h, 0x25609513)
		be.PutUint64(h[8:], uint64(i))
		be.PutUint64(h[16:], uint64(i*4096))
		be.PutUint32(h[24:], 4096)
	}
	replies := make([]byte, 64*(28+4096))
	require.Less(t, testing.AllocsPerRun(200, func() {
		if _, err := c.Write(requests[:]); err != nil {
			panic(err)
		}
		if _, err := io.ReadFull(c, replies); err != nil {
			panic(err)
		}
	})/64, 0.05, "allocations a request, of the server")

	d := open(t, s.uri("x"), nil)
	defer d.Close()
	p := make([]byte, 4096)
	perOp := testing.AllocsPerRun(500, func() {
		if _, err := d.ReadAt(p, 4096); err != nil {
			panic(err)
		}
		if _, err := d.WriteAt(p, 8192); err != nil {
			panic(err)
		}
	}) / 2
	require.Zero(t, perOp)
}

// flat is memory, without anything around it.
type flat []byte

func (f flat) Size() int64 { return int64(len(f)) }
func (f flat) ReadAt(p []byte, off int64) (int, error) {
	if n := copy(p, f[min(off, f.Size()):]); n < len(p) {
		return n, io.EOF
	}
	return len(p), nil
}
func (f flat) WriteAt(p []byte, off int64) (int, error) { return copy(f[off:], p), nil }
func (f flat) Sync() error                              { return nil }
func (f flat) Close() error                             { return nil }
