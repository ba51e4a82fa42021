package nvstore_test

import (
	"bytes"
	"errors"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

func testBlobs(t *testing.T, p *place) {
	s := p.create(t, nil)
	require.Equal(t, []string{}, list(t, s, ""))
	absent(t, s, "tpm/permanent")
	sizes := []int{0, 1, 4095, 4096, 4097, 6 << 10, 8192, 143 << 10, 1<<20 + 1}
	for _, n := range sizes {
		require.NoError(t, s.Put("blob/x", fill(n, "a"), nil))
		get(t, s, "blob/x", fill(n, "a"))
		e, err := s.Stat("blob/x")
		require.NoError(t, err)
		require.EqualValues(t, n, e.Size)
	}
	slices.Reverse(sizes)
	for _, n := range sizes {
		require.NoError(t, s.Put("blob/x", fill(n, "b"), nil))
		get(t, s, "blob/x", fill(n, "b"))
	}
	require.NoError(t, s.Put("tpm/permanent", fill(100, "t"), nil))
	require.NoError(t, s.Put("blob/y", fill(100, "y"), nil))
	require.Equal(t, []string{"blob/x", "blob/y", "tpm/permanent"}, list(t, s, ""))
	require.Equal(t, []string{"blob/x", "blob/y"}, list(t, s, "blob/"))
	require.Equal(t, []string{"blob/y"}, list(t, s, "blob/y"))
	require.Equal(t, []string{}, list(t, s, "blob/z"))

	id, err := s.Stat("tpm/permanent")
	require.NoError(t, err)
	require.ErrorIs(t, s.Rename("none", "b"), nvstore.ErrNotFound)
	require.ErrorIs(t, s.Rename("tpm/permanent", "blob/y"), nvstore.ErrExist)
	require.NoError(t, s.Rename("tpm/permanent", "a"))
	absent(t, s, "tpm/permanent")
	get(t, s, "a", fill(100, "t"))
	e, err := s.Stat("a")
	require.NoError(t, err)
	require.Equal(t, "a", e.Name)
	require.Equal(t, id.ID, e.ID, "the same blob")

	require.ErrorIs(t, s.Delete("a", "none"), nvstore.ErrNotFound)
	get(t, s, "a", fill(100, "t"))
	require.NoError(t, s.Delete("a", "blob/y"))
	require.ErrorIs(t, s.Delete("a"), nvstore.ErrNotFound)
	require.Equal(t, []string{"blob/x"}, list(t, s, ""))
	s = p.reopen(t, s)
	require.Equal(t, []string{"blob/x"}, list(t, s, ""))
}

func testMeta(t *testing.T, p *place) {
	s := p.create(t, nil)
	before := time.Now().Add(-time.Second)
	m := &nvstore.Meta{Type: "tpm2-permanent", Writer: "swtpm 0.7", Attributes: []blobdir.Attribute{{Key: "k", Value: "v"}, {Key: "a", Value: ""}}}
	require.NoError(t, s.Put("x", []byte("1"), m))
	one, err := s.Stat("x")
	require.NoError(t, err)
	require.NoError(t, s.Put("x", []byte("2"), nil))
	check := func(s *nvstore.Store) {
		e, err := s.Stat("x")
		require.NoError(t, err)
		require.Equal(t, "tpm2-permanent", e.Type)
		require.Equal(t, "swtpm 0.7", e.Writer)
		require.Equal(t, []blobdir.Attribute{{Key: "a", Value: ""}, {Key: "k", Value: "v"}}, e.Attributes)
		require.Equal(t, one.ID, e.ID)
		require.Equal(t, one.Created, e.Created)
		require.False(t, e.Created.Before(before.Truncate(time.Second)))
		require.False(t, e.Modified.Before(e.Created))
		require.Greater(t, e.Generation, one.Generation)
	}
	check(s)
	s = p.reopen(t, s)
	check(s)
	// A new type re-seals the same content.
	require.NoError(t, s.Put("x", []byte("2"), &nvstore.Meta{Type: "other"}))
	s = p.reopen(t, s)
	get(t, s, "x", []byte("2"))
	e, err := s.Stat("x")
	require.NoError(t, err)
	require.Equal(t, "other", e.Type)
	require.Empty(t, e.Writer)
	require.Empty(t, e.Attributes)
	require.ErrorIs(t, s.Put("x", nil, &nvstore.Meta{Type: strings.Repeat("x", 65)}), nvstore.ErrInvalid)
	get(t, s, "x", []byte("2"))
}

func testNames(t *testing.T, p *place) {
	s := p.create(t, nil)
	gen := generation(t, s)
	for _, bad := range []string{"", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", "\x00", "a\n", "\xff", strings.Repeat("x", 256)} {
		require.ErrorIs(t, s.Put(bad, nil, nil), nvstore.ErrInvalid, "%q", bad)
		_, err := s.Get(bad)
		require.ErrorIs(t, err, nvstore.ErrInvalid, "%q", bad)
		_, err = s.Blob(bad, &nvstore.Meta{})
		require.ErrorIs(t, err, nvstore.ErrInvalid, "%q", bad)
	}
	require.Equal(t, gen, generation(t, s))
	good := []string{"a", "a/b", "...", "a b", "pci/0000:00:03.0/vpd", "ü/ß", strings.Repeat("x", 255), "A"}
	for _, name := range good {
		require.NoError(t, s.Put(name, []byte(name), nil))
	}
	slices.Sort(good)
	require.Equal(t, good, list(t, s, ""))
	s = p.reopen(t, s)
	require.Equal(t, good, list(t, s, ""))
	for _, name := range good {
		get(t, s, name, []byte(name))
	}
}

func testUpdate(t *testing.T, p *place) {
	s := p.create(t, nil)
	require.NoError(t, s.Put("old", fill(9000, "old"), nil))
	gen := generation(t, s)
	require.NoError(t, s.Update(func(tx *nvstore.Tx) error {
		for _, name := range []string{"a", "b", "c"} {
			require.NoError(t, tx.Put(name, fill(20000, name), nil))
		}
		require.NoError(t, tx.Delete("old"))
		require.NoError(t, tx.Rename("a", "d"))
		_, err := tx.WriteAt("b", []byte("here"), 100)
		require.NoError(t, err)
		require.NoError(t, tx.Truncate("c", 5))
		// It sees itself; nobody else does.
		got, err := tx.Get("d", 0)
		require.NoError(t, err)
		require.Equal(t, fill(20000, "a"), got)
		_, err = tx.Get("old", 0)
		require.ErrorIs(t, err, nvstore.ErrNotFound)
		done := make(chan struct{})
		go func() {
			defer close(done)
			e, err := s.List("")
			assert.NoError(t, err)
			assert.Len(t, e, 1)
			p, err := s.Get("old")
			assert.NoError(t, err)
			assert.Equal(t, fill(9000, "old"), p)
		}()
		<-done
		return nil
	}))
	require.Equal(t, gen+1, generation(t, s), "one commit")
	s = p.reopen(t, s)
	require.Equal(t, []string{"b", "c", "d"}, list(t, s, ""))
	b := fill(20000, "b")
	copy(b[100:], "here")
	get(t, s, "b", b)
	get(t, s, "c", fill(20000, "c")[:5])
	get(t, s, "d", fill(20000, "a"))
}

func testRollback(t *testing.T, p *place) {
	s := p.create(t, nil)
	require.NoError(t, s.Put("a", fill(9000, "a"), nil))
	gen := generation(t, s)
	cause := errors.New("no")
	work := func(tx *nvstore.Tx) {
		require.NoError(t, tx.Put("a", fill(9000, "other"), nil))
		require.NoError(t, tx.Put("b", fill(12<<20, "b"), nil)) // more than is kept in memory
		require.NoError(t, tx.Rename("a", "c"))
	}
	require.Equal(t, cause, s.Update(func(tx *nvstore.Tx) error { work(tx); return cause }))
	require.PanicsWithValue(t, "stop", func() {
		_ = s.Update(func(tx *nvstore.Tx) error { work(tx); panic("stop") })
	})
	var kept *nvstore.Tx
	require.NoError(t, s.View(func(tx *nvstore.Tx) error { kept = tx; return nil }))
	_, err := kept.Stat("a")
	require.ErrorIs(t, err, nvstore.ErrClosed, "a transaction that is over")
	for range 2 {
		require.Equal(t, gen, generation(t, s))
		require.Equal(t, []string{"a"}, list(t, s, ""))
		get(t, s, "a", fill(9000, "a"))
		s = p.reopen(t, s)
	}
	require.NoError(t, s.Put("b", fill(9000, "b"), nil))
	s = p.reopen(t, s)
	get(t, s, "a", fill(9000, "a"))
	get(t, s, "b", fill(9000, "b"))
}

func testUnchanged(t *testing.T, p *place) {
	s := p.create(t, nil)
	data := fill(50000, "x")
	m := &nvstore.Meta{Type: "t"}
	require.NoError(t, s.Put("x", data, m))
	gen := generation(t, s)
	require.NoError(t, s.Put("x", data, m))
	require.NoError(t, s.Put("x", data, nil))
	require.NoError(t, s.Update(func(*nvstore.Tx) error { return nil }))
	b, err := s.Blob("x", nil)
	require.NoError(t, err)
	_, err = b.WriteAt(data[:5000], 0)
	require.NoError(t, err)
	require.NoError(t, b.Close())
	require.Equal(t, gen, generation(t, s))
	s = p.reopen(t, s)
	require.NoError(t, s.Put("x", data, m))
	require.Equal(t, gen, generation(t, s))
}

func testView(t *testing.T, p *place) {
	s := p.create(t, nil)
	old := fill(30000, "old")
	require.NoError(t, s.Put("x", old, nil))
	require.NoError(t, s.View(func(tx *nvstore.Tx) error {
		require.ErrorIs(t, tx.Put("y", nil, nil), nvstore.ErrReadOnly)
		for i := range 12 { // past any quarantine
			require.NoError(t, s.Put("x", fill(30000+i, "new"), nil))
		}
		require.NoError(t, s.Delete("x"))
		got, err := tx.Get("x", 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(old, got))
		_, err = tx.Get("x", 29999)
		require.ErrorIs(t, err, nvstore.ErrInvalid, "a limit")
		return nil
	}))
	absent(t, s, "x")
}

func testClosed(t *testing.T, p *place) {
	s := p.create(t, nil)
	b, err := s.Blob("x", &nvstore.Meta{})
	require.NoError(t, err)
	require.NoError(t, s.Close())
	require.ErrorIs(t, s.Close(), nvstore.ErrClosed)
	require.ErrorIs(t, s.Put("x", nil, nil), nvstore.ErrClosed)
	_, err = s.Get("x")
	require.ErrorIs(t, err, nvstore.ErrClosed)
	_, err = s.List("")
	require.ErrorIs(t, err, nvstore.ErrClosed)
	_, err = s.Info()
	require.ErrorIs(t, err, nvstore.ErrClosed)
	_, err = b.WriteAt([]byte("x"), 0)
	require.ErrorIs(t, err, nvstore.ErrClosed)
	require.ErrorIs(t, b.Sync(), nvstore.ErrClosed)
	_, err = nvstore.Create(p.at, &p.home.create)
	require.ErrorIs(t, err, nvstore.ErrExist, "nothing is overwritten")
	p.open(t, nil)
}

func testReopen(t *testing.T, p *place) {
	uuid := [16]byte{1, 2, 3}
	s := p.create(t, func(o *nvstore.CreateOptions) { o.UUID = uuid; o.MaxSize = 128 << 20 })
	require.NoError(t, s.Put("x", fill(300000, "x"), nil))
	in, err := s.Info()
	require.NoError(t, err)
	s = p.reopen(t, s)
	now, err := s.Info()
	require.NoError(t, err)
	require.Equal(t, uuid, now.UUID)
	require.Equal(t, p.sealed, now.Sealed)
	require.Equal(t, p.names, now.SealNames)
	require.EqualValues(t, 1, now.Blobs)
	require.EqualValues(t, 128<<20, now.MaxSize)
	require.Equal(t, in.Generation, now.Generation)
	require.Equal(t, in.Used, now.Used)
	require.Greater(t, now.Used, int64(300000))
	require.Equal(t, now.Size, now.Used+now.Free)
	require.True(t, now.Settled)
	if p.sealed {
		require.Len(t, now.KeySlots, 1)
	} else {
		require.Empty(t, now.KeySlots)
	}
}

func testLocked(t *testing.T, p *place) {
	s := p.create(t, nil)
	got, err := p.tryOpen(t, nil)
	mustFail(t, got, err, nvstore.ErrLocked)
	got, err = p.tryOpen(t, func(o *nvstore.Options) { o.ReadOnly = true })
	mustFail(t, got, err, nvstore.ErrLocked)
	require.NoError(t, s.Put("x", []byte("x"), nil))
	require.NoError(t, s.Close())
	s = p.open(t, nil)
	got, err = p.tryOpen(t, nil)
	mustFail(t, got, err, nvstore.ErrLocked)
	get(t, s, "x", []byte("x"))
}

func testReadOnly(t *testing.T, p *place) {
	s := p.create(t, nil)
	require.NoError(t, s.Put("x", []byte("x"), nil))
	require.NoError(t, s.Close())
	s = p.open(t, func(o *nvstore.Options) { o.ReadOnly = true })
	get(t, s, "x", []byte("x"))
	require.Equal(t, []string{"x"}, list(t, s, ""))
	require.ErrorIs(t, s.Put("x", nil, nil), nvstore.ErrReadOnly)
	require.ErrorIs(t, s.Delete("x"), nvstore.ErrReadOnly)
	b, err := s.Blob("x", nil)
	require.NoError(t, err)
	_, err = b.WriteAt([]byte("y"), 0)
	require.NoError(t, err, "in memory")
	require.ErrorIs(t, b.Sync(), nvstore.ErrReadOnly)
	_, err = s.Blob("y", &nvstore.Meta{})
	require.ErrorIs(t, err, nvstore.ErrReadOnly)
	get(t, s, "x", []byte("x"))
	require.NoError(t, s.Close())
}

func testPrevious(t *testing.T, p *place) {
	s := p.create(t, nil)
	require.NoError(t, s.Put("x", []byte("one"), nil))
	require.NoError(t, s.Put("x", []byte("two"), nil))
	require.NoError(t, s.Close())
	s = p.open(t, func(o *nvstore.Options) { o.Previous = true })
	get(t, s, "x", []byte("one"))
	require.ErrorIs(t, s.Put("x", nil, nil), nvstore.ErrReadOnly)
	require.NoError(t, s.Close())
	s = p.open(t, nil)
	get(t, s, "x", []byte("two"))
}

func testKeys(t *testing.T, p *place) {
	s := p.create(t, nil)
	require.NoError(t, s.Put("x", []byte("x"), nil))
	require.NoError(t, s.Close())
	wrong := rawKey(t, bytes.Repeat([]byte{1}, 32))
	if !p.sealed {
		got, err := p.tryOpen(t, func(o *nvstore.Options) { o.Key = wrong })
		mustFail(t, got, err, nvstore.ErrPlain)
		get(t, p.open(t, nil), "x", []byte("x"))
		return
	}
	for _, o := range []nvstore.Options{{Key: wrong}, {}, {Key: wrong, ReadOnly: true}, {ReadOnly: true}, {Previous: true}} {
		got, err := p.tryOpen(t, func(op *nvstore.Options) { *op = o })
		mustFail(t, got, err, nvstore.ErrKey)
	}
	s = p.open(t, func(o *nvstore.Options) { o.Key, o.Keyless = nil, true })
	_, err := s.Get("x")
	require.ErrorIs(t, err, nvstore.ErrKey)
	require.ErrorIs(t, s.Put("x", nil, nil), nvstore.ErrReadOnly)
	entries, err := s.List("")
	require.NoError(t, err)
	require.Len(t, entries, 1)
	if p.names {
		require.Empty(t, entries[0].Name)
	} else {
		require.Equal(t, "x", entries[0].Name)
	}
	clean(t, s)
	require.NoError(t, s.Close())

	// A second key, and the first one gone.
	s = p.open(t, nil)
	_, err = s.Dir().AddKey(wrong, nil)
	require.NoError(t, err)
	require.NoError(t, s.Dir().RemoveKey(0))
	require.NoError(t, s.Put("y", []byte("y"), nil))
	require.NoError(t, s.Close())
	got, err := p.tryOpen(t, nil)
	mustFail(t, got, err, nvstore.ErrKey)
	s = p.open(t, func(o *nvstore.Options) { o.Key = wrong })
	get(t, s, "x", []byte("x"))
	get(t, s, "y", []byte("y"))
	clean(t, s)
}

// testModel compares random transactions with a map.
func testModel(t *testing.T, p *place) {
	rng := newRand(t)
	s := p.create(t, nil)
	model := map[string][]byte{}
	names := []string{"a", "b/c", "b/d", "tpm/permanent", "x", "y", "z"}
	for range imagetest.Scale(25) {
		next := maps.Clone(model)
		roll := rng.IntN(6) == 0
		cause := errors.New("rolled back")
		err := s.Update(func(tx *nvstore.Tx) error {
			for range 1 + rng.IntN(4) {
				step(t, tx, next, names, rng)
			}
			if roll {
				return cause
			}
			return nil
		})
		if roll {
			require.Equal(t, cause, err)
		} else {
			require.NoError(t, err)
			model = next
		}
		if rng.IntN(8) == 0 {
			s = p.reopen(t, s)
		}
		require.Equal(t, slices.Sorted(maps.Keys(model)), append([]string(nil), list(t, s, "")...))
		for name, want := range model {
			get(t, s, name, want)
		}
	}
	clean(t, s)
}

// step does one random thing to a transaction and to the model.
func step(t *testing.T, tx *nvstore.Tx, model map[string][]byte, names []string, rng *rand.Rand) {
	name := names[rng.IntN(len(names))]
	old, exists := model[name]
	data := make([]byte, rng.IntN(1<<rng.IntN(16)))
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	check := func(err error) bool {
		if exists {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, nvstore.ErrNotFound)
		}
		return exists
	}
	switch rng.IntN(6) {
	case 0, 1:
		require.NoError(t, tx.Put(name, data, nil))
		model[name] = data
	case 2:
		if check(tx.Delete(name)) {
			delete(model, name)
		}
	case 3:
		to := names[rng.IntN(len(names))]
		err := tx.Rename(name, to)
		if _, taken := model[to]; exists && taken {
			require.ErrorIs(t, err, nvstore.ErrExist)
		} else if check(err) {
			delete(model, name)
			model[to] = old
		}
	case 4:
		off := rng.IntN(1 << rng.IntN(16))
		if _, err := tx.WriteAt(name, data, int64(off)); check(err) && len(data) > 0 {
			p := make([]byte, max(len(old), off+len(data)))
			copy(p, old)
			copy(p[off:], data)
			model[name] = p
		}
	case 5:
		size := rng.IntN(1 << rng.IntN(17))
		if check(tx.Truncate(name, int64(size))) {
			p := make([]byte, size)
			copy(p, old)
			model[name] = p
		}
	}
	if want, ok := model[name]; ok {
		got, err := tx.Get(name, 0)
		require.NoError(t, err)
		require.True(t, bytes.Equal(want, got), "%s inside of its transaction", name)
	}
}
