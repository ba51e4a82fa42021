package luks

import (
	"errors"
	"fmt"
	"io"
	"slices"

	"nvstore.dev/image"
)

// magic begins both versions' headers.
const magic = "LUKS\xba\xbe"

// A layout is what a header says of the payload.
type layout struct {
	spec       spec
	keySize    int    // of the volume key, bytes
	offset     int64  // of the payload in its image; 0 if only a detached header has it
	size       int64  // of the payload; -1 if it is what is left of the image
	sectorSize int    // bytes
	ivTweak    uint64 // added to each sector's number
}

// A slot is a key slot that may be tried.
type slot struct {
	n   int
	shy bool // only tried if asked for by number
	try func(pass []byte, p *purse) (key []byte, err error)
}

// A header of either version.
type header interface {
	layout() layout
	slots() []slot // in the order in which to try them
	info() *Info
	// extent returns the size of all copies of the header, where the key
	// areas begin, and where the last one ends.
	extent() (head, areas, end int64)
	add(key []byte, o *KeyOptions) (number int, err error)
	remove(number int) error
}

// Info is what a header tells without a key.
type Info struct {
	Version       int    // 1 or 2
	UUID          string // as stored; not checked
	Label         string // LUKS2
	Encryption    string // of the payload, e.g. "aes-xts-plain64"
	Hash          string // LUKS1: of all derivations; LUKS2: of the volume key's digest
	KeySize       int    // of the volume key, bytes
	SectorSize    int    // bytes
	Digest        uint64 // iterations of PBKDF2 for the volume key's digest
	PayloadOffset int64  // bytes; 0 with a detached header that doesn't say
	PayloadSize   int64  // bytes; -1 if the payload reaches to the image's end
	Slots         []SlotInfo

	// Seq is LUKS2's sequence number of the header in use.
	Seq uint64
	// Damaged is what is wrong with the LUKS2 header that isn't in use, and
	// nil if both are sound and the same.
	Damaged error
	// Tokens are the types of LUKS2's tokens, by number.
	Tokens map[string]string
}

// A SlotInfo describes a key slot that is in use.
type SlotInfo struct {
	Number     int
	KDF        string // "pbkdf2", "argon2i" or "argon2id"
	Iterations uint64 // PBKDF2's, or Argon2's passes
	MemoryKiB  uint32 // Argon2's
	Cpus       int    // Argon2's lanes
	AreaOffset int64  // of the key area in the header's image
	AreaSize   int64
	Truncated  bool // the image ends inside the area
}

// Inspect reads the header at the start of d. It needs no key, and tells
// nothing of the payload but what the header says.
func Inspect(d image.Device) (*Info, error) {
	h, err := readHeader(d)
	if err != nil {
		return nil, err
	}
	return h.info(), nil
}

// readHeader tells the versions apart. A LUKS2 image whose first header is
// destroyed has a second one.
func readHeader(d image.Device) (header, error) {
	var p [8]byte
	n, err := d.ReadAt(p[:], 0)
	if err != nil && err != io.EOF {
		if h, err2 := readV2(d); err2 == nil {
			return h, nil
		}
		return nil, err
	}
	if n < len(p) {
		return nil, with(image.ErrFormat, bad("LUKS header", 0, "magic", nil, "an image of 8 bytes or more"))
	}
	version := int(p[6])<<8 | int(p[7])
	if string(p[:6]) == magic && version == 1 {
		return readV1(d)
	}
	h, err := readV2(d)
	switch {
	case err == nil:
		return h, nil
	case string(p[:6]) == magic && version != 2:
		return nil, with(image.ErrUnsupported, bad("LUKS header", 6, "version", version, "1 or 2"))
	}
	return nil, err
}

// unlock tries slots in turn. Only if each has been tried is the passphrase to
// blame.
func unlock(h header, pass []byte, only []int, p *purse) (key []byte, number int, err error) {
	var first error
	tried := 0
	for _, s := range h.slots() {
		if only == nil && s.shy || only != nil && !slices.Contains(only, s.n) {
			continue
		}
		key, err := s.try(pass, p)
		switch {
		case err == nil:
			return key, s.n, nil
		case errors.Is(err, ErrPassphrase):
			tried++
		case first == nil:
			first = fmt.Errorf("key slot %d: %w", s.n, err)
		}
	}
	switch {
	case first != nil:
		return nil, 0, first
	case tried == 0:
		return nil, 0, ErrNoSlot
	}
	return nil, 0, ErrPassphrase
}

// readKeyArea reads and decrypts a key area of n bytes at off with key.
func readKeyArea(d image.Device, off, n int64, s spec, key []byte) ([]byte, error) {
	if d.Size() < n || off > d.Size()-n {
		return nil, fmt.Errorf("%w: %d bytes, the key area is at [%d, %d)", ErrTruncated, d.Size(), off, off+n)
	}
	c, err := s.newCrypter(key, 512)
	if err != nil {
		return nil, err
	}
	p := make([]byte, (n+511)/512*512)
	// A sector that the area ends in is read whole if the image has it.
	if err := readAtMost(d, p, off); err != nil {
		return nil, err
	}
	c.decrypt(p, p, 0)
	return p[:n], nil
}

// readAtMost fills p, the rest with zeros if d ends before.
func readAtMost(d image.Device, p []byte, off int64) error {
	n, err := d.ReadAt(p, off)
	if err == io.EOF {
		clear(p[n:])
		return nil
	}
	return err
}

// overlap tells whether [a, a+n) and [b, b+m) share a byte.
func overlap(a, n, b, m int64) bool { return n > 0 && m > 0 && a < b+m && b < a+n }
