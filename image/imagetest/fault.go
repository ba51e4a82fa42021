package imagetest

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"

	"nvstore.dev/image"
)

// ErrInjected is in every error that a FaultDevice makes up, beside the cause.
var ErrInjected = errors.New("injected fault")

// A FaultMode is what goes wrong.
type FaultMode int

const (
	Fail       FaultMode = iota // nothing is done, Err is returned; a Sync loses what is dirty
	FailAfter                   // the operation is done, Err is returned all the same
	Short                       // a read or write of fewer bytes, and Err
	FlipBits                    // N bits of the bytes read or written are flipped, no error
	ZeroSector                  // one 512-byte sector of the bytes read or written is zeros, no error
	Misdirect                   // a read or write happens N bytes further on, no error
	StaleRead                   // a read gives what was there before the last WriteAt, no error
	Lose                        // a change or Sync isn't done, no error
	Call                        // Do is called first; the operation is right
)

var faultKinds = [...]OpKind{
	Fail:       OpAny,
	FailAfter:  OpAny,
	Short:      OpRead | OpWrite,
	FlipBits:   OpRead | OpWrite,
	ZeroSector: OpRead | OpWrite,
	Misdirect:  OpRead | OpWrite,
	StaleRead:  OpRead,
	Lose:       OpChange | OpSync | OpDropCache,
	Call:       OpAny,
}

// A Fault makes one operation, or all from one on, go wrong.
type Fault struct {
	Mode FaultMode

	// Ops are the kinds of operation that may go wrong; 0 means all that
	// Mode can be done to. Others aren't counted.
	Ops OpKind

	// At is how many of them go right first.
	At int

	// Forever makes all later ones go wrong too.
	Forever bool

	// Err is the cause to report; nil means EIO.
	Err error

	// N is the number of bits (1 to 8; 0 means 1), of bytes that a short
	// read or write does (0 means half; it is always fewer than asked for),
	// or of bytes to misdirect by (0 means 4096).
	N int

	// Seed picks the bits and the sector.
	Seed uint64

	// Do is called for Call, outside of any lock.
	Do func()
}

// EachFault calls run with f.At = 0, 1, 2, ... until run says that the fault
// was never reached, and returns how many runs reached it. So it breaks each
// operation of a workload in turn.
func EachFault(f Fault, run func(Fault) (hits int)) int {
	for f.At = 0; run(f) > 0; f.At++ {
	}
	return f.At
}

// A FaultDevice passes operations on to a Device, except for those that a
// Fault names. It intercepts the capabilities that change or Sync something,
// and returns image.ErrUnsupported for those that the Device below lacks;
// others are found through Unwrap, and no Fault reaches these.
type FaultDevice struct {
	d image.Device

	mu      sync.Mutex
	faults  []Fault
	counts  []int
	hits    int
	trace   Trace
	stale   bool
	history []overwritten
}

type overwritten struct {
	off  int64
	data []byte
}

// NewFault wraps d. Without faults it only counts.
func NewFault(d image.Device, faults ...Fault) *FaultDevice {
	f := &FaultDevice{d: d, faults: slices.Clone(faults), counts: make([]int, len(faults))}
	for i := range f.faults {
		if f.faults[i].Ops == 0 {
			f.faults[i].Ops = OpAny
		}
		f.stale = f.stale || faults[i].Mode == StaleRead
	}
	return f
}

// Hits returns how many operations went wrong.
func (f *FaultDevice) Hits() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.hits
}

// Trace returns the counts of operations, those that went wrong included.
func (f *FaultDevice) Trace() Trace {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.trace
}

// Unwrap returns the Device below.
func (f *FaultDevice) Unwrap() image.Device { return f.d }

// due counts an operation and returns the fault to do to it, or nil.
func (f *FaultDevice) due(k OpKind, n int64) *Fault {
	f.mu.Lock()
	f.trace.count(k, n)
	var hit *Fault
	var calls []func()
	for i := range f.faults {
		x := &f.faults[i]
		if x.Ops&faultKinds[x.Mode]&k == 0 {
			continue
		}
		at := f.counts[i]
		f.counts[i]++
		if at < x.At || at > x.At && !x.Forever {
			continue
		}
		f.hits++
		if x.Mode == Call {
			calls = append(calls, x.Do)
		} else if hit == nil {
			hit = x
		}
	}
	f.mu.Unlock()
	for _, do := range calls {
		do()
	}
	return hit
}

// err is nil without a fault that reports one.
func (x *Fault) err(k OpKind) error {
	cause := x.Err
	if cause == nil {
		cause = syscall.EIO
	}
	return fmt.Errorf("%w: %v: %w", ErrInjected, k, cause)
}

// do runs an operation without data under its fault.
func (f *FaultDevice) do(k OpKind, n int64, op func() error) error {
	x := f.due(k, n)
	if x == nil {
		return op()
	}
	switch x.Mode {
	case Fail:
		return x.err(k)
	case FailAfter:
		if err := op(); err != nil {
			return err
		}
		return x.err(k)
	case Lose:
		return nil
	}
	return op()
}

// damage changes p as the fault says.
func (x *Fault) damage(p []byte) {
	if len(p) == 0 {
		return
	}
	rng := rand.New(rand.NewPCG(x.Seed, uint64(x.At)))
	switch x.Mode {
	case FlipBits:
		flipped := map[int]bool{}
		for len(flipped) < min(max(x.N, 1), 8) {
			b := rng.IntN(len(p) * 8)
			if !flipped[b] {
				p[b/8] ^= 1 << (b % 8)
			}
			flipped[b] = true
		}
	case ZeroSector:
		s := rng.IntN((len(p) + sectorSize - 1) / sectorSize)
		clear(p[s*sectorSize : min(len(p), (s+1)*sectorSize)])
	}
}

// part is how many of n bytes a short transfer does.
func (x *Fault) part(n int) int {
	if x.N > 0 {
		return min(x.N, max(n-1, 0))
	}
	return n / 2
}

// elsewhere returns where n bytes for off go by mistake; false if the device
// has no room for a mistake.
func (f *FaultDevice) elsewhere(x *Fault, off, n int64) (int64, bool) {
	by := int64(x.N)
	if by == 0 {
		by = pageSize
	}
	for _, o := range []int64{off + by, off - by} {
		if image.CheckRange(o, n, f.d.Size()) == nil {
			return o, true
		}
	}
	return 0, false
}

// ReadBatch reads one after the other, so that faults reach each.
func (f *FaultDevice) ReadBatch(reads []image.Request) error {
	return image.BatcherOf(plain{f}).ReadBatch(reads)
}

// WriteBatch writes one after the other.
func (f *FaultDevice) WriteBatch(writes []image.Request) error {
	return image.BatcherOf(plain{f}).WriteBatch(writes)
}

// SyncBatch syncs, and then reads one after the other.
func (f *FaultDevice) SyncBatch(reads []image.Request) error {
	return image.BatcherOf(plain{f}).SyncBatch(reads)
}

// plain hides abilities.
type plain struct{ image.Device }

// ReadAt reads, or goes wrong.
func (f *FaultDevice) ReadAt(p []byte, off int64) (int, error) {
	x := f.due(OpRead, int64(len(p)))
	if x == nil {
		return f.d.ReadAt(p, off)
	}
	switch x.Mode {
	case Fail:
		return 0, x.err(OpRead)
	case Short:
		n, err := f.d.ReadAt(p[:x.part(len(p))], off)
		if err == nil {
			err = x.err(OpRead)
		}
		return n, err
	case Misdirect:
		if o, ok := f.elsewhere(x, off, int64(len(p))); ok {
			return f.d.ReadAt(p, o)
		}
	}
	n, err := f.d.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, err
	}
	switch x.Mode {
	case FailAfter:
		return n, x.err(OpRead)
	case StaleRead:
		f.rewind(p[:n], off)
	default:
		x.damage(p[:n])
	}
	return n, err
}

// WriteAt writes, or goes wrong.
func (f *FaultDevice) WriteAt(p []byte, off int64) (int, error) {
	x := f.due(OpWrite, int64(len(p)))
	if x == nil {
		return f.write(p, off)
	}
	switch x.Mode {
	case Fail:
		return 0, x.err(OpWrite)
	case Lose:
		return len(p), nil
	case Short:
		n, err := f.write(p[:x.part(len(p))], off)
		if err == nil {
			err = x.err(OpWrite)
		}
		return n, err
	case Misdirect:
		if o, ok := f.elsewhere(x, off, int64(len(p))); ok {
			off = o
		}
	case FlipBits, ZeroSector:
		p = append([]byte(nil), p...)
		x.damage(p)
	}
	n, err := f.write(p, off)
	if err == nil && x.Mode == FailAfter {
		err = x.err(OpWrite)
	}
	return n, err
}

// write remembers what it overwrites, if a fault will want that.
func (f *FaultDevice) write(p []byte, off int64) (int, error) {
	if !f.stale {
		return f.d.WriteAt(p, off)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	old := make([]byte, len(p))
	n, _ := f.d.ReadAt(old, max(off, 0))
	f.history = append(f.history, overwritten{off, old[:n]})
	return f.d.WriteAt(p, off)
}

// rewind puts into p, read at off, what was there before.
func (f *FaultDevice) rewind(p []byte, off int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	end := off + int64(len(p))
	for _, h := range f.history {
		lo, hi := max(off, h.off), min(end, h.off+int64(len(h.data)))
		if lo < hi {
			copy(p[lo-off:hi-off], h.data[lo-h.off:])
		}
	}
}

// Size returns the size of the Device below.
func (f *FaultDevice) Size() int64 { return f.d.Size() }

// Sync syncs, or goes wrong. Where the Device below is a CrashDevice, Fail is
// its LoseSync; elsewhere it merely doesn't reach it.
func (f *FaultDevice) Sync() error {
	x := f.due(OpSync, 0)
	if x == nil {
		return f.d.Sync()
	}
	switch x.Mode {
	case Fail:
		if c, ok := image.As[*CrashDevice](f.d); ok {
			c.LoseSync(nil)
		}
		return x.err(OpSync)
	case Lose:
		return nil
	}
	err := f.d.Sync()
	if err == nil && x.Mode == FailAfter {
		err = x.err(OpSync)
	}
	return err
}

// Resize resizes, or goes wrong.
func (f *FaultDevice) Resize(size int64) error {
	return f.do(OpResize, 0, func() error {
		if r, ok := image.As[image.Resizer](f.d); ok {
			return r.Resize(size)
		}
		return image.ErrUnsupported
	})
}

// Discard discards, or goes wrong.
func (f *FaultDevice) Discard(off, n int64) error {
	return f.do(OpDiscard, n, func() error {
		if r, ok := image.As[image.Discarder](f.d); ok {
			return r.Discard(off, n)
		}
		return image.ErrUnsupported
	})
}

// WriteZeroes zeroes, or goes wrong.
func (f *FaultDevice) WriteZeroes(off, n int64) error {
	return f.do(OpWriteZeroes, n, func() error {
		if r, ok := image.As[image.ZeroWriter](f.d); ok {
			return r.WriteZeroes(off, n)
		}
		return image.ErrUnsupported
	})
}

// DropCache drops caches, or goes wrong.
func (f *FaultDevice) DropCache() error {
	return f.do(OpDropCache, 0, func() error {
		if r, ok := image.As[image.CacheDropper](f.d); ok {
			return r.DropCache()
		}
		return image.ErrUnsupported
	})
}

// Close closes the Device below. No Fault reaches it.
func (f *FaultDevice) Close() error { return f.d.Close() }
