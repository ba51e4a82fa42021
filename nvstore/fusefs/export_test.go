package fusefs

import "time"

// SetWriteback changes how often mounts to come commit by themselves, until it
// is undone.
func SetWriteback(d time.Duration) (undo func()) {
	old := writeback
	writeback = d
	return func() { writeback = old }
}

// WriteBack is what a mount does by itself now and then.
func (m *Mount) WriteBack() { m.tree.writeBack() }
