package imagetest

import (
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
)

// StateConfig says which of the legal crash states to enumerate. Nil means the
// zero value.
type StateConfig struct {
	// Exhaustive is the most writes of a sector in flight for which every
	// combination is given, 2 to this power at most: 0 means 12, negative
	// means never. With more in flight these are given: nothing,
	// everything, each operation missing, each alone, each prefix, and
	// Samples random ones.
	Exhaustive int

	// Samples is how many random states to add where there are too many.
	// They take turns: whole operations, single sectors, a prefix with the
	// last operation torn, all but a few sectors, and few sectors only.
	Samples int

	// Seed makes the samples; print it.
	Seed uint64

	// Seen, if not nil, holds hashes of states to leave out, and takes
	// those given. Empty it when what the application has promised
	// changes: a state that was right before an acknowledgement may be
	// wrong after it.
	Seen map[uint64]bool
}

// A State is one content that a power cut could leave.
type State struct {
	At   int    // how many operations of the log had been done
	How  string // what survived, for a test's message
	Hash uint64 // of size and content

	opts    CrashOptions
	base    content // frozen
	sum     uint64
	changed []sectorWrite // against base
}

// Open returns the state as a device of its own, after the power came back:
// all durable, an empty log. It costs by the pages that differ from what was
// durable before. It is safe to call from several goroutines.
func (s *State) Open() *CrashDevice { return openContent(s.content().writable(), s.opts) }

func (s *State) String() string {
	return fmt.Sprintf("power cut before op %d, %s survived (state %016x)", s.At, s.How, s.Hash)
}

func (s *State) content() content {
	c := s.base.writable()
	for _, w := range s.changed {
		at := w.sector % sectorsPerPage * sectorSize
		dst := c.tree.edit(w.sector / sectorsPerPage).data[at : at+sectorSize]
		clear(dst)
		copy(dst, w.data)
	}
	c.sum = s.sum
	return c.frozen()
}

// StateAt returns the state after a power cut when the first at operations of
// the log had been done (0 to Len). For each sector, the last operation in
// flight for which keep returns true is what is there; nil keeps nothing. For
// a Resize keep is called with sector -1, and the first that isn't kept ends
// the changes of size. op is -1 for one left over from a failed Sync.
func (d *CrashDevice) StateAt(at int, keep func(op int, sector int64) bool) *State {
	d.m.mu.Lock()
	p := d.m.plan(at)
	d.m.mu.Unlock()
	if keep == nil {
		keep = keepNone
	}
	return p.choose(keep)
}

func keepAll(int, int64) bool  { return true }
func keepNone(int, int64) bool { return false }

// CrashStates gives the distinct states that a power cut could leave when the
// first at operations of the log had been done (0 to Len). The states of a cut
// include those of all cuts before it since the last Sync.
func (d *CrashDevice) CrashStates(at int, cfg *StateConfig) iter.Seq[*State] {
	if cfg == nil {
		cfg = &StateConfig{}
	}
	d.m.mu.Lock()
	p := d.m.plan(at)
	d.m.mu.Unlock()
	return func(yield func(*State) bool) {
		seen := cfg.Seen
		if seen == nil {
			seen = map[uint64]bool{}
		}
		fresh := func(s *State) bool {
			if seen[s.Hash] {
				return true
			}
			seen[s.Hash] = true
			return yield(s)
		}
		limit := cfg.Exhaustive
		if limit == 0 {
			limit = 12
		}
		if p.inFlight() <= limit {
			p.each(fresh)
		} else if p.eachNotable(fresh) {
			p.sample(cfg.Samples, cfg.Seed, fresh)
		}
	}
}

// eachNotable gives the states at the granularity of operations.
func (p *plan) eachNotable(yield func(*State) bool) bool {
	give := func(how string, keep func(int, int64) bool) bool {
		s := p.choose(keep)
		s.How = how
		return yield(s)
	}
	if !give("nothing", keepNone) || !give("everything", keepAll) {
		return false
	}
	for _, x := range p.opNumbers() {
		if !give(fmt.Sprintf("all but op %d", x), func(op int, _ int64) bool { return op != x }) ||
			!give(fmt.Sprintf("only op %d", x), func(op int, s int64) bool { return op == x || s < 0 }) ||
			!give(fmt.Sprintf("all up to op %d", x), func(op int, _ int64) bool { return op <= x }) {
			return false
		}
	}
	return true
}

// sample gives n random states.
func (p *plan) sample(n int, seed uint64, yield func(*State) bool) {
	ops := p.opNumbers()
	if len(ops) == 0 {
		return
	}
	rng := rand.New(rand.NewPCG(seed, uint64(p.at)))
	few := 3 / float64(p.inFlight())
	for i := range n {
		var keep func(op int, sector int64) bool
		switch i % 5 {
		case 0: // whole operations
			kept := map[int]bool{}
			for _, x := range ops {
				kept[x] = rng.IntN(2) == 0
			}
			keep = func(op int, _ int64) bool { return kept[op] }
		case 1: // sectors
			keep = func(int, int64) bool { return rng.IntN(2) == 0 }
		case 2: // a prefix, torn
			x := ops[rng.IntN(len(ops))]
			keep = func(op int, _ int64) bool { return op < x || op == x && rng.IntN(2) == 0 }
		case 3: // a few sectors missing
			keep = func(int, int64) bool { return rng.Float64() >= few }
		case 4: // a few sectors only
			keep = func(_ int, s int64) bool { return s < 0 || rng.Float64() < few }
		}
		s := p.choose(keep)
		s.How = fmt.Sprintf("sample %d of seed %d", i, seed)
		if !yield(s) {
			return
		}
	}
}

// opNumbers returns the operations in flight that change anything.
func (p *plan) opNumbers() []int {
	var ops []int
	for i := range p.ops {
		if op := p.ops[i]; op.Kind == OpResize || len(op.secs) > 0 {
			ops = append(ops, p.first+i)
		}
	}
	return slices.Compact(ops)
}
