package swtpm

import (
	"encoding/binary"
	"errors"
	"slices"

	"nvstore.dev/image"
	"nvstore.dev/tpmstate"
)

// Kinds of errors, for errors.Is. Those about bytes come as an
// image.FormatError with the offset.
var (
	// ErrFormat: these aren't the bytes of a state file.
	ErrFormat = errors.New("not a state file of swtpm")
	// ErrNoKey: the state is encrypted, and no key was given.
	ErrNoKey = errors.New("the TPM state is encrypted, and no key was given")
	// ErrKey: the key is wrong, or the encrypted state is damaged; which of
	// the two, nothing tells.
	ErrKey = errors.New("wrong key, or damaged TPM state")
	// ErrPlain: a key was given, and the state isn't encrypted.
	ErrPlain = errors.New("a key was given, and the TPM state isn't encrypted")
)

// Tags of the fields (swtpm, src/swtpm/tlv.h).
const (
	tagData                   = 1
	tagEncryptedData          = 2
	tagHMAC                   = 3
	tagMigrationData          = 4
	tagEncryptedMigrationData = 5
	tagIVEncryptedData        = 6
	tagIVEncryptedMigration   = 7
)

// flags of the header (swtpm, src/swtpm/swtpm_nvstore.c).
const (
	flagEncrypted        = 0x01
	flagMigrationCrypted = 0x02
	flagMigration        = 0x04
	flag256              = 0x08
	flagMigration256     = 0x10
)

const (
	headerLen = 10
	tlvLen    = 6
	version   = 2

	// maxFile bounds a state file: a state, its wrapping twice over.
	maxFile = tpmstate.MaxState + 4096
)

// A Blob is a state file, or a blob of the control channel, taken apart.
// Version 1 has no fields; what follows its header is in Body.
type Blob struct {
	Version    byte // 1 or 2
	MinVersion byte // version that a reader must know
	Flags      uint16
	Fields     []Field
	Body       []byte
}

// A Field is one tag with its value.
type Field struct {
	Tag   uint16
	Value []byte
}

func bad(structure string, off int, field string, got any, want string) error {
	return &image.FormatError{Off: int64(off), Struct: structure, Field: field, Got: got, Want: want, Kind: ErrFormat}
}

// Parse takes a state file apart. All of it must be accounted for: the length
// in the header, each field's length, no tag twice, no unknown version. The
// values share memory with p.
func Parse(p []byte) (*Blob, error) {
	const hdr = "swtpm state header"
	switch {
	case len(p) < headerLen:
		return nil, bad(hdr, 0, "", len(p), "at least 10 bytes")
	case len(p) > maxFile:
		return nil, bad(hdr, 0, "", len(p), "at most 512 KiB of state")
	}
	b := &Blob{Version: p[0], MinVersion: p[1], Flags: binary.BigEndian.Uint16(p[4:])}
	size, total := binary.BigEndian.Uint16(p[2:]), binary.BigEndian.Uint32(p[6:])
	switch {
	case b.Version != 1 && b.Version != version:
		return nil, bad(hdr, 0, "version", b.Version, "1 or 2")
	case b.MinVersion == 0 || b.MinVersion > b.Version:
		return nil, bad(hdr, 1, "min_version", b.MinVersion, "1 to the version")
	case size != headerLen:
		return nil, bad(hdr, 2, "hdrsize", size, "10")
	case uint64(total) != uint64(len(p)):
		return nil, bad(hdr, 6, "totlen", total, "the length of the file")
	case b.Flags&^(flagEncrypted|flagMigrationCrypted|flagMigration|flag256|flagMigration256) != 0:
		return nil, bad(hdr, 4, "flags", b.Flags, "no flag above 0x1f")
	}
	if b.Version == 1 {
		b.Body = p[headerLen:]
		return b, nil
	}
	var err error
	b.Fields, err = parseFields(p, headerLen)
	return b, err
}

// parseFields takes p[off:] apart. Offsets in errors are those in p.
func parseFields(p []byte, off int) ([]Field, error) {
	const name = "swtpm state field"
	var list []Field
	for off < len(p) {
		if len(p)-off < tlvLen {
			return nil, bad(name, off, "", len(p)-off, "6 bytes of tag and length")
		}
		tag, n := binary.BigEndian.Uint16(p[off:]), binary.BigEndian.Uint32(p[off+2:])
		switch {
		case tag < tagData || tag > tagIVEncryptedMigration:
			return nil, bad(name, off, "tag", tag, "1 to 7")
		case uint64(n) > uint64(len(p)-off-tlvLen):
			return nil, bad(name, off+2, "length", n, "no more than what follows")
		case slices.ContainsFunc(list, func(f Field) bool { return f.Tag == tag }):
			return nil, bad(name, off, "tag", tag, "each tag once")
		}
		off += tlvLen
		list = append(list, Field{tag, p[off : off+int(n)]})
		off += int(n)
	}
	return list, nil
}

// Encode puts a blob together again.
func (b *Blob) Encode() []byte {
	out := make([]byte, headerLen, headerLen+len(b.Body)+fieldsLen(b.Fields))
	out[0], out[1] = b.Version, b.MinVersion
	binary.BigEndian.PutUint16(out[2:], headerLen)
	binary.BigEndian.PutUint16(out[4:], b.Flags)
	out = appendFields(append(out, b.Body...), b.Fields)
	binary.BigEndian.PutUint32(out[6:], uint32(len(out)))
	return out
}

func fieldsLen(list []Field) int {
	n := 0
	for _, f := range list {
		n += tlvLen + len(f.Value)
	}
	return n
}

func appendFields(out []byte, list []Field) []byte {
	for _, f := range list {
		out = binary.BigEndian.AppendUint16(out, f.Tag)
		out = binary.BigEndian.AppendUint32(out, uint32(len(f.Value)))
		out = append(out, f.Value...)
	}
	return out
}

// value returns the value of a tag, or nil.
func value(list []Field, tag uint16) []byte {
	for _, f := range list {
		if f.Tag == tag {
			return f.Value
		}
	}
	return nil
}

// only refuses fields other than tags, and a missing one.
func only(list []Field, off int, tags ...uint16) error {
	for _, f := range list {
		if !slices.Contains(tags, f.Tag) {
			return bad("swtpm state field", off, "tag", f.Tag, "one that the flags in the header ask for")
		}
	}
	for _, tag := range tags {
		if value(list, tag) == nil {
			return bad("swtpm state field", off, "tag", tag, "a field of this tag, as the flags in the header ask for")
		}
	}
	return nil
}

// Encrypted tells whether the state in it is, with either key.
func (b *Blob) Encrypted() bool { return b.Flags&(flagEncrypted|flagMigrationCrypted) != 0 }
