package blobdir

import (
	"bytes"
	"fmt"
	"slices"
	"sort"
)

// A pager loads nodes and takes back those that a change made obsolete.
type pager interface {
	load(k *treeKind, ref reference, level int) (*node, error)
	release(off, length int64)
}

// A tree is a copy-on-write B+ tree. It is empty when its root has neither a
// reference nor a changed node.
type tree struct {
	kind *treeKind
	pg   pager
	root kid
}

func (t *tree) empty() bool   { return t.root.dirty == nil && t.root.ref.length == 0 }
func (t *tree) changed() bool { return t.root.dirty != nil }

func (t *tree) node(c *kid, level int) (*node, error) {
	if c.dirty != nil {
		return c.dirty, nil
	}
	return t.pg.load(t.kind, c.ref, level)
}

// child returns kid i of n, and checks that its first key is the one n says.
func (t *tree) child(n *node, i int) (*node, error) {
	c, err := t.node(&n.kids[i], n.level-1)
	if err != nil {
		return nil, err
	}
	return c, t.kind.between(c, n.keys[i], n.limit(i, nil), n.kids[i].ref.off)
}

// limit returns the key that all below kid i must be less than; last bounds
// the node itself, and nil is no bound.
func (n *node) limit(i int, last []byte) []byte {
	if i+1 < len(n.keys) {
		return n.keys[i+1]
	}
	return last
}

// between checks that a child's keys begin where its parent says, and end
// before its neighbour's.
func (k *treeKind) between(c *node, first, limit []byte, off int64) error {
	if len(c.keys) == 0 { // a tree's root may be empty, and it may be in the cache as one
		return corrupt(off, "R34", k.name, "items", 0, "at least one, except in an empty tree's root")
	}
	if !bytes.Equal(c.keys[0], first) {
		return corrupt(off, "R33", k.name, "key", nil, "the first key that the parent names")
	}
	if limit != nil && bytes.Compare(c.keys[len(c.keys)-1], limit) >= 0 {
		return corrupt(off, "R35", k.name, "key", nil, "keys before those of the next child")
	}
	return nil
}

// edit returns kid i of n (or the root) for changing.
func (t *tree) edit(c *kid, n *node) (*node, error) {
	if c.dirty != nil {
		return c.dirty, nil
	}
	t.pg.release(c.ref.off, c.ref.blocks())
	c.dirty, c.ref = n.clone(), reference{}
	return c.dirty, nil
}

// search returns where key is or belongs.
func (n *node) search(key []byte) (int, bool) {
	i := sort.Search(len(n.keys), func(i int) bool { return bytes.Compare(n.keys[i], key) >= 0 })
	return i, i < len(n.keys) && bytes.Equal(n.keys[i], key)
}

// below returns the kid that key belongs under.
func (n *node) below(key []byte) int {
	i, found := n.search(key)
	if !found && i > 0 {
		i--
	}
	return i
}

// get returns the item with this key, and the offset of its leaf; nil if
// there is none.
func (t *tree) get(key []byte) (item []byte, off int64, err error) {
	if t.empty() {
		return nil, 0, nil
	}
	n, err := t.node(&t.root, -1)
	for err == nil && n.level > 0 {
		n, err = t.child(n, n.below(key))
	}
	if err != nil {
		return nil, 0, err
	}
	if i, found := n.search(key); found {
		return n.items[i], n.ref.off, nil
	}
	return nil, 0, nil
}

// before returns the last item whose key is less, or nil.
func (t *tree) before(key []byte) (item []byte, err error) {
	if t.empty() {
		return nil, nil
	}
	n, err := t.node(&t.root, -1)
	for err == nil && n.level > 0 {
		i, _ := n.search(key)
		n, err = t.child(n, max(i-1, 0))
	}
	if err != nil {
		return nil, err
	}
	if i, _ := n.search(key); i > 0 {
		return n.items[i-1], nil
	}
	return nil, nil
}

// ascend calls fn for each item from key on, until it returns false.
func (t *tree) ascend(from []byte, fn func(key, item []byte) (bool, error)) error {
	if t.empty() {
		return nil
	}
	n, err := t.node(&t.root, -1)
	if err != nil {
		return err
	}
	_, err = t.ascendNode(n, from, fn)
	return err
}

func (t *tree) ascendNode(n *node, from []byte, fn func(key, item []byte) (bool, error)) (more bool, err error) {
	if n.level == 0 {
		i, _ := n.search(from)
		for ; i < len(n.keys); i++ {
			if more, err := fn(n.keys[i], n.items[i]); !more || err != nil {
				return false, err
			}
		}
		return true, nil
	}
	for i := n.below(from); i < len(n.kids); i++ {
		c, err := t.child(n, i)
		if err != nil {
			return false, err
		}
		if more, err := t.ascendNode(c, from, fn); !more || err != nil {
			return false, err
		}
	}
	return true, nil
}

// put inserts or replaces an item.
func (t *tree) put(key, item []byte) error {
	if t.empty() {
		t.root.dirty = &node{kind: t.kind, size: nodeOverhead}
	}
	n, err := t.node(&t.root, -1)
	if err != nil {
		return err
	}
	if n, err = t.edit(&t.root, n); err != nil {
		return err
	}
	right, err := t.insert(n, key, item)
	if err != nil || right == nil {
		return err
	}
	if n.level == maxLevel {
		return fmt.Errorf("%w: the %s has more than %d levels", ErrInvalid, t.kind.name, maxLevel)
	}
	top := &node{kind: t.kind, level: n.level + 1, keys: [][]byte{n.keys[0], right.keys[0]}, kids: []kid{{dirty: n}, {dirty: right}}}
	top.recount()
	t.root.dirty = top
	return nil
}

// insert puts an item below n, which is changed, and returns the new right
// half if n had to split.
func (t *tree) insert(n *node, key, item []byte) (right *node, err error) {
	if n.level == 0 {
		i, found := n.search(key)
		if found {
			n.size += len(item) - len(n.items[i])
			n.items[i] = item
		} else {
			n.keys = slices.Insert(n.keys, i, key)
			n.items = slices.Insert(n.items, i, item)
			n.size += len(item)
		}
		return n.split(i == len(n.keys)-1), nil
	}
	i := n.below(key)
	c, err := t.child(n, i)
	if err != nil {
		return nil, err
	}
	if c, err = t.edit(&n.kids[i], c); err != nil {
		return nil, err
	}
	half, err := t.insert(c, key, item)
	if err != nil {
		return nil, err
	}
	n.keys[i] = c.keys[0]
	if half != nil {
		n.keys = slices.Insert(n.keys, i+1, half.keys[0])
		n.kids = slices.Insert(n.kids, i+1, kid{dirty: half})
	}
	n.recount()
	return n.split(i == len(n.kids)-2), nil
}

// split moves the upper part of n to a new node if n is too large. Where
// items are added at the end, the lower part stays nearly full.
func (n *node) split(atEnd bool) *node {
	if n.size <= maxNode {
		return nil
	}
	weight := func(i int) int {
		if n.level == 0 {
			return len(n.items[i])
		}
		return childSize(n.keys[i])
	}
	goal := n.size / 2
	if atEnd {
		goal = maxNode
	}
	at, sum := 0, nodeOverhead
	for at < len(n.keys)-1 && (at == 0 || sum+weight(at) <= goal) {
		sum += weight(at)
		at++
	}
	r := &node{kind: n.kind, level: n.level, keys: slices.Clone(n.keys[at:])}
	n.keys = n.keys[:at:at]
	if n.level == 0 {
		r.items = slices.Clone(n.items[at:])
		n.items = n.items[:at:at]
	} else {
		r.kids = slices.Clone(n.kids[at:])
		n.kids = n.kids[:at:at]
	}
	n.recount()
	r.recount()
	return r
}

// del removes an item, and tells whether it was there.
func (t *tree) del(key []byte) (bool, error) {
	item, _, err := t.get(key)
	if item == nil || err != nil {
		return false, err
	}
	n, err := t.node(&t.root, -1)
	if err != nil {
		return false, err
	}
	if n, err = t.edit(&t.root, n); err != nil {
		return false, err
	}
	if err := t.remove(n, key); err != nil {
		return false, err
	}
	for n.level > 0 && len(n.kids) == 1 {
		t.root = n.kids[0]
		if n = t.root.dirty; n == nil {
			return true, nil
		}
	}
	if len(n.keys) == 0 && t.kind != directoryTree {
		t.root = kid{}
	}
	return true, nil
}

func (t *tree) remove(n *node, key []byte) error {
	if n.level == 0 {
		i, _ := n.search(key)
		n.size -= len(n.items[i])
		n.keys = slices.Delete(n.keys, i, i+1)
		n.items = slices.Delete(n.items, i, i+1)
		return nil
	}
	i := n.below(key)
	c, err := t.child(n, i)
	if err != nil {
		return err
	}
	if c, err = t.edit(&n.kids[i], c); err != nil {
		return err
	}
	if err := t.remove(c, key); err != nil {
		return err
	}
	if len(c.keys) == 0 {
		n.keys = slices.Delete(n.keys, i, i+1)
		n.kids = slices.Delete(n.kids, i, i+1)
	} else {
		n.keys[i] = c.keys[0]
		if err := t.merge(n, i); err != nil {
			return err
		}
	}
	n.recount()
	return nil
}

// merge joins kid i of n with a neighbour if the two fill well less than one
// node, so that trees shrink as they are emptied.
func (t *tree) merge(n *node, i int) error {
	if n.kids[i].dirty.size >= maxNode/4 || len(n.kids) == 1 {
		return nil
	}
	l := max(i-1, 0)
	a, err := t.child(n, l)
	if err != nil {
		return err
	}
	b, err := t.child(n, l+1)
	if err != nil || a.size+b.size-nodeOverhead > maxNode*3/4 {
		return err
	}
	if a, err = t.edit(&n.kids[l], a); err != nil {
		return err
	}
	if b, err = t.edit(&n.kids[l+1], b); err != nil {
		return err
	}
	a.keys = append(a.keys, b.keys...)
	a.items = append(a.items, b.items...)
	a.kids = append(a.kids, b.kids...)
	a.recount()
	n.keys = slices.Delete(n.keys, l+1, l+2)
	n.kids = slices.Delete(n.kids, l+1, l+2)
	return nil
}

// countDirty returns the number of nodes that a commit must write.
func (t *tree) countDirty() int64 { return t.root.countDirty() }

func (c *kid) countDirty() int64 {
	if c.dirty == nil {
		return 0
	}
	total := int64(1)
	for i := range c.dirty.kids {
		total += c.dirty.kids[i].countDirty()
	}
	return total
}
