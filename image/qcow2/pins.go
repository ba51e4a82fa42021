package qcow2

import "sync/atomic"

// pins keep a cluster from being used anew while a request that mapped it
// earlier is still reading or writing it, without a lock. A request counts
// itself in the present epoch. Clusters to free wait for the end of all
// requests of the epoch in which they were found to be unused; then there is a
// new one.
type pins struct {
	epoch uint32 // 0 or 1; guarded by Image.change and tab
	n     [2]atomic.Int64
}

// enter pins all that is mapped at present. The caller holds Image.tab.
func (p *pins) enter() (pin uint32) {
	p.n[p.epoch].Add(1)
	return p.epoch
}

func (p *pins) leave(pin uint32) { p.n[pin].Add(-1) }

// quiet tells that no request of the epoch before this one is under way.
func (p *pins) quiet() bool { return p.n[p.epoch^1].Load() == 0 }

// turn begins an epoch. The one before is over.
func (p *pins) turn() { p.epoch ^= 1 }

// A busy is an allocating write between its plan and its end: no other request
// may change the mapping of its clusters.
type busy struct {
	first, last uint64 // guest clusters
	done        chan struct{}
}

// claim waits until no other request changes the mapping of guest clusters
// first to last, and then makes them the caller's. It unlocks the tables while
// it waits.
func (im *Image) claim(first, last uint64) *busy {
	im.await(first, last)
	b := &busy{first, last, make(chan struct{})}
	im.inflight = append(im.inflight, b)
	return b
}

// await is claim without claiming.
func (im *Image) await(first, last uint64) {
	for {
		other := im.claimed(first, last)
		if other == nil {
			return
		}
		im.unlockTables()
		<-other.done
		im.lockTables()
	}
}

// claimed returns a claim of one of the guest clusters first to last.
func (im *Image) claimed(first, last uint64) *busy {
	for _, b := range im.inflight {
		if first <= b.last && b.first <= last {
			return b
		}
	}
	return nil
}

// unclaim ends a claim.
func (im *Image) unclaim(b *busy) {
	for i, o := range im.inflight {
		if o == b {
			last := len(im.inflight) - 1
			im.inflight[i] = im.inflight[last]
			im.inflight[last] = nil
			im.inflight = im.inflight[:last]
			break
		}
	}
	close(b.done)
}
