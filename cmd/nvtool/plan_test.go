package main

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

// TestPlanIsEnough makes a store of exactly the planned size, which can't
// grow, and rewrites its blobs many times in every way that the plan allows.
func TestPlanIsEnough(t *testing.T) {
	seed := uint64(envInt("NVSTORE_SEED", int(time.Now().UnixNano()>>10)))
	rounds := 8 * envInt("NVSTORE_SCALE", 1)
	t.Logf("seed %d: NVSTORE_SEED=%d go test -run TestPlanIsEnough ./cmd/nvtool", seed, seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	fixed := [][]string{
		{"tpm/permanent=6025"},
		{"tpm/permanent=16k", "tpm/volatile=8k", "tpm/savestate=64k", "uefi/vars=528k", "net0/nvm=256k"},
		{"a=0"},
		{"large=6M"},
		{"one=1M", "two=1M", "three=1M"},
		manyBlobs(300, 700),
	}
	for i := range len(fixed) + rounds {
		var args []string
		if i < len(fixed) {
			args = fixed[i]
		} else {
			for k := range 1 + rng.IntN(12) {
				args = append(args, fmt.Sprintf("blob/%d=%d", k, rng.Int64N(1<<(4+rng.IntN(17)))))
			}
		}
		for _, atOnce := range []bool{false, true} {
			o := &planOptions{growth: 25, slack: 15, atOnce: atOnce}
			if i >= len(fixed) && rng.IntN(2) == 0 {
				o.chunk = size(4096 << rng.IntN(9))
			}
			p, err := makePlan(args, o)
			require.NoError(t, err)
			checkPlan(t, p, o, rng, args)
		}
	}
}

func manyBlobs(n, size int) []string {
	args := make([]string, n)
	for i := range args {
		args[i] = fmt.Sprintf("dev/%d/eeprom=%d", i, size)
	}
	return args
}

func checkPlan(t *testing.T, p *plan, o *planOptions, rng *rand.Rand, args []string) {
	key, err := keyslot.RawKey(make([]byte, 32))
	require.NoError(t, err)
	s, err := nvstore.CreateDevice(imagetest.NewMemory(p.ImageSize), &nvstore.CreateOptions{MaxSize: p.ImageSize, Key: key, Idle: -1})
	require.NoError(t, err)
	defer func() { require.NoError(t, s.Close()) }()
	n := 0
	put := func(tx *nvstore.Tx, b *planBlob) error {
		n++
		// At its largest, mostly, so that the room is needed.
		size := b.Grown
		if rng.IntN(4) == 0 {
			size = rng.Int64N(b.Grown + 1)
		}
		return tx.Put(b.Name, derive(9, int64(n), 0, size), &nvstore.Meta{Type: "some-type-of-state", Writer: "a writer with a version 1.2.3", ChunkSize: int(b.ChunkSize)})
	}
	for round := range 24 {
		run := func(fn func(tx *nvstore.Tx) error) {
			require.NoError(t, s.Update(fn), "round %d, at once %v, chunks of %d, %v: planned %d bytes", round, o.atOnce, o.chunk, args, p.ImageSize)
		}
		if o.atOnce {
			run(func(tx *nvstore.Tx) error {
				for _, b := range p.Blobs {
					if err := put(tx, b); err != nil {
						return err
					}
				}
				return nil
			})
			continue
		}
		for range len(p.Blobs) {
			b := p.Blobs[rng.IntN(len(p.Blobs))]
			if round == 0 {
				b = p.Blobs[n%len(p.Blobs)]
			}
			run(func(tx *nvstore.Tx) error { return put(tx, b) })
			if len(p.Blobs) > 50 && round > 4 {
				return
			}
		}
	}
	info, err := s.Info()
	require.NoError(t, err)
	require.Equal(t, p.ImageSize, info.Size)
	// A plan that is far too large is of no use either.
	require.Less(t, p.ImageSize, int64(1<<20)+7*(p.Content+p.Nodes), "%v", args)
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]int64{"0": 0, "1": 1, "512": 512, "64k": 64 << 10, "64K": 64 << 10, "64KiB": 64 << 10,
		"1M": 1 << 20, "3G": 3 << 30, "1T": 1 << 40, "8191P": 8191 << 50} {
		got, err := parseSize(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
		again, err := parseSize(formatSize(got))
		require.NoError(t, err)
		require.Equal(t, want, again)
	}
	for _, text := range []string{"", "k", "-1", "1.5M", "1 M", "0x10", "8192P", "99999999999999999999", "1KB", "1KK"} {
		_, err := parseSize(text)
		require.Error(t, err, text)
	}
	require.Equal(t, "1.5 KiB", roughSize(1536))
	require.Equal(t, "64 MiB", roughSize(64<<20))
}
