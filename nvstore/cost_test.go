package nvstore_test

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/raw"
	"nvstore.dev/nvstore"
)

// counted opens a raw file whose Syncs are counted but not done: what is
// counted here doesn't depend on them, and there are very many.
func counted(t testing.TB, path string) *imagetest.FaultDevice {
	t.Helper()
	d, err := raw.Create(path, 64<<20, nil)
	require.NoError(t, err)
	return imagetest.NewFault(d, imagetest.Fault{Mode: imagetest.Lose, Ops: imagetest.OpSync, Forever: true})
}

func blobName(i int) string { return fmt.Sprintf("machine/%06d/tpm/permanent", i) }

// populate puts n blobs of 8 bytes.
func populate(t testing.TB, s *nvstore.Store, n int) {
	t.Helper()
	meta := &nvstore.Meta{Type: "tpm2-permanent", Writer: "swtpm 0.7.1"}
	for i := 0; i < n; {
		require.NoError(t, s.Update(func(tx *nvstore.Tx) error {
			for range min(2000, n-i) {
				if err := tx.Put(blobName(i), binary.LittleEndian.AppendUint64(nil, uint64(i)), meta); err != nil {
					return err
				}
				i++
			}
			return nil
		}))
	}
}

// A cost is what the commits of one sort wrote.
type cost struct {
	commits, over int64 // over: more than the goal
	sum, most     imagetest.Trace
}

func (c *cost) String() string {
	n := float64(max(c.commits, 1))
	return fmt.Sprintf("%5d commits: %5.1f KiB in %4.1f writes, at most %5.1f KiB in %d; %d above 64 KiB", c.commits,
		float64(c.sum.BytesWritten)/n/1024, float64(c.sum.Writes)/n, float64(c.most.BytesWritten)/1024, c.most.Writes, c.over)
}

const (
	costGoal  = 64 << 10  // bytes that a commit of 6 KiB writes at most, wanted
	costLimit = 512 << 10 // and what it may: the free tree spills into many nodes at once
	costMean  = 40 << 10  // bytes in the mean
)

// TestCommitCost counts what a commit writes in small and large stores, also
// after so many random changes that what is free lies everywhere. It is always
// exactly one Sync.
func TestCommitCost(t *testing.T) {
	for _, k := range kinds[:2] {
		sizes := []int{10, 10_000, 100_000}
		if raceDetector {
			sizes = sizes[:2]
		}
		for _, n := range sizes {
			t.Run(fmt.Sprintf("%s/%d", k.name, n), func(t *testing.T) {
				t.Parallel()
				o := &nvstore.CreateOptions{Idle: -1}
				if k.sealed {
					o.Key = rawKey(t, theKey)
				}
				d := counted(t, filepath.Join(t.TempDir(), "x"))
				s, err := nvstore.CreateDevice(d, o)
				require.NoError(t, err)
				populate(t, s, n)
				m := &meter{t: t, s: s, d: d, n: n, rng: newRand(t)}
				m.run()
				clean(t, s)
				require.NoError(t, s.Close())
			})
		}
	}
}

// A meter measures commits.
type meter struct {
	t   *testing.T
	s   *nvstore.Store
	d   *imagetest.FaultDevice
	n   int
	rng *rand.Rand
}

func (m *meter) run() {
	var fresh6, fresh143, churn, del, aged6, aged143 cost
	for range 20 {
		m.put(&fresh6, 6<<10)
		m.put(&fresh143, 143<<10)
	}
	if m.n > 1000 {
		m.deleteHalf()
	}
	for i := range imagetest.Scale(1500) {
		m.put(&churn, 6<<10)
		if i%3 == 0 {
			m.delete(&del)
		}
	}
	for range 20 {
		m.put(&aged6, 6<<10)
		m.put(&aged143, 143<<10)
	}
	for _, c := range []struct {
		what string
		c    *cost
	}{{"Put of 6 KiB", &fresh6}, {"Put of 143 KiB", &fresh143}, {"after deleting half, Put of 6 KiB", &churn},
		{"Delete between", &del}, {"after that, Put of 6 KiB", &aged6}, {"and of 143 KiB", &aged143}} {
		m.t.Logf("%-34s %v", c.what, c.c)
	}
	require.Less(m.t, churn.sum.BytesWritten/churn.commits, int64(costMean))
}

func (m *meter) measure(c *cost, size int64, change func() error) {
	before := m.d.Trace()
	require.NoError(m.t, change())
	did := m.d.Trace().Sub(before)
	require.EqualValues(m.t, 1, did.Syncs)
	require.Zero(m.t, did.Discards+did.ZeroWrites)
	limit := int64(costLimit)
	if m.n == 10 {
		limit = 16 << 10 // but for the content: a root, a node or two of the directory, the free node
	}
	require.LessOrEqual(m.t, did.BytesWritten, size+limit)
	c.commits++
	if did.BytesWritten > max(size, 6<<10)-6<<10+costGoal {
		c.over++
	}
	c.sum.Writes += did.Writes
	c.sum.BytesWritten += did.BytesWritten
	c.most.Writes = max(c.most.Writes, did.Writes)
	c.most.BytesWritten = max(c.most.BytesWritten, did.BytesWritten)
}

func (m *meter) put(c *cost, size int) {
	name, data := blobName(m.rng.IntN(m.n)), fill(size, fmt.Sprint(m.rng.Uint64()))
	m.measure(c, int64(size), func() error { return m.s.Put(name, data, nil) })
}

func (m *meter) delete(c *cost) {
	name := blobName(m.rng.IntN(m.n))
	if _, err := m.s.Stat(name); err == nil {
		m.measure(c, 0, func() error { return m.s.Delete(name) })
	}
}

// deleteHalf leaves holes everywhere.
func (m *meter) deleteHalf() {
	perm := m.rng.Perm(m.n)[:m.n/2]
	for len(perm) > 0 {
		k := min(len(perm), 1000)
		require.NoError(m.t, m.s.Update(func(tx *nvstore.Tx) error {
			for _, i := range perm[:k] {
				if err := tx.Delete(blobName(i)); err != nil {
					return err
				}
			}
			return nil
		}))
		perm = perm[k:]
	}
}
