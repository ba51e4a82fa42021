package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"nvstore.dev/blobdir"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/nbd"
	"nvstore.dev/image/pebbledev"
	"nvstore.dev/image/qcow2"
	"nvstore.dev/image/raw"
	"nvstore.dev/machine"
	"nvstore.dev/nvstore"
)

// An access says what a verb needs of a store.
type access int

const (
	reading  access = iota // content, so the key
	browsing               // names and facts: without a key, if none is given
	writing
	serving // writing, for long
)

// open opens the store, with the key that the flags name.
func (a *app) open(ctx context.Context, ref *imageRef, key *keyFlags, acc access) (*nvstore.Store, error) {
	cred, done, err := a.keys(ctx, ref, key, false)
	if err != nil {
		return nil, err
	}
	defer done()
	s, err := a.openWith(ref, cred, acc, false)
	if cred != nil || !errors.Is(err, nvstore.ErrKey) {
		return s, a.explain(ref, err)
	}
	// The store is sealed, and no flag names a key.
	if acc == browsing {
		s, err := a.openWith(ref, nil, acc, true)
		if err == nil {
			a.warnf("the store is sealed and no key was given: what is shown wasn't authenticated")
		}
		return s, a.explain(ref, err)
	}
	if !canAsk() {
		return nil, fmt.Errorf("%s: %w", ref.location, errNoKey)
	}
	if cred, err = ask(ctx, "Passphrase for "+printable(ref.location)+": ", false); err != nil {
		return nil, err
	}
	defer wipe(cred)
	s, err = a.openWith(ref, cred, acc, false)
	return s, a.explain(ref, err)
}

// keys reads the secrets of an image's layers and the store's key, which is asked
// for twice if confirm. The secrets come first: see makeCredential. done wipes
// both; it is nil if there is an error.
func (a *app) keys(ctx context.Context, ref *imageRef, key *keyFlags, confirm bool) (cred *keyslot.Credential, done func(), err error) {
	if err := ref.secrets.load(ctx, a, ref); err != nil {
		return nil, nil, err
	}
	if cred, err = key.credential(ctx, a, confirm); err != nil {
		ref.secrets.wipe()
		return nil, nil, err
	}
	return cred, func() { wipe(cred); ref.secrets.wipe() }, nil
}

// newKey is keys for a new store, whose names may be sealed.
func (a *app) newKey(ctx context.Context, ref *imageRef, key *keyFlags, sealNames bool) (cred *keyslot.Credential, done func(), err error) {
	cred, done, err = a.keys(ctx, ref, key, true)
	if err == nil && sealNames && cred == nil {
		done()
		return nil, nil, usagef("--seal-names needs a key")
	}
	return cred, done, err
}

func wipe(c *keyslot.Credential) {
	if c != nil {
		c.Wipe()
	}
}

func (a *app) openWith(ref *imageRef, cred *keyslot.Credential, acc access, keyless bool) (*nvstore.Store, error) {
	writes, idle := acc == writing || acc == serving, time.Duration(-1)
	if writes && ref.previous {
		return nil, usagef("--previous is for reading")
	}
	if acc == serving {
		idle = 0 // settle now and then
	}
	s, err := nvstore.Open(ref.location, &nvstore.Options{Format: ref.format, ReadOnly: !writes,
		Place: ref.place(), AllowExternal: ref.allow, Snapshot: ref.snapshot, Key: cred, Keyless: keyless, Previous: ref.previous, Idle: idle, Secret: ref.secrets.get})
	if err != nil {
		return nil, err
	}
	if err := errors.Join(ref.secrets.unused(), ref.harden()); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if writes {
		if err := refuseShort(s); err != nil {
			return nil, errors.Join(err, s.Close())
		}
	}
	a.warnStatus(s)
	return s, nil
}

// refuseShort keeps a writer off an image that was cut short: growing it again
// would hide that. A generation that isn't settled may have lost the growth of
// its file in a crash, and is whole all the same.
func refuseShort(s *nvstore.Store) error {
	info, err := s.Info()
	if err != nil || !info.Settled || !strings.Contains(info.Status.FreeRebuilt, "(R54)") {
		return err
	}
	return &kinded{fmt.Errorf("the image ends before its content does: %s", info.Status.FreeRebuilt), io.ErrUnexpectedEOF}
}

// warnStatus says what opening found.
func (a *app) warnStatus(s *nvstore.Store) {
	info, err := s.Info()
	if err != nil {
		return // whoever needs it asks again
	}
	for _, note := range []string{info.Status.Recovered, info.Status.FreeRebuilt, info.Status.HeaderDamaged, info.Status.SettledDamaged} {
		if note != "" {
			a.warnf("%s", note)
		}
	}
}

// explain puts the image's name in front of an error that lacks it.
func (a *app) explain(ref *imageRef, err error) error {
	if err == nil {
		return nil
	}
	switch {
	case errors.Is(err, chain.ErrExternal):
		err = allowHint(err)
	case errors.Is(err, nvstore.ErrAdopting):
		err = withHint(err, "nvtool vm adopt finishes it")
	case errors.Is(err, nvstore.ErrAmbiguous):
		err = withHint(err, "a guest can write the one, and who fills a blob the other: if it is a machine's disk say --tail, and else --tail=no")
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		err = fmt.Errorf("the image ends before what a store has at its start: %w", err)
	}
	if strings.Contains(err.Error(), ref.location) {
		return err
	}
	return fmt.Errorf("%s: %w", ref.location, err)
}

// closing closes a store at a verb's end, and doesn't lose the error.
func closing(s *nvstore.Store, err *error) { *err = errors.Join(*err, s.Close()) }

// device opens the image below a store, as the store's verbs don't need. The
// secrets must have been loaded.
func (a *app) device(ref *imageRef, readOnly bool) (image.Device, error) {
	dev, err := chain.Open(ref.location, &chain.Options{Format: ref.format, ReadOnly: readOnly,
		AllowExternal: ref.allow, Snapshot: ref.snapshot, Secret: ref.secrets.get})
	if err == nil && ref.snapshot != "" && !isQCOW2(dev) {
		err = errors.Join(fmt.Errorf("a snapshot of a %s image: %w", formatOf(dev), image.ErrUnsupported), dev.Close())
	}
	if err != nil {
		return nil, a.explain(ref, err)
	}
	if err := errors.Join(ref.secrets.unused(), ref.harden()); err != nil {
		return nil, errors.Join(a.explain(ref, err), dev.Close())
	}
	return dev, nil
}

// A lent device is closed by its owner, not by the store on it.
type lent struct{ image.Device }

func (l lent) Unwrap() image.Device { return l.Device }
func (lent) Close() error           { return nil }

// peek opens the store on a device that stays the caller's, for reading, and
// without a key if need be.
func peek(dev image.Device, ref *imageRef, cred *keyslot.Credential, fn func(*nvstore.Store) error) error {
	on, err := nvstore.Locate(lent{dev}, ref.place())
	if err != nil {
		return err
	}
	s, err := nvstore.OpenDevice(on, &nvstore.Options{ReadOnly: true, Key: cred, Keyless: cred == nil, Idle: -1})
	if err != nil {
		return err
	}
	return errors.Join(fn(s), s.Close())
}

// formatOf names what a store's device is.
func formatOf(dev image.Device) string {
	if d, ok := machine.Of(dev); ok {
		dev = d.Device()
	}
	if _, ok := image.As[*qcow2.Image](dev); ok {
		return "qcow2"
	}
	if _, ok := image.As[*raw.Device](dev); ok {
		return "raw"
	}
	if _, ok := image.As[*luks.Device](dev); ok {
		return "luks"
	}
	if _, ok := image.As[*pebbledev.Device](dev); ok {
		return "pebble"
	}
	if _, ok := image.As[*nbd.Device](dev); ok {
		return "nbd"
	}
	return "window"
}

// fileSize returns the length and the allocated bytes of a path, or of the
// files in a Pebble folder; ok is false for what is neither.
func fileSize(location string) (length, allocated int64, ok bool) {
	path, folder := strings.CutPrefix(location, "pebble:")
	if folder {
		if i := strings.LastIndexByte(path, '/'); i > 0 {
			if _, err := pebbledev.ParseUUID(path[i+1:]); err == nil {
				path = path[:i]
			}
		}
	}
	info, err := os.Stat(path)
	if err != nil {
		return 0, 0, false
	}
	if !info.IsDir() {
		return info.Size(), allocatedBytes(info), true
	}
	err = filepath.WalkDir(path, func(_ string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if info, err := d.Info(); err == nil && info.Mode().IsRegular() {
			length += info.Size()
			allocated += allocatedBytes(info)
		}
		return nil
	})
	return length, allocated, err == nil
}

func uuidText(u [16]byte) string { return pebbledev.UUID(u).String() }

// canonical puts conventional names in place of their aliases, and checks
// them, so that a bad name is reported before anything is opened.
func canonical(names []string) ([]string, error) {
	out := make([]string, len(names))
	for i, name := range names {
		out[i] = nvstore.Canonical(name)
		if err := blobdir.CheckName(out[i]); err != nil {
			return nil, withHint(err, "names are parts separated by /, as in net0/nvm")
		}
	}
	return out, nil
}
