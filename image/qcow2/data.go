package qcow2

import (
	"errors"
	"fmt"
	"sync"

	"nvstore.dev/image"
)

// Where clusters of data are: in the image's file, or at the disk's own offsets
// in an external data file; encrypted or not.

// bounces are buffers for what can't be read or written where it lies.
var bounces = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// dataSector is the number from which the cipher makes initialization vectors:
// that of the place in the file with LUKS (as QEMU has it), and that of the
// guest's offset with the legacy AES.
func (im *Image) dataSector(host, guest uint64) uint64 {
	if im.hdr.crypt == cryptAES {
		return guest / sector
	}
	return host / sector
}

// readData reads and decrypts p, which is in one run of clusters at host, and
// at guest on the disk.
func (im *Image) readData(p []byte, host, guest uint64) error {
	if im.cipher == nil {
		return readFile(im.data, p, host)
	}
	if host%sector == 0 && len(p)%sector == 0 {
		if err := readFile(im.data, p, host); err != nil {
			return err
		}
		return im.cipher.Decrypt(p, im.dataSector(host, guest))
	}
	buf := bounces.Get().(*[64 << 10]byte)
	defer bounces.Put(buf)
	for len(p) > 0 {
		in := host % sector
		n := min(uint64(len(p)), uint64(len(buf))-sector)
		b := buf[:(in+n+sector-1)&^(sector-1)]
		if err := readFile(im.data, b, host-in); err != nil {
			return err
		}
		if err := im.cipher.Decrypt(b, im.dataSector(host-in, guest-in)); err != nil {
			return err
		}
		copy(p[:n], b[in:])
		p, host, guest = p[n:], host+n, guest+n
	}
	return nil
}

// writeData encrypts and writes whole sectors of data, which fit in the file.
func (im *Image) writeData(p []byte, host uint64) error {
	if im.cipher == nil {
		if _, err := im.data.WriteAt(p, int64(host)); err != nil {
			return im.poison(err)
		}
		return nil
	}
	buf := bounces.Get().(*[64 << 10]byte)
	defer bounces.Put(buf)
	for len(p) > 0 {
		b := buf[:copy(buf[:], p)]
		if err := im.cipher.Encrypt(b, host/sector); err != nil {
			return im.poison(err)
		}
		if _, err := im.data.WriteAt(b, int64(host)); err != nil {
			return im.poison(err)
		}
		p, host = p[len(b):], host+uint64(len(b))
	}
	return nil
}

// mergeLocks keep writes to parts of one encrypted sector apart.
type mergeLocks [64]sync.Mutex

// patchData writes p in place. Parts of encrypted sectors are read first.
func (im *Image) patchData(p []byte, host, guest uint64) error {
	if im.cipher == nil {
		return im.writeData(p, host)
	}
	for len(p) > 0 {
		in := host % sector
		if in == 0 && len(p) >= sector {
			n := len(p) &^ (sector - 1)
			if err := im.writeData(p[:n], host); err != nil {
				return err
			}
			p, host, guest = p[n:], host+uint64(n), guest+uint64(n)
			continue
		}
		n := min(uint64(len(p)), sector-in)
		if err := im.patchSector(p[:n], host-in, guest-in, in); err != nil {
			return err
		}
		p, host, guest = p[n:], host+n, guest+n
	}
	return nil
}

func (im *Image) patchSector(p []byte, host, guest, in uint64) error {
	mu := &im.merging[host/sector%uint64(len(im.merging))]
	mu.Lock()
	defer mu.Unlock()
	var b [sector]byte
	if err := im.readData(b[:], host, guest); err != nil {
		return err
	}
	copy(b[in:], p)
	return im.writeData(b[:], host)
}

// zeros is what free space is filled with, a piece at a time.
var zeros [64 << 10]byte

// zeroData makes a part of a cluster read as zeros.
func (im *Image) zeroData(host, n uint64) error {
	if n > uint64(len(zeros)) && im.cipher == nil {
		if done, err := zeroFile(im.data, host, n); err != nil {
			return im.poison(err)
		} else if done {
			return nil
		}
	}
	for n > 0 {
		k := min(n, uint64(len(zeros)))
		if err := im.writeData(zeros[:k], host); err != nil {
			return err
		}
		host, n = host+k, n-k
	}
	return nil
}

// zeroFile lets the file write zeros, if it can.
func zeroFile(file image.Device, off, n uint64) (bool, error) {
	z, ok := image.As[image.ZeroWriter](file)
	if !ok {
		return false, nil
	}
	err := z.WriteZeroes(int64(off), int64(n))
	if errors.Is(err, image.ErrUnsupported) {
		return false, nil
	}
	return err == nil, err
}

// inData refuses a run of data that lies behind the end of the file: the file
// was cut.
func (im *Image) inData(host, n uint64) error {
	if im.geo.external {
		return nil // what a data file lacks is zeros, as at its other holes
	}
	return im.inFile(host, n)
}

// growData makes the data file reach end.
func (im *Image) growData(end uint64) error {
	if !im.geo.external {
		return im.growFile(end)
	}
	size := uint64(im.data.Size())
	if end <= size {
		return nil
	}
	r, ok := image.As[image.Resizer](im.data)
	if !ok {
		return fmt.Errorf("qcow2: the data file can't grow by %d bytes: %w", end-size, image.ErrNoSpace)
	}
	// Never past the disk: a raw data file has its size.
	if err := r.Resize(int64(end)); err != nil {
		if errors.Is(err, image.ErrNoSpace) || errors.Is(err, image.ErrUnsupported) {
			return fmt.Errorf("qcow2: the data file can't grow by %d bytes: %w (%w)", end-size, image.ErrNoSpace, err)
		}
		return im.poison(err)
	}
	return nil
}

// syncData makes data durable, where it isn't in the image's own file.
func (im *Image) syncData() error {
	if !im.geo.external {
		return nil
	}
	if err := im.data.Sync(); err != nil {
		return im.poison(err)
	}
	return nil
}
