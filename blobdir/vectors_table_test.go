package blobdir_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"nvstore.dev/blobdir"
)

var (
	corrupt     = blobdir.ErrCorrupt
	tampered    = blobdir.ErrTampered
	unsupported = blobdir.ErrUnsupported
)

const anySealed = "sealed sealed-names"

// Parts of the store that the faults are put into.
func (f *forgery) leaf(i int) *extent { return f.dir.kids[i] }

// inline is an entry with two chunks, and mapped one with a chunk map.
func (f *forgery) inline() *el {
	es := f.entries()
	return es[slices.IndexFunc(es, func(e *el) bool {
		return e.has("chunks") && len(e.at("chunks").kids) > 1 && e.at("chunkSize").int() == 4096
	})]
}

func (f *forgery) coarse() *el {
	es := f.entries()
	return es[slices.IndexFunc(es, func(e *el) bool { return e.has("chunks") && e.at("size").int() == 9000 })]
}

func (f *forgery) mapped() *el {
	es := f.entries()
	return es[slices.IndexFunc(es, func(e *el) bool { return e.has("chunkMap") })]
}

func (f *forgery) hollow() *el {
	es := f.entries()
	return es[slices.IndexFunc(es, func(e *el) bool { return e.at("size").int() == 0 })]
}

func (f *forgery) chunkMap() *extent { return f.mapped().at("chunkMap").to }
func (f *forgery) freeTree() *extent { return f.free.kids[0] }

// A structure is something that every kind of DER fault is tried on.
type structure struct {
	name  string
	where string
	get   func(f *forgery) *el
}

var structures = []structure{
	{"header", atCheck, func(f *forgery) *el { return f.header.at("body") }},
	{"root", atSlot, (*forgery).body},
	{"settled record", atNote, func(f *forgery) *el { return f.settled.at("body") }},
	{"directory", atRead, func(f *forgery) *el { return f.dir.el }},
	{"directory leaf", atRead, func(f *forgery) *el { return f.leaf(1).el }},
	{"child", atRead, func(f *forgery) *el { return f.dir.el.at("items.1") }},
	{"reference", atRead, func(f *forgery) *el { return f.dir.el.at("items.1.node") }},
	{"entry", atRead, (*forgery).inline},
	{"chunk", atRead, func(f *forgery) *el { return f.inline().at("chunks.0") }},
	{"chunk map", atRead, func(f *forgery) *el { return f.chunkMap().el }},
	{"chunk map leaf", atRead, func(f *forgery) *el { return f.chunkMap().kids[1].el }},
	{"free node", atCheck, func(f *forgery) *el { return f.free.el }},
	{"free extent", atCheck, func(f *forgery) *el { return f.free.el.at("extents.0") }},
	{"free tree", atCheck, func(f *forgery) *el { return f.freeTree().el }},
	{"free tree extent", atCheck, func(f *forgery) *el { return f.freeTree().el.at("items.0") }},
}

// derFaults are encodings that aren't the one canonical DER, or have the
// wrong shape.
var derFaults = []struct {
	name  string
	fault func(e *el)
}{
	{"an element more", func(e *el) { e.add(derBytes(5, nil)) }},
	{"an element less", func(e *el) { e.remove(len(e.kids) - 1) }},
	{"long form length", func(e *el) {
		p := e.encode()
		_, rest := parseDER(p, 0)
		head := len(p) - len(rest) - len(bytes.Join(encodings(e.kids), nil))
		in := p[head:]
		e.setRaw(slices.Concat([]byte{e.tag, 0x83, 0, byte(len(in) >> 8), byte(len(in))}, in))
	}},
	{"indefinite length", func(e *el) {
		e.setRaw(slices.Concat([]byte{e.tag, 0x80}, bytes.Join(encodings(e.kids), nil), []byte{0, 0}))
	}},
	{"padded integer", func(e *el) {
		i := slices.IndexFunc(e.kids, func(k *el) bool { return k.tag == 2 })
		if i < 0 { // a child's key may be a name; its reference has integers
			e = e.at("node")
			i = 0
		}
		e.kids[i].set(append([]byte{0}, e.kids[i].val...))
		if e.kids[i].val[1] >= 0x80 {
			e.kids[i].val = append([]byte{0}, e.kids[i].val...)
		}
	}},
	{"wrong tag", func(e *el) { e.tag = 0x31 }},
	{"first field of another tag", func(e *el) { e.kids[0].tag = 0x16 }},
}

func encodings(es []*el) (ps [][]byte) {
	for _, e := range es {
		ps = append(ps, e.encode())
	}
	return ps
}

func allVectors() (vs []vector) {
	for _, part := range []func() []vector{derVectors, typeVectors, rangeVectors, sizeVectors, textVectors, extensionVectors,
		rootVectors, referenceVectors, macVectors, treeVectors, entryVectors, contentVectors, liveVectors, freeVectors, keySlotVectors} {
		vs = append(vs, part()...)
	}
	return vs
}

func derVectors() (vs []vector) {
	for _, s := range structures {
		for _, d := range derFaults {
			rule := "R1"
			if d.name == "first field of another tag" {
				switch s.name {
				case "header", "root", "settled record", "directory", "directory leaf", "chunk map", "chunk map leaf", "free node", "free tree":
					rule = "R2"
				}
			}
			if d.name == "wrong tag" && (s.name == "header" || s.name == "root" || s.name == "settled record") {
				continue // the signed structures are below
			}
			if d.name == "an element less" && s.name == "free node" {
				continue // the tree is optional
			}
			only := ""
			if d.name == "an element less" && (s.name == "root" || s.name == "entry") {
				only = "plain" // what is last is optional, or has a rule of its own
			}
			vs = append(vs, vector{s.name + ", " + d.name, rule, s.where, corrupt, only, func(f *forgery) { d.fault(s.get(f)) }})
		}
	}
	add := func(name, where string, fault func(f *forgery)) {
		vs = append(vs, vector{name, "R1", where, corrupt, "", fault})
	}
	add("root, an element behind the checksum", atSlot, func(f *forgery) { f.root().add(derBytes(5, nil)) })
	add("root, no checksum", atSlot, func(f *forgery) { f.root().kids[len(f.root().kids)-1].setRaw([]byte{}) })
	add("root, body is a SET", atSlot, func(f *forgery) { f.body().tag = 0x31 })
	add("root, no SEQUENCE", atSlot, func(f *forgery) { f.root().tag = 0x31 })
	add("header, a MAC", atCheck, func(f *forgery) { f.header.insert(1, derBytes(0x80, make([]byte, 32))) })
	add("settled record, an element behind the checksum", atNote, func(f *forgery) { f.settled.add(derBytes(5, nil)) })
	add("boolean of 1", atSlot, func(f *forgery) { f.body().at("sealNames").set([]byte{1}) })
	add("no content", atRead, func(f *forgery) {
		e := f.inline()
		e.remove(e.index("chunks"))
	})
	add("bytes behind a node", atRead, func(f *forgery) {
		f.leaf(1).el.setRaw(append(f.leaf(1).el.encode(), 0))
	})
	return vs
}

// typeVectors: each structure has its object identifier and version.
func typeVectors() (vs []vector) {
	for _, s := range structures {
		switch s.name {
		case "child", "reference", "entry", "chunk", "free extent", "free tree extent":
			continue
		}
		vs = append(vs, vector{s.name, "R2", s.where, corrupt, "", func(f *forgery) { s.get(f).at("type").set(oidEl("1.99").val) }})
	}
	vs = append(vs,
		vector{"chunk map is a directory leaf", "R2", atRead, corrupt, "plain", func(f *forgery) {
			// The leaf is in the reader's cache by the time it is met again.
			f.reseal()
			leaf, e := f.leaf(0), f.entries()[len(f.entries())-1]
			e.at("generation").setInt(f.body().at("generation").int())
			r := leaf.ref.clone()
			r.tag, r.keep = 0xa2, true
			e.kids[e.index(contentOfEntry(e))] = r
			f.leaf(1).kids = nil
		}},
		vector{"root", "R3", atOpen, unsupported, "", func(f *forgery) { f.body().at("version").setInt(2) }},
		vector{"other root", "R3", atOpen, unsupported, "", func(f *forgery) { f.roots[1-f.newest].at("body.version").setInt(2) }},
		vector{"settled record", "R3", atOpen, unsupported, "", func(f *forgery) { f.settled.at("body.version").setInt(2) }},
		vector{"header", "R3", atCheck, corrupt, "", func(f *forgery) { f.header.at("body.version").setInt(2) }},
	)
	return vs
}

func contentOfEntry(e *el) string {
	for _, c := range []string{"chunks", "chunkMap", "live"} {
		if e.has(c) {
			return c
		}
	}
	return ""
}

// rangeVectors: every integer has its range (R4).
func rangeVectors() (vs []vector) {
	bad := func(where, what string, get func(f *forgery) *el, values ...int64) {
		for _, v := range values {
			vs = append(vs, vector{fmt.Sprintf("%s %d", what, v), "R4", where, corrupt, "", func(f *forgery) { get(f).setInt(v) }})
		}
	}
	root := func(name string) func(f *forgery) *el { return func(f *forgery) *el { return f.body().at(name) } }
	bad(atSlot, "root slot", root("slot"), -1, 2)
	bad(atSlot, "root generation", root("generation"), 0, -5, 1<<62+1)
	bad(atSlot, "root parentGeneration", root("parentGeneration"), -1, 1<<40)
	bad(atSlot, "root maxSize", root("maxSize"), -1, 1<<62+1)
	bad(atSlot, "root blobs", root("blobs"), -1)
	bad(atSlot, "directory length", root("directory.length"), 0, 4097, 1<<40)
	bad(atSlot, "directory generation", root("directory.generation"), 0, 1<<40)
	bad(atSlot, "free generation", root("free.generation"), 0, 1<<40)
	bad(atNote, "settled slot", func(f *forgery) *el { return f.settled.at("body.slot") }, 2)
	bad(atNote, "settled generation", func(f *forgery) *el { return f.settled.at("body.generation") }, 0)
	bad(atCheck, "header blockSize", func(f *forgery) *el { return f.header.at("body.blockSize") }, 512)
	bad(atCheck, "header rootSlot1", func(f *forgery) *el { return f.header.at("body.rootSlot1") }, 65536)
	bad(atRead, "directory level", func(f *forgery) *el { return f.dir.el.at("level") }, -1, 13, 1<<40)
	bad(atRead, "child length", func(f *forgery) *el { return f.dir.el.at("items.1.node.length") }, 0, 4097)
	bad(atRead, "child generation", func(f *forgery) *el { return f.dir.el.at("items.1.node.generation") }, 0, 1<<40)
	entry := func(name string) func(f *forgery) *el { return func(f *forgery) *el { return f.inline().at(name) } }
	bad(atRead, "entry size", entry("size"), -1, 1<<40+1)
	bad(atRead, "entry generation", entry("generation"), 0, 1<<40)
	bad(atRead, "chunk size", entry("chunkSize"), 0, 2048, 2<<20)
	bad(atRead, "chunk index", entry("chunks.0.index"), -1, 1<<28+1)
	bad(atRead, "chunk length", entry("chunks.0.length"), 0, 1<<20+1)
	bad(atRead, "chunk offset", entry("chunks.0.offset"), -4096, 1<<62+4096)
	bad(atRead, "chunk generation", entry("chunks.0.generation"), 0, 1<<40)
	bad(atRead, "chunk map length", func(f *forgery) *el { return f.mapped().at("chunkMap.length") }, 8192)
	bad(atRead, "chunk map generation", func(f *forgery) *el { return f.mapped().at("chunkMap.generation") }, 1<<40)
	bad(atCheck, "free end", func(f *forgery) *el { return f.free.el.at("end") }, 0, 196608)
	bad(atCheck, "free extent length", func(f *forgery) *el { return f.free.el.at("extents.0.length") }, 0, 512, 1<<45)
	bad(atCheck, "free extent freed", func(f *forgery) *el { return f.free.el.at("extents.0.freed") }, -1, 1<<40)
	return vs
}

// sizeVectors: every string has its length (R5).
func sizeVectors() (vs []vector) {
	bad := func(where, only, what string, get func(f *forgery) *el, sizes ...int) {
		for _, n := range sizes {
			vs = append(vs, vector{fmt.Sprintf("%s of %d", what, n), "R5", where, corrupt, only,
				func(f *forgery) { get(f).set(bytes.Repeat([]byte{'x'}, n)) }})
		}
	}
	root := func(name string) func(f *forgery) *el { return func(f *forgery) *el { return f.body().at(name) } }
	bad(atSlot, "", "root store", root("store"), 15, 17)
	bad(atSlot, "", "root commit", root("commit"), 0)
	bad(atSlot, "", "root parent", root("parent"), 31, 33)
	bad(atSlot, "", "directory crc32c", root("directory.crc32c"), 3, 8)
	bad(atSlot, anySealed, "directory mac", root("directory.mac"), 31)
	bad(atSlot, "", "root crc32c", func(f *forgery) *el { return f.root().at("crc32c") }, 5)
	bad(atSlot, anySealed, "root mac", func(f *forgery) *el { return f.root().at("mac") }, 31)
	bad(atNote, "", "settled digest", func(f *forgery) *el { return f.settled.at("body.digest") }, 20)
	bad(atCheck, "", "header store", func(f *forgery) *el { return f.header.at("body.store") }, 4)
	entry := func(name string) func(f *forgery) *el { return func(f *forgery) *el { return f.inline().at(name) } }
	bad(atRead, "", "entry id", entry("id"), 15)
	bad(atRead, "plain sealed", "entry type", entry("type"), 65)
	bad(atRead, "plain sealed", "entry writer", entry("writer"), 129)
	bad(atRead, "plain sealed", "entry name", entry("key"), 256)
	bad(atRead, "sealed-names", "entry name", entry("key"), 31)
	bad(atRead, "plain", "attribute key", entry("attributes.0.key"), 65)
	bad(atRead, "plain", "attribute value", entry("attributes.0.value"), 513)
	bad(atRead, anySealed, "chunk salt", entry("chunks.0.seal.salt"), 23)
	bad(atRead, anySealed, "chunk commitment", entry("chunks.0.seal.commitment"), 31)
	bad(atRead, anySealed, "chunk tag", entry("chunks.0.seal.tag"), 17)
	bad(atRead, anySealed, "metadata tag", entry("sealed.tag"), 12)
	bad(atRead, anySealed, "metadata ciphertext", entry("sealed.ciphertext"), 0)
	vs = append(vs, vector{"first root with parent", "R5", atSlot, corrupt, "", func(f *forgery) { f.body().at("parentGeneration").setInt(0) }},
		vector{"parentGeneration without parent", "R5", atSlot, corrupt, "", func(f *forgery) { f.body().at("parent").set([]byte{}) }})
	return vs
}

// textVectors: text is UTF-8 without control characters (R6), times are
// GeneralizedTime in UTC (R7), names have parts (R40).
func textVectors() (vs []vector) {
	for _, s := range []struct{ name, text string }{{"newline", "a\nb"}, {"escape", "\x1b[2J"}, {"no UTF-8", "a\xff"}, {"zero", "a\x00"}, {"C1", "a\u0085"}} {
		vs = append(vs,
			vector{"type, " + s.name, "R6", atRead, corrupt, "plain sealed", func(f *forgery) { f.inline().at("type").set([]byte(s.text)) }},
			vector{"name, " + s.name, "R6", atRead, corrupt, "plain sealed", func(f *forgery) { f.inline().at("key").set([]byte(s.text)) }})
	}
	vs = append(vs,
		vector{"attribute", "R6", atRead, corrupt, "plain", func(f *forgery) { f.inline().at("attributes.0.value").set([]byte("\x7f")) }},
		vector{"header note", "R6", atCheck, corrupt, "", func(f *forgery) { f.header.at("body.note").set([]byte("nv\x00tore")) }})
	for _, s := range []struct{ name, text string }{{"30 February", "20240230000000Z"}, {"month 13", "20241301000000Z"}, {"no Z", "20240101000000+"},
		{"second 60", "20240101000060Z"}, {"letters", "2024010100000xZ"}} {
		vs = append(vs,
			vector{s.name, "R7", atRead, corrupt, "", func(f *forgery) { f.inline().at("modified").set([]byte(s.text)) }},
			vector{"root, " + s.name, "R7", atSlot, corrupt, "", func(f *forgery) { f.body().at("time").set([]byte(s.text)) }})
	}
	vs = append(vs, vector{"zone", "R5", atRead, corrupt, "", func(f *forgery) { f.inline().at("created").set([]byte("20240101000000+0100")) }})
	for _, n := range []string{"", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.", "./a"} {
		vs = append(vs, vector{strings.ReplaceAll(n, "/", `\`), "R40", atRead, corrupt, "plain sealed", func(f *forgery) { f.inline().at("key").set([]byte(n)) }})
	}
	return vs
}

func extensionEl(critical ...byte) *el {
	x := derSeq(0x30, derBytes(6, []byte{0x2a, 0x03}))
	if len(critical) > 0 {
		x.add(derBytes(1, critical))
	}
	x.add(derBytes(4, []byte{1}))
	return x
}

func extensionVectors() (vs []vector) {
	for _, s := range []struct {
		name, where, only string
		tag               byte
		get               func(f *forgery) *el
	}{{"root", atSlot, "", 0xa2, (*forgery).body}, {"entry", atRead, "", 0xa5, (*forgery).inline}} {
		add := func(name, rule, where string, kind error, xs ...*el) {
			vs = append(vs, vector{s.name + " " + name, rule, where, kind, s.only, func(f *forgery) {
				e := derSeq(s.tag)
				for _, x := range xs {
					e.add(x.clone())
				}
				s.get(f).add(e)
			}})
		}
		where := atOpen
		if s.name == "entry" {
			where = atRead
		}
		add("not critical", "R8", atNone, nil, extensionEl())
		add("critical", "R8", where, unsupported, extensionEl(0xff))
		add("FALSE encoded", "R1", s.where, corrupt, extensionEl(0))
		add("empty list", "R1", s.where, corrupt)
		add("padded object identifier", "R1", s.where, corrupt, derSeq(0x30, derBytes(6, []byte{0x2a, 0x80, 0x03}), derBytes(4, nil)))
		add("empty object identifier", "R1", s.where, corrupt, derSeq(0x30, derBytes(6, nil), derBytes(4, nil)))
		add("unfinished object identifier", "R1", s.where, corrupt, derSeq(0x30, derBytes(6, []byte{0x2a, 0x83}), derBytes(4, nil)))
		add("an element more", "R1", s.where, corrupt, derSeq(0x30, derBytes(6, []byte{0x2a}), derBytes(4, nil), derBytes(5, nil)))
	}
	many := vector{"17 extensions", "R8", atRead, corrupt, "", func(f *forgery) {
		x := derSeq(0xa5)
		for i := range 17 {
			x.add(derSeq(0x30, derBytes(6, []byte{0x2a, byte(i)}), derBytes(4, nil)))
		}
		f.inline().add(x)
	}}
	return append(vs, many)
}
