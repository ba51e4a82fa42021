package blobdir_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
)

// entryVectors: what an entry says beside its content.
func entryVectors() (vs []vector) {
	add := func(rule, name, only string, fault func(f *forgery)) {
		vs = append(vs, vector{name, rule, atRead, corrupt, only, fault})
	}
	attribute := func(k, v string) *el {
		return derSeq(0x30, derBytes(0x0c, []byte(k)), derBytes(0x0c, []byte(v))).named("key", "value")
	}
	add("R41", "sealed metadata in a plain store", "plain", func(f *forgery) {
		f.inline().add(derSeq(0xa4, derBytes(4, make([]byte, 24)), derBytes(4, make([]byte, 32)), derBytes(4, make([]byte, 16)), derBytes(4, []byte{1})))
	})
	add("R41", "attributes in clear", anySealed, func(f *forgery) { f.inline().at("attributes").add(attribute("a", "1")) })
	add("R41", "type in clear", "sealed-names", func(f *forgery) { f.inline().at("type").set([]byte("test")) })
	add("R41", "writer in clear", "sealed-names", func(f *forgery) { f.inline().at("writer").set([]byte("test")) })
	add("R41", "no sealed metadata", "sealed-names", func(f *forgery) {
		e := f.inline()
		e.remove(e.index("sealed"))
	})
	for _, n := range []int64{4097, 5000, 12288, 1<<20 - 4096} {
		add("R42", fmt.Sprint("chunk size ", n), "", func(f *forgery) { f.inline().at("chunkSize").setInt(n) })
	}
	add("R48", "empty key", "plain", func(f *forgery) { f.inline().at("attributes.0.key").set(nil) })
	add("R48", "descending", "plain", func(f *forgery) { f.inline().at("attributes").swap(0, 1) })
	add("R48", "twice", "plain", func(f *forgery) {
		a := f.inline().at("attributes")
		a.insert(1, a.kids[0].clone())
	})
	add("R48", "17", "plain", func(f *forgery) {
		a := f.inline().at("attributes")
		for i := range 15 {
			a.add(attribute(fmt.Sprintf("c%02d", i), ""))
		}
	})
	add("R48", "513 bytes", "plain", func(f *forgery) {
		f.inline().at("attributes").add(attribute("c", strings.Repeat("x", 508)))
	})
	vs = append(vs,
		vector{"same id", "R43", atCheck, corrupt, "plain", func(f *forgery) { f.inline().at("id").set(f.coarse().at("id").val) }},
		vector{"one more", "R45", atCheck, corrupt, "", func(f *forgery) { f.body().at("blobs").setInt(5) }},
		vector{"none", "R45", atCheck, corrupt, "", func(f *forgery) { f.body().at("blobs").setInt(0) }})
	return vs
}

// contentVectors: chunks.
func contentVectors() (vs []vector) {
	add := func(rule, name, where, only string, fault func(f *forgery)) {
		vs = append(vs, vector{name, rule, where, corrupt, only, fault})
	}
	add("R44", "behind the end", atRead, "", func(f *forgery) { f.inline().at("size").setInt(4096) })
	add("R44", "over the end", atRead, "", func(f *forgery) { f.inline().at("size").setInt(4100) })
	add("R44", "longer than the chunk size", atRead, "", func(f *forgery) { f.coarse().at("chunkSize").setInt(4096) })
	add("R44", "descending", atRead, "", func(f *forgery) { f.inline().at("chunks").swap(0, 1) })
	add("R44", "twice", atRead, "", func(f *forgery) {
		c := f.inline().at("chunks")
		c.insert(0, c.kids[0].clone())
	})
	add("R44", "five in the entry", atRead, "", func(f *forgery) {
		e := f.inline()
		e.at("size").setInt(1 << 20)
		c := e.at("chunks")
		for i := range 3 {
			k := c.kids[1].clone()
			k.kids[0] = derInt(int64(10 + i))
			c.add(k)
		}
	})
	add("R44", "in a map, over the end", atRead, "plain", func(f *forgery) { f.mapped().at("size").setInt(21000) })
	add("R44", "in a map, behind the end", atCheck, "plain", func(f *forgery) { f.mapped().at("size").setInt(4096 * 5) })
	add("R4", "in a map, younger than the entry", atRead, "", func(f *forgery) {
		f.chunkMap().kids[0].el.at("items.0.generation").setInt(f.mapped().at("generation").int() + 1)
	})
	return vs
}

// freeVectors: what is said to be free.
func freeVectors() (vs []vector) {
	add := func(rule, name string, fault func(f *forgery)) {
		vs = append(vs, vector{name, rule, atCheck, corrupt, "", fault})
	}
	freeExtent := func(off, n, freed int64) *el { return derSeq(0x30, derInt(off), derInt(n), derInt(freed)) }
	item := func(f *forgery) *el { return f.free.el.at("extents.0") }
	inTree := func(f *forgery) *el { return f.freeTree().el.at("items.1") }
	for _, x := range []struct {
		name string
		get  func(f *forgery) *el
	}{{"node", item}, {"tree", inTree}} {
		add("R50", x.name+", misaligned", func(f *forgery) { o := x.get(f).at("offset"); o.setInt(o.int() + 1) })
		add("R50", x.name+", length misaligned", func(f *forgery) { x.get(f).at("length").setInt(4097) })
		for _, block := range []int64{0, 16, 32, 48} {
			add("R50", fmt.Sprintf("%s, block %d", x.name, block), func(f *forgery) { x.get(f).at("offset").setInt(block * 4096) })
		}
		add("R50", x.name+", over block 48", func(f *forgery) {
			x.get(f).at("offset").setInt(47 * 4096)
			x.get(f).at("length").setInt(2 * 4096)
		})
	}
	end := func(f *forgery) int64 { return f.free.el.at("end").int() }
	add("R51", "descending", func(f *forgery) { f.free.el.at("extents").swap(0, 1) })
	add("R51", "twice", func(f *forgery) {
		x := f.free.el.at("extents")
		x.insert(0, x.kids[0].clone())
	})
	add("R51", "overlapping", func(f *forgery) {
		x := f.free.el.at("extents")
		i := slices.IndexFunc(x.kids, func(e *el) bool { return (e.at("offset").int()/4096-1)%16 != 0 })
		x.insert(i, freeExtent(x.kids[i].at("offset").int()-4096, 8192, 1))
	})
	add("R51", "behind the end", func(f *forgery) { f.free.el.at("extents").add(freeExtent(end(f), 4096, 0)) })
	add("R51", "over the end", func(f *forgery) { f.free.el.at("extents").add(freeExtent(end(f)-4096, 8192, 0)) })
	add("R51", "tree, behind the end", func(f *forgery) { f.freeTree().el.at("items").add(freeExtent(end(f), 4096, 0)) })
	add("R52", "misaligned", func(f *forgery) { e := f.free.el.at("end"); e.setInt(e.int() + 512) })
	add("R53", "in use", func(f *forgery) { f.free.el.at("extents").add(freeExtent(f.leaf(1).off, 4096, 0)) })
	add("R53", "in use, tree", func(f *forgery) { f.freeTree().el.at("items").add(freeExtent(f.leaf(1).off, 4096, 0)) })
	add("R53", "in the node and in the tree", func(f *forgery) {
		f.free.el.at("extents").insert(0, f.freeTree().el.at("items.0").clone())
	})
	add("R54", "end behind the image", func(f *forgery) { f.free.el.at("end").setInt(int64(len(f.img)) + 4096) })
	add("R54", "end far behind the image", func(f *forgery) { f.free.el.at("end").setInt(1 << 40) })
	add("R54", "extent behind the image", func(f *forgery) {
		f.free.el.at("end").setInt(1 << 30)
		f.free.el.at("extents").add(freeExtent(1<<29, 1<<29, 0))
	})
	vs = append(vs, vector{"two blocks nobody knows", "leak", "leak", nil, "", func(f *forgery) { f.spare(); f.spare() }})
	return vs
}

// keySlotVectors: the key slots parse or don't (R60). They move to a block of
// their own first, so that the other root still opens the store.
func keySlotVectors() (vs []vector) {
	add := func(name string, fault func(s *el)) {
		vs = append(vs, vector{name, "R60", atCheck, corrupt, anySealed, func(f *forgery) {
			f.move(f.slots)
			fault(f.slots.el)
		}})
	}
	slot := func(s *el) *el { return s.at("slots.0") }
	again := func(s *el, id int64) *el {
		c := slot(s).clone()
		c.kids[0] = derInt(id)
		return c
	}
	add("no slots", func(s *el) { s.at("slots").kids = nil })
	add("another type", func(s *el) { s.at("type").set(oidEl("1.4").val) })
	add("an element more", func(s *el) { s.add(derBytes(5, nil)) })
	add("a slot with an element more", func(s *el) { slot(s).add(derBytes(5, nil)) })
	add("id 16", func(s *el) { slot(s).at("id").setInt(16) })
	add("id -1", func(s *el) { slot(s).at("id").setInt(-1) })
	add("ids descending", func(s *el) { s.at("slots").insert(0, again(s, 3)) })
	add("one id twice", func(s *el) { s.at("slots").add(again(s, 0)) })
	add("17 slots", func(s *el) {
		for i := range 16 {
			s.at("slots").add(again(s, int64(i+1)))
		}
	})
	add("label of 65 bytes", func(s *el) { slot(s).at("label").set(bytes.Repeat([]byte("x"), 65)) })
	add("label with a control character", func(s *el) { slot(s).at("label").set([]byte("\x1b[m")) })
	add("salt of 23 bytes", func(s *el) { slot(s).at("wrap.salt").set(make([]byte, 23)) })
	add("wrapped key of 16 bytes", func(s *el) { slot(s).at("wrap.wrapped").set(make([]byte, 16)) })
	add("raw key with parameters", func(s *el) { slot(s).at("kdf").add(derBytes(5, nil)) })
	argon := func(version, memory, time, lanes int64) func(s *el) {
		return func(s *el) {
			k := slot(s).at("kdf")
			k.kids = []*el{oidEl("2.1"), derSeq(0x30, derInt(version), derBytes(4, make([]byte, 16)), derInt(memory), derInt(time), derInt(lanes))}
			s.at("slots").kids = slices.Clip(s.at("slots").kids)
		}
	}
	add("Argon2 version 16", argon(16, 65536, 3, 4))
	add("18 MiB of memory", argon(19, 18<<10, 3, 4))
	add("8 GiB of memory", argon(19, 8<<20, 3, 4))
	add("no passes", argon(19, 65536, 0, 4))
	add("2000 passes", argon(19, 65536, 2000, 4))
	add("17 lanes", argon(19, 65536, 3, 17))
	add("empty extension list", func(s *el) { slot(s).add(derSeq(0xa0, derSeq(0x30))) })
	return vs
}

// Whatever is wrong with what is said to be free, a writer makes it anew, and
// nothing that is in use is overwritten.
func TestFreeSpaceIsMadeAnew(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		good := grown(t, base(t, kind)).img
		want := contents(t, good, kind)
		for _, v := range freeVectors() {
			f := takeApart(t, good, rawKey)
			v.fault(f)
			dev := &flat{f.reseal()}
			d, err := blobdir.Open(dev, openOptions(t, kind))
			require.NoError(t, err, v.name)
			for i := range 8 {
				require.NoError(t, put(d, "new", bytes.Repeat([]byte{byte(i)}, 30000)), v.name)
			}
			rep, err := d.Check(context.Background(), nil)
			require.NoError(t, err)
			require.Empty(t, rep.Errors, v.name)
			if v.rule != "leak" {
				require.Empty(t, rep.Leaks, v.name)
			}
			require.NoError(t, d.Update(func(tx *blobdir.Tx) error { return tx.Delete("new") }, nil))
			require.NoError(t, d.Close())
			require.Equal(t, want, contents(t, dev.p, kind), v.name)
		}
	})
}
