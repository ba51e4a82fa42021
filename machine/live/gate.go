package live

// A Gate keeps commits and snapshots apart for a service that opens the store by
// itself, as through an export that somebody else made: Machine.Save and Load, of
// this process and others, wait for its commits, and its commits for them.
type Gate struct{ lock *imageLock }

// OpenGate opens the gate of an image: the file at the bottom of QEMU's node with
// the store. Where files can't be locked, it is open to all.
func OpenGate(path string) (*Gate, error) {
	l := newImageLock(path)
	if l.err != nil {
		return nil, l.err
	}
	return &Gate{l}, nil
}

// Pass waits while a snapshot is taken or loaded, for at most a minute, and tells
// until leave that a commit is under way. It is nvstore.Options' Gate.
func (g *Gate) Pass() (leave func()) { return g.lock.pass() }

// Close ends the use of the gate.
func (g *Gate) Close() error {
	g.lock.close()
	return nil
}
