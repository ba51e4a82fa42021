package qcow2

import (
	"bytes"
	"fmt"
	"runtime"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"nvstore.dev/image"
)

// deflateWindow is how far back deflate may refer. QEMU reads with a window of
// this size.
const deflateWindow = 4096

var (
	deflaters    sync.Pool // *flate.Writer
	zstdEncoders sync.Pool // *zstd.Encoder
	packedRooms  sync.Pool // *[]byte, for packed clusters

	// packing bounds how many clusters are packed at a time, and so what that
	// takes of memory: more than there are cores gain nothing.
	packing = make(chan struct{}, runtime.GOMAXPROCS(0))
)

// pack compresses one cluster to room, which it empties, and returns the result,
// or nil if that doesn't save anything.
func pack(typ uint8, p, room []byte) ([]byte, error) {
	packing <- struct{}{}
	defer func() { <-packing }()
	if typ != 0 {
		e, _ := zstdEncoders.Get().(*zstd.Encoder)
		if e == nil {
			var err error
			// This level's files are 3 % larger than those of the next
			// one, which is QEMU's, for two thirds of the time.
			e, err = zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false), zstd.WithEncoderLevel(zstd.SpeedFastest),
				zstd.WithWindowSize(2<<20), zstd.WithLowerEncoderMem(true))
			if err != nil {
				return nil, err
			}
		}
		defer zstdEncoders.Put(e)
		if out := e.EncodeAll(p, room[:0]); len(out) < len(p) {
			return out, nil
		}
		return nil, nil
	}
	w, _ := deflaters.Get().(*flate.Writer)
	if w == nil {
		var err error
		if w, err = flate.NewWriterWindow(nil, deflateWindow); err != nil {
			return nil, err
		}
	}
	defer deflaters.Put(w)
	out := bytes.NewBuffer(room[:0])
	w.Reset(out)
	_, err := w.Write(p)
	if err == nil {
		err = w.Close()
	}
	if err != nil || out.Len() >= len(p) {
		return nil, err
	}
	return out.Bytes(), nil
}

// WriteCompressed writes p to off, which is a cluster's start, compressed as the
// image says; what doesn't get smaller is written as it is. p is whole clusters,
// up to the end of the disk. Clusters are packed without gaps, so this suits
// what is written once. Compression takes no lock: calls from several
// goroutines, one for a cluster or a few, use as many cores. The image must be
// neither encrypted nor have a data file.
func (im *Image) WriteCompressed(p []byte, off int64) (int, error) {
	im.mu.RLock()
	defer im.mu.RUnlock()
	if err := im.writeRange(off, int64(len(p))); err != nil {
		return 0, err
	}
	cs, end := int64(im.geo.cs), off+int64(len(p))
	switch {
	case im.hdr.crypt != 0, im.geo.external:
		return 0, fmt.Errorf("qcow2: compressed clusters in an image that is encrypted or has a data file: %w", image.ErrUnsupported)
	case off%cs != 0, end%cs != 0 && end != im.Size():
		return 0, fmt.Errorf("qcow2: compressing %d bytes at %d, which aren't whole clusters of %d: %w", len(p), off, cs, image.ErrUnsupported)
	}
	done := 0
	for done < len(p) {
		b := p[done:min(len(p), done+int(cs))]
		if err := im.packCluster(b, off+int64(done)); err != nil {
			return done, err
		}
		done += len(b)
	}
	return done, nil
}

func (im *Image) packCluster(p []byte, off int64) error {
	whole := p
	if uint64(len(p)) < im.geo.cs {
		whole = make([]byte, im.geo.cs)
		copy(whole, p)
	}
	room, _ := packedRooms.Get().(*[]byte)
	if room == nil || uint64(cap(*room)) < im.geo.cs {
		b := make([]byte, 0, im.geo.cs+im.geo.cs/16+512) // what doesn't get smaller fits, too
		room = &b
	}
	defer packedRooms.Put(room)
	z, err := pack(im.hdr.compression, whole, *room)
	if err != nil {
		return err
	}
	if z == nil {
		_, err := im.write(p, off)
		return err
	}
	if err := im.relieve(); err != nil {
		return err
	}
	w := packed{im: im, off: off, n: uint64(len(z))}
	if err := w.plan(); err != nil {
		return err
	}
	if w.host == 0 {
		_, err := im.write(p, off)
		return err
	}
	_, err = im.file.WriteAt(z, int64(w.host))
	if err != nil {
		err = im.poison(err)
	}
	return w.finish(err)
}

// A packed is the write of a compressed cluster under way, as a work is one of
// normal clusters.
type packed struct {
	im    *Image
	off   int64
	host  uint64 // of the data; 0 if no entry can hold its place
	n     uint64
	claim *busy
	pin   uint32
}

func (w *packed) plan() error {
	im := w.im
	im.lockTables()
	defer im.unlockTables()
	if im.fail.Load() != nil {
		return im.usable(true)
	}
	c := uint64(w.off) >> im.geo.bits
	claim := im.claim(c, c)
	pin := im.pins.enter()
	t, err := im.l2ForWrite(w.off)
	if err == nil {
		// What it replaces must be sound, before anything is taken.
		_, i, _ := im.geo.split(w.off)
		var e entry
		if e, err = im.entryAt(t, i, uint64(w.off), true); err == nil {
			first, k := e.clusters(&im.geo)
			for c := first; c < first+k && err == nil; c++ {
				if err = im.inUse(c); err == nil {
					err = im.guard(c<<im.geo.bits, im.geo.cs, metaNone)
				}
			}
		}
	}
	if err == nil {
		w.host, err = im.takeBytes(w.n)
	}
	if err != nil || w.host == 0 {
		im.pins.leave(pin)
		im.unclaim(claim)
		return err
	}
	w.claim, w.pin = claim, pin
	return nil
}

// finish enters the mapping, or gives back what was taken.
func (w *packed) finish(err error) error {
	im := w.im
	g := &im.geo
	im.lockTables()
	defer im.unlockTables()
	defer im.unclaim(w.claim)
	defer im.pins.leave(w.pin)
	var t *table
	if err == nil {
		t, err = im.l2ForWrite(w.off)
	}
	_, i, _ := g.split(w.off)
	var old entry
	if err == nil {
		old, err = im.entryAt(t, i, uint64(w.off), true)
	}
	e := entry{kind: compressed, host: w.host, length: w.n}
	if err != nil {
		if im.fail.Load() == nil {
			err = im.giveBackBytes(e, err)
		}
		return err
	}
	im.ordered = true
	im.setL2(t, i, e)
	return im.freeData(old, uint64(w.off), false)
}

func (im *Image) giveBackBytes(e entry, err error) error {
	first, k := e.clusters(&im.geo)
	for c := first; c < first+k; c++ {
		if e := im.addRefcount(c, -1); e != nil {
			return im.poison(e)
		}
	}
	im.packAt = 0
	return err
}

// takeBytes allocates n bytes, less than a cluster, for compressed data: behind
// the last such, if there is room, and across the border to the next cluster, if
// that one is free. Each cluster gets a reference for each piece of data in it.
// It returns 0 where an entry can't hold the place.
func (im *Image) takeBytes(n uint64) (uint64, error) {
	g := &im.geo
	at := im.packAt
	if at&(g.cs-1) == 0 {
		at = 0 // the last cluster is full
	}
	if at != 0 {
		rc, err := im.refcount(at >> g.bits)
		if err != nil {
			return 0, err
		}
		if rc == 0 || rc >= g.maxRefcount() {
			at = 0
		}
	}
	room := g.cs - at&(g.cs-1)
	if at == 0 || n > room {
		next, _, err := im.take(1, metaNone)
		if err != nil {
			return 0, err
		}
		if at == 0 || next != at+room {
			at = next
		}
		if at>>(62-(g.bits-8)) != 0 {
			return 0, im.setRefcount(next>>g.bits, 0)
		}
		if at == next {
			im.packAt = at + n
			im.unpacked.forget(at, n)
			return at, nil
		}
	}
	if err := im.addRefcount(at>>g.bits, 1); err != nil {
		return 0, err
	}
	im.packAt = at + n
	im.unpacked.forget(at, n)
	return at, nil
}
