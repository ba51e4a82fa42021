package luks

import "hash"

// ReencodeV1 decodes a LUKS1 header and encodes it again; nil if it can't be
// decoded.
func ReencodeV1(p []byte) []byte {
	h, err := decodeV1(p)
	if err != nil {
		return nil
	}
	return h.encode()
}

const (
	V1HeaderSize = v1HeaderSize
	V2BinSize    = v2BinSize
)

// ReencodeBin is ReencodeV1 for LUKS2's binary header.
func ReencodeBin(p []byte, off int64) []byte {
	b, err := decodeBin(p, off)
	if err != nil {
		return nil
	}
	return b.encode()
}

// ParseJSON returns LUKS2's JSON as encoding/json would, or nil.
func ParseJSON(p []byte) map[string]any {
	o, err := parseJSON(p)
	if err != nil {
		return nil
	}
	return o.m
}

func Split(h func() hash.Hash, key []byte, n int) []byte   { return afSplit(h, key, n) }
func Merge(h func() hash.Hash, split []byte, n int) []byte { return afMerge(h, split, n) }

// Crypt encrypts or decrypts sectors in place.
func Crypt(encryption string, key, p []byte, size int, sector uint64, decrypt bool) error {
	s, err := parseSpec(encryption, "", -1, "")
	if err != nil {
		return err
	}
	c, err := s.newCrypter(key, size)
	if err != nil {
		return err
	}
	if decrypt {
		c.decrypt(p, p, sector)
	} else {
		c.encrypt(p, p, sector)
	}
	return nil
}
