package bench

import (
	"fmt"
	"math/rand/v2"
	"path/filepath"

	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/nvstore"
)

// Homes of a store.
const (
	onRaw    = "raw"
	onQCOW2  = "qcow2"
	onPebble = "pebble"
)

// A kind says where a store lies and whether it is sealed.
type kind struct {
	home   string
	sealed bool
}

func (k kind) String() string {
	if k.sealed {
		return "nvstore sealed " + k.home
	}
	return "nvstore plain " + k.home
}

// key is the credential of all sealed stores here.
func (k kind) key() *keyslot.Credential {
	if !k.sealed {
		return nil
	}
	c, err := keyslot.RawKey([]byte("0123456789abcdef0123456789abcdef"))
	if err != nil {
		panic(err)
	}
	return c
}

// options leave settling out: it is what a store does when nothing happens,
// and would be counted for whoever has the turn.
func (k kind) options() *nvstore.CreateOptions {
	o := &nvstore.CreateOptions{Key: k.key(), Idle: -1}
	if k.home != onPebble {
		o.Format = k.home
	}
	return o
}

func (k kind) location(dir string) string {
	if k.home == onPebble {
		return "pebble:" + filepath.Join(dir, "home")
	}
	return filepath.Join(dir, "store."+k.home)
}

type nvStore struct{ s *nvstore.Store }

func (k kind) opener(dir string, _ *workload) (store, error) {
	s, err := nvstore.Create(k.location(dir), k.options())
	if err != nil {
		return nil, err
	}
	return nvStore{s}, nil
}

func (n nvStore) put(key string, value []byte) error { return n.s.Put(key, value, nil) }
func (n nvStore) close() error                       { return n.s.Close() }

// counted makes a store in memory, and a device that counts what reaches the
// image's file.
func counted(k kind) (*nvstore.Store, *imagetest.FaultDevice, error) {
	const size = 64 << 20
	if k.home == onRaw {
		f := imagetest.NewFault(imagetest.NewMemory(size))
		s, err := nvstore.CreateDevice(f, k.options())
		return s, f, err
	}
	f := imagetest.NewFault(imagetest.NewMemory(0))
	im, err := qcow2.Create(f, &qcow2.CreateOptions{Size: size})
	if err != nil {
		return nil, nil, err
	}
	s, err := nvstore.CreateDevice(im, k.options())
	return s, f, err
}

// smallSize is the content of the many blobs that fill a store, in bytes.
const smallSize = 256

func blobName(i int) string { return fmt.Sprintf("dev/%06d/eeprom", i) }

// fill makes blobs of smallSize bytes, many in a transaction.
func fill(s *nvstore.Store, blobs int) error {
	const batch = 5000
	r := rand.NewChaCha8([32]byte{2})
	p := make([]byte, smallSize)
	for i := 0; i < blobs; {
		err := s.Update(func(tx *nvstore.Tx) error {
			for end := min(i+batch, blobs); i < end; i++ {
				_, _ = r.Read(p)
				if err := tx.Put(blobName(i), p, nil); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// churn changes the blobs of a store, and makes and deletes a few others, at
// random and in commits of up to eight changes, so that what is free lies scattered.
func churn(s *nvstore.Store, r *rand.Rand, blobs, commits int) error {
	p := make([]byte, 16<<10)
	for range commits {
		for i := range p {
			p[i] = byte(r.Uint32())
		}
		err := s.Update(func(tx *nvstore.Tx) error {
			for range 1 + r.IntN(8) {
				if err := change(tx, r, blobs, p); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func change(tx *nvstore.Tx, r *rand.Rand, blobs int, p []byte) error {
	content := p[:r.IntN(len(p))]
	if r.IntN(3) == 0 {
		return tx.Put(blobName(r.IntN(blobs)), content, nil)
	}
	name := fmt.Sprintf("extra/%02d", r.IntN(max(1, min(blobs/10, 64))))
	if r.IntN(2) == 0 {
		return tx.Put(name, content, nil)
	}
	if _, err := tx.Stat(name); err != nil {
		return nil
	}
	return tx.Delete(name)
}

// abandon closes the device under a store, as a kill would: nothing is
// settled.
func abandon(dev image.Device) error { return dev.Close() }
