package qcow2

import (
	"bytes"
	"io"
	"sync"

	"github.com/klauspost/compress/flate"
	"github.com/klauspost/compress/zstd"

	"nvstore.dev/image"
)

// maxZstdWindow is the most memory that a zstd frame's header may ask for.
// QEMU's own frames ask for 2 MiB at most, the size of the largest cluster.
const maxZstdWindow = 8 << 20

// An unpacker reads compressed clusters and keeps the last one.
type unpacker struct {
	typ uint8
	cs  uint64

	mu   sync.Mutex
	have bool
	from entry
	data []byte
}

func newUnpacker(typ uint8, cs uint64) *unpacker {
	return &unpacker{typ: typ, cs: cs}
}

func (u *unpacker) reset() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.have = false
}

// read reads p at offset in of the compressed cluster e.
func (u *unpacker) read(im *Image, e entry, p []byte, in uint64) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.have || u.from != e {
		u.have = false
		src := make([]byte, e.length)
		if err := readFile(im.file, src, e.host); err != nil {
			return err
		}
		if u.data == nil {
			u.data = make([]byte, u.cs)
		}
		if u.unpack(src) != nil {
			return fieldError{im.path, "qcow2 compressed cluster"}.at(int64(e.host), "", nil,
				"compressed data of one cluster", image.ErrCorrupt)
		}
		u.have, u.from = true, e
	}
	copy(p, u.data[in:])
	return nil
}

// unpack fills data from src. The stream needn't end there, and what follows
// it in the last sector is of no concern; a zstd stream may have several
// frames.
func (u *unpacker) unpack(src []byte) error {
	if u.typ == 0 {
		r := flate.NewReader(bytes.NewReader(src))
		defer r.Close()
		_, err := io.ReadFull(r, u.data)
		return err
	}
	r, err := zstd.NewReader(bytes.NewReader(src), zstd.WithDecoderConcurrency(1),
		zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
	if err != nil {
		return err
	}
	defer r.Close()
	_, err = io.ReadFull(r, u.data)
	return err
}
