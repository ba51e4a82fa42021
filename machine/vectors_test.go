package machine_test

import (
	"bytes"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"os"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"nvstore.dev/image"
	"nvstore.dev/image/imagetest"
	"nvstore.dev/machine"
)

// This is section 18 of FORMAT.md once more, with encoding/asn1.

const (
	mib      = 1 << 20
	reserved = 128 << 10
	testSize = 4*mib + reserved
)

type body struct {
	Type        asn1.ObjectIdentifier
	Version     int
	Slot        int
	Sequence    int64
	Machine     []byte
	ImageSize   int64
	DiskSize    int64
	StateOffset int64
	StateSize   int64
}

var layoutType = asn1.ObjectIdentifier{1, 2, 840, 113556, 1, 8000, 2554, 64817, 25853, 8626, 17789, 42095, 794743, 15004100, 1, 9}

func good(slot int) body {
	return body{layoutType, 1, slot, 7 + int64(slot), bytes.Repeat([]byte{0x6e}, 16), testSize, mib + 512, 2 * mib, mib}
}

func marshal(t testing.TB, v any) []byte {
	p, err := asn1.Marshal(v)
	require.NoError(t, err)
	return p
}

// signed puts the CRC of a body behind it.
func signed(t testing.TB, body []byte) []byte {
	return marshal(t, struct {
		Body asn1.RawValue
		CRC  []byte
	}{asn1.RawValue{FullBytes: body}, binary.BigEndian.AppendUint32(nil, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))})
}

func encode(t testing.TB, b body) []byte { return signed(t, marshal(t, b)) }

// disk has these two copies.
func disk(t testing.TB, copies ...[]byte) image.Device {
	d := imagetest.NewMemory(testSize)
	for slot, p := range copies {
		_, err := d.WriteAt(p, testSize-reserved+int64(slot)*64<<10)
		require.NoError(t, err)
	}
	return d
}

func with(b body, change func(*body)) body {
	change(&b)
	return b
}

// vectors have one fault each, in the copy of slot 1. Everything else is right.
func vectors(t testing.TB) []struct {
	rule, name string
	copy       []byte
} {
	b := func(change func(*body)) []byte { return encode(t, with(good(1), change)) }
	longInt := marshal(t, good(1))
	i := bytes.Index(longInt, []byte{0x02, 0x01, 0x01, 0x02, 0x01, 0x01})
	require.Positive(t, i)
	longInt = append(append(bytes.Clone(longInt[:i]), 0x02, 0x02, 0x00, 0x01), longInt[i+3:]...)
	longInt[1]++
	extra := append(marshal(t, good(1)), 0x02, 0x01, 0x01)
	extra[1] += 3
	behind := append(encode(t, good(1)), 0x02, 0x01, 0x01)
	behind[1] += 3
	badCRC := encode(t, good(1))
	badCRC[len(badCRC)-1] ^= 1
	flipped := encode(t, good(1))
	flipped[60] ^= 1
	cut := encode(t, good(1))
	cut[1] = 0x7f
	cut = append(cut, make([]byte, 20)...)
	return []struct {
		rule, name string
		copy       []byte
	}{
		{"L1", "an INTEGER of two bytes", signed(t, longInt)},
		{"L1", "an element more", signed(t, extra)},
		{"L1", "an element behind the CRC", behind},
		{"L1", "a length past the elements", cut},
		{"L2", "another CRC", badCRC},
		{"L2", "a bit", flipped},
		{"L3", "version 2", b(func(b *body) { b.Version = 2 })},
		{"L4", "slot 2", b(func(b *body) { b.Slot = 2 })},
		{"L4", "sequence 0", b(func(b *body) { b.Sequence = 0 })},
		{"L4", "sequence above", b(func(b *body) { b.Sequence = 1<<62 + 1 })},
		{"L4", "no machine", b(func(b *body) { b.Machine = make([]byte, 16) })},
		{"L4", "a short machine", b(func(b *body) { b.Machine = b.Machine[:15] })},
		{"L4", "a negative disk", b(func(b *body) { b.DiskSize = -512 })},
		{"L4", "a window before the image", b(func(b *body) { b.StateOffset = -4096 })},
		{"L4", "a negative window", b(func(b *body) { b.StateSize = -4096 })},
		{"L4", "a small image", b(func(b *body) { b.ImageSize = reserved - 1 })},
		{"L5", "the other slot", b(func(b *body) { b.Slot = 0 })},
		{"L6", "another image", b(func(b *body) { b.ImageSize += 512 })},
		{"L7", "half a sector", b(func(b *body) { b.DiskSize++ })},
		{"L7", "a disk in the window", b(func(b *body) { b.DiskSize = b.StateOffset + 512 })},
		{"L8", "a window in half a block", b(func(b *body) { b.StateOffset += 2048 })},
		{"L8", "half a block", b(func(b *body) { b.StateSize += 2048 })},
		{"L8", "a small window", b(func(b *body) { b.StateSize = 256<<10 - 4096 })},
		{"L8", "a window over the record", b(func(b *body) { b.StateSize = 2*mib + 4096 })},
		{"L8", "a window behind the image", b(func(b *body) { b.StateOffset = 1 << 62; b.DiskSize = 0 })},
		{"L8", "a window whose end wraps", b(func(b *body) { b.StateSize = 1 << 62 })},
		{"L9", "no copy", nil},
		{"L9", "another type", b(func(b *body) { b.Type = append(layoutType[:13:13], 8) })},
	}
}

func TestVectors(t *testing.T) {
	shown := map[string]bool{}
	for _, v := range vectors(t) {
		t.Run(v.rule+" "+v.name, func(t *testing.T) {
			shown[v.rule] = true
			// Beside a good copy, that one counts.
			d, err := machine.Open(disk(t, encode(t, good(0)), v.copy))
			require.NoError(t, err)
			require.Equal(t, int64(7), d.Layout().Sequence)
			e := (*machine.Error)(nil)
			require.ErrorAs(t, d.Status(), &e)
			require.Equal(t, v.rule, e.Rule, "%v", e)
			require.EqualValues(t, testSize-64<<10, e.Off)
			// Alone it is refused.
			_, err = machine.Open(disk(t, nil, v.copy))
			if v.rule == "L9" {
				require.Equal(t, machine.ErrNoLayout, err)
				return
			}
			require.ErrorAs(t, err, &e)
			kind := image.ErrCorrupt
			if v.rule == "L3" {
				kind = image.ErrUnsupported
			}
			require.True(t, errors.Is(err, kind), "%v", err)
		})
	}
	t.Run("L10", func(t *testing.T) {
		shown["L10"] = true
		for _, other := range []body{
			with(good(1), func(b *body) { b.Sequence = 7 }),
			with(good(1), func(b *body) { b.Machine = bytes.Repeat([]byte{1}, 16) }),
		} {
			_, err := machine.Open(disk(t, encode(t, good(0)), encode(t, other)))
			e := (*machine.Error)(nil)
			require.ErrorAs(t, err, &e)
			require.Equal(t, "L10", e.Rule)
		}
	})
	text, err := os.ReadFile("../FORMAT.md")
	require.NoError(t, err)
	rows := regexp.MustCompile(`(?m)^\| (L\d+) \|`).FindAllSubmatch(text, -1)
	require.Len(t, rows, len(shown))
	for _, r := range rows {
		require.True(t, shown[string(r[1])], "no vector for %s", r[1])
	}
}

// The package's encoding is encoding/asn1's.
func TestEncoding(t *testing.T) {
	o := machine.Options{Disk: mib + 512, MaxDisk: 2 * mib, State: mib, ImageSize: testSize, Machine: [16]byte(good(0).Machine)}
	l, err := machine.Plan(&o)
	require.NoError(t, err)
	dev := imagetest.NewMemory(testSize)
	d, err := machine.Format(dev, l)
	require.NoError(t, err)
	got := d.Layout()
	for slot := range 2 {
		want := good(slot)
		want.Sequence, want.StateOffset, want.StateSize = int64(slot)+1, got.StateOffset, got.StateSize
		p := make([]byte, 4096)
		require.NoError(t, image.ReadFull(dev, p, testSize-reserved+int64(slot)*64<<10))
		require.Equal(t, encode(t, want), bytes.TrimRight(p, "\x00"))
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(encode(f, good(0)), encode(f, good(1)))
	for _, v := range vectors(f) {
		f.Add(encode(f, good(0)), v.copy)
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		dev := disk(t, a[:min(len(a), 4096)], b[:min(len(b), 4096)])
		d, err := machine.Open(dev)
		if err != nil {
			return
		}
		l := d.Layout()
		require.Equal(t, int64(testSize), l.ImageSize)
		require.LessOrEqual(t, l.DiskSize, l.StateOffset)
		require.LessOrEqual(t, l.StateOffset+l.StateSize, int64(testSize-reserved))
		for _, open := range []func() (image.Device, error){d.Guest, d.State} {
			_, err := open()
			require.NoError(t, err)
		}
		// What was read is written the same.
		var id [16]byte
		copy(id[:], l.Machine[:])
		same := 0
		for slot, p := range [][]byte{a, b} {
			e := encode(t, body{layoutType, 1, slot, l.Sequence, id[:], l.ImageSize, l.DiskSize, l.StateOffset, l.StateSize})
			if bytes.HasPrefix(p, e) {
				same++
			}
		}
		require.Equal(t, 1, same)
	})
}
