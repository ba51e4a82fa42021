package blobdir

import (
	"bytes"
	"time"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// Meta is what a caller says of a blob beside its content. The zero value is
// fine.
type Meta struct {
	Type       string      // what the content is, e.g. "tpm2-permanent"; at most 64 bytes
	Writer     string      // program and version that produced the bytes; at most 128 bytes
	Attributes []Attribute // at most 16, of 512 bytes in all
	ChunkSize  int         // bytes, a power of two from 4096 to 1 MiB; 0 chooses by size
}

// An Entry describes a blob.
type Entry struct {
	Name       string
	ID         [16]byte // random, the same through renames
	Size       int64    // bytes
	Created    time.Time
	Modified   time.Time
	Generation int64 // generation of the store that changed it last
	Meta

	// Live tells a live extent: content in one plain piece that an emulator
	// may have open directly. It lies at Offset (bytes, a multiple of
	// 4096) on the device. While it is Attached its content isn't
	// verified, and only Peek reads it.
	Live, Attached bool
	Offset         int64
}

// An entry is an Entry with its references (FORMAT.md, section 9).
type entry struct {
	Entry
	key      []byte // directory key: the name, or 32 bytes that hide it
	chunks   []chunkRef
	chunkMap *reference
	live     *liveExtent
	box      *sealBox // of sealed metadata
	ct       []byte
	extra    []extension
}

// A profile tells how a store's entries are encoded.
type profile struct {
	keys      *keys // nil in a plain store, and where there is no key
	sealed    bool
	sealNames bool
	store     [16]byte
	gen       int64 // of the root: no part is younger
}

func (p *profile) keyOf(name string) []byte {
	if p.sealNames {
		return p.keys.nameKey(name)
	}
	return []byte(name)
}

// seal fills box and ct with the metadata that the store hides.
func (e *entry) seal(p *profile) error {
	e.key = p.keyOf(e.Name)
	e.box, e.ct = nil, nil
	if !p.sealed || !p.sealNames && len(e.Attributes) == 0 {
		return nil
	}
	name, typ, writer := "", "", ""
	if p.sealNames {
		name, typ, writer = e.Name, e.Type, e.Writer
	}
	plain := appendSequence(nil, func(b []byte) []byte {
		b = appendUTF8(b, name)
		b = appendUTF8(b, typ)
		b = appendUTF8(b, writer)
		return appendAttributes(b, e.Attributes)
	})
	ct, box, err := p.keys.meta.Seal(nil, plain, metaContext(p.store, e.ID, e.Generation))
	e.box, e.ct = &sealBox{box}, ct
	return err
}

func appendAttributes(dst []byte, attrs []Attribute) []byte {
	return appendSequence(dst, func(b []byte) []byte {
		for _, a := range attrs {
			b = appendSequence(b, func(b []byte) []byte { return appendUTF8(appendUTF8(b, a.Key), a.Value) })
		}
		return b
	})
}

// append encodes the entry. In a sealed store seal must have been called.
func (e *entry) append(dst []byte, p *profile) []byte {
	typ, writer, attrs := e.Type, e.Writer, e.Attributes
	if p.sealed {
		attrs = nil
	}
	if p.sealNames {
		typ, writer = "", ""
	}
	return appendSequence(dst, func(b []byte) []byte {
		if p.sealNames {
			b = appendBytes(b, ctxP(0), e.key)
		} else {
			b = appendUTF8(b, string(e.key))
		}
		b = appendOctets(b, e.ID[:])
		b = appendUTF8(b, typ)
		b = appendUTF8(b, writer)
		b = appendInt(b, e.Size)
		b = appendTime(b, e.Created)
		b = appendTime(b, e.Modified)
		b = appendInt(b, e.Generation)
		b = appendInt(b, int64(e.ChunkSize))
		b = appendAttributes(b, attrs)
		b = e.appendContent(b)
		if e.box != nil {
			b = e.box.append(b, ctxC(4), e.ct)
		}
		return appendExtensions(b, ctxC(5), e.extra)
	})
}

func (e *entry) appendContent(b []byte) []byte {
	switch {
	case e.live != nil:
		return appendTLV(b, ctxC(3), func(b []byte) []byte {
			b = appendInt(b, e.live.off)
			b = appendInt(b, e.live.length)
			b = appendInt(b, e.live.gen)
			b = appendBool(b, e.live.attached)
			if e.live.crc != nil {
				b = appendOctets(b, e.live.crc)
			}
			if e.live.mac != nil {
				b = appendBytes(b, ctxP(0), e.live.mac)
			}
			return b
		})
	case e.chunkMap != nil:
		return e.chunkMap.append(b, ctxC(2))
	default:
		return appendTLV(b, ctxC(1), func(b []byte) []byte {
			for _, c := range e.chunks {
				b = c.append(b)
			}
			return b
		})
	}
}

// entry reads one directory entry and opens its sealed metadata if there is
// a key.
func (d *decoder) entry(s *cryptobyte.String, p *profile) *entry {
	at := *s
	in := d.seq(s, tagSequence, "entry")
	e := new(entry)
	if p.sealNames {
		e.key = d.octets(&in, ctxP(0), "entry.name", 32, 32)
	} else {
		e.Name = d.utf8(&in, "entry.name", maxName)
		e.key = []byte(e.Name)
		if d.err == nil && CheckName(e.Name) != nil {
			d.fail(at, "R40", "entry.name", e.Name, "a valid blob name")
		}
	}
	d.array(&in, byte(cbasn1.OCTET_STRING), "entry.id", e.ID[:])
	e.Type = d.utf8(&in, "entry.type", maxType)
	e.Writer = d.utf8(&in, "entry.writer", maxWriter)
	e.Size = d.int(&in, "entry.size", 0, maxBlobSize)
	e.Created = d.time(&in, "entry.created")
	e.Modified = d.time(&in, "entry.modified")
	e.Generation = d.int(&in, "entry.generation", 1, p.gen)
	e.ChunkSize = int(d.int(&in, "entry.chunkSize", minChunkSize, maxChunkSize))
	if d.err == nil && e.ChunkSize&(e.ChunkSize-1) != 0 {
		d.fail(at, "R42", "entry.chunkSize", e.ChunkSize, "a power of two")
	}
	e.Attributes = d.attributes(&in)
	d.content(&in, e, p)
	if d.err == nil && in.PeekASN1Tag(cbasn1.Tag(ctxC(4))) {
		e.box, e.ct = d.sealBox(&in, ctxC(4), "entry.sealed", maxNode)
	}
	if d.err == nil && ((e.box != nil) && !p.sealed || (e.box == nil) && p.sealNames ||
		p.sealed && len(e.Attributes) > 0 || p.sealNames && e.Type+e.Writer != "") {
		d.fail(at, "R41", "entry.sealed", e.box != nil, "sealed metadata as the root says")
	}
	e.extra = d.extensions(&in, ctxC(5))
	d.end(in, "entry")
	if d.err == nil {
		d.openMeta(at, e, p)
	}
	return e
}

func (d *decoder) attributes(s *cryptobyte.String) []Attribute {
	list := d.seq(s, tagSequence, "entry.attributes")
	var attrs []Attribute
	total := 0
	for d.err == nil && !list.Empty() {
		at := list
		in := d.seq(&list, tagSequence, "attribute")
		a := Attribute{d.utf8(&in, "attribute.key", maxAttrKey), d.utf8(&in, "attribute.value", maxAttrBytes)}
		d.end(in, "attribute")
		total += len(a.Key) + len(a.Value)
		if d.err == nil && (a.Key == "" || len(attrs) == maxAttrs || total > maxAttrBytes ||
			len(attrs) > 0 && attrs[len(attrs)-1].Key >= a.Key) {
			d.fail(at, "R48", "entry.attributes", a.Key, "at most 16 of 512 bytes in all, ascending by key")
		}
		attrs = append(attrs, a)
	}
	return attrs
}

// content reads the chunk references, the chunk map's or the live extent.
func (d *decoder) content(in *cryptobyte.String, e *entry, p *profile) {
	at := *in
	switch {
	case d.err != nil:
	case in.PeekASN1Tag(cbasn1.Tag(ctxC(1))):
		list := d.seq(in, ctxC(1), "entry.chunks")
		last := int64(-1)
		for d.err == nil && !list.Empty() {
			at := list
			c := d.chunkRef(&list, e.Generation, p.sealed)
			if d.err == nil && (len(e.chunks) == maxInline || !c.fits(&e.Entry, last)) {
				d.fail(at, "R44", "entry.chunks", c.index, "at most 4 chunks, ascending, inside the blob")
			}
			last = c.index
			e.chunks = append(e.chunks, c)
		}
	case in.PeekASN1Tag(cbasn1.Tag(ctxC(2))):
		r := d.reference(in, ctxC(2), "entry.chunkMap", maxNode, e.Generation, p.sealed)
		e.chunkMap = &r
	case in.PeekASN1Tag(cbasn1.Tag(ctxC(3))):
		d.liveExtent(in, e, p)
	default:
		d.fail(at, "R1", "entry.content", nil, "chunks, a chunk map or a live extent")
	}
}

// fits tells whether the chunk lies behind the one before it and inside its
// blob.
func (c *chunkRef) fits(e *Entry, last int64) bool {
	start := c.index * int64(e.ChunkSize)
	return c.index > last && start < e.Size && c.length <= min(int64(e.ChunkSize), e.Size-start)
}

func (d *decoder) liveExtent(s *cryptobyte.String, e *entry, p *profile) {
	at := *s
	in := d.seq(s, ctxC(3), "entry.live")
	l := new(liveExtent)
	l.off = d.int(&in, "live.offset", 0, maxOffset)
	l.length = d.int(&in, "live.length", 1, maxLive)
	l.gen = d.int(&in, "live.generation", 1, e.Generation)
	l.attached = d.bool(&in, "live.attached")
	if d.err == nil && in.PeekASN1Tag(cbasn1.OCTET_STRING) {
		l.crc = d.octets(&in, byte(cbasn1.OCTET_STRING), "live.crc32c", 4, 4)
	}
	if d.err == nil && in.PeekASN1Tag(cbasn1.Tag(ctxP(0))) {
		l.mac = d.octets(&in, ctxP(0), "live.mac", 32, 32)
	}
	d.end(in, "live")
	switch {
	case d.err != nil:
	case l.off%BlockSize != 0 || reserved(l.off, l.blocks()) || l.length != e.Size:
		d.fail(at, "R49", "entry.live", l.off, "an aligned extent of the blob's size outside the reserved blocks")
	case l.attached == (l.crc != nil) || (l.mac != nil) != (p.sealed && !l.attached):
		d.fail(at, "R49", "entry.live", l.off, "a checksum, and in a sealed store a MAC, unless it is attached")
	case l.attached && l.gen == e.Generation:
		d.fail(at, "R49", "entry.live", l.gen, "an extent that was durable before it was attached")
	}
	e.live, e.Live, e.Attached, e.Offset = l, true, l.attached, l.off
}

// openMeta decrypts the sealed metadata. What it holds passed checkMeta when
// it was written, and is held to the same rules again.
func (d *decoder) openMeta(at cryptobyte.String, e *entry, p *profile) {
	if e.box == nil || p.keys == nil {
		return
	}
	tampered := func(want string) {
		if d.err == nil {
			d.err = &Error{Off: d.pos(at), Struct: "entry", Field: "sealed", Blob: e.Name, Want: want, Rule: "R24", Kind: ErrTampered}
		}
	}
	plain, err := p.keys.meta.Open(nil, e.ct, &e.box.Box, metaContext(p.store, e.ID, e.Generation))
	if err != nil {
		tampered("metadata sealed with this store's key")
		return
	}
	m := newDecoder(plain, 0, "metadata")
	in := m.all()
	name := m.utf8(&in, "name", maxName)
	typ := m.utf8(&in, "type", maxType)
	writer := m.utf8(&in, "writer", maxWriter)
	e.Attributes = m.attributes(&in)
	m.end(in, "")
	if m.err != nil {
		d.err = m.err
		return
	}
	if !p.sealNames {
		return
	}
	e.Name, e.Type, e.Writer = name, typ, writer
	if CheckName(name) != nil || !bytes.Equal(p.keys.nameKey(name), e.key) {
		tampered("the name that the directory key stands for")
	}
}

// parseEntry reads the entry that fills p.
func parseEntry(p []byte, off int64, pr *profile) (*entry, error) {
	d := newDecoder(p, off, "directory")
	s := cryptobyte.String(d.whole)
	e := d.entry(&s, pr)
	if d.err != nil {
		return nil, d.err
	}
	shown := *e
	if err := d.canonical(shown.append(nil, pr)); err != nil {
		return nil, err
	}
	return e, nil
}
