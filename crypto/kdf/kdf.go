// Package kdf derives keys: from a strong secret with HKDF-SHA256, and from a
// passphrase with Argon2id.
//
// The parameters of Argon2id are read from images, which an attacker may have
// written, so nothing is allocated or computed before Validate has held them
// against a Budget.
package kdf

import (
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/crypto/argon2"
)

var (
	// ErrParams: a parameter lies outside what this package accepts from
	// anyone.
	ErrParams = errors.New("kdf: parameters out of range")
	// ErrBudget: the derivation would cost more than the caller allows.
	ErrBudget = errors.New("kdf: derivation exceeds the caller's budget")
)

// minSecret is the shortest input Derive takes: less cannot be a strong key,
// and is more likely a passphrase in the wrong place.
const minSecret = 16

// Derive returns n bytes (1 to 8160) of HKDF-SHA256 (RFC 5869) with no salt
// and with label, a zero byte and context as info. The secret is a uniformly
// random key of 16 bytes or more, never a passphrase. The label names the
// purpose; it is not empty and holds no zero byte, so that two pairs of label
// and context never give the same info.
func Derive(secret []byte, label string, context []byte, n int) ([]byte, error) {
	if len(secret) < minSecret {
		return nil, fmt.Errorf("%w: secret of %d bytes, need %d or more", ErrParams, len(secret), minSecret)
	}
	if label == "" || strings.IndexByte(label, 0) >= 0 {
		return nil, fmt.Errorf("%w: label is empty or holds a zero byte", ErrParams)
	}
	if n < 1 || n > 255*sha256.Size {
		return nil, fmt.Errorf("%w: output of %d bytes, want 1 to %d", ErrParams, n, 255*sha256.Size)
	}
	key, err := hkdf.Key(sha256.New, secret, nil, label+"\x00"+string(context), n)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrParams, err)
	}
	return key, nil
}

// Limits of Argon2id parameters, whatever the budget. The lower bound of
// memory is the OWASP Password Storage Cheat Sheet's; the upper bounds keep
// memory times passes far from overflow.
const (
	MinMemoryKiB   = 19 << 10 // 19 MiB
	MaxMemoryKiB   = 4 << 20  // 4 GiB
	MaxTime        = 1 << 10  // passes
	MaxParallelism = 16
	SaltSize       = 16 // bytes, RFC 9106 section 3.1
	KeySize        = 32 // bytes that Key returns
	MaxPassphrase  = 1 << 10
)

// Argon2id holds the cost parameters of RFC 9106, version 19 (0x13). The zero
// value isn't valid; start from DefaultArgon2id.
type Argon2id struct {
	MemoryKiB   uint32 // 19456 to 4194304
	Time        uint32 // passes over the memory, 1 to 1024
	Parallelism uint8  // lanes, 1 to 16
}

// DefaultArgon2id is the second recommended option of RFC 9106 section 4:
// 64 MiB, 3 passes, 4 lanes.
func DefaultArgon2id() Argon2id { return Argon2id{MemoryKiB: 64 << 10, Time: 3, Parallelism: 4} }

// MinArgon2id is the cheapest set that is accepted. It is for tests.
func MinArgon2id() Argon2id { return Argon2id{MemoryKiB: MinMemoryKiB, Time: 1, Parallelism: 1} }

// Default budget: 1 GiB of memory, and the work of 16 passes over it.
const (
	defaultBudgetMemoryKiB = 1 << 20
	defaultBudgetWork      = 16 << 20
)

// A Budget is what a caller is willing to spend on derivations. The zero
// value, and nil, stand for 1 GiB and the work of 16 passes over 1 GiB.
type Budget struct {
	MemoryKiB uint32 // most memory at one time; 0 is 1 GiB
	Work      uint64 // most memory in KiB times passes; 0 is 16 passes over 1 GiB
}

// Resolved returns the budget with its zero fields filled in.
func (b *Budget) Resolved() Budget {
	var r Budget
	if b != nil {
		r = *b
	}
	if r.MemoryKiB == 0 {
		r.MemoryKiB = defaultBudgetMemoryKiB
	}
	if r.Work == 0 {
		r.Work = defaultBudgetWork
	}
	return r
}

// Work returns memory in KiB times passes, the unit of Budget.Work.
func (a Argon2id) Work() uint64 { return uint64(a.MemoryKiB) * uint64(a.Time) }

// Validate returns ErrParams if a parameter is outside its range, and
// ErrBudget if the derivation costs more than budget, which may be nil.
func (a Argon2id) Validate(budget *Budget) error {
	if err := a.check(); err != nil {
		return err
	}
	b := budget.Resolved()
	if a.MemoryKiB > b.MemoryKiB {
		return fmt.Errorf("%w: needs %d KiB of memory, %d KiB allowed", ErrBudget, a.MemoryKiB, b.MemoryKiB)
	}
	if a.Work() > b.Work {
		return fmt.Errorf("%w: needs %d KiB-passes of work, %d allowed", ErrBudget, a.Work(), b.Work)
	}
	return nil
}

func (a Argon2id) check() error {
	switch {
	case a.MemoryKiB < MinMemoryKiB || a.MemoryKiB > MaxMemoryKiB:
		return fmt.Errorf("%w: memory of %d KiB, want %d to %d", ErrParams, a.MemoryKiB, MinMemoryKiB, MaxMemoryKiB)
	case a.Time < 1 || a.Time > MaxTime:
		return fmt.Errorf("%w: time of %d passes, want 1 to %d", ErrParams, a.Time, MaxTime)
	case a.Parallelism < 1 || a.Parallelism > MaxParallelism:
		return fmt.Errorf("%w: parallelism of %d, want 1 to %d", ErrParams, a.Parallelism, MaxParallelism)
	}
	return nil
}

// Key derives 32 bytes from a passphrase of 1 to 1024 bytes and a salt of 16
// bytes. It allocates MemoryKiB; hold the parameters against a budget first
// if they come from elsewhere.
func (a Argon2id) Key(passphrase, salt []byte) ([]byte, error) {
	if err := a.check(); err != nil {
		return nil, err
	}
	if len(passphrase) < 1 || len(passphrase) > MaxPassphrase {
		return nil, fmt.Errorf("%w: passphrase of %d bytes, want 1 to %d", ErrParams, len(passphrase), MaxPassphrase)
	}
	if len(salt) != SaltSize {
		return nil, fmt.Errorf("%w: salt of %d bytes, want %d", ErrParams, len(salt), SaltSize)
	}
	return argon2.IDKey(passphrase, salt, a.Time, a.MemoryKiB, a.Parallelism, KeySize), nil
}
