package blobdir

import (
	"errors"

	"nvstore.dev/image"
)

// A discard costs many times the write that it follows, so they come late, in
// bulk, and leave a reserve of allocated blocks for the next commits.
const (
	trimReserve   = 1 << 20
	trimThreshold = 4 << 20
)

// trim discards free extents that neither root needs. Like a commit it first
// looks whether the image is still the one that this handle knows: after a
// revert, what it thinks free may be in use.
func (d *Dir) trim() error {
	st := d.st.Load()
	dis, ok := image.As[image.Discarder](d.dev)
	if !ok || st.free == nil {
		return nil
	}
	s := space{tx: &Tx{d: d, st: st, oldest: d.oldestReader()}, node: *st.free}
	s.node.extents = append([]freeExtent(nil), st.free.extents...)
	total := int64(0)
	for _, e := range s.node.extents {
		if e.freed > 0 && s.usable(e.freed) {
			total += e.length
		}
	}
	if total < trimThreshold {
		return nil
	}
	if err := s.tx.unchanged(); err != nil {
		return err
	}
	for i := len(s.node.extents) - 1; i >= 0 && total > trimReserve; i-- {
		e := &s.node.extents[i]
		if e.freed == 0 || !s.usable(e.freed) {
			continue
		}
		err := dis.Discard(e.off, e.length)
		if errors.Is(err, image.ErrUnsupported) {
			return nil
		}
		if err != nil {
			return d.poison(err)
		}
		total -= e.length
		e.freed = 0 // the next commit makes it known
	}
	if err := d.dev.Sync(); err != nil {
		return d.poison(err)
	}
	if err := s.tx.unchanged(); err != nil {
		return err
	}
	after := *st
	after.free = &s.node
	d.st.Store(&after)
	return nil
}
