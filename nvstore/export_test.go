package nvstore

// Joined returns how many Blobs wait for the commit after the one under way.
func (s *Store) Joined() int {
	s.group.mu.Lock()
	defer s.group.mu.Unlock()
	if s.group.next == nil {
		return 0
	}
	return len(s.group.next.blobs)
}

// Leads tells whether a Blob's commit is under way, which none can join.
func (s *Store) Leads() bool {
	s.group.mu.Lock()
	defer s.group.mu.Unlock()
	if s.group.next != nil {
		return false
	}
	if s.group.run.TryLock() {
		s.group.run.Unlock()
		return false
	}
	return true
}
