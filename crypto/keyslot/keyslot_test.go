package keyslot_test

import (
	"bytes"
	"encoding/asn1"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/keyslot"
	"nvstore.dev/crypto/seal"
)

var (
	uuid   = [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}
	master = []byte("the master key of 32 bytes length")[:32]
	rawA   = bytes.Repeat([]byte{0xA}, 32)
	rawB   = bytes.Repeat([]byte{0xB}, 32)
	fast   = kdf.MinArgon2id()
)

func pass(t testing.TB, p string) *keyslot.Credential {
	c, err := keyslot.Passphrase([]byte(p))
	require.NoError(t, err)
	return c
}

func raw(t testing.TB, k []byte) *keyslot.Credential {
	c, err := keyslot.RawKey(k)
	require.NoError(t, err)
	return c
}

// newSlots has a passphrase in slot 0 and raw key A in slot 1.
func newSlots(t testing.TB) *keyslot.Slots {
	s, err := keyslot.New(uuid, master, pass(t, "hunter2"), &keyslot.Options{Label: "operator", Argon2: fast})
	require.NoError(t, err)
	id, err := s.Add(uuid, master, raw(t, rawA), &keyslot.Options{Label: "host"})
	require.NoError(t, err)
	require.Equal(t, 1, id)
	return s
}

func encode(t testing.TB, s *keyslot.Slots) []byte {
	der, err := s.Encode()
	require.NoError(t, err)
	return der
}

func parse(t testing.TB, der []byte) *keyslot.Slots {
	s, err := keyslot.Parse(der)
	require.NoError(t, err)
	return s
}

func TestUnlock(t *testing.T) {
	s := parse(t, encode(t, newSlots(t)))
	for id, c := range []*keyslot.Credential{pass(t, "hunter2"), raw(t, rawA)} {
		m, slot, err := s.Unlock(uuid, c, nil)
		require.NoError(t, err)
		require.Equal(t, master, m)
		require.Equal(t, id, slot)
	}
	other := uuid
	other[15]++
	for name, f := range map[string]func() ([]byte, int, error){
		"wrong passphrase":    func() ([]byte, int, error) { return s.Unlock(uuid, pass(t, "hunter3"), nil) },
		"longer passphrase":   func() ([]byte, int, error) { return s.Unlock(uuid, pass(t, "hunter2\n"), nil) },
		"wrong raw key":       func() ([]byte, int, error) { return s.Unlock(uuid, raw(t, rawB), nil) },
		"raw as a passphrase": func() ([]byte, int, error) { return s.Unlock(uuid, pass(t, string(rawA)), nil) },
		"other store":         func() ([]byte, int, error) { return s.Unlock(other, raw(t, rawA), nil) },
	} {
		m, slot, err := f()
		require.Equal(t, keyslot.ErrUnlock, err, name)
		require.Nil(t, m, name)
		require.Zero(t, slot, name)
	}
}

func TestAddAndRemove(t *testing.T) {
	s := newSlots(t)
	for want := 2; want < keyslot.MaxSlots; want++ {
		id, err := s.Add(uuid, master, raw(t, bytes.Repeat([]byte{0x80 + byte(want)}, 32)), nil)
		require.NoError(t, err)
		require.Equal(t, want, id)
	}
	before := encode(t, s)
	_, err := s.Add(uuid, master, raw(t, rawB), nil)
	require.ErrorIs(t, err, keyslot.ErrFull)
	require.ErrorIs(t, s.Remove(16), keyslot.ErrNotFound)
	require.ErrorIs(t, s.Remove(-1), keyslot.ErrNotFound)
	require.Equal(t, before, encode(t, s))

	// A removed credential is gone, and the lowest free number is taken.
	require.NoError(t, s.Remove(7))
	require.NoError(t, s.Remove(1))
	require.ErrorIs(t, s.Remove(1), keyslot.ErrNotFound)
	_, _, err = s.Unlock(uuid, raw(t, rawA), nil)
	require.Equal(t, keyslot.ErrUnlock, err)
	id, err := s.Add(uuid, master, raw(t, rawB), nil)
	require.NoError(t, err)
	require.Equal(t, 1, id)
	s = parse(t, encode(t, s))
	m, id, err := s.Unlock(uuid, raw(t, rawB), nil)
	require.NoError(t, err)
	require.Equal(t, 1, id)
	require.Equal(t, master, m)

	for _, in := range s.List()[1:] {
		require.NoError(t, s.Remove(in.ID))
	}
	require.ErrorIs(t, s.Remove(0), keyslot.ErrLast)
	m, _, err = s.Unlock(uuid, pass(t, "hunter2"), nil)
	require.NoError(t, err)
	require.Equal(t, master, m)
}

func TestList(t *testing.T) {
	a := fast
	require.Equal(t, []keyslot.Info{
		{ID: 0, Label: "operator", Type: keyslot.TypePassphrase, Argon2: &a, KDF: keyslot.OIDArgon2id.String(), Usable: true},
		{ID: 1, Label: "host", Type: keyslot.TypeRawKey, KDF: keyslot.OIDRawKey.String(), Usable: true},
	}, newSlots(t).List())
}

func TestDefaultCost(t *testing.T) {
	s, err := keyslot.New(uuid, master, pass(t, "p"), nil)
	require.NoError(t, err)
	require.Equal(t, kdf.Argon2id{MemoryKiB: 64 << 10, Time: 3, Parallelism: 4}, *s.List()[0].Argon2)
}

func TestArguments(t *testing.T) {
	wiped := raw(t, rawA)
	wiped.Wipe()
	for name, f := range map[string]func() error{
		"short master": func() error { _, err := keyslot.New(uuid, master[:31], raw(t, rawA), nil); return err },
		"no master":    func() error { _, err := keyslot.New(uuid, nil, raw(t, rawA), nil); return err },
		"nil cred":     func() error { _, err := keyslot.New(uuid, master, nil, nil); return err },
		"wiped cred":   func() error { _, err := keyslot.New(uuid, master, wiped, nil); return err },
		"wiped unlock": func() error { _, _, err := newSlots(t).Unlock(uuid, wiped, nil); return err },
		"long label": func() error {
			_, err := keyslot.New(uuid, master, raw(t, rawA), &keyslot.Options{Label: strings.Repeat("x", 65)})
			return err
		},
		"escape in label": func() error {
			_, err := keyslot.New(uuid, master, raw(t, rawA), &keyslot.Options{Label: "\x1b[2J"})
			return err
		},
		"weak argon2": func() error {
			_, err := keyslot.New(uuid, master, pass(t, "p"), &keyslot.Options{Argon2: kdf.Argon2id{MemoryKiB: 1024, Time: 1, Parallelism: 1}})
			return err
		},
		"empty passphrase": func() error { _, err := keyslot.Passphrase(nil); return err },
		"long passphrase":  func() error { _, err := keyslot.Passphrase(make([]byte, 1025)); return err },
		"short raw key":    func() error { _, err := keyslot.RawKey(rawA[:31]); return err },
		"long raw key":     func() error { _, err := keyslot.RawKey(make([]byte, 33)); return err },
		"empty slots":      func() error { _, err := (&keyslot.Slots{}).Encode(); return err },
	} {
		require.ErrorIs(t, f(), keyslot.ErrArgument, name)
	}
}

// Nothing of a slot may be changed, moved or exchanged: it is all in the
// context, or in what the AEAD and the commitment cover.
func TestEveryBitCounts(t *testing.T) {
	s, err := keyslot.New(uuid, master, raw(t, rawA), &keyslot.Options{Label: "host"})
	require.NoError(t, err)
	der := encode(t, s)
	for i := range len(der) * 8 {
		der[i/8] ^= 1 << (i % 8)
		s, err := keyslot.Parse(der)
		if err != nil {
			require.ErrorIs(t, err, keyslot.ErrFormat, "bit %d", i)
			require.Nil(t, s)
		} else {
			m, _, err := s.Unlock(uuid, raw(t, rawA), nil)
			require.Equal(t, keyslot.ErrUnlock, err, "bit %d", i)
			require.Nil(t, m)
		}
		der[i/8] ^= 1 << (i % 8)
	}
}

func TestEveryTruncationIsAParseError(t *testing.T) {
	der := encode(t, newSlots(t))
	for n := range der {
		s, err := keyslot.Parse(der[:n])
		require.ErrorIs(t, err, keyslot.ErrFormat, "%d bytes", n)
		require.NotErrorIs(t, err, keyslot.ErrUnlock)
		require.Nil(t, s)
	}
}

func TestBudget(t *testing.T) {
	var s *keyslot.Slots
	for i := range 4 {
		c := pass(t, fmt.Sprint("pass", i))
		if s == nil {
			s, _ = keyslot.New(uuid, master, c, &keyslot.Options{Argon2: fast})
			continue
		}
		_, err := s.Add(uuid, master, c, &keyslot.Options{Argon2: fast})
		require.NoError(t, err)
	}
	one := fast.Work()

	// The work of all slots tried counts: three fit here, so the fourth
	// passphrase isn't reached.
	b := &kdf.Budget{Work: 3*one + one/2}
	_, id, err := s.Unlock(uuid, pass(t, "pass2"), b)
	require.NoError(t, err)
	require.Equal(t, 2, id)
	m, _, err := s.Unlock(uuid, pass(t, "pass3"), b)
	require.ErrorIs(t, err, keyslot.ErrBudget)
	require.NotErrorIs(t, err, keyslot.ErrUnlock)
	require.Nil(t, m)
	_, _, err = s.Unlock(uuid, pass(t, "pass3"), &kdf.Budget{Work: 3 * one})
	require.ErrorIs(t, err, keyslot.ErrBudget, "a budget that is used up isn't the default one")
	_, id, err = s.Unlock(uuid, pass(t, "pass3"), &kdf.Budget{Work: 4 * one})
	require.NoError(t, err)
	require.Equal(t, 3, id)
	_, _, err = s.Unlock(uuid, pass(t, "nobody's"), &kdf.Budget{Work: 4 * one})
	require.Equal(t, keyslot.ErrUnlock, err)

	// A slot beyond the budget doesn't cost its memory, and doesn't keep
	// the others from opening.
	v := vectorBase(t)
	v.Slots[0].KDF = argonID(t, 1<<21, 1, 1)
	s = parse(t, marshal(t, v))
	allocs := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			_, _, err = s.Unlock(uuid, pass(t, "hunter2"), nil)
		}
	}).AllocedBytesPerOp()
	require.ErrorIs(t, err, keyslot.ErrBudget)
	require.ErrorIs(t, err, kdf.ErrBudget)
	require.Less(t, allocs, int64(1<<20))
	_, id, err = s.Unlock(uuid, raw(t, rawA), nil)
	require.NoError(t, err)
	require.Equal(t, 1, id)

	// Sixteen slots at the most a default budget takes: one is tried.
	hostile := wire{Type: keyslot.OIDKeySlots}
	for i := range 16 {
		sl := v.Slots[0]
		sl.ID, sl.KDF = i, argonID(t, 1<<20, 1024, 16)
		hostile.Slots = append(hostile.Slots, sl)
	}
	_, _, err = parse(t, marshal(t, hostile)).Unlock(uuid, pass(t, "hunter2"), nil)
	require.ErrorIs(t, err, keyslot.ErrBudget)
}

func TestMovedSlots(t *testing.T) {
	s := newSlots(t)
	_, err := s.Add(uuid, master, raw(t, rawB), nil)
	require.NoError(t, err)
	v := unmarshal(t, encode(t, s))

	renumbered := clone(v)
	renumbered.Slots[2].ID = 9
	exchanged := clone(v)
	exchanged.Slots[1].Wrap, exchanged.Slots[2].Wrap = exchanged.Slots[2].Wrap, exchanged.Slots[1].Wrap
	relabelled := clone(v)
	relabelled.Slots[2].Label = "mine"
	extended := clone(v)
	extended.Slots[2].Ext = []extension{{asn1.ObjectIdentifier{1, 2, 3}, false, []byte("x")}}
	for name, w := range map[string]wire{"renumbered": renumbered, "exchanged": exchanged, "relabelled": relabelled, "extended": extended} {
		_, _, err := parse(t, marshal(t, w)).Unlock(uuid, raw(t, rawB), nil)
		require.Equal(t, keyslot.ErrUnlock, err, name)
	}
	_, id, err := parse(t, marshal(t, v)).Unlock(uuid, raw(t, rawB), nil)
	require.NoError(t, err)
	require.Equal(t, 2, id)
}

// A cheaper cost in the image must not make a slot open: it would tell a
// guesser that the passphrase is right.
func TestWeakenedCost(t *testing.T) {
	s, err := keyslot.New(uuid, master, pass(t, "p"), &keyslot.Options{Argon2: kdf.Argon2id{MemoryKiB: 20 << 10, Time: 2, Parallelism: 1}})
	require.NoError(t, err)
	v := unmarshal(t, encode(t, s))
	v.Slots[0].KDF = argonID(t, kdf.MinMemoryKiB, 1, 1)
	_, _, err = parse(t, marshal(t, v)).Unlock(uuid, pass(t, "p"), nil)
	require.Equal(t, keyslot.ErrUnlock, err)
}

// byHand builds a slot with encoding/asn1 and packages kdf and seal alone.
func byHand(t *testing.T, id int, label string, rawKey []byte, exts []extension) wireSlot {
	kek, err := kdf.Derive(rawKey, "nvstore.dev/keyslot@v1 raw key", nil, 32)
	require.NoError(t, err)
	k, err := seal.NewKey(kek)
	require.NoError(t, err)
	kdfID := algorithm{Algorithm: keyslot.OIDRawKey}
	context := marshal(t, struct {
		Version int
		UUID    []byte
		ID      int
		Label   string `asn1:"utf8"`
		KDF     algorithm
		Wrap    asn1.ObjectIdentifier
		Ext     []extension `asn1:"optional,explicit,tag:0"`
	}{1, uuid[:], id, label, kdfID, keyslot.OIDSealedBox, exts})
	ct, box, err := k.Seal(nil, master, context)
	require.NoError(t, err)
	return wireSlot{ID: id, Label: label, KDF: kdfID, Ext: exts, Wrap: wrap{keyslot.OIDSealedBox,
		box.Salt[:], box.Commitment[:], box.Tag[:], ct}}
}

func TestContextAsDocumented(t *testing.T) {
	v := wire{Type: keyslot.OIDKeySlots, Slots: []wireSlot{
		byHand(t, 3, "späte", rawA, nil),
		byHand(t, 4, "", rawB, []extension{{asn1.ObjectIdentifier{1, 2, 3}, false, []byte("kept")}}),
	}}
	der := marshal(t, v)
	s := parse(t, der)
	for id, k := range map[int][]byte{3: rawA, 4: rawB} {
		m, slot, err := s.Unlock(uuid, raw(t, k), nil)
		require.NoError(t, err)
		require.Equal(t, id, slot)
		require.Equal(t, master, m)
	}
	require.Equal(t, der, encode(t, s), "the extension was not kept")
}

func TestCriticalExtension(t *testing.T) {
	v := wire{Type: keyslot.OIDKeySlots, Slots: []wireSlot{
		byHand(t, 0, "", rawA, []extension{{asn1.ObjectIdentifier{1, 2, 3}, true, nil}}),
	}}
	der := marshal(t, v)
	s := parse(t, der)
	require.False(t, s.List()[0].Usable)
	m, _, err := s.Unlock(uuid, raw(t, rawA), nil)
	require.ErrorIs(t, err, keyslot.ErrUnsupported)
	require.Nil(t, m)
	_, _, err = s.Unlock(uuid, pass(t, "other type"), nil)
	require.Equal(t, keyslot.ErrUnlock, err)
	require.Equal(t, der, encode(t, s))

	// Another slot of the same type still opens.
	v.Slots = append(v.Slots, byHand(t, 1, "", rawB, nil))
	_, id, err := parse(t, marshal(t, v)).Unlock(uuid, raw(t, rawB), nil)
	require.NoError(t, err)
	require.Equal(t, 1, id)
}

// Slots of a later version are kept byte for byte through our changes.
func TestUnknownSlots(t *testing.T) {
	type strangeWrap struct {
		Algorithm asn1.ObjectIdentifier
		Text      string `asn1:"utf8"`
		Inner     []int
	}
	type strange struct {
		ID    int
		Label string `asn1:"utf8"`
		KDF   asn1.RawValue
		Wrap  asn1.RawValue
	}
	known := byHand(t, 0, "", rawA, nil)
	kdfDER := marshal(t, algorithm{asn1.ObjectIdentifier{1, 3, 9}, asn1.RawValue{FullBytes: marshal(t, []string{"age1..."})}})
	list := []asn1.RawValue{
		{FullBytes: marshal(t, known)},
		{FullBytes: marshal(t, strange{1, "age", asn1.RawValue{FullBytes: kdfDER}, asn1.RawValue{FullBytes: marshal(t, known.Wrap)}})},
		{FullBytes: marshal(t, strange{2, "later", asn1.RawValue{FullBytes: marshal(t, known.KDF)},
			asn1.RawValue{FullBytes: marshal(t, strangeWrap{asn1.ObjectIdentifier{1, 3, 10}, "x", []int{1, 2}})}})},
		{FullBytes: marshal(t, strange{3, "bare", asn1.RawValue{FullBytes: marshal(t, algorithm{Algorithm: asn1.ObjectIdentifier{1, 3, 11}})},
			asn1.RawValue{FullBytes: marshal(t, known.Wrap)}})},
	}
	der := marshal(t, struct {
		Type  asn1.ObjectIdentifier
		Slots []asn1.RawValue
	}{keyslot.OIDKeySlots, list})
	s := parse(t, der)
	require.Equal(t, der, encode(t, s))
	infos := s.List()
	require.Equal(t, keyslot.TypeRawKey, infos[0].Type)
	for i, kdfOID := range []string{"", "1.3.9", keyslot.OIDRawKey.String(), "1.3.11"} {
		if i > 0 {
			require.Equal(t, keyslot.TypeUnknown, infos[i].Type)
			require.Equal(t, kdfOID, infos[i].KDF)
			require.False(t, infos[i].Usable)
			require.NotNil(t, infos[i].Unknown)
		}
	}
	require.Equal(t, kdfDER, infos[1].Unknown)

	id, err := s.Add(uuid, master, raw(t, rawB), nil)
	require.NoError(t, err)
	require.Equal(t, 4, id)
	require.NoError(t, s.Remove(0))
	again := encode(t, parse(t, encode(t, s)))
	for _, r := range list[1:] {
		require.True(t, bytes.Contains(again, r.FullBytes))
	}
}

func TestOpenSSLReadsIt(t *testing.T) {
	cmd := exec.Command("openssl", "asn1parse", "-inform", "DER", "-i")
	cmd.Stdin = bytes.NewReader(encode(t, newSlots(t)))
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, string(out))
	require.Contains(t, string(out), ":"+keyslot.OIDKeySlots.String())
	require.Contains(t, string(out), "UTF8STRING        :operator")
	require.Contains(t, string(out), ":"+keyslot.OIDArgon2id.String())
}

func TestCredentialsDoNotPrint(t *testing.T) {
	c := pass(t, "hunter2")
	for _, v := range []any{c, *c} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x"} {
			require.Equal(t, "keyslot.Credential(redacted)", fmt.Sprintf(verb, v))
		}
	}
}
