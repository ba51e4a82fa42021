package keyslot

import (
	"bytes"
	encasn1 "encoding/asn1"
	"fmt"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"nvstore.dev/crypto/kdf"
)

// argon2Version is 0x13, the only version of RFC 9106.
const argon2Version = 19

// A ParseError says where in the encoding which field is wrong. Its kind is
// ErrFormat.
type ParseError struct {
	Off   int    // byte offset in the encoding
	Field string // e.g. "slot 2: kdf.memoryKiB"
	Want  string // what the field must be
}

func (e *ParseError) Error() string {
	return fmt.Sprintf("key slots: %s at byte %d: want %s", e.Field, e.Off, e.Want)
}

// Is makes every ParseError an ErrFormat.
func (e *ParseError) Is(target error) bool { return target == ErrFormat }

// Parse reads the encoding of key slots. Whatever isn't the one canonical
// encoding of its content, and whatever goes on behind it, is refused with a
// ParseError. Parsing tells nothing about keys: it never fails because of a
// wrong one.
func Parse(der []byte) (*Slots, error) {
	if len(der) > MaxSize {
		return nil, &ParseError{0, "encoding", fmt.Sprintf("at most %d bytes", MaxSize)}
	}
	der = slices.Clone(der) // what is kept must not change under us
	p := &parser{base: der}
	slots, err := p.keySlots(der)
	if err != nil {
		return nil, err
	}
	for i := range slots {
		slots[i].rebuild()
	}
	again, err := encode(slots)
	if err != nil || !bytes.Equal(again, der) {
		return nil, &ParseError{firstDifference(again, der), "encoding", "canonical DER"}
	}
	return &Slots{slots: slots}, nil
}

// rebuild replaces what was read by what we would write, so that comparing
// the encodings proves it canonical.
func (sl *slot) rebuild() {
	switch {
	case sl.kdfOID.Equal(OIDArgon2id):
		sl.kdf = encodeArgon2id(sl.argon, sl.salt[:])
	case sl.kdfOID.Equal(OIDRawKey):
		sl.kdf = encodeRawKey()
	}
	if sl.wrapOID.Equal(OIDSealedBox) {
		sl.wrap = encodeSealedBox(&sl.box, sl.wrapped[:])
	}
}

func firstDifference(a, b []byte) int {
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}

type parser struct {
	base   []byte
	prefix string // of the fields' names
}

// fail gives s's place: a cryptobyte.String is a slice of base, and so ends,
// in capacity, where base ends.
func (p *parser) fail(s cryptobyte.String, field, want string) error {
	return &ParseError{cap(p.base) - cap(s), p.prefix + field, want}
}

func (p *parser) keySlots(der []byte) ([]slot, error) {
	in := cryptobyte.String(der)
	var outer, list cryptobyte.String
	var oid encasn1.ObjectIdentifier
	at := in
	if !in.ReadASN1(&outer, asn1.SEQUENCE) {
		return nil, p.fail(at, "KeySlots", "a SEQUENCE")
	}
	if !in.Empty() {
		return nil, p.fail(in, "KeySlots", "nothing behind it")
	}
	at = outer
	if !outer.ReadASN1ObjectIdentifier(&oid) || !oid.Equal(OIDKeySlots) {
		return nil, p.fail(at, "type", "object identifier "+OIDKeySlots.String())
	}
	at = outer
	if !outer.ReadASN1(&list, asn1.SEQUENCE) {
		return nil, p.fail(at, "slots", "a SEQUENCE")
	}
	if !outer.Empty() {
		return nil, p.fail(outer, "KeySlots", "nothing behind slots")
	}
	at = list
	var slots []slot
	for !list.Empty() {
		at = list
		if len(slots) == MaxSlots {
			return nil, p.fail(list, "slots", fmt.Sprintf("at most %d", MaxSlots))
		}
		sl, err := p.keySlot(&list, len(slots))
		if err != nil {
			return nil, err
		}
		if n := len(slots); n > 0 && sl.id <= slots[n-1].id {
			return nil, p.fail(at, "id", "ascending numbers")
		}
		slots = append(slots, sl)
	}
	if len(slots) == 0 {
		return nil, p.fail(at, "slots", "at least one")
	}
	return slots, nil
}

func (p *parser) keySlot(list *cryptobyte.String, i int) (slot, error) {
	p.prefix = fmt.Sprintf("slot %d: ", i)
	var sl slot
	var s, label cryptobyte.String
	at := *list
	if !list.ReadASN1(&s, asn1.SEQUENCE) {
		return slot{}, p.fail(at, "KeySlot", "a SEQUENCE")
	}
	at = s
	if !s.ReadASN1Integer(&sl.id) || sl.id < 0 || sl.id >= MaxSlots {
		return slot{}, p.fail(at, "id", "an INTEGER from 0 to 15")
	}
	at = s
	if !s.ReadASN1(&label, asn1.UTF8String) {
		return slot{}, p.fail(at, "label", "a UTF8String")
	}
	if why := badLabel(string(label)); why != "" {
		return slot{}, p.fail(at, "label", "other text: it "+why)
	}
	sl.label = string(label)
	if err := p.kdf(&s, &sl); err != nil {
		return slot{}, err
	}
	if err := p.wrap(&s, &sl); err != nil {
		return slot{}, err
	}
	if err := p.extensions(&s, &sl); err != nil {
		return slot{}, err
	}
	if !s.Empty() {
		return slot{}, p.fail(s, "KeySlot", "nothing behind its last field")
	}
	return sl, nil
}

// kdf reads an AlgorithmIdentifier and decides the slot's type.
func (p *parser) kdf(s *cryptobyte.String, sl *slot) error {
	var whole, in cryptobyte.String
	at := *s
	if !s.ReadASN1Element(&whole, asn1.SEQUENCE) {
		return p.fail(at, "kdf", "an AlgorithmIdentifier")
	}
	sl.kdf = whole
	whole.ReadASN1(&in, asn1.SEQUENCE)
	at = in
	if !in.ReadASN1ObjectIdentifier(&sl.kdfOID) {
		return p.fail(at, "kdf.algorithm", "an object identifier")
	}
	switch {
	case sl.kdfOID.Equal(OIDArgon2id):
		sl.typ = TypePassphrase
		if err := p.argon2id(&in, sl); err != nil {
			return err
		}
	case sl.kdfOID.Equal(OIDRawKey):
		sl.typ = TypeRawKey
	default:
		sl.typ = TypeUnknown
		at = in
		if len(sl.kdf) > maxUnknown {
			return p.fail(at, "kdf", fmt.Sprintf("at most %d bytes", maxUnknown))
		}
		if !in.Empty() && !skip(&in) {
			return p.fail(at, "kdf.parameters", "a DER element")
		}
	}
	if !in.Empty() {
		return p.fail(in, "kdf", "nothing behind its last field")
	}
	return nil
}

func (p *parser) argon2id(in *cryptobyte.String, sl *slot) error {
	var s, salt cryptobyte.String
	at := *in
	if !in.ReadASN1(&s, asn1.SEQUENCE) {
		return p.fail(at, "kdf.parameters", "a SEQUENCE")
	}
	var version, memory, time, parallelism uint64
	at = s
	if !s.ReadASN1Integer(&version) || version != argon2Version {
		return p.fail(at, "kdf.version", "the INTEGER 19")
	}
	at = s
	if !s.ReadASN1(&salt, asn1.OCTET_STRING) || copy(sl.salt[:], salt) != kdf.SaltSize || len(salt) != kdf.SaltSize {
		return p.fail(at, "kdf.salt", "an OCTET STRING of 16 bytes")
	}
	for _, f := range []struct {
		name     string
		v        *uint64
		min, max uint64
	}{
		{"memoryKiB", &memory, kdf.MinMemoryKiB, kdf.MaxMemoryKiB},
		{"time", &time, 1, kdf.MaxTime},
		{"parallelism", &parallelism, 1, kdf.MaxParallelism},
	} {
		at = s
		if !s.ReadASN1Integer(f.v) || *f.v < f.min || *f.v > f.max {
			return p.fail(at, "kdf."+f.name, fmt.Sprintf("an INTEGER from %d to %d", f.min, f.max))
		}
	}
	if !s.Empty() {
		return p.fail(s, "kdf.parameters", "nothing behind parallelism")
	}
	sl.argon = kdf.Argon2id{MemoryKiB: uint32(memory), Time: uint32(time), Parallelism: uint8(parallelism)}
	return nil
}

func (p *parser) wrap(s *cryptobyte.String, sl *slot) error {
	var whole, in cryptobyte.String
	at := *s
	if !s.ReadASN1Element(&whole, asn1.SEQUENCE) {
		return p.fail(at, "wrap", "a SEQUENCE")
	}
	sl.wrap = whole
	whole.ReadASN1(&in, asn1.SEQUENCE)
	at = in
	if !in.ReadASN1ObjectIdentifier(&sl.wrapOID) {
		return p.fail(at, "wrap.algorithm", "an object identifier")
	}
	if !sl.wrapOID.Equal(OIDSealedBox) {
		sl.typ = TypeUnknown
		at = in
		if len(sl.wrap) > maxUnknown {
			return p.fail(at, "wrap", fmt.Sprintf("at most %d bytes", maxUnknown))
		}
		for !in.Empty() {
			at = in
			if !skip(&in) {
				return p.fail(at, "wrap", "DER elements")
			}
		}
		return nil
	}
	for _, f := range []struct {
		name string
		dst  []byte
	}{
		{"salt", sl.box.Salt[:]}, {"commitment", sl.box.Commitment[:]},
		{"tag", sl.box.Tag[:]}, {"wrapped", sl.wrapped[:]},
	} {
		var v cryptobyte.String
		at = in
		if !in.ReadASN1(&v, asn1.OCTET_STRING) || len(v) != len(f.dst) {
			return p.fail(at, "wrap."+f.name, fmt.Sprintf("an OCTET STRING of %d bytes", len(f.dst)))
		}
		copy(f.dst, v)
	}
	if !in.Empty() {
		return p.fail(in, "wrap", "nothing behind wrapped")
	}
	return nil
}

func (p *parser) extensions(s *cryptobyte.String, sl *slot) error {
	tag := asn1.Tag(0).ContextSpecific().Constructed()
	if !s.PeekASN1Tag(tag) {
		return nil
	}
	var whole, explicit, list cryptobyte.String
	at := *s
	if !s.ReadASN1Element(&whole, tag) {
		return p.fail(at, "extensions", "a DER element")
	}
	sl.ext = whole
	whole.ReadASN1(&explicit, tag)
	if !explicit.ReadASN1(&list, asn1.SEQUENCE) || !explicit.Empty() {
		return p.fail(at, "extensions", "one SEQUENCE")
	}
	var seen []encasn1.ObjectIdentifier
	for !list.Empty() {
		var e, value cryptobyte.String
		var oid encasn1.ObjectIdentifier
		var critical bool
		at = list
		if len(seen) == maxExtensions {
			return p.fail(at, "extensions", fmt.Sprintf("at most %d", maxExtensions))
		}
		if !list.ReadASN1(&e, asn1.SEQUENCE) || !e.ReadASN1ObjectIdentifier(&oid) ||
			!e.ReadASN1Boolean(&critical) || !e.ReadASN1(&value, asn1.OCTET_STRING) || !e.Empty() {
			return p.fail(at, "extensions", "an Extension")
		}
		if len(value) > maxExtension {
			return p.fail(at, "extensions", fmt.Sprintf("a value of at most %d bytes", maxExtension))
		}
		if slices.ContainsFunc(seen, oid.Equal) {
			return p.fail(at, "extensions", "each identifier once")
		}
		seen = append(seen, oid)
		sl.critical = sl.critical || critical // none is known yet
	}
	if len(seen) == 0 {
		return p.fail(at, "extensions", "at least one, or none of the field")
	}
	return nil
}

// skip reads over one element of any type.
func skip(s *cryptobyte.String) bool {
	var e cryptobyte.String
	var tag asn1.Tag
	return s.ReadAnyASN1Element(&e, &tag)
}
