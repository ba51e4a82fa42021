package blobdir

import (
	"cmp"
	"slices"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// A freeExtent is space that no live structure needs, and the generation that
// gave it up (0: it was never used). It may be needed by the fallback root,
// so age decides when it is used again (FORMAT.md, section 11).
type freeExtent struct{ off, length, freed int64 }

func (f freeExtent) end() int64 { return f.off + f.length }

func (f freeExtent) append(dst []byte) []byte {
	return appendSequence(dst, func(b []byte) []byte {
		return appendInt(appendInt(appendInt(b, f.off), f.length), f.freed)
	})
}

func (d *decoder) freeExtent(s *cryptobyte.String, gen int64) freeExtent {
	at := *s
	in := d.seq(s, tagSequence, "extent")
	f := freeExtent{
		off:    d.int(&in, "extent.offset", 0, maxOffset),
		length: d.int(&in, "extent.length", BlockSize, maxFreeExtent),
		freed:  d.int(&in, "extent.freed", 0, gen),
	}
	d.end(in, "extent")
	if d.err == nil && (f.off%BlockSize != 0 || f.length%BlockSize != 0 || reserved(f.off, f.length)) {
		d.fail(at, "R50", "extent.offset", f.off, "whole blocks outside the reserved ones")
	}
	return f
}

// The free node holds the extents in use by the allocator; what doesn't fit
// spills into the free tree.
//
//	FreeSpace ::= SEQUENCE { type OBJECT IDENTIFIER, end INTEGER, extents SEQUENCE OF FreeExtent, tree [0] Reference OPTIONAL }
type freeNode struct {
	end     int64 // the first byte that was never used
	extents []freeExtent
	tree    *reference
}

func (f *freeNode) encode(dst []byte) []byte {
	return appendSequence(dst, func(b []byte) []byte {
		b = append(b, oidFree...)
		b = appendInt(b, f.end)
		b = appendSequence(b, func(b []byte) []byte {
			for _, e := range f.extents {
				b = e.append(b)
			}
			return b
		})
		if f.tree != nil {
			b = f.tree.append(b, ctxC(0))
		}
		return b
	})
}

func parseFreeNode(p []byte, ref reference, pr *profile) (*freeNode, error) {
	d := newDecoder(p, ref.off, "free node")
	in := d.all()
	d.oid(&in, oidFree)
	at := in
	f := &freeNode{end: d.int(&in, "end", firstEnd, maxOffset)}
	if d.err == nil && f.end%BlockSize != 0 {
		d.fail(at, "R52", "end", f.end, "a multiple of 4096")
	}
	list := d.seq(&in, tagSequence, "extents")
	for d.err == nil && !list.Empty() {
		at := list
		e := d.freeExtent(&list, pr.gen)
		if d.err == nil && (e.end() > f.end || len(f.extents) > 0 && f.extents[len(f.extents)-1].end() > e.off) {
			d.fail(at, "R51", "extents", e.off, "ascending, apart, and before the end of the used area")
		}
		f.extents = append(f.extents, e)
	}
	if d.err == nil && in.PeekASN1Tag(cbasn1.Tag(ctxC(0))) {
		r := d.reference(&in, ctxC(0), "tree", maxNode, ref.gen, pr.sealed)
		f.tree = &r
	}
	d.end(in, "")
	if err := d.canonical(f.encode(nil)); err != nil {
		return nil, err
	}
	return f, nil
}

// merge adds extents, and joins neighbours of one age.
func (f *freeNode) merge(more []freeExtent) {
	all := slices.Concat(f.extents, more)
	slices.SortFunc(all, func(a, b freeExtent) int { return cmp.Compare(a.off, b.off) })
	out := all[:0]
	for _, e := range all {
		if k := len(out) - 1; k >= 0 && out[k].end() == e.off && out[k].freed == e.freed && out[k].length+e.length <= maxFreeExtent {
			out[k].length += e.length
			continue
		}
		out = append(out, e)
	}
	f.extents = out
}

// insert adds one extent.
func (f *freeNode) insert(e freeExtent) { f.merge([]freeExtent{e}) }

// largest returns the n longest extents.
func largest(es []freeExtent, n int) []freeExtent {
	slices.SortFunc(es, func(a, b freeExtent) int { return cmp.Compare(b.length, a.length) })
	return es[:n]
}
