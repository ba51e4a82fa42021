package qcow2

import (
	"bytes"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"nvstore.dev/image"
)

// maxZstdWindow is the most memory that a zstd frame's header may ask for.
// QEMU's own frames ask for 2 MiB at most, the size of the largest cluster.
const maxZstdWindow = 8 << 20

// unpackedBytes is about how much the unpacker keeps.
const unpackedBytes = 1 << 20

// An unpacker reads compressed clusters. It keeps the last ones of which only a
// part was read. Any number of requests use it at once.
type unpacker struct {
	typ uint8
	cs  uint64

	mu    sync.Mutex
	slots []unpacked // the last used at the end
	max   int

	sources sync.Pool // *[]byte, for compressed data
	rooms   sync.Pool // *[]byte of a cluster, for what it unpacks to
}

type unpacked struct {
	from entry
	data *[]byte
}

func newUnpacker(typ uint8, cs uint64) *unpacker {
	return &unpacker{typ: typ, cs: cs, max: int(max(2, unpackedBytes/cs))}
}

func (u *unpacker) reset() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.slots = nil
}

// forget drops what was unpacked from [off, off+n) of the file.
func (u *unpacker) forget(off, n uint64) {
	u.mu.Lock()
	defer u.mu.Unlock()
	kept := u.slots[:0]
	for _, s := range u.slots {
		if s.from.host >= off+n || s.from.host+s.from.length <= off {
			kept = append(kept, s)
		}
	}
	clear(u.slots[len(kept):])
	u.slots = kept
}

// cached copies from what is kept.
func (u *unpacker) cached(e entry, p []byte, in uint64) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, s := range u.slots {
		if s.from == e {
			copy(u.slots[i:], u.slots[i+1:])
			u.slots[len(u.slots)-1] = s
			copy(p, (*s.data)[in:])
			return true
		}
	}
	return false
}

// keep takes data over.
func (u *unpacker) keep(e entry, data *[]byte) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.slots) >= u.max {
		u.rooms.Put(u.slots[0].data) // copies are made with the lock held
		u.slots = append(u.slots[:0], u.slots[1:]...)
	}
	u.slots = append(u.slots, unpacked{e, data})
}

// read reads p at offset in of the compressed cluster e.
func (u *unpacker) read(im *Image, e entry, p []byte, in uint64) error {
	if u.cached(e, p, in) {
		return nil
	}
	whole := in == 0 && uint64(len(p)) == u.cs
	data := p
	var room *[]byte
	if !whole {
		if room, _ = u.rooms.Get().(*[]byte); room == nil {
			b := make([]byte, u.cs)
			room = &b
		}
		data = *room
	}
	src, _ := u.sources.Get().(*[]byte)
	if src == nil || uint64(cap(*src)) < e.length {
		b := make([]byte, max(e.length, u.cs/2))
		src = &b
	}
	defer u.sources.Put(src)
	b := (*src)[:e.length:e.length]
	if err := readFile(im.file, b, e.host); err != nil {
		return err
	}
	if unpack(u.typ, data, b) != nil {
		return fieldError{im.path, "qcow2 compressed cluster"}.at(int64(e.host), "", nil,
			"compressed data of one cluster", image.ErrCorrupt)
	}
	if !whole {
		copy(p, data[in:])
		u.keep(e, room)
	}
	return nil
}

var (
	inflaters sync.Pool // *inflater
	zstds     sync.Pool // *zstd.Decoder
)

// unpack fills data from src. The stream needn't end there, and what follows
// it in the last sector is of no concern; a zstd stream may have several
// frames.
func unpack(typ uint8, data, src []byte) error {
	if typ == 0 {
		f, _ := inflaters.Get().(*inflater)
		if f == nil {
			f = new(inflater)
		}
		defer inflaters.Put(f)
		return f.inflate(data, src)
	}
	r, _ := zstds.Get().(*zstd.Decoder)
	if r == nil {
		var err error
		r, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
		if err != nil {
			return err
		}
	}
	defer zstds.Put(r)
	if err := r.Reset(bytes.NewReader(src)); err != nil {
		return err
	}
	_, err := io.ReadFull(r, data)
	_ = r.Reset(nil) // let go of src
	return err
}
