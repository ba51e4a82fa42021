// Package keyslot keeps the key slots of a store: each wraps the same 32-byte
// master key under a passphrase or a raw key of its own.
//
// The slots are one canonical DER value (ITU-T X.690 section 10):
//
//	KeySlots ::= SEQUENCE {
//	    type   OBJECT IDENTIFIER (id-keySlots),
//	    slots  SEQUENCE SIZE(1..16) OF KeySlot }
//
//	KeySlot ::= SEQUENCE {
//	    id          INTEGER (0..15),              -- ascending
//	    label       UTF8String (SIZE(0..64)),     -- bytes; no control characters
//	    kdf         AlgorithmIdentifier,
//	    wrap        SEQUENCE { algorithm OBJECT IDENTIFIER, ... },
//	    extensions  [0] EXPLICIT SEQUENCE SIZE(1..8) OF Extension OPTIONAL }
//
//	Extension ::= SEQUENCE { id OBJECT IDENTIFIER, critical BOOLEAN, value OCTET STRING }
//
//	Argon2idParams ::= SEQUENCE { version INTEGER (19), salt OCTET STRING (SIZE(16)),
//	    memoryKiB INTEGER, time INTEGER, parallelism INTEGER }
//
//	-- wrap, with algorithm id-sealedBox:
//	SEQUENCE { algorithm, salt OCTET STRING (SIZE(24)), commitment OCTET STRING (SIZE(32)),
//	    tag OCTET STRING (SIZE(16)), wrapped OCTET STRING (SIZE(32)) }
//
// The master key is sealed (package seal) with this as the context, so that a
// slot's parts can be neither edited nor moved to another slot or store:
//
//	WrapContext ::= SEQUENCE { version INTEGER (1), storeUUID OCTET STRING (SIZE(16)),
//	    id, label, kdf, wrapAlgorithm OBJECT IDENTIFIER, extensions }
//
// A slot whose kdf or wrap algorithm isn't known here is kept as it is, listed
// as TypeUnknown, and opens with nothing. That leaves room for recipients of
// other kinds.
package keyslot

import (
	"crypto/rand"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"slices"
	"unicode"
	"unicode/utf8"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/seal"
)

// Limits.
const (
	MaxSlots = 16
	MaxLabel = 64 // bytes
	// MaxSize bounds the encoding; longer input is refused unread.
	MaxSize = 64 << 10
	// MasterSize is the length of the key in the slots.
	MasterSize = 32

	maxUnknown    = 8 << 10 // bytes of an unknown AlgorithmIdentifier or wrap
	maxExtensions = 8
	maxExtension  = 1 << 10 // bytes of an extension's value
)

// Kinds of errors, for errors.Is.
var (
	// ErrFormat: the bytes aren't the canonical encoding of key slots.
	// It comes as a ParseError.
	ErrFormat = errors.New("not canonical key slots")
	// ErrUnlock: no key slot opens with the credential. It never says
	// why, because slots are read before anything is authenticated.
	ErrUnlock = errors.New("no key slot opens with this key")
	// ErrBudget: no slot opened, and at least one was not tried because
	// its parameters cost more than the caller allows.
	ErrBudget = errors.New("unlocking exceeds the caller's budget")
	// ErrUnsupported: no slot opened, and at least one of the
	// credential's type has a critical extension that isn't known.
	ErrUnsupported = errors.New("key slot has an unknown critical extension")
	// ErrFull: there are 16 slots already.
	ErrFull = errors.New("all 16 key slots are taken")
	// ErrLast: without its last slot a store could never be opened again.
	ErrLast = errors.New("refusing to remove the last key slot")
	// ErrNotFound: there is no slot of that number.
	ErrNotFound = errors.New("no such key slot")
	// ErrArgument: a caller's argument is of the wrong size or out of
	// range.
	ErrArgument = errors.New("invalid argument")
)

// A Type says what kind of credential a slot takes.
type Type string

// The types of slots.
const (
	TypePassphrase Type = "passphrase"
	TypeRawKey     Type = "raw-key"
	TypeUnknown    Type = "unknown"
)

// Slots are the key slots of one store. Not safe for concurrent use.
type Slots struct {
	slots []slot // ascending by id; 1 to 16
}

// A slot holds the parts as they are encoded, and the decoded ones that this
// package knows.
type slot struct {
	id    int
	label string
	typ   Type
	kdf   []byte // AlgorithmIdentifier, a whole DER element
	wrap  []byte // a whole DER element
	ext   []byte // the [0] element, or nil

	kdfOID, wrapOID asn1.ObjectIdentifier
	argon           kdf.Argon2id // for TypePassphrase
	salt            [kdf.SaltSize]byte
	box             seal.Box // unless TypeUnknown
	wrapped         [MasterSize]byte
	critical        bool // has an unknown critical extension
}

// Info describes a slot without secrets.
type Info struct {
	ID      int
	Label   string
	Type    Type
	Argon2  *kdf.Argon2id // nil unless Type is TypePassphrase
	KDF     string        // object identifier, dotted
	Usable  bool          // false if the type or a critical extension is unknown
	Unknown []byte        // DER of the kdf of a slot of TypeUnknown
}

// Options are the choices for a new slot. The zero value, and nil, are the
// defaults.
type Options struct {
	Label  string       // at most 64 bytes of UTF-8 without control characters
	Argon2 kdf.Argon2id // for a passphrase; zero is kdf.DefaultArgon2id
}

// New makes slots of which the first, number 0, wraps the 32-byte master key
// under cred for the store of that UUID.
func New(storeUUID [16]byte, master []byte, cred *Credential, o *Options) (*Slots, error) {
	s := &Slots{}
	if _, err := s.Add(storeUUID, master, cred, o); err != nil {
		return nil, err
	}
	return s, nil
}

// List describes the slots, in ascending order of number.
func (s *Slots) List() []Info {
	infos := make([]Info, 0, len(s.slots))
	for i := range s.slots {
		sl := &s.slots[i]
		in := Info{ID: sl.id, Label: sl.label, Type: sl.typ, KDF: sl.kdfOID.String(),
			Usable: sl.typ != TypeUnknown && !sl.critical}
		switch sl.typ {
		case TypePassphrase:
			a := sl.argon
			in.Argon2 = &a
		case TypeUnknown:
			in.Unknown = slices.Clone(sl.kdf)
		}
		infos = append(infos, in)
	}
	return infos
}

// Add wraps the master key, which Unlock returned, under another credential,
// in the free slot of the lowest number, which it returns. After an error
// nothing has changed.
func (s *Slots) Add(storeUUID [16]byte, master []byte, cred *Credential, o *Options) (int, error) {
	if o == nil {
		o = &Options{}
	}
	if len(master) != MasterSize {
		return 0, fmt.Errorf("%w: master key of %d bytes, want %d", ErrArgument, len(master), MasterSize)
	}
	if cred == nil || cred.secret == nil {
		return 0, fmt.Errorf("%w: no credential", ErrArgument)
	}
	if why := badLabel(o.Label); why != "" {
		return 0, fmt.Errorf("%w: label %s", ErrArgument, why)
	}
	sl := slot{id: s.free(), label: o.Label, typ: cred.typ}
	if sl.id < 0 {
		return 0, ErrFull
	}
	if err := sl.setKDF(o.Argon2); err != nil {
		return 0, err
	}
	if err := sl.seal(storeUUID, master, cred); err != nil {
		return 0, err
	}
	at, _ := slices.BinarySearchFunc(s.slots, sl.id, func(a slot, id int) int { return a.id - id })
	grown := slices.Insert(slices.Clone(s.slots), at, sl)
	if err := checkSize(grown); err != nil {
		return 0, err
	}
	s.slots = grown
	return sl.id, nil
}

// Remove forgets a slot. Its wrapped key may remain in older copies of the
// bytes; only a new master key makes a removed credential useless for those
// who kept a copy.
func (s *Slots) Remove(id int) error {
	i := slices.IndexFunc(s.slots, func(a slot) bool { return a.id == id })
	switch {
	case i < 0:
		return ErrNotFound
	case len(s.slots) == 1:
		return ErrLast
	}
	s.slots = slices.Delete(slices.Clone(s.slots), i, i+1)
	return nil
}

func (s *Slots) free() int {
	for id := range MaxSlots {
		if !slices.ContainsFunc(s.slots, func(a slot) bool { return a.id == id }) {
			return id
		}
	}
	return -1
}

// setKDF chooses the derivation of a new slot, with a fresh salt.
func (sl *slot) setKDF(a kdf.Argon2id) error {
	sl.wrapOID = OIDSealedBox
	if sl.typ == TypeRawKey {
		sl.kdfOID = OIDRawKey
		sl.kdf = encodeRawKey()
		return nil
	}
	if a == (kdf.Argon2id{}) {
		a = kdf.DefaultArgon2id()
	}
	// What is written must open with the widest budget there can be.
	if err := a.Validate(&kdf.Budget{MemoryKiB: kdf.MaxMemoryKiB, Work: kdf.MaxMemoryKiB * kdf.MaxTime}); err != nil {
		return fmt.Errorf("%w: %w", ErrArgument, err)
	}
	if _, err := io.ReadFull(rand.Reader, sl.salt[:]); err != nil {
		return err
	}
	sl.kdfOID, sl.argon = OIDArgon2id, a
	sl.kdf = encodeArgon2id(a, sl.salt[:])
	return nil
}

// badLabel says what is wrong with a label, or nothing. Control characters
// would let a hostile image write to an operator's terminal.
func badLabel(l string) string {
	switch {
	case len(l) > MaxLabel:
		return fmt.Sprintf("is longer than %d bytes", MaxLabel)
	case !utf8.ValidString(l):
		return "is not UTF-8"
	}
	for _, r := range l {
		if unicode.IsControl(r) || unicode.Is(unicode.Cf, r) || r == '\u2028' || r == '\u2029' {
			return fmt.Sprintf("holds the character %U", r)
		}
	}
	return ""
}
