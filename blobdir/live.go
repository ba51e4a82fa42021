package blobdir

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"

	"nvstore.dev/image"
)

// A live extent is content in one plain, contiguous piece, which an emulator
// may have open directly, as a raw window into the image (FORMAT.md, section
// 9.2). While it is attached, the emulator writes to it and its checksum is
// void; while it is detached it is as any blob, except that a change writes
// all of it anew, elsewhere.
type liveExtent struct {
	off, length, gen int64
	attached         bool
	crc              []byte // 4 bytes; none while attached
	mac              []byte // in a sealed store 32 bytes; none while attached
}

func (l *liveExtent) blocks() int64 { return roundUp(l.length) }

// livePiece is how much of a live extent is in memory at a time.
const livePiece = 256 << 10

// A liveSum is the checksum of a live extent's content and, if there are keys,
// its MAC.
type liveSum struct {
	id     [16]byte
	k      *keys
	crc    uint32
	digest hash.Hash
}

func newLiveSum(id [16]byte, k *keys) *liveSum {
	return &liveSum{id: id, k: k, digest: sha256.New()}
}

func (s *liveSum) add(p []byte) {
	s.crc = crc32.Update(s.crc, castagnoli, p)
	if s.k != nil {
		s.digest.Write(p)
	}
}

func (s *liveSum) sums() (crc, mac []byte) {
	crc = appendCRC(nil, s.crc)[2:]
	if s.k != nil {
		mac = s.k.sum()(labelLive, s.id[:], s.digest.Sum(nil))
	}
	return crc, mac
}

func (d *Dir) inside(l *liveExtent) error {
	if l.off > d.dev.Size()-l.length {
		return corrupt(l.off, "R21", "live extent", "offset", l.off, "an extent inside the image")
	}
	return nil
}

// liveSums reads a live extent, and returns its checksum and, if there are
// keys, its MAC.
func (d *Dir) liveSums(l *liveExtent, id [16]byte, k *keys) (crc, mac []byte, err error) {
	if err := d.inside(l); err != nil {
		return nil, nil, err
	}
	sum := newLiveSum(id, k)
	buf := make([]byte, min(livePiece, l.length))
	for at := int64(0); at < l.length; {
		p := buf[:min(int64(len(buf)), l.length-at)]
		if err := image.ReadFull(d.dev, p, l.off+at); err != nil {
			return nil, nil, fmt.Errorf("live extent at byte %#x: %w", l.off, err)
		}
		sum.add(p)
		at += int64(len(p))
	}
	crc, mac = sum.sums()
	return crc, mac, nil
}

// checkLive demands the checksum of a detached extent and, if there are keys,
// its MAC.
func (d *Dir) checkLive(e *entry, k *keys, name string) error {
	l := e.live
	crc, mac, err := d.liveSums(l, e.ID, k)
	if err == nil {
		err = l.compare(crc, mac)
	}
	return withBlob(err, name)
}

func withBlob(err error, name string) error {
	if e := (*Error)(nil); errors.As(err, &e) {
		e.Blob = name
	}
	return err
}

// compare tells what was read from what was recorded.
func (l *liveExtent) compare(crc, mac []byte) error {
	switch {
	case !bytes.Equal(crc, l.crc):
		return corrupt(l.off, "R23", "live extent", "crc32c", fmt.Sprintf("%#x", crc), fmt.Sprintf("%#x", l.crc))
	case mac != nil && subtle.ConstantTimeCompare(mac, l.mac) != 1:
		return &Error{Off: l.off, Struct: "live extent", Field: "mac", Want: "a MAC of this store's key", Rule: "R24", Kind: ErrTampered}
	}
	return nil
}

// detached refuses what an attached extent doesn't allow.
func (b *blob) detached() error {
	if b.live != nil && b.live.attached {
		return fmt.Errorf("blob %q %w", b.Name, ErrAttached)
	}
	return nil
}

// setLive keeps what the entry shows in step with the extent.
func (b *blob) setLive(l *liveExtent) {
	b.live = l
	b.Live, b.Attached, b.Offset = l != nil, l != nil && l.attached, 0
	if l != nil {
		b.Offset = l.off
	}
}

// verifyLive demands the checksum, once a transaction.
func (b *blob) verifyLive() error {
	if err := b.detached(); err != nil || b.fresh || b.tx.intact[b.live.off] {
		return err
	}
	if err := b.tx.d.checkLive(&b.entry, b.tx.prof.keys, b.Name); err != nil {
		return err
	}
	if b.tx.intact == nil {
		b.tx.intact = make(map[int64]bool)
	}
	b.tx.intact[b.live.off] = true
	return nil
}

// readLive reads from a detached extent. All of it is verified first, or with
// the same read if all of it is wanted.
func (b *blob) readLive(p []byte, off int64) (int, error) {
	if off == 0 && int64(len(p)) >= b.Size && !b.fresh {
		return b.readWhole(p)
	}
	if err := b.verifyLive(); err != nil {
		return 0, err
	}
	return b.peekLive(p, off)
}

func (b *blob) readWhole(p []byte) (int, error) {
	err := b.detached()
	if err == nil {
		err = withBlob(b.tx.d.inside(b.live), b.Name)
	}
	if err != nil {
		return 0, err
	}
	n, err := b.peekLive(p, 0)
	if err != nil && err != io.EOF {
		return 0, err
	}
	sum := newLiveSum(b.ID, b.tx.prof.keys)
	sum.add(p[:n])
	if bad := withBlob(b.live.compare(sum.sums()), b.Name); bad != nil {
		clear(p[:n])
		return 0, bad
	}
	return n, err
}

func (b *blob) peekLive(p []byte, off int64) (int, error) {
	n := int(min(int64(len(p)), max(b.Size-off, 0)))
	if n > 0 {
		if err := image.ReadFull(b.tx.d.dev, p[:n], b.live.off+off); err != nil {
			return 0, fmt.Errorf("blob %q: live extent at byte %#x: %w", b.Name, b.live.off, err)
		}
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// sameLive tells whether the extent has these bytes at off.
func (b *blob) sameLive(p []byte, off int64) (bool, error) {
	buf := make([]byte, min(livePiece, len(p)))
	for len(p) > 0 {
		n := min(len(p), len(buf))
		if _, err := b.peekLive(buf[:n], off); err != nil {
			return false, err
		}
		if !bytes.Equal(buf[:n], p[:n]) {
			return false, nil
		}
		p, off = p[n:], off+int64(n)
	}
	return true, nil
}

func (b *blob) fixedSize(want int64) error {
	return fmt.Errorf("%w: blob %q: a live extent of %d bytes, and %d are asked for: only Truncate changes its size", ErrInvalid, b.Name, b.Size, want)
}

// writeLive changes bytes of a detached extent. The first change of a
// transaction moves the extent, so that a crash leaves the old one whole.
func (b *blob) writeLive(p []byte, off int64) error {
	if err := b.detached(); err != nil {
		return err
	}
	if end := off + int64(len(p)); end > b.Size {
		return b.fixedSize(end)
	}
	if err := b.verifyLive(); err != nil {
		return err
	}
	if same, err := b.sameLive(p, off); same || err != nil {
		return err
	}
	if !b.fresh {
		if err := b.moveLive(b.Size, b.Size); err != nil {
			return err
		}
	}
	return b.tx.through(p, b.live.off+off)
}

// replaceLive makes data the whole content, of the same length. What is
// damaged is healed.
func (b *blob) replaceLive(data []byte) error {
	if err := b.detached(); err != nil {
		return err
	}
	if int64(len(data)) != b.Size {
		return b.fixedSize(int64(len(data)))
	}
	switch err := b.verifyLive(); {
	case err == nil:
		if same, err := b.sameLive(data, 0); same || err != nil {
			return err
		}
	case !damaged(err) && !errors.Is(err, ErrTampered):
		return err
	}
	if !b.fresh {
		if err := b.moveLive(b.Size, 0); err != nil {
			return err
		}
	}
	return b.tx.through(data, b.live.off)
}

// truncateLive gives a detached extent another size.
func (b *blob) truncateLive(size int64) error {
	if err := b.detached(); err != nil {
		return err
	}
	if err := liveSize(b.Name, size); err != nil {
		return err
	}
	if err := b.verifyLive(); err != nil {
		return err
	}
	return b.moveLive(size, min(size, b.Size))
}

// moveLive gives the blob a new extent of size bytes, of which keep are copied
// and the rest are zeros, and gives the old one up, if there is one.
func (b *blob) moveLive(size, keep int64) error {
	tx := b.tx
	n := roundUp(size)
	off, err := tx.space.alloc(n, 8*BlockSize)
	if err != nil {
		return err
	}
	buf := make([]byte, min(livePiece, max(keep, 1)))
	for at := int64(0); at < keep; {
		p := buf[:min(int64(len(buf)), keep-at)]
		if err := image.ReadFull(tx.d.dev, p, b.live.off+at); err != nil {
			return err
		}
		if err := tx.through(p, off+at); err != nil {
			return err
		}
		at += int64(len(p))
	}
	if err := tx.zero(off+keep, n-keep); err != nil {
		return err
	}
	if b.live != nil {
		tx.release(b.live.off, b.live.blocks())
	}
	b.setLive(&liveExtent{off: off, length: size, gen: tx.gen})
	b.Size, b.fresh = size, true
	b.touch()
	return nil
}

// through writes at once, to space that no root knows of yet.
func (tx *Tx) through(p []byte, off int64) error {
	if err := tx.start(); err != nil {
		return err
	}
	if _, err := tx.d.dev.WriteAt(p, off); err != nil {
		return tx.d.poison(err)
	}
	return nil
}

// zero makes space that no root knows of yet read as zeros.
func (tx *Tx) zero(off, n int64) error {
	if z, ok := image.As[image.ZeroWriter](tx.d.dev); ok && n >= livePiece {
		if err := tx.start(); err != nil {
			return err
		}
		err := z.WriteZeroes(off, n)
		if err == nil {
			return nil
		}
		if !errors.Is(err, image.ErrUnsupported) {
			return tx.d.poison(err)
		}
	}
	zeros := make([]byte, min(n, livePiece))
	for end := off + n; off < end; {
		p := zeros[:min(int64(len(zeros)), end-off)]
		if err := tx.through(p, off); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return nil
}

// sumLive records the checksum of an extent that this transaction wrote, and
// has the commit compare it once more when it is durable.
func (b *blob) sumLive() error {
	l := b.live
	crc, mac, err := b.tx.d.liveSums(l, b.ID, b.tx.prof.keys)
	if err != nil {
		return err
	}
	l.crc, l.mac = crc, mac
	b.tx.out.written = append(b.tx.out.written, reference{off: l.off, length: l.length, crc: crcValue(crc)})
	return nil
}

func liveSize(name string, size int64) error {
	if size < 1 || size > maxLive {
		return fmt.Errorf("%w: blob %q: a live extent of %d bytes: 1 to %d", ErrInvalid, name, size, int64(maxLive))
	}
	return nil
}

// CreateLive makes a blob that is a live extent of size bytes, all zeros,
// which WriteAt and Put fill: contiguous space that an emulator may have open
// directly while it is attached. Its content is never encrypted, also not in a
// sealed store. meta may be nil.
func (tx *Tx) CreateLive(name string, size int64, meta *Meta) error {
	if err := liveSize(name, size); err != nil {
		return err
	}
	m, err := cleanMeta(meta)
	if err != nil {
		return err
	}
	if m.ChunkSize == 0 {
		m.ChunkSize = chunkSizeFor(size)
	}
	if err := tx.Create(name, &m); err != nil {
		return err
	}
	b, err := tx.blob(name)
	if err != nil {
		return err
	}
	return tx.keep(b.moveLive(size, 0))
}

// SetLive turns a blob into a live extent, in clear, or a detached live extent
// into a blob in chunks, which a sealed store seals. The content is stored
// anew. A blob that is so already stays as it is.
func (tx *Tx) SetLive(name string, live bool) error {
	b, err := tx.existing(name, true)
	if err != nil {
		return err
	}
	if live == b.Live {
		return nil
	}
	if err := b.detached(); err != nil {
		return err
	}
	if !live {
		tx.hold(b)
		return tx.keep(b.intoChunks())
	}
	if err := liveSize(name, b.Size); err != nil {
		return err
	}
	tx.hold(b)
	return tx.keep(b.intoLive())
}

// intoLive copies the chunks into an extent.
func (b *blob) intoLive() error {
	from := &blob{tx: b.tx, entry: b.entry, tree: b.tree, pending: b.pending}
	if err := b.moveLive(b.Size, 0); err != nil {
		return err
	}
	buf := make([]byte, min(livePiece, b.Size))
	for at := int64(0); at < b.Size; {
		p := buf[:min(int64(len(buf)), b.Size-at)]
		if _, err := from.readAt(p, at); err != nil {
			return err
		}
		if err := b.tx.through(p, b.live.off+at); err != nil {
			return err
		}
		at += int64(len(p))
	}
	err := from.dropFrom(0)
	b.tree, b.chunkMap, b.chunks, b.pending = nil, nil, nil, nil
	return err
}

// intoChunks copies an extent into chunks.
func (b *blob) intoChunks() error {
	if err := b.verifyLive(); err != nil {
		return err
	}
	from := &blob{tx: b.tx, entry: b.entry, fresh: b.fresh}
	b.setLive(nil)
	b.fresh = false
	b.touch()
	buf := make([]byte, min(livePiece, b.Size))
	for at := int64(0); at < b.Size; {
		p := buf[:min(int64(len(buf)), b.Size-at)]
		if _, err := from.peekLive(p, at); err != nil {
			return err
		}
		if err := b.writeAt(p, at); err != nil {
			return err
		}
		at += int64(len(p))
	}
	b.tx.release(from.live.off, from.live.blocks())
	return nil
}

// Peek reads a live extent's bytes as they are at this moment, attached or
// not, without verifying them.
func (tx *Tx) Peek(name string, p []byte, off int64) (int, error) {
	b, err := tx.existing(name, false)
	if err != nil {
		return 0, err
	}
	if b.live == nil || off < 0 {
		return 0, fmt.Errorf("%w: blob %q, offset %d: Peek reads live extents", ErrInvalid, name, off)
	}
	if err := tx.d.inside(b.live); err != nil {
		return 0, withBlob(err, name)
	}
	return b.peekLive(p, off)
}
