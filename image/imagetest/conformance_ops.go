package imagetest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
)

// A modelled Device is compared with a byte slice. void marks bytes that a
// discard left undefined.
type modelled struct {
	d    image.Device
	data []byte
	void []bool
}

func (m *modelled) check(t *testing.T, off, n int64, msg string) {
	t.Helper()
	got := mustRead(t, m.d, off, n)
	want := bytes.Clone(m.data[off : off+n])
	for i := range want {
		if m.void[off+int64(i)] {
			want[i] = got[i]
		}
	}
	mustEqual(t, want, got, off, "%s", msg)
}

func (m *modelled) set(off int64, p []byte) {
	copy(m.data[off:], p)
	clear(m.void[off : off+int64(len(p))])
}

func (s *suite) testRandomOps(t *testing.T) {
	seed := Seed(t)
	for round := range 4 {
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		size := []int64{4096, 100_000, 1 << 20, 3<<20 + 511}[round]
		d := s.make(t, size)
		m := &modelled{d: d, data: make([]byte, d.Size()), void: make([]bool, d.Size())}
		for i := range Scale(250) {
			s.step(t, m, rng, fmt.Sprintf("round %d, step %d", round, i))
		}
		m.check(t, 0, int64(len(m.data)), "in the end")
		mustClose(t, m.d)
	}
}

// step does one random operation to the Device and its model.
func (s *suite) step(t *testing.T, m *modelled, rng *rand.Rand, at string) {
	t.Helper()
	size := int64(len(m.data))
	off, n := randRange(rng, size)
	switch k := rng.IntN(20); {
	case k < 8:
		p := pattern(n, rng.Uint64())
		if rng.IntN(8) == 0 {
			clear(p)
		}
		mustWrite(t, m.d, p, off)
		m.set(off, p)
	case k < 14:
		m.check(t, off, n, at)
	case k == 14:
		if z, ok := image.As[image.ZeroWriter](m.d); ok {
			if err := z.WriteZeroes(off, n); !unsupported(err) {
				require.NoError(t, err, at)
				m.set(off, make([]byte, n))
			}
		}
	case k == 15:
		if c, ok := image.As[image.Discarder](m.d); ok {
			if err := c.Discard(off, n); !unsupported(err) {
				require.NoError(t, err, at)
				for i := off; i < off+n; i++ {
					m.void[i] = true
				}
			}
		}
	case k == 16:
		s.stepResize(t, m, rng, at)
	case k == 17:
		require.NoError(t, m.d.Sync(), at)
	case k == 18:
		if c, ok := image.As[image.CacheDropper](m.d); ok {
			if err := c.DropCache(); !unsupported(err) {
				require.NoError(t, err, at)
			}
		}
	case s.Reopen != nil && rng.IntN(3) == 0:
		require.NoError(t, m.d.Sync(), at)
		m.d = s.Reopen(t, m.d)
		require.Equal(t, size, m.d.Size(), at)
	}
}

func (s *suite) stepResize(t *testing.T, m *modelled, rng *rand.Rand, at string) {
	t.Helper()
	r, ok := image.As[image.Resizer](m.d)
	if !ok {
		return
	}
	size := int64(len(m.data))
	to := s.round(max(1, size/2+rng.Int64N(size)))
	if to > 6<<20 {
		to = s.round(1 << 20)
	}
	err := r.Resize(to)
	if unsupported(err) || errors.Is(err, image.ErrNoSpace) {
		require.Equal(t, size, m.d.Size(), at)
		return
	}
	require.NoError(t, err, at)
	require.Equal(t, to, m.d.Size(), at)
	data, void := make([]byte, to), make([]bool, to)
	copy(data, m.data)
	copy(void, m.void)
	m.data, m.void = data, void
}

// randRange returns a range of one byte or more; small ones are likelier.
func randRange(rng *rand.Rand, size int64) (off, n int64) {
	off = rng.Int64N(size)
	if rng.IntN(3) == 0 {
		off -= off % []int64{512, 4096, 65536}[rng.IntN(3)]
	}
	n = 1 + rng.Int64N(min(size-off, int64(1)<<rng.IntN(19)))
	if rng.IntN(3) == 0 && n > 512 {
		n -= n % 512
	}
	return off, n
}

// testConcurrency has writers at ranges that are disjoint but share sectors,
// and readers across them.
func (s *suite) testConcurrency(t *testing.T) {
	const stripe, writers, rounds = 1000, 8, 60
	d := s.make(t, stripe*writers*4)
	defer mustClose(t, d)
	var wg sync.WaitGroup
	fail := make(chan error, 2*writers)
	for w := range int64(writers) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(w)))
			for i := range int64(rounds) {
				// Each stripe number is this writer's, modulo.
				off := (rng.Int64N(4)*writers + w) * stripe
				p := bytes.Repeat([]byte{byte(w*rounds + i)}, stripe)
				if _, err := d.WriteAt(p, off); err != nil {
					fail <- err
					return
				}
				got := make([]byte, stripe)
				if err := image.ReadFull(d, got, off); err != nil || !bytes.Equal(p, got) {
					fail <- fmt.Errorf("writer %d, step %d doesn't read what it wrote (error %w)", w, i, err)
					return
				}
				if i%16 == 0 {
					if err := d.Sync(); err != nil {
						fail <- err
						return
					}
				}
			}
		})
		wg.Go(func() {
			p := make([]byte, 5000)
			for i := range int64(rounds) {
				if err := image.ReadFull(d, p, (i*777+w)%(d.Size()-5000)); err != nil {
					fail <- err
					return
				}
			}
		})
	}
	wg.Wait()
	close(fail)
	for err := range fail {
		require.NoError(t, err)
	}
	for i := range int64(4 * writers) {
		p := mustRead(t, d, i*stripe, stripe)
		require.Equal(t, bytes.Repeat(p[:1], stripe), p, "stripe %d", i)
	}
}

func (s *suite) testClosed(t *testing.T) {
	d := s.make(t, 4096)
	mustClose(t, d)
	p := make([]byte, 512)
	_, err := d.ReadAt(p, 0)
	require.ErrorIs(t, err, image.ErrClosed, "ReadAt")
	_, err = d.WriteAt(p, 0)
	require.ErrorIs(t, err, image.ErrClosed, "WriteAt")
	require.ErrorIs(t, d.Sync(), image.ErrClosed, "Sync")
	require.ErrorIs(t, d.Close(), image.ErrClosed, "Close")
	d.Size() // anything, but no panic
	for name, op := range rangeOps(d) {
		if err := op(0, 512); err != nil && !unsupported(err) {
			require.ErrorIs(t, err, image.ErrClosed, name)
		}
	}
	if r, ok := image.As[image.Resizer](d); ok {
		if err := r.Resize(s.round(8192)); !unsupported(err) {
			require.ErrorIs(t, err, image.ErrClosed, "Resize")
		}
	}
	if c, ok := image.As[image.CacheDropper](d); ok {
		if err := c.DropCache(); !unsupported(err) {
			require.ErrorIs(t, err, image.ErrClosed, "DropCache")
		}
	}
}

// testCloseWhileBusy closes under load: each call works, or says so.
func (s *suite) testCloseWhileBusy(t *testing.T) {
	d := s.make(t, 64<<10)
	var wg sync.WaitGroup
	var begun sync.WaitGroup
	fail := make(chan error, 8)
	for w := range int64(4) {
		begun.Add(1)
		wg.Go(func() {
			p := make([]byte, 700)
			for i := 0; ; i++ {
				_, err := d.WriteAt(p, w*8192)
				if err == nil {
					_, err = d.ReadAt(p, w*8192)
				}
				if err == nil && i%8 == 0 {
					err = d.Sync()
				}
				if i == 0 {
					begun.Done()
				}
				if err != nil {
					fail <- err
					return
				}
			}
		})
	}
	begun.Wait()
	mustClose(t, d)
	wg.Wait()
	close(fail)
	for err := range fail {
		require.ErrorIs(t, err, image.ErrClosed)
		require.NotErrorIs(t, err, io.EOF)
	}
}
