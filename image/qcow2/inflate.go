package qcow2

import (
	"encoding/binary"
	"errors"
	bits16 "math/bits"
)

// A decoder of deflate (RFC 1951) for what compressed clusters are: one piece of
// input, and an output of known size. It is several times as fast as readers of
// streams are.

var errDeflate = errors.New("invalid deflate data")

// Sizes of the tables: codes of up to so many bits are found with one look, and
// those of up to 15 with another one in a part of the table behind them.
const (
	litBits  = 11
	distBits = 8
	litMax   = 2400 // a bound on entries, for 288 codes (zlib's enough.c: 2342)
	distMax  = 512  // for 32 codes (402)
)

// An entry of a table has the number of bits of the code in its low byte; then
// comes the number of extra bits, or of the bits that index the second table;
// then what it is; and in the high half the literal, the base of the length or
// distance, or the index of the second table.
const (
	isLiteral = 0 << 12
	isBase    = 1 << 12
	isEnd     = 2 << 12
	isTable   = 3 << 12
	isInvalid = 4 << 12
	isMask    = 7 << 12
)

type inflater struct {
	lit  [litMax]uint32
	dist [distMax]uint32
	lens [288 + 32]uint8

	src []byte
	pos int
	bit uint64 // bits that were read ahead, the next one lowest
	n   uint   // how many
}

var lengthSymbols, distSymbols = func() (l [31]uint32, d [32]uint32) {
	base := uint32(3)
	for i := range 28 {
		extra := uint32(max(0, i/4-1))
		l[i] = base<<16 | isBase | extra<<8
		base += 1 << extra
	}
	l[28] = 258<<16 | isBase
	l[29], l[30] = isInvalid, isInvalid
	base = 1
	for i := range 30 {
		extra := uint32(max(0, i/2-1))
		d[i] = base<<16 | isBase | extra<<8
		base += 1 << extra
	}
	d[30], d[31] = isInvalid, isInvalid
	return l, d
}()

func literalSymbol(i int) uint32 {
	switch {
	case i < 256:
		return uint32(i)<<16 | isLiteral
	case i == 256:
		return isEnd
	}
	return lengthSymbols[i-257]
}

func distSymbol(i int) uint32 { return distSymbols[i] }

func plainSymbol(i int) uint32 { return uint32(i) << 16 }

// inflate fills dst from src. The data may go on after that.
func (f *inflater) inflate(dst, src []byte) error {
	f.src, f.pos, f.bit, f.n = src, 0, 0, 0
	defer func() { f.src = nil }()
	for o := 0; o < len(dst); {
		if !f.need(3) {
			return errDeflate
		}
		last := f.take(1)
		var err error
		switch f.take(2) {
		case 0:
			o, err = f.stored(dst, o)
		case 1:
			f.fixed()
			o, err = f.block(dst, o)
		case 2:
			if err = f.dynamic(); err == nil {
				o, err = f.block(dst, o)
			}
		default:
			err = errDeflate
		}
		if err != nil {
			return err
		}
		if last == 1 && o < len(dst) {
			return errDeflate
		}
	}
	return nil
}

// refill reads ahead 56 bits or more, or what is left.
func (f *inflater) refill() {
	if f.pos+8 <= len(f.src) {
		f.bit |= binary.LittleEndian.Uint64(f.src[f.pos:]) << f.n
		f.pos += int((63 - f.n) >> 3)
		f.n |= 56
		return
	}
	for f.n <= 56 && f.pos < len(f.src) {
		f.bit |= uint64(f.src[f.pos]) << f.n
		f.pos++
		f.n += 8
	}
}

func (f *inflater) need(n uint) bool {
	if f.n < n {
		f.refill()
	}
	return f.n >= n
}

func (f *inflater) take(n uint) uint64 {
	v := f.bit & (1<<n - 1)
	f.bit >>= n
	f.n -= n
	return v
}

func (f *inflater) stored(dst []byte, o int) (int, error) {
	f.take(f.n & 7)
	// What was read ahead goes back.
	f.pos -= int(f.n >> 3)
	f.bit, f.n = 0, 0
	if len(f.src)-f.pos < 4 {
		return o, errDeflate
	}
	n := binary.LittleEndian.Uint16(f.src[f.pos:])
	if n != ^binary.LittleEndian.Uint16(f.src[f.pos+2:]) {
		return o, errDeflate
	}
	f.pos += 4
	k := copy(dst[o:], f.src[f.pos:min(len(f.src), f.pos+int(n))])
	if k < int(n) && o+k < len(dst) {
		return o, errDeflate
	}
	f.pos += k
	return o + k, nil
}

func (f *inflater) fixed() {
	for i := range 288 {
		switch {
		case i < 144, i >= 280:
			f.lens[i] = 8
		case i < 256:
			f.lens[i] = 9
		default:
			f.lens[i] = 7
		}
	}
	_ = buildCodes(f.lit[:], litBits, f.lens[:288], literalSymbol)
	for i := range 32 {
		f.lens[i] = 5
	}
	_ = buildCodes(f.dist[:], distBits, f.lens[:32], distSymbol)
}

var codeOrder = [19]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// dynamic reads the codes of a block.
func (f *inflater) dynamic() error {
	if !f.need(14) {
		return errDeflate
	}
	nlit, ndist, ncode := int(f.take(5))+257, int(f.take(5))+1, int(f.take(4))+4
	if nlit > 286 || ndist > 30 {
		return errDeflate
	}
	var lens [19]uint8
	for i := range ncode {
		if !f.need(3) {
			return errDeflate
		}
		lens[codeOrder[i]] = uint8(f.take(3))
	}
	if buildCodes(f.dist[:], 7, lens[:], plainSymbol) != nil {
		return errDeflate
	}
	for i := 0; i < nlit+ndist; {
		f.refill()
		e := f.dist[f.bit&127]
		if uint(e&0xff) > f.n || e&isMask == isInvalid {
			return errDeflate
		}
		f.take(uint(e & 0xff))
		sym := e >> 16
		if sym < 16 {
			f.lens[i] = uint8(sym)
			i++
			continue
		}
		v, base, extra := uint8(0), 3, uint(3)
		switch sym {
		case 16:
			if i == 0 {
				return errDeflate
			}
			v, extra = f.lens[i-1], 2
		case 18:
			base, extra = 11, 7
		}
		if f.n < extra {
			return errDeflate
		}
		k := base + int(f.take(extra))
		if k > nlit+ndist-i {
			return errDeflate
		}
		for range k {
			f.lens[i] = v
			i++
		}
	}
	if f.lens[256] == 0 {
		return errDeflate
	}
	if err := buildCodes(f.lit[:], litBits, f.lens[:nlit], literalSymbol); err != nil {
		return err
	}
	return buildCodes(f.dist[:], distBits, f.lens[nlit:nlit+ndist], distSymbol)
}

// buildCodes makes the table of a set of codes from their lengths. Incomplete
// sets are refused, as zlib does, except a single code of one bit and none at
// all.
func buildCodes(table []uint32, bits uint, lens []uint8, symbol func(int) uint32) error {
	var count [16]int
	longest := uint(0)
	for _, l := range lens {
		count[l]++
		longest = max(longest, uint(l))
	}
	for i := range 1 << bits {
		table[i] = isInvalid | 1
	}
	if longest == 0 {
		return nil
	}
	left, code := 1, 0
	var next [16]int
	for l := 1; l < 16; l++ {
		left = left<<1 - count[l]
		if left < 0 {
			return errDeflate
		}
		next[l] = code
		code = (code + count[l]) << 1
	}
	if left > 0 && longest != 1 {
		return errDeflate
	}
	// By length, and by symbol among those of a length: the order of codes.
	var at [16]int
	for l := 1; l < 15; l++ {
		at[l+1] = at[l] + count[l]
	}
	var sorted [288]uint16
	for i, l := range lens {
		if l > 0 {
			sorted[at[l]] = uint16(i)
			at[l]++
		}
	}
	used, total := 1<<bits, at[15]
	for _, i := range sorted[:total] {
		n := uint(lens[i])
		e := symbol(int(i)) | uint32(n)
		rev := uint(bits16.Reverse16(uint16(next[n])) >> (16 - n))
		next[n]++
		if n <= bits {
			for k := rev; k < 1<<bits; k += 1 << n {
				table[k] = e
			}
			count[n]--
			continue
		}
		// Codes that share their first bits share a second table, as
		// large as the longest of them needs.
		first := rev & (1<<bits - 1)
		if table[first]&isMask != isTable {
			sub := n - bits
			for room := 1 << sub; sub+bits < longest; sub, room = sub+1, room<<1 {
				if room -= count[sub+bits]; room <= 0 {
					break
				}
			}
			if used+1<<sub > len(table) {
				return errDeflate
			}
			table[first] = uint32(used)<<16 | isTable | uint32(sub)<<8 | uint32(bits)
			for k := range 1 << sub {
				table[used+k] = isInvalid | 1
			}
			used += 1 << sub
		}
		t := table[first]
		sub := uint(t >> 8 & 15)
		if n-bits > sub {
			return errDeflate
		}
		for k := rev >> bits; k < 1<<sub; k += 1 << (n - bits) {
			table[int(t>>16)+int(k)] = e
		}
		count[n]--
	}
	return nil
}

// block decodes symbols until the block's end, or that of dst.
func (f *inflater) block(dst []byte, o int) (int, error) {
	lit, dist := &f.lit, &f.dist
	src, pos, b, n := f.src, f.pos, f.bit, f.n
	for {
		// 56 bits are enough for three literals and for a length with a
		// distance, but not for both.
		if pos+8 <= len(src) {
			b |= binary.LittleEndian.Uint64(src[pos:]) << n
			pos += int((63 - n) >> 3)
			n |= 56
		} else {
			for n <= 56 && pos < len(src) {
				b |= uint64(src[pos]) << n
				pos++
				n += 8
			}
		}
		e := lit[b&(1<<litBits-1)]
		if e&isMask == isTable {
			e = lit[(e>>16+uint32(b>>litBits)&(1<<(e>>8&15)-1))%litMax]
		}
		c := uint(e & 0xff)
		if c > n {
			return o, errDeflate
		}
		b >>= c & 63
		n -= c
		if e&isMask == isLiteral {
			dst[o] = byte(e >> 16)
			if o++; o == len(dst) {
				break
			}
			e = lit[b&(1<<litBits-1)]
			if c = uint(e & 0xff); e&isMask != isLiteral || c > n {
				continue
			}
			b >>= c & 63
			n -= c
			dst[o] = byte(e >> 16)
			if o++; o == len(dst) {
				break
			}
			e = lit[b&(1<<litBits-1)]
			if c = uint(e & 0xff); e&isMask != isLiteral || c > n {
				continue
			}
			b >>= c & 63
			n -= c
			dst[o] = byte(e >> 16)
			if o++; o == len(dst) {
				break
			}
			continue
		}
		if e&isMask != isBase {
			if e&isMask == isEnd {
				break
			}
			return o, errDeflate
		}
		x := uint(e >> 8 & 15)
		if x > n {
			return o, errDeflate
		}
		length := int(e>>16) + int(b&(1<<x-1))
		b >>= x
		n -= x
		e = dist[b&(1<<distBits-1)]
		if e&isMask == isTable {
			e = dist[(e>>16+uint32(b>>distBits)&(1<<(e>>8&15)-1))%distMax]
		}
		c, x = uint(e&0xff), uint(e>>8&15)
		if c+x > n || e&isMask != isBase {
			return o, errDeflate
		}
		b >>= c & 63
		back := int(e>>16) + int(b&(1<<x-1))
		b >>= x
		n -= c + x
		if back > o {
			return o, errDeflate
		}
		// A distance below the length repeats what it copies.
		start, end := o-back, min(o+length, len(dst))
		for o < end {
			o += copy(dst[o:end], dst[start:o])
		}
		if o == len(dst) {
			break
		}
	}
	f.pos, f.bit, f.n = pos, b, n
	return o, nil
}
