package blobdir_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	mrand "math/rand/v2"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
)

// qcow2Stack puts a qcow2 image between the store and the crash device. After
// each crash the image itself must be without errors; leaks are allowed.
func qcow2Stack(cluster int) stack {
	open := func(c image.Device) (image.Device, error) {
		return qcow2.Open(c, &qcow2.OpenOptions{CacheSize: 1 << 20})
	}
	return stack{
		name: fmt.Sprintf("qcow2-%d", cluster),
		open: open,
		fresh: func() (*imagetest.CrashDevice, error) {
			c := imagetest.NewCrash(0, nil)
			img, err := qcow2.Create(c, &qcow2.CreateOptions{Size: 1 << 20, ClusterSize: cluster})
			if err != nil {
				return nil, err
			}
			err = img.Close()
			return c.Reopen(), err
		},
		check: func(c *imagetest.CrashDevice) error {
			img, err := qcow2.Open(c.Fork(), &qcow2.OpenOptions{ReadOnly: true})
			if err != nil {
				return err
			}
			res, err := img.Check(context.Background(), nil)
			if err == nil && res.Errors > 0 {
				err = fmt.Errorf("%d errors: %+v", res.Errors, res.Findings[0])
			}
			return err
		},
	}
}

// TestCrashQcow2 is TestCrash through the qcow2 driver.
func TestCrashQcow2(t *testing.T) {
	total, distinct := 0, 0
	for _, cluster := range []int{512, 4096, 65536} {
		t.Run(fmt.Sprint(cluster), func(t *testing.T) {
			st := qcow2Stack(cluster)
			base, start := populate(t, "sealed", st)
			rng := mrand.New(mrand.NewPCG(seedFor(t), 4))
			n := 0
			histories(2, func(h []int) {
				if n++; testing.Short() && n%8 != 1 {
					return
				}
				r := &crashRun{t: t, kind: "sealed", stack: st, dev: base.Fork(), rng: rng, distinct: map[uint64]bool{}, exhaustive: 7}
				r.history(h, start, 4*scale())
				total, distinct = total+r.states, distinct+len(r.distinct)
			})
		})
	}
	t.Logf("%d crash states under qcow2, %d of them distinct", total, distinct)
}

// TestQcow2SnapshotUnderneath loads a snapshot of the qcow2 image that the
// store lies on, as QEMU does, while the store is open.
func TestQcow2SnapshotUnderneath(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		c := imagetest.NewCrash(0, nil)
		img, err := qcow2.Create(c, &qcow2.CreateOptions{Size: 1 << 20})
		require.NoError(t, err)
		d, err := blobdir.Create(img, createOptions(t, kind))
		require.NoError(t, err)
		require.NoError(t, put(d, "a", []byte("one")))
		require.NoError(t, img.Snapshots().Create("s"))
		for i := range 10 {
			require.NoError(t, put(d, "a", random(30000+i)))
		}
		require.NoError(t, img.Snapshots().Revert("s"))
		require.ErrorIs(t, put(d, "b", []byte("lost")), blobdir.ErrReverted)
		require.Equal(t, "one", string(get(t, d, "a")))
		require.NoError(t, put(d, "b", []byte("kept")))
		requireClean(t, d)
		require.NoError(t, d.Close())
	})
}

// TestQcow2SnapshotDuringCommit takes a snapshot of the qcow2 image at one
// operation of a commit, or before it, and loads it at another.
func TestQcow2SnapshotDuringCommit(t *testing.T) {
	counts := map[string]int{}
	for second := range actions(1) {
		length := 1
		for at := 0; at < length; at++ {
			for from := -1; from < at; from++ {
				length = max(length, snapshotDuring(t, second, from, at, counts))
			}
		}
	}
	t.Logf("outcomes: %v", counts)
	require.Positive(t, counts["noticed"])
	require.Positive(t, counts["acknowledged"])
}

func snapshotDuring(t *testing.T, second, from, at int, counts map[string]int) int {
	st := qcow2Stack(4096)
	crash, before := populate(t, "sealed", st)
	img, err := qcow2.Open(crash, nil)
	require.NoError(t, err)
	h := &hook{Device: img}
	d := openStore(t, h, "sealed")
	if from < 0 {
		require.NoError(t, img.Snapshots().Create("s"))
	}
	h.n = 0
	h.before = func(i int) {
		if i == from {
			require.NoError(t, img.Snapshots().Create("s"))
		}
		if i == at {
			require.NoError(t, img.Snapshots().Revert("s"))
		}
	}
	a := actions(1)[second]
	err = d.Update(a.tx, nil)
	after := before.with(a.model)
	h.before = nil
	fresh, oerr := blobdir.Open(&record{Device: img}, openOptions(t, "sealed"))
	if errors.Is(oerr, blobdir.ErrStraddled) {
		counts["straddled"]++
		require.NoError(t, img.Snapshots().Revert("s"))
		fresh, oerr = blobdir.Open(&record{Device: img}, openOptions(t, "sealed"))
	}
	require.NoError(t, oerr)
	got, cerr := contentOf(fresh)
	require.NoError(t, cerr)
	if err == nil {
		counts["acknowledged"]++
		require.True(t, maps.Equal(got, after), "an acknowledged commit is there")
	} else {
		counts["noticed"]++
		require.ErrorIs(t, err, blobdir.ErrReverted)
		require.True(t, maps.Equal(got, before) || maps.Equal(got, after), "one of the two legal states")
	}
	require.NoError(t, img.Close())
	require.NoError(t, st.check(crash.Reopen()))
	return h.n
}
