package imagetest

import "slices"

// Reopen kills the process that has the device open: every call on d from now
// on fails with image.ErrClosed, and the new handle sees the page cache as it
// was, dirty data included. It works on a closed device too.
func (d *CrashDevice) Reopen() *CrashDevice {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	return &CrashDevice{m: d.m}
}

// Share returns a second handle on the same page cache and medium, as a second
// process has that heeds no lock.
func (d *CrashDevice) Share() *CrashDevice { return &CrashDevice{m: d.m} }

// Fork returns a copy of everything: page cache, medium and log. It is cheap.
func (d *CrashDevice) Fork() *CrashDevice {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	return &CrashDevice{m: &medium{
		opts:   m.opts,
		bare:   m.bare,
		cache:  m.cache.frozen().writable(),
		synced: slices.Clip(m.synced),
		log:    slices.Clip(m.log),
		trace:  m.trace,
	}}
}

// PowerCut returns what the medium has after a power cut now: what is durable,
// and of the rest what keep chooses, as in StateAt. The device d goes on as if
// nothing had happened.
func (d *CrashDevice) PowerCut(keep func(op int, sector int64) bool) *CrashDevice {
	return d.StateAt(d.Len(), keep).Open()
}

// LoseSync is a Sync that fails as on Linux: what is dirty is marked clean
// without having reached the medium, except for the sectors that reached
// chooses (nil: none). Reads show it all until DropCache; no later Sync makes
// it durable unless it is written again.
func (d *CrashDevice) LoseSync(reached func(op int, sector int64) bool) {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trace.count(OpSync, 0)
	c := checkpoint{at: len(m.log) + 1}
	if reached == nil {
		p := m.plan(len(m.log))
		c.base, c.pending = p.base, p.sizes()
	} else {
		c.base = m.plan(len(m.log)).choose(func(op int, sector int64) bool {
			return sector < 0 || reached(op, sector)
		}).content()
	}
	m.log = append(m.log, Op{Kind: OpSync, Lost: true})
	m.synced = append(m.synced, c)
}

// Snapshot captures what reads see.
func (d *CrashDevice) Snapshot() *Content {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return &Content{d.m.cache.frozen()}
}

// Revert replaces the whole content underneath whoever has the device open,
// durably, as loading a snapshot in a running QEMU does. c may come from any
// CrashDevice.
func (d *CrashDevice) Revert(c *Content) {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cache = c.content.writable()
	m.log = append(m.log, Op{Kind: OpRevert, Len: c.size})
	m.synced = append(m.synced, checkpoint{at: len(m.log), base: c.content})
}

// Settle makes all that reads see durable and empties the log: a test's
// history starts here.
func (d *CrashDevice) Settle() {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log = nil
	m.synced = []checkpoint{{base: m.cache.frozen()}}
}

// Len returns how many operations the log has. A power cut at Len is one now.
func (d *CrashDevice) Len() int {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return len(d.m.log)
}

// Log returns the logged operations, oldest first.
func (d *CrashDevice) Log() []Op {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return slices.Clip(d.m.log)
}

// Trace returns the counts of operations since the device was made.
func (d *CrashDevice) Trace() Trace {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return d.m.trace
}

// Hash returns the hash of what reads see.
func (d *CrashDevice) Hash() uint64 {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return d.m.cache.hash()
}
