package blobdir_test

import (
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"testing"

	"nvstore.dev/image"
)

// This file takes stores apart and puts them together again from FORMAT.md
// alone: it shares no code with the package it tests.

// A flat is a Device on a slice of bytes, without capabilities.
type flat struct{ p []byte }

func (f *flat) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, image.ErrOutOfRange
	}
	if off >= int64(len(f.p)) {
		return 0, io.EOF
	}
	n := copy(p, f.p[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *flat) WriteAt(p []byte, off int64) (int, error) {
	if err := image.CheckRange(off, int64(len(p)), int64(len(f.p))); err != nil {
		return 0, err
	}
	return copy(f.p[off:], p), nil
}

func (f *flat) Resize(size int64) error {
	if size > 64<<20 {
		return image.ErrNoSpace
	}
	f.p = append(f.p[:min(size, int64(len(f.p)))], make([]byte, max(0, size-int64(len(f.p))))...)
	return nil
}

func (f *flat) Size() int64 { return int64(len(f.p)) }
func (f *flat) Sync() error { return nil }
func (*flat) Close() error  { return nil }

// An el is a DER element that can be changed.
type el struct {
	tag    byte
	val    []byte // of a primitive one
	kids   []*el  // of a constructed one
	fields []string
	raw    []byte  // if not nil, these bytes, whatever they are
	keep   bool    // reseal leaves it as it is
	to     *extent // of a reference: what it names

	off, head int // where it was parsed from, and the bytes of tag and length
}

// parseDER reads one element. It is lenient: it is there to take good stores
// apart.
func parseDER(p []byte, off int) (*el, []byte) {
	e := &el{tag: p[0], off: off, head: 2}
	n := int(p[1])
	if n >= 0x80 {
		more := n & 0x7f
		n = 0
		for _, b := range p[2 : 2+more] {
			n = n<<8 | int(b)
		}
		e.head += more
	}
	in, rest := p[e.head:e.head+n], p[e.head+n:]
	if e.tag&0x20 == 0 {
		e.val = slices.Clone(in)
		return e, rest
	}
	for at := off + e.head; len(in) > 0; {
		var k *el
		before := len(in)
		k, in = parseDER(in, at)
		at += before - len(in)
		e.kids = append(e.kids, k)
	}
	return e, rest
}

func derLength(n int) []byte {
	if n < 0x80 {
		return []byte{byte(n)}
	}
	b := big.NewInt(int64(n)).Bytes()
	return append([]byte{0x80 | byte(len(b))}, b...)
}

func (e *el) encode() []byte {
	if e.raw != nil {
		return e.raw
	}
	in := e.val
	if e.tag&0x20 != 0 {
		in = nil
		for _, k := range e.kids {
			in = append(in, k.encode()...)
		}
	}
	return append(append([]byte{e.tag}, derLength(len(in))...), in...)
}

func (e *el) clone() *el {
	c := *e
	c.val, c.raw = slices.Clone(e.val), slices.Clone(e.raw)
	c.kids = nil
	for _, k := range e.kids {
		c.kids = append(c.kids, k.clone())
	}
	return &c
}

// index returns the position of a field. Optional ones are found by tag.
func (e *el) index(part string) int {
	if i, err := strconv.Atoi(part); err == nil {
		return i
	}
	for i, f := range e.fields {
		name, tag, optional := strings.Cut(f, "=")
		if name != part {
			continue
		}
		if !optional {
			return i
		}
		want, _ := strconv.ParseUint(tag, 0, 8)
		first := slices.IndexFunc(e.fields, func(f string) bool { return strings.Contains(f, "=") })
		for i := first; i < len(e.kids); i++ {
			if e.kids[i].tag == byte(want) {
				return i
			}
		}
	}
	return -1
}

func (e *el) has(part string) bool { i := e.index(part); return i >= 0 && i < len(e.kids) }

// at follows a path like "items.0.size".
func (e *el) at(path string) *el {
	for _, part := range strings.Split(path, ".") {
		i := e.index(part)
		if i < 0 || i >= len(e.kids) {
			panic(fmt.Sprintf("test: no %q in %q (%v)", part, path, e.fields))
		}
		e = e.kids[i]
	}
	return e
}

func (e *el) named(fields ...string) *el { e.fields = fields; return e }

// setters keep the value through reseal.
func (e *el) setInt(v int64) *el       { e.val, e.keep = derInt(v).val, true; return e }
func (e *el) set(v []byte) *el         { e.val, e.keep = v, true; return e }
func (e *el) setRaw(v []byte) *el      { e.raw, e.keep = v, true; return e }
func (e *el) insert(i int, k *el)      { e.kids = slices.Insert(e.kids, i, k) }
func (e *el) add(k ...*el)             { e.kids = append(e.kids, k...) }
func (e *el) remove(i int)             { e.kids = slices.Delete(e.kids, i, i+1) }
func (e *el) swap(i, j int)            { e.kids[i], e.kids[j] = e.kids[j], e.kids[i] }
func (e *el) int() int64               { return new(big.Int).SetBytes(e.val).Int64() }
func derBytes(tag byte, v []byte) *el  { return &el{tag: tag, val: v} }
func derSeq(tag byte, kids ...*el) *el { return &el{tag: tag, kids: kids} }

func derInt(v int64) *el {
	p, err := asn1.Marshal(v)
	if err != nil {
		panic(err)
	}
	return &el{tag: 2, val: p[2:]}
}

var (
	referenceFields = []string{"offset", "length", "crc32c", "generation", "mac=0x80"}
	chunkFields     = []string{"index", "offset", "length", "crc32c", "generation", "seal=0xa0"}
	boxFields       = []string{"salt", "commitment", "tag", "ciphertext"}
	rootFields      = []string{"type", "version", "store", "slot", "generation", "commit", "parent", "parentGeneration", "time", "sealNames", "maxSize", "blobs",
		"directory", "free", "keySlots=0xa0", "sealing=0x06", "snapshots=0xa1", "extensions=0xa2"}
	settledFields = []string{"type", "version", "store", "slot", "generation", "digest"}
	headerFields  = []string{"type", "version", "note", "store", "blockSize", "rootSlot0", "rootSlot1", "settled"}
	signedFields  = []string{"body", "mac=0x80", "crc32c=0x04"}
	nodeFields    = []string{"type", "level", "items"}
	freeFields    = []string{"type", "end", "extents", "tree=0xa0"}
	entryFields   = []string{"key", "id", "type", "writer", "size", "created", "modified", "generation", "chunkSize", "attributes",
		"chunks=0xa1", "chunkMap=0xa2", "live=0xa3", "sealed=0xa4", "extensions=0xa5"}
)

// An extent is stored bytes, with the reference that names them.
type extent struct {
	off  int64
	kind string // directory, chunk map, free node, free tree, key slots, chunk
	el   *el    // of DER
	raw  []byte // of content
	ref  *el
	kids []*extent
	keep bool // the reference stays as it is
}

func (x *extent) bytes() []byte {
	if x.el == nil {
		return x.raw
	}
	return x.el.encode()
}

// A forgery is a store that was taken apart.
type forgery struct {
	img     []byte
	header  *el
	roots   [2]*el
	newest  int
	settled *el // nil if there is no record
	uuid    []byte
	mac     []byte // key of the MACs; nil in a plain store
	master  []byte
	sealed  bool
	names   bool // sealed names
	cut     int  // bytes that reseal returns, if not 0

	dir, free, slots *extent
}

const castagnoliPoly = 0x82f63b78 // 0x1edc6f41, bits reversed

var crcTable = crc32.MakeTable(castagnoliPoly)

func crcOf(p []byte) []byte {
	return binary.BigEndian.AppendUint32(nil, crc32.Checksum(p, crcTable))
}

var forgeRoots = [2]int64{64 << 10, 128 << 10}

const forgeSettled = 192 << 10

// takeApart reads a good store. raw is the key file's 32 bytes, or nil.
func takeApart(t testing.TB, img, raw []byte) *forgery {
	f := &forgery{img: slices.Clone(img)}
	f.header, _ = parseDER(f.img, 0)
	signed(f.header, headerFields)
	for i, off := range forgeRoots {
		f.roots[i], _ = parseDER(f.img[off:], int(off))
		signed(f.roots[i], rootFields)
		for _, r := range []string{"directory", "free", "keySlots", "snapshots"} {
			if f.roots[i].at("body").has(r) {
				f.roots[i].at("body." + r).named(referenceFields...)
			}
		}
	}
	if f.roots[1].at("body.generation").int() > f.roots[0].at("body.generation").int() {
		f.newest = 1
	}
	if f.img[forgeSettled] != 0 {
		f.settled, _ = parseDER(f.img[forgeSettled:], forgeSettled)
		signed(f.settled, settledFields)
	}
	b := f.body()
	f.uuid = b.at("store").val
	f.sealed, f.names = b.has("keySlots"), b.at("sealNames").val[0] != 0
	if f.sealed {
		f.slots = f.node(b.at("keySlots"), "key slots")
		f.master = f.unlock(t, raw)
		f.mac = f.derive(t, "nvstore v1 mac key")
	}
	f.free = f.node(b.at("free"), "free node")
	f.dir = f.node(b.at("directory"), "directory")
	return f
}

func signed(e *el, fields []string) {
	e.named(signedFields...)
	e.kids[0].named(fields...)
}

func (f *forgery) root() *el { return f.roots[f.newest] }
func (f *forgery) body() *el { return f.root().at("body") }

// node reads what a reference names, and all below it.
func (f *forgery) node(ref *el, kind string) *extent {
	ref.fields = referenceFields
	x := &extent{off: ref.at("offset").int(), kind: kind, ref: ref}
	ref.to = x
	x.el, _ = parseDER(f.img[x.off:], int(x.off))
	switch kind {
	case "key slots":
		return x
	case "free node":
		x.el.named(freeFields...)
		for _, e := range x.el.at("extents").kids {
			e.named("offset", "length", "freed")
		}
		if x.el.has("tree") {
			x.kids = append(x.kids, f.node(x.el.at("tree"), "free tree"))
		}
		return x
	}
	x.el.named(nodeFields...)
	for _, it := range x.el.at("items").kids {
		if x.el.at("level").int() > 0 {
			it.named("key", "node")
			x.kids = append(x.kids, f.node(it.at("node"), kind))
			continue
		}
		switch kind {
		case "directory":
			f.entry(x, it)
		case "chunk map":
			f.chunk(x, it)
		case "free tree":
			it.named("offset", "length", "freed")
		}
	}
	return x
}

func (f *forgery) entry(x *extent, e *el) {
	e.named(entryFields...)
	for _, a := range e.at("attributes").kids {
		a.named("key", "value")
	}
	if e.has("sealed") {
		e.at("sealed").named(boxFields...)
	}
	switch {
	case e.has("chunkMap"):
		x.kids = append(x.kids, f.node(e.at("chunkMap"), "chunk map"))
	case e.has("chunks"):
		for _, c := range e.at("chunks").kids {
			f.chunk(x, c)
		}
	}
}

func (f *forgery) chunk(x *extent, c *el) {
	c.named(chunkFields...)
	if c.has("seal") {
		c.at("seal").named(boxFields...)
	}
	off, n := c.at("offset").int(), c.at("length").int()
	k := &extent{off: off, kind: "chunk", raw: slices.Clone(f.img[off : off+n]), ref: c}
	c.to = k
	x.kids = append(x.kids, k)
}

// walk visits extents, those below first.
func (x *extent) walk(fn func(*extent)) {
	for _, k := range x.kids {
		k.walk(fn)
	}
	fn(x)
}

// entries returns the directory's entries in order.
func (f *forgery) entries() (es []*el) {
	f.dir.walk(func(x *extent) {
		if x.kind == "directory" && x.el.at("level").int() == 0 {
			es = append(es, x.el.at("items").kids...)
		}
	})
	return es
}

// place puts an extent on new blocks behind all that is in use.
func (f *forgery) place(x *extent) *extent {
	end := f.free.el.at("end")
	x.off = end.int()
	end.val = derInt((x.off + int64(len(x.bytes())) + 4095) &^ 4095).val
	f.img = append(f.img, make([]byte, max(0, end.int()-int64(len(f.img))))...)
	return x
}

// reference makes a reference to an extent; reseal fills in the rest.
func (f *forgery) reference(tag byte, x *extent, gen int64) *el {
	r := derSeq(tag, derInt(x.off), derInt(1), derBytes(4, make([]byte, 4)), derInt(gen)).named(referenceFields...)
	if f.sealed {
		r.add(derBytes(0x80, make([]byte, 32)))
	}
	x.ref, r.to = r, x
	return r
}

// fill sets a field that is there and that no test has set.
func (e *el) fill(field string, v []byte) {
	if !e.has(field) {
		return
	}
	if k := e.at(field); !k.keep && k.raw == nil {
		k.val = v
	}
}

// reseal computes lengths, checksums and MACs anew, from the leaves up, and
// returns the image. What a test has set stays as it is.
func (f *forgery) reseal() []byte { return f.resealWith(f.mac) }

// resealWith does it with the MAC key given; without one the MACs stay.
func (f *forgery) resealWith(mac []byte) []byte {
	sum := func(label string, p []byte) []byte { return macWith(mac, label, f.uuid, p) }
	for _, top := range []*extent{f.slots, f.free, f.dir} {
		if top == nil {
			continue
		}
		top.walk(func(x *extent) {
			p := x.bytes()
			copy(f.img[x.off:], p)
			if x.keep {
				return
			}
			x.ref.fill("length", derInt(int64(len(p))).val)
			x.ref.fill("crc32c", crcOf(p))
			if x.kind != "chunk" && mac != nil {
				x.ref.fill("mac", sum("nvstore v1 node", p))
			}
		})
	}
	seal := func(e *el, label string, off int64) []byte {
		if mac != nil {
			e.fill("mac", sum(label, e.at("body").encode()))
		}
		var covered []byte
		for _, k := range e.kids[:e.index("crc32c")] {
			covered = append(covered, k.encode()...)
		}
		e.fill("crc32c", crcOf(covered))
		p := e.encode()
		clear(f.img[off : off+512])
		copy(f.img[off:off+512], p)
		return p
	}
	old := seal(f.roots[1-f.newest], "nvstore v1 root", forgeRoots[1-f.newest])
	digest := sha256.Sum256(old)
	f.body().fill("parent", digest[:])
	digest = sha256.Sum256(seal(f.root(), "nvstore v1 root", forgeRoots[f.newest]))
	clear(f.img[forgeSettled : forgeSettled+512])
	if f.settled != nil {
		f.settled.at("body").fill("digest", digest[:])
		seal(f.settled, "nvstore v1 settled", forgeSettled)
	}
	seal(f.header, "", 0)
	if f.cut > 0 {
		return f.img[:f.cut]
	}
	return f.img
}
