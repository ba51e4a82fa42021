package blobdir_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	mrand "math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"nvstore.dev/blobdir"
)

// scale multiplies the length of the long loops.
func scale() int {
	if n, err := strconv.Atoi(os.Getenv("NVSTORE_SCALE")); err == nil && n > 0 {
		return n
	}
	return 1
}

// seedFor returns the seed of a random test, and prints how to run it again.
func seedFor(t testing.TB) uint64 {
	seed := uint64(time.Now().UnixNano())
	if s, err := strconv.ParseUint(os.Getenv("NVSTORE_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("to repeat: NVSTORE_SEED=%d go test -run '%s' ./blobdir", seed, t.Name())
		}
	})
	return seed
}

// A model is what a store must hold.
type model struct {
	rng   *mrand.Rand
	blobs map[string][]byte
	names []string
}

func newModel(rng *mrand.Rand) *model {
	m := &model{rng: rng, blobs: map[string][]byte{}}
	for i := range 40 {
		m.names = append(m.names, fmt.Sprintf("dev%d/state-%d", i%4, i))
	}
	return m
}

func (m *model) clone() *model {
	c := *m
	c.blobs = maps.Clone(m.blobs)
	return &c
}

func (m *model) bytes(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(m.rng.Uint32())
	}
	return p
}

func (m *model) size() int {
	switch m.rng.IntN(6) {
	case 0:
		return m.rng.IntN(100)
	case 1:
		return m.rng.IntN(150000)
	default:
		return m.rng.IntN(12000)
	}
}

// op does one random operation, on the transaction and on the model alike.
func (m *model) op(tx *blobdir.Tx) error {
	name := m.names[m.rng.IntN(len(m.names))]
	old, exists := m.blobs[name]
	switch k := m.rng.IntN(10); {
	case k < 4 || !exists:
		p := m.bytes(m.size())
		m.blobs[name] = p
		return tx.Put(name, p, nil)
	case k < 6:
		p, off := m.bytes(m.size()/4), m.rng.IntN(len(old)+5000)
		if len(p) == 0 {
			return nil
		}
		grown := make([]byte, max(len(old), off+len(p)))
		copy(grown, old)
		copy(grown[off:], p)
		m.blobs[name] = grown
		_, err := tx.WriteAt(name, p, int64(off))
		return err
	case k < 7:
		n := m.rng.IntN(len(old) + 3000)
		cut := make([]byte, n)
		copy(cut, old)
		m.blobs[name] = cut
		return tx.Truncate(name, int64(n))
	case k < 8:
		delete(m.blobs, name)
		return tx.Delete(name)
	case k < 9:
		to := m.names[m.rng.IntN(len(m.names))]
		_, taken := m.blobs[to]
		err := tx.Rename(name, to)
		if taken {
			if !errors.Is(err, blobdir.ErrExist) {
				return fmt.Errorf("rename onto %q: %v", to, err)
			}
			return nil
		}
		delete(m.blobs, name)
		m.blobs[to] = old
		return err
	default:
		p := make([]byte, len(old))
		n, err := tx.ReadAt(name, p, 0)
		if len(old) > 0 && (err != nil || n != len(old) || !bytes.Equal(p, old)) {
			return fmt.Errorf("read of %q inside the transaction: %d, %v", name, n, err)
		}
		return tx.SetMeta(name, &blobdir.Meta{Type: fmt.Sprint("t", m.rng.IntN(2)), Attributes: []blobdir.Attribute{{Key: "k", Value: fmt.Sprint(m.rng.IntN(3))}}})
	}
}

// step commits a transaction of one to four operations, or gives it up.
func (m *model) step(d *blobdir.Dir) error {
	after := m.clone()
	stop := errors.New("given up")
	abort := m.rng.IntN(10) == 0
	err := d.Update(func(tx *blobdir.Tx) error {
		for range 1 + m.rng.IntN(4) {
			if err := after.op(tx); err != nil {
				return err
			}
		}
		if err := after.compareTx(tx); err != nil {
			return err
		}
		if abort {
			return stop
		}
		return nil
	}, nil)
	if abort && errors.Is(err, stop) {
		return nil
	}
	if err == nil {
		m.blobs = after.blobs
	}
	return err
}

func (m *model) compare(d *blobdir.Dir) error {
	return d.View(func(tx *blobdir.Tx) error { return m.compareTx(tx) })
}

// compareTx returns an error unless the transaction shows the model's names
// and sizes, and in one of eight runs its content.
func (m *model) compareTx(tx *blobdir.Tx) error {
	want := slices.Sorted(maps.Keys(m.blobs))
	var got []string
	for e, err := range tx.List("") {
		if err != nil {
			return err
		}
		got = append(got, e.Name)
		if e.Size != int64(len(m.blobs[e.Name])) {
			return fmt.Errorf("%q has %d bytes, want %d", e.Name, e.Size, len(m.blobs[e.Name]))
		}
	}
	if !slices.Equal(got, want) {
		return fmt.Errorf("names %q, want %q", got, want)
	}
	for name, data := range m.blobs {
		p, err := tx.Get(name, 0)
		if err != nil {
			return err
		}
		if !bytes.Equal(p, data) {
			return fmt.Errorf("%q has other bytes", name)
		}
	}
	return nil
}
