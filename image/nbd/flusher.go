package nbd

import "sync"

// A flusher lets many who wait for a Sync share one: who comes while one runs
// shares the next.
type flusher struct {
	run  sync.Mutex
	mu   sync.Mutex
	next *flush
}

type flush struct {
	done chan struct{}
	err  error
}

// sync returns what a call of do returned that began after sync was called.
func (f *flusher) sync(do func() error) error {
	f.mu.Lock()
	if b := f.next; b != nil {
		f.mu.Unlock()
		<-b.done
		return b.err
	}
	b := &flush{done: make(chan struct{})}
	f.next = b
	f.mu.Unlock()

	f.run.Lock()
	f.mu.Lock()
	f.next = nil // from here on it is too late to join
	f.mu.Unlock()
	b.err = do()
	f.run.Unlock()
	close(b.done)
	return b.err
}
