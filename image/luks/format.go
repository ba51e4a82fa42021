package luks

import (
	"crypto/rand"
	"errors"
	"fmt"
	"hash"
	"math"
	"slices"

	"nvstore.dev/crypto/kdf"
	"nvstore.dev/image"
)

// FormatOptions say what image to make. Only the passphrase has no default.
type FormatOptions struct {
	// Version is 1 or 2; 0 means 2. QEMU knows only 1.
	Version int

	// Passphrase opens key slot 0. An empty one is refused.
	Passphrase []byte

	// Encryption is cipher, mode and IV; "" means "aes-xts-plain64". The
	// ciphers are aes, serpent, twofish and cast5, the modes xts, cbc, ctr
	// and ecb, the IVs plain, plain64 and essiv:HASH. Only aes-xts is
	// fast, and some of the others leak what xts hides: they are for old
	// images.
	Encryption string

	// KeySize is the volume key's, in bytes; 0 means the most that the
	// cipher takes: 64 for AES in XTS.
	KeySize int

	// Hash is for PBKDF2, the splitter and the digest; "" means "sha256".
	Hash string

	// PBKDF2 has LUKS2 derive with it, as LUKS1 always does.
	PBKDF2 bool

	// Iterations is PBKDF2's; 0 means 600000, at least 1000.
	Iterations uint32

	// Argon2id is LUKS2's; the zero value means kdf.DefaultArgon2id.
	Argon2id kdf.Argon2id

	// SectorSize is the payload's, for LUKS2 only: 512, 1024, 2048 or 4096
	// bytes. 0 means 512.
	SectorSize int

	// Size is the payload's, in bytes, a multiple of SectorSize. The image
	// is resized to fit if it can be. 0 means what there is.
	Size int64

	// Header is the image to put the header in, for a detached one, which
	// is resized to fit if it can be. It stays the caller's to close.
	Header image.Device

	// UUID is text of up to 36 bytes; "" means a random one.
	UUID string
}

// The sizes that cryptsetup takes by default.
const (
	alignment       = 1 << 20
	v2HeaderSize    = 16 << 10
	v2DataOffset    = 16 << 20
	minIterations   = 1000
	defIterations   = 600_000
	digestIteration = 8 // of the passphrase's iterations, one in so many
)

// Format makes a LUKS image in d, over whatever is there, and returns it
// opened. It erases the old content where the header and the key slots come to
// lie. The payload is left as it is. If Format fails, d isn't closed.
func Format(d image.Device, o *FormatOptions) (*Device, error) {
	f, err := newFormatter(d, o)
	if err != nil {
		return nil, err
	}
	defer clear(f.key)
	if err := f.makeRoom(); err != nil {
		return nil, err
	}
	if err := f.write(f); err != nil {
		return nil, err
	}
	if err := f.sync(); err != nil {
		return nil, err
	}
	h, err := readHeader(f.to)
	if err != nil {
		return nil, err
	}
	size, err := payloadSize(d, h.layout())
	if err != nil {
		return nil, err
	}
	v, err := newDevice(d, h.layout(), f.key, size)
	if err != nil {
		return nil, err
	}
	v.info = h.info()
	return v, nil
}

// A formatter is FormatOptions with every default filled in.
type formatter struct {
	FormatOptions
	spec   spec
	key    []byte
	d, to  image.Device // payload's image, header's image
	head   int64        // bytes of header and key slots
	offset int64        // of the payload
	write  func(*formatter) error
}

func newFormatter(d image.Device, o *FormatOptions) (*formatter, error) {
	if o == nil {
		o = &FormatOptions{}
	}
	f := &formatter{FormatOptions: *o, d: d, to: d}
	f.defaults()
	if err := f.check(); err != nil {
		return nil, err
	}
	if f.Version == 1 {
		f.write = writeV1
		f.head = v1AreaAt(v1Slots, f.KeySize)
		f.offset = (f.head + alignment - 1) / alignment * alignment
	} else {
		f.write = writeV2
		f.head, f.offset = v2DataOffset, v2DataOffset
	}
	if o.Header != nil {
		f.to, f.offset = o.Header, 0
	}
	if f.Size > math.MaxInt64-f.offset {
		return nil, image.ErrOutOfRange
	}
	f.key = make([]byte, f.KeySize)
	_, _ = rand.Read(f.key) // never fails
	return f, nil
}

func (f *formatter) defaults() {
	set := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	set(&f.Version, 2)
	set(&f.SectorSize, 512)
	if f.Encryption == "" {
		f.Encryption = "aes-xts-plain64"
	}
	if f.Hash == "" {
		f.Hash = "sha256"
	}
	if f.Iterations == 0 {
		f.Iterations = defIterations
	}
	if f.Argon2id == (kdf.Argon2id{}) {
		f.Argon2id = kdf.DefaultArgon2id()
	}
	if f.UUID == "" {
		f.UUID = newUUID()
	}
	if s, err := parseSpec(f.Encryption, "", -1, ""); err == nil {
		set(&f.KeySize, slices.Max(s.keySizes()))
	}
}

func (f *formatter) check() (err error) {
	const structure = "LUKS options"
	refuse := func(field string, got any, want string) error {
		return with(image.ErrUnsupported, bad(structure, -1, field, got, want))
	}
	switch {
	case f.Version != 1 && f.Version != 2:
		return refuse("Version", f.Version, "1 or 2")
	case len(f.Passphrase) == 0:
		return errors.New("luks: empty passphrase")
	case f.Iterations < minIterations:
		return refuse("Iterations", f.Iterations, "1000 or more")
	case f.SectorSize&(f.SectorSize-1) != 0 || f.SectorSize < 512 || f.SectorSize > 4096,
		f.Version == 1 && f.SectorSize != 512:
		return refuse("SectorSize", f.SectorSize, "512, or with LUKS2 up to 4096, a power of two")
	case f.Size < 0 || f.Size%int64(f.SectorSize) != 0:
		return refuse("Size", f.Size, "a multiple of the sector size")
	case len(f.UUID) > 36:
		return refuse("UUID", f.UUID, "36 bytes at most")
	case f.Version == 1 && len(f.Encryption) > 60:
		return refuse("Encryption", f.Encryption, "60 bytes at most")
	}
	if f.spec, err = parseSpec(f.Encryption, structure, -1, "Encryption"); err != nil {
		return err
	}
	if !f.spec.essivWorks() {
		return refuse("Encryption", f.Encryption, "a hash for essiv as long as a key of the cipher")
	}
	if _, err := findHash(f.Hash, structure, -1, "Hash"); err != nil {
		return err
	}
	if err := f.Argon2id.Validate(&kdf.Budget{MemoryKiB: math.MaxUint32, Work: math.MaxUint64}); err != nil {
		return err
	}
	return f.spec.checkKeySize(f.KeySize, structure, -1, "KeySize")
}

// makeRoom gives both images their sizes, and erases where the header goes.
func (f *formatter) makeRoom() error {
	if f.Header != nil {
		if err := fit(f.Header, f.head, false); err != nil {
			return fmt.Errorf("header: %w", err)
		}
	}
	if err := fit(f.d, f.offset+f.Size, f.Size > 0); err != nil {
		return err
	}
	if err := erase(f.to, f.head); err != nil {
		return err
	}
	return f.to.Sync()
}

// erase writes zeros over the first n bytes.
func erase(d image.Device, n int64) error {
	if z, ok := image.As[image.ZeroWriter](d); ok {
		if err := z.WriteZeroes(0, n); !errors.Is(err, image.ErrUnsupported) {
			return err
		}
	}
	zeros := make([]byte, 1<<20)
	for at := int64(0); at < n; at += int64(len(zeros)) {
		if _, err := d.WriteAt(zeros[:min(n-at, int64(len(zeros)))], at); err != nil {
			return err
		}
	}
	return nil
}

// fit makes d as long as size, or exactly that.
func fit(d image.Device, size int64, exact bool) error {
	if d.Size() == size || d.Size() > size && !exact {
		return nil
	}
	r, ok := image.As[image.Resizer](d)
	if !ok {
		return fmt.Errorf("%d bytes, need %d: %w", d.Size(), size, image.ErrNoSpace)
	}
	return r.Resize(size)
}

func (f *formatter) sync() error {
	if err := f.to.Sync(); err != nil || f.to == f.d {
		return err
	}
	return f.d.Sync()
}

// writeArea puts a volume key, split with newHash and encrypted with what a
// passphrase gave, into the key area at off.
func writeArea(d image.Device, off int64, s spec, newHash func() hash.Hash, key, derived []byte) error {
	c, err := s.newCrypter(derived, 512)
	if err != nil {
		return err
	}
	split := afSplit(newHash, key, stripes)
	defer clear(split)
	split = append(split, make([]byte, -len(split)&511)...)
	c.encrypt(split, split, 0)
	if _, err = d.WriteAt(split, off); err != nil {
		return err
	}
	return d.Sync()
}

func (f *formatter) digestIterations() uint32 {
	return max(minIterations, f.Iterations/digestIteration)
}

// newUUID is a random one, RFC 9562 section 5.4.
func newUUID() string {
	var u [16]byte
	_, _ = rand.Read(u[:]) // never fails
	u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}
