package nvstore

import "sync"

// A group lets Blobs that are synced at the same time share a commit: who comes
// while one runs shares the next.
type group struct {
	run  sync.Mutex
	mu   sync.Mutex
	next *batch
}

// A batch is the Blobs of one commit, each with how that went.
type batch struct {
	blobs map[*Blob]error
	done  chan struct{}
}

func (g *group) sync(b *Blob) error {
	g.mu.Lock()
	all := g.next
	first := all == nil
	if first {
		all = &batch{blobs: make(map[*Blob]error), done: make(chan struct{})}
		g.next = all
	}
	all.blobs[b] = nil
	g.mu.Unlock()
	if !first {
		<-all.done
		return all.blobs[b]
	}
	g.run.Lock()
	g.mu.Lock()
	g.next = nil // from here on it is too late to join
	g.mu.Unlock()
	all.sync(b.s)
	g.run.Unlock()
	close(all.done)
	return all.blobs[b]
}

// sync commits the Blobs together, or if that fails, each by itself, so that
// none has another's error.
func (all *batch) sync(s *Store) {
	if len(all.blobs) == 1 {
		for b := range all.blobs {
			all.blobs[b] = b.do(0, b.sync)
		}
		return
	}
	// Only batches hold more than one Blob's lock, and they come one after
	// another.
	var dirty []*Blob
	for b := range all.blobs {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch {
		case b.closed:
			all.blobs[b] = ErrClosed
		case b.dirty():
			dirty = append(dirty, b)
		default:
			all.blobs[b] = b.follow(func() error { return nil })
		}
	}
	if len(dirty) == 0 {
		return
	}
	err := s.Update(func(tx *Tx) error {
		for _, b := range dirty {
			if err := b.apply(tx); err != nil {
				return err
			}
		}
		return nil
	})
	for _, b := range dirty {
		if err == nil {
			b.reset(b.size)
		} else {
			all.blobs[b] = b.follow(b.sync)
		}
	}
}
