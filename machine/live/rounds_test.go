package live_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/machine/live"
	"nvstore.dev/nvstore"
)

// seeded returns a random source whose seed the log has.
func seeded(t *testing.T) *rand.Rand {
	seed := uint64(time.Now().UnixNano() >> 10)
	if s, err := strconv.ParseUint(os.Getenv("NVSTORE_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("NVSTORE_SEED=%d NVSTORE_SCALE=%s go test -run '^%s$' ./machine/live", seed, os.Getenv("NVSTORE_SCALE"), t.Name())
	return rand.New(rand.NewPCG(seed, 1))
}

// A load are writers that count up, each in a blob of its own, two values in one
// transaction, and a reader that looks whether these are always the same.
type load struct {
	s      *nvstore.Store
	issued [2]atomic.Uint64
	acked  [2]atomic.Uint64
	stop   atomic.Bool
	wg     sync.WaitGroup

	mu       sync.Mutex
	failed   error
	reverted int // commits that a revert took away
}

func startLoad(s *nvstore.Store) *load {
	l := &load{s: s}
	for i := range l.issued {
		l.wg.Go(func() { l.write(i) })
	}
	l.wg.Go(l.read)
	return l
}

func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if errors.Is(err, nvstore.ErrReverted) {
		l.reverted++
	} else if l.failed == nil {
		l.failed = err
	}
}

func value(n uint64) []byte {
	return append(binary.BigEndian.AppendUint64(nil, n), make([]byte, 3000+n%7*1500)...)
}

func (l *load) write(i int) {
	for n := uint64(1); !l.stop.Load(); n++ {
		l.issued[i].Store(n)
		err := l.s.Update(func(tx *nvstore.Tx) error {
			return errors.Join(tx.Put(fmt.Sprintf("load/%d/left", i), value(n), nil), tx.Put(fmt.Sprintf("load/%d/right", i), value(n), nil))
		})
		if err != nil {
			l.fail(err)
			continue
		}
		l.acked[i].Store(n)
	}
}

// pair reads what one writer wrote.
func pair(s *nvstore.Store, i int) (n uint64, err error) {
	err = s.View(func(tx *nvstore.Tx) error {
		left, err := tx.Get(fmt.Sprintf("load/%d/left", i), 0)
		if errors.Is(err, nvstore.ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		right, err := tx.Get(fmt.Sprintf("load/%d/right", i), 0)
		if err != nil {
			return err
		}
		if string(left) != string(right) {
			return errors.New("half a commit shows")
		}
		n = binary.BigEndian.Uint64(left)
		return nil
	})
	return n, err
}

func (l *load) read() {
	for !l.stop.Load() {
		for i := range l.issued {
			if _, err := pair(l.s, i); err != nil {
				l.fail(err)
			}
		}
		time.Sleep(time.Millisecond)
	}
}

// A saved is what a snapshot must have.
type saved struct {
	tag   string
	round byte
	blobs map[string][32]byte // but for the load's
	low   [2]uint64           // acknowledged before
	high  [2]uint64           // issued when it was over
}

// content reads all blobs but the load's.
func content(s *nvstore.Store) (map[string][32]byte, error) {
	all := map[string][32]byte{}
	err := s.View(func(tx *nvstore.Tx) error {
		clear(all)
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			if len(e.Name) > 5 && e.Name[:5] == "load/" {
				continue
			}
			p, err := tx.Get(e.Name, 0)
			if err != nil {
				return err
			}
			all[e.Name] = sha256.Sum256(p)
		}
		return nil
	})
	return all, err
}

// has demands that a store is as it was when it was saved.
func (w *saved) has(t *testing.T, s *nvstore.Store) {
	t.Helper()
	got, err := content(s)
	require.NoError(t, err, "snapshot %s", w.tag)
	require.Equal(t, w.blobs, got, "snapshot %s", w.tag)
	for i := range w.low {
		n, err := pair(s, i)
		require.NoError(t, err)
		require.GreaterOrEqual(t, n, w.low[i], "snapshot %s: what was acknowledged before it", w.tag)
		require.LessOrEqual(t, n, w.high[i], "snapshot %s: nothing from after it", w.tag)
	}
}

// TestRounds: a machine whose state is written all the time is saved and
// reverted again and again, by us and behind our back, also in the middle of
// commits. What the service reads after each revert, and what each snapshot
// holds when the machine is off, is what there was; disk and state belong
// together.
func TestRounds(t *testing.T) {
	rng := seeded(t)
	v := newVM(t)
	v.start()
	reverts := make(chan live.Revert, 100)
	a := v.attach(&live.Options{Reverted: func(r live.Revert) { reverts <- r }})
	other := v.monitor(".1")
	require.NoError(t, other.Do(ctx, "cont", nil, nil))
	s := a.Store()
	var all []saved
	var behind, straddled, lost int
	rounds := imagetest.Scale(5)
	for r := range rounds {
		round := byte(r + 1)
		require.NoError(t, put(s, "round", []byte{round}))
		require.NoError(t, put(s, fmt.Sprintf("keep/%d", r), value(rng.Uint64N(1000))))
		if r >= 3 {
			err := s.Delete(fmt.Sprintf("keep/%d", r-3))
			require.NoError(t, err)
		}
		var said string
		require.NoError(t, other.Do(ctx, "human-monitor-command", map[string]string{"command-line": fmt.Sprintf(`qemu-io guest "write -P %d 0 64k"`, round)}, &said))
		w := saved{tag: fmt.Sprintf("s%d", r), round: round}
		var err error
		w.blobs, err = content(s)
		require.NoError(t, err)
		args := map[string]any{"tag": w.tag, "vmstate": "nvstore-disk", "devices": []string{"nvstore-disk"}}

		l := startLoad(s)
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
		for i := range w.low {
			w.low[i] = l.acked[i].Load()
		}
		if rng.IntN(2) == 0 {
			require.NoError(t, a.Save(ctx, w.tag, nil))
		} else {
			require.NoError(t, other.RunJob(ctx, "snapshot-save", args, nil))
		}
		for i := range w.high {
			w.high[i] = l.issued[i].Load()
		}
		all = append(all, w)
		require.NoError(t, put(s, "round", []byte{0xff}))
		require.NoError(t, s.UpdateAgain(func(tx *nvstore.Tx) error { return tx.Delete(fmt.Sprintf("keep/%d", r)) }))
		require.NoError(t, put(s, fmt.Sprintf("new/%d", r), value(5)))
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)

		if rng.IntN(3) == 0 {
			require.NoError(t, a.Load(ctx, w.tag, nil))
		} else {
			behind++
			for len(reverts) > 0 {
				<-reverts
			}
			require.NoError(t, other.RunJob(ctx, "snapshot-load", args, nil))
			// A commit may have noticed first; then nobody need tell.
			l.stop.Store(true)
			l.wg.Wait()
			if _, err := s.Dir().Refresh(); err != nil {
				require.ErrorIs(t, err, nvstore.ErrReverted)
				straddled++ // it cut through a commit
				require.NoError(t, a.Load(ctx, w.tag, nil), "the remedy")
			}
		}
		l.stop.Store(true)
		l.wg.Wait()
		if !errors.Is(l.failed, nvstore.ErrStraddled) {
			require.NoError(t, l.failed)
		}
		lost += l.reverted
		// The writers may have committed after the load; they belong to
		// nothing that is compared.
		got, err := content(s)
		require.NoError(t, err)
		require.Equal(t, w.blobs, got, "round %d", r)
		require.NoError(t, s.UpdateAgain(func(tx *nvstore.Tx) error {
			for i := range 2 {
				for _, side := range []string{"left", "right"} {
					if err := tx.Delete(fmt.Sprintf("load/%d/%s", i, side)); err != nil && !errors.Is(err, nvstore.ErrNotFound) {
						return err
					}
				}
			}
			return nil
		}))
	}
	t.Logf("%d rounds, %d reverts behind our back, %d of them through a commit; %d commits taken away", rounds, behind, straddled, lost)
	require.NoError(t, a.Close())
	v.quit()
	v.offline(func(*nvstore.Store) {})
	for _, w := range all {
		w.offline(t, v.disk)
	}
}

func put(s *nvstore.Store, name string, p []byte) error {
	return s.UpdateAgain(func(tx *nvstore.Tx) error { return tx.Put(name, p, nil) })
}

// offline looks into a snapshot of a machine that is off.
func (w *saved) offline(t *testing.T, disk string) {
	t.Helper()
	dev, err := chain.Open(disk, &chain.Options{Format: "qcow2", ReadOnly: true, Snapshot: w.tag})
	require.NoError(t, err)
	guest := make([]byte, 64<<10)
	require.NoError(t, image.ReadFull(dev, guest, 0))
	for _, b := range guest {
		require.Equal(t, w.round, b, "snapshot %s: the guest's disk", w.tag)
	}
	state, err := image.Window(dev, guestSize, stateSize)
	require.NoError(t, err)
	s, err := nvstore.OpenDevice(state, &nvstore.Options{ReadOnly: true})
	require.NoError(t, err, "snapshot %s", w.tag)
	w.has(t, s)
	report, err := s.Check(context.Background(), nil)
	require.NoError(t, err)
	require.Empty(t, report.Errors, "snapshot %s", w.tag)
	require.NoError(t, s.Close())
}
