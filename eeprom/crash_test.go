package eeprom_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/eeprom"
	"nvstore.dev/eeprom/i2c"
	"nvstore.dev/eeprom/microwire"
	"nvstore.dev/eeprom/spi"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

// board is a machine with a chip on each bus, in one store.
type board struct {
	s     *nvstore.Store
	i2c   *i2c.Chip
	micro *microwire.Chip
	spi   *spi.Chip
}

// blobs are the chips' names and sizes.
var blobs = []struct {
	name string
	size int64
}{{"i2c", 32 << 10}, {"microwire", 128}, {"spi", 512}}

func newBoard(t testing.TB, s *nvstore.Store) *board {
	b := &board{s: s, i2c: newI2C(t, open(t, s, "i2c", 32<<10), nil)}
	mp, err := microwire.Find("93C46")
	require.NoError(t, err)
	b.micro, err = microwire.New(mp, open(t, s, "microwire", 128), nil)
	require.NoError(t, err)
	sp, err := spi.Find("25040")
	require.NoError(t, err)
	b.spi, err = spi.New(sp, open(t, s, "spi", 512), nil)
	require.NoError(t, err)
	microwireSend(t, b.micro, 0b1_00_110000, 9)
	return b
}

// step writes something, as a guest does; it returns when the guest has seen
// that it is complete.
func (b *board) step(t testing.TB, rng *rand.Rand) {
	switch rng.IntN(5) {
	case 0, 1:
		i2cWrite(t, b.i2c, rng.IntN(32<<10), fill(rng, 1+rng.IntN(70)))
	case 2:
		spiSend(t, b.spi, 6)
		spiSend(t, b.spi, append([]byte{2 | byte(rng.IntN(2)<<3), byte(rng.Uint32())}, fill(rng, 1+rng.IntN(12))...)...)
	case 3:
		spiSend(t, b.spi, 6)
		spiSend(t, b.spi, 1, byte(rng.IntN(3)<<2)) // never all
	case 4:
		word := rng.Uint32() & 0x3f
		switch rng.IntN(4) {
		case 0:
			microwireSend(t, b.micro, 0b1_00_100000, 9) // ERAL
		case 1:
			microwireSend(t, b.micro, 0b1_00_010000<<16|rng.Uint32()&0xffff, 25) // WRAL
		default:
			microwireSend(t, b.micro, (0b1_01_000000|word)<<16|rng.Uint32()&0xffff, 25)
		}
	}
}

func fill(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

// content is all that the chips keep.
func content(s *nvstore.Store) (string, error) {
	var all bytes.Buffer
	for _, want := range blobs {
		b, err := eeprom.Open(s, want.name, want.size, nil)
		if err != nil {
			return "", err
		}
		status, err := b.Status()
		if err != nil {
			return "", err
		}
		p, err := s.Get(want.name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&all, "%s %02x ", want.name, status)
		all.Write(p)
	}
	return all.String(), nil
}

// Whatever instant the power fails at, each write is whole or not there, and
// what a guest has seen complete is there: WRAL over a whole chip, too.
func TestPowerCut(t *testing.T) {
	steps, samples := imagetest.Scale(25), 4
	if testing.Short() {
		steps = 8
	}
	rng := rand.New(rand.NewPCG(imagetest.Seed(t), 0))
	dev := imagetest.NewCrash(1<<20, nil)
	s, err := nvstore.CreateDevice(dev, &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	b := newBoard(t, s)
	states, torn := 0, 0
	for range steps {
		before, err := content(s)
		require.NoError(t, err)
		dev.Settle()
		b.step(t, rng)
		after, err := content(s)
		require.NoError(t, err)
		for cut := range dev.Len() + 1 {
			for st := range dev.CrashStates(cut, &imagetest.StateConfig{Exhaustive: 4, Samples: samples, Seed: rng.Uint64()}) {
				legal := []string{before, after}
				if cut == dev.Len() {
					legal = legal[1:] // the guest knows
				}
				got := reopened(t, st)
				require.True(t, got == legal[0] || got == legal[len(legal)-1], "%v", st)
				states++
				if got == before && before != after {
					torn++
				}
			}
		}
	}
	require.NoError(t, s.Close())
	require.Greater(t, torn, steps)
	t.Logf("%d writes, %d states after power cuts, of which %d from before the write", steps, states, torn)
}

func reopened(t testing.TB, st *imagetest.State) string {
	s, err := nvstore.OpenDevice(st.Open(), &nvstore.Options{Idle: -1})
	require.NoError(t, err, "%v", st)
	got, err := content(s)
	require.NoError(t, err, "%v", st)
	require.NoError(t, s.Close())
	return got
}

// Each operation of the medium fails once, or for ever: a guest never sees a
// write complete that isn't there after the power comes back.
func TestMediumFails(t *testing.T) {
	for _, f := range []imagetest.Fault{
		{Mode: imagetest.Fail, Ops: imagetest.OpWrite | imagetest.OpSync},
		{Mode: imagetest.Fail, Ops: imagetest.OpWrite | imagetest.OpSync, Forever: true},
		{Mode: imagetest.FailAfter, Ops: imagetest.OpWrite | imagetest.OpSync},
		{Mode: imagetest.Short, Ops: imagetest.OpWrite},
	} {
		n := imagetest.EachFault(f, func(f imagetest.Fault) int { return failing(t, f) })
		require.GreaterOrEqual(t, n, 10, "%+v", f)
	}
}

func failing(t *testing.T, f imagetest.Fault) int {
	dev := imagetest.NewCrash(1<<20, nil)
	s, err := nvstore.CreateDevice(dev, &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	newBoard(t, s)
	require.NoError(t, s.Close())
	dev = dev.Reopen()
	dev.Settle()

	faulty := imagetest.NewFault(dev, f)
	s, err = nvstore.OpenDevice(faulty, &nvstore.Options{Idle: -1})
	if err != nil {
		return faulty.Hits()
	}
	p, err := i2c.Find("24C256")
	require.NoError(t, err)
	mem, err := eeprom.Open(s, "i2c", p.Size, nil)
	require.NoError(t, err)
	c, err := i2c.New(p, mem, nil)
	require.NoError(t, err)
	done := 0
	for i := range 8 {
		if c.Start(0x50, false) != nil {
			break // busy for good
		}
		for _, b := range []byte{0, byte(i), byte(i)} {
			require.NoError(t, c.WriteByte(b))
		}
		err := c.Stop()
		require.Equal(t, err != nil, c.Busy() && !errors.Is(err, eeprom.ErrReverted))
		if c.Start(0x50, false) == nil {
			done = i + 1
		}
	}
	cut := dev.PowerCut(nil)
	again, err := nvstore.OpenDevice(cut, &nvstore.Options{Idle: -1})
	require.NoError(t, err)
	got, err := again.Get("i2c")
	require.NoError(t, err)
	for i := range done {
		require.Equal(t, byte(i), got[i], "write %d of %d", i, done)
	}
	require.NoError(t, again.Close())
	_ = s.Close()
	return faulty.Hits()
}
