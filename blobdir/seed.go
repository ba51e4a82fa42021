package blobdir

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"
	"time"
)

// A seeded source stands in for chance and for the clock of a Dir whose bytes
// are to be the same each time.
type seeded struct {
	mu   sync.Mutex
	seed [32]byte
	n    uint64
	time time.Time
}

func newSeeded(o *CreateOptions) (*seeded, error) {
	if len(o.Seed) == 0 {
		return nil, nil
	}
	if o.Key != nil {
		return nil, fmt.Errorf("%w: a sealed store can't be reproducible: its keys and nonces must not repeat", ErrInvalid)
	}
	if y := o.Time.UTC().Year(); y < 1950 || y > 9999 {
		return nil, fmt.Errorf("%w: a reproducible store needs a time", ErrInvalid)
	}
	return &seeded{seed: sha256.Sum256(append([]byte("nvstore seed\x00"), o.Seed...)), time: o.Time.UTC().Truncate(time.Second)}, nil
}

func (s *seeded) fill(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(p) > 0 {
		s.n++
		b := sha256.Sum256(binary.BigEndian.AppendUint64(s.seed[:], s.n))
		p = p[copy(p, b[:]):]
	}
}

// random fills p with bytes for an identifier.
func (d *Dir) random(p []byte) error {
	if d.seeded != nil {
		d.seeded.fill(p)
		return nil
	}
	return random(p)
}

func (d *Dir) now() time.Time {
	if d.seeded != nil {
		return d.seeded.time
	}
	return time.Now().UTC().Truncate(time.Second)
}
