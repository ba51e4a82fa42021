package blobdir_test

import (
	"bytes"
	"fmt"
	"slices"

	"nvstore.dev/blobdir"
)

func flipFirst(p []byte) []byte {
	q := slices.Clone(p)
	q[0] ^= 1
	return q
}

func (e *el) flip() *el { return e.set(flipFirst(e.val)) }

var zeroRoot = make([]byte, 512)

// rootVectors: header, roots and settled record as such.
func rootVectors() []vector {
	other := func(f *forgery) *el { return f.roots[1-f.newest] }
	straddled := blobdir.ErrStraddled
	return []vector{
		{"header", "R9", atCheck, corrupt, "", func(f *forgery) { f.header.at("body.store").flip() }},
		{"header", "R10", atCheck, corrupt, "", func(f *forgery) { f.header.at("crc32c").set([]byte{1, 2, 3, 4}) }},
		{"root", "R10", atSlot, corrupt, "", func(f *forgery) { f.root().at("crc32c").set([]byte{1, 2, 3, 4}) }},
		{"other root", "R10", atCheck, corrupt, "", func(f *forgery) { other(f).at("crc32c").set([]byte{1, 2, 3, 4}) }},
		{"settled record", "R10", atNote, corrupt, "", func(f *forgery) { f.settled.at("crc32c").set([]byte{1, 2, 3, 4}) }},
		{"root in the wrong slot", "R11", atSlot, corrupt, "", func(f *forgery) { f.body().at("slot").setInt(int64(1 - f.newest)) }},
		{"image ends before the roots", "R12", atOpen, corrupt, "", func(f *forgery) { f.cut = 60 << 10 }},
		{"image ends before the second root", "", atAny, corrupt, "", func(f *forgery) { f.cut = 100 << 10 }},
		{"image ends before the settled record", "R12", atAny, corrupt, "", func(f *forgery) { f.cut = 190 << 10 }},
		{"both zeroed", "R13", atOpen, corrupt, "", func(f *forgery) { f.root().setRaw(zeroRoot); other(f).setRaw(zeroRoot) }},
		{"all zeroed", "R13", atOpen, blobdir.ErrFormat, "", func(f *forgery) {
			f.root().setRaw(zeroRoot)
			other(f).setRaw(zeroRoot)
			f.header.setRaw(zeroRoot)
		}},
		{"both garbage", "R13", atOpen, corrupt, "", func(f *forgery) {
			f.root().setRaw(bytes.Repeat([]byte{0xa5}, 512))
			other(f).setRaw(bytes.Repeat([]byte{0x30}, 512))
		}},
		{"parent", "R14", atOpen, straddled, "", func(f *forgery) { f.body().at("parent").flip() }},
		{"other root of another commit", "R14", atOpen, straddled, "", func(f *forgery) {
			f.reseal()
			f.body().at("parent").keep = true
			other(f).at("body.commit").flip()
		}},
		{"same generation", "R14", atOpen, straddled, "", func(f *forgery) { other(f).at("body.generation").setInt(f.body().at("generation").int()) }},
		{"other root of another store", "R14", atOpen, straddled, "", func(f *forgery) { other(f).at("body.store").flip() }},
		{"key slots without a MAC", "R15", atSlot, corrupt, "plain", func(f *forgery) {
			r := f.body().at("directory").clone()
			r.tag = 0xa0
			f.body().add(r, oidEl("2.3"))
		}},
		{"a MAC without key slots", "R15", atSlot, corrupt, anySealed, func(f *forgery) {
			i := f.body().index("keySlots")
			f.body().remove(i)
			f.body().remove(i)
		}},
		{"a MAC in a plain root", "R1", atSlot, corrupt, "plain", func(f *forgery) { f.root().insert(1, derBytes(0x80, make([]byte, 32))) }},
		{"no MAC in a sealed root", "R1", atSlot, corrupt, anySealed, func(f *forgery) { f.root().remove(1) }},
		{"sealed names in a plain store", "R15", atSlot, corrupt, "plain", func(f *forgery) { f.body().at("sealNames").set([]byte{0xff}) }},
		{"unknown algorithm", "R16", atOpen, unsupported, anySealed, func(f *forgery) { f.body().at("sealing").set(oidEl("2.9").val) }},
		{"snapshots", "R17", atWrite, unsupported, "", func(f *forgery) {
			f.reseal()
			r := f.body().at("directory").clone()
			r.tag = 0xa1
			f.body().add(r)
		}},
		{"root", "R18", atOpen, tampered, anySealed, func(f *forgery) { f.root().at("mac").flip() }},
		{"other root", "R18", atOpen, tampered, anySealed, func(f *forgery) { other(f).at("mac").flip() }},
		{"settled", "R18", atOpen, tampered, anySealed, func(f *forgery) { f.settled.at("mac").flip() }},
		{"settled without a MAC", "R18", atOpen, tampered, anySealed, func(f *forgery) { f.settled.remove(1) }},
		{"no settled record", "R10", atNone, nil, "", func(f *forgery) { f.settled = nil }},
		{"settled record of another root", "R10", atNone, nil, "", func(f *forgery) { f.settled.at("body.digest").flip() }},
		{"zeroed", "R71", atOpen, corrupt, "", func(f *forgery) { f.root().setRaw(zeroRoot) }},
		{"garbage", "R71", atOpen, corrupt, "", func(f *forgery) { f.root().setRaw(bytes.Repeat([]byte{0x5a}, 512)) }},
	}
}

// A named reference, for the rules about references.
type named struct {
	name, where string
	get         func(f *forgery) *el
}

var references = []named{
	{"directory", atRead, func(f *forgery) *el { return f.body().at("directory") }},
	{"child", atRead, func(f *forgery) *el { return f.dir.el.at("items.1.node") }},
	{"chunk map", atRead, func(f *forgery) *el { return f.mapped().at("chunkMap") }},
	{"chunk map child", atRead, func(f *forgery) *el { return f.chunkMap().el.at("items.1.node") }},
	{"chunk", atRead, func(f *forgery) *el { return f.inline().at("chunks.1") }},
	{"chunk in a map", atRead, func(f *forgery) *el { return f.chunkMap().kids[1].el.at("items.1") }},
	{"free node", atCheck, func(f *forgery) *el { return f.body().at("free") }},
	{"free tree", atCheck, func(f *forgery) *el { return f.free.el.at("tree") }},
}

// referenceVectors: R20 to R23 on each kind of reference.
func referenceVectors() (vs []vector) {
	refs := append(slices.Clone(references), named{"key slots", atCheck, func(f *forgery) *el { return f.body().at("keySlots") }})
	for _, r := range refs {
		only, where := "", r.where
		if r.name == "key slots" {
			only = anySealed
		}
		if r.name == "directory" || r.name == "free node" || r.name == "key slots" {
			where = atSlot // the root itself doesn't parse
		}
		vs = append(vs, vector{r.name + " misaligned", "R20", where, corrupt, only, func(f *forgery) { o := r.get(f).at("offset"); o.setInt(o.int() + 512) }})
		for _, at := range []int64{0, 64 << 10, 128 << 10, 192 << 10} {
			vs = append(vs, vector{fmt.Sprintf("%s on block %d", r.name, at/4096), "R20", where, corrupt, only, func(f *forgery) { r.get(f).at("offset").setInt(at) }})
		}
		vs = append(vs,
			vector{r.name, "R21", r.where, corrupt, only, func(f *forgery) { r.get(f).at("offset").setInt(1 << 40) }},
			vector{r.name + " at the end", "R21", r.where, corrupt, only, func(f *forgery) { r.get(f).at("offset").setInt(int64(len(f.img))) }},
			vector{r.name, "R23", r.where, corrupt, only, func(f *forgery) { r.get(f).at("crc32c").set([]byte{0, 1, 2, 3}) }},
			vector{r.name + ", a byte short", "R23", r.where, corrupt, only, func(f *forgery) { n := r.get(f).at("length"); n.setInt(n.int() - 1) }})
	}
	vs = append(vs,
		vector{"chunk that reaches into block 16", "R20", atRead, corrupt, "", func(f *forgery) { f.coarse().at("chunks.0.offset").setInt(15 * 4096) }},
		vector{"two chunks", "R22", atCheck, corrupt, "plain", func(f *forgery) {
			a, b := f.inline().at("chunks.0"), f.chunkMap().kids[0].el.at("items.0")
			f.reseal()
			a.at("offset").set(b.at("offset").val)
			a.at("crc32c").set(b.at("crc32c").val)
			a.to.keep = true
		}},
		vector{"chunk and node", "R22", atCheck, corrupt, "plain", func(f *forgery) {
			f.reseal()
			a, x := f.entries()[len(f.entries())-1].at("chunks.1"), f.leaf(0)
			n := min(a.at("length").int(), x.ref.at("length").int())
			a.at("offset").setInt(x.off)
			a.at("length").setInt(n)
			a.at("crc32c").set(crcOf(f.img[x.off : x.off+n]))
			a.to.keep = true
		}},
		vector{"two chunk maps", "R22", atCheck, corrupt, "plain", func(f *forgery) {
			f.reseal()
			e, m := f.coarse(), f.mapped()
			for _, name := range []string{"size", "chunkSize", "generation"} {
				e.at(name).set(m.at(name).val)
			}
			r := m.at("chunkMap").clone()
			e.kids[e.index("chunks")] = r
			f.leaf(1).kids = slices.DeleteFunc(f.leaf(1).kids, func(x *extent) bool { return x.kind == "chunk" })
			f.leaf(0).kids = slices.DeleteFunc(f.leaf(0).kids, func(x *extent) bool { return x.kind == "chunk" })
		}},
	)
	return vs
}

// macVectors: checksums are right, MACs and tags are not (R24, R25).
func macVectors() (vs []vector) {
	for _, r := range references {
		if r.name == "chunk" || r.name == "chunk in a map" {
			for _, part := range []string{"salt", "commitment", "tag"} {
				name := part
				if r.name != "chunk" {
					name += " of a chunk in a map"
				}
				vs = append(vs, vector{name, "R25", r.where, tampered, anySealed, func(f *forgery) { r.get(f).at("seal." + part).flip() }})
			}
			vs = append(vs,
				vector{r.name + ", text", "R25", r.where, tampered, anySealed, func(f *forgery) { r.get(f).to.raw[0] ^= 1 }},
				vector{r.name + ", older", "R25", r.where, tampered, anySealed, func(f *forgery) { g := r.get(f).at("generation"); g.setInt(g.int() - 1) }})
			continue
		}
		vs = append(vs, vector{r.name, "R24", r.where, tampered, anySealed, func(f *forgery) { r.get(f).at("mac").flip() }})
	}
	for _, part := range boxFields {
		vs = append(vs, vector{"metadata " + part, "R24", atRead, tampered, anySealed, func(f *forgery) { f.inline().at("sealed." + part).flip() }})
	}
	return append(vs,
		vector{"key slots", "R24", atOpen, tampered, anySealed, func(f *forgery) { f.body().at("keySlots.mac").flip() }},
		vector{"metadata of another entry", "R24", atRead, tampered, anySealed, func(f *forgery) {
			a, b := f.inline(), f.coarse()
			a.kids[a.index("sealed")] = b.at("sealed").clone()
		}},
		vector{"entry with another's id", "R24", atRead, tampered, anySealed, func(f *forgery) { f.inline().at("id").set(f.coarse().at("id").val) }},
		vector{"entry under another name", "R24", atRead, tampered, "sealed-names", func(f *forgery) {
			l := f.leaf(1).el.at("items")
			last := l.kids[len(l.kids)-1].at("key")
			last.set(append(slices.Clone(last.val[:31]), last.val[31]^1))
			if len(l.kids) == 1 {
				f.dir.el.at("items.1.key").set(last.val)
			}
		}},
		vector{"type", "R25", atRead, tampered, "sealed", func(f *forgery) { f.inline().at("type").set([]byte("text")) }},
		vector{"swapped within a blob", "R25", atRead, tampered, anySealed, func(f *forgery) {
			l := f.chunkMap().kids[0].el.at("items")
			a, b := l.kids[0], l.kids[1]
			a.kids[0], b.kids[0] = b.kids[0], a.kids[0]
			l.swap(0, 1)
		}},
		vector{"swapped between blobs", "R25", atRead, tampered, anySealed, func(f *forgery) {
			a, b := f.inline().at("chunks.0"), f.chunkMap().kids[0].el.at("items.0")
			f.reseal()
			for _, name := range []string{"offset", "length", "crc32c", "generation", "seal"} {
				a.kids[a.index(name)] = b.at(name).clone()
			}
			a.to.keep = true
		}},
	)
}

// lower takes one off the last byte of a key, which stays above the key
// before it.
func lower(k *el) {
	v := slices.Clone(k.val)
	v[len(v)-1]--
	k.set(v)
}

// treeVectors: levels, order and ranges (R31 to R35).
func treeVectors() []vector {
	return []vector{
		{"directory leaf", "R31", atRead, corrupt, "", func(f *forgery) { f.leaf(1).el.at("level").setInt(5) }},
		{"chunk map leaf", "R31", atRead, corrupt, "", func(f *forgery) { f.chunkMap().kids[1].el.at("level").setInt(1) }},
		{"directory", "R32", atRead, corrupt, "", func(f *forgery) { f.leaf(0).el.at("items").swap(0, 1) }},
		{"directory, twice", "R32", atRead, corrupt, "", func(f *forgery) {
			l := f.leaf(0).el.at("items")
			l.insert(1, l.kids[0].clone())
		}},
		{"children", "R32", atRead, corrupt, "", func(f *forgery) { f.dir.el.at("items").swap(0, 1) }},
		{"chunk map", "R32", atRead, corrupt, "", func(f *forgery) { f.chunkMap().kids[0].el.at("items").swap(0, 1) }},
		{"free tree", "R32", atCheck, corrupt, "", func(f *forgery) { f.freeTree().el.at("items").swap(0, 1) }},
		{"directory", "R33", atRead, corrupt, "", func(f *forgery) { lower(f.dir.el.at("items.1.key")) }},
		{"chunk map", "R33", atRead, corrupt, "", func(f *forgery) { f.chunkMap().el.at("items.1.key").setInt(4) }},
		{"directory leaf", "R34", atRead, corrupt, "", func(f *forgery) { f.leaf(1).el.at("items").kids = nil }},
		{"directory", "R34", atRead, corrupt, "", func(f *forgery) { f.dir.el.at("items").kids = nil }},
		{"chunk map leaf", "R34", atRead, corrupt, "", func(f *forgery) { f.chunkMap().kids[1].el.at("items").kids = nil }},
		{"chunk map leaf that is another's root", "R34", atRead, corrupt, "plain", func(f *forgery) {
			// As the root of a chunk map it may be empty, and is in the
			// reader's cache by the time it is met as a child.
			f.chunkMap().kids[1].el.at("items").kids = nil
			f.reseal()
			e, r := f.coarse(), f.chunkMap().kids[1].ref.clone()
			r.tag, r.keep = 0xa2, true
			e.at("generation").setInt(f.body().at("generation").int())
			for _, c := range chunksOf(e) {
				c.to.keep = true
			}
			e.kids[e.index("chunks")] = r
		}},
		{"directory", "R35", atRead, corrupt, "", func(f *forgery) {
			// The first leaf's last key lies behind the second leaf's first.
			a, b := f.leaf(0).el.at("items"), f.leaf(1).el.at("items")
			a.add(b.kids[len(b.kids)-1])
			b.kids = b.kids[:len(b.kids)-1]
		}},
		{"chunk map", "R35", atRead, corrupt, "", func(f *forgery) {
			a, b := f.chunkMap().kids[0].el.at("items"), f.chunkMap().kids[1].el.at("items")
			a.add(b.kids[len(b.kids)-1])
			b.kids = b.kids[:len(b.kids)-1]
		}},
	}
}
