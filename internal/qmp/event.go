package qmp

import (
	"encoding/json"
	"time"
)

// An Event is what QEMU tells unasked: STOP, RESUME, JOB_STATUS_CHANGE, ...
type Event struct {
	Name string
	Data json.RawMessage // an object, or nil
	Time time.Time       // the host's
}

// A Subscription gets events from when it is made on.
type Subscription struct {
	c      *Client
	names  map[string]bool
	events chan Event
	missed int
}

// Subscribe returns the events of the names given, or all of them. A
// subscriber that doesn't keep up misses the newest ones.
func (c *Client) Subscribe(names ...string) *Subscription {
	s := &Subscription{c: c, events: make(chan Event, eventBuffer)}
	if len(names) > 0 {
		s.names = make(map[string]bool)
	}
	for _, n := range names {
		s.names[n] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.subs == nil {
		close(s.events)
	} else {
		c.subs[s] = struct{}{}
	}
	return s
}

// Events is closed when the connection has ended, or the subscription.
func (s *Subscription) Events() <-chan Event { return s.events }

// Missed returns how many events didn't fit.
func (s *Subscription) Missed() int {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	return s.missed
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.c.mu.Lock()
	defer s.c.mu.Unlock()
	if _, ok := s.c.subs[s]; ok {
		delete(s.c.subs, s)
		close(s.events)
	}
}

// take runs under the client's lock.
func (s *Subscription) take(e Event) {
	if s.names != nil && !s.names[e.Name] {
		return
	}
	select {
	case s.events <- e:
	default:
		s.missed++
	}
}
