package swtpm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"nvstore.dev/tpmstate"
)

// A Key is an AES key as swtpm's --key and --migration-key take it: 16 or 32
// bytes, which it uses for AES-CBC and for HMAC-SHA256 alike.
type Key struct{ k []byte }

// A KDF makes a key of a passphrase, as swtpm's "kdf=" names it.
type KDF int

const (
	PBKDF2 KDF = iota // PBKDF2-HMAC-SHA512, 1000 rounds, salt "swtpm"
	SHA512            // the first bytes of the digest
)

// ErrKeyFormat: the bytes aren't a key.
var ErrKeyFormat = errors.New("not a key: 16 or 32 bytes, or twice as many hexadecimal digits")

// NewKey takes a raw key of 16 or 32 bytes.
func NewKey(k []byte) (*Key, error) {
	if len(k) != 16 && len(k) != 32 {
		return nil, fmt.Errorf("%d bytes: %w", len(k), ErrKeyFormat)
	}
	return &Key{bytes.Clone(k)}, nil
}

// ParseKey takes what lies in a key file of swtpm's "format=hex": 32 or 64
// digits, with or without "0x" in front, up to white space.
func ParseKey(text []byte) (*Key, error) {
	s := strings.TrimPrefix(string(text), "0x")
	if i := strings.IndexAny(s, " \t\r\n\v\f"); i >= 0 {
		s = s[:i]
	}
	k, err := hex.DecodeString(s)
	if err != nil {
		return nil, fmt.Errorf("%w", ErrKeyFormat) // not what was read: it may be the key
	}
	return NewKey(k)
}

// KeyOfPassphrase derives a key of 16 or 32 bytes from the bytes of a
// passphrase file. swtpm takes them as they are, with a newline at the end.
func KeyOfPassphrase(passphrase []byte, kdf KDF, size int) (*Key, error) {
	if size != 16 && size != 32 {
		return nil, fmt.Errorf("%d bytes: %w", size, ErrKeyFormat)
	}
	if kdf == SHA512 {
		d := sha512.Sum512(passphrase)
		return NewKey(d[:size])
	}
	k, err := pbkdf2.Key(sha512.New, string(passphrase), []byte("swtpm"), 1000, size)
	if err != nil {
		return nil, err
	}
	return NewKey(k)
}

// Bits returns 128 or 256.
func (k *Key) Bits() int { return len(k.k) * 8 }

// Wipe overwrites the key.
func (k *Key) Wipe() { clear(k.k) }

// mac is over ciphertext and IV.
func (k *Key) mac(text, iv []byte) []byte {
	h := hmac.New(sha256.New, k.k)
	h.Write(text)
	h.Write(iv)
	return h.Sum(nil)
}

// seal encrypts p under a fresh IV. Padding is that of PKCS #7, but to the
// key's length in place of the cipher's block.
func (k *Key) seal(p, iv []byte) (text, mac []byte, err error) {
	block, err := aes.NewCipher(k.k)
	if err != nil {
		return nil, nil, err
	}
	pad := len(k.k) - len(p)%len(k.k)
	text = append(bytes.Clone(p), bytes.Repeat([]byte{byte(pad)}, pad)...)
	cipher.NewCBCEncrypter(block, iv[:aes.BlockSize]).CryptBlocks(text, text)
	return text, k.mac(text, iv), nil
}

// open decrypts text, which must have been authenticated, or carry a digest.
func (k *Key) open(text, iv []byte) ([]byte, error) {
	block, err := aes.NewCipher(k.k)
	if err != nil {
		return nil, err
	}
	if len(text) < len(k.k) || len(text)%aes.BlockSize != 0 {
		return nil, fmt.Errorf("%d bytes of ciphertext: %w", len(text), ErrKey)
	}
	p := make([]byte, len(text))
	cipher.NewCBCDecrypter(block, iv[:aes.BlockSize]).CryptBlocks(p, text)
	pad := int(p[len(p)-1])
	if pad == 0 || pad > len(k.k) || !bytes.Equal(p[len(p)-pad:], bytes.Repeat([]byte{byte(pad)}, pad)) {
		return nil, fmt.Errorf("padding: %w", ErrKey)
	}
	return p[:len(p)-pad], nil
}

// A layer is one of the two wrappings: tags and flags of its own.
type layer struct {
	plain, crypted, iv uint16
	encrypted, long    uint16
}

var (
	fileLayer      = layer{tagData, tagEncryptedData, tagIVEncryptedData, flagEncrypted, flag256}
	migrationLayer = layer{tagMigrationData, tagEncryptedMigrationData, tagIVEncryptedMigration, flagMigrationCrypted, flagMigration256}
)

// unwrap returns what is in the fields of a layer. plain allows a state that
// isn't encrypted although there is a key.
func (l layer) unwrap(list []Field, off int, flags uint16, k *Key, plain bool) ([]byte, error) {
	if flags&l.encrypted == 0 {
		if k != nil && !plain {
			return nil, ErrPlain
		}
		if flags&l.long != 0 {
			return nil, bad("swtpm state header", 4, "flags", flags, "a key's length only with encryption")
		}
		return value(list, l.plain), only(list, off, l.plain)
	}
	tags := []uint16{l.crypted, tagHMAC, l.iv}
	if value(list, l.iv) == nil {
		tags = tags[:2] // swtpm before 0.6 had an IV of zeros
	}
	if err := only(list, off, tags...); err != nil {
		return nil, err
	}
	want := 16
	if flags&l.long != 0 {
		want = 32
	}
	switch {
	case k == nil:
		return nil, fmt.Errorf("%w: it takes one of %d bits", ErrNoKey, want*8)
	case len(k.k) != want:
		return nil, fmt.Errorf("a key of %d bits, and it takes one of %d bits: %w", k.Bits(), want*8, ErrKey)
	}
	text, iv := value(list, l.crypted), value(list, l.iv)
	if iv != nil && len(iv) < aes.BlockSize {
		return nil, bad("swtpm state field", off, "iv", len(iv), "at least 16 bytes")
	}
	if subtle.ConstantTimeCompare(k.mac(text, iv), value(list, tagHMAC)) != 1 {
		return nil, fmt.Errorf("HMAC: %w", ErrKey)
	}
	if iv == nil {
		iv = make([]byte, aes.BlockSize)
	}
	return k.open(text, iv)
}

// random is where IVs are from.
var random = rand.Reader

// wrap makes the fields of a layer, and the flags.
func (l layer) wrap(p []byte, k *Key) ([]Field, uint16, error) {
	if k == nil {
		return []Field{{l.plain, p}}, 0, nil
	}
	iv := make([]byte, len(k.k)) // twice a block for a key of 256 bits, as swtpm has it
	if _, err := io.ReadFull(random, iv); err != nil {
		return nil, 0, err
	}
	text, mac, err := k.seal(p, iv)
	if err != nil {
		return nil, 0, err
	}
	flags := l.encrypted
	if len(k.k) == 32 {
		flags |= l.long
	}
	return []Field{{l.crypted, text}, {tagHMAC, mac}, {l.iv, iv}}, flags, nil
}

// OpenFile returns the state in a state file. A nil key is for a plain one. A
// key with a plain state is ErrPlain, and an encrypted state without is
// ErrNoKey.
func OpenFile(p []byte, k *Key) ([]byte, error) {
	b, err := Parse(p)
	if err != nil {
		return nil, err
	}
	if b.Flags&(flagMigration|flagMigrationCrypted|flagMigration256) != 0 {
		return nil, bad("swtpm state header", 4, "flags", b.Flags, "no flag of migration in a file")
	}
	if b.Version == 1 {
		return openV1(b.Body, b.Flags, k)
	}
	return fileLayer.unwrap(b.Fields, headerLen, b.Flags, k, false)
}

// openV1 reads version 1 (swtpm 0.1): the state as it is, or in AES-CBC with
// an IV of zeros and with its SHA-256 in front.
func openV1(body []byte, flags uint16, k *Key) ([]byte, error) {
	if flags&flagEncrypted == 0 {
		if k != nil {
			return nil, ErrPlain
		}
		return body, nil
	}
	if k == nil {
		return nil, ErrNoKey
	}
	p, err := k.open(body, make([]byte, aes.BlockSize))
	if err != nil {
		return nil, err
	}
	if len(p) < sha256.Size {
		return nil, fmt.Errorf("digest: %w", ErrKey)
	}
	if d := sha256.Sum256(p[sha256.Size:]); !bytes.Equal(d[:], p[:sha256.Size]) {
		return nil, fmt.Errorf("digest: %w", ErrKey)
	}
	return p[sha256.Size:], nil
}

// SealFile makes the state file of a state, encrypted if there is a key.
func SealFile(state []byte, k *Key) ([]byte, error) {
	if len(state) > tpmstate.MaxState {
		return nil, tpmstate.ErrTooLarge
	}
	list, flags, err := fileLayer.wrap(state, k)
	if err != nil {
		return nil, err
	}
	return (&Blob{Version: version, MinVersion: 1, Flags: flags, Fields: list}).Encode(), nil
}

// MigrationKeys are what a blob of the control channel is wrapped in: the
// file's key inside, the migration key outside. Either may be nil.
type MigrationKeys struct{ File, Migration *Key }

// OpenBlob returns the state in a blob that CMD_GET_STATEBLOB handed out. As
// in swtpm, a blob that wasn't encrypted is accepted although there are keys:
// that is how a machine moves to a host that encrypts.
func OpenBlob(p []byte, keys MigrationKeys) ([]byte, error) {
	b, err := Parse(p)
	if err != nil {
		return nil, err
	}
	if b.Version == 1 {
		return openV1(b.Body, b.Flags, keys.File)
	}
	if b.Flags&flagMigration == 0 {
		return nil, bad("swtpm state header", 4, "flags", b.Flags, "the flag of migration data (4)")
	}
	inner, err := migrationLayer.unwrap(b.Fields, headerLen, b.Flags, keys.Migration, true)
	if err != nil {
		return nil, fmt.Errorf("migration key: %w", err)
	}
	list, err := parseFields(inner, 0)
	if err != nil {
		return nil, err
	}
	state, err := fileLayer.unwrap(list, 0, b.Flags, keys.File, true)
	if err != nil {
		return nil, fmt.Errorf("state key: %w", err)
	}
	return state, nil
}

// SealBlob makes a blob for CMD_SET_STATEBLOB.
func SealBlob(state []byte, keys MigrationKeys) ([]byte, error) {
	if len(state) > tpmstate.MaxState {
		return nil, tpmstate.ErrTooLarge
	}
	list, inner, err := fileLayer.wrap(state, keys.File)
	if err != nil {
		return nil, err
	}
	list, outer, err := migrationLayer.wrap(appendFields(nil, list), keys.Migration)
	if err != nil {
		return nil, err
	}
	return (&Blob{Version: version, MinVersion: 1, Flags: inner | outer | flagMigration, Fields: list}).Encode(), nil
}
