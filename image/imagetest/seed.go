package imagetest

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Seed returns the seed of a random test: $NVSTORE_SEED if set, or else a new
// one. If t fails, it prints how to run t again with the same.
func Seed(t testing.TB) uint64 {
	t.Helper()
	s := rand.Uint64() >> 1
	if v := os.Getenv("NVSTORE_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 0, 64); err != nil {
			t.Fatalf("NVSTORE_SEED: %v", err)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log("repeat with: " + repro(t, s))
		}
	})
	return s
}

func repro(t testing.TB, seed uint64) string {
	return fmt.Sprintf("NVSTORE_SEED=%d go test -run '^%s$' .", seed, t.Name())
}

// Scale multiplies the length of a loop by $NVSTORE_SCALE, which is 1 if unset.
func Scale(n int) int {
	if s, err := strconv.Atoi(os.Getenv("NVSTORE_SCALE")); err == nil && s > 0 {
		return n * s
	}
	return n
}
