package nvstore_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

// Opening, listing, putting and checking take less than 64 MiB, in an image of
// 8 TiB with 100 000 blobs.
func TestMemoryIsBounded(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.qcow2")
	c, err := chain.Create(path, &chain.CreateOptions{Size: 8 << 40})
	require.NoError(t, err)
	s, err := nvstore.CreateDevice(noSync{c.Device}, &nvstore.CreateOptions{Idle: -1, Key: rawKey(t, theKey)})
	require.NoError(t, err)
	populate(t, s, 100_000)
	require.NoError(t, s.Close())
	require.NoError(t, c.Commit())

	cmd := exec.Command(os.Args[0], "-test.run=^TestMemory$", "-test.v")
	// The garbage collector is told the goal, or how far it lets garbage pile
	// up would depend on how busy the machine is.
	cmd.Env = append(os.Environ(), "NVSTORE_MEMORY_TEST="+path, "GOMEMLIMIT=48MiB")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	var used, all int64
	for i := range out {
		if n, _ := fmt.Sscanf(string(out[i:]), "memory: %d of %d\n", &used, &all); n == 2 {
			break
		}
	}
	require.Positive(t, all, "%s", out)
	t.Logf("%.1f MiB, %.1f MiB with the program itself", float64(used)/(1<<20), float64(all)/(1<<20))
	if !raceDetector {
		require.Less(t, used, int64(maxMemory))
	}
}

// noSync makes filling quick.
type noSync struct{ image.Device }

func (d noSync) Sync() error { return nil }

// TestMemory runs in a process of its own (TestMemoryIsBounded).
func TestMemory(t *testing.T) {
	path := os.Getenv("NVSTORE_MEMORY_TEST")
	if path == "" {
		return // the other test is the one
	}
	runtime.GC()
	base := peak(t)
	s, err := nvstore.Open(path, &nvstore.Options{Idle: -1, Key: rawKey(t, theKey)})
	require.NoError(t, err)
	entries := 0
	require.NoError(t, s.View(func(tx *nvstore.Tx) error {
		for _, err := range tx.List("") {
			require.NoError(t, err)
			entries++
		}
		return nil
	}))
	rng := newRand(t)
	data := fill(143<<10, "memory")
	for i := range imagetest.Scale(200) {
		data[0] = byte(i)
		require.NoError(t, s.Put(blobName(rng.IntN(entries)), data, nil))
	}
	b, err := s.Blob("big", &nvstore.Meta{})
	require.NoError(t, err)
	for i := range 24 {
		_, err := b.WriteAt(fill(1<<20, "big"), int64(i)<<20)
		require.NoError(t, err)
	}
	require.NoError(t, b.Close())
	clean(t, s)
	require.NoError(t, s.Close())
	fmt.Printf("memory: %d of %d\n", peak(t)-base, peak(t))
}

const maxMemory = 64 << 20 // bytes, beyond what the program has anyway
