package qcow2

import (
	"maps"
	"slices"
	"sync"
)

// A table is a cached cluster of metadata: an L2 table or a refcount block.
// Its bytes change only under the image's write lock.
type table struct {
	off    uint64
	buf    []byte
	lo, hi int // dirty bytes; hi is 0 if the table is clean

	// fresh: nothing durable refers to the table yet, so it may be
	// written at any time.
	fresh bool
	// owned: the table's refcount was seen to be one.
	owned bool

	prev, next *table
}

func (t *table) dirty() bool { return t.hi > 0 }

// touch marks [lo, hi) dirty, in whole sectors.
func (c *cache) touch(t *table, lo, hi int) {
	lo, hi = lo&^(sector-1), (hi+sector-1)&^(sector-1)
	if !t.dirty() {
		t.lo, t.hi = lo, hi
		c.dirty[t.off] = t
		return
	}
	t.lo, t.hi = min(t.lo, lo), max(t.hi, hi)
}

func (c *cache) clean(t *table) {
	t.lo, t.hi = 0, 0
	delete(c.dirty, t.off)
}

// dirtyTables returns the dirty tables by offset, so that the order of writes
// is the same in every run.
func (c *cache) dirtyTables() []*table {
	out := make([]*table, 0, len(c.dirty))
	for _, off := range slices.Sorted(maps.Keys(c.dirty)) {
		out = append(out, c.dirty[off])
	}
	return out
}

// A cache holds tables, least recently used last. Readers share it under the
// image's read lock, so it has a lock of its own.
type cache struct {
	mu    sync.Mutex
	max   int
	m     map[uint64]*table
	head  table             // of the ring; next is the most recent
	dirty map[uint64]*table // guarded by the image's lock
}

// tableOverhead is roughly what a table costs in memory besides its bytes.
const tableOverhead = 256

func newCache(budget int64, cs uint64) *cache {
	c := &cache{max: int(max(2, budget/int64(cs+tableOverhead)))}
	c.reset()
	return c
}

// reset forgets everything.
func (c *cache) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.m = make(map[uint64]*table)
	c.dirty = make(map[uint64]*table)
	c.head.prev, c.head.next = &c.head, &c.head
}

func (t *table) unlink() {
	t.prev.next, t.next.prev = t.next, t.prev
}

func (c *cache) pushFront(t *table) {
	t.prev, t.next = &c.head, c.head.next
	t.prev.next, t.next.prev = t, t
}

// get returns the table at off, calling load if it isn't cached. Where the
// cache is full of dirty tables the result isn't kept.
func (c *cache) get(off uint64, load func(off uint64) ([]byte, error)) (*table, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if t := c.m[off]; t != nil {
		t.unlink()
		c.pushFront(t)
		return t, nil
	}
	buf, err := load(off)
	if err != nil {
		return nil, err
	}
	t := &table{off: off, buf: buf}
	if len(c.m) >= c.max && !c.evictClean() {
		return t, nil
	}
	c.m[off] = t
	c.pushFront(t)
	return t, nil
}

// put adds t, replacing a stale table of the same offset. The caller made
// room.
func (c *cache) put(t *table) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(t.off)
	c.m[t.off] = t
	c.pushFront(t)
}

// drop forgets the table at off.
func (c *cache) drop(off uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(off)
}

func (c *cache) remove(off uint64) {
	if t := c.m[off]; t != nil {
		t.unlink()
		delete(c.m, off)
		delete(c.dirty, off)
	}
}

// evictClean drops the least recently used clean table.
func (c *cache) evictClean() bool {
	for t := c.head.prev; t != &c.head; t = t.prev {
		if !t.dirty() {
			c.remove(t.off)
			return true
		}
	}
	return false
}

// dropClean forgets all clean tables.
func (c *cache) dropClean() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for t := c.head.next; t != &c.head; {
		next := t.next
		if !t.dirty() {
			c.remove(t.off)
		}
		t = next
	}
}

// oldest returns the least recently used table if the cache is full, or nil.
func (c *cache) oldest() *table {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.m) < c.max {
		return nil
	}
	return c.head.prev
}
