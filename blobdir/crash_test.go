package blobdir_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	mrand "math/rand/v2"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
)

// A stack puts what the store lies on onto the crash device.
type stack struct {
	name string
	open func(image.Device) (image.Device, error)
	// fresh makes a new medium.
	fresh func() (*imagetest.CrashDevice, error)
	// check looks at the medium after a crash, beside the store.
	check func(*imagetest.CrashDevice) error
}

var rawStack = stack{
	name:  "raw",
	open:  func(c image.Device) (image.Device, error) { return c, nil },
	fresh: func() (*imagetest.CrashDevice, error) { return imagetest.NewCrash(256<<10, nil), nil },
}

// content is what a store must hold.
type content map[string]string

func (c content) with(fn func(content)) content {
	d := maps.Clone(c)
	fn(d)
	return d
}

// An action is one transaction, done to the store and to the model.
type action struct {
	name  string
	tx    func(*blobdir.Tx) error
	model func(content)
}

func blobOf(seed byte, n int) string {
	p := make([]byte, n)
	rng := mrand.New(mrand.NewPCG(uint64(seed), uint64(n)))
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return string(p)
}

func putAction(name, blob string, seed byte, n int) action {
	data := blobOf(seed, n)
	return action{name, func(tx *blobdir.Tx) error { return tx.Put(blob, []byte(data), nil) }, func(c content) { c[blob] = data }}
}

// actions are the operations whose histories are tried; each may come after
// each other.
func actions(step byte) []action {
	a, b := blobOf(40+step, 700), blobOf(50+step, 9000)
	return []action{
		putAction("put small", "tpm/permanent", step, 600),
		putAction("put large", "uefi/vars", step, 42000),
		{"delete", func(tx *blobdir.Tx) error {
			if err := tx.Delete("net0/nvm"); !errors.Is(err, blobdir.ErrNotFound) {
				return err
			}
			return tx.Put("net0/nvm", []byte("again"), nil)
		}, func(c content) {
			if _, ok := c["net0/nvm"]; ok {
				delete(c, "net0/nvm")
			} else {
				c["net0/nvm"] = "again"
			}
		}},
		{"write inside", func(tx *blobdir.Tx) error {
			_, err := tx.WriteAt("uefi/vars", []byte(a), 8000)
			return err
		}, func(c content) {
			old := c["uefi/vars"]
			grown := make([]byte, max(len(old), 8000+len(a)))
			copy(grown, old)
			copy(grown[8000:], a)
			c["uefi/vars"] = string(grown)
		}},
		{"two blobs and a rename", func(tx *blobdir.Tx) error {
			for _, err := range []error{tx.Put("tpm/permanent", []byte(b), nil), tx.Put("tpm/volatile", []byte(a), nil),
				tx.Rename("fru/board", "fru/tmp"), tx.Put("fru/board", []byte(a), nil), tx.Delete("fru/tmp")} {
				if err != nil {
					return err
				}
			}
			return nil
		}, func(c content) { c["tpm/permanent"], c["tpm/volatile"], c["fru/board"] = b, a, a }},
		{"truncate", func(tx *blobdir.Tx) error { return tx.Truncate("uefi/vars", 100+int64(step)) },
			func(c content) {
				cut := make([]byte, 100+int(step))
				copy(cut, c["uefi/vars"])
				c["uefi/vars"] = string(cut)
			}},
	}
}

// A crashRun is a store with a history.
type crashRun struct {
	t     *testing.T
	kind  string
	stack stack
	dev   *imagetest.CrashDevice
	rng   *mrand.Rand

	exhaustive int // sectors in flight up to which every subset is tried; 0 is 12
	distinct   map[uint64]bool
	states     int
}

// populate makes a store with a few blobs and some generations behind it.
func populate(t *testing.T, kind string, st stack) (*imagetest.CrashDevice, content) {
	crash, err := st.fresh()
	require.NoError(t, err)
	dev, err := st.open(crash)
	require.NoError(t, err)
	d, err := blobdir.Create(dev, createOptions(t, kind))
	require.NoError(t, err)
	c := content{}
	for i := range byte(4) {
		for _, a := range []action{putAction("", "uefi/vars", 90+i, 12000), putAction("", "net0/nvm", 90+i, 300), putAction("", "fru/board", 90+i, 5000)} {
			require.NoError(t, d.Update(a.tx, nil))
			a.model(c)
		}
	}
	require.NoError(t, d.Close())
	crash = crash.Reopen()
	crash.Settle()
	return crash, c
}

func contentOf(d *blobdir.Dir) (content, error) {
	c := content{}
	err := d.View(func(tx *blobdir.Tx) error {
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			p, err := tx.Get(e.Name, 0)
			if err != nil {
				return err
			}
			c[e.Name] = string(p)
		}
		return nil
	})
	return c, err
}

// state opens what a crash left, and demands that it is one of legal. Now and
// then it goes on working with it.
func (r *crashRun) state(s *imagetest.State, legal []content) {
	r.states++
	r.distinct[s.Hash] = true
	dev := s.Open()
	if r.stack.check != nil {
		require.NoError(r.t, r.stack.check(dev), "%v", s)
	}
	top, err := r.stack.open(dev)
	require.NoError(r.t, err, "%v", s)
	d, err := blobdir.Open(top, openOptions(r.t, r.kind))
	require.NoError(r.t, err, "%v", s)
	got := r.oneOf(d, legal, s)
	if r.rng.IntN(24) > 0 {
		return
	}
	rep, err := d.Check(context.Background(), nil)
	require.NoError(r.t, err)
	require.Empty(r.t, slices.DeleteFunc(rep.Errors, func(p blobdir.Problem) bool { return rootProblem(p) }), "%v", s)
	require.Empty(r.t, rep.Leaks, "%v", s)
	a := putAction("", "after", 7, 3000)
	require.NoError(r.t, d.Update(a.tx, nil), "%v", s)
	now, err := contentOf(d)
	require.NoError(r.t, err)
	require.True(r.t, maps.Equal(now, got.with(a.model)), "%v: the commit after recovery", s)
	r.again(dev, got, got.with(a.model))
}

// rootProblem tells what a torn root slot looks like to check from damage
// elsewhere.
func rootProblem(p blobdir.Problem) bool {
	return len(p.Where) >= 4 && p.Where[:4] == "root"
}

// again cuts the power once more, during the commit after a recovery.
func (r *crashRun) again(dev *imagetest.CrashDevice, before, after content) {
	at := r.rng.IntN(dev.Len() + 1)
	for s := range dev.CrashStates(at, &imagetest.StateConfig{Exhaustive: -1, Samples: 2, Seed: r.rng.Uint64()}) {
		r.distinct[s.Hash] = true
		r.states++
		top, err := r.stack.open(s.Open())
		require.NoError(r.t, err, "second crash: %v", s)
		d, err := blobdir.Open(top, openOptions(r.t, r.kind))
		require.NoError(r.t, err, "second crash: %v", s)
		r.oneOf(d, []content{before, after}, s)
	}
}

func (r *crashRun) oneOf(d *blobdir.Dir, legal []content, s fmt.Stringer) content {
	got, err := contentOf(d)
	require.NoError(r.t, err, "%v", s)
	for _, c := range legal {
		if maps.Equal(got, c) {
			return c
		}
	}
	require.Fail(r.t, "not a legal state", "%v: %v", s, slices.Sorted(maps.Keys(got)))
	return nil
}

// histories calls fn for each sequence of one to n actions.
func histories(n int, fn func([]int)) {
	var grow func(h []int)
	grow = func(h []int) {
		if len(h) > 0 {
			fn(h)
		}
		if len(h) == n {
			return
		}
		for i := range len(actions(0)) {
			grow(append(slices.Clone(h), i))
		}
	}
	grow(nil)
}

// TestCrash cuts the power at every write of every history of one to three
// transactions, in every subset of the sectors in flight up to 12, and in
// samples of the larger ones.
func TestCrash(t *testing.T) {
	total, distinct := 0, 0
	for _, kind := range []string{"plain", "sealed"} {
		t.Run(kind, func(t *testing.T) {
			a, b := runHistories(t, kind, rawStack, 3, 3*scale())
			total, distinct = total+a, distinct+b
		})
	}
	t.Logf("%d crash states, %d of them distinct", total, distinct)
	if !testing.Short() {
		require.Greater(t, distinct, 100000)
	}
}

func runHistories(t *testing.T, kind string, st stack, length, samples int) (states, distinct int) {
	base, start := populate(t, kind, st)
	seed := seedFor(t)
	rng := mrand.New(mrand.NewPCG(seed, 2))
	n := 0
	histories(length, func(h []int) {
		n++
		if testing.Short() && n%16 != 1 {
			return
		}
		r := &crashRun{t: t, kind: kind, stack: st, dev: base.Fork(), rng: rng, distinct: map[uint64]bool{}}
		r.history(h, start, samples)
		states, distinct = states+r.states, distinct+len(r.distinct)
	})
	return states, distinct
}

func (r *crashRun) history(h []int, c content, samples int) {
	top, err := r.stack.open(r.dev)
	require.NoError(r.t, err)
	d, err := blobdir.Open(top, openOptions(r.t, r.kind))
	require.NoError(r.t, err)
	at := 0
	for step, i := range h {
		a := actions(byte(step))[i]
		before := c
		c = before.with(a.model)
		require.NoError(r.t, d.Update(a.tx, nil), "%v", h)
		end := r.dev.Len()
		// Up to the last operation before the acknowledgement both are
		// legal; what was acknowledged before is not.
		if step == len(h)-1 {
			seen := map[uint64]bool{}
			for ; at < end; at++ {
				cfg := &imagetest.StateConfig{Exhaustive: r.exhaustive, Samples: samples, Seed: r.rng.Uint64(), Seen: seen}
				for s := range r.dev.CrashStates(at, cfg) {
					r.state(s, []content{before, c})
				}
			}
			for s := range r.dev.CrashStates(end, &imagetest.StateConfig{Exhaustive: r.exhaustive, Samples: samples}) {
				r.state(s, []content{c})
			}
		}
		at = end
	}
}

// A revertPoint is an earlier content of the image, and what its store holds.
type revertPoint struct {
	snap *imagetest.Content
	c    content
}

// TestRevertUnderneath loads a snapshot between any two operations of a
// commit: of an older generation, of the one that the commit builds on, and of
// the middle of the commit itself. Once the commit reads what it wrote after the
// Sync, and once before it.
func TestRevertUnderneath(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		base, start := populate(t, kind, rawStack)
		counts := map[string]int{}
		for first := range actions(0) {
			for second := range actions(1) {
				if testing.Short() && (first+second)%3 > 0 {
					continue
				}
				for _, early := range []bool{false, true} {
					revertDuring(t, kind, early, base, start, first, second, counts)
				}
			}
		}
		t.Logf("outcomes: %v", counts)
		require.Positive(t, counts["noticed"])
		require.Positive(t, counts["acknowledged"])
		require.Positive(t, counts["straddled"])
		require.Positive(t, counts["undone"])
	})
}

func revertDuring(t *testing.T, kind string, early bool, base *imagetest.CrashDevice, start content, first, second int, counts map[string]int) {
	one, two := actions(0)[first], actions(1)[second]
	mid := start.with(one.model)
	length := 0 // operations that the second commit does
	for at := 0; at == 0 || at < length; at++ {
		for from := -2; from < at; from++ {
			dev := base.Fork()
			points := []revertPoint{{dev.Snapshot(), start}}
			h := &hook{Device: dev}
			d, err := blobdir.Open(h.readsEarly(early), openOptions(t, kind))
			require.NoError(t, err)
			require.NoError(t, d.Update(one.tx, nil))
			points = append(points, revertPoint{dev.Snapshot(), mid})
			h.n = 0
			h.before = func(i int) {
				if i == from {
					points = append(points, revertPoint{dev.Snapshot(), mid})
				}
				if i == at {
					dev.Revert(points[min(from+2, 2)].snap)
				}
			}
			err = d.Update(two.tx, nil)
			length = max(length, h.n)
			if early && err == nil && at == h.n-1 {
				undone(t, kind, dev, d, points[min(from+2, 2)], counts)
				continue
			}
			judge(t, kind, dev, err, points[min(from+2, 2)], mid.with(two.model), counts)
		}
	}
}

// undone looks at what is left when a revert came after a commit had read what
// it wrote, and before its Sync: it undid the commit, as it would have later, and
// the handle notices at the next one.
func undone(t *testing.T, kind string, dev *imagetest.CrashDevice, d *blobdir.Dir, loaded revertPoint, counts map[string]int) {
	counts["undone"]++
	require.ErrorIs(t, put(d, "another", []byte("x")), blobdir.ErrReverted)
	fresh, err := blobdir.Open(dev.Reopen(), openOptions(t, kind))
	require.NoError(t, err)
	got, err := contentOf(fresh)
	require.NoError(t, err)
	require.True(t, maps.Equal(got, loaded.c), "the whole commit is undone")
}

// judge looks at what is left after a revert in the middle of a commit.
func judge(t *testing.T, kind string, dev *imagetest.CrashDevice, err error, loaded revertPoint, after content, counts map[string]int) {
	fresh, oerr := blobdir.Open(dev.Reopen(), openOptions(t, kind))
	if err == nil {
		counts["acknowledged"]++
		require.NoError(t, oerr)
		got, cerr := contentOf(fresh)
		require.NoError(t, cerr)
		require.True(t, maps.Equal(got, after), "an acknowledged commit is there")
		return
	}
	require.ErrorIs(t, err, blobdir.ErrReverted)
	counts["noticed"]++
	if errors.Is(oerr, blobdir.ErrStraddled) {
		counts["straddled"]++
		require.ErrorIs(t, err, blobdir.ErrStraddled)
		dev.Revert(loaded.snap) // the remedy
		fresh, oerr = blobdir.Open(dev.Reopen(), openOptions(t, kind))
	}
	require.NoError(t, oerr)
	got, cerr := contentOf(fresh)
	require.NoError(t, cerr)
	require.True(t, maps.Equal(got, loaded.c) || maps.Equal(got, after), "one of the two legal states")
}

// hook calls before with the number of each operation that changes the device
// or makes it durable.
type hook struct {
	image.Device
	n      int
	before func(int)
}

func (h *hook) step() {
	if h.before != nil {
		h.before(h.n)
	}
	h.n++
}

func (h *hook) WriteAt(p []byte, off int64) (int, error) {
	h.step()
	return h.Device.WriteAt(p, off)
}

func (h *hook) Sync() error {
	h.step()
	return h.Device.Sync()
}

func (h *hook) Unwrap() image.Device { return h.Device }

// readsEarly returns a Device that reads before the Sync where it may.
func (h *hook) readsEarly(yes bool) image.Device {
	if yes {
		return earlyHook{h}
	}
	return h
}

type earlyHook struct{ *hook }

func (h earlyHook) ReadBatch(reads []image.Request) error {
	return image.BatcherOf(h.Device).ReadBatch(reads)
}

func (h earlyHook) WriteBatch(writes []image.Request) error {
	return image.BatcherOf(h.hook).WriteBatch(writes)
}

func (h earlyHook) SyncBatch(reads []image.Request) error {
	_ = h.ReadBatch(reads) // the reads have the errors
	return h.Sync()
}

// TestSnapshotAtEveryWrite takes a snapshot between any two operations of a
// commit, and opens it.
func TestSnapshotAtEveryWrite(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		base, start := populate(t, kind, rawStack)
		n := 0
		for i, a := range actions(1) {
			dev := base.Fork()
			h := &hook{Device: dev}
			d, err := blobdir.Open(h, openOptions(t, kind))
			require.NoError(t, err)
			var snaps []*imagetest.Content
			h.before = func(int) { snaps = append(snaps, dev.Snapshot()) }
			require.NoError(t, d.Update(a.tx, nil), "%d", i)
			for _, s := range snaps {
				copied := imagetest.NewCrash(0, nil)
				copied.Revert(s)
				d, err := blobdir.Open(copied, openOptions(t, kind))
				require.NoError(t, err)
				got, err := contentOf(d)
				require.NoError(t, err)
				require.True(t, maps.Equal(got, start) || maps.Equal(got, start.with(a.model)))
				n++
			}
		}
		t.Logf("%d snapshots opened", n)
	})
}

// bare hides that a device can drop its cache, so that opening must write the
// newest generation once more instead.
type bare struct{ image.Device }

// TestKilledBeforeSync kills the process at every operation of a commit,
// reopens the store from the page cache, writes, and then cuts the power.
func TestKilledBeforeSync(t *testing.T) {
	afterTrouble(t, func(dev *imagetest.CrashDevice, h *hook, at int) {
		h.before = func(i int) {
			if i == at {
				panic(errKilled)
			}
		}
	})
}

// TestFailedSync makes the Sync of a commit fail as on Linux: the page cache
// shows what the medium never got, and the next Sync says that all is well.
func TestFailedSync(t *testing.T) {
	afterTrouble(t, func(dev *imagetest.CrashDevice, h *hook, at int) {
		h.before = func(i int) {
			if i == at {
				dev.LoseSync(nil)
				panic(errKilled)
			}
		}
	})
}

var errKilled = errors.New("killed")

func afterTrouble(t *testing.T, trouble func(dev *imagetest.CrashDevice, h *hook, at int)) {
	for _, run := range []struct {
		st   stack
		kind string
		drop bool
	}{{rawStack, "plain", true}, {rawStack, "plain", false}, {rawStack, "sealed", true}, {rawStack, "sealed", false}, {qcow2Stack(4096), "sealed", true}} {
		st, kind, drop := run.st, run.kind, run.drop
		t.Run(fmt.Sprintf("%s/%s/dropcache=%v", st.name, kind, drop), func(t *testing.T) {
			base, start := populate(t, kind, st)
			rng := mrand.New(mrand.NewPCG(seedFor(t), 3))
			states := 0
			for first := range actions(0) {
				for second := range actions(1) {
					if (first*len(actions(0))+second)%3 > 0 && testing.Short() {
						continue
					}
					states += troubleRun(t, st, kind, drop, base, start, first, second, rng, trouble)
				}
			}
			t.Logf("%d crash states", states)
		})
	}
}

func troubleRun(t *testing.T, st stack, kind string, drop bool, base *imagetest.CrashDevice, start content, first, second int, rng *mrand.Rand,
	trouble func(*imagetest.CrashDevice, *hook, int)) (states int) {
	one, two := actions(0)[first], actions(1)[second]
	for at := 0; ; at++ {
		dev := base.Fork()
		h := &hook{Device: dev}
		under, err := st.open(h)
		require.NoError(t, err)
		d, err := blobdir.Open(under, openOptions(t, kind))
		require.NoError(t, err)
		h.n = 0
		trouble(dev, h, at)
		if !killed(func() { require.NoError(t, d.Update(one.tx, nil)) }) {
			return states
		}
		dev = dev.Reopen()
		mark := dev.Len()
		top, err := st.open(dev)
		require.NoError(t, err)
		if !drop {
			top = bare{top}
		}
		legal := []content{start, start.with(one.model)}
		d, err = blobdir.Open(top, openOptions(t, kind))
		require.NoError(t, err, "killed before operation %d of %q", at, one.name)
		opened := dev.Len()
		seen, err := contentOf(d)
		require.NoError(t, err)
		require.True(t, maps.Equal(seen, legal[0]) || maps.Equal(seen, legal[1]))
		require.NoError(t, d.Update(two.tx, nil))
		r := &crashRun{t: t, kind: kind, stack: st, dev: dev, rng: rng, distinct: map[uint64]bool{}}
		done := seen.with(two.model)
		for cut := mark; cut <= dev.Len(); cut++ {
			want := []content{seen, done}
			switch {
			case cut < opened:
				want = legal
			case cut == dev.Len():
				want = []content{done}
			}
			for s := range dev.CrashStates(cut, &imagetest.StateConfig{Exhaustive: 4, Samples: 2, Seed: rng.Uint64()}) {
				r.state(s, want)
			}
		}
		states += r.states
	}
}

// killed runs fn, and tells whether it was killed on the way.
func killed(fn func()) (yes bool) {
	defer func() {
		if p := recover(); p != nil {
			if p != errKilled {
				panic(p)
			}
			yes = true
		}
	}()
	fn()
	return false
}

// TestEveryOperationFails breaks each operation of a workload once, and for
// ever: the error surfaces, and reopening finds a legal state.
func TestEveryOperationFails(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		base, start := populate(t, kind, rawStack)
		faults := []imagetest.Fault{{Mode: imagetest.Fail}, {Mode: imagetest.Fail, Forever: true}, {Mode: imagetest.FailAfter},
			{Mode: imagetest.Short}, {Mode: imagetest.Fail, Err: image.ErrNoSpace, Ops: imagetest.OpWrite}}
		for _, f := range faults {
			n := imagetest.EachFault(f, func(f imagetest.Fault) int { return failRun(t, kind, base, start, f) })
			t.Logf("%+v: %d operations", f, n)
			require.Greater(t, n, 10)
		}
	})
}

func failRun(t *testing.T, kind string, base *imagetest.CrashDevice, start content, f imagetest.Fault) int {
	dev := base.Fork()
	fd := imagetest.NewFault(dev, f)
	acked, maybe := start, start
	headerLost := false
	err := func() error {
		d, err := blobdir.Open(fd, openOptions(t, kind))
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return errors.Join(err, d.Close())
		}
		headerLost = info.Status.HeaderDamaged != ""
		for i, a := range actions(2) {
			maybe = acked.with(a.model)
			if err := d.Update(a.tx, nil); err != nil {
				if fd.Hits() == 0 {
					return fmt.Errorf("action %d without a fault: %w", i, err)
				}
				// A poisoned handle stays so.
				if errors.Is(err, blobdir.ErrPoisoned) {
					require.ErrorIs(t, d.Update(a.tx, nil), blobdir.ErrPoisoned)
				}
				return errors.Join(err, d.Close())
			}
			acked = maybe
		}
		return d.Close()
	}()
	if fd.Hits() > 0 && err == nil {
		// Opening doesn't depend on the header, and says so in the status.
		require.True(t, headerLost, "%+v is not reported", f)
	}
	d, oerr := blobdir.Open(dev.Reopen(), openOptions(t, kind))
	require.NoError(t, oerr, "%+v", f)
	got, cerr := contentOf(d)
	require.NoError(t, cerr)
	require.True(t, maps.Equal(got, acked) || maps.Equal(got, maybe), "%+v: %v", f, err)
	return fd.Hits()
}

// TestBytesAreEqual guards the harness itself: contents that differ are seen.
func TestBytesAreEqual(t *testing.T) {
	a := content{"x": "1"}
	require.False(t, maps.Equal(a, a.with(func(c content) { c["x"] = "2" })))
	require.False(t, bytes.Equal([]byte(blobOf(1, 10)), []byte(blobOf(2, 10))))
}
