package luks

import "sync"

// ranges keeps requests that share a sector, one of which writes, in the order
// in which they came. A write of part of a sector rewrites it all, and in some
// modes a sector half old and half new decrypts to neither.
type ranges struct {
	mu   sync.Mutex
	free sync.Cond
	list []*claim // in order of arrival, waiting or at work
}

// A claim is a range of whole sectors, [lo, hi) in bytes.
type claim struct {
	lo, hi int64
	write  bool
}

func (r *ranges) init() { r.free.L = &r.mu }

// take waits until no earlier claim conflicts with c.
func (r *ranges) take(c *claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, c)
	for r.conflict(c) {
		r.free.Wait()
	}
}

func (r *ranges) conflict(c *claim) bool {
	for _, e := range r.list {
		if e == c {
			return false
		}
		if (e.write || c.write) && e.lo < c.hi && c.lo < e.hi {
			return true
		}
	}
	return false
}

func (r *ranges) drop(c *claim) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, e := range r.list {
		if e == c {
			r.list = append(r.list[:i], r.list[i+1:]...)
			break
		}
	}
	if len(r.list) > 0 {
		r.free.Broadcast()
	}
}
