package ipz

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"nvstore.dev/vpd"
	"nvstore.dev/vpd/internal/form"
	"nvstore.dev/vpd/internal/spec"
)

const maxOffset = 0xffff

// Pack makes an image of a spec.
func (format) Pack(text []byte) ([]byte, []vpd.Warning, error) {
	o, err := spec.Parse(text, Name)
	if err != nil {
		return nil, nil, err
	}
	if err := o.Only("", "format", "image", "header", "toc", "records", "gaps", "size", "fill"); err != nil {
		return nil, nil, err
	}
	out, err := packImage(o)
	if err != nil {
		return nil, nil, err
	}
	l, err := scan(out)
	if err != nil {
		return nil, nil, spec.Errorf("", "the result would not be IPZ VPD: %v", err)
	}
	return out, form.Warnings(l.problems()), nil
}

func packImage(o spec.Object) ([]byte, error) {
	if _, ok := o.Get("image"); !ok {
		b := &builder{}
		if err := b.read(o); err != nil {
			return nil, err
		}
		return b.lay(o)
	}
	for _, name := range []string{"header", "toc", "records", "gaps"} {
		if _, ok := o.Get(name); ok {
			return nil, spec.Errorf(name, "can't stand beside image")
		}
	}
	image, err := form.Bytes(o, "", "image", MaxSize)
	if err != nil {
		return nil, err
	}
	return form.Pad(o, image, MaxSize)
}

// A part is a record in a spec.
type part struct {
	record
	path      string
	placed    bool // it has an offset
	hasECC    bool
	protects  []byte // SHA-256 of what the ECC is of
	tag, end  byte
	keywords  []byte // encoded, without RT
	explicit  []byte // raw, instead of keywords
	padding   []byte // of the table of contents
	hasPF     bool
	tocLength int
}

type builder struct {
	version []byte
	header  part
	toc     part
	records []*part
}

func (b *builder) read(o spec.Object) error {
	b.header.path, b.toc.path = "header", "toc"
	b.header.name, b.toc.name = headerName, tocName
	for _, p := range []struct {
		part  *part
		names []string
	}{{&b.header, []string{"version", "ecc", "protects", "tag", "end"}},
		{&b.toc, []string{"type", "offset", "padding", "ecc_offset", "ecc", "protects", "tag", "end"}}} {
		m, err := member(o, p.part.path)
		if err != nil {
			return err
		}
		if err := m.Only(p.part.path, p.names...); err != nil {
			return err
		}
		if err := p.part.read(m); err != nil {
			return err
		}
		if p.part == &b.header {
			if b.version, err = form.Bytes(m, "header", "version", 2); err != nil {
				return err
			}
			if _, ok := m.Get("version"); !ok {
				b.version = []byte("01")
			}
			if len(b.version) != 2 {
				return spec.Errorf("header.version", "has %d bytes, want 2", len(b.version))
			}
			if p.part.hasECC && len(p.part.ecc) != headerOffset {
				return spec.Errorf("header.ecc", "has %d bytes, want %d", len(p.part.ecc), headerOffset)
			}
			continue
		}
		if b.toc.padding, err = form.Bytes(m, "toc", "padding", 255); err != nil {
			return err
		}
		_, b.toc.hasPF = m.Get("padding")
	}
	list, err := form.List(o, "", "records", maxRecords)
	if err != nil {
		return err
	}
	for i, raw := range list {
		p := &part{path: fmt.Sprintf("records[%d]", i)}
		if err := p.readRecord(raw); err != nil {
			return err
		}
		b.records = append(b.records, p)
	}
	return nil
}

// member is an optional object.
func member(o spec.Object, name string) (spec.Object, error) {
	raw, ok := o.Get(name)
	if !ok {
		return nil, nil
	}
	return spec.ParseObject(name, raw)
}

func (p *part) readRecord(raw json.RawMessage) error {
	o, err := spec.ParseObject(p.path, raw)
	if err != nil {
		return err
	}
	if err := o.Only(p.path, "name", "type", "offset", "keywords", "raw", "ecc_offset", "ecc", "protects", "tag", "end"); err != nil {
		return err
	}
	n, ok := o.Get("name")
	if !ok {
		return spec.Errorf(p.path+".name", "missing")
	}
	name, err := form.Text(p.path+".name", n, 4)
	if err != nil {
		return err
	}
	if len(name) != 4 {
		return spec.Errorf(p.path+".name", "has %d characters, want 4", len(name))
	}
	p.name = string(name)
	if err := p.read(o); err != nil {
		return err
	}
	if _, ok := o.Get("raw"); ok {
		for _, other := range []string{"keywords", "tag", "end"} {
			if _, ok := o.Get(other); ok {
				return spec.Errorf(p.path+"."+other, "can't stand beside raw")
			}
		}
		p.explicit, err = form.Bytes(o, p.path, "raw", maxOffset)
		return err
	}
	k, ok := o.Get("keywords")
	if !ok {
		return spec.Errorf(p.path+".keywords", "missing")
	}
	p.keywords, err = packKeywords(p.path+".keywords", k)
	return err
}

// read reads what all parts may have.
func (p *part) read(o spec.Object) error {
	for _, f := range []struct {
		name         string
		to           *int
		max, missing uint64
	}{{"offset", &p.off, maxOffset, 0}, {"ecc_offset", &p.eccOff, maxOffset, 0}} {
		n, err := form.Uint(o, p.path, f.name, f.max, f.missing)
		if err != nil {
			return err
		}
		*f.to = int(n)
	}
	_, p.placed = o.Get("offset")
	typ, err := form.Uint(o, p.path, "type", 0xffff, 0)
	if err != nil {
		return err
	}
	p.typ = uint16(typ)
	tag, err := form.Uint(o, p.path, "tag", 0xff, tagRecord)
	if err != nil {
		return err
	}
	end, err := form.Uint(o, p.path, "end", 0xff, tagEnd)
	if err != nil {
		return err
	}
	p.tag, p.end = byte(tag), byte(end)
	return p.readECC(o)
}

func (p *part) readECC(o spec.Object) error {
	raw, ok := o.Get("protects")
	if ok {
		s, err := spec.String(p.path+".protects", raw)
		if err != nil {
			return err
		}
		if p.protects, err = hex.DecodeString(s); err != nil || len(p.protects) != sha256.Size {
			return spec.Errorf(p.path+".protects", "want the SHA-256 that unpacking wrote, of %d digits", 2*sha256.Size)
		}
	}
	if _, p.hasECC = o.Get("ecc"); !p.hasECC {
		return nil
	}
	var err error
	if p.ecc, err = form.Bytes(o, p.path, "ecc", maxOffset); err != nil {
		return err
	}
	p.eccLen = len(p.ecc)
	if !ok && p.eccLen > 0 {
		return spec.Errorf(p.path+".ecc", "needs protects, which unpacking writes: how ECC is computed is not public")
	}
	return nil
}

// packKeywords writes a record's keywords, without RT.
func packKeywords(path string, raw json.RawMessage) ([]byte, error) {
	o, err := spec.ParseObject(path, raw)
	if err != nil {
		return nil, err
	}
	var out []byte
	for _, m := range o {
		path := spec.Join(path, m.Name)
		limit := 0xff
		if len(m.Name) == 2 && m.Name[0] == '#' {
			limit = 0xffff
		}
		if len(m.Name) != 2 || !spec.IsText([]byte(m.Name)) || m.Name == "RT" {
			return nil, spec.Errorf(path, "a keyword has two printable characters, and isn't RT, which is the record's name")
		}
		v, err := form.Text(path, m.Value, limit)
		if err != nil {
			return nil, err
		}
		out = append(out, m.Name...)
		if limit > 0xff {
			out = binary.LittleEndian.AppendUint16(out, uint16(len(v)))
		} else {
			out = append(out, byte(len(v)))
		}
		if out = append(out, v...); len(out) > maxOffset {
			return nil, spec.Errorf(path, "the record would have more than %d bytes", maxOffset)
		}
	}
	return out, nil
}

// frame puts keywords into a record.
func (p *part) frame(keywords []byte) []byte {
	data := append([]byte("RT\x04"+p.name), keywords...)
	out := binary.LittleEndian.AppendUint16([]byte{p.tag}, uint16(len(data)))
	return append(append(out, data...), p.end)
}

func (p *part) entry() []byte {
	b := []byte(p.name)
	for _, n := range []int{int(p.typ), p.off, p.size, p.eccOff, p.eccLen} {
		b = binary.LittleEndian.AppendUint16(b, uint16(n))
	}
	return b
}

// lay places all parts, and makes the image.
func (b *builder) lay(o spec.Object) ([]byte, error) {
	if !b.toc.placed {
		b.toc.off = headerEnd
	}
	pts := (len(b.records) + maxEntries - 1) / maxEntries
	b.toc.size = frame + 7 + 3*pts + entrySize*len(b.records)
	if b.toc.hasPF {
		b.toc.size += 3 + len(b.toc.padding)
	}
	pos := b.toc.off + b.toc.size
	for _, p := range b.records {
		if p.raw = p.explicit; p.raw == nil {
			p.raw = p.frame(p.keywords)
		}
		p.size = len(p.raw)
		if !p.placed {
			p.off = pos
		}
		if pos = p.off + p.size; pos > maxOffset {
			return nil, spec.Errorf(p.path, "would end at %d, and offsets go to %d", pos, maxOffset)
		}
	}
	if b.toc.off+b.toc.size > maxOffset {
		return nil, spec.Errorf("toc", "would end at %d, and offsets go to %d", b.toc.off+b.toc.size, maxOffset)
	}
	b.toc.raw = b.toc.frame(b.tocKeywords())
	b.header.raw = b.header.frame(bytes.Join([][]byte{[]byte("VD\x02"), b.version, []byte("PT\x0e"), b.toc.entry(), []byte("PF\x08"), make([]byte, 8)}, nil))
	b.header.off, b.header.eccOff = headerOffset, 0
	return b.place(o)
}

func (b *builder) tocKeywords() []byte {
	var out []byte
	for i, p := range b.records {
		if i%maxEntries == 0 {
			out = append(out, 'P', 'T', byte(entrySize*min(maxEntries, len(b.records)-i)))
		}
		out = append(out, p.entry()...)
	}
	if b.toc.hasPF {
		out = append(append(out, 'P', 'F', byte(len(b.toc.padding))), b.toc.padding...)
	}
	return out
}

// place writes the parts into an image, and refuses those that overlap, or
// whose ECC is of something else.
func (b *builder) place(o spec.Object) ([]byte, error) {
	parts := append([]*part{&b.header, &b.toc}, b.records...)
	end := 0
	for _, p := range parts {
		end = max(end, p.off+len(p.raw), p.eccOff+len(p.ecc))
	}
	fill, err := form.Uint(o, "", "fill", 0xff, 0)
	if err != nil {
		return nil, err
	}
	size, err := form.Uint(o, "", "size", MaxSize, uint64(end))
	if err != nil {
		return nil, err
	}
	if int(size) < end {
		return nil, spec.Errorf("size", "%d, and the data takes %d bytes", size, end)
	}
	out := bytes.Repeat([]byte{byte(fill)}, int(size))
	taken := make([]bool, size)
	put := func(path string, off int, data []byte) error {
		for i := range data {
			if taken[off+i] {
				return spec.Errorf(path, "would lie at %d to %d, and something else does", off, off+len(data))
			}
			taken[off+i] = true
		}
		copy(out[off:], data)
		return nil
	}
	for _, p := range parts {
		if p.hasECC && len(p.ecc) > 0 {
			if got := sha256.Sum256(p.raw); !bytes.Equal(got[:], p.protects) {
				return nil, spec.Errorf(p.path+".ecc", "the bytes that it protects have changed, and how new ECC is computed is not public; "+
					"take out ecc, ecc_offset and protects if nothing checks them")
			}
		}
		ecc := p.ecc
		if p == &b.header && !p.hasECC {
			ecc = make([]byte, headerOffset)
		}
		if err := put(p.path, p.off, p.raw); err != nil {
			return nil, err
		}
		if err := put(p.path+".ecc", p.eccOff, ecc); err != nil {
			return nil, err
		}
	}
	return out, putGaps(o, put, out)
}

func putGaps(o spec.Object, put func(string, int, []byte) error, out []byte) error {
	list, err := form.List(o, "", "gaps", MaxSize)
	if err != nil {
		return err
	}
	for i, raw := range list {
		path := fmt.Sprintf("gaps[%d]", i)
		g, err := spec.ParseObject(path, raw)
		if err != nil {
			return err
		}
		if err := g.Only(path, "offset", "data"); err != nil {
			return err
		}
		off, err := form.Uint(g, path, "offset", MaxSize, 0)
		if err != nil {
			return err
		}
		data, err := form.Bytes(g, path, "data", MaxSize)
		if err != nil {
			return err
		}
		if int(off)+len(data) > len(out) {
			return spec.Errorf(path, "ends at %d, and the image has %d bytes", int(off)+len(data), len(out))
		}
		if err := put(path, int(off), data); err != nil {
			return err
		}
	}
	return nil
}
