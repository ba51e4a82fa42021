// Package array is what chips on all buses share: the memory behind a write
// cycle.
package array

import (
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"sync"

	"nvstore.dev/eeprom"
)

// An Array is a chip's memory. Busy and Wait may be called at any time; all
// else is for one goroutine.
type Array struct {
	mem   eeprom.Memory
	async bool
	epoch int64

	// ahead is what was read behind the byte that was asked for. It is good
	// for one transfer: nobody else writes to the memory, and a revert in the
	// middle of one is a power cut in the middle of one.
	ahead    []byte
	aheadOff int64

	mu   sync.Mutex
	done chan struct{} // closed when the cycle that runs has ended; nil if none does
	err  error         // of the last cycle
}

// New returns an Array over memory that must have size bytes, on which cycles
// run in the background if async.
func New(name string, mem eeprom.Memory, size int64, async bool) (*Array, error) {
	if mem == nil {
		return nil, fmt.Errorf("%w: no memory", eeprom.ErrInvalid)
	}
	if got := mem.Size(); got != size {
		return nil, &eeprom.SizeError{Name: "memory for " + name, Got: got, Want: size}
	}
	return &Array{mem: mem, async: async, epoch: mem.Epoch()}, nil
}

// CheckPart says whether a part has a size, and pages, of powers of two within
// limits.
func CheckPart(name string, size int64, page int) error {
	pow2 := func(n int64) bool { return n > 0 && bits.OnesCount64(uint64(n)) == 1 }
	if !pow2(size) || size > eeprom.MaxSize || !pow2(int64(page)) || int64(page) > size || page > 256 {
		return fmt.Errorf("%w: part %q of %d bytes in pages of %d", eeprom.ErrInvalid, name, size, page)
	}
	return nil
}

// Reverted tells whether the memory went back in time since it was last asked,
// or made. What runs in a cycle isn't disturbed. It begins a transfer.
func (a *Array) Reverted() bool {
	a.ahead = nil
	was := a.epoch
	a.epoch = a.mem.Epoch()
	return a.epoch != was
}

// Byte reads one byte. With an error it is 0xFF, as if nobody drove the bus.
func (a *Array) Byte(off int64) (byte, error) {
	if i := off - a.aheadOff; i >= 0 && i < int64(len(a.ahead)) {
		return a.ahead[i], nil
	}
	p := make([]byte, min(readAhead, max(a.mem.Size()-off, 1)))
	if err := a.read(p, off); err != nil {
		a.ahead = nil
		return 0xff, err
	}
	a.ahead, a.aheadOff = p, off
	return p[0], nil
}

const readAhead = 256

func (a *Array) read(p []byte, off int64) error {
	if n, err := a.mem.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("reading %d bytes of an EEPROM at %d: %w", len(p), off, err)
	}
	return nil
}

// Fill runs a cycle that writes the same bytes all over the array.
func (a *Array) Fill(unit []byte) error {
	p := make([]byte, a.mem.Size())
	for n := 0; n < len(p); {
		n += copy(p[n:], unit)
	}
	return a.Write(p, 0)
}

// Write runs a cycle that writes p at off.
func (a *Array) Write(p []byte, off int64) error {
	return a.Run(func(epoch int64) error { return a.mem.Commit(p, off, epoch) })
}

// WritePage runs a cycle that writes what was loaded into a page, which must
// not be loaded further.
func (a *Array) WritePage(page *Page) error {
	if first, n := page.run(); n > 0 {
		return a.Write(page.data[first:first+n], page.off+int64(first))
	}
	// It wrapped, and both ends go into one commit.
	return a.Run(func(epoch int64) error {
		p := make([]byte, len(page.data))
		if err := a.read(p, page.off); err != nil {
			return err
		}
		for i, set := range page.set {
			if set {
				p[i] = page.data[i]
			}
		}
		return a.mem.Commit(p, page.off, epoch)
	})
}

// Run runs a cycle: commit, with the epoch that it belongs to. It returns
// commit's error, or nil at once if cycles run in the background.
func (a *Array) Run(commit func(epoch int64) error) error {
	a.ahead = nil
	epoch, done := a.epoch, make(chan struct{})
	a.mu.Lock()
	a.done, a.err = done, nil
	a.mu.Unlock()
	run := func() error {
		err := commit(epoch)
		a.mu.Lock()
		a.done, a.err = nil, err
		a.mu.Unlock()
		close(done)
		return err
	}
	if !a.async {
		return run()
	}
	go func() { _ = run() }() // Wait tells
	return nil
}

// Busy tells whether a cycle runs, or has failed. One that a revert undid is
// over.
func (a *Array) Busy() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.done != nil || a.err != nil && !errors.Is(a.err, eeprom.ErrReverted)
}

// Wait waits until no cycle runs, and returns the error of the last.
func (a *Array) Wait() error {
	a.mu.Lock()
	done := a.done
	a.mu.Unlock()
	if done != nil {
		<-done
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.err
}

// PowerCycle waits until no cycle runs, and forgets that one failed.
func (a *Array) PowerCycle() {
	_ = a.Wait()
	a.ahead = nil
	a.mu.Lock()
	a.err = nil
	a.mu.Unlock()
	a.epoch = a.mem.Epoch()
}

// A Page is what a chip loads before its write cycle. The address wraps at the
// page's end.
type Page struct {
	off  int64
	data []byte
	set  []bool
	next int
}

// NewPage returns a Page that is loaded from address addr on.
func NewPage(size int, addr int64) *Page {
	next := int(addr & int64(size-1))
	return &Page{off: addr - int64(next), data: make([]byte, size), set: make([]bool, size), next: next}
}

// Load loads a byte.
func (p *Page) Load(b byte) {
	p.data[p.next], p.set[p.next] = b, true
	p.next = (p.next + 1) & (len(p.data) - 1)
}

// Address is where the next byte would go.
func (p *Page) Address() int64 { return p.off + int64(p.next) }

// run returns what was loaded if it is in one piece; else n is 0.
func (p *Page) run() (first, n int) {
	first = slices.Index(p.set, true)
	if first < 0 {
		return 0, 0
	}
	if n = slices.Index(p.set[first:], false); n < 0 {
		return first, len(p.set) - first
	}
	if slices.Contains(p.set[first+n:], true) {
		return 0, 0
	}
	return first, n
}
