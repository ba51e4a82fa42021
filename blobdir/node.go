package blobdir

import (
	"bytes"
	"encoding/binary"

	"golang.org/x/crypto/cryptobyte"
	cbasn1 "golang.org/x/crypto/cryptobyte/asn1"
)

// A node of a copy-on-write tree (FORMAT.md, section 8). The directory, the
// chunk maps and the free tree are such trees; their nodes differ in type,
// key and item.
//
//	Node ::= SEQUENCE { type OBJECT IDENTIFIER, level INTEGER, items SEQUENCE OF (Item | Child) }
//	Child ::= SEQUENCE { key (as in the items), node Reference }
//
// A node in the cache is never changed: the writer changes clones.
type node struct {
	kind  *treeKind
	level int
	keys  [][]byte // ascending; of a child, the first key below it
	items [][]byte // level 0: the DER of each item
	kids  []kid    // level > 0
	size  int      // bytes of the DER at most
	ref   reference
}

// A kid is a child by reference, or one that a transaction has changed.
type kid struct {
	ref   reference
	dirty *node
}

// A treeKind is what the trees differ in.
type treeKind struct {
	name string
	oid  []byte
	// key reads the key at the start of an item or child.
	key func(d *decoder, s *cryptobyte.String, p *profile) []byte
	// appendKey writes the key of a child.
	appendKey func(dst, key []byte, p *profile) []byte
	// item checks one item and returns its key and its canonical DER.
	item func(d *decoder, s *cryptobyte.String, p *profile) (key, der []byte)
}

var (
	directoryTree = &treeKind{"directory", oidDirectory, nameKeyOf, appendNameKey, directoryItem}
	chunkTree     = &treeKind{"chunk map", oidChunkMap, intKeyOf, appendIntKey, chunkItem}
	freeTree      = &treeKind{"free tree", oidFreeTree, intKeyOf, appendIntKey, freeItem}
)

func nameKeyOf(d *decoder, s *cryptobyte.String, p *profile) []byte {
	if p.sealNames {
		return d.octets(s, ctxP(0), "child.key", 32, 32)
	}
	return d.octets(s, byte(cbasn1.UTF8String), "child.key", 1, maxName)
}

func appendNameKey(dst, key []byte, p *profile) []byte {
	if p.sealNames {
		return appendBytes(dst, ctxP(0), key)
	}
	return appendUTF8(dst, string(key))
}

// Integer keys are kept as 8 bytes, so that bytes.Compare orders them.
func intKey(v int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(v)) }
func keyInt(k []byte) int64 { return int64(binary.BigEndian.Uint64(k)) }

func intKeyOf(d *decoder, s *cryptobyte.String, _ *profile) []byte {
	return intKey(d.int(s, "child.key", 0, maxOffset))
}

func appendIntKey(dst, key []byte, _ *profile) []byte { return appendInt(dst, keyInt(key)) }

func directoryItem(d *decoder, s *cryptobyte.String, p *profile) (key, der []byte) {
	e := d.entry(s, p)
	if d.err != nil {
		return nil, nil
	}
	return e.key, e.append(nil, p)
}

func chunkItem(d *decoder, s *cryptobyte.String, p *profile) (key, der []byte) {
	c := d.chunkRef(s, p.gen, p.sealed)
	return intKey(c.index), c.append(nil)
}

func freeItem(d *decoder, s *cryptobyte.String, p *profile) (key, der []byte) {
	f := d.freeExtent(s, p.gen)
	return intKey(f.off), f.append(nil)
}

const (
	nodeOverhead = 4 + 37 + 3 + 4
	maxItem      = (maxNode - nodeOverhead) / 2 // so that a node always splits
)

func childSize(key []byte) int { return 4 + len(key) + 3 + maxReference }

func (n *node) recount() {
	n.size = nodeOverhead
	for _, it := range n.items {
		n.size += len(it)
	}
	for i := range n.kids {
		n.size += childSize(n.keys[i])
	}
}

func (n *node) clone() *node {
	c := &node{kind: n.kind, level: n.level, size: n.size}
	c.keys = append(make([][]byte, 0, len(n.keys)+1), n.keys...)
	if n.level == 0 {
		c.items = append(make([][]byte, 0, len(n.items)+1), n.items...)
	} else {
		c.kids = append(make([]kid, 0, len(n.kids)+1), n.kids...)
	}
	return c
}

// encode returns the node's DER. Its kids must have references.
func (n *node) encode(dst []byte, k *treeKind, p *profile) []byte {
	return appendSequence(dst, func(b []byte) []byte {
		b = append(b, k.oid...)
		b = appendInt(b, int64(n.level))
		return appendSequence(b, func(b []byte) []byte {
			for _, it := range n.items {
				b = append(b, it...)
			}
			for i, c := range n.kids {
				b = appendSequence(b, func(b []byte) []byte {
					return c.ref.append(k.appendKey(b, n.keys[i], p), tagSequence)
				})
			}
			return b
		})
	})
}

// parseNode reads the node that fills p, which lies at ref.off. level is what
// its parent says, or -1 for a tree's root.
func parseNode(p []byte, ref reference, k *treeKind, pr *profile, level int) (*node, error) {
	d := newDecoder(p, ref.off, k.name)
	in := d.all()
	d.oid(&in, k.oid)
	at := in
	n := &node{kind: k, level: int(d.int(&in, "level", 0, maxLevel)), ref: ref}
	if d.err == nil && level >= 0 && n.level != level {
		d.fail(at, "R31", "level", n.level, "one less than the parent's")
	}
	list := d.seq(&in, tagSequence, "items")
	d.end(in, "")
	var raw [][]byte
	for d.err == nil && !list.Empty() {
		at := list
		var key []byte
		if n.level == 0 {
			var der []byte
			key, der = k.item(d, &list, pr)
			n.items = append(n.items, der)
			raw = append(raw, at[:len(at)-len(list):len(at)-len(list)])
		} else {
			c := d.seq(&list, tagSequence, "child")
			key = bytes.Clone(k.key(d, &c, pr))
			r := d.reference(&c, tagSequence, "child.node", maxNode, ref.gen, pr.sealed)
			d.end(c, "child")
			n.kids = append(n.kids, kid{ref: r})
		}
		if d.err == nil && len(n.keys) > 0 && bytes.Compare(n.keys[len(n.keys)-1], key) >= 0 {
			d.fail(at, "R32", "key", nil, "keys in ascending order")
		}
		n.keys = append(n.keys, key)
	}
	if d.err == nil && len(n.keys) == 0 && (n.level > 0 || level >= 0) {
		d.fail(in, "R34", "items", 0, "at least one, except in an empty tree's root")
	}
	if err := d.canonical(n.encode(make([]byte, 0, maxNode), k, pr)); err != nil {
		return nil, err
	}
	n.items = raw // the same bytes, in the one array that the cache then keeps
	n.recount()
	return n, nil
}
