package nbd

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Many share a Sync, and each gets one that began after it asked.
func TestFlusher(t *testing.T) {
	var f flusher
	var begun, done atomic.Int64
	release := make(chan struct{})
	do := func() error {
		begun.Add(1)
		<-release
		done.Add(1)
		return nil
	}
	first := make(chan error)
	go func() { first <- f.sync(do) }()
	for begun.Load() == 0 {
		time.Sleep(time.Millisecond)
	}
	// The first runs: these come too late for it, and share the next.
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			before := begun.Load()
			require.NoError(t, f.sync(do))
			require.Greater(t, done.Load(), before, "a Sync that began after this call has ended")
		})
	}
	for joined := false; !joined; time.Sleep(time.Millisecond) {
		f.mu.Lock()
		joined = f.next != nil
		f.mu.Unlock()
	}
	close(release)
	require.NoError(t, <-first)
	wg.Wait()
	require.Less(t, done.Load(), int64(51), "they share")
}
