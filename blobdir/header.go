package blobdir

import (
	"bytes"
	"crypto/subtle"
	"io"
	"slices"

	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"nvstore.dev/image"
)

// The header is written once, when the store is made, and names the layout.
// It is there for people and for telling our files from others: the roots
// repeat what matters, and opening doesn't depend on it (FORMAT.md, section 4).
//
//	Header ::= SEQUENCE { body HeaderBody, crc32c OCTET STRING }

const headerNote = "nvstore"

func appendHeaderBody(dst []byte, store [16]byte) []byte {
	return appendSequence(dst, func(b []byte) []byte {
		b = append(b, oidHeader...)
		b = appendInt(b, 1)
		b = appendUTF8(b, headerNote)
		b = appendOctets(b, store[:])
		b = appendInt(b, BlockSize)
		b = appendInt(b, rootSlot0)
		b = appendInt(b, rootSlot1)
		return appendInt(b, settledOffset)
	})
}

func encodeHeader(store [16]byte) []byte {
	return appendSigned(appendHeaderBody(nil, store), nil, "")
}

// Magic is how the header, and so a raw image that holds a store from its
// first byte on, begins: outer and inner SEQUENCE and the header's OBJECT
// IDENTIFIER.
var Magic = func() []byte {
	h := encodeHeader([16]byte{})
	return h[:bytes.Index(h, oidHeader)+len(oidHeader)]
}()

// probe tells whether a store's header lies at the start of r, and the
// store's UUID. It doesn't look at the roots.
func probe(r io.ReaderAt) (store [16]byte, ok bool) {
	p := make([]byte, maxRoot)
	if n, _ := r.ReadAt(p, headerOffset); n < len(p) {
		return store, false
	}
	store, err := parseHeader(p)
	return store, err == nil
}

func parseHeader(p []byte) (store [16]byte, err error) {
	d := newDecoder(p, headerOffset, "header")
	n, ok := d.first()
	if !ok {
		return store, corrupt(headerOffset, "R1", "header", "", nil, "a DER SEQUENCE of at most 512 bytes")
	}
	d = newDecoder(p[:n], headerOffset, "header")
	in, _, mac := d.parseSigned()
	d.oid(&in, oidHeader)
	d.version(&in)
	d.utf8(&in, "note", len(headerNote))
	d.array(&in, byte(cbasn1.OCTET_STRING), "store", store[:])
	for _, f := range []struct {
		name string
		want int64
	}{{"blockSize", BlockSize}, {"rootSlot0", rootSlot0}, {"rootSlot1", rootSlot1}, {"settled", settledOffset}} {
		d.int(&in, f.name, f.want, f.want)
	}
	d.end(in, "body")
	if d.err == nil && mac != nil {
		d.fail(in, "R1", "mac", nil, "no MAC")
	}
	if err := d.canonical(encodeHeader(store)); err != nil {
		return [16]byte{}, err
	}
	return store, nil
}

// A settled record says that a root is durable (FORMAT.md, section 7). It
// lies in a block of its own, so that writing it can't tear a live root.
type settled struct {
	store  [16]byte
	slot   int
	gen    int64
	digest [32]byte
}

func (s *settled) appendBody(dst []byte) []byte {
	return appendSequence(dst, func(b []byte) []byte {
		b = append(b, oidSettled...)
		b = appendInt(b, 1)
		b = appendOctets(b, s.store[:])
		b = appendInt(b, int64(s.slot))
		b = appendInt(b, s.gen)
		return appendOctets(b, s.digest[:])
	})
}

func (s *settled) encode(mac macFunc) []byte {
	return appendSigned(s.appendBody(nil), mac, labelSettled)
}

func settles(r *root) *settled {
	s := &settled{store: r.store, slot: r.slot, gen: r.gen}
	copy(s.digest[:], r.digest())
	return s
}

// names tells whether the record speaks of this root.
func (s *settled) names(r *root) bool {
	return s != nil && s.gen == r.gen && s.slot == r.slot && slices.Equal(s.digest[:], r.digest())
}

// parseSettled reads the record. verify is nil where there is no key (yet).
func parseSettled(p []byte, verify macFunc) (*settled, error) {
	d := newDecoder(p, settledOffset, "settled record")
	n, ok := d.first()
	if !ok {
		return nil, corrupt(settledOffset, "R1", "settled record", "", nil, "a DER SEQUENCE of at most 512 bytes")
	}
	d = newDecoder(p[:n], settledOffset, "settled record")
	in, element, mac := d.parseSigned()
	s := new(settled)
	d.oid(&in, oidSettled)
	d.version(&in)
	d.array(&in, byte(cbasn1.OCTET_STRING), "store", s.store[:])
	s.slot = int(d.int(&in, "slot", 0, 1))
	s.gen = d.int(&in, "generation", 1, maxGeneration)
	d.array(&in, byte(cbasn1.OCTET_STRING), "digest", s.digest[:])
	d.end(in, "body")
	if d.err != nil {
		return nil, d.err
	}
	if !bytes.Equal(s.appendBody(nil), element) {
		return nil, corrupt(settledOffset, "R1", "settled record", "", nil, "the one DER encoding of its content")
	}
	if verify != nil && (mac == nil || subtle.ConstantTimeCompare(mac, verify(labelSettled, element)) != 1) {
		return nil, &Error{Off: settledOffset, Struct: "settled record", Field: "mac", Want: "a MAC of this store's key", Rule: "R18", Kind: ErrTampered}
	}
	return s, nil
}

// readSettled returns nil where there is no record: a fresh store's block is
// all zeros.
func readSettled(dev image.Device, verify macFunc) (*settled, error) {
	p := make([]byte, maxRoot)
	if err := image.ReadFull(dev, p, settledOffset); err == io.ErrUnexpectedEOF {
		return nil, corrupt(settledOffset, "R12", "settled record", "", nil, "a record inside the image")
	} else if err != nil {
		return nil, err
	}
	if bytes.Equal(p, make([]byte, maxRoot)) {
		return nil, nil
	}
	return parseSettled(p, verify)
}
