package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/nbd"
	"nvstore.dev/nvstore"
)

// TestServeKill kills nvtool serve nbd under load, again and again: what a
// FLUSH, or a write with FUA, was acknowledged for is in the store afterwards,
// in each blob, and the store is whole.
func TestServeKill(t *testing.T) {
	kills := envInt("NVSTORE_KILLS", 20)
	seed := uint64(envInt("NVSTORE_SEED", int(time.Now().UnixNano()>>10)))
	t.Logf("%d kills, seed %d: NVSTORE_SEED=%d NVSTORE_KILLS=%d go test -run TestServeKill ./cmd/nvtool", kills, seed, seed, kills)
	rng := rand.New(rand.NewPCG(seed, 1))
	dir, err := os.MkdirTemp("", "kill") // short, for the socket
	require.NoError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	img, sock := filepath.Join(dir, "vm.qcow2"), filepath.Join(dir, "s")
	out, err := exec.Command("nvtool", "create", img, "-q").CombinedOutput()
	require.NoError(t, err, "%s", out)
	const blobs = 3
	var next uint64
	for round := range kills {
		args := []string{"serve", "nbd", img, "--socket", sock, "--pid-file", filepath.Join(dir, "pid"), "-q"}
		for i := range blobs {
			args = append(args, "--create", fmt.Sprintf("b%d=65536", i))
		}
		_ = os.Remove(filepath.Join(dir, "pid"))
		var said bytes.Buffer
		server := exec.Command("nvtool", args...)
		server.Stderr = &said
		require.NoError(t, server.Start())
		for {
			if _, err := os.Stat(filepath.Join(dir, "pid")); err == nil {
				break
			}
			require.Nil(t, server.ProcessState)
			time.Sleep(time.Millisecond)
		}
		// One writer a blob counts up in a place of its own, and notes what
		// was acknowledged.
		var acked [blobs]atomic.Uint64
		begin := next
		done := make(chan error, blobs)
		for i := range blobs {
			go func() { done <- countUp(sock, i, begin, &acked[i]) }()
		}
		time.Sleep(time.Duration(rng.IntN(60)) * time.Millisecond)
		require.NoError(t, server.Process.Kill())
		_ = server.Wait()
		for range blobs {
			require.Error(t, <-done, "the writers end with the server")
		}
		s, err := nvstore.Open(img, nil)
		require.NoError(t, err, "round %d: %s", round, said.Bytes())
		for i := range blobs {
			p, err := s.Get(fmt.Sprintf("b%d", i))
			require.NoError(t, err)
			got := binary.BigEndian.Uint64(p[4096*i+40:])
			require.GreaterOrEqual(t, got, acked[i].Load(), "round %d, blob %d: an acknowledged write is lost", round, i)
			next = max(next, got)
		}
		report, err := s.Check(context.Background(), nil)
		require.NoError(t, err)
		require.Empty(t, report.Errors)
		require.NoError(t, s.Close())
	}
	require.NotZero(t, next, "some writes were acknowledged")
}

// countUp writes numbers until the server is gone.
func countUp(sock string, i int, from uint64, acked *atomic.Uint64) error {
	d, err := nbd.Open(context.Background(), fmt.Sprintf("nbd+unix:///b%d?socket=%s", i, sock), &nbd.Options{Reconnect: -1})
	if err != nil {
		return err
	}
	defer d.Close()
	for n := from + 1; ; n++ {
		p := binary.BigEndian.AppendUint64(nil, n)
		off := int64(4096*i + 40)
		if n%3 == 0 {
			_, err = d.WriteDurable(p, off)
		} else if _, err = d.WriteAt(p, off); err == nil {
			err = d.Sync()
		}
		if err != nil {
			return err
		}
		acked.Store(n)
	}
}
