package tpmstate_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate"
)

func create(t *testing.T, o *nvstore.CreateOptions) (*nvstore.Store, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vm.qcow2")
	s, err := nvstore.Create(path, o)
	require.NoError(t, err)
	return s, path
}

func fixture(t testing.TB) []byte {
	p, err := os.ReadFile("../fixtures/tpm/tpm2-00.permall")
	require.NoError(t, err)
	return p[16:]
}

func TestNVRAM(t *testing.T) {
	s, path := create(t, nil)
	n, err := tpmstate.New(s, &tpmstate.Options{Writer: "test 1", CloseStore: true})
	require.NoError(t, err)
	for k := range tpmstate.Kind(3) {
		_, err := n.Load(k)
		require.ErrorIs(t, err, tpmstate.ErrNotFound)
		require.NoError(t, n.Delete(k), "deleting nothing is no error")
	}
	state := fixture(t)
	require.NoError(t, n.Store(tpmstate.Permanent, state))
	require.NoError(t, n.Store(tpmstate.Volatile, []byte("ram")))
	e, err := s.Stat("tpm/permanent")
	require.NoError(t, err)
	require.Equal(t, "tpm2-permanent", e.Type)
	require.Equal(t, "test 1", e.Writer)

	// The same bytes once more are no commit.
	before := e.Generation
	require.NoError(t, n.Store(tpmstate.Permanent, bytes.Clone(state)))
	info, err := s.Info()
	require.NoError(t, err)
	e, err = s.Stat("tpm/permanent")
	require.NoError(t, err)
	require.Equal(t, before, e.Generation, "info %v", info)

	require.ErrorIs(t, n.Store(tpmstate.Permanent, make([]byte, tpmstate.MaxState+1)), tpmstate.ErrTooLarge)
	require.ErrorIs(t, n.Store(tpmstate.Permanent, nil), tpmstate.ErrNotFound)
	require.NoError(t, n.Store(tpmstate.Permanent, bytes.Repeat([]byte("s"), tpmstate.MaxState)))
	require.NoError(t, n.Replace(tpmstate.State{state, nil, nil}))
	require.ErrorIs(t, n.Replace(tpmstate.State{nil, {}, nil}), tpmstate.ErrNotFound)
	require.NoError(t, n.Close())

	s, err = nvstore.Open(path, nil)
	require.NoError(t, err)
	defer s.Close()
	n, err = tpmstate.New(s, nil)
	require.NoError(t, err)
	all, err := tpmstate.LoadAll(n)
	require.NoError(t, err)
	require.Equal(t, tpmstate.State{state, nil, nil}, all)
	require.NoError(t, n.Close())
	_, err = s.List("")
	require.NoError(t, err, "the store is the caller's")
}

// TestOtherVersion: a TPM 1.2 isn't started on a 2.0's state, which libtpms
// would answer with a new TPM.
func TestOtherVersion(t *testing.T) {
	s, _ := create(t, nil)
	defer s.Close()
	n, err := tpmstate.New(s, nil)
	require.NoError(t, err)
	require.NoError(t, n.Store(tpmstate.Permanent, fixture(t)))
	_, err = tpmstate.New(s, &tpmstate.Options{Version: tpmstate.TPM12})
	require.ErrorIs(t, err, tpmstate.ErrVersion)
	// A type that a user chose says nothing.
	require.NoError(t, s.Put("tpm/permanent", fixture(t), &nvstore.Meta{Type: "mine"}))
	_, err = tpmstate.New(s, &tpmstate.Options{Version: tpmstate.TPM12})
	require.NoError(t, err)
	require.NoError(t, s.Put("tpm/permanent", make([]byte, tpmstate.MaxState+1), nil))
	_, err = tpmstate.New(s, nil)
	require.ErrorIs(t, err, tpmstate.ErrTooLarge)
}

// TestFlips: every byte of a stored state that changes is noticed. Of swtpm's
// plain files, 91 % of such changes start (README).
func TestFlips(t *testing.T) {
	for name, key := range map[string]bool{"plain": false, "sealed": true} {
		t.Run(name, func(t *testing.T) {
			o := &nvstore.CreateOptions{Format: "raw", Size: 1 << 20}
			if key {
				cred, err := keyslot.RawKey(bytes.Repeat([]byte{1}, 32))
				require.NoError(t, err)
				o.Key = cred
			}
			s, path := create(t, o)
			n, err := tpmstate.New(s, nil)
			require.NoError(t, err)
			state := fixture(t)
			require.NoError(t, n.Store(tpmstate.Permanent, state))
			require.NoError(t, s.Close())
			first := extent(t, path, state, key)
			noticed := 0
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			require.NoError(t, err)
			defer f.Close()
			for i := range state {
				flip(t, f, first+int64(i))
				if loads(path, key) != nil {
					noticed++
				}
				flip(t, f, first+int64(i))
			}
			require.NoError(t, loads(path, key))
			t.Logf("%d of %d changed bytes were noticed", noticed, len(state))
			require.Equal(t, len(state), noticed)
		})
	}
}

func options(key bool) *nvstore.Options {
	o := &nvstore.Options{Format: "raw", ReadOnly: true}
	if key {
		o.Key, _ = keyslot.RawKey(bytes.Repeat([]byte{1}, 32))
	}
	return o
}

// loads says why the state can't be had, if it can't.
func loads(path string, key bool) (err error) {
	s, err := nvstore.Open(path, options(key))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	n, err := tpmstate.New(s, nil)
	if err != nil {
		return err
	}
	_, err = n.Load(tpmstate.Permanent)
	return err
}

// extent is where the state lies in the image: one chunk.
func extent(t *testing.T, path string, state []byte, key bool) int64 {
	s, err := nvstore.Open(path, options(key))
	require.NoError(t, err)
	defer s.Close()
	off := int64(0)
	require.NoError(t, s.Dir().Regions(func(r blobdir.Region) error {
		if r.Blob == "tpm/permanent" && r.Length >= int64(len(state)) {
			off = r.Offset
		}
		return nil
	}))
	require.NotZero(t, off)
	return off
}

func flip(t *testing.T, f *os.File, off int64) {
	var b [1]byte
	_, err := f.ReadAt(b[:], off)
	require.NoError(t, err)
	b[0] ^= 1
	_, err = f.WriteAt(b[:], off)
	require.NoError(t, err)
}

// TestReplaceIsAtomic: a power cut at any write leaves all of the old state or
// all of the new one.
func TestReplaceIsAtomic(t *testing.T) {
	old := tpmstate.State{fixture(t), []byte("old ram"), nil}
	now := tpmstate.State{bytes.Repeat([]byte("new"), 4000), nil, []byte("saved")}
	dev := imagetest.NewCrash(1<<20, nil)
	s, err := nvstore.CreateDevice(dev, &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	n, err := tpmstate.New(s, nil)
	require.NoError(t, err)
	require.NoError(t, n.Replace(old))
	before := dev.Len()
	require.NoError(t, n.Replace(now))
	count := map[bool]int{}
	states := &imagetest.StateConfig{Exhaustive: 8, Seen: map[uint64]bool{}}
	for at := before; at <= dev.Len(); at++ {
		for st := range dev.CrashStates(at, states) {
			got := recovered(t, st.Open())
			isNew := reflect.DeepEqual(got, now)
			require.True(t, isNew || reflect.DeepEqual(got, old), "%v", st)
			count[isNew]++
		}
	}
	t.Logf("crash states: %d have the old state, %d the new one", count[false], count[true])
	require.NotZero(t, count[false])
	require.NotZero(t, count[true])
}

func recovered(t *testing.T, dev image.Device) tpmstate.State {
	s, err := nvstore.OpenDevice(dev, &nvstore.Options{Idle: -1})
	require.NoError(t, err)
	defer s.Close()
	n, err := tpmstate.New(s, nil)
	require.NoError(t, err)
	all, err := tpmstate.LoadAll(n)
	require.NoError(t, err)
	return all
}

// TestReverted: a snapshot that is loaded underneath is noticed by the next
// store, which stores nothing; what a machine brings along replaces it.
func TestReverted(t *testing.T) {
	dev := imagetest.NewCrash(1<<20, nil)
	s, err := nvstore.CreateDevice(dev, &nvstore.CreateOptions{Idle: -1})
	require.NoError(t, err)
	n, err := tpmstate.New(s, nil)
	require.NoError(t, err)
	require.NoError(t, n.Store(tpmstate.Permanent, []byte("one")))
	snapshot := make([]byte, dev.Size())
	_, err = dev.ReadAt(snapshot, 0)
	require.NoError(t, err)
	require.NoError(t, n.Store(tpmstate.Permanent, []byte("two")))
	_, err = dev.WriteAt(snapshot, 0)
	require.NoError(t, err)
	require.ErrorIs(t, n.Store(tpmstate.Permanent, []byte("three")), tpmstate.ErrReverted)
	got, err := n.Load(tpmstate.Permanent)
	require.NoError(t, err)
	require.Equal(t, "one", string(got))
	_, err = dev.WriteAt(snapshot, 0)
	require.NoError(t, err)
	require.NoError(t, n.Replace(tpmstate.State{[]byte("four")}))
	got, err = n.Load(tpmstate.Permanent)
	require.NoError(t, err)
	require.Equal(t, "four", string(got))
}
