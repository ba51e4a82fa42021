package nvstore_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"nvstore.dev/image/imagetest"
	"nvstore.dev/nvstore"
)

const pairSize = 12000 // bytes: more than a chunk

// pair is a blob's content that says its version all over.
func pair(version uint64) []byte {
	p := make([]byte, pairSize)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], version)
	}
	return p
}

func version(p []byte) (uint64, error) {
	if len(p) != pairSize {
		return 0, fmt.Errorf("%d bytes", len(p))
	}
	v := binary.LittleEndian.Uint64(p)
	for i := 0; i < len(p); i += 8 {
		if w := binary.LittleEndian.Uint64(p[i:]); w != v {
			return 0, fmt.Errorf("version %d at the start and %d at byte %d", v, w, i)
		}
	}
	return v, nil
}

// readPair reads two blobs that are always stored together.
func readPair(s *nvstore.Store) (v uint64, err error) {
	err = s.View(func(tx *nvstore.Tx) error {
		var versions [2]uint64
		for i, name := range []string{"left", "right"} {
			p, err := tx.Get(name, 0)
			if err != nil {
				return err
			}
			if versions[i], err = version(p); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		if versions[0] != versions[1] {
			return fmt.Errorf("versions %d and %d", versions[0], versions[1])
		}
		v = versions[0]
		return nil
	})
	return v, err
}

// testConcurrent has eight readers beside one writer. Each reader sees whole
// transactions, and never goes back.
func testConcurrent(t *testing.T, p *place) {
	s := p.create(t, nil)
	put := func(v uint64) error {
		return s.Update(func(tx *nvstore.Tx) error {
			if err := tx.Put("left", pair(v), nil); err != nil {
				return err
			}
			return tx.Put("right", pair(v), nil)
		})
	}
	require.NoError(t, put(0))
	b, err := s.Blob("device", &nvstore.Meta{})
	require.NoError(t, err)
	_, err = b.WriteAt(pair(0), 0)
	require.NoError(t, err)

	var stop atomic.Bool
	var done atomic.Uint64 // the newest version that was acknowledged
	var reads atomic.Int64
	var wg sync.WaitGroup
	for r := range 8 {
		wg.Go(func() {
			defer func() {
				if t.Failed() {
					stop.Store(true)
				}
			}()
			last := uint64(0)
			for !stop.Load() {
				if !readOnce(t, s, b, r, &done, &last) {
					return
				}
				reads.Add(1)
			}
		})
	}
	v := uint64(0)
	for (v < uint64(imagetest.Scale(25)) || reads.Load() < 100) && !stop.Load() {
		v++
		err := put(v)
		if err == nil {
			done.Store(v)
			_, err = b.WriteAt(pair(v), 0)
		}
		if err == nil && v%3 == 0 {
			err = b.Sync()
		}
		if !assert.NoError(t, err) {
			break
		}
	}
	stop.Store(true)
	wg.Wait()
	require.NoError(t, b.Close())
	s = p.reopen(t, s)
	last, err := readPair(s)
	require.NoError(t, err)
	require.Equal(t, v, last)
}

// readOnce is one round of a reader, and false when something was wrong.
func readOnce(t *testing.T, s *nvstore.Store, b *nvstore.Blob, r int, done *atomic.Uint64, last *uint64) bool {
	before := done.Load()
	v, err := readPair(s)
	ok := assert.NoError(t, err) &&
		assert.GreaterOrEqual(t, v, before, "older than what was acknowledged") &&
		assert.GreaterOrEqual(t, v, *last)
	*last = v
	switch r % 4 {
	case 0:
		e, err := s.List("")
		ok = ok && assert.NoError(t, err) && assert.Len(t, e, 3)
	case 1:
		_, err := s.Stat("left")
		ok = ok && assert.NoError(t, err)
	case 2:
		p := make([]byte, pairSize)
		if _, err := b.ReadAt(p, 0); err != io.EOF {
			ok = ok && assert.NoError(t, err)
		}
		_, err := version(p)
		ok = ok && assert.NoError(t, err)
	case 3:
		_, err := s.Info()
		ok = ok && assert.NoError(t, err)
	}
	return ok
}

// Writers of one store wait for each other, and lose nothing.
func TestManyWriters(t *testing.T) {
	p := &place{home: homes[0], kind: kinds[1], at: homes[0].location(t, t.TempDir())}
	s := p.create(t, nil)
	require.NoError(t, s.Put("n", make([]byte, 8), nil))
	const writers, rounds = 4, 10
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			b, err := s.Blob(fmt.Sprintf("own/%d", w), &nvstore.Meta{})
			if !assert.NoError(t, err) {
				return
			}
			for i := range rounds {
				assert.NoError(t, s.Update(func(tx *nvstore.Tx) error {
					p, err := tx.Get("n", 0)
					if err != nil {
						return err
					}
					binary.LittleEndian.PutUint64(p, binary.LittleEndian.Uint64(p)+1)
					return tx.Put("n", p, nil)
				}))
				_, err := b.WriteAt([]byte{byte(i)}, int64(i))
				assert.NoError(t, err)
				assert.NoError(t, b.Sync())
			}
			assert.NoError(t, b.Close())
		})
	}
	wg.Wait()
	got, err := s.Get("n")
	require.NoError(t, err)
	require.EqualValues(t, writers*rounds, binary.LittleEndian.Uint64(got))
	for w := range writers {
		get(t, s, fmt.Sprintf("own/%d", w), []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	}
}
