package qcow2

import (
	"maps"
	"slices"
	"sync"
)

// A table is a cached cluster of metadata: an L2 table or a refcount block.
// Its bytes change only with the image's tables locked.
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

// clean marks t as written. Others may be looking for tables to evict.
func (c *cache) clean(t *table) {
	delete(c.dirty, t.off)
	c.mu.Lock()
	defer c.mu.Unlock()
	t.lo, t.hi = 0, 0
	c.written++
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

// A cache holds tables, least recently used last. Those who hold the lock of
// the image's tables for reading share it, so it has a lock of its own, which
// nobody holds while a table is read from the file.
type cache struct {
	mu      sync.Mutex
	max     int
	m       map[uint64]*table
	head    table               // of the ring; next is the most recent
	loading map[uint64]*loading // tables that are being read by fetch
	written uint64              // how often a table was written

	dirty map[uint64]*table // guarded by Image.change
}

// A loading is a table on its way.
type loading struct {
	done chan struct{}
	err  error
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
	c.loading = make(map[uint64]*loading)
	c.head.prev, c.head.next = &c.head, &c.head
}

func (t *table) unlink() {
	t.prev.next, t.next.prev = t.next, t.prev
}

func (c *cache) pushFront(t *table) {
	t.prev, t.next = &c.head, c.head.next
	t.prev.next, t.next.prev = t, t
}

// peek returns the table at off if it is cached.
func (c *cache) peek(off uint64) *table {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lookup(off)
}

func (c *cache) lookup(off uint64) *table {
	t := c.m[off]
	if t != nil && c.head.next != t {
		t.unlink()
		c.pushFront(t)
	}
	return t
}

// get returns the table at off, calling load if it isn't cached. The caller
// holds the lock of the image's tables. Where the cache is full of dirty tables
// the result isn't kept.
func (c *cache) get(off uint64, load func(off uint64) ([]byte, error)) (*table, error) {
	if t := c.peek(off); t != nil {
		return t, nil
	}
	buf, err := load(off)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.insert(off, buf), nil
}

func (c *cache) insert(off uint64, buf []byte) *table {
	if t := c.m[off]; t != nil {
		return t
	}
	t := &table{off: off, buf: buf}
	if len(c.m) < c.max || c.evictClean() {
		c.m[off] = t
		c.pushFront(t)
	}
	return t
}

// fetch makes the table at off cached, if there is room, without a lock while
// it is read: once, if several want it. What tab guards may change before the
// caller holds tab again.
func (c *cache) fetch(off uint64, tab *sync.RWMutex, load func(off uint64) ([]byte, error)) error {
	c.mu.Lock()
	if l := c.loading[off]; l != nil {
		c.mu.Unlock()
		<-l.done
		return l.err
	}
	l := &loading{done: make(chan struct{})}
	c.loading[off] = l
	written := c.written
	c.mu.Unlock()

	var buf []byte
	buf, l.err = load(off)

	tab.RLock()
	defer tab.RUnlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.loading, off)
	close(l.done)
	// What was read may be older than what somebody else changed, wrote
	// and evicted since.
	if l.err == nil && c.written == written {
		c.insert(off, buf)
	}
	return l.err
}

// put adds t, replacing a stale table of the same offset. The caller made
// room.
func (c *cache) put(t *table) {
	delete(c.dirty, t.off)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(t.off)
	c.m[t.off] = t
	c.pushFront(t)
}

// drop forgets the table at off.
func (c *cache) drop(off uint64) {
	delete(c.dirty, off)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(off)
}

func (c *cache) remove(off uint64) {
	if t := c.m[off]; t != nil {
		t.unlink()
		delete(c.m, off)
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
