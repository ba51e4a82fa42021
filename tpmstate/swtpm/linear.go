package swtpm

import (
	"cmp"
	"encoding/binary"
	"math/bits"
	"slices"

	"nvstore.dev/tpmstate"
)

// The linear file (swtpm, src/swtpm/swtpm_nvstore_linear.h), little-endian:
//
//	0   magic 0x737774706d6c696e
//	8   version 1, a byte of padding
//	10  length of the header, 192
//	12  15 sections of offset, length of data, length of section
//	192 sections; each has a power of two of bytes, from the first store on
const (
	linearMagic    = 0x737774706d6c696e
	linearHeader   = 192
	linearSections = 15

	// maxLinear bounds the file: three sections of the largest file.
	maxLinear = linearHeader + 3*(1<<20)
)

// Linear is a linear file taken apart: the state files in it, by kind.
type Linear struct {
	Files [3][]byte // nil where there is none
}

type section struct {
	nr               int
	off, data, space uint32
}

// ParseLinear takes a linear file apart. swtpm reformats a file whose magic is
// wrong and manufactures a new TPM in a section that lost its offset; here
// each is an error, and so is a section that overlaps another, leaves a gap or
// ends outside the file. What lies behind the last section, as in a file of a
// block device, is ignored. The files share memory with p.
func ParseLinear(p []byte) (*Linear, error) {
	const name = "swtpm linear file header"
	if len(p) < linearHeader {
		return nil, bad(name, 0, "", len(p), "at least 192 bytes")
	}
	le := binary.LittleEndian
	switch {
	case le.Uint64(p) != linearMagic:
		return nil, bad(name, 0, "magic", le.Uint64(p), "0x737774706d6c696e")
	case p[8] != 1:
		return nil, bad(name, 8, "version", p[8], "1")
	case le.Uint16(p[10:]) != linearHeader:
		return nil, bad(name, 10, "hdrsize", le.Uint16(p[10:]), "192")
	}
	var list []section
	for i := range linearSections {
		at := 12 + 12*i
		s := section{i, le.Uint32(p[at:]), le.Uint32(p[at+4:]), le.Uint32(p[at+8:])}
		if s.off == 0 {
			if s.data != 0 || s.space != 0 {
				return nil, bad(name, at, "offset", s.off, "an offset, as the section has a length")
			}
			continue
		}
		switch {
		case i >= len(Linear{}.Files):
			return nil, bad(name, at, "offset", s.off, "no section but the first three")
		case s.space != roundUp(s.space) || s.space == 0:
			return nil, bad(name, at+8, "section_length", s.space, "a power of two")
		case s.data > s.space:
			return nil, bad(name, at+4, "data_length", s.data, "no more than the section")
		case uint64(s.off)+uint64(s.space) > uint64(len(p)) || s.off > maxLinear:
			return nil, bad(name, at, "offset", s.off, "a section inside the file")
		}
		list = append(list, s)
	}
	return pick(p, list)
}

// pick checks that sections lie one behind another, and takes their data.
func pick(p []byte, list []section) (*Linear, error) {
	slices.SortFunc(list, func(a, b section) int { return cmp.Compare(a.off, b.off) })
	l := &Linear{}
	end := uint32(linearHeader)
	for _, s := range list {
		if s.off != end {
			return nil, bad("swtpm linear file header", 12+12*s.nr, "offset", s.off, "where the section before ends")
		}
		end += s.space
		l.Files[s.nr] = p[s.off : s.off+s.data]
	}
	return l, nil
}

// roundUp returns the power of two that is n or above. A section has one byte
// at least.
func roundUp(n uint32) uint32 {
	if n <= 1 {
		return n
	}
	return 1 << bits.Len32(n-1)
}

// Encode makes a linear file, as swtpm does that stores the files in the order
// of their kinds.
func (l *Linear) Encode() []byte {
	out := make([]byte, linearHeader)
	le := binary.LittleEndian
	le.PutUint64(out, linearMagic)
	out[8] = 1
	le.PutUint16(out[10:], linearHeader)
	for i, f := range l.Files {
		if f == nil {
			continue
		}
		at, space := 12+12*i, roundUp(uint32(len(f)))
		le.PutUint32(out[at:], uint32(len(out)))
		le.PutUint32(out[at+4:], uint32(len(f)))
		le.PutUint32(out[at+8:], space)
		out = append(append(out, f...), make([]byte, int(space)-len(f))...)
	}
	return out
}

// FileName returns the name of a state file in a folder, such as
// "tpm2-00.permall".
func FileName(v tpmstate.Version, k tpmstate.Kind) string {
	if v == tpmstate.TPM12 {
		return "tpm-00." + k.LibraryName()
	}
	return "tpm2-00." + k.LibraryName()
}
