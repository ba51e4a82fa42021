package blobdir

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"

	"nvstore.dev/image"
)

// A root is one generation of the store (FORMAT.md, section 6).
//
//	Root ::= SEQUENCE { body RootBody, mac [0] OCTET STRING OPTIONAL, crc32c OCTET STRING }
type root struct {
	store     [16]byte
	slot      int
	gen       int64
	commit    [16]byte // random
	parent    []byte   // SHA-256 of the parent's DER; empty in the first root
	parentGen int64
	time      time.Time
	sealNames bool
	maxSize   int64 // bytes the image may grow to; 0 is no limit
	blobs     int64 // number of entries
	dir, free reference
	keySlots  *reference // nil in a plain store
	snapshots *reference // retained directory roots; reserved in version 1
	extra     []extension

	der []byte // as read or written
}

func (r *root) sealed() bool { return r.keySlots != nil }

// digest names the root for its child and for the settled record.
func (r *root) digest() []byte {
	h := sha256.Sum256(r.der)
	return h[:]
}

func (r *root) appendBody(dst []byte) []byte {
	return appendSequence(dst, func(b []byte) []byte {
		b = append(b, oidRoot...)
		b = appendInt(b, 1)
		b = appendOctets(b, r.store[:])
		b = appendInt(b, int64(r.slot))
		b = appendInt(b, r.gen)
		b = appendOctets(b, r.commit[:])
		b = appendOctets(b, r.parent)
		b = appendInt(b, r.parentGen)
		b = appendTime(b, r.time)
		b = appendBool(b, r.sealNames)
		b = appendInt(b, r.maxSize)
		b = appendInt(b, r.blobs)
		b = r.dir.append(b, tagSequence)
		b = r.free.append(b, tagSequence)
		if r.keySlots != nil {
			b = r.keySlots.append(b, ctxC(0))
			b = append(b, oidSealing...)
		}
		if r.snapshots != nil {
			b = r.snapshots.append(b, ctxC(1))
		}
		return appendExtensions(b, ctxC(2), r.extra)
	})
}

// encode fills r.der. mac is nil in a plain store.
func (r *root) encode(mac macFunc) []byte {
	r.der = appendSigned(r.appendBody(nil), mac, labelRoot)
	return r.der
}

// appendSigned wraps a body with its MAC and the checksum of both.
func appendSigned(body []byte, mac macFunc, label string) []byte {
	return appendSequence(make([]byte, 0, maxRoot), func(b []byte) []byte {
		start := len(b)
		b = append(b, body...)
		if mac != nil {
			b = appendBytes(b, ctxP(0), mac(label, body))
		}
		return appendCRC(b, checksum(b[start:]))
	})
}

// parseSigned checks the outer SEQUENCE and its checksum, and returns body
// and MAC. What fails here is a torn or rotten block, not an enemy.
func (d *decoder) parseSigned() (body cryptobyte.String, element, mac []byte) {
	in := d.all()
	var el cryptobyte.String
	if d.err == nil && !in.ReadASN1Element(&el, cbasn1.SEQUENCE) {
		d.fail(in, "R1", "body", nil, "a SEQUENCE")
	}
	covered := len(el)
	whole := in
	if d.err == nil && in.PeekASN1Tag(cbasn1.Tag(ctxP(0))) {
		before := len(in)
		mac = d.octets(&in, ctxP(0), "mac", 32, 32)
		covered += before - len(in)
	}
	at := whole
	crc := d.crc(&in)
	d.end(in, "")
	if d.err != nil {
		return nil, nil, nil
	}
	start := len(d.whole) - covered - 6
	if got := checksum(d.whole[start : start+covered]); got != crc {
		d.fail(at, "R10", "crc32c", hex32(got), hex32(crc))
		return nil, nil, nil
	}
	s := el
	return d.seq(&s, tagSequence, "body"), el, mac
}

// parseRoot reads a root out of the 512 bytes at a slot. The MAC is checked
// later, when there is a key.
func parseRoot(p []byte, slot int) (*root, error) {
	d := newDecoder(p, rootSlots[slot], "root")
	n, ok := d.first()
	if !ok {
		return nil, corrupt(rootSlots[slot], "R1", "root", "", nil, "a DER SEQUENCE of at most 512 bytes")
	}
	d = newDecoder(p[:n], rootSlots[slot], "root")
	in, element, mac := d.parseSigned()
	r := &root{der: bytes.Clone(p[:n])}
	d.oid(&in, oidRoot)
	d.version(&in)
	d.array(&in, byte(cbasn1.OCTET_STRING), "store", r.store[:])
	r.slot = int(d.int(&in, "slot", 0, 1))
	r.gen = d.int(&in, "generation", 1, maxGeneration)
	d.array(&in, byte(cbasn1.OCTET_STRING), "commit", r.commit[:])
	at := in
	r.parent = d.octets(&in, byte(cbasn1.OCTET_STRING), "parent", 0, 32)
	r.parentGen = d.int(&in, "parentGeneration", 0, r.gen-1)
	if d.err == nil && (len(r.parent) != 0 && len(r.parent) != 32 || (len(r.parent) == 0) != (r.parentGen == 0)) {
		d.fail(at, "R5", "parent", len(r.parent), "32 bytes, or none with parentGeneration 0")
	}
	r.time = d.time(&in, "time")
	r.sealNames = d.bool(&in, "sealNames")
	r.maxSize = d.int(&in, "maxSize", 0, maxOffset)
	r.blobs = d.int(&in, "blobs", 0, maxGeneration)
	r.rest(d, &in, len(mac) > 0)
	if d.err != nil {
		return nil, d.err
	}
	if r.slot != slot {
		return nil, corrupt(rootSlots[slot], "R11", "root", "slot", r.slot, "the slot it lies in")
	}
	body := r.appendBody(nil)
	if !bytes.Equal(body, element) {
		return nil, corrupt(rootSlots[slot], "R1", "root", "", nil, "the one DER encoding of its content")
	}
	return r, nil
}

// rest reads the references. A root has key slots, a sealing algorithm and a
// MAC, or none of them (R15).
func (r *root) rest(d *decoder, in *cryptobyte.String, mac bool) {
	at := *in
	r.dir = d.reference(in, tagSequence, "directory", maxNode, r.gen, mac)
	r.free = d.reference(in, tagSequence, "free", maxNode, r.gen, mac)
	slots := d.err == nil && in.PeekASN1Tag(cbasn1.Tag(ctxC(0)))
	if d.err == nil && (slots != mac || r.sealNames && !mac) {
		d.fail(at, "R15", "keySlots", slots, "key slots and a MAC, or neither")
		return
	}
	if slots {
		ref := d.reference(in, ctxC(0), "keySlots", maxKeySlots, r.gen, mac)
		r.keySlots = &ref
		d.oid(in, oidSealing)
		if d.err != nil && damagedRule(d.err, "R2") {
			d.err = &Error{Off: d.pos(*in), Struct: "root", Field: "sealing", Want: "an algorithm this version knows", Rule: "R16", Kind: ErrUnsupported}
		}
	}
	if d.err == nil && in.PeekASN1Tag(cbasn1.Tag(ctxC(1))) {
		ref := d.reference(in, ctxC(1), "snapshots", maxNode, r.gen, mac)
		r.snapshots = &ref
	}
	r.extra = d.extensions(in, ctxC(2))
	d.end(*in, "body")
}

func damagedRule(err error, rule string) bool {
	e := (*Error)(nil)
	return errors.As(err, &e) && e.Rule == rule
}

// version reads the format's version: what isn't 1 is unsupported, not
// damaged.
func (d *decoder) version(s *cryptobyte.String) {
	at := *s
	v := d.int(s, "version", 0, 1<<31)
	if d.err == nil && v != 1 {
		d.err = &Error{Off: d.pos(at), Struct: d.name, Field: "version", Got: v, Want: "1", Rule: "R3", Kind: ErrUnsupported}
	}
}

// macOf returns the MAC and the bytes it covers of a signed structure that
// parsed before.
func macOf(der []byte) (body, mac []byte) {
	d := newDecoder(der, 0, "")
	_, body, mac = d.parseSigned()
	return body, mac
}

// A slotRead is what a root slot holds: a root, or the reason why not.
type slotRead struct {
	raw  []byte // the slot's 512 bytes
	root *root
	err  error
	read bool // the device could be read; else err is its error
}

func readSlot(dev image.Device, slot int) slotRead {
	s := slotRead{raw: make([]byte, maxRoot)}
	if err := image.ReadFull(dev, s.raw, rootSlots[slot]); err != nil {
		s.read = err == io.ErrUnexpectedEOF // the image ends before the slot
		s.raw, s.err = nil, err
		if s.read {
			s.err = corrupt(rootSlots[slot], "R12", "root", "", nil, "a root slot inside the image")
		}
		return s
	}
	s.read = true
	s.root, s.err = parseRoot(s.raw, slot)
	return s
}

func readSlots(dev image.Device) (s [2]slotRead, err error) {
	for i := range s {
		s[i] = readSlot(dev, i)
		if !s[i].read {
			return s, s[i].err
		}
	}
	return s, nil
}

// slotReads are the reads of both slots.
func slotReads() []image.Request {
	p := make([]byte, 2*maxRoot)
	return []image.Request{{P: p[:maxRoot], Off: rootSlots[0]}, {P: p[maxRoot:], Off: rootSlots[1]}}
}

// sameSlots tells whether the slots on the device hold the bytes that were
// last seen there, damaged or not.
func sameSlots(dev image.Device, last [2]slotRead) (bool, error) {
	reads := slotReads()
	_ = image.BatcherOf(dev).ReadBatch(reads) // the reads have the errors
	return holdSlots(reads, last)
}

// holdSlots tells the same of slotReads that were carried out.
func holdSlots(reads []image.Request, last [2]slotRead) (bool, error) {
	for i, s := range last {
		if err := reads[i].Err; err == io.ErrUnexpectedEOF {
			return false, nil
		} else if err != nil {
			return false, err
		}
		if !bytes.Equal(reads[i].P, s.raw) {
			return false, nil
		}
	}
	return true, nil
}
