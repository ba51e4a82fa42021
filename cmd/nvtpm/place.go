package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"

	"nvstore.dev/cmd/nvtpm/internal/live"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/nvstore"
	"nvstore.dev/tpmstate"
	"nvstore.dev/tpmstate/swtpm"
)

// A place is the home of the TPM's state, opened.
type place struct {
	tpmstate.Home

	// sealed tells that the store is: nothing is handed out in clear.
	sealed bool
	// live is the Home, if it is one behind a running QEMU.
	live *live.Home

	mu  sync.Mutex
	own *swtpm.Key
}

// key wraps what is handed out of a sealed store. It is nil where there is
// none, or none that could be read yet.
func (p *place) key() *swtpm.Key {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.own
}

func (p *place) setKey(k *swtpm.Key) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.own = k
}

// migrationKey is the blob with the key of place.
const migrationKey = "tpm/migration-key"

// A source says where the state is, and opens it.
type source struct {
	location string // of a store
	format   string
	cred     func() (*keyslot.Credential, error)
	hasKey   bool    // cred gives one
	behind   *behind // the QEMU that has the image while it runs; nil is none

	dir, file string // swtpm's, in place of a store
	memory    bool   // nowhere: the state is gone with the process
	mode      os.FileMode
	key       *swtpm.Key

	tpm2   bool
	writer string
}

// backendURI takes "dir://…", "file://…" or "nvstore://…" apart.
func (s *source) backendURI(uri string) error {
	scheme, rest, ok := strings.Cut(uri, "://")
	switch {
	case !ok || rest == "" && scheme != "memory":
		return fmt.Errorf("backend-uri %q: dir://DIR, file://FILE, nvstore://IMAGE or memory:// is wanted", uri)
	case scheme == "dir":
		s.dir = rest
	case scheme == "file":
		s.file = rest
	case scheme == "nvstore":
		s.location = rest
	case scheme == "memory":
		s.memory = true
	default:
		return fmt.Errorf("backend-uri %q: there is no backend %q, but dir, file, nvstore and memory", uri, scheme)
	}
	return nil
}

func (s *source) String() string {
	switch {
	case s.dir != "":
		return s.dir
	case s.file != "":
		return s.file
	case s.memory:
		return "memory"
	}
	return s.location
}

func (s *source) open() (*place, error) {
	o := &swtpm.HomeOptions{Version: versionOf(s.tpm2), Key: s.key, Mode: s.mode}
	switch {
	case s.dir != "":
		h, err := swtpm.OpenDir(s.dir, o)
		if err != nil {
			return nil, err
		}
		return &place{Home: h}, nil
	case s.file != "":
		h, err := swtpm.OpenLinear(s.file, o)
		if err != nil {
			return nil, err
		}
		return &place{Home: h}, nil
	case s.memory:
		return &place{Home: new(tpmstate.Memory)}, nil
	}
	if s.behind != nil {
		return s.openLive()
	}
	p := &place{}
	h, err := s.openStore(p, s.openImage)
	if err != nil {
		return nil, err
	}
	p.Home = h
	return p, nil
}

// openImage opens the store where it lies.
func (s *source) openImage(o *nvstore.Options) (*nvstore.Store, error) {
	o.Format = s.format
	return nvstore.Open(s.location, o)
}

// openStore opens the TPM's state in a store, and reads the key of p.
func (s *source) openStore(p *place, open func(*nvstore.Options) (*nvstore.Store, error)) (tpmstate.Home, error) {
	cred, err := s.cred()
	if err != nil {
		return nil, err
	}
	if cred != nil {
		defer cred.Wipe()
	}
	st, err := open(&nvstore.Options{Key: cred})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", s.location, err)
	}
	h, err := tpmstate.New(st, &tpmstate.Options{Version: versionOf(s.tpm2), Writer: s.writer, CloseStore: true})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", s.location, err), st.Close())
	}
	p.sealed = cred != nil
	if p.sealed && p.key() == nil {
		k, err := ownKey(st)
		if err != nil {
			return nil, errors.Join(err, h.Close())
		}
		p.setKey(k)
	}
	return h, nil
}

// ownKey returns the store's migration key, which is made when it is first
// needed, and is durable then.
func ownKey(st *nvstore.Store) (*swtpm.Key, error) {
	var raw []byte
	err := st.Update(func(tx *nvstore.Tx) (err error) {
		raw, err = tx.Get(migrationKey, 64)
		if !errors.Is(err, nvstore.ErrNotFound) {
			return err
		}
		raw = make([]byte, 32)
		rand.Read(raw)
		return tx.Put(migrationKey, raw, &nvstore.Meta{Type: "tpm-migration-key"})
	})
	if err != nil {
		return nil, err
	}
	defer clear(raw)
	return swtpm.NewKey(raw)
}

// programVersion is what the build knows of itself.
func programVersion() string {
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}
