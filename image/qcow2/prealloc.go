package qcow2

import (
	"errors"
	"fmt"

	"nvstore.dev/image"
)

// Preallocation says what is allocated before it is written.
type Preallocation int

const (
	// PreallocOff allocates nothing ahead.
	PreallocOff Preallocation = iota
	// PreallocMetadata gives each cluster its place in the file, so that
	// writing needs no metadata any more. The file is as long as the disk
	// then, and sparse.
	PreallocMetadata
	// PreallocFalloc also has the file allocate the space, if it can
	// without writing (image.Allocator).
	PreallocFalloc
	// PreallocFull also writes zeros to it.
	PreallocFull
)

// Preallocate gives clusters in [off, off+n) a place that have none, and reads
// as it did. With a backing file that takes extended L2: an entry without
// subclusters can't say that the place isn't in use yet. The change is durable
// when it returns; a crash leaves a part of it.
func (im *Image) Preallocate(off, n int64, mode Preallocation) error {
	im.lockAll()
	defer im.unlockAll()
	if err := im.writeRange(off, n); err != nil {
		return err
	}
	return im.preallocate(off, n, mode)
}

func (im *Image) preallocate(off, n int64, mode Preallocation) error {
	g := &im.geo
	if mode == PreallocOff || n == 0 {
		return nil
	}
	if im.below() && !g.extended() {
		return fmt.Errorf("qcow2: preallocation with a backing file needs extended L2 entries: %w", image.ErrUnsupported)
	}
	end := (uint64(off+n) + g.cs - 1) &^ (g.cs - 1)
	for at := uint64(off) &^ (g.cs - 1); at < end; {
		if len(im.l2c.dirty) > im.l2c.max/2 {
			if err := im.flush(); err != nil {
				return err
			}
		}
		next := uint64(im.l2End(int64(at), int64(end)))
		if err := im.preallocTable(at, next, mode); err != nil {
			return err
		}
		at = next
	}
	return im.flush()
}

// preallocRun is how many bytes are allocated together.
const preallocRun = 16 << 20

// preallocTable is preallocate within one L2 table.
func (im *Image) preallocTable(at, end uint64, mode Preallocation) error {
	g := &im.geo
	t, err := im.l2ForWrite(int64(at))
	if err != nil {
		return err
	}
	_, i, _ := g.split(int64(at))
	for at < end {
		e, err := im.entryAt(t, i, at, true)
		if err != nil {
			return err
		}
		if e.placed || e.kind == compressed {
			at, i = at+g.cs, i+1
			continue
		}
		n := uint64(1)
		for ; at+n*g.cs < end && n*g.cs < preallocRun; n++ {
			e, err := im.entryAt(t, i+n, at+n*g.cs, true)
			if err != nil {
				return err
			}
			if e.placed || e.kind == compressed {
				break
			}
		}
		host, zeroed, err := im.takeRun(at, n)
		if err != nil {
			return err
		}
		if err := im.prepare(host, n*g.cs, zeroed, mode); err != nil {
			if im.fail.Load() == nil && !g.external {
				for c := host >> g.bits; c < host>>g.bits+n; c++ {
					err = errors.Join(err, im.setRefcount(c, 0))
				}
			}
			return err
		}
		for k := range n {
			e, err := im.entryAt(t, i+k, at+k*g.cs, true)
			if err != nil {
				return err
			}
			e.placed, e.copied, e.host = true, true, host+k*g.cs
			switch {
			case im.cipher != nil && mode != PreallocFull && g.version >= 3:
				// What is there isn't zeros when decrypted.
				if !g.extended() {
					e.zero = g.all
				}
			case !g.extended() && e.zero == 0:
				e.alloc = g.all
			}
			e.kind = e.summary(g)
			im.setL2(t, i+k, e)
		}
		im.ordered = true
		at, i = at+n*g.cs, i+n
	}
	return nil
}

// takeRun allocates n clusters for data, in a row.
func (im *Image) takeRun(guest, n uint64) (host uint64, zeroed bool, err error) {
	if im.geo.external {
		end := min(guest+n<<im.geo.bits, max(uint64(im.Size()), guest))
		return guest, im.hdr.rawData() || guest >= uint64(im.data.Size()), im.growData(end)
	}
	return im.take(n, metaNone)
}

// prepare makes new clusters zeros, as far as that will be seen, and allocates
// them.
func (im *Image) prepare(host, n uint64, zeroed bool, mode Preallocation) error {
	if im.geo.external {
		n = min(n, max(uint64(im.data.Size()), host)-host)
	}
	seen := !im.geo.extended() // the entry says that all of it is stored
	switch {
	case n == 0:
		return nil
	case mode == PreallocFull && !im.hdr.rawData(), im.cipher != nil && im.geo.version < 3:
		for done := uint64(0); done < n; done += uint64(len(zeros)) {
			if err := im.writeData(zeros[:min(n-done, uint64(len(zeros)))], host+done); err != nil {
				return err
			}
		}
		return nil
	case seen && !zeroed && im.cipher == nil:
		if err := im.zeroData(host, n); err != nil {
			return err
		}
	}
	if mode == PreallocFalloc || mode == PreallocFull {
		if a, ok := image.As[image.Allocator](im.data); ok {
			if err := a.Allocate(int64(host), int64(n)); !errors.Is(err, image.ErrUnsupported) {
				return err
			}
		}
	}
	return nil
}
