package luks

import (
	"crypto/pbkdf2"
	"fmt"
	"hash"
	"math"
	"time"

	"golang.org/x/crypto/argon2"

	"nvstore.dev/crypto/kdf"
)

// defaultRounds takes about a minute on a slow processor.
const defaultRounds = 1 << 26

// A Budget is what a caller will spend on opening one image, over all the key
// slots that are tried: a header may ask for years. The zero value, and nil,
// stand for the defaults.
type Budget struct {
	// Rounds is the most iterations of PBKDF2, each counted once for every
	// digest's length of output; 0 means 67108864.
	Rounds uint64

	// Argon2 is for Argon2; its Work is the sum over slots. Zero values
	// mean kdf.Budget's defaults, 1 GiB and 16 passes over it.
	Argon2 kdf.Budget
}

// Iterations returns how many of PBKDF2's take about d on this machine, for an
// image of these options; at least 1000.
func Iterations(o *FormatOptions, d time.Duration) (uint32, error) {
	f := formatter{}
	if o != nil {
		f.FormatOptions = *o
	}
	f.defaults()
	newHash, err := findHash(f.Hash, "LUKS options", -1, "Hash")
	if err != nil {
		return 0, err
	}
	n := minIterations
	for {
		start := time.Now()
		if _, err := pbkdf2.Key(newHash, "measure", make([]byte, v1Salt), n, max(1, f.KeySize)); err != nil {
			return 0, err
		}
		took := time.Since(start)
		if took >= 20*time.Millisecond || n >= 1<<26 {
			want := float64(n) * float64(d) / float64(max(took, 1))
			return uint32(min(max(want, minIterations), math.MaxUint32)), nil
		}
		n *= 2
	}
}

// A purse is a Budget being spent.
type purse struct {
	rounds, work uint64
	memoryKiB    uint32
}

func (b *Budget) open() *purse {
	var r Budget
	if b != nil {
		r = *b
	}
	if r.Rounds == 0 {
		r.Rounds = defaultRounds
	}
	a := r.Argon2.Resolved()
	return &purse{r.Rounds, a.Work, a.MemoryKiB}
}

// pbkdf2 derives n bytes. It counts before it computes.
func (p *purse) pbkdf2(newHash func() hash.Hash, pass, salt []byte, iterations uint64, n int) ([]byte, error) {
	size := uint64(newHash().Size())
	blocks := (uint64(n) + size - 1) / size
	if iterations > math.MaxInt || iterations > p.rounds/max(1, blocks) {
		return nil, fmt.Errorf("%w: %d iterations of PBKDF2 on %d blocks, %d rounds are left",
			ErrBudget, iterations, blocks, p.rounds)
	}
	p.rounds -= iterations * blocks
	return pbkdf2.Key(newHash, string(pass), salt, int(iterations), n)
}

// argon2 derives n bytes with the named variant.
func (p *purse) argon2(variant string, pass, salt []byte, time, memoryKiB uint32, cpus uint8, n int) ([]byte, error) {
	if memoryKiB > p.memoryKiB {
		return nil, fmt.Errorf("%w: %d KiB of memory for Argon2, %d allowed", ErrBudget, memoryKiB, p.memoryKiB)
	}
	work := uint64(memoryKiB) * uint64(time)
	if work > p.work {
		return nil, fmt.Errorf("%w: %d KiB-passes of Argon2, %d are left", ErrBudget, work, p.work)
	}
	p.work -= work
	if variant == "argon2i" {
		return argon2.Key(pass, salt, time, memoryKiB, cpus, uint32(n)), nil
	}
	return argon2.IDKey(pass, salt, time, memoryKiB, cpus, uint32(n)), nil
}

// unbounded is for what a caller asks for itself.
func unbounded() *purse { return &purse{math.MaxUint64, math.MaxUint64, math.MaxUint32} }
