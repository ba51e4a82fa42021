package nvstore_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A kind is how a store is sealed.
type kind struct {
	name          string
	sealed, names bool
}

var kinds = []kind{{"Plain", false, false}, {"Sealed", true, false}, {"SealedNames", true, true}}

// A home is where a store lies.
type home struct {
	name     string
	create   nvstore.CreateOptions
	location func(t *testing.T, dir string) string
	openAs   string // format needed to open a store again
}

func inDir(name string) func(*testing.T, string) string {
	return func(_ *testing.T, dir string) string { return filepath.Join(dir, name) }
}

var homes = []home{
	{name: "Raw", create: nvstore.CreateOptions{Format: "raw"}, location: inDir("x.img")},
	{name: "QCOW2", location: inDir("x.qcow2")},
	{name: "QCOW2Small", create: nvstore.CreateOptions{ClusterSize: 512}, location: inDir("x.qcow2")},
	{name: "Window", create: nvstore.CreateOptions{Existing: true}, location: windowIn},
	{name: "Pebble", location: func(_ *testing.T, dir string) string { return "pebble:" + filepath.Join(dir, "nv") }},
}

// windowIn makes a qcow2 with a window in the middle.
func windowIn(t *testing.T, dir string) string {
	path := filepath.Join(dir, "disk.qcow2")
	c, err := chain.Create(path, &chain.CreateOptions{Size: 128 << 20})
	require.NoError(t, err)
	require.NoError(t, c.Commit())
	require.NoError(t, c.Device.Close())
	return "driver=raw,offset=16M,size=64M,file.driver=qcow2,file.file.driver=file,file.file.filename=" + path
}

// A place is one store in a home.
type place struct {
	home
	kind
	at string
}

var theKey = bytes.Repeat([]byte{0x4b}, 32)

func rawKey(t testing.TB, k []byte) *keyslot.Credential {
	t.Helper()
	c, err := keyslot.RawKey(k)
	require.NoError(t, err)
	return c
}

// create makes the store; change may change the options.
func (p *place) create(t *testing.T, change func(*nvstore.CreateOptions)) *nvstore.Store {
	t.Helper()
	o := p.home.create
	o.Idle = -1
	if p.sealed {
		o.Key, o.SealNames = rawKey(t, theKey), p.names
	}
	if change != nil {
		change(&o)
	}
	s, err := nvstore.Create(p.at, &o)
	require.NoError(t, err)
	p.at = s.Location()
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func (p *place) tryOpen(t *testing.T, change func(*nvstore.Options)) (*nvstore.Store, error) {
	t.Helper()
	o := nvstore.Options{Idle: -1}
	if p.sealed {
		o.Key = rawKey(t, theKey)
	}
	if change != nil {
		change(&o)
	}
	return nvstore.Open(p.at, &o)
}

func (p *place) open(t *testing.T, change func(*nvstore.Options)) *nvstore.Store {
	t.Helper()
	s, err := p.tryOpen(t, change)
	require.NoError(t, err)
	require.Equal(t, p.at, s.Location())
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// reopen closes the store, checks it, and opens it again.
func (p *place) reopen(t *testing.T, s *nvstore.Store) *nvstore.Store {
	t.Helper()
	require.NoError(t, s.Close())
	s = p.open(t, nil)
	clean(t, s)
	return s
}

func clean(t *testing.T, s *nvstore.Store) {
	t.Helper()
	r, err := s.Check(context.Background(), nil)
	require.NoError(t, err)
	require.True(t, r.Clean(), "%+v", r)
	require.Empty(t, r.Warnings)
}

// A storeTest runs on every kind of store in every home.
type storeTest struct {
	name string
	run  func(t *testing.T, p *place)
}

var storeTests = []storeTest{
	{"Blobs", testBlobs},
	{"Meta", testMeta},
	{"Names", testNames},
	{"Update", testUpdate},
	{"Rollback", testRollback},
	{"Unchanged", testUnchanged},
	{"View", testView},
	{"Closed", testClosed},
	{"Reopen", testReopen},
	{"Locked", testLocked},
	{"ReadOnly", testReadOnly},
	{"Previous", testPrevious},
	{"Keys", testKeys},
	{"Full", testFull},
	{"NoGrow", testNoGrow},
	{"Model", testModel},
	{"Blob", testBlob},
	{"BlobModel", testBlobModel},
	{"BlobBig", testBlobBig},
	{"Concurrent", testConcurrent},
}

// testStore is the conformance suite: open gives each test an empty place.
func testStore(t *testing.T, open func(t *testing.T) *place) {
	for _, st := range storeTests {
		t.Run(st.name, func(t *testing.T) { st.run(t, open(t)) })
	}
}

func TestStore(t *testing.T) {
	for _, h := range homes {
		for _, k := range kinds {
			t.Run(h.name+"/"+k.name, func(t *testing.T) {
				t.Parallel() // most of the time goes by waiting for the disk
				testStore(t, func(t *testing.T) *place {
					return &place{home: h, kind: k, at: h.location(t, t.TempDir())}
				})
			})
		}
	}
}

// newRand prints how to repeat what it gives, if the test fails.
func newRand(t testing.TB) *rand.Rand {
	return rand.New(rand.NewPCG(imagetest.Seed(t), 1))
}

func fill(n int, seed string) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8(sha256.Sum256([]byte(seed))).Read(p)
	return p
}

func get(t *testing.T, s *nvstore.Store, name string, want []byte) {
	t.Helper()
	got, err := s.Get(name)
	require.NoError(t, err, name)
	require.Equal(t, len(want), len(got), name)
	require.True(t, bytes.Equal(want, got), "content of %s", name)
}

func absent(t *testing.T, s *nvstore.Store, name string) {
	t.Helper()
	got, err := s.Get(name)
	require.ErrorIs(t, err, nvstore.ErrNotFound)
	require.Nil(t, got)
}

func list(t *testing.T, s *nvstore.Store, prefix string) []string {
	t.Helper()
	entries, err := s.List(prefix)
	require.NoError(t, err)
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name)
	}
	return names
}

func generation(t *testing.T, s *nvstore.Store) (gen int64) {
	t.Helper()
	require.NoError(t, s.View(func(tx *nvstore.Tx) error { gen = tx.Generation(); return nil }))
	return gen
}

func mustFail(t *testing.T, s *nvstore.Store, err error, kind error) {
	t.Helper()
	require.ErrorIs(t, err, kind)
	require.Nil(t, s, "a store beside an error: %v", fmt.Sprint(err))
}
