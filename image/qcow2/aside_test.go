package qcow2_test

import (
	"bytes"
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// A watched file calls a function before each write and each Sync.
type watched struct {
	image.Device
	before func()
}

func (w *watched) Unwrap() image.Device { return w.Device }

func (w *watched) WriteAt(p []byte, off int64) (int, error) {
	w.before()
	return w.Device.WriteAt(p, off)
}

func (w *watched) Sync() error {
	w.before()
	return w.Device.Sync()
}

// TestReadsGoOn: while a snapshot is taken, applied or deleted, or the image is
// checked or repaired, reads don't wait. At every write and every Sync of the
// file another goroutine reads the disk, and the file waits for it.
func TestReadsGoOn(t *testing.T) {
	for _, v := range []struct {
		name string
		opts qcow2.CreateOptions
	}{
		{"plain", qcow2.CreateOptions{ClusterSize: 512}}, {"subclusters", qcow2.CreateOptions{ClusterSize: 16384, ExtendedL2: true}},
	} {
		t.Run(v.name, func(t *testing.T) {
			v.opts.Size = 1 << 20
			file := &watched{Device: &keep{imagetest.NewMemory(0)}, before: func() {}}
			im, err := qcow2.Create(file, &v.opts)
			require.NoError(t, err)
			old, now := make([]byte, im.Size()), make([]byte, im.Size())
			fill(old[:700_000], 1, 2, 3)
			_, err = im.WriteAt(old, 0)
			require.NoError(t, err)
			require.NoError(t, im.AddBitmap("b", nil))
			require.NoError(t, im.Snapshots().Create("old"))
			require.NoError(t, im.Resize(3<<19))
			now = append(now, make([]byte, 1<<19)...)
			fill(now, 4, 5)
			_, err = im.WriteAt(now, 0)
			require.NoError(t, err)

			states := [][]byte{now} // one of which the disk reads as
			var looks atomic.Int64
			file.before = func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				go func() {
					defer cancel()
					looks.Add(1)
					got := contents(t, im)
					found := false
					for _, s := range states {
						found = found || bytes.Equal(s, got)
					}
					if !found {
						t.Errorf("the disk reads as it never was")
					}
					for off := int64(0); off < int64(len(got)); {
						x, err := im.BlockStatus(off, int64(len(got))-off)
						if err != nil {
							t.Errorf("block status: %v", err)
							return
						}
						off += x.Length
					}
				}()
				<-ctx.Done()
				require.ErrorIs(t, ctx.Err(), context.Canceled, "a read waits")
			}
			for _, step := range []struct {
				name   string
				op     func() error
				states [][]byte
				after  []byte
			}{
				{"take", func() error { return im.Snapshots().Create("now") }, [][]byte{now}, now},
				{"check", func() error { _, err := im.Check(t.Context(), nil); return err }, [][]byte{now}, now},
				{"apply", func() error { return im.Snapshots().Revert("old") }, [][]byte{now}, old},
				{"repair", func() error { _, err := im.RepairLeaks(t.Context()); return err }, [][]byte{old}, old},
				{"delete", func() error { return im.Snapshots().Delete("old") }, [][]byte{old}, old},
				{"apply again", func() error { return im.Snapshots().Revert("now") }, [][]byte{old}, now},
				{"delete again", func() error { return im.Snapshots().Delete("now") }, [][]byte{now}, now},
			} {
				states = step.states
				before := looks.Load()
				require.NoError(t, step.op(), step.name)
				require.True(t, bytes.Equal(step.after, contents(t, im)), step.name)
				if step.name != "check" && step.name != "repair" {
					require.Greater(t, looks.Load(), before+3, step.name)
				}
			}
			file.before = func() {}
			noErrors(t, im, false)
			require.NoError(t, im.Close())
			checkDevice(t, &keep{file.Device}, now)
		})
	}
}

// TestReadersDuringChanges has many readers and some writers while snapshots
// come and go: under the race detector, what the two share shows.
func TestReadersDuringChanges(t *testing.T) {
	rng := rand.New(rand.NewPCG(seed(t), 31))
	im, d := create(t, &qcow2.CreateOptions{Size: 4 << 20, ClusterSize: 4096})
	const half = 2 << 20 // what lies below never changes
	want := make([]byte, half)
	fill(want, 9, 8, 7)
	_, err := im.WriteAt(want, 0)
	require.NoError(t, err)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	reads := atomic.Int64{}
	for w := range 3 {
		r := rand.New(rand.NewPCG(rng.Uint64(), uint64(w)))
		wg.Go(func() {
			p := make([]byte, 20000)
			for ctx.Err() == nil {
				off := r.Int64N(half - int64(len(p)))
				if _, err := im.ReadAt(p, off); err != nil || !bytes.Equal(p, want[off:][:len(p)]) {
					t.Errorf("reading at %d: %v", off, err)
					return
				}
				if _, err := im.BlockStatus(off, half-off); err != nil {
					t.Errorf("status at %d: %v", off, err)
					return
				}
				reads.Add(1)
			}
		})
	}
	wg.Go(func() {
		r := rand.New(rand.NewPCG(rng.Uint64(), 9))
		for ctx.Err() == nil {
			if _, err := im.WriteAt(want[:3000], half+r.Int64N(half-3000)); err != nil {
				t.Errorf("writing: %v", err)
				return
			}
			if _, err := im.WriteAt(want[4096:][:5000], 4096); err != nil { // the same bytes
				t.Errorf("writing: %v", err)
				return
			}
		}
	})
	for k := range 100 {
		switch name := string(rune('a' + k/4)); k % 4 {
		case 0:
			err = im.Snapshots().Create(name)
		case 1:
			_, err = im.Check(ctx, nil)
		case 2:
			err = im.Snapshots().Revert(name)
		default:
			err = im.Snapshots().Delete(name)
		}
		require.NoError(t, err)
	}
	stop()
	wg.Wait()
	t.Logf("%d reads", reads.Load())
	noErrors(t, im, false)
	require.NoError(t, im.Close())
	checkDevice(t, d, nil)
}
