package blobdir

import (
	"fmt"

	"golang.org/x/crypto/cryptobyte"
)

// A RegionKind says what a run of bytes in the image is for.
type RegionKind string

// The kinds of regions.
const (
	RegionHeader    RegionKind = "header"
	RegionRoot      RegionKind = "root"
	RegionSettled   RegionKind = "settled"
	RegionKeySlots  RegionKind = "key-slots"
	RegionDirectory RegionKind = "directory"
	RegionChunkMap  RegionKind = "chunk-map"
	RegionChunk     RegionKind = "chunk"
	RegionLive      RegionKind = "live"
	RegionFreeNode  RegionKind = "free-node"
	RegionFreeTree  RegionKind = "free-tree"
	RegionFree      RegionKind = "free"
)

// A Region is a run of bytes and its use.
type Region struct {
	Offset, Length int64 // bytes; the length isn't rounded to blocks
	Kind           RegionKind
	Blob           string // of chunks, chunk maps and live extents
	Generation     int64  // that wrote it; of free space, that gave it up (0: never used)
}

type region struct {
	Region
	gen int64
}

// A walker visits what a root reaches.
type walker struct {
	d       *Dir
	prof    *profile
	only    int64 // visit only what this generation wrote; 0 is all
	content bool  // check the checksums of content
	open    bool  // and decrypt it
	visit   func(region) error

	// fault is told of damage below what is visited, and returns nil to
	// go on beside it. Without it the walk ends there.
	fault func(err error, blob string) error

	// used marks what was visited. Each extent has one user, and a second
	// isn't followed: otherwise a small hostile image would be a walk
	// without end.
	used *bitmap

	blobs int64
	seen  map[[16]byte]string // blob IDs, if not nil

	attached map[int64]string // offsets and names of the live extents that are, if not nil
	void     map[int64]string // offsets of live extents whose content isn't checked
}

func (w *walker) failed(err error, blob string) error {
	if err == nil || w.fault == nil {
		return err
	}
	return w.fault(err, blob)
}

// extent visits an extent unless it is left out.
func (w *walker) extent(ref reference, kind RegionKind, blob string) (bool, error) {
	if w.only != 0 && ref.gen != w.only {
		return false, nil
	}
	if w.used == nil {
		w.used = newBitmap()
	}
	if at := w.used.set(ref.off, ref.length); at >= 0 {
		return false, w.failed(&Error{Off: at, Struct: string(kind), Blob: blob, Want: "an extent that nothing else uses", Rule: "R22", Kind: ErrCorrupt}, blob)
	}
	return true, w.visit(region{Region{ref.off, ref.length, kind, blob, ref.gen}, ref.gen})
}

// root visits all below a root, but not the fixed structures.
func (w *walker) root(r *root) error {
	if err := w.freeSpace(r); err != nil {
		return err
	}
	return w.inUse(r)
}

// inUse visits the key slots, the directory and what it names.
func (w *walker) inUse(r *root) error {
	if r.keySlots != nil {
		if in, err := w.extent(*r.keySlots, RegionKeySlots, ""); err != nil {
			return err
		} else if in {
			_, err := w.d.readNode(*r.keySlots, "key slots", w.prof)
			if err == nil {
				_, err = w.d.readKeySlots(r)
			}
			if err := w.failed(err, ""); err != nil {
				return err
			}
		}
	}
	return w.tree(directoryTree, r.dir, -1, nil, nil, RegionDirectory, "", func(n *node, i int) error {
		d := newDecoder(n.items[i], n.ref.off, "directory")
		s := cryptobyte.String(d.whole)
		e := d.entry(&s, w.prof)
		if d.err != nil {
			return w.failed(d.err, "")
		}
		return w.entry(e)
	})
}

// tree visits the nodes and, by item, the leaves' items.
func (w *walker) tree(k *treeKind, ref reference, level int, first, limit []byte, kind RegionKind, blob string, item func(*node, int) error) error {
	if in, err := w.extent(ref, kind, blob); !in || err != nil {
		return err
	}
	n, err := w.d.load(k, ref, level, w.prof)
	if err == nil && first != nil {
		err = k.between(n, first, limit, ref.off)
	}
	if err != nil {
		return w.failed(err, blob)
	}
	for i := range n.keys {
		if n.level == 0 {
			err = item(n, i)
		} else {
			err = w.tree(k, n.kids[i].ref, n.level-1, n.keys[i], n.limit(i, limit), kind, blob, item)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) entry(e *entry) error {
	w.blobs++
	name := e.Name
	if name == "" {
		name = fmt.Sprintf("(sealed name %x)", e.key[:8])
	}
	if w.seen != nil {
		if other, ok := w.seen[e.ID]; ok {
			if err := w.failed(&Error{Off: -1, Struct: "entry", Field: "id", Blob: name, Got: other, Want: "an ID of its own", Rule: "R43", Kind: ErrCorrupt}, name); err != nil {
				return err
			}
		}
		w.seen[e.ID] = name
	}
	if l := e.live; l != nil {
		if l.off > w.d.dev.Size()-l.length {
			return w.failed(corrupt(l.off, "R21", "entry", "live", l.off, "an extent inside the image"), name)
		}
		in, err := w.extent(reference{off: l.off, length: l.length, gen: l.gen}, RegionLive, name)
		if in && l.attached && w.attached != nil {
			w.attached[l.off] = name
		}
		if !in || err != nil || !w.content {
			return err
		}
		if _, ok := w.void[l.off]; ok || l.attached {
			return nil
		}
		var k *keys
		if w.open {
			k = w.prof.keys
		}
		return w.failed(w.d.checkLive(e, k, name), name)
	}
	b := &blob{tx: &Tx{d: w.d, prof: w.prof}, entry: *e}
	for i := range e.chunks {
		if err := w.chunk(b, &e.chunks[i], name); err != nil {
			return err
		}
	}
	if e.chunkMap == nil {
		return nil
	}
	return w.tree(chunkTree, *e.chunkMap, -1, nil, nil, RegionChunkMap, name, func(n *node, i int) error {
		c, err := b.parseChunk(n.items[i], n.ref.off)
		if err != nil {
			return w.failed(err, name)
		}
		return w.chunk(b, c, name)
	})
}

func (w *walker) chunk(b *blob, c *chunkRef, name string) error {
	in, err := w.extent(c.reference, RegionChunk, name)
	if !in || err != nil || !w.content {
		return err
	}
	if w.open && w.prof.keys != nil {
		_, err = b.openChunk(c)
	} else {
		_, err = w.d.readExtent(c.reference, "chunk")
		if e, ok := err.(*Error); ok {
			e.Blob, e.Field = name, fmt.Sprintf("%d.%s", c.index, e.Field)
		}
	}
	return w.failed(err, name)
}

// freeSpace visits the free node, its tree, and what they say is free.
func (w *walker) freeSpace(r *root) error {
	in, err := w.extent(r.free, RegionFreeNode, "")
	if !in || err != nil {
		return err
	}
	f, err := w.d.readFree(r, w.prof)
	if err != nil {
		return w.failed(err, "")
	}
	free := func(e freeExtent) error {
		if w.only != 0 {
			return nil
		}
		return w.visit(region{Region{e.off, e.length, RegionFree, "", e.freed}, 0})
	}
	for _, e := range f.extents {
		if err := free(e); err != nil {
			return err
		}
	}
	if f.tree == nil {
		return nil
	}
	return w.tree(freeTree, *f.tree, -1, nil, nil, RegionFreeTree, "", func(n *node, i int) error {
		d := newDecoder(n.items[i], n.ref.off, "free tree")
		in := d.all0()
		e := d.freeExtent(&in, w.prof.gen)
		if d.err == nil && e.end() > f.end {
			d.err = corrupt(n.ref.off, "R51", "free tree", "extent", e.off, "before the end of the used area")
		}
		if d.err != nil {
			return w.failed(d.err, "")
		}
		return free(e)
	})
}

// Regions calls fn for every run of bytes that the newest generation knows
// of: fixed structures, nodes, content and free space, in no order.
func (d *Dir) Regions(fn func(Region) error) error {
	if err := d.fail(); err != nil {
		return err
	}
	st := d.pin()
	defer d.unpin(st)
	for _, r := range fixedRegions(st) {
		if err := fn(r); err != nil {
			return err
		}
	}
	w := &walker{d: d, prof: &st.prof, visit: func(r region) error { return fn(r.Region) }}
	return w.root(st.root)
}

func fixedRegions(st *state) []Region {
	rs := []Region{
		{Offset: headerOffset, Length: BlockSize, Kind: RegionHeader},
		{Offset: settledOffset, Length: BlockSize, Kind: RegionSettled},
	}
	for i, s := range st.slots {
		r := Region{Offset: rootSlots[i], Length: BlockSize, Kind: RegionRoot}
		if s.root != nil {
			r.Generation = s.root.gen
		}
		rs = append(rs, r)
	}
	return rs
}
