package keyslot

import (
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/crypto/seal"
)

// Encode returns the canonical DER encoding.
func (s *Slots) Encode() ([]byte, error) {
	if len(s.slots) == 0 {
		return nil, fmt.Errorf("%w: no slots", ErrArgument)
	}
	return encode(s.slots)
}

func encode(slots []slot) ([]byte, error) {
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(OIDKeySlots)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			for i := range slots {
				b.AddASN1(asn1.SEQUENCE, slots[i].addTo)
			}
		})
	})
	return b.Bytes()
}

// checkSize keeps unknown slots and new ones together within MaxSize.
func checkSize(slots []slot) error {
	der, err := encode(slots)
	if err != nil {
		return err
	}
	if len(der) > MaxSize {
		return fmt.Errorf("%w: %d bytes of key slots, want at most %d", ErrArgument, len(der), MaxSize)
	}
	return nil
}

func (sl *slot) addTo(b *cryptobyte.Builder) {
	b.AddASN1Int64(int64(sl.id))
	addLabel(b, sl.label)
	b.AddBytes(sl.kdf)
	b.AddBytes(sl.wrap)
	b.AddBytes(sl.ext)
}

func addLabel(b *cryptobyte.Builder, label string) {
	b.AddASN1(asn1.UTF8String, func(b *cryptobyte.Builder) { b.AddBytes([]byte(label)) })
}

// context is WrapContext: everything of the slot that isn't a result of the
// wrapping itself, and the store it belongs to.
func (sl *slot) context(storeUUID [16]byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1Int64(1)
		b.AddASN1OctetString(storeUUID[:])
		b.AddASN1Int64(int64(sl.id))
		addLabel(b, sl.label)
		b.AddBytes(sl.kdf)
		b.AddASN1ObjectIdentifier(sl.wrapOID)
		b.AddBytes(sl.ext)
	})
	return b.BytesOrPanic() // fails only on lengths that the limits exclude
}

func encodeRawKey() []byte {
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(OIDRawKey)
	})
	return b.BytesOrPanic()
}

func encodeArgon2id(a kdf.Argon2id, salt []byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(OIDArgon2id)
		b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
			b.AddASN1Int64(argon2Version)
			b.AddASN1OctetString(salt)
			b.AddASN1Int64(int64(a.MemoryKiB))
			b.AddASN1Int64(int64(a.Time))
			b.AddASN1Int64(int64(a.Parallelism))
		})
	})
	return b.BytesOrPanic()
}

func encodeSealedBox(box *seal.Box, wrapped []byte) []byte {
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddASN1ObjectIdentifier(OIDSealedBox)
		b.AddASN1OctetString(box.Salt[:])
		b.AddASN1OctetString(box.Commitment[:])
		b.AddASN1OctetString(box.Tag[:])
		b.AddASN1OctetString(wrapped)
	})
	return b.BytesOrPanic()
}
