package blobdir

import (
	"encoding/binary"
	"hash/crc32"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// A reference names stored bytes and what they must be (FORMAT.md, section
// 5). The checksum lies with the reference, never with the bytes, so that
// lost, stale and misdirected writes show.
type reference struct {
	off, length int64
	crc         uint32
	gen         int64  // generation that wrote the bytes
	mac         []byte // of a node in a sealed store: 32 bytes
}

func (r reference) blocks() int64 { return roundUp(r.length) }

func appendCRC(dst []byte, crc uint32) []byte {
	return append(dst, byte(cbasn1.OCTET_STRING), 4, byte(crc>>24), byte(crc>>16), byte(crc>>8), byte(crc))
}

func (r reference) appendFields(b []byte) []byte {
	b = appendInt(b, r.off)
	b = appendInt(b, r.length)
	b = appendCRC(b, r.crc)
	b = appendInt(b, r.gen)
	if r.mac != nil {
		b = appendBytes(b, ctxP(0), r.mac)
	}
	return b
}

func (r reference) append(dst []byte, tag byte) []byte {
	return appendTLV(dst, tag, r.appendFields)
}

// maxReference bounds the DER of a node's reference.
const maxReference = 2 + 10 + 10 + 6 + 10 + 34

func (d *decoder) crc(s *cryptobyte.String) uint32 {
	p := d.octets(s, byte(cbasn1.OCTET_STRING), "crc32c", 4, 4)
	if len(p) != 4 {
		return 0
	}
	return crcValue(p)
}

func crcValue(p []byte) uint32 { return binary.BigEndian.Uint32(p) }

// reference reads a node's reference. limit is the most bytes it may name;
// gen the generation of the structure that holds it.
func (d *decoder) reference(s *cryptobyte.String, tag byte, field string, limit, gen int64, sealed bool) reference {
	in := d.seq(s, tag, field)
	var r reference
	d.place(&in, field, &r, limit, gen)
	if sealed {
		r.mac = d.octets(&in, ctxP(0), field+".mac", 32, 32)
	}
	d.end(in, field)
	return r
}

// place reads offset, length, checksum and generation, and holds them to the
// rules for extents.
func (d *decoder) place(in *cryptobyte.String, field string, r *reference, limit, gen int64) {
	at := *in
	r.off = d.int(in, field+".offset", 0, maxOffset)
	r.length = d.int(in, field+".length", 1, limit)
	r.crc = d.crc(in)
	r.gen = d.int(in, field+".generation", 1, gen)
	if d.err == nil && (r.off%BlockSize != 0 || reserved(r.off, r.blocks())) {
		d.fail(at, "R20", field+".offset", r.off, "a multiple of 4096 outside the reserved blocks")
	}
}

// A chunkRef names one chunk of a blob.
type chunkRef struct {
	reference
	index int64
	box   *sealBox // in a sealed store
}

func (c chunkRef) append(dst []byte) []byte {
	return appendSequence(dst, func(b []byte) []byte {
		b = appendInt(b, c.index)
		b = c.appendFields(b)
		if c.box != nil {
			b = c.box.append(b, ctxC(0), nil)
		}
		return b
	})
}

func (d *decoder) chunkRef(s *cryptobyte.String, gen int64, sealed bool) chunkRef {
	in := d.seq(s, tagSequence, "chunk")
	var c chunkRef
	c.index = d.int(&in, "chunk.index", 0, maxBlobSize/minChunkSize)
	d.place(&in, "chunk", &c.reference, maxChunkSize, gen)
	if sealed {
		c.box, _ = d.sealBox(&in, ctxC(0), "chunk.seal", -1)
	}
	d.end(in, "chunk")
	return c
}
