package imagetest

const (
	pageSize  = 4096
	fanout    = 64
	fanoutLog = 6
)

// An edition identifies who may change a node or page in place. Whatever
// carries another edition is shared and gets copied first.
type edition struct{ _ byte }

type page struct {
	by   *edition
	data [pageSize]byte
}

type node struct {
	by    *edition
	kids  [fanout]*node
	pages [fanout]*page // in a leaf
}

// pageTree is a sparse persistent array of pages: copying it is free, and a
// change copies one path. The zero value is empty and read-only.
type pageTree struct {
	root   *node
	height uint // levels of inner nodes above the leaves
	by     *edition
}

// frozen returns a copy that nobody changes any more, and makes t copy what
// it shares with that.
func (t *pageTree) frozen() pageTree {
	c := pageTree{root: t.root, height: t.height}
	if t.by != nil {
		t.by = new(edition)
	}
	return c
}

// writable returns a copy of a frozen tree that can be changed.
func (t pageTree) writable() pageTree {
	return pageTree{root: t.root, height: t.height, by: new(edition)}
}

func (t *pageTree) reaches(i int64) bool {
	return t.root != nil && uint64(i)>>(fanoutLog*(t.height+1)) == 0
}

// get returns page i, or nil if it is all zeros.
func (t *pageTree) get(i int64) *page {
	if !t.reaches(i) {
		return nil
	}
	n := t.root
	for h := t.height; h > 0; h-- {
		n = n.kids[uint64(i)>>(fanoutLog*h)%fanout]
		if n == nil {
			return nil
		}
	}
	return n.pages[uint64(i)%fanout]
}

// leaf returns the node that holds page i, ready to be changed.
func (t *pageTree) leaf(i int64) *node {
	if t.root == nil {
		t.root = &node{by: t.by}
	}
	for !t.reaches(i) {
		up := &node{by: t.by}
		up.kids[0] = t.root
		t.root = up
		t.height++
	}
	at := &t.root
	for h := t.height; ; h-- {
		switch {
		case *at == nil:
			*at = &node{by: t.by}
		case (*at).by != t.by:
			c := **at
			c.by = t.by
			*at = &c
		}
		if h == 0 {
			return *at
		}
		at = &(*at).kids[uint64(i)>>(fanoutLog*h)%fanout]
	}
}

// edit returns page i, ready to be changed.
func (t *pageTree) edit(i int64) *page {
	at := &t.leaf(i).pages[uint64(i)%fanout]
	switch {
	case *at == nil:
		*at = &page{by: t.by}
	case (*at).by != t.by:
		c := **at
		c.by = t.by
		*at = &c
	}
	return *at
}

// drop makes page i all zeros.
func (t *pageTree) drop(i int64) {
	if t.get(i) != nil {
		t.leaf(i).pages[uint64(i)%fanout] = nil
	}
}

// stored returns the numbers of the pages in [from, to) that are there, in
// order, at most max of them.
func (t *pageTree) stored(from, to int64, max int) []int64 {
	var found []int64
	var walk func(n *node, h uint, first int64)
	walk = func(n *node, h uint, first int64) {
		span := int64(1) << (fanoutLog * h)
		for k := range int64(fanout) {
			lo := first + k*span
			if lo+span <= from {
				continue
			}
			if lo >= to || len(found) >= max {
				return
			}
			if h > 0 {
				if n.kids[k] != nil {
					walk(n.kids[k], h-1, lo)
				}
			} else if n.pages[k] != nil {
				found = append(found, lo)
			}
		}
	}
	if t.root != nil {
		walk(t.root, t.height, 0)
	}
	return found
}
