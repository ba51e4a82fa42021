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
