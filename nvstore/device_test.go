package nvstore_test

import (
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

// A blob is a Device, in a plain store and in a sealed one.
func TestBlobDevice(t *testing.T) {
	stores := map[image.Device]*nvstore.Store{}
	device := func(t *testing.T, s *nvstore.Store) image.Device {
		b, err := s.Blob("uefi/vars", nil)
		require.NoError(t, err)
		d := b.Device()
		stores[d] = s
		return d
	}
	imagetest.Conformance(t, func(t *testing.T, n int64) image.Device {
		s, err := nvstore.CreateDevice(imagetest.NewMemory(64<<20), &nvstore.CreateOptions{Idle: -1})
		require.NoError(t, err)
		t.Cleanup(func() { s.Close() })
		b, err := s.Blob("uefi/vars", &nvstore.Meta{})
		require.NoError(t, err)
		require.NoError(t, b.Truncate(n))
		require.NoError(t, b.Close())
		return device(t, s)
	}, &imagetest.ConformanceOptions{Reopen: func(t *testing.T, d image.Device) image.Device {
		require.NoError(t, d.Close())
		return device(t, stores[d])
	}})
}

// What Blobs sync while a commit is under way is one commit.
func TestSharedCommit(t *testing.T) {
	const n = 10
	s, err := nvstore.CreateDevice(imagetest.NewMemory(16<<20), &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	defer s.Close()
	blobs := make([]*nvstore.Blob, n)
	for i := range blobs {
		blobs[i], err = s.Blob(fmt.Sprintf("b%d", i), &nvstore.Meta{})
		require.NoError(t, err)
		_, err = blobs[i].WriteAt([]byte{byte(i)}, 100)
		require.NoError(t, err)
	}
	gone := blobs[5]
	before := generation(t, s)
	busy, release, ended := make(chan struct{}), make(chan struct{}), make(chan error)
	go func() {
		ended <- s.Update(func(tx *nvstore.Tx) error {
			close(busy)
			<-release
			return tx.Delete("b5")
		})
	}()
	<-busy
	await := func(cond func() bool) {
		t.Helper()
		require.Eventually(t, cond, time.Minute, time.Millisecond)
	}
	var wg sync.WaitGroup
	errs := make([]error, n)
	// One leads and waits for the update; the others make up the next.
	for i, b := range blobs {
		wg.Go(func() { errs[i] = b.Sync() })
		if i == 0 {
			await(s.Leads)
		}
	}
	await(func() bool { return s.Joined() == n-1 })
	close(release)
	require.NoError(t, <-ended)
	wg.Wait()
	for i, b := range blobs {
		if b == gone {
			require.ErrorIs(t, errs[i], nvstore.ErrNotFound, "its own error, and nobody else's")
			continue
		}
		require.NoError(t, errs[i])
		p, err := s.Get(b.Name())
		require.NoError(t, err)
		require.EqualValues(t, i, p[100])
	}
	require.LessOrEqual(t, generation(t, s)-before, int64(1+n), "with one gone, each by itself")

	// Without a failure: two commits for all.
	require.NoError(t, s.Put("b5", nil, nil))
	before = generation(t, s)
	busy, release = make(chan struct{}), make(chan struct{})
	go func() {
		ended <- s.Update(func(*nvstore.Tx) error {
			close(busy)
			<-release
			return errStop
		})
	}()
	<-busy
	for i, b := range blobs {
		wg.Go(func() {
			if b != gone {
				_, errs[i] = b.WriteAt([]byte{byte(i + 100)}, 5000)
				errs[i] = errors.Join(errs[i], b.Sync())
			}
		})
		if i == 0 {
			await(s.Leads)
		}
	}
	await(func() bool { return s.Joined() == n-2 })
	close(release)
	require.ErrorIs(t, <-ended, errStop)
	wg.Wait()
	require.EqualValues(t, 2, generation(t, s)-before)
	for i, b := range blobs {
		if b != gone {
			require.NoError(t, errs[i])
			p, err := s.Get(b.Name())
			require.NoError(t, err)
			require.EqualValues(t, i+100, p[5000])
		}
	}
}

var errStop = errors.New("stop")
