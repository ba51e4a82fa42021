package luks

import (
	"errors"
	"fmt"
	"math"
	"sync"

	"nvstore.dev/image"
)

// Options say how to open an image.
type Options struct {
	// Passphrase opens a key slot. It is bytes, of any content and length;
	// the caller may wipe it after the call.
	Passphrase []byte

	// Header is the image that the header is in, if it is detached from the
	// payload; nil means that both are in one. It is only read, and stays
	// the caller's to close, after which the Device still works.
	Header image.Device

	// ReadOnly refuses writes.
	ReadOnly bool

	// Slots are the numbers of the key slots to try; nil means all that are
	// in use, but for LUKS2's of priority 0.
	Slots []int

	// Budget is what may be spent on deriving keys; nil means the default.
	Budget *Budget

	// Path names the image in errors.
	Path string
}

// A Device is the payload of a LUKS image, decrypted. Its size is a multiple
// of the sector size. Requests needn't be aligned: a write of part of a sector
// reads, decrypts, changes and writes the sector, and if power fails then, the
// whole sector may be lost. A power cut may also tear a sector of more than 512
// bytes.
//
// A new image's content is whatever was there before, decrypted: noise. Space
// isn't given back, as holes would show where data isn't.
type Device struct {
	d        image.Device
	c        crypter
	base     int64 // of the payload in d
	sector   int64 // bytes
	tweak    uint64
	readOnly bool
	fixed    bool // the header gives the size
	info     *Info
	slot     int

	mu     sync.RWMutex // held for reading by requests
	size   int64
	closed bool
	busy   ranges
}

// Open opens the LUKS image in d, which it closes when it is closed, but not
// if Open fails. A passphrase that is wrong gives ErrPassphrase; where some key
// slot couldn't be tried, the error is why.
func Open(d image.Device, o *Options) (*Device, error) {
	if o == nil {
		o = &Options{}
	}
	v, err := open(d, o)
	if err != nil {
		return nil, named(o.Path, err)
	}
	return v, nil
}

func open(d image.Device, o *Options) (*Device, error) {
	from := d
	if o.Header != nil {
		from = o.Header
	}
	h, err := readHeader(from)
	if err != nil {
		return nil, err
	}
	l := h.layout()
	if o.Header == nil && l.offset == 0 {
		return nil, with(image.ErrUnsupported, bad("LUKS header", -1, "payload offset", 0,
			"the payload's image, as this header is detached"))
	}
	size, err := payloadSize(d, l)
	if err != nil {
		return nil, err
	}
	key, n, err := unlock(h, o.Passphrase, o.Slots, o.Budget.open())
	if err != nil {
		return nil, err
	}
	defer clear(key)
	v, err := newDevice(d, l, key, size)
	if err != nil {
		return nil, err
	}
	v.readOnly, v.info, v.slot = o.ReadOnly, h.info(), n
	return v, nil
}

// payloadSize returns what of d is the payload, in whole sectors.
func payloadSize(d image.Device, l layout) (int64, error) {
	if d.Size() < l.offset {
		return 0, fmt.Errorf("%w: %d bytes, the payload begins at %d", ErrTruncated, d.Size(), l.offset)
	}
	size := d.Size() - l.offset
	if l.size >= 0 {
		if size < l.size {
			return 0, fmt.Errorf("%w: %d bytes, the payload is at [%d, %d)", ErrTruncated, d.Size(), l.offset, l.offset+l.size)
		}
		size = l.size
	}
	return size / int64(l.sectorSize) * int64(l.sectorSize), nil
}

func newDevice(d image.Device, l layout, key []byte, size int64) (*Device, error) {
	if len(key) != l.keySize {
		return nil, bad("LUKS header", -1, "key_size", len(key), fmt.Sprintf("%d bytes", l.keySize))
	}
	c, err := l.spec.newCrypter(key, l.sectorSize)
	if err != nil {
		return nil, err
	}
	v := &Device{
		d: d, c: c, base: l.offset, sector: int64(l.sectorSize), tweak: l.ivTweak, fixed: l.size >= 0, size: size,
	}
	v.busy.init()
	return v, nil
}

// Info returns what the header said when the image was opened.
func (v *Device) Info() *Info { return v.info }

// Slot returns the number of the key slot that the passphrase opened.
func (v *Device) Slot() int { return v.slot }

// Size returns the payload's size in bytes.
func (v *Device) Size() int64 {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.size
}

// Sync makes all completed writes durable.
func (v *Device) Sync() error {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.closed {
		return image.ErrClosed
	}
	if v.readOnly {
		return nil
	}
	return v.d.Sync()
}

// Close closes the image under the payload, and forgets the key.
func (v *Device) Close() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.closed {
		return image.ErrClosed
	}
	v.closed, v.c = true, nil
	return v.d.Close()
}

// DropCache makes later reads come from the medium, if the image can.
func (v *Device) DropCache() error {
	v.mu.RLock()
	defer v.mu.RUnlock()
	if v.closed {
		return image.ErrClosed
	}
	if c, ok := image.As[image.CacheDropper](v.d); ok {
		return c.DropCache()
	}
	return image.ErrUnsupported
}

// Resize changes the payload's size, and the image's under it, to a multiple of
// the sector size. The new part is filled with encrypted zeros, which takes as
// long as writing it. A payload whose size the header gives can't be resized.
func (v *Device) Resize(size int64) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case v.closed:
		return image.ErrClosed
	case v.readOnly:
		return image.ErrReadOnly
	case v.fixed:
		return fmt.Errorf("resize of a payload of fixed size: %w", image.ErrUnsupported)
	case size < 0 || size > math.MaxInt64-v.base:
		return image.ErrOutOfRange
	case size%v.sector != 0:
		return fmt.Errorf("size of %d isn't a multiple of %d: %w", size, v.sector, image.ErrUnsupported)
	case size == v.size:
		return nil
	}
	r, ok := image.As[image.Resizer](v.d)
	if !ok {
		return image.ErrUnsupported
	}
	if err := r.Resize(v.base + size); err != nil {
		return err
	}
	old := v.size
	v.size = size
	if size < old {
		return nil
	}
	zeros := make([]byte, min(size-old, 1<<20))
	for at := old; at < size; at += int64(len(zeros)) {
		if _, err := v.write(zeros[:min(size-at, int64(len(zeros)))], at); err != nil {
			v.size = old
			return errors.Join(err, r.Resize(v.base+old))
		}
	}
	return nil
}
