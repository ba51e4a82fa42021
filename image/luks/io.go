package luks

import (
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"nvstore.dev/image"
)

// chunk is how many bytes are encrypted, and written, at a time by one
// goroutine: little enough for a processor's cache, enough to be worth its
// start. It is a multiple of every sector size.
const chunk = 128 << 10

// buffers hold ciphertext on its way out.
var buffers = sync.Pool{New: func() any { return new([chunk]byte) }}

// ReadAt reads and decrypts.
func (v *Device) ReadAt(p []byte, off int64) (int, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	switch {
	case v.closed:
		return 0, image.ErrClosed
	case off < 0:
		return 0, image.ErrOutOfRange
	}
	if len(p) == 0 {
		return 0, nil
	}
	if off >= v.size {
		return 0, io.EOF
	}
	want := len(p)
	p = p[:min(int64(want), v.size-off)]
	claim := v.claim(off, int64(len(p)), false)
	v.busy.take(claim)
	defer v.busy.drop(claim)
	n, err := eachPart(p, off, v.readPart)
	if err == nil && n < want {
		err = io.EOF
	}
	return n, err
}

// WriteAt encrypts and writes.
func (v *Device) WriteAt(p []byte, off int64) (int, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	switch {
	case v.closed:
		return 0, image.ErrClosed
	case v.readOnly:
		return 0, image.ErrReadOnly
	}
	return v.write(p, off)
}

// write needs mu, for reading or writing.
func (v *Device) write(p []byte, off int64) (int, error) {
	if err := image.CheckRange(off, int64(len(p)), v.size); err != nil || len(p) == 0 {
		return 0, err
	}
	claim := v.claim(off, int64(len(p)), true)
	v.busy.take(claim)
	defer v.busy.drop(claim)
	return eachPart(p, off, v.writePart)
}

func (v *Device) claim(off, n int64, write bool) *claim {
	lo := off / v.sector * v.sector
	hi := (off + n + v.sector - 1) / v.sector * v.sector
	return &claim{lo, hi, write}
}

// eachPart calls do for the parts of p between multiples of chunk, from as many
// goroutines as there are processors. It returns how many bytes before the
// first failure were done.
func eachPart(p []byte, off int64, do func(p []byte, off int64) error) (int, error) {
	first, last := off/chunk, (off+int64(len(p))-1)/chunk
	part := func(i int64) (from, to int64) {
		return max(i*chunk, off) - off, min((i+1)*chunk, off+int64(len(p))) - off
	}
	workers := min(last-first+1, int64(runtime.GOMAXPROCS(0)))
	if workers == 1 {
		for i := first; i <= last; i++ {
			from, to := part(i)
			if err := do(p[from:to], off+from); err != nil {
				return int(from), err
			}
		}
		return len(p), nil
	}
	return parallel(p, off, first, last, workers, part, do)
}

func parallel(p []byte, off, first, last, workers int64, part func(int64) (int64, int64),
	do func([]byte, int64) error,
) (int, error) {
	var next atomic.Int64
	next.Store(first)
	var mu sync.Mutex
	done, failed := int64(len(p)), error(nil)
	var wg sync.WaitGroup
	work := func() {
		for {
			i := next.Add(1) - 1
			if i > last {
				return
			}
			from, to := part(i)
			if err := do(p[from:to], off+from); err != nil {
				next.Store(last + 1) // the others finish what they have
				mu.Lock()
				if from < done || failed == nil {
					done, failed = from, err
				}
				mu.Unlock()
				return
			}
		}
	}
	for range workers - 1 {
		wg.Go(work)
	}
	work()
	wg.Wait()
	return int(done), failed
}

// readPart reads a part within one chunk.
func (v *Device) readPart(p []byte, off int64) error {
	head, middle := v.cut(off, int64(len(p)))
	if head > 0 {
		if err := v.readSector(p[:head], off); err != nil {
			return err
		}
	}
	if middle > 0 {
		q := p[head : head+middle]
		if err := image.ReadFull(v.d, q, v.base+off+head); err != nil {
			return err
		}
		v.c.decrypt(q, q, v.number(off+head))
	}
	if tail := p[head+middle:]; len(tail) > 0 {
		return v.readSector(tail, off+head+middle)
	}
	return nil
}

// writePart writes a part within one chunk, in one write to the image where the
// part is whole sectors, and in one for each end that isn't.
func (v *Device) writePart(p []byte, off int64) error {
	head, middle := v.cut(off, int64(len(p)))
	if head > 0 {
		if err := v.writeSector(p[:head], off); err != nil {
			return err
		}
	}
	if middle > 0 {
		b := buffers.Get().(*[chunk]byte)
		defer buffers.Put(b)
		v.c.encrypt(b[:middle], p[head:head+middle], v.number(off+head))
		if _, err := v.d.WriteAt(b[:middle], v.base+off+head); err != nil {
			return err
		}
	}
	if tail := p[head+middle:]; len(tail) > 0 {
		return v.writeSector(tail, off+head+middle)
	}
	return nil
}

// cut returns how many bytes of a range lie before its first whole sector, and
// in whole sectors.
func (v *Device) cut(off, n int64) (head, middle int64) {
	if r := off % v.sector; r > 0 {
		head = min(v.sector-r, n)
	}
	return head, (n - head) / v.sector * v.sector
}

// number is the number of the sector at off, in units of 512 bytes.
func (v *Device) number(off int64) uint64 { return uint64(off/512) + v.tweak }

// loadSector reads and decrypts the sector around off.
func (v *Device) loadSector(b []byte, off int64) (at int64, err error) {
	at = off / v.sector * v.sector
	if err := image.ReadFull(v.d, b, v.base+at); err != nil {
		return 0, err
	}
	v.c.decrypt(b, b, v.number(at))
	return at, nil
}

// readSector reads part of a sector.
func (v *Device) readSector(p []byte, off int64) error {
	b := buffers.Get().(*[chunk]byte)
	defer func() { clear(b[:v.sector]); buffers.Put(b) }()
	at, err := v.loadSector(b[:v.sector], off)
	if err != nil {
		return err
	}
	copy(p, b[off-at:v.sector])
	return nil
}

// writeSector writes part of a sector.
func (v *Device) writeSector(p []byte, off int64) error {
	b := buffers.Get().(*[chunk]byte)
	defer func() { clear(b[:v.sector]); buffers.Put(b) }()
	at, err := v.loadSector(b[:v.sector], off)
	if err != nil {
		return err
	}
	copy(b[off-at:], p)
	v.c.encrypt(b[:v.sector], b[:v.sector], v.number(at))
	_, err = v.d.WriteAt(b[:v.sector], v.base+at)
	return err
}
