package nvstore

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/machine"
)

// What a store is made of. They are package blobdir's, under shorter names.
type (
	// Tx is a transaction: what View and Update run.
	Tx = blobdir.Tx
	// Entry describes a blob.
	Entry = blobdir.Entry
	// Meta is what a caller says of a blob beside its content.
	Meta = blobdir.Meta
	// Info are facts about a store.
	Info = blobdir.Info
	// Report is what a check found.
	Report = blobdir.Report
)

// Options say how a store is opened. The zero value, and nil, open for
// reading and writing, without a key, an image that nvtool made.
type Options struct {
	// Format is "raw", "qcow2" or "luks". Without it, the file must begin as only
	// files of ours do. It says nothing of Pebble folders and stacks.
	Format string

	ReadOnly bool

	// Place is where in the image Open looks for the store.
	Place Place

	// AllowExternal lets the files be opened that an image names, as an
	// overlay its backing file (chain.Options).
	AllowExternal bool

	// Snapshot opens a qcow2 image as it was at this internal snapshot, an
	// ID or a name, for reading.
	Snapshot string

	// Secret returns the passphrase of an encrypted layer below the store,
	// as in chain.Options.
	Secret func(name string) ([]byte, error)

	// Key opens a sealed store; a plain one is then refused. Budget
	// bounds what deriving it may cost; nil is package kdf's default.
	Key    *keyslot.Credential
	Budget *kdf.Budget

	// Keyless opens a sealed store without its key, to list and check it.
	Keyless bool

	// Previous opens the generation before the newest, read-only.
	Previous bool

	// NoGrow keeps the image at its size.
	NoGrow bool

	// Idle is how long after a commit the store is marked as settled, so
	// that opening it after a crash is quick; 0 is two seconds, and less
	// than 0 is never.
	Idle time.Duration

	// Gate is blobdir.Options's: what writers pass, and who takes or
	// loads a snapshot of the image closes.
	Gate func() (leave func())
}

// CreateOptions say how a new store is made.
type CreateOptions struct {
	// Format is "raw" or "qcow2", and for an Existing image also "luks";
	// the zero value is qcow2.
	Format string

	// Size is the image's size in bytes at first; 0 is 64 MiB. It takes
	// space only as it is used, and grows up to MaxSize (0: no limit).
	Size    int64
	MaxSize int64

	// ClusterSize is a qcow2 image's, in bytes; 0 is 64 KiB.
	ClusterSize int

	// Key seals the store; KDF says how hard its passphrase is to guess.
	Key      *keyslot.Credential
	KDF      kdf.Argon2id
	KeyLabel string

	// SealNames hides names, types and writers too.
	SealNames bool

	// UUID names the store; zero is random.
	UUID [16]byte

	// Seed and Time make a plain store reproducible, as in
	// blobdir.CreateOptions, while it is open.
	Seed []byte
	Time time.Time

	// Existing makes the store on an image that is there already, which
	// must be blank where the store's fixed structures go.
	Existing bool

	// Secret is as in Options, for an image that is there already.
	Secret func(name string) ([]byte, error)

	// Idle is as in Options.
	Idle time.Duration
}

// A Store holds named blobs. It may be used by many goroutines.
type Store struct {
	dir      *blobdir.Dir
	location string
	idle     time.Duration
	group    group

	mu       sync.Mutex
	timer    *time.Timer
	settling sync.WaitGroup // a timer that is set, and what it has started
	closed   bool
}

// Open opens the store at a location: a path, "pebble:DIR/MACHINE-UUID", or a
// stack as in QEMU's notation, "driver=qcow2,file.driver=file,...". A machine's
// disk has it in its tail (Options.Place).
func Open(location string, opts *Options) (*Store, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	dev, err := chain.Open(location, &chain.Options{Format: o.Format, ReadOnly: o.ReadOnly || o.Keyless || o.Previous || o.Snapshot != "",
		AllowExternal: o.AllowExternal, Snapshot: o.Snapshot, Secret: o.Secret})
	if err != nil {
		return nil, err
	}
	if o.Snapshot != "" {
		o.ReadOnly = true
		if _, ok := image.As[*qcow2.Image](dev); !ok {
			return nil, errors.Join(fmt.Errorf("%s: a snapshot of what isn't a qcow2 image: %w", location, image.ErrUnsupported), dev.Close())
		}
	}
	s, err := openPlace(dev, &o)
	if err != nil {
		return nil, errors.Join(err, dev.Close())
	}
	s.location = location
	return s, nil
}

func openPlace(dev image.Device, o *Options) (*Store, error) {
	on, err := Locate(dev, o.Place)
	if err != nil {
		return nil, err
	}
	return OpenDevice(on, o)
}

// OpenDevice opens the store that begins at a device's first byte. It belongs to the store from
// then on unless there is an error.
func OpenDevice(dev image.Device, opts *Options) (*Store, error) {
	var o Options
	if opts != nil {
		o = *opts
	}
	dir, err := blobdir.Open(dev, &blobdir.Options{ReadOnly: o.ReadOnly, Key: o.Key, Budget: o.Budget,
		Keyless: o.Keyless, Previous: o.Previous, NoGrow: o.NoGrow, Gate: o.Gate})
	if err != nil {
		return nil, err
	}
	return &Store{dir: dir, idle: o.Idle}, nil
}

// Create makes a store at a location, and opens it. A path must not exist
// yet; the file appears under it only when the store is whole.
func Create(location string, opts *CreateOptions) (*Store, error) {
	var o CreateOptions
	if opts != nil {
		o = *opts
	}
	if o.Existing {
		dev, err := chain.Open(location, &chain.Options{Format: o.Format, Secret: o.Secret})
		if err != nil {
			return nil, err
		}
		s, err := CreateDevice(dev, &o)
		if err != nil {
			return nil, errors.Join(err, dev.Close())
		}
		s.location = location
		return s, nil
	}
	pending, err := chain.Create(location, &chain.CreateOptions{Format: o.Format, Size: o.Size, ClusterSize: o.ClusterSize})
	if err != nil {
		return nil, taken(err)
	}
	s, err := CreateDevice(pending.Device, &o)
	if err != nil {
		return nil, errors.Join(err, pending.Abort())
	}
	if err := pending.Commit(); err != nil {
		return nil, taken(errors.Join(err, s.Close(), pending.Abort()))
	}
	s.location = pending.Location
	return s, nil
}

// CreateDevice makes a store on a device, which belongs to the store from
// then on unless there is an error. A machine's disk has one in its tail already,
// and is refused.
func CreateDevice(dev image.Device, opts *CreateOptions) (*Store, error) {
	var o CreateOptions
	if opts != nil {
		o = *opts
	}
	if _, err := machine.Open(dev); err == nil {
		return nil, takenError{fmt.Errorf("the image is a machine's disk, whose guest would find the store on its disk: %w", image.ErrExist)}
	}
	dir, err := blobdir.Create(dev, &blobdir.CreateOptions{Key: o.Key, KDF: o.KDF, Label: o.KeyLabel,
		SealNames: o.SealNames, MaxSize: o.MaxSize, UUID: o.UUID, Seed: o.Seed, Time: o.Time})
	if err != nil {
		return nil, err
	}
	return &Store{dir: dir, idle: o.Idle}, nil
}

// Close settles the store and closes what it lies on. It waits for a settling
// that is under way, so that nothing is done to the image, and no Gate is asked,
// after it.
func (s *Store) Close() error {
	s.mu.Lock()
	s.closed = true
	if s.timer != nil && s.timer.Stop() {
		s.settling.Done()
	}
	s.mu.Unlock()
	s.settling.Wait()
	return s.dir.Close()
}

// View runs fn on the newest generation, which stands still for it. If the
// image turns out to have been changed underneath, and what fn wants to read
// is gone, the error is ErrReverted. fn must not call Update.
func (s *Store) View(fn func(*Tx) error) error { return s.dir.View(fn) }

// Update runs fn and commits what it did, all of it or nothing; when it
// returns nil, the change is durable. If the image turns out to have been
// changed underneath, as by loading a snapshot, nothing is committed and the
// error is ErrReverted. fn uses its transaction only, not the store or its
// blobs, which may wait for the update to end.
func (s *Store) Update(fn func(*Tx) error) error { return s.update(fn, nil) }

// UpdateAgain is Update, but runs fn again, on the new state of things, where
// Update returns ErrReverted.
func (s *Store) UpdateAgain(fn func(*Tx) error) error {
	return s.update(fn, &blobdir.TxOptions{Rerun: true})
}

func (s *Store) update(fn func(*Tx) error, o *blobdir.TxOptions) error {
	err := s.dir.Update(fn, o)
	if err == nil {
		s.settleSoon()
	}
	return err
}

// settleSoon settles the store when nothing has been committed for a while. It
// has nobody to tell of an error: a failed write shows at the next call, and
// blobs follow a revert.
func (s *Store) settleSoon() {
	idle := s.idle
	if idle == 0 {
		idle = 2 * time.Second
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if idle < 0 || s.closed {
		return
	}
	if s.timer == nil {
		s.settling.Add(1)
		s.timer = time.AfterFunc(idle, func() {
			defer s.settling.Done()
			_ = s.dir.Settle()
		})
		return
	}
	if !s.timer.Stop() { // it has fired, and what waited may still run
		s.settling.Add(1)
	}
	s.timer.Reset(idle)
}

// Get returns a blob's content.
func (s *Store) Get(name string) ([]byte, error) {
	var p []byte
	err := s.View(func(tx *Tx) (err error) {
		p, err = tx.Get(name, 0)
		return err
	})
	return p, err
}

// Put stores a blob. When it returns nil, the blob is durable. meta may be
// nil, which keeps what is said of a blob that is there already.
func (s *Store) Put(name string, data []byte, meta *Meta) error {
	return s.Update(func(tx *Tx) error { return tx.Put(name, data, meta) })
}

// Delete removes blobs, all or none.
func (s *Store) Delete(names ...string) error {
	return s.Update(func(tx *Tx) error {
		for _, name := range names {
			if err := tx.Delete(name); err != nil {
				return err
			}
		}
		return nil
	})
}

// Rename gives a blob another name, which must be free.
func (s *Store) Rename(old, name string) error {
	return s.Update(func(tx *Tx) error { return tx.Rename(old, name) })
}

// Attach marks live extents as open in an emulator, before it opens them; no
// names are all. Until Detach the store doesn't read or change their content,
// and Tx.Peek alone shows it. What was marked already stays so. Where the
// store was changed underneath, the error is ErrReverted, and nothing is marked.
func (s *Store) Attach(names ...string) error { return s.mark(s.dir.Attach, names) }

// Detach records the checksums of live extents, after the emulator closed
// them; no names are all that are attached. It makes what the emulator wrote
// durable first, and is all that is needed after a crash of the machine, too.
func (s *Store) Detach(names ...string) error { return s.mark(s.dir.Detach, names) }

func (s *Store) mark(fn func(...string) error, names []string) error {
	err := fn(names...)
	if err == nil {
		s.settleSoon()
	}
	return err
}

// Stat returns a blob's entry.
func (s *Store) Stat(name string) (Entry, error) {
	var e Entry
	err := s.View(func(tx *Tx) (err error) {
		e, err = tx.Stat(name)
		return err
	})
	return e, err
}

// List returns the blobs whose names begin with prefix, in order.
func (s *Store) List(prefix string) ([]Entry, error) {
	var all []Entry
	err := s.View(func(tx *Tx) error {
		for e, err := range tx.List(prefix) {
			if err != nil {
				return err
			}
			all = append(all, e)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// Info returns facts about the store.
func (s *Store) Info() (*Info, error) { return s.dir.Info() }

// Check reads all of the store and reports damage, leaks and oddities.
// progress, which may be nil, is told bytes done and bytes in all.
func (s *Store) Check(ctx context.Context, progress func(done, total int64)) (*Report, error) {
	return s.dir.Check(ctx, progress)
}

// Location returns what Open opens the store by. For a machine that Create
// made in a Pebble folder it has the machine's UUID. It is empty for a store
// on a device.
func (s *Store) Location() string { return s.location }

// Machines lists the UUIDs of the machines in a Pebble folder, in order.
func Machines(dir string) ([]string, error) { return chain.Machines(dir) }

// Dir returns the directory below, for what is rarely needed: regions, key
// slots, settling, reloading, the device.
func (s *Store) Dir() *blobdir.Dir { return s.dir }
