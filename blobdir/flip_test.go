package blobdir_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/blobdir"
)

// Every flip of a single bit is detected, or harmless.

// A flipRun flips bits of one image and reads it after each.
type flipRun struct {
	want map[string][]byte
	opts *blobdir.Options
}

// outcome says what became of the store: the stage that an error or problem
// showed at, or "harmless"; "wrong bytes" is the failure this is about.
func (r *flipRun) outcome(img []byte) string {
	d, err := blobdir.Open(&flat{img}, r.opts)
	if err != nil {
		return "open"
	}
	defer d.Close()
	info, err := d.Info()
	if err != nil {
		return "info"
	}
	names := 0
	where := ""
	err = d.View(func(tx *blobdir.Tx) error {
		for e, err := range tx.List("") {
			if err != nil {
				return err
			}
			names++
			p, err := tx.Get(e.Name, 1<<20)
			if err != nil {
				where = "get"
				continue
			}
			if want, ok := r.want[e.Name]; !ok || !bytes.Equal(want, p) {
				where = "wrong bytes"
				return nil
			}
		}
		return nil
	})
	switch {
	case err != nil:
		return "list"
	case where != "":
		return where
	case names != len(r.want):
		return "wrong bytes"
	}
	rep, err := d.Check(context.Background(), nil)
	switch {
	case err != nil || !rep.Clean():
		return "check"
	case info.Status != (blobdir.Status{}):
		return "status"
	case len(rep.Warnings) > 0:
		return "warning"
	}
	return "harmless"
}

func TestEveryBitFlip(t *testing.T) {
	eachKind(t, func(t *testing.T, kind string) {
		seed := seedFor(t)
		good := base(t, kind)
		r := &flipRun{want: map[string][]byte{}, opts: options(t, kind, true)}
		var regions []blobdir.Region
		d, err := blobdir.Open(&flat{slices.Clone(good)}, r.opts)
		require.NoError(t, err)
		require.NoError(t, d.View(func(tx *blobdir.Tx) error {
			for e, err := range tx.List("") {
				require.NoError(t, err)
				r.want[e.Name], err = tx.Get(e.Name, 0)
				require.NoError(t, err)
			}
			return nil
		}))
		require.NoError(t, d.Regions(func(x blobdir.Region) error { regions = append(regions, x); return nil }))
		require.Equal(t, "harmless", r.outcome(slices.Clone(good)))

		bits := flipBits(good, regions, rand.New(rand.NewPCG(seed, 2)))
		counts := map[string]int{}
		var mu sync.Mutex
		var wg sync.WaitGroup
		workers := runtime.GOMAXPROCS(0)
		for w := range workers {
			wg.Go(func() {
				img := slices.Clone(good)
				for i := w; i < len(bits); i += workers {
					b := bits[i]
					img[b.at] ^= 1 << b.bit
					out := r.outcome(img)
					img[b.at] ^= 1 << b.bit
					mu.Lock()
					counts[out]++
					counts[b.kind+": "+out]++
					if out == "wrong bytes" || b.covered && out == "harmless" {
						t.Errorf("%s: bit %d of byte %#x: %s", b.kind, b.bit, b.at, out)
					}
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		keys := []string{}
		for k := range counts {
			if strings.Contains(k, ":") {
				keys = append(keys, fmt.Sprint(k, " ", counts[k]))
			}
		}
		slices.Sort(keys)
		t.Logf("%d flips (NVSTORE_SCALE of 10 or more: all of them), %d harmless\n  %s", len(bits), counts["harmless"], strings.Join(keys, "\n  "))
	})
}

type flip struct {
	at      int64
	bit     int
	kind    string
	covered bool // by a checksum that every reader meets
}

// flipBits lists the bits to flip: all of the structures' own bytes, and of
// content, padding and free blocks a sample unless NVSTORE_SCALE is large.
func flipBits(img []byte, regions []blobdir.Region, rng *rand.Rand) (bits []flip) {
	one, structure := 30/scale(), 1
	if testing.Short() {
		one, structure = 300, 20
	}
	if scale() >= 10 {
		one, structure = 0, 0
	}
	add := func(from, to int64, kind string, covered bool, oneOf int) {
		for at := from; at < to; at++ {
			for bit := range 8 {
				if oneOf <= 1 || rng.IntN(oneOf) == 0 {
					bits = append(bits, flip{at, bit, kind, covered})
				}
			}
		}
	}
	for _, x := range regions {
		n := x.Length
		fixed := x.Kind == blobdir.RegionHeader || x.Kind == blobdir.RegionRoot || x.Kind == blobdir.RegionSettled
		if fixed {
			n = int64(derSize(img[x.Offset:]))
		}
		switch x.Kind {
		case blobdir.RegionFree:
			add(x.Offset, x.Offset+x.Length, "free", false, max(50, 50*one))
			continue
		case blobdir.RegionChunk:
			add(x.Offset, x.Offset+n, "chunk", true, one)
		default:
			add(x.Offset, x.Offset+n, string(x.Kind), true, structure)
		}
		end := (x.Offset + max(n, 1) + 4095) &^ 4095
		add(x.Offset+n, end, "padding", false, 20*one)
	}
	return bits
}

// patchCRC changes four bytes at fix so that the CRC-32C of p stays want. A
// CRC is linear: each of the 32 bits changes it by a constant.
func patchCRC(p []byte, fix int, want []byte) bool {
	now := crcOf(p)
	target := uint64(be32(now) ^ be32(want))
	var rows [32]uint64 // effect on the CRC in the high half, bit in the low half
	for i := range rows {
		p[fix+i/8] ^= 1 << (i % 8)
		rows[i] = uint64(be32(crcOf(p))^be32(now))<<32 | 1<<i
		p[fix+i/8] ^= 1 << (i % 8)
	}
	target <<= 32
	for bit := 63; bit >= 32; bit-- {
		pivot := slices.IndexFunc(rows[:], func(r uint64) bool { return r>>bit == 1 })
		if pivot < 0 {
			if target>>bit&1 == 1 {
				return false
			}
			continue
		}
		row := rows[pivot]
		rows[pivot] = 0
		for i := range rows {
			if rows[i]>>bit&1 == 1 {
				rows[i] ^= row
			}
		}
		if target>>bit&1 == 1 {
			target ^= row
		}
	}
	for i := range 32 {
		if target>>i&1 == 1 {
			p[fix+i/8] ^= 1 << (i % 8)
		}
	}
	return bytes.Equal(crcOf(p), want)
}

func be32(p []byte) uint32 {
	return uint32(p[0])<<24 | uint32(p[1])<<16 | uint32(p[2])<<8 | uint32(p[3])
}

// An enemy without the key changes bytes so that their checksum stays right.
// In a sealed store that is tampering, by that name.
func TestFlipWithChecksumsMadeRight(t *testing.T) {
	for _, kind := range kinds[1:] {
		t.Run(kind, func(t *testing.T) {
			seed := seedFor(t)
			rng := rand.New(rand.NewPCG(seed, 3))
			good := base(t, kind)
			f := takeApart(t, good, rawKey)
			counts := map[string]int{}
			var extents []*extent
			for _, x := range []*extent{f.slots, f.free, f.dir} {
				x.walk(func(x *extent) { extents = append(extents, x) })
			}
			for _, x := range extents {
				n := len(x.bytes())
				for range 40 * scale() {
					// The CRC of the extent stays as it is, thanks to four
					// bytes elsewhere in it.
					img := slices.Clone(good)
					p := img[x.off : x.off+int64(n)]
					fix := rng.IntN(n - 4)
					at := rng.IntN(n)
					if at >= fix && at < fix+4 {
						continue
					}
					p[at] ^= 1 << rng.IntN(8)
					require.True(t, patchCRC(p, fix, x.ref.at("crc32c").val))
					counts[x.kind]++
					// The key slots are what the key comes from: a changed one
					// gives no key to tell tampering by, and opens nothing.
					refused := tamperedSomewhere(img, options(t, kind, true))
					if x.kind == "key slots" {
						refused = has(examine(img, options(t, kind, true)), "open", "", nil)
					}
					require.True(t, refused, "%s at %#x: bit in byte %d, made right at %d", x.kind, x.off, at, fix)
				}
			}
			t.Logf("refused as tampering: %v", counts)
		})
	}
}

// tamperedSomewhere tells whether opening or reading says tampering, and
// nothing says that all is well.
func tamperedSomewhere(img []byte, o *blobdir.Options) bool {
	for _, f := range examine(img, o) {
		if f.kind != nil && errors.Is(f.kind, blobdir.ErrTampered) || f.stage == "check" && (f.rule == "R24" || f.rule == "R25" || f.rule == "R18") {
			return true
		}
	}
	return false
}

// The same with the references' checksums made right, up to the root.
func TestFlipWithReferencesMadeRight(t *testing.T) {
	for _, kind := range kinds[1:] {
		t.Run(kind, func(t *testing.T) {
			seed := seedFor(t)
			rng := rand.New(rand.NewPCG(seed, 4))
			good := base(t, kind)
			for range 200 * scale() {
				f := takeApart(t, good, rawKey)
				var extents []*extent
				for _, x := range []*extent{f.slots, f.free, f.dir} {
					x.walk(func(x *extent) { extents = append(extents, x) })
				}
				x := extents[rng.IntN(len(extents))]
				p := slices.Clone(x.bytes())
				p[rng.IntN(len(p))] ^= 1 << rng.IntN(8)
				if x.el != nil {
					x.el.setRaw(p)
				} else {
					x.raw = p
				}
				if rng.IntN(2) == 0 {
					f.settled = nil
				}
				d, err := blobdir.Open(&flat{f.resealWith(nil)}, options(t, kind, rng.IntN(2) == 0))
				require.Error(t, err)
				require.Nil(t, d)
				if x.kind != "key slots" {
					require.ErrorIs(t, err, blobdir.ErrTampered)
				}
			}
		})
	}
}
