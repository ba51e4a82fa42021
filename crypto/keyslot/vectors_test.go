package keyslot_test

import (
	"bytes"
	"encoding/asn1"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/crypto/keyslot"
)

// The structures once more, for encoding/asn1: the independent reader and
// writer that the package is checked against.
type (
	wire struct {
		Type  asn1.ObjectIdentifier
		Slots []wireSlot
	}
	wireSlot struct {
		ID    int
		Label string `asn1:"utf8"`
		KDF   algorithm
		Wrap  wrap
		Ext   []extension `asn1:"optional,explicit,tag:0"`
	}
	algorithm struct {
		Algorithm  asn1.ObjectIdentifier
		Parameters asn1.RawValue `asn1:"optional"`
	}
	argonParams struct {
		Version                 int
		Salt                    []byte
		Memory, Time, Parallels int64
	}
	wrap struct {
		Algorithm                      asn1.ObjectIdentifier
		Salt, Commitment, Tag, Wrapped []byte
	}
	extension struct {
		ID       asn1.ObjectIdentifier
		Critical bool
		Value    []byte
	}
)

func marshal(t testing.TB, v any) []byte {
	der, err := asn1.Marshal(v)
	require.NoError(t, err)
	return der
}

func unmarshal(t testing.TB, der []byte) (w wire) {
	rest, err := asn1.Unmarshal(der, &w)
	require.NoError(t, err)
	require.Empty(t, rest)
	return w
}

func clone(w wire) wire {
	w.Slots = slices.Clone(w.Slots)
	return w
}

func vectorBase(t testing.TB) wire { return unmarshal(t, encode(t, newSlots(t))) }

func argonID(t testing.TB, memory, time, parallel int64) algorithm {
	return argonWith(t, argonParams{19, make([]byte, 16), memory, time, parallel})
}

func argonWith(t testing.TB, params any) algorithm {
	return algorithm{keyslot.OIDArgon2id, asn1.RawValue{FullBytes: marshal(t, params)}}
}

func TestEncodingASN1Agrees(t *testing.T) {
	der := encode(t, newSlots(t))
	w := unmarshal(t, der)
	require.Equal(t, der, marshal(t, w))
	require.True(t, w.Type.Equal(keyslot.OIDKeySlots))
	require.Equal(t, "operator", w.Slots[0].Label)
	var a argonParams
	_, err := asn1.Unmarshal(w.Slots[0].KDF.Parameters.FullBytes, &a)
	require.NoError(t, err)
	require.Equal(t, []int64{19, int64(fast.MemoryKiB), int64(fast.Time), int64(fast.Parallelism)},
		[]int64{int64(a.Version), a.Memory, a.Time, a.Parallels})
	require.Len(t, a.Salt, 16)
	require.Empty(t, w.Slots[1].KDF.Parameters.FullBytes)
	require.Len(t, w.Slots[1].Wrap.Wrapped, 32)
}

// Each vector has one fault. The text is part of the ParseError.
func TestFaults(t *testing.T) {
	null := asn1.RawValue{FullBytes: []byte{5, 0}}
	edit := func(f func(w *wire)) func() []byte {
		return func() []byte {
			w := vectorBase(t)
			f(&w)
			return marshal(t, w)
		}
	}
	slot1 := func(f func(s *wireSlot)) func() []byte { return edit(func(w *wire) { f(&w.Slots[1]) }) }
	argon := func(p any) func() []byte {
		return edit(func(w *wire) { w.Slots[0].KDF = argonWith(t, p) })
	}
	der := func(f func(der []byte) []byte) func() []byte {
		return func() []byte { return f(marshal(t, vectorBase(t))) }
	}
	// tail appends elements inside the last slot and mends the lengths.
	tail := func(path int, extra ...byte) func() []byte {
		return func() []byte { return appendInside(t, marshal(t, vectorBase(t)), path, extra) }
	}
	salt := make([]byte, 16)
	ext := func(n int) (list []extension) {
		for i := range n {
			list = append(list, extension{asn1.ObjectIdentifier{1, 2, i + 1}, false, nil})
		}
		return list
	}
	for _, c := range []struct {
		name string
		make func() []byte
		want string
	}{
		{"empty", func() []byte { return nil }, "KeySlots at byte 0: want a SEQUENCE"},
		{"zeros", func() []byte { return make([]byte, 512) }, "KeySlots at byte 0: want a SEQUENCE"},
		{"a SET", der(func(d []byte) []byte { d[0] = 0x31; return d }), "KeySlots at byte 0: want a SEQUENCE"},
		{"indefinite length", der(func(d []byte) []byte { return append(append([]byte{0x30, 0x80}, d[4:]...), 0, 0) }), "KeySlots at byte 0"},
		{"length in more bytes than it takes", der(func(d []byte) []byte {
			return append([]byte{0x30, 0x83, 0, d[2], d[3]}, d[4:]...)
		}), "KeySlots at byte 0"},
		{"byte behind", der(func(d []byte) []byte { return append(d, 0) }), "want nothing behind it"},
		{"too long", func() []byte { return make([]byte, keyslot.MaxSize+1) }, "want at most 65536 bytes"},
		{"last byte missing", der(func(d []byte) []byte { return d[:len(d)-1] }), "KeySlots at byte 0"},
		{"other type", edit(func(w *wire) { w.Type = keyslot.OIDRawKey }), "type at byte 4: want object identifier 1.2.840"},
		{"element behind slots", tail(1, 5, 0), "want nothing behind slots"},
		{"no slots", edit(func(w *wire) { w.Slots = nil }), "slots at byte"},
		{"17 slots", edit(func(w *wire) {
			s := w.Slots[1]
			w.Slots = nil
			for i := range 17 {
				s.ID = i
				w.Slots = append(w.Slots, s)
			}
			w.Slots[16].ID = 15
		}), "want at most 16"},
		{"number 16", slot1(func(s *wireSlot) { s.ID = 16 }), "slot 1: id at byte"},
		{"negative number", slot1(func(s *wireSlot) { s.ID = -1 }), "slot 1: id at byte"},
		{"huge number", slot1(func(s *wireSlot) { s.ID = 1 << 40 }), "slot 1: id at byte"},
		{"same number twice", slot1(func(s *wireSlot) { s.ID = 0 }), "want ascending numbers"},
		{"numbers descend", edit(func(w *wire) { w.Slots[0].ID = 2 }), "want ascending numbers"},
		{"slot is an INTEGER", tail(2, 2, 1, 9), "slot 2: KeySlot at byte"},
		{"empty slot", tail(2, 0x30, 0), "slot 2: id at byte"},
		{"label of 65 bytes", slot1(func(s *wireSlot) { s.Label = strings.Repeat("x", 65) }), "slot 1: label at byte"},
		{"label isn't UTF-8", der(func(d []byte) []byte { return bytes.Replace(d, []byte("host"), []byte("ho\xffst")[:4], 1) }), "it is not UTF-8"},
		{"newline in label", slot1(func(s *wireSlot) { s.Label = "a\nb" }), "U+000A"},
		{"escape in label", slot1(func(s *wireSlot) { s.Label = "\x1b[2J" }), "U+001B"},
		{"C1 control in label", slot1(func(s *wireSlot) { s.Label = "\u009b2J" }), "U+009B"},
		{"right-to-left override in label", slot1(func(s *wireSlot) { s.Label = "a\u202eb" }), "U+202E"},
		{"label is a PrintableString", der(func(d []byte) []byte {
			return bytes.Replace(d, []byte("\x0c\x04host"), []byte("\x13\x04host"), 1)
		}), "want a UTF8String"},
		{"kdf isn't a SEQUENCE", der(func(d []byte) []byte {
			i := bytes.Index(d, []byte("\x0c\x04host")) + 6
			d[i] = 0x31
			return d
		}), "want an AlgorithmIdentifier"},
		{"rawKey with NULL", slot1(func(s *wireSlot) { s.KDF.Parameters = null }), "slot 1: kdf at byte"},
		{"argon2id without parameters", edit(func(w *wire) { w.Slots[0].KDF.Parameters = asn1.RawValue{} }), "slot 0: kdf.parameters"},
		{"argon2id with NULL", edit(func(w *wire) { w.Slots[0].KDF.Parameters = null }), "slot 0: kdf.parameters"},
		{"argon2 version 16", argon(argonParams{16, salt, 19456, 1, 1}), "slot 0: kdf.version"},
		{"salt of 15 bytes", argon(argonParams{19, salt[:15], 19456, 1, 1}), "slot 0: kdf.salt"},
		{"salt of 17 bytes", argon(argonParams{19, make([]byte, 17), 19456, 1, 1}), "slot 0: kdf.salt"},
		{"memory below 19 MiB", argon(argonParams{19, salt, 19455, 1, 1}), "slot 0: kdf.memoryKiB"},
		{"memory above 4 GiB", argon(argonParams{19, salt, 4<<20 + 1, 1, 1}), "slot 0: kdf.memoryKiB"},
		{"memory of 2^32", argon(argonParams{19, salt, 1<<32 + 19456, 1, 1}), "slot 0: kdf.memoryKiB"},
		{"negative memory", argon(argonParams{19, salt, -19456, 1, 1}), "slot 0: kdf.memoryKiB"},
		{"no passes", argon(argonParams{19, salt, 19456, 0, 1}), "slot 0: kdf.time"},
		{"1025 passes", argon(argonParams{19, salt, 19456, 1025, 1}), "slot 0: kdf.time"},
		{"no lanes", argon(argonParams{19, salt, 19456, 1, 0}), "slot 0: kdf.parallelism"},
		{"17 lanes", argon(argonParams{19, salt, 19456, 1, 17}), "slot 0: kdf.parallelism"},
		{"257 lanes", argon(argonParams{19, salt, 19456, 1, 257}), "slot 0: kdf.parallelism"},
		{"element behind parallelism", argon(struct {
			V       int
			Salt    []byte
			M, T, P int
			More    int
		}{19, salt, 19456, 1, 1, 1}), "want nothing behind parallelism"},
		{"INTEGER with a leading zero", func() []byte {
			return replaceFixing(t, vectorBase(t), []byte{2, 1, 19}, []byte{2, 2, 0, 19})
		}, "slot 0: kdf.version"},
		{"wrap salt of 23 bytes", slot1(func(s *wireSlot) { s.Wrap.Salt = s.Wrap.Salt[1:] }), "slot 1: wrap.salt"},
		{"commitment of 31 bytes", slot1(func(s *wireSlot) { s.Wrap.Commitment = s.Wrap.Commitment[1:] }), "slot 1: wrap.commitment"},
		{"tag of 12 bytes", slot1(func(s *wireSlot) { s.Wrap.Tag = s.Wrap.Tag[4:] }), "slot 1: wrap.tag"},
		{"no wrapped key", slot1(func(s *wireSlot) { s.Wrap.Wrapped = nil }), "slot 1: wrap.wrapped"},
		{"wrapped key of 64 bytes", slot1(func(s *wireSlot) { s.Wrap.Wrapped = make([]byte, 64) }), "slot 1: wrap.wrapped"},
		{"element behind wrapped", tail(4, 5, 0), "slot 1: wrap at byte"},
		{"element behind the slot", tail(3, 5, 0), "slot 1: KeySlot at byte"},
		{"extensions of tag 1", tail(3, 0xa1, 2, 0x30, 0), "want nothing behind its last field"},
		{"no extensions in the list", tail(3, 0xa0, 2, 0x30, 0), "want at least one"},
		{"extensions empty", tail(3, 0xa0, 0), "want one SEQUENCE"},
		{"two lists of extensions", tail(3, 0xa0, 4, 0x30, 0, 0x30, 0), "want one SEQUENCE"},
		{"9 extensions", slot1(func(s *wireSlot) { s.Ext = ext(9) }), "want at most 8"},
		{"extension twice", slot1(func(s *wireSlot) { s.Ext = append(ext(2), ext(1)...) }), "want each identifier once"},
		{"extension of 1025 bytes", slot1(func(s *wireSlot) { s.Ext = ext(1); s.Ext[0].Value = make([]byte, 1025) }), "want a value of at most 1024 bytes"},
		{"BER TRUE", tail(3, 0xa0, 12, 0x30, 10, 0x30, 8, 6, 1, 42, 1, 1, 1, 4, 0), "want an Extension"},
		{"extension without critical", tail(3, 0xa0, 9, 0x30, 7, 0x30, 5, 6, 1, 42, 4, 0), "want an Extension"},
		{"unknown kdf above 8 KiB", slot1(func(s *wireSlot) {
			s.KDF = algorithm{asn1.ObjectIdentifier{1, 2, 3}, asn1.RawValue{FullBytes: marshal(t, make([]byte, 8<<10))}}
		}), "want at most 8192 bytes"},
		{"unknown wrap of half an element", func() []byte {
			w := vectorBase(t)
			w.Slots[1].Wrap.Algorithm = asn1.ObjectIdentifier{1, 2, 3}
			return appendInside(t, marshal(t, w), 4, []byte{4, 5, 0})
		}, "want DER elements"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := keyslot.Parse(c.make())
			require.Nil(t, s)
			require.ErrorIs(t, err, keyslot.ErrFormat)
			require.NotErrorIs(t, err, keyslot.ErrUnlock)
			var pe *keyslot.ParseError
			require.True(t, errors.As(err, &pe))
			require.Contains(t, err.Error(), c.want)
		})
	}
}

// The offset of an error is that of the element at fault.
func TestErrorOffset(t *testing.T) {
	der := marshal(t, vectorBase(t))
	at := bytes.Index(der, []byte("\x0c\x04host"))
	der[at+2] = '\n'
	_, err := keyslot.Parse(der)
	var pe *keyslot.ParseError
	require.True(t, errors.As(err, &pe))
	require.Equal(t, at, pe.Off)
	require.Equal(t, "slot 1: label", pe.Field)
}

// appendInside adds bytes at the end of the last element at a depth, counting
// the outermost as 1, and mends the lengths on the way.
func appendInside(t *testing.T, der []byte, depth int, extra []byte) []byte {
	if depth == 0 {
		return append(slices.Clone(der), extra...)
	}
	var v asn1.RawValue
	rest, err := asn1.Unmarshal(der, &v)
	require.NoError(t, err)
	if len(rest) > 0 {
		first := der[:len(der)-len(rest)]
		return append(slices.Clone(first), appendInside(t, rest, depth, extra)...)
	}
	v.Bytes = appendInside(t, v.Bytes, depth-1, extra)
	v.FullBytes = nil
	return marshal(t, v)
}

// replaceFixing replaces bytes in slot 0's kdf parameters, whatever that does
// to the lengths around them.
func replaceFixing(t *testing.T, w wire, old, new []byte) []byte {
	var v asn1.RawValue
	_, err := asn1.Unmarshal(w.Slots[0].KDF.Parameters.FullBytes, &v)
	require.NoError(t, err)
	require.True(t, bytes.Contains(v.Bytes, old))
	v.Bytes, v.FullBytes = bytes.Replace(v.Bytes, old, new, 1), nil
	w.Slots[0].KDF.Parameters = v
	return marshal(t, w)
}

func FuzzSlots(f *testing.F) {
	s := newSlots(f)
	f.Add(encode(f, s))
	w := vectorBase(f)
	w.Slots[1].Ext = []extension{{asn1.ObjectIdentifier{1, 2, 3}, false, []byte("x")}, {asn1.ObjectIdentifier{1, 2, 4}, true, nil}}
	f.Add(marshal(f, w))
	w.Slots[1].KDF.Algorithm = asn1.ObjectIdentifier{1, 2, 5}
	f.Add(marshal(f, w))
	w.Slots[0].Wrap.Algorithm = asn1.ObjectIdentifier{1, 2, 6}
	f.Add(marshal(f, w))
	rawCred := raw(f, rawA)
	f.Fuzz(func(t *testing.T, der []byte) {
		in := slices.Clone(der)
		s, err := keyslot.Parse(der)
		if err != nil {
			if s != nil || !errors.Is(err, keyslot.ErrFormat) {
				t.Fatalf("%v, slots %v", err, s)
			}
			return
		}
		out, err := s.Encode()
		if err != nil || !bytes.Equal(in, out) {
			t.Fatalf("accepted %x, encodes to %x, %v", in, out, err)
		}
		if n := len(s.List()); n < 1 || n > keyslot.MaxSlots {
			t.Fatalf("%d slots", n)
		}
		// encoding/asn1 accepts more, but never less; and to forge a
		// slot that opens is not possible.
		var any asn1.RawValue
		if rest, err := asn1.Unmarshal(in, &any); err != nil || len(rest) > 0 {
			t.Fatalf("encoding/asn1: %v", err)
		}
		if m, _, err := s.Unlock([16]byte{}, rawCred, nil); err == nil {
			t.Fatalf("opened to %x", m)
		}
	})
}
