package qcow2

// A spare is clusters at the end of the file that were never written, and whose
// refcounts were raised ahead of their use. Once these are durable, a new
// mapping to such a cluster needs no Sync before it: whatever a crash leaves of
// the data, each sector is zeros, as before, or what was written. A crash leaks
// what is left of them; everything else that looks at refcounts gives them back
// first.
type spare struct {
	settled span // with durable refcounts
	next    span // durable after the next flushNew
}

// spareBytes is how much is raised at a time.
const spareBytes = 1 << 20

// takeData allocates a cluster for data. settled tells that its refcount is
// durable and its content zeros in any crash state.
func (im *Image) takeData() (off uint64, zeroed, settled bool, err error) {
	s := &im.spare
	for _, from := range []*span{&s.settled, &s.next} {
		if from.n > 0 {
			off = from.first << im.geo.bits
			from.first, from.n = from.first+1, from.n-1
			return off, true, from == &s.settled, nil
		}
	}
	off, zeroed, err = im.take(1, metaNone)
	if err == nil && zeroed {
		err = im.takeAhead(off>>im.geo.bits + 1)
	}
	return off, zeroed, false, err
}

// takeAhead raises refcounts from cluster first on, as far as there is a
// refcount block, room in the file, and nothing was written.
func (im *Image) takeAhead(first uint64) error {
	end := first + min(uint64(spareBytes)>>im.geo.bits, 256)
	end = min(end, (first-1)>>im.geo.rbBits<<im.geo.rbBits+uint64(1)<<im.geo.rbBits)
	if end <= first || first < im.alloc.virgin {
		return nil
	}
	c := first
	for ; c < end; c++ {
		rc, err := im.refcount(c)
		if err != nil {
			return err
		}
		if rc != 0 || im.meta.get(c) != metaNone || im.alloc.isReserved(c) {
			break
		}
	}
	end = c
	if end == first || im.growFile(end<<im.geo.bits) != nil && im.fail.Load() == nil {
		return nil
	}
	for c := first; c < end; c++ {
		if err := im.setRefcount(c, 1); err != nil {
			return err
		}
	}
	im.alloc.virgin = end
	im.spare.next = span{first, end - first}
	return nil
}

// settleSpare runs when refcounts are durable.
func (im *Image) settleSpare() {
	if s := &im.spare; s.settled.n == 0 {
		s.settled, s.next = s.next, span{}
	}
}

// releaseSpare gives the clusters back.
func (im *Image) releaseSpare() error {
	s := im.spare
	im.spare = spare{}
	for _, r := range []span{s.next, s.settled} {
		for c := r.first; c < r.first+r.n; c++ {
			if err := im.setRefcount(c, 0); err != nil {
				return im.poison(err)
			}
		}
		if r.n > 0 && im.alloc.virgin == r.first+r.n {
			im.alloc.virgin = r.first
		}
	}
	return nil
}
