package imagetest

import (
	"fmt"
	"slices"
	"sort"
)

// A plan is what is in flight at one point of the log.
type plan struct {
	at      int
	opts    CrashOptions
	base    content // durable, frozen
	pending []int64 // resizes before first
	first   int     // number of ops[0]
	ops     []Op

	layouts []*layout // by how many resizes survive
}

// A layout is what the sectors may hold, given the resizes that survive.
type layout struct {
	base  content // frozen
	slots []slot  // by sector
}

type slot struct {
	sector   int64
	was      uint64 // hash of the durable content
	versions []version
}

type version struct {
	op   int
	hash uint64
	data []byte // 512 bytes, or nil for zeros
}

// plan needs the medium locked.
func (m *medium) plan(at int) *plan {
	if at < 0 || at > len(m.log) {
		panic(fmt.Sprintf("imagetest: no position %d in a log of %d operations", at, len(m.log)))
	}
	i := sort.Search(len(m.synced), func(i int) bool { return m.synced[i].at > at }) - 1
	c := m.synced[i]
	p := &plan{at: at, opts: m.opts, base: c.base, pending: c.pending, first: c.at, ops: m.log[c.at:at]}
	p.layouts = make([]*layout, len(p.sizes())+1)
	return p
}

// sizes returns the resizes in flight.
func (p *plan) sizes() []int64 {
	s := slices.Clone(p.pending)
	for _, op := range p.ops {
		if op.Kind == OpResize {
			s = append(s, op.Len)
		}
	}
	return s
}

// layout returns the layout in which the first n resizes survive.
func (p *plan) layout(n int) *layout {
	if p.layouts[n] != nil {
		return p.layouts[n]
	}
	base := p.base.writable()
	slots := map[int64]*slot{}
	left := n
	resize := func(size int64) {
		if left == 0 {
			return
		}
		left--
		trim(slots, size)
		base.resize(size)
	}
	for _, size := range p.pending {
		resize(size)
	}
	for i, op := range p.ops {
		if op.Kind == OpResize {
			resize(op.Len)
		}
		for _, w := range op.secs {
			s := slots[w.sector]
			if s == nil {
				s = &slot{sector: w.sector}
				slots[w.sector] = s
			}
			s.versions = append(s.versions, version{p.first + i, sectorHash(w.sector, w.data), w.data})
		}
	}
	trim(slots, base.size) // what lies past a size that was lost
	l := &layout{base: base.frozen()}
	for _, s := range slots {
		s.was = sectorHash(s.sector, l.base.sector(s.sector))
		if slices.ContainsFunc(s.versions, func(v version) bool { return v.hash != s.was }) {
			l.slots = append(l.slots, *s)
		}
	}
	sort.Slice(l.slots, func(i, j int) bool { return l.slots[i].sector < l.slots[j].sector })
	p.layouts[n] = l
	return l
}

// trim cuts off at size what the sectors may hold.
func trim(slots map[int64]*slot, size int64) {
	for i, s := range slots {
		keep := size - i*sectorSize
		if keep <= 0 {
			delete(slots, i)
			continue
		}
		if keep >= sectorSize {
			continue
		}
		for k := range s.versions {
			v := &s.versions[k]
			if v.data != nil {
				v.data = slices.Clone(v.data)
				clear(v.data[keep:])
				v.hash = sectorHash(i, v.data)
			}
		}
	}
}

// inFlight returns how many distinct writes of a sector are undecided.
func (p *plan) inFlight() int {
	most := 0
	for n := range p.layouts {
		sum := 0
		for _, s := range p.layout(n).slots {
			sum += len(s.distinct())
		}
		most = max(most, sum)
	}
	return most
}

// distinct returns the versions that differ from what is durable and from each
// other.
func (s *slot) distinct() []version {
	var d []version
	for _, v := range s.versions {
		if v.hash != s.was && !slices.ContainsFunc(d, func(o version) bool { return o.hash == v.hash }) {
			d = append(d, v)
		}
	}
	return d
}

// state puts versions over l's base; a nil one leaves what was durable.
func (p *plan) state(l *layout, pick func(i int) *version) *State {
	s := &State{At: p.at, How: "a chosen part", opts: p.opts, base: l.base, sum: l.base.sum}
	for i := range l.slots {
		v := pick(i)
		if v == nil || v.hash == l.slots[i].was {
			continue
		}
		s.sum ^= l.slots[i].was ^ v.hash
		s.changed = append(s.changed, sectorWrite{l.slots[i].sector, v.data})
	}
	c := content{size: l.base.size, sum: s.sum}
	s.Hash = c.hash()
	return s
}

// choose returns the state that keep describes; see StateAt.
func (p *plan) choose(keep func(op int, sector int64) bool) *State {
	n := 0
	for n < len(p.pending) && keep(-1, -1) {
		n++
	}
	if n == len(p.pending) {
		for i, op := range p.ops {
			if op.Kind != OpResize {
				continue
			}
			if !keep(p.first+i, -1) {
				break
			}
			n++
		}
	}
	l := p.layout(n)
	return p.state(l, func(i int) *version {
		s := &l.slots[i]
		for k := len(s.versions) - 1; k >= 0; k-- {
			if keep(s.versions[k].op, s.sector) {
				return &s.versions[k]
			}
		}
		return nil
	})
}

// each gives every combination, and reports whether yield wanted them all.
func (p *plan) each(yield func(*State) bool) bool {
	number := 0
	for n := range p.layouts {
		l := p.layout(n)
		choices := make([][]version, len(l.slots))
		for i := range l.slots {
			choices[i] = l.slots[i].distinct()
		}
		for at := make([]int, len(choices)); at != nil; at = next(at, choices) {
			s := p.state(l, func(i int) *version {
				if at[i] == 0 {
					return nil
				}
				return &choices[i][at[i]-1]
			})
			s.How = fmt.Sprintf("combination %d", number)
			number++
			if !yield(s) {
				return false
			}
		}
	}
	return true
}

// next counts up; nil after the last.
func next(at []int, choices [][]version) []int {
	for i := range at {
		if at[i]++; at[i] <= len(choices[i]) {
			return at
		}
		at[i] = 0
	}
	return nil
}
