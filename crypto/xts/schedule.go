//go:build (amd64 || arm64) && !purego

package xts

import (
	"encoding/binary"
	"math/bits"
)

// maxRoundKeys is what AES-256 needs: 14 rounds and one key before them.
const maxRoundKeys = 15

// roundKeys is an AES key schedule in the order in which it is used.
type roundKeys [maxRoundKeys * BlockSize]byte

// A schedule is a key as the kernels want it.
type schedule struct {
	enc, dec, tweak roundKeys
	rounds          int // 10, 12 or 14
}

// batch is how many sectors' tweaks are encrypted at a time, and how many
// blocks the kernels keep in flight.
const batch = 8

// tweakBatch holds the first tweak of each of a batch of sectors, and of one
// more, whose value is read but not used.
type tweakBatch [(batch + 1) * BlockSize]byte

func (s *schedule) expand(key []byte) {
	half := len(key) / 2
	s.rounds = half/4 + 6
	expandKey(&s.enc, key[:half], s.rounds)
	expandKey(&s.tweak, key[half:], s.rounds)
	// The equivalent inverse cipher, FIPS 197 section 5.3.5.
	for i := 0; i <= s.rounds; i++ {
		from, to := s.enc[(s.rounds-i)*BlockSize:][:BlockSize], s.dec[i*BlockSize:][:BlockSize]
		if i == 0 || i == s.rounds {
			copy(to, from)
		} else {
			invMixColumns(&to[0], &from[0])
		}
	}
}

// expandKey is FIPS 197 section 5.2, with words in little endian. The S-box is
// the instruction's, so that no table is indexed by secrets.
func expandKey(out *roundKeys, key []byte, rounds int) {
	le := binary.LittleEndian
	nk := len(key) / 4
	copy(out[:], key)
	rcon := uint32(1)
	for i := nk; i < 4*(rounds+1); i++ {
		w := le.Uint32(out[4*(i-1):])
		switch {
		case i%nk == 0:
			w = subWord(bits.RotateLeft32(w, -8)) ^ rcon
			rcon = rcon << 1
			if rcon > 0xff {
				rcon ^= 0x11b
			}
		case nk == 8 && i%nk == 4:
			w = subWord(w)
		}
		le.PutUint32(out[4*i:], w^le.Uint32(out[4*(i-nk):]))
	}
}

func (s *schedule) crypt(dst, src []byte, sector uint64, sectorSize int, step uint64, decrypt bool) {
	var t tweakBatch
	rk := &s.enc
	if decrypt {
		rk = &s.dec
	}
	blocks := sectorSize / BlockSize
	for len(src) > 0 {
		n := min(batch, len(src)/sectorSize)
		clear(t[:])
		for i := range n {
			binary.LittleEndian.PutUint64(t[i*BlockSize:], sector)
			sector += step
		}
		encrypt8(&t[0], &s.tweak[0], s.rounds)
		if blocks%batch == 0 {
			kernel(&dst[0], &src[0], &t[0], n, blocks/batch, &rk[0], s.rounds, decrypt)
		} else {
			for i := range n {
				oneSector(dst[i*sectorSize:], src[i*sectorSize:], t[i*BlockSize:], blocks, rk, s.rounds, decrypt)
			}
		}
		dst, src = dst[n*sectorSize:], src[n*sectorSize:]
	}
}

func (s *schedule) unit(dst, src []byte, tweak *[BlockSize]byte, decrypt bool) {
	var t tweakBatch
	copy(t[:], tweak[:])
	encrypt8(&t[0], &s.tweak[0], s.rounds)
	rk := &s.enc
	if decrypt {
		rk = &s.dec
	}
	oneSector(dst, src, t[:], len(src)/BlockSize, rk, s.rounds, decrypt)
}

// oneSector is for sectors that aren't whole batches of blocks. tweak is 32
// bytes, of which the first 16 are used.
func oneSector(dst, src, tweak []byte, blocks int, rk *roundKeys, rounds int, decrypt bool) {
	whole := blocks / batch
	if whole > 0 {
		kernel(&dst[0], &src[0], &tweak[0], 1, whole, &rk[0], rounds, decrypt)
		for range whole * batch {
			double((*[BlockSize]byte)(tweak))
		}
	}
	if blocks%batch == 0 {
		return
	}
	at := whole * batch * BlockSize
	tail(&dst[at], &src[at], &tweak[0], blocks%batch, &rk[0], rounds, decrypt)
}

// kernel runs the right one over sectors times batches of blocks, each sector
// with its tweak.
func kernel(dst, src, tweaks *byte, sectors, batches int, rk *byte, rounds int, decrypt bool) {
	if decrypt {
		decryptBatches(dst, src, tweaks, sectors, batches, rk, rounds)
	} else {
		encryptBatches(dst, src, tweaks, sectors, batches, rk, rounds)
	}
}

func tail(dst, src, tweak *byte, blocks int, rk *byte, rounds int, decrypt bool) {
	if decrypt {
		decryptBlocks(dst, src, tweak, blocks, rk, rounds)
	} else {
		encryptBlocks(dst, src, tweak, blocks, rk, rounds)
	}
}

// subWord is the S-box on each byte of w.
//
//go:noescape
func subWord(w uint32) uint32

// invMixColumns transforms 16 bytes, FIPS 197 section 5.3.3.
//
//go:noescape
func invMixColumns(dst, src *byte)

// encrypt8 encrypts 8 blocks in place.
//
//go:noescape
func encrypt8(buf, rk *byte, rounds int)

// encryptBatches encrypts sectors (1 or more) of batches (1 or more) times 8
// blocks. tweaks holds 16 bytes a sector, and 16 readable ones more.
//
//go:noescape
func encryptBatches(dst, src, tweaks *byte, sectors, batches int, rk *byte, rounds int)

//go:noescape
func decryptBatches(dst, src, tweaks *byte, sectors, batches int, rk *byte, rounds int)

// encryptBlocks encrypts blocks (1 or more) one by one, the first under the
// tweak, which it overwrites.
//
//go:noescape
func encryptBlocks(dst, src, tweak *byte, blocks int, rk *byte, rounds int)

//go:noescape
func decryptBlocks(dst, src, tweak *byte, blocks int, rk *byte, rounds int)
