package nvstore_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

// A reverter is a store with what takes its image back in time underneath.
type reverter struct {
	s            *nvstore.Store
	save, revert func()
	bitByBit     bool // what reads meanwhile may see half of it
}

// reverters are the ways in which an image goes back under a store.
var reverters = []struct {
	name string
	make func(t *testing.T, o *nvstore.CreateOptions) reverter
}{
	{"QCOW2", func(t *testing.T, o *nvstore.CreateOptions) reverter {
		return snapshotted(t, o, func(d image.Device) image.Device { return d })
	}},
	{"Window", func(t *testing.T, o *nvstore.CreateOptions) reverter {
		return snapshotted(t, o, func(d image.Device) image.Device {
			w, err := image.Window(d, 16<<20, 32<<20)
			require.NoError(t, err)
			return w
		})
	}},
	{"QCOW2Small", func(t *testing.T, o *nvstore.CreateOptions) reverter {
		o.ClusterSize = 512
		return snapshotted(t, o, func(d image.Device) image.Device { return d })
	}},
	{"Raw", func(t *testing.T, o *nvstore.CreateOptions) reverter {
		// As with dd, which heeds no lock.
		path := filepath.Join(t.TempDir(), "x")
		o.Format, o.Size = "raw", 4<<20
		s, err := nvstore.Create(path, o)
		require.NoError(t, err)
		var saved []byte
		return reverter{s: s, bitByBit: true, save: func() {
			saved, err = os.ReadFile(path)
			require.NoError(t, err)
		}, revert: func() {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			require.NoError(t, err)
			_, err = f.WriteAt(saved, 0)
			require.NoError(t, err)
			require.NoError(t, f.Close())
		}}
	}},
	{"Memory", func(t *testing.T, o *nvstore.CreateOptions) reverter {
		d := imagetest.NewCrash(4<<20, nil)
		s, err := nvstore.CreateDevice(d, o)
		require.NoError(t, err)
		var saved *imagetest.Content
		return reverter{s: s, save: func() { saved = d.Snapshot() }, revert: func() { d.Revert(saved) }}
	}},
}

func snapshotted(t *testing.T, o *nvstore.CreateOptions, wrap func(image.Device) image.Device) reverter {
	c, err := chain.Create(filepath.Join(t.TempDir(), "x"), &chain.CreateOptions{ClusterSize: o.ClusterSize})
	require.NoError(t, err)
	require.NoError(t, c.Commit())
	snaps, ok := image.As[image.Snapshotter](c.Device)
	require.True(t, ok)
	s, err := nvstore.CreateDevice(wrap(c.Device), o)
	require.NoError(t, err)
	return reverter{s: s, save: func() { require.NoError(t, snaps.Snapshots().Create("s")) },
		revert: func() { require.NoError(t, snaps.Snapshots().Revert("s")) }}
}

func eachReverter(t *testing.T, idle time.Duration, run func(t *testing.T, r reverter)) {
	for _, rv := range reverters {
		for _, k := range kinds {
			t.Run(rv.name+"/"+k.name, func(t *testing.T) {
				o := &nvstore.CreateOptions{Idle: idle, SealNames: k.names}
				if k.sealed {
					o.Key = rawKey(t, theKey)
				}
				r := rv.make(t, o)
				run(t, r)
				clean(t, r.s)
				require.NoError(t, r.s.Close())
			})
		}
	}
}

// The next commit after a revert notices; then the old state shows, and the
// store goes on from it.
func TestRevertIsNoticed(t *testing.T) {
	eachReverter(t, -1, func(t *testing.T, r reverter) {
		one, two := fill(20000, "one"), fill(20000, "two")
		require.NoError(t, r.s.Put("a", one, nil))
		gen := generation(t, r.s)
		r.save()
		require.NoError(t, r.s.Put("a", two, nil))
		require.NoError(t, r.s.Put("b", two, nil))
		r.revert()
		runs := 0
		err := r.s.Update(func(tx *nvstore.Tx) error { runs++; return tx.Put("c", one, nil) })
		require.ErrorIs(t, err, nvstore.ErrReverted)
		require.Equal(t, 1, runs)
		require.Equal(t, gen, generation(t, r.s))
		get(t, r.s, "a", one)
		absent(t, r.s, "b")
		absent(t, r.s, "c")
		clean(t, r.s)
		require.NoError(t, r.s.Put("c", one, nil))
		get(t, r.s, "c", one)
		r.revert()
		require.ErrorIs(t, r.s.Delete("a"), nvstore.ErrReverted)
		get(t, r.s, "a", one)
		absent(t, r.s, "c")
	})
}

func TestUpdateAgainReruns(t *testing.T) {
	eachReverter(t, -1, func(t *testing.T, r reverter) {
		add := func(tx *nvstore.Tx) error {
			p, err := tx.Get("n", 0)
			if err != nil {
				return err
			}
			return tx.Put("n", append(p, '+'), nil)
		}
		require.NoError(t, r.s.Put("n", []byte{}, nil))
		r.save()
		require.NoError(t, r.s.Update(add))
		require.NoError(t, r.s.Update(add))
		r.revert()
		var seen []int
		require.NoError(t, r.s.UpdateAgain(func(tx *nvstore.Tx) error {
			e, err := tx.Stat("n")
			require.NoError(t, err)
			seen = append(seen, int(e.Size))
			return add(tx) // where its blocks may be gone
		}))
		require.Equal(t, []int{2, 0}, seen)
		get(t, r.s, "n", []byte("+"))
		// An error of its own isn't run again.
		cause := errors.New("no")
		runs := 0
		require.Equal(t, cause, r.s.UpdateAgain(func(*nvstore.Tx) error { runs++; return cause }))
		require.Equal(t, 1, runs)
	})
}

// A reader whose blocks are gone learns that, and not that they are damaged.
func TestRevertUnderReaders(t *testing.T) {
	eachReverter(t, -1, func(t *testing.T, r reverter) {
		require.NoError(t, r.s.Put("a", fill(50000, "one"), nil))
		r.save()
		for i := range 6 {
			require.NoError(t, r.s.Put("a", fill(50000, fmt.Sprint(i)), nil))
		}
		r.revert()
		_, err := r.s.Get("a")
		if err != nil {
			require.ErrorIs(t, err, nvstore.ErrReverted)
			require.NotErrorIs(t, err, nvstore.ErrCorrupt)
		}
		// By now, or after a commit where what was read was still there.
		if err == nil {
			require.ErrorIs(t, r.s.Put("b", nil, nil), nvstore.ErrReverted)
		}
		get(t, r.s, "a", fill(50000, "one"))
	})
}

// Eight readers and a writer while the image goes back again and again: each
// sees one whole state or ErrReverted.
func TestRevertUnderLoad(t *testing.T) {
	eachReverter(t, -1, func(t *testing.T, r reverter) {
		if r.bitByBit {
			return // half a revert is damage
		}
		put := func(v uint64) error {
			return r.s.Update(func(tx *nvstore.Tx) error {
				return errors.Join(tx.Put("left", pair(v), nil), tx.Put("right", pair(v), nil))
			})
		}
		require.NoError(t, put(0))
		r.save()
		var stop atomic.Bool
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for !stop.Load() {
					if _, err := readPair(r.s); err != nil && !assert.ErrorIs(t, err, nvstore.ErrReverted) {
						return
					}
				}
			})
		}
		for round := range imagetest.Scale(3) {
			for v := range 4 {
				if err := put(uint64(10*round + v)); err != nil {
					require.ErrorIs(t, err, nvstore.ErrReverted)
				}
			}
			r.revert()
		}
		stop.Store(true)
		wg.Wait()
		_ = put(5) // notices the last one, if nobody did
		_, err := readPair(r.s)
		require.NoError(t, err)
	})
}

// What a device wrote before a revert doesn't come back after it, whoever
// noticed the revert.
func TestRevertDropsWrites(t *testing.T) {
	for name, notice := range map[string]func(t *testing.T, r reverter, other *nvstore.Blob){
		"Itself": func(*testing.T, reverter, *nvstore.Blob) {},
		"Update": func(t *testing.T, r reverter, _ *nvstore.Blob) {
			require.ErrorIs(t, r.s.Put("c", nil, nil), nvstore.ErrReverted)
		},
		"UpdateAgain": func(t *testing.T, r reverter, _ *nvstore.Blob) {
			require.NoError(t, r.s.UpdateAgain(func(tx *nvstore.Tx) error { return tx.Put("c", nil, nil) }))
		},
		"OtherBlob": func(t *testing.T, r reverter, other *nvstore.Blob) {
			_, err := other.WriteAt([]byte("x"), 0)
			require.NoError(t, err)
			require.ErrorIs(t, other.Sync(), nvstore.ErrReverted)
		},
		"Reload": func(t *testing.T, r reverter, _ *nvstore.Blob) {
			require.NoError(t, r.s.Dir().Reload())
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachReverter(t, -1, func(t *testing.T, r reverter) { testRevertDropsWrites(t, r, notice) })
		})
	}
}

func testRevertDropsWrites(t *testing.T, r reverter, notice func(*testing.T, reverter, *nvstore.Blob)) {
	b, err := r.s.Blob("nvm", &nvstore.Meta{})
	require.NoError(t, err)
	other, err := r.s.Blob("other", &nvstore.Meta{})
	require.NoError(t, err)
	_, err = b.WriteAt(fill(10000, "one"), 0)
	require.NoError(t, err)
	require.NoError(t, b.Sync())
	r.save()
	require.NoError(t, b.Truncate(20000))
	require.NoError(t, b.Sync())
	_, err = b.WriteAt([]byte("unsynced"), 5000)
	require.NoError(t, err)
	require.NoError(t, b.Truncate(30000))
	r.revert()
	notice(t, r, other)
	require.ErrorIs(t, b.Sync(), nvstore.ErrReverted)
	require.NoError(t, b.Sync(), "said once, and nothing is left to write")
	require.EqualValues(t, 10000, b.Size())
	get(t, r.s, "nvm", fill(10000, "one"))
	got := make([]byte, 10000)
	_, err = b.ReadAt(got, 0)
	require.NoError(t, err)
	require.Equal(t, fill(10000, "one"), got)
	_, err = b.WriteAt([]byte("after"), 5000)
	require.NoError(t, err)
	require.NoError(t, b.Close())
	want := fill(10000, "one")
	copy(want[5000:], "after")
	get(t, r.s, "nvm", want)
	require.NoError(t, other.Close())
}

// A blob without unsynced writes just follows, also to its own absence.
func TestRevertIsFollowed(t *testing.T) {
	eachReverter(t, -1, func(t *testing.T, r reverter) {
		b, err := r.s.Blob("nvm", &nvstore.Meta{})
		require.NoError(t, err)
		_, err = b.WriteAt([]byte("old"), 0)
		require.NoError(t, err)
		require.NoError(t, b.Sync())
		r.save()
		young, err := r.s.Blob("young", &nvstore.Meta{})
		require.NoError(t, err)
		dirty, err := r.s.Blob("dirty", &nvstore.Meta{})
		require.NoError(t, err)
		_, err = dirty.WriteAt([]byte("x"), 0)
		require.NoError(t, err)
		_, err = b.WriteAt([]byte("newer"), 0)
		require.NoError(t, err)
		require.NoError(t, b.Sync())
		r.revert()
		require.ErrorIs(t, r.s.Put("x", nil, nil), nvstore.ErrReverted)

		p := make([]byte, 3)
		_, err = b.ReadAt(p, 0)
		require.NoError(t, err)
		require.Equal(t, "old", string(p))
		require.EqualValues(t, 3, b.Size())
		_, err = b.WriteAt([]byte("O"), 0)
		require.NoError(t, err)
		require.NoError(t, b.Close())
		get(t, r.s, "nvm", []byte("Old"))

		for range 2 {
			_, err = young.ReadAt(p, 0)
			require.ErrorIs(t, err, nvstore.ErrNotFound)
		}
		require.ErrorIs(t, young.Close(), nvstore.ErrNotFound)
		_, err = dirty.WriteAt([]byte("y"), 1)
		require.ErrorIs(t, err, nvstore.ErrReverted)
		require.ErrorIs(t, dirty.Sync(), nvstore.ErrNotFound)
		require.ErrorIs(t, dirty.Close(), nvstore.ErrNotFound)
	})
}

// Settling after idle time notices too, and tells blobs.
func TestIdleSettles(t *testing.T) {
	d := imagetest.NewCrash(4<<20, nil)
	s, err := nvstore.CreateDevice(d, &nvstore.CreateOptions{Idle: time.Millisecond})
	require.NoError(t, err)
	settled := func() bool {
		in, err := s.Info()
		require.NoError(t, err)
		return in.Settled
	}
	require.NoError(t, s.Put("x", []byte("one"), nil))
	require.Eventually(t, settled, 10*time.Second, time.Millisecond)
	b, err := s.Blob("x", nil)
	require.NoError(t, err)
	saved := d.Snapshot()
	_, err = b.WriteAt([]byte("two"), 0)
	require.NoError(t, err)
	require.NoError(t, s.Put("y", nil, nil))
	d.Revert(saved) // before it settles, or after: both are good
	require.Eventually(t, func() bool {
		_, err := s.Get("y")
		if err == nil {
			// It settled before the revert. One more commit does.
			require.ErrorIs(t, s.Put("z", nil, nil), nvstore.ErrReverted)
		}
		return errors.Is(err, nvstore.ErrNotFound)
	}, 10*time.Second, 5*time.Millisecond)
	require.ErrorIs(t, b.Sync(), nvstore.ErrReverted)
	get(t, s, "x", []byte("one"))
	require.NoError(t, s.Close())
}

// Refresh shows readers a revert before any commit comes, and brings a handle
// back to life that met half of one.
func TestRefresh(t *testing.T) {
	eachReverter(t, -1, func(t *testing.T, r reverter) {
		require.NoError(t, r.s.Put("a", fill(20000, "one"), nil))
		b, err := r.s.Blob("a", nil)
		require.NoError(t, err)
		changed, err := r.s.Dir().Refresh()
		require.NoError(t, err)
		require.False(t, changed)
		r.save()
		require.NoError(t, r.s.Put("a", fill(20000, "two"), nil))
		require.NoError(t, r.s.Put("b", nil, nil))
		r.revert()
		changed, err = r.s.Dir().Refresh()
		require.NoError(t, err)
		require.True(t, changed)
		get(t, r.s, "a", fill(20000, "one"))
		absent(t, r.s, "b")
		p := make([]byte, 20000)
		_, err = b.ReadAt(p, 0)
		require.NoError(t, err)
		require.Equal(t, fill(20000, "one"), p)
		require.NoError(t, r.s.Put("c", nil, nil), "there is nothing left to notice")
		changed, err = r.s.Dir().Refresh()
		require.NoError(t, err)
		require.False(t, changed)
	})
}

func TestRefreshAfterHalfARevert(t *testing.T) {
	d := imagetest.NewCrash(4<<20, nil)
	s, err := nvstore.CreateDevice(d, &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	require.NoError(t, s.Put("a", fill(20000, "one"), nil))
	whole := d.Snapshot()
	_, err = d.WriteAt(make([]byte, 1<<20), 0)
	require.NoError(t, err)
	changed, err := s.Dir().Refresh()
	require.ErrorIs(t, err, nvstore.ErrReverted)
	require.True(t, changed)
	_, err = s.Get("a")
	require.ErrorIs(t, err, nvstore.ErrReverted)
	_, err = s.Dir().Refresh()
	require.ErrorIs(t, err, nvstore.ErrReverted)
	d.Revert(whole)
	changed, err = s.Dir().Refresh()
	require.NoError(t, err)
	require.True(t, changed)
	get(t, s, "a", fill(20000, "one"))
	require.NoError(t, s.Put("b", nil, nil))
	require.NoError(t, s.Close())
	_, err = s.Dir().Refresh()
	require.ErrorIs(t, err, nvstore.ErrClosed)
}

// While the gate is closed, nothing is written.
func TestGate(t *testing.T) {
	var gate sync.RWMutex
	d := imagetest.NewCrash(4<<20, nil)
	s, err := nvstore.CreateDevice(d, nil)
	require.NoError(t, err)
	require.NoError(t, s.Close())
	var passed atomic.Int64
	o := &nvstore.Options{Idle: time.Millisecond, Gate: func() func() {
		gate.RLock()
		passed.Add(1)
		return gate.RUnlock
	}}
	again := imagetest.NewCrash(4<<20, nil)
	again.Revert(d.Snapshot())
	s, err = nvstore.OpenDevice(again, o)
	require.NoError(t, err)
	require.NoError(t, s.Put("a", []byte("x"), nil))
	b, err := s.Blob("a", nil)
	require.NoError(t, err)
	_, err = b.WriteAt([]byte("y"), 0)
	require.NoError(t, err)
	gate.Lock()
	writes := make(chan error, 3)
	go func() { writes <- s.Put("b", []byte("x"), nil) }()
	go func() { writes <- b.Sync() }()
	go func() { writes <- s.Dir().Settle() }()
	for range 100 {
		get(t, s, "a", []byte("x")) // readers don't wait
		time.Sleep(100 * time.Microsecond)
	}
	require.Empty(t, writes)
	gate.Unlock()
	for range 3 {
		require.NoError(t, <-writes)
	}
	get(t, s, "a", []byte("y"))
	require.NoError(t, s.Close())
	require.GreaterOrEqual(t, passed.Load(), int64(5))
}
