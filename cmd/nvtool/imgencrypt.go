package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"nvstore.dev/image"
	"nvstore.dev/image/chain"
	"nvstore.dev/image/luks"
	"nvstore.dev/image/qcow2"
)

// An imgCrypt is what -o says of encryption, under QEMU's names: those of a
// luks image, and with "encrypt." before them those of a qcow2.
type imgCrypt struct {
	on       bool   // encrypt.format=luks, or the format luks
	version  int    // of LUKS
	secret   string // key-secret
	cipher   string // cipher-alg, as aes-256
	mode     string
	iv       string
	ivHash   string
	hash     string
	iterTime time.Duration
	rounds   uint32
	sector   int64
}

// cryptOptions are for -o.
var cryptOptions = slices.Concat([]imgOption{
	{"encrypt.format", "luks", "encrypt the content, and leave size and backing file readable", "qcow2", func(s *imgSpec, v string) error {
		s.crypt.on = true
		switch v {
		case "luks":
			return nil
		case "aes", "on":
			return withHint(&kinded{fmt.Errorf("encrypt.format=%s: the legacy encryption is only read: %w", v, image.ErrUnsupported), image.ErrUnsupported}, "encrypt.format=luks")
		}
		return invalidf("encrypt.format=%s: luks", v)
	}},
	{"version", "1|2", "of LUKS; QEMU has 1 alone (1)", "luks", func(s *imgSpec, v string) error {
		s.crypt.version = map[string]int{"1": 1, "2": 2}[v]
		if s.crypt.version == 0 {
			return invalidf("version=%s: 1 or 2", v)
		}
		return nil
	}},
	{"sector-size", "SIZE", "of LUKS2, 512 to 4096 (512)", "luks", func(s *imgSpec, v string) (err error) {
		s.crypt.sector, err = parseImgSize(v)
		return err
	}},
}, cryptPair("key-secret", "LAYER", "which --secret-file, -key-file or -fd has the passphrase", func(c *imgCrypt, v string) error { c.secret = v; return nil }),
	cryptPair("cipher-alg", "NAME", "aes, serpent or twofish with -128, -192 or -256, cast5-128 (aes-256)", func(c *imgCrypt, v string) error { c.cipher = v; return nil }),
	cryptPair("cipher-mode", "NAME", "xts, cbc, ctr or ecb (xts)", func(c *imgCrypt, v string) error { c.mode = v; return nil }),
	cryptPair("ivgen-alg", "NAME", "plain64, plain or essiv (plain64)", func(c *imgCrypt, v string) error { c.iv = v; return nil }),
	cryptPair("ivgen-hash-alg", "NAME", "of essiv (sha256)", func(c *imgCrypt, v string) error { c.ivHash = v; return nil }),
	cryptPair("hash-alg", "NAME", "md5, sha1, sha224, sha256, sha384, sha512 or ripemd160 (sha256)", func(c *imgCrypt, v string) error { c.hash = v; return nil }),
	cryptPair("iter-time", "MS", "how long trying a passphrase takes here, in place of iterations", func(c *imgCrypt, v string) error {
		n, err := strconv.ParseUint(v, 10, 16)
		if err != nil || n == 0 {
			return invalidf("iter-time=%s: 1 to 65535 milliseconds", v)
		}
		c.iterTime = time.Duration(n) * time.Millisecond
		return nil
	}),
	cryptPair("iterations", "N", "of PBKDF2, 1000 or more (600000)", func(c *imgCrypt, v string) error {
		n, err := strconv.ParseUint(v, 10, 32)
		if err != nil {
			return invalidf("iterations=%s: a number", v)
		}
		c.rounds = uint32(n)
		return nil
	}))

// cryptPair is an option of both formats.
func cryptPair(name, value, text string, set func(c *imgCrypt, v string) error) []imgOption {
	return []imgOption{
		{name, value, text, "luks", func(s *imgSpec, v string) error { return set(&s.crypt, v) }},
		{"encrypt." + name, value, text, "qcow2", func(s *imgSpec, v string) error { return set(&s.crypt, v) }},
	}
}

// check refuses options that make no sense together.
func (c *imgCrypt) check(format string) error {
	if format == chain.LUKS {
		c.on = true
	}
	if !c.on && *c != (imgCrypt{}) {
		return withHint(usagef("encrypt.* options, and nothing is to be encrypted"), "-o encrypt.format=luks,...")
	}
	return nil
}

// options makes the passphrase and the options into LUKS's.
func (c *imgCrypt) options(pass []byte) (*luks.FormatOptions, error) {
	name, bits, _ := strings.Cut(or(c.cipher, "aes-256"), "-")
	n, err := strconv.Atoi(or(bits, "0"))
	if err != nil || n%8 != 0 {
		return nil, invalidf("cipher-alg=%s: as aes-256", c.cipher)
	}
	o := &luks.FormatOptions{Version: max(c.version, 1), Passphrase: pass, KeySize: n / 8, Hash: c.hash, Iterations: c.rounds, SectorSize: int(c.sector)}
	mode, iv := or(c.mode, "xts"), or(c.iv, "plain64")
	if mode == "xts" {
		o.KeySize *= 2
	}
	if iv == "essiv" {
		iv += ":" + or(c.ivHash, "sha256")
	}
	o.Encryption = name + "-" + mode + "-" + iv
	if c.iterTime > 0 {
		if c.rounds > 0 {
			return nil, usagef("iter-time and iterations: one of them")
		}
		if o.Iterations, err = luks.Iterations(o, c.iterTime); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func or(s, empty string) string {
	if s == "" {
		return empty
	}
	return s
}

// encrypt gets the passphrase of a new image that is to be encrypted. It is the
// last to use the secrets.
func (s *imgSpec) encrypt(ctx context.Context, secrets *secretFlags) error {
	if !s.crypt.on {
		return nil
	}
	defer secrets.wipe()
	pass, err := secrets.newPassphrase(ctx, s.crypt.secret)
	if err == nil {
		err = secrets.unused()
	}
	if err == nil {
		s.luks, err = s.crypt.options(pass)
	}
	return err
}

// headerSize is what the encryption header of a new image takes, or 0.
func (s *imgSpec) headerSize() int64 {
	if !s.crypt.on {
		return 0
	}
	o, err := s.crypt.options([]byte("any"))
	if err != nil {
		return 0 // what it measures can't be made
	}
	if o.Version == 2 {
		return 16 << 20
	}
	n, err := luks.HeaderSize(o)
	if err != nil {
		return 0
	}
	if s.format == chain.LUKS {
		n = (n + 1<<20 - 1) &^ (1<<20 - 1)
	}
	return n
}

// legacySource warns of the legacy encryption, and keeps what comes of it off
// images that are there: it may be garbage.
func (a *app) legacySource(o *convertFlags, file string) error {
	if o.existing || o.force {
		return withHint(fmt.Errorf("%s has the legacy encryption, which can't tell a wrong passphrase: its content goes to a new file alone: %w",
			file, image.ErrUnsupported), "leave out -n and --force, look at the result, and then replace what is to be replaced")
	}
	// Said even with -q: garbage may be taken for data.
	fmt.Fprintf(a.err, "nvtool: warning: %s has qcow2's legacy encryption: AES-128-CBC under the passphrase itself, without key derivation. "+
		"Nothing tells a wrong passphrase from a right one: look at what is in the new image before the old one goes. Don't go on with this encryption, in which equal blocks show.\n", printable(file))
	return nil
}

// cryptFacts are what qemu-img info says of LUKS, and the version if it is 2.
type cryptFacts struct {
	Format  string      `json:"format,omitempty"` // in a qcow2: "luks" or "aes"
	Version int         `json:"version,omitempty"`
	IVGen   string      `json:"ivgen-alg,omitempty"`
	IVHash  string      `json:"ivgen-hash-alg,omitempty"`
	Hash    string      `json:"hash-alg,omitempty"`
	Cipher  string      `json:"cipher-alg,omitempty"`
	Mode    string      `json:"cipher-mode,omitempty"`
	UUID    string      `json:"uuid,omitempty"`
	Slots   []cryptSlot `json:"slots,omitempty"`
	Payload *int64      `json:"payload-offset,omitempty"`
	Rounds  uint64      `json:"master-key-iters,omitempty"`
}

type cryptSlot struct {
	Active  bool   `json:"active"`
	Iters   uint64 `json:"iters,omitempty"`
	Offset  int64  `json:"key-offset,omitempty"`
	Stripes int    `json:"stripes,omitempty"`
}

func cryptFactsOf(i *luks.Info, format string) *cryptFacts {
	cipher, rest, _ := strings.Cut(i.Encryption, "-")
	mode, iv, _ := strings.Cut(rest, "-")
	iv, ivHash, _ := strings.Cut(iv, ":")
	bits := i.KeySize * 8
	if mode == "xts" {
		bits /= 2
	}
	f := &cryptFacts{Format: format, IVGen: iv, IVHash: ivHash, Hash: i.Hash, Cipher: fmt.Sprintf("%s-%d", cipher, bits), Mode: mode,
		UUID: i.UUID, Payload: &i.PayloadOffset, Rounds: i.Digest}
	if i.Version != 1 {
		f.Version = i.Version
	}
	if i.Version == 1 {
		f.Slots = make([]cryptSlot, 8) // by number, as QEMU lists them
	}
	for _, s := range i.Slots {
		for len(f.Slots) <= s.Number {
			f.Slots = append(f.Slots, cryptSlot{})
		}
		f.Slots[s.Number] = cryptSlot{true, s.Iterations, s.AreaOffset, 4000}
	}
	return f
}

// luks fills in what a LUKS header says, if there is one.
func (f *imgFacts) luks(file image.Device, format string) error {
	if format == chain.Raw {
		return nil
	}
	i, err := luks.Inspect(file)
	switch {
	case err == nil:
	case format == chain.LUKS:
		return err
	default:
		return nil
	}
	f.Format, f.Encrypted = chain.LUKS, true
	f.VirtualSize = max(0, file.Size()-i.PayloadOffset)
	if i.PayloadSize >= 0 {
		f.VirtualSize = i.PayloadSize
	}
	f.Specific = &specificFacts{"luks", cryptFactsOf(i, "")}
	return nil
}

// cryptOf fills in what the encryption header of a qcow2 says.
func (f *imgFacts) cryptOf(file image.Device) error {
	if !f.Encrypted {
		return nil
	}
	p, err := chain.Inspect(file)
	if err != nil {
		return err
	}
	q, ok := f.Specific.Data.(*qcow2Facts)
	switch {
	case !ok:
	case p.LUKS != nil:
		q.Encrypt = cryptFactsOf(p.LUKS, "luks")
	default:
		q.Encrypt = &cryptFacts{Format: p.Encryption}
	}
	return nil
}

// print is cryptFacts for people, in qemu-img's words.
func (c *cryptFacts) print(p func(format string, args ...any), indent string) {
	for _, f := range [][2]string{
		{"ivgen alg", c.IVGen}, {"ivgen hash alg", c.IVHash}, {"hash alg", c.Hash}, {"cipher alg", c.Cipher}, {"cipher mode", c.Mode},
		{"uuid", c.UUID}, {"format", c.Format},
	} {
		if f[1] != "" {
			p("%s%s: %s", indent, f[0], printable(f[1]))
		}
	}
	if c.Version > 0 {
		p("%sversion: %d", indent, c.Version)
	}
	if c.Payload != nil {
		p("%spayload offset: %d", indent, *c.Payload)
	}
	for i, s := range c.Slots {
		if !s.Active {
			continue
		}
		p("%sslot %d: %d iterations, key offset %d", indent, i, s.Iters, s.Offset)
	}
}

// unencrypted is how many clusters of an encrypted image lie in it in the clear:
// the format encrypts no compressed ones. nvtool writes none, and QEMU can.
func unencrypted(im *qcow2.Image, res *qcow2.CheckResult) int64 {
	info, err := im.Info()
	if err != nil || info.Encryption == "" {
		return 0
	}
	return res.Compressed
}

func plainClusters(n int64) string {
	return count(n, "compressed cluster") + " of this encrypted image aren't encrypted, as the format has it: whoever has the file reads them; nvtool img convert makes an image without"
}
