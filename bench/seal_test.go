package bench

import (
	"crypto/aes"
	"crypto/cipher"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/seal"
)

// sealTable measures in turns, each of which is long enough for the clock.
func sealTable(t *testing.T) {
	out := &table{title: "Sealing and opening in place, in MB/s", columns: []string{
		"bytes", "GCM seal", "ours", "ratio", "µs more", "GCM open", "ours", "ratio", "µs more"}}
	for _, n := range []int{4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20} {
		times := sealTimes(t, n, scale(300, 3))
		cells := []any{n}
		for i := 0; i < len(times); i += 2 {
			gcm, ours := times[i], times[i+1]
			cells = append(cells, speed(n, gcm), speed(n, ours), ratio(gcm, ours), whole(ours-gcm))
		}
		out.add(cells...)
	}
	show(out)
}

func speed(n int, d time.Duration) string { return fmt.Sprintf("%.0f", float64(n)/d.Seconds()/1e6) }

// sealTimes returns the median times of one GCM seal, one of ours, one GCM
// open, and one of ours.
func sealTimes(t *testing.T, n, turns int) (list []time.Duration) {
	t.Helper()
	key := make([]byte, seal.KeySize)
	block, err := aes.NewCipher(key)
	require.NoError(t, err)
	gcm, err := cipher.NewGCM(block)
	require.NoError(t, err)
	k, err := seal.NewKey(key)
	require.NoError(t, err)

	context := make([]byte, 96)
	nonce := make([]byte, gcm.NonceSize())
	plain, buf := make([]byte, n), make([]byte, n+seal.TagSize)
	stored := gcm.Seal(nil, nonce, plain, nil)
	sealed := make([]byte, n+seal.TagSize)
	box, err := k.SealInPlace(sealed, context)
	require.NoError(t, err)

	var count uint64
	counter := make([]byte, gcm.NonceSize())
	ops := []func() error{
		func() error {
			count++
			binary.LittleEndian.PutUint64(counter, count)
			gcm.Seal(buf[:0], counter, buf[:n], nil)
			return nil
		},
		func() error { _, err := k.SealInPlace(buf, context); return err },
		func() error { copy(buf, stored); _, err := gcm.Open(buf[:0], nonce, buf, nil); return err },
		func() error { copy(buf, sealed); _, err := k.OpenInPlace(buf, &box, context); return err },
	}
	per := max(1, (256<<10)/n) // operations a turn
	wall := make([][]time.Duration, len(ops))
	for range turns {
		for i, op := range ops {
			start := time.Now()
			for range per {
				require.NoError(t, op())
			}
			wall[i] = append(wall[i], time.Since(start)/time.Duration(per))
		}
	}
	for _, w := range wall {
		slices.Sort(w)
		list = append(list, w[len(w)/2])
	}
	return list
}
